"""Raters: they agree as asked, each leans to a side, and their ceiling is what the best thresholds reach."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from genailab_helpers.phantoms.raters import consensus, rater_ceiling, simulate_raters


def agreement(first: Any, second: Any) -> float:
    return float(cohen_kappa_score(first, second, weights="quadratic"))


def uniform(n: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("kappa", [0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_raters_agree_as_asked(kappa: float, seed: int) -> None:
    grades = simulate_raters(uniform(8000), kappa, seed=seed)
    assert grades.shape == (8000, 3)
    assert grades.unique().tolist() == [0, 1, 2, 3, 4]
    pairs = [agreement(*pair) for pair in itertools.combinations(grades.T, 2)]
    assert all(abs(pair - kappa) < 0.02 for pair in pairs), pairs


def test_raters_lean_to_their_side_and_are_repeatable() -> None:
    severity = uniform(4000)
    grades = simulate_raters(severity, 0.6, seed=3)
    assert torch.equal(grades[:100], simulate_raters(severity[:100], 0.6, seed=3))
    assert not torch.equal(grades, simulate_raters(severity, 0.6, seed=4))
    assert (grades.double().mean(0).sort().values.diff() > 0.03).all()


def test_consensus_is_the_median() -> None:
    assert consensus(torch.tensor([[0, 4, 1], [2, 2, 3], [4, 4, 4]])).tolist() == [1, 2, 4]
    assert consensus(torch.tensor([[1, 3]])).tolist() == [1]


@pytest.mark.parametrize("kappa", [0.6, 0.8])
def test_ceiling_is_what_the_best_thresholds_reach(kappa: float) -> None:
    severity = (torch.arange(60000) + 0.5) / 60000
    truth = consensus(simulate_raters(severity, kappa, seed=5)).numpy()
    ceiling = rater_ceiling(kappa)
    reached = [agreement(truth, np.digitize(severity, [a, b, 1 - b, 1 - a]))
               for a in np.linspace(0.1, 0.3, 9) for b in np.linspace(0.35, 0.45, 5)]
    # the standard error of kappa at 60,000 is near 0.001; the grid is too coarse for the last thousandth
    assert max(reached) == pytest.approx(ceiling, abs=0.004)
    assert ceiling > kappa + 0.03


@pytest.mark.parametrize("arguments", [
    {"kappa": 0.5}, {"kappa": 0.95}, {"kappa": float("nan")}, {"severity": torch.tensor([1.2])},
    {"severity": torch.tensor([float("nan")])}, {"severity": torch.zeros(2, 2)}])
def test_impossible_raters(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))) as error:
        simulate_raters(**({"severity": torch.tensor([0.5])} | arguments))
    assert "\n" not in str(error.value)
