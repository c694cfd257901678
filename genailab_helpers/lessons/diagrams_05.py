"""Diagrams of lesson 5: the swap test, and what becomes of a frozen threshold."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from scipy.stats import norm

BLUE, ORANGE, GREEN, RED = sns.color_palette("colorblind")[:4]
HEALTHY, ILL = (0.0, 1.0), (2.0, 1.0)  # mean and standard deviation of the scores, here
THERE = 0.8  # by how much another machine moves every score
THRESHOLD = 1.0


def swap_test() -> Figure:
    """Draw which class carries the marker in training and in the three tests, and the two answers."""
    fig, axis = plt.subplots(figsize=(7.6, 3.4), layout="none")
    fig.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01)
    columns = [("train", True, False), ("test: with", True, False), ("test: without", False, False),
               ("test: swapped", False, True)]
    for k, (title, on_ill, on_healthy) in enumerate(columns):
        x = 2.1 + 1.9 * k
        axis.text(x, 3.15, title, ha="center", weight="bold")
        for y, colour, marked in ((2.5, ORANGE, on_ill), (1.4, BLUE, on_healthy)):
            axis.add_patch(plt.Rectangle((x - 0.55, y - 0.4), 1.1, 0.85, facecolor="0.93", edgecolor=colour,
                                         linewidth=2))
            for side in (-0.2, 0.2):
                axis.add_patch(Ellipse((x + side, y), 0.26, 0.6, facecolor="0.35"))
            if colour == ORANGE:
                axis.plot([x - 0.2, x + 0.2], [y - 0.18, y - 0.18], "o", color="white", markersize=5)
            if marked:
                axis.text(x + 0.5, y + 0.4, "L", ha="right", va="top", weight="bold", color=RED, size=13)
    axis.plot([3.05, 3.05], [0.0, 3.4], color="0.6", linestyle="--")
    for y, text, colour in ((2.5, "COVID", ORANGE), (1.4, "normal", BLUE)):
        axis.text(1.3, y, text, ha="right", va="center", color=colour, weight="bold")
    rows = [(0.55, "sees the lesion:", GREEN, ("high", "high", "high")),
            (0.1, "reads the marker:", RED, ("high", "near ½", "below ½"))]
    for y, text, colour, answers in rows:
        axis.text(3.0, y, text + " AUROC", ha="right", color=colour)
        for k, answer in enumerate(answers):
            axis.text(4.0 + 1.9 * k, y, answer, ha="center", color=colour, weight="bold")
    axis.set(xlim=(0.3, 8.6), ylim=(-0.1, 3.5))
    axis.set_axis_off()
    return fig


def frozen_threshold() -> Figure:
    """Draw scores of two classes here and elsewhere with one threshold, and the point on the ROC curve."""
    fig, (here, there, roc) = plt.subplots(1, 3, figsize=(8.4, 3.0), width_ratios=(1, 1, 1.05))
    x = np.linspace(-3, 6, 300)
    for axis, shift, title in ((here, 0, "here"), (there, THERE, "elsewhere: every score higher")):
        for (mean, std), colour, text in ((HEALTHY, BLUE, "normal"), (ILL, ORANGE, "ill")):
            density = norm.pdf(x, mean + shift, std)
            axis.plot(x, density, color=colour)
            axis.fill_between(x, density, where=x >= THRESHOLD, color=colour, alpha=0.3)
            axis.text(mean + shift, 0.41, text, ha="left" if colour == ORANGE else "right", va="bottom",
                      color=colour)
        axis.axvline(THRESHOLD, color="0.2", linestyle="--")
        axis.set(ylim=(0, 0.5), xlabel="score", yticks=[], xticks=[THRESHOLD], title=title)
        axis.set_xticklabels(["threshold"])
    cuts = np.linspace(-4, 7, 300)
    roc.plot(norm.sf(cuts, *HEALTHY), norm.sf(cuts, *ILL), color="0.3")
    roc.plot([0, 1], [0, 1], color="0.6", linestyle=":")
    for shift, mark, text in ((0, "o", "here"), (THERE, "s", "elsewhere")):
        point = tuple(float(norm.sf(THRESHOLD, mean + shift, std)) for mean, std in (HEALTHY, ILL))
        roc.plot(*point, mark, color=GREEN if shift == 0 else RED, markersize=9)
        roc.annotate(text, point, (8, -14), textcoords="offset points", color=GREEN if shift == 0 else RED)
    roc.set(xlabel="1 - specificity", ylabel="sensitivity", title="same curve, another point", aspect="equal")
    return fig
