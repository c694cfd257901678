"""Draw the diagrams of the lessons into the notebooks that show them.

    python docs/diagrams.py

A diagram is the same whatever a reader runs, so it is a picture in the text: an attachment of the cell that
names it, as in `![what is seen](attachment:one_ray.png)`. Chests and spines in it are the project's phantoms.
"""

import base64
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, Rectangle
from scipy.special import expit
from scipy.stats import norm
from torch import Tensor

from genailab_helpers.lessons.figures import figure_png, set_house_style
from genailab_helpers.phantoms.chest import render_chests, sample_chests
from genailab_helpers.phantoms.spine import SIDE_CM, SpineAnatomy, chain_of, render_spines, sample_spines

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("[0-9]*_*.ipynb"))
BLUE, ORANGE, GREEN, RED = sns.color_palette("colorblind")[:4]

BOXES = {  # lesson: centre of its box, name
    1: ((1.2, 3.1), "data exploration"), 2: ((1.2, 0.7), "synthetic X-rays"),
    4: ((4.7, 3.1), "spine grading"), 3: ((4.7, 0.7), "chest diffusion"),
    5: ((8.1, 1.9), "COVID-19\nclassification")}
FLOWS = [  # tail and head of an arrow, what flows along it
    ((2.1, 3.1), (3.9, 3.1), "splits by\npatient"), ((2.1, 2.75), (7.3, 2.1), "audit of shortcuts"),
    ((2.1, 1.0), (4.2, 2.65), "known\nseverity"), ((2.1, 0.7), (3.9, 0.7), "known\nanatomy"),
    ((5.5, 3.1), (7.6, 2.45), "thresholds,\nheat maps"), ((5.5, 0.7), (7.6, 1.35), "generated\nimages")]


def course_map() -> Figure:
    """Draw the five lessons as boxes, with arrows that say what one hands to the next."""
    fig, axis = plt.subplots(figsize=(8, 3.8))
    palette = sns.color_palette("colorblind")
    for tail, head, what in FLOWS:
        axis.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "color": "0.3", "linewidth": 1.5})
        part = 0.62 if what == "audit of shortcuts" else 0.45  # away from the arrow that it crosses
        x, y = (t + part * (h - t) for t, h in zip(tail, head, strict=True))
        axis.text(x, y, what, ha="center", va="center", fontsize=10,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 2})
    for number, ((x, y), name) in BOXES.items():
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
        draw_side(axis, 0, "training", train, set())
        draw_side(axis, 3.6, "test", test, set(train))
        leaked = sum(patient in train for patient in test)
        axis.set_title(title, fontsize=12)
        axis.text(2.9, -0.75, f"{leaked} of {len(test)} test images show\na patient known from training",
                  ha="center", va="top", fontsize=11)
        axis.set(xlim=(-0.2, 5.9), ylim=(-1.9, 3.6), aspect="equal")
        axis.set_axis_off()
    return fig


def draw_side(axis: Axes, left: float, name: str, images: str, known: set[str]) -> None:
    """Draw one side of a split: a square an image, with its patient's letter, framed where it leaks."""
    palette = sns.color_palette("colorblind")
    axis.text(left, 3.25, name, fontsize=11, va="center")
    n_columns = 3 if not known else 2
    for i, patient in enumerate(images):
        x, y = left + i % n_columns, 2 - i // n_columns
        leaks = patient in known
        axis.add_patch(Rectangle((x, y), 0.85, 0.85, facecolor=(*palette[ord(patient) - ord("A")], 0.45),
                                     edgecolor="black" if leaks else "0.6", linewidth=3 if leaks else 0.8))
        axis.text(x + 0.42, y + 0.42, patient, ha="center", va="center", fontsize=12,
                  fontweight="bold" if leaks else "normal")


