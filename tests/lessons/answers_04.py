"""Right answers to the exercises of lesson 4, and classic mistakes with words of what the self-check says."""

import numpy as np
import torch
from torch.nn.functional import logsigmoid


def all_pairs(a, b, weight):
    return weight(*np.meshgrid(a, b))


def questions(logits, grade):
    return torch.where(grade > torch.arange(4), logsigmoid(logits), logsigmoid(-logits))


def simulate(draw, n=200, fresh=False):
    def answer(confidence, error):
        rng = np.random.default_rng(0)
        return np.mean([error(draw(np.random.default_rng(0) if fresh else rng, confidence), confidence)
                        for _ in range(n)])
    return answer


def highest(wanted, positive, score):
    falling = np.sort(score[positive])[::-1]
    return falling[int(np.ceil(wanted * len(falling) - 1e-9)) - 1]


RIGHT = {
    "4.1": lambda a, b, w: 1 - np.mean(w(a, b)) / np.mean(all_pairs(a, b, w)),
    "4.2": lambda z, y: -questions(z, y).sum(),
    "4.3": simulate(lambda rng, p: rng.random(len(p)) < p),
    "4.4": highest,
}
MISTAKES = [
    ("4.1", lambda a, b, w: np.mean(w(a, b)) / np.mean(all_pairs(a, b, w)), "kappa is 1 minus that"),
    ("4.1", lambda a, b, w: 1 - np.mean(w(a, b)), "knows no chance"),
    ("4.1", lambda a, b, w: 1 - np.sum(w(a, b)) / np.sum(all_pairs(a, b, w)), "divide means"),
    ("4.1", lambda a, b, w: 1 - np.mean(w(a, b)) / np.mean(all_pairs(np.arange(5), np.arange(5), w)),
     "equally frequent"),
    ("4.2", lambda z, y: -questions(z, y).mean(), "mean over the questions"),
    ("4.2", lambda z, y: -questions(z, y + 1).sum(), "not at least k"),
    ("4.2", lambda z, y: -questions(-z, y).sum(), "yes and no are swapped"),
    ("4.2", lambda z, y: -questions(z, y), "add up the four questions"),
    ("4.2", lambda z, y: -torch.where(y > torch.arange(4), z.sigmoid(), 1 - z.sigmoid()).log().sum(),
     "logsigmoid"),
    ("4.3", simulate(lambda rng, p: rng.random(len(p)) > p), "below its confidence, not above"),
    ("4.3", simulate(lambda rng, p: rng.random(len(p)) < 0.5), "a probability of its own"),
    ("4.3", simulate(lambda rng, p: rng.random(len(p)) < p.mean()), "the same probability"),
    ("4.3", simulate(lambda rng, p: p), "either right or wrong"),
    ("4.3", simulate(lambda rng, p: rng.random(len(p)) < p, fresh=True), "once, before the loop"),
    ("4.3", simulate(lambda rng, p: rng.random(len(p)) < p, n=1), "one of them is luck"),
    ("4.4", lambda w, p, s: np.sort(s)[::-1][int(np.ceil(w * len(s))) - 1], "counts all images"),
    ("4.4", lambda w, p, s: s[p].min(), "not the highest"),
    ("4.4", lambda w, p, s: np.quantile(s[p], w), "wrong end"),
    ("4.4", lambda w, p, s: np.sort(s[p])[::-1][int(np.ceil(w * p.sum())) - 1], "subtract a hair"),
]
