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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.stats import rankdata
from torch import Tensor

from genailab_helpers.statistics import Interval, bootstrap_interval, class_mean

Metric = Callable[[np.ndarray, np.ndarray], float]
Outputs = Mapping[int, ArrayLike]


def qwk(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return Cohen's kappa with weights (i - j)^2: 1 - E[(y - p)^2] / E[(y - p')^2], p' of another image.

    Examples
    --------
    >>> qwk(np.array([0, 1, 2, 3, 4]), np.array([0, 1, 2, 3, 3]))
    0.9411764705882353
    """
    by_chance = np.var(labels) + np.var(predicted) + (np.mean(labels) - np.mean(predicted)) ** 2
    return _ratio(by_chance - np.mean(_distance(labels, predicted) ** 2), by_chance)


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the fraction of images that are predicted right."""
    return float(np.mean(labels == predicted))


def balanced_accuracy(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Return the fraction of images that are predicted right, as mean over the classes: see `class_mean`.

    Examples
    --------
    >>> balanced_accuracy([0, 0, 0, 1], [0, 0, 0, 0])
    0.5
    """
    return class_mean(labels, np.equal(labels, predicted))


def mae(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean distance from the truth, in grades."""
    return float(np.mean(_distance(labels, predicted)))


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


def nll(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean of -log P(truth), P at least 2.2e-16 so that one certain mistake is not infinite."""
    of_truth = probabilities[np.arange(len(labels)), np.asarray(labels, dtype=int)]
    return float(-np.mean(np.log(np.maximum(of_truth, np.finfo(float).eps))))


def ece(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the calibration error of the most probable class, in 15 bins of equal width.

    The sum over bins of (images in it / N) `|accuracy - mean confidence|` (Guo et al. 2017). Chance alone
    raises it above 0, and more so in a resample: the interval lies too high, the more the fewer the images.
    """
    confidence = probabilities.max(1)
    bins = np.ceil(confidence * 15).astype(int)
    gaps = np.bincount(bins, weights=(labels == probabilities.argmax(1)) - confidence)
    return float(np.abs(gaps).sum() / len(labels))


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


def score(metric: Metric, labels: ArrayLike, outputs: Outputs, patients: ArrayLike | None = None,
          n_resamples: int = 1000) -> Interval:
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
    Interval
        Over patients, of the mean over seeds. Its ends are NaN where the number does not exist or there is
        one patient only.

    Raises
    ------
    ValueError
        If labels and outputs do not fit together.
    """
    truth, runs = _checked(labels, outputs)
    found = bootstrap_interval(partial(_over_seeds, metric), truth, runs, groups=patients,
                               n_resamples=n_resamples)
    return found._replace(seeds=tuple(outputs))


def difference(metric: Metric, labels: ArrayLike, first: Outputs, second: Outputs,
               patients: ArrayLike | None = None, n_resamples: int = 1000) -> Interval:
    """Return `score` of the first model minus that of the second, on the same resampled patients.

    Parameters and errors are those of `score`. The models differ beyond chance where 0 is outside the
    interval. The second may have other seeds, as a baseline has; the result names those of the first.
    """
    (truth, ours), (_, theirs) = _checked(labels, first), _checked(labels, second)
    found = bootstrap_interval(lambda t, a, b: _over_seeds(metric, t, a) - _over_seeds(metric, t, b),
                               truth, ours, theirs, groups=patients, n_resamples=n_resamples)
    return found._replace(seeds=tuple(first))


def subgroups(metric: Metric, labels: ArrayLike, outputs: Outputs, subgroup: ArrayLike,
              patients: ArrayLike | None = None) -> SimpleNamespace:
    """Measure a model in each subgroup of the images; parameters and errors as in `score`.

    `subgroup` (N,) names the subgroup of each image; `.scores` of what is returned maps each name to a score.
    """
    names, truth = np.asarray(subgroup).astype(str), np.asarray(labels)
    groups = np.arange(len(truth)) if patients is None else np.asarray(patients)
    scores = {}
    for name in np.unique(names):
        here = names == name
        of_group = {seed: np.asarray(x)[here] for seed, x in outputs.items()}
        scores[str(name)] = score(metric, truth[here], of_group, groups[here])
    return SimpleNamespace(scores=scores)


def class_metrics(labels: ArrayLike, probabilities: Outputs, thresholds: Outputs,
                  patients: ArrayLike | None = None, n_resamples: int = 1000) -> SimpleNamespace:
    """Measure everything about predicted classes; parameters and errors as in `score`.

    Parameters
    ----------
    probabilities : mapping of int to array_like
        For each training seed (N, K).
    thresholds : mapping of int to array_like
        For each training seed (K,), from `choose_threshold` on validation images: an image is
        predicted class k where its probability of k reaches the threshold of k.

    Returns
    -------
    SimpleNamespace
        An `Interval` each: `accuracy`, `balanced_accuracy` of the most probable class; `macro_auroc`, `nll`
        and `ece`. And tuples with one for each class against the others: `auroc`, `sensitivity`,
        `specificity`, `ppv` and `npv`.
    """
    measure = partial(score, patients=patients, n_resamples=n_resamples)
    truth, p = np.asarray(labels), {seed: np.asarray(x) for seed, x in probabilities.items()}
    decided = {seed: x.argmax(1) for seed, x in p.items()}
    found: dict[str, Any] = {m.__name__: measure(m, truth, decided) for m in (accuracy, balanced_accuracy)}
    found |= {m.__name__: measure(m, truth, p) for m in (macro_auroc, nll, ece)}
    reached = {seed: x >= np.asarray(thresholds[seed]) for seed, x in p.items()}
    classes = range(next(iter(p.values())).shape[1])
    for m, outputs in ((auroc, p), *((rate, reached) for rate in (sensitivity, specificity, ppv, npv))):
        found[m.__name__] = tuple(
            measure(m, truth == k, {seed: x[:, k] for seed, x in outputs.items()}) for k in classes)
    return SimpleNamespace(**found)


def _checked(labels: ArrayLike, outputs: Outputs) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (N,) and the outputs of all runs, (N, S) or (N, S, K), in wide dtypes."""
    truth, runs = np.asarray(labels), np.stack([np.asarray(x) for x in outputs.values()], axis=1)
    fits = (truth.shape == runs.shape[:1] and truth.size and truth.dtype.kind in "iub" and truth.min() >= 0
            and np.isfinite(runs).all() and (runs.ndim == 2 or (
                runs.min() >= 0 and abs(runs.sum(2) - 1).max() < 1e-3 and truth.max() < runs.shape[2])))
    if not fits:
        raise ValueError(f"expected labels (N,), integers from 0, got {truth.dtype} {truth.shape}; and for "
                         "each seed finite outputs, labels (N,) or probabilities (N, K) of every class, rows "
                         f"summing to 1, got {runs.dtype} {runs[:, 0].shape}")
    return truth.astype(int), runs.astype(float if runs.dtype.kind == "f" else int)


def _over_seeds(metric: Metric, truth: np.ndarray, runs: np.ndarray) -> float:
    return float(np.mean([metric(truth, runs[:, s]) for s in range(runs.shape[1])]))


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
