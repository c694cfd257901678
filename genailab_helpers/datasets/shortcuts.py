"""What tells the classes of a data set apart besides the anatomy, and whether anything does.

Every row of an audit asks the same small model the same question of another part of the image: a kernel ridge
regression with a Gaussian kernel (width from the median distance), cross-validated over whole patients.
"""

import textwrap
import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.linalg import solve
from scipy.special import gammaln
from torch import Tensor

from genailab_helpers.datasets.duplicates import resized
from genailab_helpers.datasets.folders import read_images
from genailab_helpers.datasets.names import GRADES, sort_classes
from genailab_helpers.features import lite0_features, local_contrast
from genailab_helpers.radiographs import inspect_radiograph
from genailab_helpers.statistics import Interval, bootstrap_interval, class_mean, grouped_folds

ALPHA = 0.001  # p below this is a signal, and with an effect a shortcut
EFFECT = 0.05  # balanced accuracy above chance that matters
N_PERMUTATIONS = 4999
MAX_IMAGES = 2000  # of larger sets a random part, whole patients, is looked at: the work grows with n cubed
SIDE = 32  # pixels; all that the audit of shortcuts sees of an image

READ_SIDE = 96  # pixels at which images are read for either question, as for near duplicates
_FOLDS, _REPEATS = 5, 3
_RIDGE = 0.01
_MARGIN = 0.01  # of votes from -1 to 1: classes that are closer share the guess, whatever the last digits say
_FRAME, _CORNER = 2, 4  # pixels of SIDE


class ShortcutRow(NamedTuple):
    """How well one part of the images tells the classes apart.

    Attributes
    ----------
    name : str
        The part, such as "four corners".
    score : Interval
        Cross-validated accuracy, 95 % interval over patients, for these folds.
    balanced : float
        Mean over the classes of the share of their images that is told right; chance is 1 / classes.
    chance : float
        Accuracy of always naming the commonest class.
    p : float
        Permutation p-value.
    clue : bool
        Whether this part cannot show the disease, so that it counts as a shortcut.
    effect : float
        Balanced accuracy above chance.
    """

    name: str
    score: Interval
    balanced: float
    chance: float
    p: float
    clue: bool
    effect: float

    @property
    def flagged(self) -> bool:
        """Whether this is a shortcut: not by chance, and large enough to matter."""
        return self.clue and self.p < ALPHA and self.effect >= EFFECT


class ShortcutReport(NamedTuple):
    """What `audit_shortcuts` found; `str()` gives table and verdict.

    Attributes
    ----------
    rows : tuple of ShortcutRow
        From what is furthest from the anatomy to the whole image.
    classes : tuple of str
        In their order.
    n_images : int
        How many were looked at.
    left_out : int
        How many of them stayed out of the p-values, because their patient has images of two classes.
    unread : int
        How many more images cannot be read, or are of a class of fewer than five images.
    """

    rows: tuple[ShortcutRow, ...]
    classes: tuple[str, ...]
    n_images: int
    left_out: int
    unread: int

    @property
    def flagged(self) -> list[str]:
        """Names of the rows that are shortcuts."""
        return [row.name for row in self.rows if row.flagged]

    @property
    def verdict(self) -> str:
        """What follows, in words."""
        if not self.flagged:
            return ("No shortcut found in file properties, frame or corners; that does not prove that "
                    "there is none.")
        worst = max((row for row in self.rows if row.flagged), key=lambda row: row.effect)
        chance = worst.balanced - worst.effect
        return (f"Shortcut: the class can be told from {', '.join(self.flagged)}, where no disease shows "
                f"({worst.name}: balanced accuracy {worst.balanced:.3f}, chance {chance:.3f}). A model may "
                "learn that instead, and a good score does not show that it sees the disease.")

    def __str__(self) -> str:
        lines = [f"{', '.join(self.classes)}: {self.n_images} images of {self.rows[0].score.n} patients"
                 f"{_not_looked_at(self.unread)}; balanced chance {1 / len(self.classes):.3f}",
                 f"{'seen':<22}{'accuracy':<22}{'balanced':>8}{'chance':>8}{'p':>8}  shortcut"]
        for row in self.rows:
            accuracy = f"{row.score.value:.3f} [{row.score.low:.3f}, {row.score.high:.3f}]"
            flag = "YES" if row.flagged else "no" if row.clue else "(holds anatomy)"
            lines.append(f"{row.name:<22}{accuracy:<22}{row.balanced:>8.3f}{row.chance:>8.3f}"
                         f"{row.p:>8.4f}  {flag}")
        if self.left_out:
            lines.append(f"p without {self.left_out} images of patients who have images of two classes")
        return "\n".join([*lines, textwrap.fill(self.verdict, 100)])