LUNG, BONE, SOFT, HEART = BLUE, ORANGE, GREEN, RED
RAY_Y = 1.9  # the height of the ray that is followed
RIBS = (0.5, 1.15, 2.0, 2.64, 3.64, 4.25, 5.2, 5.78)  # angles around the chest
LABELS = (("skin and muscle: t₁", -5.1, 4.3), ("rib: t₂", -3.4, 5.4), ("lung: t₃", 0.0, 5.4),
          ("rib: t₄", 3.4, 5.4), ("muscle and skin: t₅", 5.1, 4.3))  # as the ray meets them


def ray_diagram() -> Figure:
    """Draw one ray from source to detector, the path lengths on it, and the Beer-Lambert law."""
    fig = Figure(figsize=(7.8, 5.0), layout="constrained")
    axis = fig.subplots()
    axis.set(xlim=(-9.2, 9.2), ylim=(-6.9, 5.9), aspect="equal")
    axis.set_axis_off()
    for y in np.linspace(-4.2, 4.2, 9):
        axis.plot([-7.6, 7.4], [y, y], color="0.85", linewidth=1, zorder=0)
    axis.add_patch(Rectangle((-8.1, -4.6), 0.5, 9.2, color="0.55"))
    axis.add_patch(Rectangle((7.4, -4.6), 0.5, 9.2, color="0.25"))
    axis.add_patch(Rectangle((7.4, RAY_Y - 0.2), 0.5, 0.4, facecolor="white", edgecolor="0.25"))
    axis.text(-8.1, -4.8, "X-ray source:\nsends I₀ photons", va="top")
    axis.text(7.9, -4.8, "detector: one pixel\ncounts I photons", va="top", ha="right")
    axis.text(0, -4.9, "the patient, seen from above", va="top", ha="center")
    draw_slice(axis)
    ends = crossings()
    for (left, right), colour in zip(pairwise(ends), (SOFT, BONE, LUNG, BONE, SOFT), strict=True):
        axis.plot([left, right], [RAY_Y, RAY_Y], color=colour, linewidth=6, solid_capstyle="butt")
    for (left, right), (words, x, y) in zip(pairwise(ends), LABELS, strict=True):
        axis.annotate(words, ((left + right) / 2, RAY_Y + 0.12), (x, y), ha="center", va="bottom",
                      arrowprops={"arrowstyle": "-", "color": "0.2"})
    axis.plot([-7.6, ends[0]], [RAY_Y, RAY_Y], color="0.2")
    axis.annotate("", (7.4, RAY_Y), (ends[-1], RAY_Y), arrowprops={"arrowstyle": "->", "color": "0.2"})
    axis.text(0, -6.7, "Beer-Lambert law:   I = I₀ · exp( −(μ₁t₁ + μ₂t₂ + μ₃t₃ + μ₄t₄ + μ₅t₅) )", ha="center",
              fontsize=12, weight="bold")
    return fig


def draw_slice(axis: Axes) -> None:
    """Draw a chest cut across: its outline, two lungs, the heart and the ribs."""
    shapes = [(Ellipse((0, 0), 7.2, 9.6), SOFT)]
    shapes += [(Ellipse((0, sign * 2.1), 3.9, 3.0), LUNG) for sign in (-1, 1)]
    shapes += [(Circle((0.6, -0.6), 1.15), "white"), (Circle((0.6, -0.6), 1.15), HEART)]  # over the lung
    shapes += [(Circle((2.6 * np.cos(angle), 3.95 * np.sin(angle)), 0.32), BONE) for angle in RIBS]
    for shape, colour in shapes:
        face = to_rgba(colour, 1.0 if colour == "white" else 0.3)
        shape.set(facecolor=face, edgecolor=colour, linewidth=1.5)
        axis.add_patch(shape)
    axis.text(0.6, -0.6, "heart", ha="center", va="center")
    axis.text(0, -2.6, "lung", ha="center", va="center")


def crossings() -> list[float]:
    """Find where the ray enters the chest, a rib, the lung, leaves the lung, a rib, and the chest."""
    ribs = [2.6 * np.cos(angle) for angle in (RIBS[3], RIBS[0])]
    reach = [np.sqrt(0.32**2 - (RAY_Y - 3.95 * np.sin(angle)) ** 2) for angle in (RIBS[3], RIBS[0])]
    chest = 3.6 * np.sqrt(1 - (RAY_Y / 4.8) ** 2)
    return [-chest, ribs[0] - reach[0], ribs[0] + reach[0], ribs[1] - reach[1], ribs[1] + reach[1], chest]


