"""Self-checks of lesson 4, spine grading."""

from typing import Any

import numpy as np
import torch
from sklearn.metrics import cohen_kappa_score

from genailab_helpers.classification.losses import LOSSES
from genailab_helpers.lessons.exercises import NotSolved, expect_close, self_check


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
        expect_close(kappa(a, b, price), right, f"the {name or 'plain'} kappa of 60 films")
    expect_close(kappa(a, a, prices["quadratic"]), 1.0, "the kappa of a reader with himself")


@self_check("4.2")
def coral_loss(coral_loss: Any) -> None:
    """CORAL's loss of one film."""
    library = LOSSES["coral"](5)
    for logits in (torch.tensor([2.0, 0.7, -0.4, -3.0]), torch.tensor([60.0, 30.0, -80.0, -200.0])):
        for grade in range(5):
            got = torch.as_tensor(coral_loss(logits, grade))
            if got.numel() != 1:
                raise NotSolved(f"the loss is one number, but {got.numel()} came; add up the four questions")
            right = library(logits[None], torch.tensor([grade]))
            expect_close(got.reshape(()), right, f"the loss of logits {logits.tolist()} at grade {grade}")


@self_check("4.3")
def calibration_error(calibration_error: Any) -> None:
    """Expected calibration error in bins of equal width."""
    by_hand = calibration_error(np.array([True, False, True]), np.array([0.5, 0.4, 0.9]), 2)
    # bin (0, 0.5] holds two films, right in half, sure of 0.45; bin (0.5, 1] one, right, sure of 0.9
    expect_close(by_hand, 2 / 3 * 0.05 + 1 / 3 * 0.1, "the error of three films, one of them on an edge")
    rng = np.random.default_rng(43)
    confidence = rng.uniform(0.2, 1, 200)
    right = rng.random(200) < confidence**2
    for n_bins in (1, 7, 15):
        gaps = [abs((right[at] - confidence[at]).sum()) / 200 for k in range(n_bins)
                for at in [(confidence > k / n_bins) & (confidence <= (k + 1) / n_bins)]]
        expect_close(calibration_error(right, confidence, n_bins), sum(gaps), f"the error in {n_bins} bins")


@self_check("4.4")
def threshold_for(threshold_for: Any) -> None:
    """Highest threshold that catches a wanted share of the positive films."""
    rng = np.random.default_rng(44)
    positive = rng.random(83) < 0.35
    score = (rng.random(83) + 0.5 * positive).round(2)  # ties
    for wanted in (0.5, 0.8, 0.9, 1.0):
        allowed = [t for t in score[positive] if (score[positive] >= t).mean() >= wanted - 1e-9]
        expect_close(threshold_for(wanted, positive, score), max(allowed), f"the threshold for {wanted:.0%}")
    ten = np.arange(10) / 10
    got = threshold_for(0.3, np.ones(10, dtype=bool), ten)
    expect_close(got, 0.7, "the threshold that catches three of ten")