class LabelSignal(NamedTuple):
    """What `label_signal` found; `str()` says it in one sentence.

    Attributes
    ----------
    p : float
        Permutation p-value.
    score : Interval
        Cross-validated balanced accuracy, 95 % interval over patients, for these folds.
    chance : float
        1 / classes.
    n_images, unread : int
        Images looked at; and how many more cannot be read, or are of a class of fewer than five images.
    """

    p: float
    score: Interval
    chance: float
    n_images: int
    unread: int

    @property
    def signal(self) -> bool:
        """Whether the images tell anything about the labels (`p` < 0.001)."""
        return self.p < ALPHA

    @property
    def absent(self) -> bool:
        """Whether they are shown to tell next to nothing: the interval ends below chance + 0.05."""
        return not self.signal and self.score.high < self.chance + EFFECT

    def __str__(self) -> str:
        found = ("carry signal" if self.signal else "carry no signal" if self.absent else
                 "were not shown to carry signal, nor to carry none")
        return textwrap.fill(
            f"The labels {found}: balanced accuracy {self.score.value:.3f} "
            f"[{self.score.low:.3f}, {self.score.high:.3f}], chance {self.chance:.3f}, p = {self.p:.4f} "
            f"({self.n_images} images of {self.score.n} patients{_not_looked_at(self.unread)}).", 100)


def _not_looked_at(unread: int) -> str:
    return f", {unread} more unreadable or of a tiny class" if unread else ""


def audit_shortcuts(images: pd.DataFrame, seed: int = 0) -> ShortcutReport:
    """Ask what tells the classes apart besides the disease.

    Parameters
    ----------
    images : pandas.DataFrame
        From `index.index_images`; splits are looked at together. Images that cannot be read, and classes of
        fewer than five images, are left out and counted; of more than 2,000 images a random part, by whole
        patients, is looked at.
    seed : int, default 0
        Start of the random numbers.

    Returns
    -------
    ShortcutReport
        File properties alone, a frame of 2 and four corners of 4 x 4 of 32 x 32 pixels are flagged at p <
        0.001 if balanced accuracy is 5 points or more above chance. Mean and standard deviation, the image
        with its centre blacked and the whole image stand beside them for comparison: clean images carry
        anatomy there too.

    Raises
    ------
    ValueError
        If there are fewer than two classes, or too few patients for any p < 0.001.

    Notes
    -----
    The votes are means over 3 x 5 folds grouped by patient, of a classifier weighted by class (ridge 0.01).
    Classes whose votes differ by less than 0.01 share the guess, so that no score hangs on the last digit of
    a vote. That it can be far above chance with the lungs blacked is the finding of Maguolo and Nanni,
    Information Fusion 76 (2021).
    """
    batch, kept, folds = _read(images, seed)
    small = resized(batch, SIDE)
    edge = torch.arange(SIDE) % (SIDE - _CORNER) < _CORNER
    moments = torch.stack([small.mean((1, 2, 3)), small.std((1, 2, 3))], 1)
    parts = [("file properties", True, torch.from_numpy(_property_features(kept["path"]))),
             ("2-pixel frame", True, small[:, 0, ~_centre(SIDE - 2 * _FRAME)]),
             ("four corners", True, small[:, 0, edge[:, None] & edge]),
             ("mean and deviation", False, moments),
             ("centre 75 % blacked", False, small.masked_fill(_centre(round(0.75 * SIDE)), -1)),
             ("centre 62 % blacked", False, small.masked_fill(_centre(round(0.62 * SIDE)), -1)),
             ("whole image", False, small)]
    rows = [_row(name, clue, part.flatten(1).double().numpy(), kept, folds, seed)
            for name, clue, part in parts]
    return ShortcutReport(tuple(rows), tuple(kept["class"].cat.categories), len(kept),
                          int((~kept["tested"]).sum()), kept.attrs["unread"])


