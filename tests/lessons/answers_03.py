"""Right answers to the exercises of lesson 3, and classic mistakes with words of what the self-check says."""

import torch


def euler(denoiser, x, sigma, lower):
    return x + (lower - sigma) * (x - denoiser(x, sigma)) / sigma


def heun(denoiser, x, sigma, lower, start=None, by=None):
    slope = (x - denoiser(x, sigma)) / sigma
    ahead = x + (lower - sigma) * slope
    if lower == 0:
        return ahead
    second = (ahead - denoiser(ahead, lower)) / (lower if by is None else sigma)
    return (x if start is None else ahead) + (lower - sigma) * (slope + second) / 2


def endless(denoiser, x, sigma, lower):
    slope = (x - denoiser(x, sigma)) / sigma
    ahead = x + (lower - sigma) * slope
    return x + (lower - sigma) * (slope + (ahead - denoiser(ahead, lower)) / lower) / 2


def nearest(values, sigma):
    return int((values / sigma).log().abs().argmin())


def ratio(generated, train, held_out):
    least = [torch.cdist(some, train).min(dim=1).values.median() for some in (generated, held_out)]
    return least[0] / least[1]


MISTAKES = [
    ("3.1", lambda s, a: nearest((1 - a).sqrt(), s), "the image has been shrunk"),
    ("3.1", lambda s, a: nearest((1 - a) / a, s), "take the root"),
    ("3.1", lambda s, a: nearest((a / (1 - a)).sqrt(), s), "noise to image"),
    ("3.2", lambda s, d: d / (d + s), "variances"),
    ("3.2", lambda s, d: s**2 / (d**2 + s**2), "stay at the mean"),
    ("3.2", lambda s, d: 1 / (1 + s**2), "is not 1"),
    ("3.2", lambda s, d: d / (d**2 + s**2) ** 0.5, "variance right"),
    ("3.3", euler, "Euler's step"),
    ("3.3", lambda *a: heun(*a, start="ahead"), "go back to x"),
    ("3.3", lambda *a: heun(*a, by="sigma"), "divided by sigma"),
    ("3.3", endless, "not finite"),
    ("3.4", lambda g, t, h: torch.cdist(g, t).min(dim=1).values.median(), "divide by"),
    ("3.4", lambda g, t, h: torch.cdist(g, t).mean() / torch.cdist(h, t).mean(), "nearest"),
    ("3.4", lambda g, t, h: torch.cdist(g, t).min() / torch.cdist(h, t).min(), "the least"),
]
RIGHT = {"3.1": lambda s, a: nearest(((1 - a) / a).sqrt(), s), "3.2": lambda s, d: d**2 / (d**2 + s**2),
         "3.3": heun, "3.4": ratio}
