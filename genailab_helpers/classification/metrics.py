"""How good a classifier is, and how sure that number is.

A metric is a function of labels (N,) and outputs, which are predicted labels (N,) or probabilities (N, K). It
returns one number; NaN where that does not exist, as the AUROC of a set with one class. Labels of two classes
may be integers 0 and 1 or booleans. A mean over classes leaves out a class without images (`class_mean` in
`statistics`). The formulas that scikit-learn has too are written out here, because its checks take 30 times
as long as the arithmetic and a bootstrap repeats them a thousand times for each number.

Models trained with several random seeds are judged together: `outputs` maps each seed to its outputs, and the
number is the mean over seeds. Intervals are over patients; they leave the differences between seeds out.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.stats import rankdata
from torch import Tensor

from genailab_helpers import statistics
from genailab_helpers.statistics import Interval, bootstrap_interval, class_mean, paired_difference

Metric = Callable[[np.ndarray, np.ndarray], float]
Outputs = Mapping[int, ArrayLike]
balanced_accuracy = statistics.balanced_accuracy


def qwk(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return Cohen's kappa with weights (i - j)^2: 1 - E[(y - p)^2] / E[(y - p')^2], p' of another image.

    Examples
    --------
    >>> qwk(np.array([0, 1, 2, 3, 4]), np.array([0, 1, 2, 3, 3]))
    0.9411764705882353
    """
    by_chance = np.var(labels) + np.var(predicted) + (np.mean(labels) - np.mean(predicted)) ** 2
    return _ratio(by_chance - np.mean(_distance(labels, predicted) ** 2), by_chance)


