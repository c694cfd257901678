"""Diagrams of lesson 3: noise levels on an axis, and the U-Net with its shapes."""

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from torch import Tensor

BLUE, ORANGE, GREEN = sns.color_palette("colorblind")[:3]


def noise_axis(noisy: Tensor, levels: Tensor) -> Figure:
    """Draw images (N, 1, H, W) under rising noise, and the two directions of travel."""
    n = len(levels)
    fig, axes = plt.subplots(1, n, figsize=(1.65 * n, 2.9), layout="none")
    fig.subplots_adjust(left=0.01, right=0.99, top=0.86, bottom=0.26, wspace=0.06)
    for axis, image, sigma in zip(axes, noisy, levels, strict=True):
        axis.imshow(image[0], vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(f"σ = {sigma:g}")
    for height, start, end, colour, text in (
            (0.91, 0.02, 0.98, ORANGE, "forward process: add noise (one formula, nothing to learn)"),
            (0.07, 0.98, 0.02, BLUE, "reverse process: remove a little noise, ask the denoiser again")):
        fig.add_artist(FancyArrowPatch(
            (start, height), (end, height), transform=fig.transFigure, color=colour, arrowstyle="-|>",
            mutation_scale=16, linewidth=2))
        fig.text(0.5, height + 0.02, text, ha="center", va="bottom", color=colour)
    return fig


def unet(widths: tuple[int, ...], img_size: int) -> Figure:
    """Draw the U-Net of this lesson: channels and sides of every block, skip connections."""
    fig, axis = plt.subplots(figsize=(7.6, 3.5))
    n, side = len(widths), img_size // 2
    labels = [(f"{w} × {side >> k} × {side >> k}") for k, w in enumerate(widths)]
    for k, label in enumerate(labels):
        _box(axis, 1.6 + 0.9 * k, -k, f"down {k + 1}\n{label}", BLUE)
        _box(axis, 8.4 - 0.9 * k, -k, f"up {n - k}\n{labels[max(k - 1, 0)].split(' ')[0]} × "
             + " × ".join(label.split(" × ")[1:]), GREEN)
        axis.annotate("", (7.45 - 0.9 * k, -k), (2.55 + 0.9 * k, -k),
                      arrowprops={"arrowstyle": "-|>", "linestyle": "--", "color": "0.4"})
        axis.text(5, -k + 0.08, "skip connection" if k == 0 else "", ha="center", va="bottom", color="0.3")
    _box(axis, 5, -n, f"middle, with attention\n{labels[-1]}", ORANGE, 2.9)
    _box(axis, -0.6, 0, f"fold 2×2 pixels\n4 × {side} × {side}", "0.5", 1.9)
    _box(axis, 10.6, 0, f"unfold\n1 × {img_size} × {img_size}", "0.5", 1.9)
    arrows = [((0.38, 0.0), (0.7, 0.0)), ((9.3, 0.0), (9.62, 0.0))]
    arrows += [((1.6 + 0.9 * k, -k - 0.32), (2.5 + 0.9 * k, -k - 0.68)) for k in range(n - 1)]
    arrows += [((7.5 - 0.9 * k, -k - 0.68), (8.4 - 0.9 * k, -k - 0.32)) for k in range(n - 1)]
    last = 0.9 * (n - 1)
    arrows += [((1.6 + last, 0.68 - n), (4.2, 0.32 - n)), ((5.8, 0.32 - n), (8.4 - last, 0.68 - n))]
    for start, end in arrows:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.2"})
    axis.text(1.75, -0.55, "halve the sides", ha="right", va="center", color="0.3")
    axis.text(8.25, -0.55, "double the sides", ha="left", va="center", color="0.3")
    axis.set(xlim=(-1.7, 11.7), ylim=(-n - 0.5, 0.6))
    axis.set_axis_off()
    return fig


def _box(axis: plt.Axes, x: float, y: float, text: str, colour: object, width: float = 1.75) -> None:
    axis.add_patch(plt.Rectangle((x - width / 2, y - 0.32), width, 0.64, facecolor="white", edgecolor=colour,
                                 linewidth=2))
    axis.text(x, y, text, ha="center", va="center")
