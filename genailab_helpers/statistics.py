"""How sure is a number: intervals and tests that respect patients.

Images of one patient are alike, so the patient is what is resampled and kept on one side of a split.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """A number with its confidence interval.

    Attributes
    ----------
    value, low, high : float
        The estimate and the ends of the interval.
    n : int
        How many independent units (patients, or images where no patients are known) it rests on.
    level : float
        Confidence of the interval.
    seeds : tuple of int
        The random seeds of the trained models whose mean it is, if there are any.
    """

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95
    seeds: tuple[int, ...] = ()

    def __str__(self) -> str:
        width, digits = self.high - self.low, 3
        if 1e-9 < width < math.inf:  # the last counts in steps of 2 to 20 % of the width, or is the first
            digits = min(6, max(1, math.floor(1.7 - math.log10(width))))
        value, low, high = (f"{round(number, digits) + 0.0:.{digits}f}" for number in self[:3])  # no -0.0
        seeds = ", seeds " * bool(self.seeds) + " ".join(map(str, self.seeds))
        return f"{value} [{low}, {high}], n = {self.n}{seeds}"


def class_mean(labels: ArrayLike, values: ArrayLike) -> float:
    """Return the mean over classes of the mean of `values` (N,) within each class of `labels` (N,), from 0.

    The one rule for a class without images, here and in every balanced score: it is left out of the mean, in
    each resample anew. scikit-learn's `balanced_accuracy_score` does the same.
    """
    n = np.bincount(labels)
    return float(np.mean(np.bincount(labels, weights=values)[n > 0] / n[n > 0]))


def bootstrap_interval(statistic: Callable[..., float], *arrays: ArrayLike, groups: ArrayLike | None = None,
                       n_resamples: int = 1000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval, 95 %, of `statistic(*arrays)`, resampling whole patients.

    Parameters
    ----------
    statistic : callable
        Takes arrays like `arrays` and returns one number. Where it returns NaN (a resample may lack a class),
        the resample is left out.
    *arrays : array_like
        Equally long; rows are resampled together.
    groups : array_like, optional
        The patient of each row. Without it every row counts as its own patient.
    n_resamples : int, default 1000
        How many resamples are drawn.
    seed : int, default 0
        Start of the random numbers.

    Returns
    -------
    Interval
        `n` counts the patients. Its ends are NaN where there is one patient only, or where more than half of
        the resamples have no number.

    Raises
    ------
    ValueError
        If the arrays differ in length or are empty.

    Notes
    -----
    Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13. Do not use it for distances between sets,
    which the repeated rows of a resample push up.

    Examples
    --------
    Ten images of each of four patients are four observations, not forty.

    >>> right, patients = np.repeat([1, 1, 0, 1], 10), np.repeat([1, 2, 3, 4], 10)
    >>> print(bootstrap_interval(np.mean, right, groups=patients))
    0.8 [0.2, 1.0], n = 4
    >>> print(bootstrap_interval(np.mean, right))
    0.75 [0.60, 0.88], n = 40
    """
    data = [np.asarray(a) for a in arrays]
    patients = np.arange(len(data[0])) if groups is None else np.asarray(groups)
    if len(lengths := {len(a) for a in [*data, patients]}) != 1 or not len(patients):
        raise ValueError(f"expected arrays and groups of one length above 0, got the lengths {lengths}")
    _, patient_of, sizes = np.unique(patients, return_inverse=True, return_counts=True)
    rows, starts = np.argsort(patient_of, kind="stable"), np.cumsum(sizes) - sizes  # patient after patient
    generator = np.random.default_rng(seed)
    values = np.empty(n_resamples)
    for i in range(n_resamples):
        chosen = generator.integers(len(sizes), size=len(sizes))
        n = sizes[chosen]  # the rows of the chosen patients, one after the other
        picked = rows[np.repeat(starts[chosen] - np.cumsum(n) + n, n) + np.arange(n.sum())]
        values[i] = statistic(*(a[picked] for a in data))
    enough = len(sizes) > 1 and np.isnan(values).mean() <= 0.5
    low, high = np.nanquantile(values, [(1 - 0.95) / 2, (1 + 0.95) / 2]) if enough else (np.nan, np.nan)
    return Interval(float(statistic(*data)), float(low), float(high), len(sizes))


def grouped_folds(groups: ArrayLike, n_folds: int, seed: int,
                  labels: ArrayLike | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split rows into folds so that no patient is on both sides.

    Parameters
    ----------
    groups : array_like
        (N,) the patient of each row.
    n_folds : int
        At least 2.
    seed : int
        Start of the random numbers.
    labels : array_like, optional
        (N,) classes whose shares the folds should keep as far as whole patients allow.

    Returns
    -------
    list of (numpy.ndarray, numpy.ndarray)
        `n_folds` pairs of row numbers, training and test; each row is in exactly one test part.

    Raises
    ------
    ValueError
        If there are fewer patients than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # 76 MB, which a training of images does without

    patients = np.asarray(groups)
    if len(np.unique(patients)) < n_folds:
        raise ValueError(f"groups: expected at least {n_folds} patients for {n_folds} folds, "
                         f"got {len(np.unique(patients))}; ask for fewer folds")
    classes = np.zeros(len(patients), dtype=int) if labels is None else np.asarray(labels)
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    return list(splitter.split(patients, classes, patients))
