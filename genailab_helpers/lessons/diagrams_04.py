"""Diagrams of lesson 4, spine grading."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.figure import Figure
from scipy.special import expit

from genailab_helpers.phantoms.spine import SIDE_CM, SpineAnatomy, chain_of, render_spines, sample_spines

_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = sns.color_palette("colorblind", 5)
_HEALTHY, _PIXELS = 6, 320  # a spine of seed 4 on which everything named can be seen; side of its image


def labelled_spine() -> Figure:
    """Draw a lateral radiograph of a healthy phantom spine with the names of what it shows."""
    anatomy = sample_spines(_HEALTHY + 1, 4)[[_HEALTHY]].changed(severity=torch.zeros(1))
    fig, axis = plt.subplots(figsize=(7.6, 4.0))
    axis.imshow(render_spines(anatomy, _PIXELS).images[0, 0], cmap="gray", vmin=-1, vmax=1)
    places = _places(anatomy)
    names = list(places)
    for column, label_x, side in ((names[:5], -12, "right"), (names[5:], _PIXELS + 12, "left")):
        for row, name in enumerate(column):
            down = places[name].imag * anatomy.magnification + anatomy.shift_y
            right = places[name].real * anatomy.magnification + anatomy.shift_x + anatomy.lean * down
            x, y = (float(place / SIDE_CM + 0.5) * _PIXELS for place in (right, down))
            axis.annotate(name, (x, y), (label_x, (row + 0.5) * _PIXELS / len(column)), ha=side, va="center",
                          arrowprops={"arrowstyle": "-", "color": _ORANGE, "linewidth": 1.5})
            axis.plot(x, y, marker="o", color=_ORANGE, markersize=4)
    axis.set_axis_off()
    return fig


def _places(anatomy: SpineAnatomy) -> dict[str, complex]:
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
    for row, (one, slope, colour) in enumerate(zip(maps, slopes, (_BLUE, _GREEN, _RED), strict=True)):
        axes[row, 0].imshow(one, cmap="gray")
        axes[row, 0].set_title(f"map {row + 1}", color=colour)
        axes[row, 1].text(0.5, 0.55, f"× {slope:+.1f}", ha="center", va="center", fontsize=14, color=colour)
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