def landmarks(masks: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Find a point (column, row) of each labelled structure in the masks (H, W) of one upright chest."""
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in masks["heart"].shape), indexing="ij")
    middle = masks["heart"].shape[1] // 2

    def best(where: Tensor, score: Tensor) -> tuple[float, float]:
        at = int(torch.where(where, score.double(), -torch.inf).argmax())
        return float(columns.flatten()[at]), float(rows.flatten()[at])

    def nearest(where: Tensor, column: Tensor, row: Tensor) -> tuple[float, float]:
        return best(where, -((columns - column) ** 2 + (rows - row) ** 2))

    def centre(where: Tensor, down: float = 0.5) -> tuple[float, float]:
        return nearest(where, columns[where].double().mean(), rows[where].double().quantile(down))

    right, left = columns < middle, columns >= middle  # of the patient
    lung = masks["right_lung"]
    flank, upper = columns[lung].double().quantile(0.3), rows[lung].double().quantile(0.4)
    return {
        "right clavicle": centre(masks["clavicles"] & right),
        "rib": nearest(masks["ribs_posterior"] & right, flank, upper),
        "right lung": centre(lung, 0.7),
        "right dome of the diaphragm": best(masks["diaphragm"] & right, -rows),
        "trachea": centre(masks["trachea"], 0.7),
        "aortic arch": best(masks["aorta"], 3 * columns - rows),
        "heart": centre(masks["heart"]),
        "left costophrenic angle": best(masks["left_lung"], columns + rows),
        "stomach bubble": centre(masks["stomach_bubble"] & left),
    }


def labelled_chest() -> Figure:
    """Draw one chest with leader lines to its structures, whose places come from its masks."""
    straight = {"shift_x": 0.0, "lean": 0.0, "bend": 0.0, "turn": 0.0}
    chest = render_chests(sample_chests(1, 13).changed(**straight, magnification=0.82, bubble_width=2.2), 256,
                          masks=True)
    points, side = landmarks({name: mask[0] for name, mask in chest.masks.items()}), 256
    fig = Figure(figsize=(7.2, 3.4), layout="constrained")
    axis = fig.subplots()
    axis.imshow(chest.images[0, 0], cmap="gray", vmin=-1, vmax=1)
    axis.set(xlim=(-0.5 * side, 1.5 * side), ylim=(side - 0.5, -0.5))
    axis.set_axis_off()
    on_left = ("right clavicle", "rib", "right lung", "right dome of the diaphragm")
    on_right = [name for name in points if name not in on_left]
    for names, x, align in ((on_left, -0.04, "right"), (on_right, 1.04, "left")):
        down = sorted(names, key=lambda name: points[name][1])
        for name, y in zip(down, np.linspace(0.12, 0.88, len(down)), strict=True):
            axis.annotate(name.replace(" of ", "\nof ").replace(" angle", "\nangle"), points[name],
                          (x * side, y * side), ha=align, va="center", fontsize=11,
                          arrowprops={"arrowstyle": "-", "color": BONE, "linewidth": 1.6, "shrinkB": 0})
            axis.plot(*points[name], "o", color=BONE, markersize=5)
    axis.text(0.02 * side, 0.98 * side, "patient's right", color="white")
    axis.text(0.98 * side, 0.98 * side, "patient's left", color="white", ha="right")
    return fig


def noise_axis() -> Figure:
    """Draw one chest under rising noise, and the two directions of travel."""
    image = render_chests(sample_chests(8, 3, "Normal")[[2]], 32).images
    levels = torch.tensor([0.02, 0.1, 0.3, 1.0, 5.0])
    noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    noisy = image + levels[:, None, None, None] * noise
    fig, axes = plt.subplots(1, len(levels), figsize=(8.25, 2.9), layout="none")
    fig.subplots_adjust(left=0.01, right=0.99, top=0.86, bottom=0.26, wspace=0.06)
    for axis, image, sigma in zip(axes, noisy, levels, strict=True):
        axis.imshow(image[0], vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_xlabel(f"σ = {sigma:g}")
    for height, start, end, colour, text in (
            (0.91, 0.02, 0.98, ORANGE, "forward process: add noise (one formula, nothing to learn)"),
            (0.07, 0.98, 0.02, BLUE, "reverse process: remove a little noise, ask the denoiser again")):
        fig.add_artist(FancyArrowPatch(
            (start, height), (end, height), transform=fig.transFigure, color=colour, arrowstyle="-|>",
            mutation_scale=16, linewidth=2))
        fig.text(0.5, height + 0.02, text, ha="center", va="bottom", color=colour)
    return fig


def unet() -> Figure:
    """Draw the U-Net of lesson 3: channels and sides of every block, skip connections."""
    widths, img_size = (32, 64, 64), 32
    fig, axis = plt.subplots(figsize=(8.2, 3.5))
    n, side = len(widths), img_size // 2
    labels = [(f"{w} × {side >> k} × {side >> k}") for k, w in enumerate(widths)]
    for k, label in enumerate(labels):
        box(axis, 1.6 + 0.9 * k, -k, f"down {k + 1}\n{label}", BLUE)
        box(axis, 8.4 - 0.9 * k, -k, f"up {n - k}\n{labels[max(k - 1, 0)].split(' ')[0]} × "
             + " × ".join(label.split(" × ")[1:]), GREEN)
        axis.annotate("", (7.42 - 0.9 * k, -k), (2.58 + 0.9 * k, -k),
                      arrowprops={"arrowstyle": "-|>", "linestyle": "--", "color": "0.4"})
        axis.text(5, -k + 0.08, "skip connection" if k == 0 else "", ha="center", va="bottom", color="0.3")
    box(axis, 5, -n, f"middle, with attention\n{labels[-1]}", ORANGE, 2.9)
    box(axis, -0.8, 0, f"fold 2×2 pixels\n4 × {side} × {side}", "0.5", 2.15)
    box(axis, 10.8, 0, f"unfold\n1 × {img_size} × {img_size}", "0.5", 2.15)
    arrows = [((0.3, 0.0), (0.63, 0.0)), ((9.37, 0.0), (9.7, 0.0))]
    arrows += [((1.6 + 0.9 * k, -k - 0.32), (2.5 + 0.9 * k, -k - 0.68)) for k in range(n - 1)]
    arrows += [((7.5 - 0.9 * k, -k - 0.68), (8.4 - 0.9 * k, -k - 0.32)) for k in range(n - 1)]
    last = 0.9 * (n - 1)
    arrows += [((1.6 + last, 0.68 - n), (4.2, 0.32 - n)), ((5.8, 0.32 - n), (8.4 - last, 0.68 - n))]
    for start, end in arrows:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.2"})
    axis.text(1.75, -0.55, "halve the sides", ha="right", va="center", color="0.3")
    axis.text(8.25, -0.55, "double the sides", ha="left", va="center", color="0.3")
    axis.set(xlim=(-2, 12), ylim=(-n - 0.5, 0.6))
    axis.set_axis_off()
    return fig


def box(axis: Axes, x: float, y: float, text: str, colour: object, width: float = 1.9) -> None:
    """Draw a block of the network."""
    axis.add_patch(Rectangle((x - width / 2, y - 0.32), width, 0.64, facecolor="white", edgecolor=colour,
                                 linewidth=2))
    axis.text(x, y, text, ha="center", va="center")


SPINE, PIXELS = 6, 320  # a spine of seed 4 on which everything named can be seen; side of its image


def labelled_spine() -> Figure:
    """Draw a lateral radiograph of a healthy phantom spine with the names of what it shows."""
    anatomy = sample_spines(SPINE + 1, 4)[[SPINE]].changed(severity=torch.zeros(1))
    fig, axis = plt.subplots(figsize=(7.6, 4.0))
    axis.imshow(render_spines(anatomy, PIXELS).images[0, 0], cmap="gray", vmin=-1, vmax=1)
    places = spine_places(anatomy)
    names = list(places)
    for column, label_x, side in ((names[:5], -12, "right"), (names[5:], PIXELS + 12, "left")):
        for row, name in enumerate(column):
            down = places[name].imag * anatomy.magnification + anatomy.shift_y
            right = places[name].real * anatomy.magnification + anatomy.shift_x + anatomy.lean * down
            x, y = (float(place / SIDE_CM + 0.5) * PIXELS for place in (right, down))
            axis.annotate(name, (x, y), (label_x, (row + 0.5) * PIXELS / len(column)), ha=side, va="center",
                          arrowprops={"arrowstyle": "-", "color": ORANGE, "linewidth": 1.5})
            axis.plot(x, y, marker="o", color=ORANGE, markersize=4)
    axis.set_axis_off()
    return fig


def spine_places(anatomy: SpineAnatomy) -> dict[str, complex]:
    """Say where things lie, x + iy in cm: five to be named on the left, then four on the right."""
    chain = chain_of(anatomy)
    middle, rib = chain.centre[0].tolist(), complex(chain.at(0, -0.3, -0.4))
    pedicle, spinous = (complex(chain.at(4, *point)) for point in ((0.5, -0.4), (3.6, 0.8)))
    return {
        "dome of the diaphragm": complex(-5.0, float(anatomy.dome_y) + 0.2),
        "eleventh ribs": complex(rib.real - 8.0, rib.imag + 8.7),
        "vertebral body (L3)": middle[4] - 0.6,
        "gas in the bowel": -8.0 + 1.0j,
        "iliac crest": complex(middle[7].real - 5.2, float(anatomy.hip_y) + 2.0),
        "pedicle": pedicle,
        "spinous process": spinous,
        "disc": (middle[4] + middle[5]) / 2 + 0.5,
        "sacrum": middle[7] + 0.9 + 0.9j,
    }


def coral_thresholds() -> Figure:
    """Draw CORAL: one score, four thresholds, and what they say about five grades."""
    thresholds, score = np.array([-3.0, -1.0, 1.2, 3.2]), 0.4
    x, colours = np.linspace(-5.5, 5.5, 300), sns.color_palette("colorblind", 4)
    above = expit(score - thresholds)
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.2), width_ratios=(2.2, 1))
    for k, (threshold, colour) in enumerate(zip(thresholds, colours, strict=True)):
        left.plot(x, expit(x - threshold), color=colour)
        left.plot([threshold, threshold], [0, 0.5], color=colour, linestyle=":")
        left.plot(score, above[k], "o", color=colour)
        left.annotate(f"above {k}?  {above[k]:.2f}", (score, above[k]), (-5.4, 0.97 - 0.13 * k), color=colour,
                      va="center")
    for k, place in enumerate((thresholds[:-1] + thresholds[1:]) / 2):
        left.text(place, -0.09, f"grade {k + 1}", ha="center", va="center")
    left.text(-4.4, -0.09, "grade 0", ha="center", va="center")
    left.text(4.5, -0.09, "grade 4", ha="center", va="center")
    left.axvline(score, color="0.3", linestyle="--", ymin=0.14)
    left.text(score + 0.1, 1.06, "score of one image", color="0.2", ha="center")
    left.set(xlim=(-5.5, 5.5), ylim=(-0.17, 1.02), xticks=thresholds, yticks=(0, 0.5, 1), xlabel="score",
             ylabel="probability of yes")
    left.set_xticklabels([f"b{k}" for k in range(4)])
    grades = -np.diff(above, prepend=1, append=0)
    right.bar(range(5), grades, color="0.6")
    for k, value in enumerate(grades):
        right.text(k, value + 0.01, f"{value:.2f}", ha="center")
    right.set(xlabel="grade", ylabel="probability", title="differences of neighbours", ylim=(0, 0.7))
    return fig


def grad_cam_steps() -> Figure:
    """Draw Grad-CAM: maps times mean gradients, summed, cut at zero and laid over the image."""
    anatomy = sample_spines(9, 4)[[8]].changed(severity=torch.full((1,), 0.9))
    image = render_spines(anatomy, 96).images[0, 0]
    rows, columns = np.mgrid[:12, :12]

    def blob(row: float, column: float, size: float) -> np.ndarray:
        return np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / size)

    maps = blob(7.5, 6, 3), blob(5, 6.5, 2) + blob(9, 6, 2), blob(6, 10, 8)
    slopes = 0.9, 0.6, -0.8
    fig, axes = plt.subplots(3, 4, figsize=(7.6, 4.8), width_ratios=(1, 0.7, 1, 1))
    for axis in axes.ravel():
        axis.set_axis_off()
    for row, (one, slope, colour) in enumerate(zip(maps, slopes, (BLUE, GREEN, RED), strict=True)):
        axes[row, 0].imshow(one, cmap="gray")
        axes[row, 0].set_title(f"map {row + 1}", color=colour)
        times = f"× {slope:+.1f}".replace("-", "−")
        axes[row, 1].text(0.5, 0.55, times, ha="center", va="center", fontsize=14, color=colour)
        axes[row, 1].text(0.5, 0.28, "mean gradient", ha="center", va="center", color=colour)
    summed = sum(slope * one for slope, one in zip(slopes, maps, strict=True))
    cut = np.clip(summed, 0, None)
    axes[1, 2].imshow(cut, cmap="inferno")
    axes[1, 2].set_title("sum, cut at zero")
    axes[1, 3].imshow(image, cmap="gray", extent=(0, 12, 12, 0))
    axes[1, 3].imshow(cut, cmap="inferno", alpha=0.5, extent=(0, 12, 12, 0), interpolation="bilinear")
    axes[1, 3].set_title("over the image")
    for row in range(3):
        axes[1, 2].annotate("", (-0.04, 0.6 - 0.1 * row), (0.95, 0.55), xycoords="axes fraction",
                            textcoords=axes[row, 1].transAxes,
                            arrowprops={"arrowstyle": "->", "color": "0.3"})
    axes[1, 3].annotate("", (-0.03, 0.5), (1.05, 0.5), xycoords="axes fraction",
                        textcoords=axes[1, 2].transAxes, arrowprops={"arrowstyle": "->", "color": "0.3"})
    return fig


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
            axis.add_patch(Rectangle((x - 0.55, y - 0.4), 1.1, 0.85, facecolor="0.93", edgecolor=colour,
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
        axis.text(2.95, y, text + " AUROC", ha="right", color=colour)
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


DIAGRAMS: dict[str, Callable[[], Figure]] = {
    "course_map": course_map, "patients_across_splits": patients_across_splits,
    "labelled_chest": labelled_chest, "one_ray": ray_diagram, "noise_axis": noise_axis, "unet": unet,
    "labelled_spine": labelled_spine, "coral_thresholds": coral_thresholds, "grad_cam_steps": grad_cam_steps,
    "swap_test": swap_test, "frozen_threshold": frozen_threshold}


def draw(name: str) -> bytes:
    """Return a diagram as a PNG."""
    with plt.rc_context():
        set_house_style()
        fig = DIAGRAMS[name]()
        plt.close(fig)
        return figure_png(fig, pixels_per_inch=110)  # a browser shows it at this size, if its column allows


def named(text: str) -> list[str]:
    """Return the names of the diagrams that a text cell shows."""
    return re.findall(r"\(attachment:(\w+)\.png\)", text)


if __name__ == "__main__":
    for path in NOTEBOOKS:
        lesson = nbformat.read(path, as_version=4)
        for cell in lesson.cells:
            if cell.cell_type == "markdown" and named(cell.source):
                cell.attachments = {f"{name}.png": {"image/png": base64.b64encode(draw(name)).decode("ascii")}
                                    for name in named(cell.source)}
        path.write_text(nbformat.writes(lesson) + "\n", encoding="utf-8")
