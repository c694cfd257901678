"""Real matplotlib figures: another rendering of the same data passes, other data does not."""

import io
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from genailab_helpers.nbregression import FIGURE_THRESHOLD, compare_figures, figure_difference

Draw = Callable[[Axes], object]
DPI = [144, pytest.param(100, marks=pytest.mark.slow)]  # the lessons' own, and matplotlib's


def png(draw: Draw, dpi: float = 100, title: str = "Loss of training", **settings: object) -> bytes:
    """Render a figure of 6.4 by 4 inches as a notebook shows it."""
    encoded = io.BytesIO()
    with mpl.rc_context(settings):
        figure = Figure(figsize=(6.4, 4.0))
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        draw(axes)
        axes.set(title=title, xlabel="step", ylabel="loss")
        figure.savefig(encoded, format="png", dpi=dpi, bbox_inches="tight")
    return encoded.getvalue()


def curve(seed: int = 0, height: float = 1.0, width: float = 1.5, colour: str = "C0") -> Draw:
    steps = np.arange(60)
    loss = height * np.exp(-steps / 20) + 0.05 * np.random.default_rng(seed).standard_normal(60)
    return lambda axes: (axes.plot(steps, loss, lw=width, color=colour), axes.set_ylim(-0.3, 1.2))


def two_curves(seed: int) -> Draw:
    return lambda axes: (curve(0)(axes), curve(seed, height=0.6, colour="C1")(axes))


def scatter(seed: int = 0, last: tuple[float, float] | None = None) -> Draw:
    points = np.random.default_rng(seed).random((40, 2))
    if last is not None:
        points[-1] = last
    return lambda axes: (axes.scatter(*points.T, s=12), axes.set(xlim=(0, 1), ylim=(0, 1)))


def histogram(seed: int = 0) -> Draw:
    values = np.random.default_rng(seed).standard_normal(500)
    return lambda axes: (axes.hist(values, 30, range=(-4, 4)), axes.set_ylim(0, 70))


def bars(*heights: float) -> Draw:
    return lambda axes: (axes.bar(range(len(heights)), heights), axes.set_ylim(0, 1))


def film(seed: int = 0, size: float = 1.0) -> Draw:
    """Draw a bright body with two dark ellipses; `seed` moves and stretches them."""
    shift = np.random.default_rng(seed).uniform(-0.08, 0.08, 4) * size
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    picture = np.where((x / 0.9) ** 2 + (y / 1.3) ** 2 < 1, 0.4, -0.9)
    for side in (-1, 1):
        u = (x - side * (0.38 + shift[0])) / (0.27 + shift[1])
        v = (y + 0.1 + shift[2]) / (0.6 + shift[3])
        picture[u**2 + v**2 < 1] = -0.5
    return lambda axes: axes.imshow(picture, cmap="gray", vmin=-1, vmax=1)


def nothing(axes: Axes) -> None:
    axes.set(xlim=(-3, 62), ylim=(-0.3, 1.2))


KINDS = {"curve": curve(), "thin curve": curve(width=0.8, colour="0.6"), "two curves": two_curves(3),
         "scatter": scatter(), "histogram": histogram(), "bars": bars(0.5, 0.6, 0.7), "film": film()}
RENDERINGS = {"no hinting": {"text.hinting": "none"}, "other hinting": {"text.hinting": "force_autohint"},
              "letters not smoothed": {"text.antialiased": False}, "no snapping": {"path.snap": False},
              "letters 1 % larger": {"font.size": 10.1}, "1 % more pixels": {"dpi": 101},
              "1 % fewer pixels": {"dpi": 99}}
CHANGES = {
    "curve of other data": (curve(0), curve(1)),
    "curve 2 % higher": (curve(), curve(height=1.02)),
    "thin grey curve of other data": (curve(0, width=0.8, colour="0.6"), curve(1, width=0.8, colour="0.6")),
    "one of two curves": (two_curves(3), two_curves(4)),
    "other colour": (curve(), curve(colour="C2")),
    "scatter of other data": (scatter(0), scatter(1)),
    "one point of a scatter": (scatter(), scatter(last=(0.5, 0.5))),
    "histogram of other data": (histogram(0), histogram(1)),
    "one bar 1.5 % lower": (bars(0.5, 0.6, 0.7), bars(0.5, 0.6, 0.69)),
    "other film": (film(0), film(1)),
    "slightly other film": (film(0, size=0.3), film(1, size=0.3)),
    "blank": (curve(), nothing),
    "blank for a thin grey curve": (curve(width=0.8, colour="0.6"), nothing),
}


def rendered(draw: Draw, changes: dict[str, object], dpi: float = 100) -> bytes:
    """Render under changed settings; `dpi` among them counts in percent of the resolution."""
    settings = dict(changes)
    return png(draw, dpi=dpi * settings.pop("dpi", 100) / 100, **settings)


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("dpi", DPI)
@pytest.mark.parametrize("kind", KINDS)
def test_other_rendering_of_the_same_data_passes(kind: str, dpi: int) -> None:
    reference = png(KINDS[kind], dpi=dpi)
    reports = {name: compare_figures(reference, rendered(KINDS[kind], changes, dpi))
               for name, changes in RENDERINGS.items()}
    assert reports == dict.fromkeys(RENDERINGS)


@pytest.mark.parametrize("dpi", DPI)
@pytest.mark.parametrize("change", CHANGES)
def test_other_data_fails(change: str, dpi: int) -> None:
    old, new = (png(draw, dpi=dpi) for draw in CHANGES[change])
    for report in (compare_figures(old, new), compare_figures(new, old)):
        assert report is not None
        assert f"tolerance {FIGURE_THRESHOLD:g}" in report


def test_other_title_fails() -> None:
    assert compare_figures(png(curve()), png(curve(), title="Accuracy on held-out films"))


def test_other_size_fails() -> None:
    assert "size of figure" in str(compare_figures(png(curve()), png(curve(), dpi=104)))


def test_wide_tolerance_lets_a_training_curve_move_but_not_vanish() -> None:
    reference = png(curve(0))
    assert compare_figures(reference, png(curve(0, height=1.05)))
    assert compare_figures(reference, png(curve(0, height=1.05)), tolerance=0.05) is None
    for other in (nothing, scatter(), histogram(), film()):
        assert compare_figures(reference, png(other), tolerance=0.05)
        assert compare_figures(png(other), reference, tolerance=0.05)
    thin = png(curve(width=0.8, colour="0.6"))
    assert compare_figures(thin, png(nothing), tolerance=0.05)


def test_transparent_counts_as_white_and_jpeg_is_read() -> None:
    solid = Image.open(io.BytesIO(png(film()))).convert("RGB")
    clear = Image.new("RGBA", (*solid.size,), (0, 0, 0, 0))
    white = Image.new("RGB", solid.size, "white")
    encoded = {}
    for name, picture, kind in (("solid", solid, "jpeg"), ("clear", clear, "png"), ("white", white, "png")):
        file = io.BytesIO()
        picture.save(file, format=kind, quality=90)
        encoded[name] = file.getvalue()
    assert compare_figures(encoded["clear"], encoded["white"]) is None
    assert compare_figures(png(film()), encoded["solid"]) is None
    assert compare_figures(encoded["clear"], encoded["solid"])


def test_difference_of_black_and_white_is_the_whole_scale() -> None:
    black, white = (Image.new("RGB", (64, 64), colour) for colour in ("black", "white"))
    assert figure_difference(black, white) == 1.0
    assert figure_difference(black, black) == 0.0
