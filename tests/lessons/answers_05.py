"""Right answers to the exercises of lesson 5, and classic mistakes with words of what the self-check says."""

import numpy as np


def threshold(positive, score, sensitivity):
    found = np.sort(score[positive])[::-1]
    return found[int(np.ceil(sensitivity * len(found) - 1e-9)) - 1]


def ppv(caught, spared, prevalence):
    hit = caught * prevalence
    return hit / (hit + (1 - spared) * (1 - prevalence))


def groups(labels, marked):
    return [np.flatnonzero((labels == k) & (marked == m)) for k in (0, 1) for m in (False, True)]


def repeated(parts, size=None):
    return np.concatenate([np.resize(rows, size or max(map(len, parts))) for rows in parts])


def of_one(values):
    return repeated([np.flatnonzero(values == k) for k in (0, 1)])


def plays(n_models, accuracy, n_images, n=20000):
    return np.random.default_rng(1).binomial(n_images, accuracy, (n, n_models)) / n_images


MISTAKES = [
    ("5.1", lambda p, s, f: np.quantile(s, 1 - f), "*all* images"),
    ("5.1", lambda p, s, f: np.quantile(s[~p], f), "*specificity*"),
    ("5.1", lambda p, s, f: s.min(), "lowest score of all"),
    ("5.1", lambda p, s, f: np.sort(s[p])[::-1][int(f * p.sum()) - 2], "loses one"),
    ("5.1", lambda p, s, f: s[p].min(), "fewer false alarms"),
    ("5.2", lambda a, b, p: a * p / (a * p + 1 - b), "1 - prevalence"),
    ("5.2", lambda a, b, p: a / (a + 1 - b), "prevalence is missing"),
    ("5.2", lambda a, b, p: a * p, "divided by all people"),
    ("5.2", lambda a, b, p: a * p / (a * p + b * (1 - p)), "not specificity"),
    ("5.2", lambda a, b, p: 1 - ppv(a, b, p), "false alarms' fraction"),
    ("5.2", lambda a, b, p: a / (a + (1 - b) * (1 - p)), "weigh the sensitivity"),
    ("5.3", lambda y, m: of_one(y), "labels alone"),
    ("5.3", lambda y, m: of_one(m), "marker alone"),
    ("5.3", lambda y, m: repeated(groups(y, m), min(map(len, groups(y, m)))), "do not drop"),
    ("5.3", lambda y, m: y == m, "Boolean mask"),
    ("5.3", lambda y, m: np.tile(repeated(groups(y, m)), 2), "needs no repetition"),
    ("5.3", lambda y, m: np.arange(len(y)), "each pair"),
    ("5.4", lambda k, p, n: plays(k, p, n).mean(), "mean of all networks"),
    ("5.4", lambda k, p, n: plays(k, p, n).max(), "best of all plays"),
    ("5.4", lambda k, p, n: plays(k, p, n).max(1).mean() * n, "a count of images"),
    ("5.4", lambda k, p, n: plays(k, p, n).min(1).mean(), "worst of them"),
    ("5.4", lambda k, p, n: plays(k, p, n, 2).max(1).mean(), "thousands"),
]
RIGHT = {"5.1": threshold, "5.2": ppv, "5.3": lambda y, m: repeated(groups(y, m)),
         "5.4": lambda k, p, n: plays(k, p, n).max(1).mean()}
