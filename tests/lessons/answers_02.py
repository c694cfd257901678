"""Right answers to the exercises of lesson 2, and classic mistakes with words of what the self-check says."""

import numpy as np
import torch


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
    ("2.1", lambda d, outer, inner: chord(d, outer), "solid cylinder"),
    ("2.1", lambda d, outer, inner: (chord(d, outer) - chord(d, inner)) / 2, "half of the path"),
    ("2.1", lambda d, outer, inner: chord(d, outer - inner), "path of a difference"),
    ("2.1", lambda d, outer, inner: torch.full_like(d, 2 * (outer - inner)), "at a slant"),
    ("2.1", lambda d, o, i: 2 * ((o**2 - d**2).sqrt() - (i**2 - d**2).sqrt()), "negative number"),
    ("2.2", lambda low, high, mu: np.linalg.solve(mu, np.stack([low, high]))[1], "only their logarithms"),
    ("2.2", lambda low, high, mu: -RIGHT["2.2"](low, high, mu), "minus the logarithm"),
    ("2.2", lambda low, high, mu: RIGHT["2.2"](low, high, mu.T), "transposed"),
    ("2.2", lambda low, high, mu: RIGHT["2.2"](high, low, mu), "exchanged"),
    ("2.2", lambda low, high, mu: RIGHT["2.2"](low, high, mu) / np.log(10), "natural logarithm"),
    ("2.2", lambda low, high, mu: np.linalg.solve(mu, lines(low, high))[0], "expected the bone"),
    ("2.3", lambda heart, right, left: heart.sum() / (heart | right | left).sum(), "widths"),
    ("2.3", lambda heart, right, left: width(heart) / (right | left).sum(1).max(), "between the lungs"),
    ("2.3", lambda heart, right, left: heart.sum(1).max() / width(right | left), "another row"),
    ("2.3", lambda heart, right, left: span(heart) / span(right | left), "one too few"),
    ("2.3", lambda heart, right, left: width(heart, 1) / width(right | left, 1), "heights"),
    ("2.3", lambda heart, right, left: width(right | left) / width(heart), "heart over the chest"),
    ("2.4", lambda first, second, region: first[region].std(), "holds the anatomy"),
    ("2.4", lambda first, second, region: (first - second)[region].std(), "noise of two exposures"),
    ("2.4", lambda first, second, region: (first - second)[region].std() / 2, "variances add up"),
    ("2.4", lambda first, second, region: (first - second)[region].var() / 2, "square root"),
    ("2.4", lambda first, second, region: ((first + second) / 2)[region].std(), "average of both"),
    ("2.4", lambda first, second, region: (first - second).std() / 2**0.5, "left out the region"),
]
