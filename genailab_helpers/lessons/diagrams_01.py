"""Diagrams of lesson 1: the course at a glance, and why images of one patient must stay together."""

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_BOXES = {  # lesson: centre of its box, name
    1: ((1.2, 3.1), "data exploration"), 2: ((1.2, 0.7), "synthetic X-rays"),
    4: ((4.7, 3.1), "spine grading"), 3: ((4.7, 0.7), "chest diffusion"),
    5: ((8.1, 1.9), "COVID-19\nclassification")}
_FLOWS = [  # tail and head of an arrow, what flows along it
    ((2.1, 3.1), (3.9, 3.1), "splits by\npatient"), ((2.1, 2.75), (7.3, 2.1), "audit of shortcuts"),
    ((2.1, 1.0), (4.2, 2.65), "known\nseverity"), ((2.1, 0.7), (3.9, 0.7), "known\nanatomy"),
    ((5.5, 3.1), (7.6, 2.45), "thresholds,\nheat maps"), ((5.5, 0.7), (7.6, 1.35), "generated\nimages")]


def course_map() -> Figure:
    """Draw the five lessons as boxes, with arrows that say what one hands to the next."""
    fig, axis = plt.subplots(figsize=(8, 3.8))
    palette = sns.color_palette("colorblind")
    for tail, head, what in _FLOWS:
        axis.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "color": "0.3", "linewidth": 1.5})
        part = 0.62 if what == "audit of shortcuts" else 0.45  # away from the arrow that it crosses
        x, y = (t + part * (h - t) for t, h in zip(tail, head, strict=True))
        axis.text(x, y, what, ha="center", va="center", fontsize=10,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 2})
    for number, ((x, y), name) in _BOXES.items():
        colour = palette[number - 1]
        axis.text(x, y, f"Lesson {number}\n{name}", ha="center", va="center", fontsize=11,
                  bbox={"boxstyle": "round,pad=0.5", "facecolor": (*colour, 0.25), "edgecolor": colour,
                        "linewidth": 4 if number == 1 else 2})
    axis.set(xlim=(0.2, 9.1), ylim=(0.2, 3.6))
    axis.set_axis_off()
    return fig


def patients_across_splits() -> Figure:
    """Draw the images of five patients, split by image and split by patient."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for axis, title, train, test in (
            (axes[0], "Split by image", "AABBBCCD", "ACDDE"),
            (axes[1], "Split by patient", "AAABBBCCC", "DDDE")):
        _draw_side(axis, 0, "training", train, set())
        _draw_side(axis, 3.6, "test", test, set(train))
        leaked = sum(patient in train for patient in test)
        axis.set_title(title, fontsize=12)
        axis.text(2.9, -0.75, f"{leaked} of {len(test)} test images show\na patient known from training",
                  ha="center", va="top", fontsize=11)
        axis.set(xlim=(-0.2, 5.9), ylim=(-1.9, 3.6), aspect="equal")
        axis.set_axis_off()
    return fig


def _draw_side(axis: Axes, left: float, name: str, images: str, known: set[str]) -> None:
    """Draw one side of a split: a square an image, with its patient's letter, framed where it leaks."""
    palette = sns.color_palette("colorblind")
    axis.text(left, 3.25, name, fontsize=11, va="center")
    n_columns = 3 if not known else 2
    for i, patient in enumerate(images):
        x, y = left + i % n_columns, 2 - i // n_columns
        leaks = patient in known
        axis.add_patch(plt.Rectangle((x, y), 0.85, 0.85, facecolor=(*palette[ord(patient) - ord("A")], 0.45),
                                     edgecolor="black" if leaks else "0.6", linewidth=3 if leaks else 0.8))
        axis.text(x + 0.42, y + 0.42, patient, ha="center", va="center", fontsize=12,
                  fontweight="bold" if leaks else "normal")