def linear_kappa(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return Cohen's kappa with weights `|i - j|`."""
    k = np.arange(int(max(labels.max(), predicted.max())))
    truth, guess = ((np.bincount(x, minlength=len(k) + 1).cumsum() / len(x))[k] for x in (labels, predicted))
    by_chance = (truth * (1 - guess) + guess * (1 - truth)).sum()
    return _ratio(by_chance - mae(labels, predicted), by_chance)


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the fraction of images that are predicted right."""
    return float(np.mean(labels == predicted))


def mae(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean distance from the truth, in grades."""
    return float(np.mean(_distance(labels, predicted)))


def macro_mae(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean over the grades of the mean distance from the truth (Baccianella et al. 2009)."""
    return class_mean(labels, _distance(labels, predicted))


def off_by_more_than_one(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the fraction of images that are more than one grade off."""
    return float(np.mean(_distance(labels, predicted) > 1))


def auroc(positive: np.ndarray, score: np.ndarray) -> float:
    """Return how often a positive image scores higher than a negative one, ties counting half.

    Examples
    --------
    >>> auroc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.4, 0.8]))
    0.875
    """
    positive = _binary(positive)
    n_positive = np.count_nonzero(positive)
    pairs = n_positive * (len(positive) - n_positive)
    return _ratio(rankdata(score)[positive].sum() - n_positive * (n_positive + 1) / 2, pairs)


def macro_auroc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean over classes of the AUROC of each against the others."""
    return float(np.mean([auroc(labels == k, probabilities[:, int(k)]) for k in np.unique(labels)]))


def rps(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the ranked probability score, sum_k (P(y <= k) - [y <= k])^2: 0 best, K - 1 worst."""
    below = labels[:, None] <= np.arange(probabilities.shape[1])
    return float(np.mean(((probabilities.cumsum(1) - below) ** 2).sum(1)))


def nll(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean of -log P(truth), P at least 2.2e-16 so that one certain mistake is not infinite."""
    return float(-np.mean(np.log(np.maximum(_of_truth(labels, probabilities), np.finfo(float).eps))))


def brier(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the Brier score, sum_k (P(k) - [y = k])^2: 0 best, 2 worst (Brier 1950)."""
    return float(np.mean((probabilities**2).sum(1) - 2 * _of_truth(labels, probabilities) + 1))


def ece(labels: np.ndarray, probabilities: np.ndarray, n_bins: int = 15) -> float:
    """Return the calibration error of the most probable class, in `n_bins` bins of equal width.

    The sum over bins of (images in it / N) `|accuracy - mean confidence|` (Guo et al. 2017). Chance alone
    raises it above 0, and more so in a resample: the interval lies too high, the more the fewer the images.
    """
    return _gap(np.ceil(probabilities.max(1) * n_bins), labels, probabilities)


def adaptive_ece(labels: np.ndarray, probabilities: np.ndarray, n_bins: int = 15) -> float:
    """Return the calibration error of the most probable class, in bins of equally many images."""
    place = rankdata(probabilities.max(1), method="ordinal") - 1
    return _gap(place * n_bins // len(labels), labels, probabilities)


def sensitivity(positive: np.ndarray, called: np.ndarray) -> float:
    """Return the fraction of the positive images that are predicted positive; both (N,), 0 or 1."""
    positive, called = _binary(positive), _binary(called)
    return _ratio(np.count_nonzero(positive & called), np.count_nonzero(positive))


def specificity(positive: np.ndarray, called: np.ndarray) -> float:
    """Return the fraction of the negative images that are predicted negative; both (N,), 0 or 1."""
    return sensitivity(~_binary(positive), ~_binary(called))


def ppv(positive: np.ndarray, called: np.ndarray) -> float:
    """Return the fraction of the images predicted positive that are; both (N,), 0 or 1."""
    return sensitivity(called, positive)


def npv(positive: np.ndarray, called: np.ndarray) -> float:
    """Return the fraction of the images predicted negative that are; both (N,), 0 or 1."""
    return specificity(called, positive)


def ppv_at_prevalence(sensitivity: ArrayLike, specificity: ArrayLike, prevalence: ArrayLike) -> np.ndarray:
    """Return the fraction of those predicted positive that are, where `prevalence` of all are (Bayes)."""
    hit = np.asarray(sensitivity) * np.asarray(prevalence)
    with np.errstate(invalid="ignore"):  # NaN where nothing is predicted positive
        return hit / (hit + (1 - np.asarray(specificity)) * (1 - np.asarray(prevalence)))


def choose_threshold(positive: ArrayLike, score: ArrayLike) -> float:
    """Choose from where to predict positive, on validation images; freeze it before the test images are seen.

    Parameters
    ----------
    positive : array_like
        (N,) 0 or 1, integers or booleans.
    score : array_like
        (N,) large for positive images.

    Returns
    -------
    float
        `score >= threshold` is positive: sensitivity + specificity is then largest (Youden 1950). Halfway
        between two scores; the lowest of equally good ones.

    Raises
    ------
    ValueError
        If there are not both positive and negative images.
    """
    truth, x = _binary(positive), np.asarray(score, dtype=float)
    if truth.all() or not truth.any():
        raise ValueError(f"positive: expected images of both kinds, got {truth.sum()} of {len(truth)}")
    steps = np.unique(x)
    candidates = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2])
    missed, spared = (np.searchsorted(np.sort(s), candidates) / len(s) for s in (x[truth], x[~truth]))
    return float(candidates[np.argmax(spared - missed)])


def fit_temperature(logits: Tensor, labels: Tensor, probabilities: Callable[[Tensor], Tensor]) -> float:
    """Find the temperature that calibrates probabilities, on validation images only.

    Parameters
    ----------
    logits : torch.Tensor
        (N, n_outputs) of validation images, never of training or test images.
    labels : torch.Tensor
        (N,) their classes.
    probabilities : callable
        From logits to (N, K), as the method of a loss in `losses`.

    Returns
    -------
    float
        T between e^-5 and e^5 with the least NLL of `probabilities(logits / T)`; above 1 where the model was
        too confident.

    Notes
    -----
    Guo et al., On calibration of modern neural networks, ICML 2017. Decode grades from the logits as they
    are: of the losses in `losses`, only CORN's decoder would notice a division by T.
    """
    z, y = logits.detach().double(), labels.numpy(force=True)
    return float(np.exp(minimize_scalar(lambda t: nll(y, probabilities(z / np.exp(t)).numpy(force=True)),
                                        bounds=(-5, 5), method="bounded").x))


class Score(NamedTuple):
    """A number with its 95 % interval over patients, and where it comes from.

    Attributes
    ----------
    value, low, high : float
        The mean over seeds and the ends of its interval; NaN where they do not exist.
    n : int
        Patients (images where no patients are known).
    seeds : tuple of int
        The random seeds of the trained models.
    """

    value: float
    low: float
    high: float
    n: int
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        return f"{Interval(*self[:4])}, seeds {' '.join(map(str, self.seeds))}"


def score(metric: Metric, labels: ArrayLike, outputs: Outputs, patients: ArrayLike | None = None,
          n_resamples: int = 1000) -> Score:
    """Measure a model with an interval.

    Parameters
    ----------
    metric : callable
        One of this module.
    labels : array_like
        (N,) integers from 0.
    outputs : mapping of int to array_like
        For each training seed the predicted labels (N,) or probabilities (N, K) of the same images.
    patients : array_like, optional
        (N,) the patient of each image; without it every image counts as its own patient.
    n_resamples : int, default 1000
        Of the bootstrap.

    Returns
    -------
    Score
        Its ends are NaN where the number does not exist or there is one patient only.

    Raises
    ------
    ValueError
        If labels and outputs do not fit together.
    """
    truth, runs = _checked(labels, outputs)
    statistic = _mean_over_runs(metric)
    if np.isnan(statistic(truth, runs)):
        n = len(truth) if patients is None else len(np.unique(np.asarray(patients)))
        return Score(np.nan, np.nan, np.nan, n, tuple(outputs))
    interval = bootstrap_interval(statistic, truth, runs, groups=patients, n_resamples=n_resamples)
    return _score(interval, outputs)


def difference(metric: Metric, labels: ArrayLike, first: Outputs, second: Outputs,
               patients: ArrayLike | None = None, n_resamples: int = 1000) -> Score:
    """Return `score` of the first model minus that of the second, on the same resampled patients.

    Parameters and errors are those of `score`. The models differ beyond chance where 0 is outside the
    interval. The second may have other seeds, as a baseline has; the result names those of the first.
    """
    truth, runs = _checked(labels, first)
    return _score(paired_difference(_mean_over_runs(metric), truth, runs, _checked(labels, second)[1],
                                    groups=patients, n_resamples=n_resamples), first)


class SubgroupTable(NamedTuple):
    """A metric in each subgroup; `worst` names the one that fares worst, `str()` is the table."""

    scores: dict[str, Score]
    worst: str

    def __str__(self) -> str:
        return _lines({f"{name}{' (worst)' * (name == self.worst)}": s for name, s in self.scores.items()})


def subgroups(metric: Metric, labels: ArrayLike, outputs: Outputs, subgroup: ArrayLike,
              patients: ArrayLike | None = None, lower_is_better: bool = False) -> SubgroupTable:
    """Measure a model in each subgroup of the images; parameters and errors as in `score`.

    `subgroup` (N,) names the subgroup of each image. One whose number does not exist cannot be the worst.
    """
    names, truth = np.asarray(subgroup).astype(str), np.asarray(labels)
    if names.shape != truth.shape:
        raise ValueError(f"subgroup: expected one name per image ({len(truth)}), got the shape {names.shape}")
    groups = np.arange(len(truth)) if patients is None else np.asarray(patients)
    runs = {seed: np.asarray(x) for seed, x in outputs.items()}
    scores = {str(name): score(metric, truth[at], {s: x[at] for s, x in runs.items()}, groups[at])
              for name in np.unique(names) for at in [names == name]}
    badness = {name: s.value if lower_is_better else -s.value for name, s in scores.items()}
    return SubgroupTable(scores, max(scores, key=lambda name: np.nan_to_num(badness[name], nan=-np.inf)))


class MetricTable(SimpleNamespace):
    """A `Score` a field, or a tuple of them with one a threshold or class; `str()` is the table."""

    def __str__(self) -> str:
        rows: dict[str, Score] = {}
        for field, value in vars(self).items():
            each = {"": value} if isinstance(value, Score) else {f" {k}": s for k, s in enumerate(value)}
            rows |= {field.replace("_", " ") + which: s for which, s in each.items()}
        return _lines(rows)


def grade_metrics(grades: ArrayLike, predicted: Outputs, probabilities: Outputs,
                  patients: ArrayLike | None = None, n_resamples: int = 1000) -> MetricTable:
    """Measure everything about predicted grades; parameters and errors as in `score`.

    Parameters
    ----------
    predicted, probabilities : mapping of int to array_like
        For each training seed the grades (N,), and the probabilities (N, K).

    Returns
    -------
    MetricTable
        `qwk`, `linear_kappa`, `accuracy`, `balanced_accuracy`, `mae`, `macro_mae`, `off_by_more_than_one` of
        the grades; `rps`, `nll`, `brier`, `ece`, `adaptive_ece` of the probabilities; `auroc_above`, one for
        each question "is the grade above k?".
    """
    measure = partial(score, patients=patients, n_resamples=n_resamples)
    truth, p, classes = _by_seed(grades, probabilities)
    of_grades = (qwk, linear_kappa, accuracy, balanced_accuracy, mae, macro_mae, off_by_more_than_one)
    return MetricTable(
        **{m.__name__: measure(m, truth, predicted) for m in of_grades},
        **{m.__name__: measure(m, truth, p) for m in (rps, nll, brier, ece, adaptive_ece)},
        auroc_above=tuple(measure(auroc, truth > k, {seed: x[:, k + 1:].sum(1) for seed, x in p.items()})
                          for k in classes[:-1]))


def class_metrics(labels: ArrayLike, probabilities: Outputs, thresholds: Outputs,
                  patients: ArrayLike | None = None, n_resamples: int = 1000) -> MetricTable:
    """Measure everything about predicted classes; parameters and errors as in `score`.

    Parameters
    ----------
    probabilities : mapping of int to array_like
        For each training seed (N, K).
    thresholds : mapping of int to array_like
        For each training seed (K,), from `choose_threshold` on validation films: an image is
        predicted class k where its probability of k reaches the threshold of k.

    Returns
    -------
    MetricTable
        `accuracy`, `balanced_accuracy` of the most probable class; `macro_auroc`, `nll`, `brier`, `ece`,
        `adaptive_ece`; and, one for each class against the others, `auroc`, `sensitivity`, `specificity`,
        `ppv` and `npv`.
    """
    measure = partial(score, patients=patients, n_resamples=n_resamples)
    truth, p, classes = _by_seed(labels, probabilities)
    predicted = {seed: x.argmax(1) for seed, x in p.items()}
    called = {seed: x >= np.asarray(thresholds[seed]) for seed, x in p.items()}

    def each_class(metric: Metric, outputs: Mapping[int, np.ndarray]) -> tuple[Score, ...]:
        return tuple(measure(metric, truth == k, {s: x[:, k] for s, x in outputs.items()}) for k in classes)

    return MetricTable(
        **{m.__name__: measure(m, truth, predicted) for m in (accuracy, balanced_accuracy)},
        **{m.__name__: measure(m, truth, p) for m in (macro_auroc, nll, brier, ece, adaptive_ece)},
        auroc=each_class(auroc, p),
        **{m.__name__: each_class(m, called) for m in (sensitivity, specificity, ppv, npv)})


def _checked(labels: ArrayLike, outputs: Outputs) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (N,) and the outputs of all runs, (N, S) or (N, S, K), in wide dtypes."""
    if not isinstance(outputs, Mapping) or not outputs:
        raise ValueError("outputs: expected a mapping from training seed to outputs, such as {0: predicted}")
    truth, shapes = np.asarray(labels), {np.shape(x) for x in outputs.values()}
    if truth.ndim != 1 or len(truth) == 0 or truth.dtype.kind not in "iub" or truth.min() < 0:
        raise ValueError(f"labels: expected integers (N,) from 0, got {truth.dtype} {truth.shape}")
    one = shapes.pop()
    if shapes or len(one) not in (1, 2) or one[0] != len(truth):
        raise ValueError(f"outputs: expected (N,) or (N, K) for each seed and {len(truth)} labels, got {one}")
    runs = np.stack([np.asarray(x) for x in outputs.values()], axis=1)
    if not np.isfinite(runs).all():
        raise ValueError("outputs: expected finite numbers, got NaN or infinity; did the training diverge?")
    if runs.ndim == 3 and (runs.min() < 0 or abs(runs.sum(2) - 1).max() > 1e-3 or truth.max() >= one[1]):
        raise ValueError(f"outputs: expected probabilities of {int(truth.max()) + 1} classes or more, rows "
                         f"summing to 1, got {one}, sums {runs.sum(2).min():.4g} to {runs.sum(2).max():.4g}")
    return truth.astype(int), runs.astype(float if runs.dtype.kind == "f" else int)


def _by_seed(labels: ArrayLike, outputs: Outputs) -> tuple[np.ndarray, dict[int, np.ndarray], range]:
    """Return labels, probabilities (N, K) of each seed, and the classes."""
    truth, runs = _checked(labels, outputs)
    if runs.ndim != 3:
        raise ValueError(f"probabilities: expected (N, K) for each seed, got {runs[:, 0].shape}")
    return truth, dict(zip(outputs, runs.swapaxes(0, 1), strict=True)), range(runs.shape[2])


def _score(interval: Interval, outputs: Outputs) -> Score:
    ends = interval[1:3] if interval.n > 1 else (np.nan, np.nan)  # one patient shows no spread
    return Score(interval.value, *ends, interval.n, tuple(outputs))


def _mean_over_runs(metric: Metric) -> Metric:
    return lambda truth, runs: float(np.mean([metric(truth, runs[:, s]) for s in range(runs.shape[1])]))


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else np.nan


def _binary(x: ArrayLike) -> np.ndarray:
    """Return labels of two classes as booleans; integers must be 0 or 1, and "0.5" is nobody's label."""
    x = np.asarray(x)
    if x.dtype.kind not in "iub" or not ((x == 0) | (x == 1)).all():
        raise ValueError(f"labels of two classes: expected booleans or the integers 0 and 1, got {x.dtype} "
                         f"{np.unique(x)[:4]}")
    return x.astype(bool)


def _distance(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return how far apart grades are; uint8 would wrap around and booleans have no minus."""
    return np.abs(np.subtract(labels, predicted, dtype=float))


def _of_truth(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    return probabilities[np.arange(len(labels)), np.asarray(labels, dtype=int)]


def _gap(bins: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> float:
    gaps = (labels == probabilities.argmax(1)) - probabilities.max(1)
    return float(np.abs(np.bincount(bins.astype(int), weights=gaps)).sum() / len(labels))


def _lines(scores: Mapping[str, Score]) -> str:
    return "\n".join(f"{name:{max(map(len, scores))}}  {s}" for name, s in scores.items())
