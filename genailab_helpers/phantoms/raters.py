"""Simulated raters, who grade the same severity and do not always agree, and the ceiling that they set.

The five grades are this project's own: equal fifths of a severity from 0 to 1, and no clinical scale.
"""

from itertools import combinations

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import ndtr
from torch import Tensor

THRESHOLDS = (0.2, 0.4, 0.6, 0.8)  # of severity, between the grades 0 to 4
_GRADES = np.arange(len(THRESHOLDS) + 1)
_SEVERITIES = (np.arange(4000) + 0.5) / 4000  # stand for all, as they are sampled: uniform in [0, 1]
_BIAS = np.linspace(-0.15, 0.15, 3)  # of the three raters, the strictest first, in units of a rater's noise


def _at_most(noise: float) -> np.ndarray:
    """Probability (raters, severities, 5) that a rater's grade is at most 0 to 4."""
    below = ndtr((np.array(THRESHOLDS) - _SEVERITIES[:, None]) / noise - _BIAS[:, None, None])
    return np.concatenate([below, np.ones_like(below[..., :1])], axis=2)


def _agreement(joint: np.ndarray) -> float:
    """Quadratic weighted kappa of a joint distribution (5, 5) of two grades."""
    distance = (_GRADES[:, None] - _GRADES) ** 2
    by_chance = joint.sum(1)[:, None] * joint.sum(0)
    return float(1 - (joint * distance).sum() / (by_chance * distance).sum())


def _noise(kappa: float) -> float:
    """Solve for the noise, in units of severity, that makes raters agree with `kappa` on average."""
    if not 0.6 <= kappa <= 0.9:
        raise ValueError(f"kappa: expected a number from 0.6 to 0.9, got {kappa!r}")

    def excess(noise: float) -> float:
        chance = np.diff(_at_most(noise), axis=2, prepend=0)
        pairs = [_agreement(one.T @ other / len(_SEVERITIES)) for one, other in combinations(chance, 2)]
        return float(np.mean(pairs)) - kappa

    return float(brentq(excess, 0.01, 1.0))


def simulate_raters(severity: Tensor, kappa: float = 0.8, seed: int = 0) -> Tensor:
    """Let three raters grade spines: each sees the severity through noise and leans a little to one side.

    Parameters
    ----------
    severity : Tensor
        (N,) in [0, 1], uniform as `sample_spines` samples it.
    kappa : float, default 0.8
        Quadratic weighted kappa between two raters, averaged over the pairs; from 0.6 to 0.9, which is what
        radiologists reach.
    seed : int, default 0
        Says who is strict, and samples the noise.

    Returns
    -------
    Tensor
        (N, 3) int64 grades, 0 to 4. The first rows do not depend on how many follow.

    Raises
    ------
    ValueError
        For a kappa out of range, or a severity outside [0, 1].
    """
    seen = severity.detach().double().numpy()
    if seen.ndim != 1 or not ((seen >= 0) & (seen <= 1)).all():
        raise ValueError(f"severity: expected (N,) numbers from 0 to 1, got {tuple(seen.shape)}, "
                         f"{seen.min():.3g} to {seen.max():.3g}")
    generator = np.random.default_rng(seed)
    off = generator.permutation(_BIAS) + generator.standard_normal((len(seen), len(_BIAS)))
    return torch.from_numpy(np.digitize(seen[:, None] + _noise(kappa) * off, THRESHOLDS))


def consensus(grades: Tensor) -> Tensor:
    """Median (N,) of the grades (N, raters); of an even number the lower middle one.

    Examples
    --------
    >>> consensus(torch.tensor([[0, 1, 4], [2, 3, 3]]))
    tensor([1, 3])
    """
    return grades.median(dim=1).values


def rater_ceiling(kappa: float = 0.8) -> float:
    """Quadratic weighted kappa of one who knows the severity, against the consensus of three raters.

    Parameters
    ----------
    kappa : float, default 0.8
        Agreement of two raters, as in `simulate_raters`.

    Returns
    -------
    float
        No grader that sees only the image can be expected to do better.

    Raises
    ------
    ValueError
        For a kappa out of range.

    Notes
    -----
    The distribution of the median of three follows from those of the raters, P(at most g) being
    F1 F2 + F1 F3 + F2 F3 - 2 F1 F2 F3. Kappa is a ratio: where both means are 2, by symmetry, the grades that
    make it greatest are 2 + (E[consensus | severity] - 2) / kappa, rounded, which is solved by repetition
    (Dinkelbach 1967).
    """
    first, second, third = _at_most(_noise(kappa))
    median = first * second + first * third + second * third - 2 * first * second * third
    chance = np.diff(median, axis=1, prepend=0)
    expected = chance @ _GRADES
    ceiling = 1.0
    for _ in range(20):
        best = np.rint(2 + (expected - 2) / ceiling).clip(0, 4).astype(int)
        ceiling = _agreement(np.eye(5)[best].T @ chance / len(_SEVERITIES))
    return ceiling
