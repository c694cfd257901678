"""Figures in the house style, shown with alternative text."""

import base64
import html
import io
import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython.display import display
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from genailab_helpers.datasets.shortcuts import ShortcutReport

PIXELS_PER_INCH = 144  # one and a half times a browser's 96: crisp on dense screens, still small
FONT_SIZE = 10  # points


def set_house_style() -> None:
    """Set matplotlib's defaults: seaborn's style, colour-blind-safe colours, letters of 10 pt or more."""
    plt.rcdefaults()  # whatever a matplotlibrc says, such as image.origin
    sns.set_theme(style="ticks", palette="colorblind", font="DejaVu Sans", rc={
        "figure.constrained_layout.use": True, "figure.figsize": (6.4, 3.6), "image.cmap": "gray",
        "font.size": FONT_SIZE, "axes.titlesize": FONT_SIZE + 1, "axes.labelsize": FONT_SIZE,
        "xtick.labelsize": FONT_SIZE, "ytick.labelsize": FONT_SIZE, "legend.fontsize": FONT_SIZE,
        "legend.title_fontsize": FONT_SIZE, "figure.titlesize": FONT_SIZE + 2,
        "axes.spines.top": False, "axes.spines.right": False,
    })


def figure_png(fig: Figure, pixels_per_inch: int = PIXELS_PER_INCH) -> bytes:
    """Encode a figure as a small PNG whose bytes depend on its pixels only.

    Parameters
    ----------
    fig : Figure
        Drawn on white, so that it can be read on a dark page too.
    pixels_per_inch : int, default 144
        Resolution.

    Returns
    -------
    bytes
        PNG without date or version: 8-bit grey where the figure has no colour, else 24-bit colour. It is not
        reduced to a palette: a hardly visible change of the data would then choose another palette, and two
        runs could no longer be compared.
    """
    for text in fig.findobj(Text) + [t for a in fig.axes for t in a.get_xticklabels() + a.get_yticklabels()]:
        text.set_parse_math("mathdefault" in text.get_text())  # of ticks; a class may have a $
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=pixels_per_inch, facecolor="white", transparent=False)
    picture = Image.open(drawn).convert("RGB")
    red, green, blue = picture.split()
    if red.tobytes() == green.tobytes() == blue.tobytes():
        picture = red
    encoded = io.BytesIO()
    picture.save(encoded, format="png", optimize=True)
    return encoded.getvalue()


def figure_html(fig: Figure, alt: str, caption: str | None = None) -> str:
    """Write a figure as one HTML `<figure>` that carries its own pixels, and close it.

    Parameters
    ----------
    fig : Figure
        The figure; it is closed, so that a notebook does not show it a second time.
    alt : str
        What is to be seen, for a reader who cannot see it.
    caption : str, optional
        Plain text below the figure.

    Returns
    -------
    str
        `<figure>` with one `<img>` at most as wide as the page.

    Raises
    ------
    ValueError
        If `alt` is empty.
    """
    plt.close(fig)
    if not alt.strip():
        raise ValueError("alt is empty; say in a sentence what the figure shows")
    source = base64.b64encode(figure_png(fig)).decode("ascii")
    width = round(fig.get_figwidth() * 96)  # CSS counts 96 pixels to the inch
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (f'<figure style="margin:0"><img alt="{html.escape(alt)}" width="{width}" '
            f'style="max-width:100%;height:auto" src="data:image/png;base64,{source}">{below}</figure>')


def show(fig: Figure, alt: str, caption: str | None = None) -> None:
    """Show a figure in a notebook with alternative text, and close it.

    `plt.show()` drops alternative text in JupyterLab; only an HTML `<img alt="...">` carries it.

    Parameters
    ----------
    fig : Figure
        The figure to show.
    alt : str
        What is to be seen, for a reader who cannot see it; also the output's plain text.
    caption : str, optional
        Plain text below the figure.

    Raises
    ------
    ValueError
        If `alt` is empty.
    """
    display({"text/html": figure_html(fig, alt, caption), "text/plain": alt}, raw=True)