def label_signal(images: pd.DataFrame, seed: int = 0) -> LabelSignal:
    """Ask whether the labels of a data set can be learned at all.

    Parameters
    ----------
    images : pandas.DataFrame
        As for `audit_shortcuts`.
    seed : int, default 0
        Start of the random numbers.

    Returns
    -------
    LabelSignal
        `signal` is true at p < 0.001. A shortcut is a signal too: ask `audit_shortcuts`.

    Raises
    ------
    ValueError
        If there are fewer than two classes, or too few patients for any p < 0.001.

    Notes
    -----
    Ridge regression on the features of the frozen Lite0 network, of the images and of the images with their
    local contrast evened out. Grades are ordered, so for them the p-value asks how well the number of the
    grade is guessed; that finds fainter signals than class against class does.
    """
    batch, kept, folds = _read(images, seed)
    views = (batch, local_contrast(batch))
    features = _standardised(np.hstack([lite0_features(view, side=READ_SIDE) for view in views]))
    kernel = features @ features.T / max(1, features.shape[1])  # found more than a Gaussian kernel
    codes, classes = kept["class"].cat.codes.to_numpy(int), kept["class"].cat.categories
    guesses, right = _guesses(kernel, codes, folds, ridge=1.0)
    score = bootstrap_interval(class_mean, codes, right, groups=kept["patient"], seed=seed)
    p = _p_value(guesses, kept, seed, ordered=set(classes) <= set(GRADES))
    return LabelSignal(p, score, 1 / len(classes), len(kept), kept.attrs["unread"])


def _read(images: pd.DataFrame, seed: int) -> tuple[Tensor, pd.DataFrame, "Folds"]:
    """Read the images of classes with five or more, of large sets those of some patients drawn at random.

    The table returned has its classes as a categorical, and the column `tested`: images of patients with one
    class, which alone can be exchanged.
    """
    listed = images[images["class"] != ""]
    if len(listed) > MAX_IMAGES:
        patients, counts = np.unique(listed["patient"].to_numpy(str), return_counts=True)
        order = np.random.default_rng(seed).permutation(len(patients))
        listed = listed[listed["patient"].isin(patients[order[counts[order].cumsum() <= MAX_IMAGES]])]
    with warnings.catch_warnings(action="ignore"):  # the report counts what is left out
        batch, kept = read_images(listed, READ_SIDE, "skip")
    large = kept.groupby("class")["class"].transform("size") >= _FOLDS
    batch, kept = batch[torch.tensor(large.to_numpy())], kept[large].copy()
    kept.attrs["unread"] = len(listed) - len(kept)
    kept["tested"] = kept.groupby("patient")["class"].transform("nunique") == 1
    kept["class"] = pd.Categorical(kept["class"], sort_classes(kept["class"]))
    counts = kept[kept["tested"]].groupby("class", observed=False)["patient"].nunique()
    # as many ways to deal the labels to the patients as a multinomial coefficient says
    if gammaln(counts.sum() + 1) - gammaln(counts + 1).sum() <= -np.log(ALPHA):
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"{images.attrs['root']}: too few patients to tell ({found}, each with images of "
                         "one class); expected two or more classes and, for two, 7 or more patients in each")
    return batch, kept, folds_by_patient(kept["patient"].to_numpy(str), seed)


def _row(name: str, clue: bool, features: np.ndarray, kept: pd.DataFrame, folds: "Folds",
         seed: int) -> ShortcutRow:
    codes, classes = kept["class"].cat.codes.to_numpy(int), kept["class"].cat.categories
    guesses, right = _guesses(gaussian_kernel(features), codes, folds, _RIDGE)
    score = bootstrap_interval(np.mean, right, groups=kept["patient"], seed=seed)
    balanced = class_mean(codes, right)
    return ShortcutRow(name, score, balanced, np.bincount(codes).max() / len(codes),
                       _p_value(guesses, kept, seed), clue, balanced - 1 / len(classes))


def _standardised(features: np.ndarray) -> np.ndarray:
    """Give each column mean 0 and standard deviation 1; a constant one goes."""
    spread = features.std(0)
    varies = spread > 1e-9 * np.abs(features).max(0)
    return (features - features.mean(0))[:, varies] / spread[varies]


def gaussian_kernel(features: np.ndarray) -> np.ndarray:
    """Return exp(-d^2 / 2 m), m the median of the squared distances d^2 above 0; 0 where all are alike."""
    features = features - features.mean(0)  # smaller numbers lose fewer digits below
    lengths = (features**2).sum(1)
    squared = (lengths[:, None] + lengths - 2 * features @ features.T).clip(0)
    apart = squared[squared > 1e-12 * lengths.max()]
    if not apart.size:
        return np.zeros_like(squared)
    squared /= -2 * np.median(apart)
    return np.exp(squared, out=squared)


