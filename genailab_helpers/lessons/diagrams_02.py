"""Diagrams of lesson 2, synthetic X-rays."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse, Rectangle
from torch import Tensor

LUNG, BONE, SOFT, HEART = sns.color_palette("colorblind")[:4]
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
    _draw_slice(axis)
    ends = _crossings()
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


def _draw_slice(axis: Axes) -> None:
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


def _crossings() -> list[float]:
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


def labelled_chest(image: Tensor, masks: Mapping[str, Tensor]) -> Figure:
    """Draw one chest (H, W) with leader lines to its structures, whose places come from its masks."""
    side, points = image.shape[-1], landmarks(masks)
    fig = Figure(figsize=(7.2, 3.4), layout="constrained")
    axis = fig.subplots()
    axis.imshow(image.cpu().numpy(), cmap="gray", vmin=-1, vmax=1)
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
