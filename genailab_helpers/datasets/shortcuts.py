"""What tells the classes of a data set apart besides the anatomy, and whether anything does.

Every row of an audit asks the same small model the same question of another part of the film: a kernel ridge
regression with a Gaussian kernel (width from the median distance), cross-validated over whole patients.
"""

import csv
import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.spatial.distance import pdist, squareform
from scipy.special import gammaln
from torch import Tensor

from genailab_helpers.datasets.catalog import GRADES, canonical_class, sort_classes
from genailab_helpers.datasets.folders import Film, cached_radiographs, index_films
from genailab_helpers.features import lite0_features, local_contrast
from genailab_helpers.radiographs import (
    RADIOGRAPH_SUFFIXES,
    FileProperties,
    inspect_radiograph,
    read_radiograph,
)
from genailab_helpers.statistics import Interval, bootstrap_interval, grouped_folds

ALPHA = 0.001  # p below this is a shortcut, or a signal
N_PERMUTATIONS = 4999
MAX_FILMS = 2000  # of larger sets a random part, whole patients, is looked at: the work grows with n cubed
SIDE = 32  # pixels; all that is left of a film here

_FOLDS, _REPEATS = 5, 3
_RIDGE = 0.01
_FRAME, _CORNER = 2, 4  # pixels of SIDE
_CLUE_COLOUR, _OTHER_COLOUR = "#d55e00", "#0072b2"  # vermilion and blue, told apart by the colour-blind


class ShortcutRow(NamedTuple):
    """How well one part of the films tells the classes apart.

    Attributes
    ----------
    name : str
        The part, such as "four corners".
    score : Interval
        Cross-validated accuracy, 95 % interval over patients, for these folds.
    balanced : float
        Mean over the classes of the share of their films that is told right; chance is 1 / classes.
    chance : float
        Accuracy of always naming the commonest class.
    p : float
        Permutation p-value.
    clue : bool
        Whether this part cannot show the disease, so that it counts as a shortcut.
    clearest : str
        The class that is best told from the rest.
    clearest_score, clearest_chance : float
        Accuracy of telling it from the rest, and of always naming the commoner side.
    """

    name: str
    score: Interval
    balanced: float
    chance: float
    p: float
    clue: bool
    clearest: str
    clearest_score: float
    clearest_chance: float

    @property
    def flagged(self) -> bool:
        """Whether this is a shortcut."""
        return self.clue and self.p < ALPHA