def image_grid(images: Tensor, titles: Sequence[str] | None = None, n_columns: int | None = None, *,
              masks: Mapping[str, Tensor] | None = None, inches: float = 1.6) -> Figure:
    """Draw images side by side, all on the same grey scale: -1 black, +1 white.

    Parameters
    ----------
    images : Tensor
        (N, 1, H, W) in [-1, 1], N at least 1. Values beyond that range are drawn black or white.
    titles : sequence of str, optional
        N titles, one above each image; long ones are wrapped.
    n_columns : int, optional
        Images in a row; by default rows of like length, at most 6 images long.
    masks : mapping of str to Tensor, optional
        At most 9 structures to colour, name to (N, H, W) bool. The colour goes by the place in the mapping; a
        structure that is in no image is left out of the legend.
    inches : float, default 1.6
        Width of an image.

    Returns
    -------
    Figure
        Not yet shown; hand it to `show`.

    Raises
    ------
    ValueError
        If `images` is no batch of images, or `titles` do not fit it.
    """
    if images.ndim != 4 or images.shape[1] != 1 or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (N, 1, H, W) with N at least 1")
    n_images, _, height, width = images.shape
    if titles is not None and len(titles) != n_images:
        raise ValueError(f"{len(titles)} titles for {n_images} images; expected one each")
    masks = masks or {}
    colours = [colour for colour in sns.color_palette("colorblind") if max(colour) > min(colour)]  # but grey
    coloured = {name: colour for name, colour in zip(masks, colours, strict=False) if masks[name].any()}
    n_columns = min(n_columns or math.ceil(n_images / math.ceil(n_images / 6)), n_images)
    n_rows = math.ceil(n_images / n_columns)
    wrapped = [textwrap.fill(title, max(8, int(inches * 11))) for title in titles or ()]

    # The room that words need, in inches, so that the images come out as wide as asked.
    n_lines = max((title.count("\n") + 1 for title in wrapped), default=0)
    title_height = (1.2 * FONT_SIZE * n_lines + 6) / 72 if wrapped else 0
    legend_columns = max(1, int(n_columns * inches / 1.5))
    legend_height = (1.75 * FONT_SIZE * math.ceil(len(coloured) / legend_columns) + 6) / 72 if coloured else 0
    row_height = inches * height / width + 0.08 + title_height
    fig = Figure(figsize=(n_columns * (inches + 0.08), n_rows * row_height + legend_height),
                 layout="compressed")
    axes = fig.subplots(n_rows, n_columns, squeeze=False).ravel()
    for ax in axes[n_images:]:
        ax.remove()
    for i, ax in enumerate(axes[:n_images]):
        ax.imshow(images[i, 0].detach().cpu().numpy(), cmap="gray", vmin=-1, vmax=1)
        for name, colour in coloured.items():
            ax.imshow(_veil(masks[name][i], colour))
        if wrapped:
            ax.set_title(wrapped[i], fontsize=FONT_SIZE)
        ax.set_axis_off()
    if coloured:
        fig.legend(handles=[Patch(color=colour, label=name) for name, colour in coloured.items()],
                   loc="outside lower center", ncols=min(legend_columns, len(coloured)), frameon=False,
                   fontsize=FONT_SIZE)
    return fig


def _veil(mask: Tensor, colour: tuple[float, float, float]) -> np.ndarray:
    """Colour a bool mask (H, W) half through, as RGBA (H, W, 4)."""
    veil = np.zeros((*mask.shape, 4))
    veil[mask.cpu().numpy()] = (*to_rgb(colour), 0.45)
    return veil


def shortcut_figure(report: ShortcutReport) -> Figure:
    """Draw accuracy and interval of every row of an audit against chance; shortcuts are filled squares."""
    fig, axis = plt.subplots(figsize=(7.2, 1.3 + 0.38 * len(report.rows)))
    for place, row in enumerate(report.rows):
        value, low, high = row.score[:3]
        colour, marker = ("#d55e00", "s") if row.flagged else ("#0072b2", "o")
        axis.errorbar(value, place, xerr=[[value - low], [high - value]], color=colour, marker=marker,
                      markersize=7, markerfacecolor=colour if row.flagged else "white", capsize=3)
        axis.annotate("shortcut" if row.flagged else "", (high, place), (6, 0), color=colour,
                      textcoords="offset points", va="center")
    axis.axvline(report.rows[0].chance, color="0.35", linestyle="--")
    axis.annotate("chance", (report.rows[0].chance, 1), (4, 3), xycoords=("data", "axes fraction"),
                  textcoords="offset points", color="0.25")
    axis.set_yticks(range(len(report.rows)), [row.name for row in report.rows])
    axis.set(ylim=(len(report.rows) - 0.5, -0.5), xlabel="accuracy with 95 % interval")
    axis.set_xlim(right=max(1.02, *(row.score.high + 0.16 * row.flagged for row in report.rows)))
    axis.set_title(f"What a tiny model predicts from parts of {report.n_images} images",
                   pad=18, loc="right")
    return fig
