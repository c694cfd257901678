"""Self-checks of lesson 4, spine grading."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import cohen_kappa_score

from genailab_helpers.lessons.exercises import NotSolved, expect_close, self_check


def _expect(got: Any, right: float, what: str, mistakes: Mapping[str, float]) -> None:
    """Demand a number; where it is what a known mistake gives, name the mistake."""
    try:
        number = float(got)
    except (TypeError, ValueError, RuntimeError):
        number = np.nan
    for mistake, value in mistakes.items():
        near = 1e-3 * max(abs(right), abs(value))
        if abs(number - value) <= near < abs(value - right):
            raise NotSolved(f"{what}: expected {right:.4g}, got {number:.4g}; {mistake}")
    expect_close(got, right, what)


@self_check("4.1")
def kappa(kappa: Any) -> None:
    """Cohen's kappa for any price of a disagreement."""
    rng = np.random.default_rng(41)
    a = rng.integers(0, 5, 60)
    b = np.where(rng.random(60) < 0.6, a, rng.integers(0, 4, 60))
    prices = {None: lambda i, j: i != j, "linear": lambda i, j: np.abs(i - j),
              "quadratic": lambda i, j: (i - j) ** 2}
    for name, price in prices.items():
        right = cohen_kappa_score(a, b, weights=name)
        seen = float(np.mean(price(a, b)))
        uniform = float(np.mean(price(*np.meshgrid(np.arange(5), np.arange(5)))))
        _expect(kappa(a, b, price), right, f"the {name or 'plain'} kappa of 60 images", {
            "this is the cost divided by the cost by chance; kappa is 1 minus that": 1 - right,
            "this knows no chance; divide the cost by the cost by chance before you subtract it": 1 - seen,
            "you divided sums; there are 60 pairs seen and 60 x 60 by chance, so divide means":
                1 - (1 - right) / 60,
            "chance is not that all grades are equally frequent; pair the grades that the raters gave":
                1 - seen / uniform})
    expect_close(kappa(a, a, prices["quadratic"]), 1.0, "the kappa of a rater with himself")


@self_check("4.2")
def coral_loss(coral_loss: Any) -> None:
    """CORAL's loss of one image."""
    for logits in (torch.tensor([2.0, 0.7, -0.4, -3.0]), torch.tensor([60.0, 30.0, -80.0, -200.0])):
        for grade in range(5):
            got = torch.as_tensor(coral_loss(logits, grade))
            what = f"the loss of logits {logits.tolist()} at grade {grade}"
            if got.numel() != 1:
                raise NotSolved(f"{what}: expected one number, got {got.numel()}; add up the four questions")
            if not got.isfinite():
                raise NotSolved(f"{what}: expected a finite number, got {float(got)}; the logarithm of a "
                                "sigmoid overflows, so use torch.nn.functional.logsigmoid")
            right, at_least, below = (
                float(F.binary_cross_entropy_with_logits(logits, yes.float(), reduction="sum"))
                for yes in (grade > torch.arange(4), grade >= torch.arange(4), grade <= torch.arange(4)))
            _expect(got.reshape(()), right, what, {
                "this is the mean over the questions; CORAL adds them up": right / 4,
                "the question is whether the grade is above k, not at least k: grade 2 is not above 2":
                    at_least,
                "yes and no are swapped: a high logit says that the grade is above": below})


@self_check("4.3")
def error_by_chance(error_by_chance: Any) -> None:
    """Calibration error of a calibrated network."""
    confidence = np.random.default_rng(43).uniform(0.55, 0.95, 60)
    sets: list[np.ndarray] = []

    def error(right: np.ndarray, confidence: np.ndarray) -> float:
        sets.append(np.asarray(right, dtype=float))
        return float(np.abs(np.bincount((confidence > 0.75).astype(int), right - confidence)).sum() / 60)

    got = error_by_chance(confidence, error)
    simulated, what = np.array(sets), "the mean error of 60 images"
    right = _simulated(error, confidence, confidence)
    if np.shape(got):
        raise NotSolved(f"{what}: expected one number, got the shape {np.shape(got)}; return the mean")
    if not len(simulated):
        raise NotSolved("expected many calls of error(right, confidence), got none")
    if ((simulated != 0) & (simulated != 1)).any():
        raise NotSolved("expected arrays of True and False, got numbers between; each image is either right "
                        "or wrong, at random")
    if len(simulated) > 1 and (simulated == simulated[0]).all():
        raise NotSolved(f"expected test sets that differ, got {len(simulated)} times the same one; make the "
                        "generator once, before the loop, and draw anew for each test set")
    if len(simulated) < 50:
        raise NotSolved(f"expected the mean over 200 test sets, got {len(simulated)}; one of them is luck")
    for mistake, chance in {
        "an image is right where the random number is below its confidence, not above": 1 - confidence,
        "each image has a probability of its own to be right: its confidence": np.full(60, 0.5),
        "all images got the same probability to be right; use the confidence of each image":
            np.full(60, simulated.mean()),
    }.items():
        if abs(simulated.mean(0) - chance).mean() < abs(simulated.mean(0) - confidence).mean() - 0.01:
            raise NotSolved(f"{what}: expected about {right:.3f}, got {float(got):.3f}; {mistake}")
    if not abs(float(got) - right) <= 0.2 * right:
        raise NotSolved(f"{what}: expected about {right:.3f}, got {float(got):.3f}; return the mean error")


def _simulated(error: Callable[..., float], confidence: np.ndarray, chance: np.ndarray) -> float:
    rng = np.random.default_rng(0)
    return float(np.mean([error(rng.random(60) < chance, confidence) for _ in range(2000)]))


@self_check("4.4")
def threshold_for(threshold_for: Any) -> None:
    """Highest threshold that catches a wanted fraction of the positive images."""
    rng = np.random.default_rng(44)
    positive = rng.random(83) < 0.35
    score = (rng.random(83) + 0.5 * positive).round(2)  # ties
    for wanted in (0.5, 0.8, 0.9, 1.0):
        caught = {t: (score[positive] >= t).mean() for t in score[positive]}
        right = max(t for t, fraction in caught.items() if fraction >= wanted - 1e-9)
        _expect(threshold_for(wanted, positive, score), right, f"the threshold for {wanted:.0%}", {
            "this counts all images; the fraction is of the positive ones":
                np.sort(score)[::-1][int(np.ceil(wanted * 83)) - 1],
            "this catches all positive images, but it is not the highest that catches enough":
                score[positive].min(),
            "this is the quantile from the wrong end: it misses the wanted fraction":
                np.quantile(score[positive], wanted),
            "this lies between two scores of positive images; take one that occurs":
                np.quantile(score[positive], 1 - wanted)})
    hundred = np.arange(100) / 100
    _expect(threshold_for(0.07, np.ones(100, dtype=bool), hundred), 0.93,
            "the threshold that catches seven of a hundred", {
                "0.07 * 100 is a hair above 7 in floating point; subtract a hair before you round up": 0.92})