@dataclass(frozen=True)
class ShortcutReport:
    """What `audit_shortcuts` found; `str()` gives table and verdict.

    Parameters
    ----------
    rows : tuple of ShortcutRow
        From what is furthest from the anatomy to the whole film.
    classes : tuple of str
        In their order.
    n_films : int
        How many were looked at.
    left_out : int
        How many of them stayed out of the p-values, because their patient has films of two classes.
    unread : int
        How many more films cannot be read, or are of a class of fewer than five films.
    """

    rows: tuple[ShortcutRow, ...]
    classes: tuple[str, ...]
    n_films: int
    left_out: int
    unread: int

    @property
    def flagged(self) -> list[str]:
        """Names of the rows that are shortcuts."""
        return [row.name for row in self.rows if row.flagged]

    @property
    def verdict(self) -> str:
        """What follows, in one sentence."""
        flagged = [row for row in self.rows if row.flagged]
        if not flagged:
            return ("No shortcut found in file properties, frame or corners; that does not prove that "
                    "there is none.")
        worst = max(flagged, key=lambda row: _gain(row.clearest_score, row.clearest_chance))
        how = (f"{worst.clearest} or not, accuracy {worst.clearest_score:.3f}, chance "
               f"{worst.clearest_chance:.3f}")
        if worst.clearest_score <= worst.clearest_chance:  # better than chance only over all classes
            how = f"balanced accuracy {worst.balanced:.3f}, chance {1 / len(self.classes):.3f}"
        give = "gives" if len(flagged) == 1 else "give"
        return (f"Shortcut: {', '.join(self.flagged)} {give} the class away without any anatomy "
                f"({worst.name}: {how}); a model trained on these films may learn that instead.")

    def __str__(self) -> str:
        head = (f"{', '.join(self.classes)}: {self.n_films} films of {self.rows[0].score.n} patients"
                f"{_not_looked_at(self.unread)}; "
                f"balanced chance {1 / len(self.classes):.3f}")
        lines = [head, f"{'seen':<22}{'accuracy':<22}{'balanced':>8}{'chance':>8}{'p':>8}  shortcut"]
        for row in self.rows:
            accuracy = f"{row.score.value:.3f} [{row.score.low:.3f}, {row.score.high:.3f}]"
            flag = "YES" if row.flagged else "no" if row.clue else "(holds anatomy)"
            lines.append(f"{row.name:<22}{accuracy:<22}{row.balanced:>8.3f}{row.chance:>8.3f}"
                         f"{row.p:>8.4f}  {flag}")
        if self.left_out:
            lines.append(f"p without {self.left_out} films of patients who have films of two classes")
        return "\n".join([*lines, textwrap.fill(self.verdict, 100)])

    def figure(self) -> Figure:
        """Draw accuracy and interval of every row against chance.

        Returns
        -------
        matplotlib.figure.Figure
            Shortcuts as filled squares, the rest as open circles.
        """
        figure = Figure(figsize=(7.2, 1.3 + 0.38 * len(self.rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(self.rows):
            value, low, high = row.score[:3]
            colour, marker = (_CLUE_COLOUR, "s") if row.flagged else (_OTHER_COLOUR, "o")
            axes.errorbar(value, place, xerr=[[value - low], [high - value]], color=colour, marker=marker,
                          markersize=7, markerfacecolor=colour if row.flagged else "white", capsize=3)
            axes.annotate("shortcut" if row.flagged else "", (high, place), (6, 0), color=colour,
                          textcoords="offset points", va="center", fontsize=10)
        axes.axvline(self.rows[0].chance, color="0.35", linestyle="--")
        axes.annotate("chance", (self.rows[0].chance, 1), (4, 3), xycoords=("data", "axes fraction"),
                      textcoords="offset points", color="0.25", fontsize=10)
        axes.set_yticks(range(len(self.rows)), [row.name for row in self.rows], fontsize=10)
        axes.set_ylim(len(self.rows) - 0.5, -0.5)
        axes.set_xlim(right=max(1.02, *(row.score.high + 0.16 * row.flagged for row in self.rows)))
        axes.set_xlabel("accuracy with 95 % interval", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"Which class? What a tiny model tells from parts of the film ({self.n_films} films)",
                       fontsize=11, pad=18, loc="right")
        return figure


@dataclass(frozen=True)
class LabelSignal:
    """What `label_signal` found; `str()` says it in one sentence.

    Parameters
    ----------
    signal : bool
        Whether the films tell anything about the labels (`p` < 0.001).
    p : float
        Permutation p-value.
    score : Interval
        Cross-validated balanced accuracy, 95 % interval over patients, for these folds.
    chance : float
        1 / classes.
    n_films, left_out, unread : int
        Films looked at; how many of them stayed out of the p-value, because their patient has films of two
        classes; and how many more cannot be read, or are of a class of fewer than five films.
    """

    signal: bool
    p: float
    score: Interval
    chance: float
    n_films: int
    left_out: int
    unread: int

    def __str__(self) -> str:
        found = "carry signal" if self.signal else "carry no signal that can be found here"
        return textwrap.fill(
            f"The labels {found}: balanced accuracy {self.score.value:.3f} "
            f"[{self.score.low:.3f}, {self.score.high:.3f}], chance {self.chance:.3f}, p = {self.p:.4f} "
            f"({self.n_films} films of {self.score.n} patients{_not_looked_at(self.unread)}).", 100)


def _not_looked_at(unread: int) -> str:
    return f", {unread} more unreadable or of a tiny class" if unread else ""


def audit_shortcuts(root_dir: str | Path, properties: str | Path | None = None,
                    masks: str | Path | None = None, seed: int = 0,
                    classes: Sequence[str] | None = None) -> ShortcutReport:
    """Ask what tells the classes apart without looking at the anatomy.

    Parameters
    ----------
    root_dir : str or Path
        A data set as `index_films` takes it; splits are looked at together. Films that cannot be read, and
        classes of fewer than five films, are left out and counted; of more than 2,000 films a random part, by
        whole patients, is looked at.
    properties : str or Path, optional
        CSV with the columns class, stem, format, mode, width and height of the *original* file of every film,
        for sets whose films were converted. By default the headers of the films are read.
    masks : str or Path, optional
        Folder of lung masks with the films' names, below folders of the classes or not (the root of the
        COVID-19 Radiography Database will do). White is lung, whatever the size of the mask. The lungs are
        then blacked instead of a square in the centre.
    seed : int, default 0
        Start of the random numbers.
    classes : sequence of str, optional
        Look at these classes only; by default at all.

    Returns
    -------
    ShortcutReport
        File properties alone, a frame of 2 and four corners of 4 x 4 of 32 x 32 pixels are flagged at
        p < 0.001. Mean and spread, the film with its centre blacked and the whole film stand beside
        them for comparison: clean films carry anatomy there too.

    Raises
    ------
    ValueError
        If there are fewer than two classes, too few patients for any p < 0.001, or `properties` or `masks`
        lack a film.

    Notes
    -----
    The score is the mean over 3 x 5 folds grouped by patient of a classifier weighted by class (ridge 0.01).
    That it can be far above chance with the lungs blacked is the finding of Maguolo and Nanni, Information
    Fusion 76 (2021).
    """
    images, data = _read(root_dir, classes, SIDE, seed)
    frame = _centre(SIDE - 2 * _FRAME).logical_not()
    strips = [slice(0, _CORNER), slice(SIDE - _CORNER, SIDE)]
    corners = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for rows in strips:
        for columns in strips:
            corners[rows, columns] = True
    moments = torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)
    parts: list[tuple[str, bool, np.ndarray]] = [
        ("file properties", True, _property_features(data.films, properties)),
        ("2-pixel frame", True, images[:, 0, frame].numpy()),
        ("four corners", True, images[:, 0, corners].numpy()),
        ("mean and spread", False, moments.numpy()),
    ]
    if masks is None:
        for share in (0.75, 0.62):
            blacked = images.masked_fill(_centre(round(share * SIDE)), -1)
            parts.append((f"centre {100 * share:.0f} % blacked", False, blacked.flatten(1).numpy()))
    else:
        blacked = images.masked_fill(_lungs(Path(masks), data.films), -1)
        parts.append(("lungs blacked", False, blacked.flatten(1).numpy()))
    parts.append(("whole film", False, images.flatten(1).numpy()))
    rows_found = [_row(name, clue, features, data, seed) for name, clue, features in parts]
    return ShortcutReport(tuple(rows_found), tuple(data.classes), len(data.films), int((~data.tested).sum()),
                          data.unread)


def label_signal(root_dir: str | Path, seed: int = 0) -> LabelSignal:
    """Ask whether the labels of a data set can be learned at all.

    Parameters
    ----------
    root_dir : str or Path
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
    Ridge regression on the features of the frozen Lite0 network at 128 px, of the films and of the films with
    their local contrast evened out, its labels dealt anew to whole patients 4,999 times. Grades are ordered,
    so for them the p-value asks how well the number of the grade is predicted; that finds fainter signals
    than class against class does.
    """
    images, data = _read(root_dir, None, 128, seed)
    both = [lite0_features(view) for view in (images, local_contrast(images))]
    features = _standardised(np.hstack(both))
    kernel = features @ features.T / max(1, features.shape[1])  # found more than a Gaussian kernel
    ridge = 1.0  # 1,280 noisy features need a stronger one than 32 x 32 pixels
    guesses = _cross_validate(kernel, data, ridge)
    right = (guesses == data.codes).mean(0)
    n_classes = len(data.classes)
    score = bootstrap_interval(_balanced(n_classes), right, data.codes, groups=data.patients, seed=seed)
    p = _p_value(kernel, data, ridge, seed, ordered=set(data.classes) <= set(GRADES))
    return LabelSignal(p < ALPHA, p, score, 1 / n_classes, len(data.films), int((~data.tested).sum()),
                       data.unread)


def _read(root_dir: str | Path, classes: Sequence[str] | None, side: int,
          seed: int) -> tuple[Tensor, "_Labels"]:
    """Read the films of all classes that have five or more."""
    listed = _labelled(root_dir, classes, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report counts what is left out
        images, kept = cached_radiographs([film.path for film in listed], side, "skip")
    read = set(kept)
    films = [film for film in listed if film.path in read]
    counts = Counter(film.label for film in films)
    large = [counts[film.label] >= _FOLDS for film in films]
    films = [film for film, this in zip(films, large, strict=True) if this]
    return images[torch.tensor(large)], _Labels.of(root_dir, films, len(listed) - len(films), seed)


def _labelled(root_dir: str | Path, classes: Sequence[str] | None, seed: int) -> list[Film]:
    """List the films that have a class, of large sets those of some patients drawn at random."""
    films = [film for film in index_films(root_dir) if film.label]
    if classes is not None:
        wanted = {canonical_class(name) for name in classes}
        if absent := wanted - {film.label for film in films}:
            raise ValueError(f"{root_dir}: no films of {', '.join(sorted(absent))}; it has "
                             f"{', '.join(sort_classes(film.label for film in films))}")
        films = [film for film in films if film.label in wanted]
    if len(films) <= MAX_FILMS:
        return films
    patients, counts = np.unique([film.patient for film in films], return_counts=True)
    order = np.random.default_rng(seed).permutation(len(patients))
    drawn = set(patients[order[counts[order].cumsum() <= MAX_FILMS]])
    return [film for film in films if film.patient in drawn]


_Folds = list[tuple[np.ndarray, np.ndarray]]


class _Labels(NamedTuple):
    """Films that were read, their classes by number and their patients."""

    films: list[Film]
    classes: list[str]
    codes: np.ndarray
    patients: np.ndarray
    tested: np.ndarray  # (n,) bool: films of patients with one class, which alone can be exchanged
    unread: int
    folds: list[_Folds]  # three times, of all films
    tested_folds: list[_Folds]  # three times, of the tested ones, by their places among these

    @classmethod
    def of(cls, root_dir: str | Path, films: list[Film], unread: int, seed: int) -> "_Labels":
        classes = sort_classes(film.label for film in films)
        codes = np.array([classes.index(film.label) for film in films])
        patients = np.array([film.patient for film in films])
        labels: dict[str, set[int]] = {}
        for patient, code in zip(patients, codes, strict=True):
            labels.setdefault(patient, set()).add(code)
        tested = np.array([len(labels[patient]) == 1 for patient in patients])
        counts = np.bincount([min(own) for own in labels.values() if len(own) == 1], minlength=len(classes))
        # as many ways to deal the labels to the patients as a multinomial coefficient says
        if gammaln(counts.sum() + 1) - gammaln(counts + 1).sum() <= -math.log(ALPHA):
            found = ", ".join(f"{name} {count}" for name, count in zip(classes, counts, strict=True))
            raise ValueError(f"{root_dir}: too few patients to tell ({found}, each with films of one class); "
                             f"expected two or more classes and, for two, at least 7 patients in each")
        folds, tested_folds = ([grouped_folds(who, _FOLDS, seed + repeat) for repeat in range(_REPEATS)]
                               for who in (patients, patients[tested]))
        return cls(films, classes, codes, patients, tested, unread, folds, tested_folds)


def _row(name: str, clue: bool, features: np.ndarray, data: _Labels, seed: int) -> ShortcutRow:
    kernel = _kernel(features.astype(np.float64))
    guesses = _cross_validate(kernel, data, _RIDGE)
    right = (guesses == data.codes).mean(0)
    score = bootstrap_interval(np.mean, right, groups=data.patients, seed=seed)
    shares = [float((data.codes == code).mean()) for code in range(len(data.classes))]
    rest_chance = [max(share, 1 - share) for share in shares]
    told = [float(((guesses == code) == (data.codes == code)).mean()) for code in range(len(data.classes))]
    best = max(range(len(told)), key=lambda code: _gain(told[code], rest_chance[code]))
    return ShortcutRow(name, score, _balanced(len(data.classes))(right, data.codes), max(shares),
                       _p_value(kernel, data, _RIDGE, seed), clue, data.classes[best], told[best],
                       rest_chance[best])


def _gain(score: float, chance: float) -> float:
    """Say how far a score is on the way from chance to 1."""
    return (score - chance) / (1 - chance)


def _balanced(n_classes: int) -> Callable[..., float]:
    """Return the mean over classes of the mean of `right`; NaN where a resample lacks a class."""
    def balanced(right: np.ndarray, codes: np.ndarray) -> float:
        counts = np.bincount(codes, minlength=n_classes)
        if not counts.all():
            return math.nan
        return float((np.bincount(codes, right, n_classes) / counts).mean())
    return balanced


def _standardised(features: np.ndarray) -> np.ndarray:
    """Give each column mean 0 and spread 1; a constant one becomes exactly 0."""
    spread = features.std(0)
    varies = spread > 1e-9 * np.abs(features).max(0)
    return (features - features.mean(0))[:, varies] / spread[varies]


def _kernel(features: np.ndarray) -> np.ndarray:
    """Return exp(-d^2 / 2 m^2) with the median m of the distances d above 0; 0 where all films are alike."""
    squared = squareform(pdist(features, "sqeuclidean"))
    apart = squared[squared > 0]
    return np.exp(-squared / (2 * np.median(apart))) if apart.size else squared


def _cross_validate(kernel: np.ndarray, data: _Labels, ridge: float) -> np.ndarray:
    """Return the class guessed for each film in each of three repeats, (3, n)."""
    guesses = np.empty((_REPEATS, len(data.codes)), dtype=int)
    one_hot = np.eye(len(data.classes))[data.codes]
    for repeat, folds in enumerate(data.folds):
        for train, test in folds:
            counts = one_hot[train].sum(0)
            burden = counts[data.codes[train]] * len(data.classes) / len(train)  # 1 / weight of the class
            fitted = np.linalg.solve(kernel[np.ix_(train, train)] + ridge * np.diag(burden),
                                     2 * one_hot[train] - 1)
            # where nothing is known all classes tie: then name the commonest
            votes = kernel[np.ix_(test, train)] @ fitted + 1e-9 * counts / len(train)
            guesses[repeat, test] = votes.argmax(1)
    return guesses


def _p_value(kernel: np.ndarray, data: _Labels, ridge: float, seed: int, ordered: bool = False) -> float:
    """Return how often labels dealt anew to whole patients are predicted as well as the true ones.

    With kernel and folds given, cross-validated predictions of ridge regression are linear in the labels:
    one matrix S predicts all permutations. The statistic is the covariance of labels y and predictions S y,
    summed over the classes, each divided by its films; of ordered classes y is the place. The weights by
    class of the scores are left out: they depend on the labels, and S must not. For the same reason the folds
    know nothing of the labels.
    """
    rows = np.flatnonzero(data.tested)
    codes, patients = data.codes[rows], data.patients[rows]
    smoother = np.zeros((len(rows), len(rows)), dtype=np.float32)
    for folds in data.tested_folds:
        for train, test in folds:
            inner = kernel[np.ix_(rows[train], rows[train])]
            inner = inner - inner.mean(0) - inner.mean(1)[:, None] + inner.mean()  # takes the training mean
            outer = kernel[np.ix_(rows[test], rows[train])]  # out of features and labels
            outer = outer - outer.mean(1)[:, None]
            weights = np.linalg.solve(inner + ridge * np.eye(len(train)), outer.T).T
            smoother[np.ix_(test, train)] += weights - weights.mean(1)[:, None]
    _, first, patient_of = np.unique(patients, return_index=True, return_inverse=True)
    generator = np.random.default_rng(seed)
    own = codes[first]
    dealt = np.stack([own, *(generator.permutation(own) for _ in range(N_PERMUTATIONS))], 1)[patient_of]
    statistic = np.zeros(N_PERMUTATIONS + 1)  # the first is the observed one
    if ordered:
        statistic += _covariance(smoother, dealt.astype(np.float32))
    else:
        for code in range(len(data.classes)):
            member = (dealt == code).astype(np.float32)
            statistic += _covariance(smoother, member) / member.sum(0)
    margin = 1e-5 * np.abs(statistic).max()  # equal deals may differ in rounding
    return float((statistic >= statistic[0] - margin).mean())


def _covariance(smoother: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the covariance, times n, of each column of labels with its predictions."""
    return np.einsum("ij,ij->j", labels - labels.mean(0), smoother @ labels)


def _centre(side: int) -> Tensor:
    """Return a (SIDE, SIDE) bool mask of a centred square."""
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    start = (SIDE - side) // 2
    inside[start:start + side, start:start + side] = True
    return inside


def _lungs(folder: Path, films: list[Film]) -> Tensor:
    """Return (n, 1, SIDE, SIDE) bool: every pixel that a film's mask touches."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in RADIOGRAPH_SUFFIXES]
    files = [path for path in files if path.parent.name.lower() == "masks"] or files
    labels = {film.label for film in films}
    found = {}
    for path in files:
        above = [canonical_class(part) for part in path.relative_to(folder).parts[:-1]]
        found[next((name for name in above if name in labels), ""), path.stem] = path
    chosen = [found.get((film.label, film.path.stem)) or found.get(("", film.path.stem)) for film in films]
    if missing := [film.name for film, path in zip(films, chosen, strict=True) if path is None]:
        raise ValueError(f"{folder}: no mask for {len(missing)} of {len(films)} films such as {missing[0]}; "
                         "expected an image of the same name for each")
    lungs = torch.stack([read_radiograph(path, SIDE) for path in chosen if path]) > -1
    return lungs


def _property_features(films: list[Film], table: str | Path | None) -> np.ndarray:
    """Return format and mode as 0 or 1, width, height and aspect in octaves, and how common the size is."""
    headers = _listed_properties(films, Path(table)) if table else [inspect_radiograph(f.path) for f in films]
    kinds = [(header.format, header.mode) for header in headers]
    columns = [[float(kind[place] == value) for kind in kinds]
               for place in (0, 1) for value in sorted({kind[place] for kind in kinds})]
    width = np.log2([header.width for header in headers])
    height = np.log2([header.height for header in headers])
    sizes = Counter((header.width, header.height) for header in headers)  # one detector gives one size
    common = [float(np.log2(sizes[header.width, header.height])) for header in headers]
    return _standardised(np.array([*columns, width, height, width - height, common]).T)


def _listed_properties(films: list[Film], table: Path) -> list[FileProperties]:
    """Read what a table says of the original files."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            listed = {(canonical_class(row["class"]), row["stem"]):
                      FileProperties(row["format"], row["mode"], int(row["width"]), int(row["height"]))
                      for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{table}: expected a CSV with the columns class, stem, format, mode, width, height "
                         f"({error})") from error
    if missing := [film.name for film in films if (film.label, film.path.stem) not in listed]:
        raise ValueError(f"{table}: no row for {len(missing)} of {len(films)} films such as {missing[0]}; "
                         "expected class and stem of each")
    return [listed[film.label, film.path.stem] for film in films]