Folds = list[tuple[np.ndarray, np.ndarray]]


def folds_by_patient(patients: np.ndarray, seed: int = 0, labels: np.ndarray | None = None) -> Folds:
    """Return three times five folds, training and test rows, as `statistics.grouped_folds` makes them."""
    return [fold for repeat in range(_REPEATS)
            for fold in grouped_folds(patients, _FOLDS, seed + repeat, labels)]


def votes(kernel: np.ndarray, codes: np.ndarray, folds: Folds, ridge: float) -> np.ndarray:
    """Ask a kernel ridge regression, classes weighted equally, for the class of images of patients new to it.

    Parameters
    ----------
    kernel : numpy.ndarray
        (n, n) likeness of the images.
    codes : numpy.ndarray
        (n,) number of the class of each.
    folds : list of (numpy.ndarray, numpy.ndarray)
        From `folds_by_patient`.
    ridge : float
        Above 0.

    Returns
    -------
    numpy.ndarray
        (3, n, classes) about -1 (no) to 1 (yes), one answer of each of the three times.
    """
    one_hot = np.eye(codes.max() + 1)[codes]
    found = np.empty((_REPEATS, *one_hot.shape))
    for number, (train, test) in enumerate(folds):
        counts = one_hot[train].sum(0)
        inner = kernel[np.ix_(train, train)]
        inner[np.diag_indices(len(train))] += ridge * counts[codes[train]] * one_hot.shape[1] / len(train)
        fitted = solve(inner, 2 * one_hot[train] - 1, assume_a="pos", overwrite_a=True)
        found[number // _FOLDS, test] = kernel[np.ix_(test, train)] @ fitted
    return found


def _guesses(kernel: np.ndarray, codes: np.ndarray, folds: Folds,
             ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Divide the guess of each image between the classes with most votes: (n, classes), rows sum to 1.

    Returned with the share of each guess that is right, (n,).
    """
    found = votes(kernel, codes, folds, ridge)
    # where nothing is known all classes tie: then name the commonest, as chance does
    found += 2 * _MARGIN * (np.arange(found.shape[-1]) == np.bincount(codes).argmax())
    near = (1 - (found.max(-1, keepdims=True) - found) / _MARGIN).clip(0)
    guesses = (near / near.sum(-1, keepdims=True)).mean(0)
    return guesses, guesses[np.arange(len(guesses)), codes]


def _p_value(guesses: np.ndarray, kept: pd.DataFrame, seed: int, ordered: bool = False) -> float:
    """Return how often labels dealt anew to whole patients agree with the guesses as well as the true ones.

    Agreement is balanced accuracy; of ordered classes, the covariance of true and guessed place. The guesses
    were made with the true labels of other patients, which makes them a little worse than chance where there
    is nothing to learn: the test errs to the safe side.
    """
    guesses, kept = guesses[kept["tested"]], kept[kept["tested"]]
    codes, patients = kept["class"].cat.codes.to_numpy(int), kept["patient"].to_numpy(str)
    _, first, patient_of = np.unique(patients, return_index=True, return_inverse=True)
    generator, own = np.random.default_rng(seed), codes[first]
    dealt = np.stack([own, *(generator.permutation(own) for _ in range(N_PERMUTATIONS))], 1)[patient_of]
    if ordered:
        place = guesses @ np.arange(guesses.shape[1])
        statistic = (place - place.mean()) @ dealt
    else:
        statistic = sum(guess @ (dealt == code) / (dealt == code).sum(0)
                        for code, guess in enumerate(guesses.T))
    margin = 1e-9 * np.abs(statistic).max()  # equal deals may differ in rounding
    return float((statistic >= statistic[0] - margin).mean())  # the first is the observed one


def _centre(side: int) -> Tensor:
    """Return a (SIDE, SIDE) bool mask of a centred square."""
    inside = (torch.arange(SIDE) - (SIDE - 1) / 2).abs() < side / 2
    return inside[:, None] & inside


def _property_features(paths: pd.Series) -> np.ndarray:
    """Return format and mode as 0 or 1, width, height and aspect in octaves, and how common the size is."""
    headers = pd.DataFrame([inspect_radiograph(path) for path in paths])
    size = np.log2(headers[["width", "height"]])
    common = headers.groupby(["width", "height"])["width"].transform("size")  # one detector gives one size
    kinds = pd.get_dummies(headers[["format", "mode"]], dtype=float)
    return _standardised(np.column_stack([kinds, size, size["width"] - size["height"], np.log2(common)]))
