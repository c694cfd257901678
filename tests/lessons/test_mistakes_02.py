"""Lesson 2: its self-checks accept right answers and recognise classic mistakes by name."""

import numpy as np
import pytest
import torch

from genailab_helpers.lessons import check


def chord(distance, radius):
    return 2 * (radius**2 - distance**2).clamp(min=0).sqrt()


def lines(low, high):
    return -np.log(np.stack([low, high]))


def width(mask, dim=0):
    places = torch.nonzero(mask.any(dim))[:, 0]
    return places.max() - places.min() + 1


def span(mask):
    return width(mask) - 1


RIGHT = {
    "2.1": lambda distance, outer, inner: chord(distance, outer) - chord(distance, inner),
    "2.2": lambda low, high, mu: np.linalg.solve(mu, lines(low, high))[1],
    "2.3": lambda heart, right, left: width(heart) / width(right | left),
    "2.4": lambda first, second, region: (first - second)[region].std() / 2**0.5,
}
MISTAKES = [
    ("2.1", "solid cylinder", lambda d, outer, inner: chord(d, outer)),
    ("2.1", "half of the path", lambda d, outer, inner: (chord(d, outer) - chord(d, inner)) / 2),
    ("2.1", "path of a difference", lambda d, outer, inner: chord(d, outer - inner)),
    ("2.1", "at a slant", lambda d, outer, inner: torch.full_like(d, 2 * (outer - inner))),
    ("2.1", "negative number", lambda d, o, i: 2 * ((o**2 - d**2).sqrt() - (i**2 - d**2).sqrt())),
    ("2.2", "only their logarithms", lambda low, high, mu: np.linalg.solve(mu, np.stack([low, high]))[1]),
    ("2.2", "minus the logarithm", lambda low, high, mu: -RIGHT["2.2"](low, high, mu)),
    ("2.2", "transposed", lambda low, high, mu: RIGHT["2.2"](low, high, mu.T)),
    ("2.2", "exchanged", lambda low, high, mu: RIGHT["2.2"](high, low, mu)),
    ("2.2", "natural logarithm", lambda low, high, mu: RIGHT["2.2"](low, high, mu) / np.log(10)),
    ("2.2", "expected the bone", lambda low, high, mu: np.linalg.solve(mu, lines(low, high))[0]),
    ("2.3", "widths", lambda heart, right, left: heart.sum() / (heart | right | left).sum()),
    ("2.3", "between the lungs", lambda heart, right, left: width(heart) / (right | left).sum(1).max()),
    ("2.3", "another row", lambda heart, right, left: heart.sum(1).max() / width(right | left)),
    ("2.3", "one too few", lambda heart, right, left: span(heart) / span(right | left)),
    ("2.3", "heights", lambda heart, right, left: width(heart, 1) / width(right | left, 1)),
    ("2.3", "heart over the chest", lambda heart, right, left: width(right | left) / width(heart)),
    ("2.4", "holds the anatomy", lambda first, second, region: first[region].std()),
    ("2.4", "noise of two exposures", lambda first, second, region: (first - second)[region].std()),
    ("2.4", "variances add up", lambda first, second, region: (first - second)[region].std() / 2),
    ("2.4", "square root", lambda first, second, region: (first - second)[region].var() / 2),
    ("2.4", "average of both", lambda first, second, region: ((first + second) / 2)[region].std()),
    ("2.4", "left out the region", lambda first, second, region: (first - second).std() / 2**0.5),
]


@pytest.mark.parametrize("number", RIGHT)
def test_right_answer_passes(number, capsys):
    check(number, RIGHT[number])
    assert capsys.readouterr().out == f"Exercise {number} solved.\n"


@pytest.mark.parametrize(("number", "words", "answer"), MISTAKES, ids=[f"{m[0]} {m[1]}" for m in MISTAKES])
def test_mistake_is_named(number, words, answer, capsys):
    check(number, answer)
    said = capsys.readouterr().out
    assert said.startswith(f"Exercise {number} not solved yet: ")
    assert words in said


def test_an_answer_without_a_known_mistake_hears_expected_and_got(capsys):
    for number, right in RIGHT.items():
        check(number, lambda *given, right=right: 1.7 * right(*given) + 0.05)
        said = capsys.readouterr().out
        assert "expected" in said
        assert "got" in said
