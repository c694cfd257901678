"""Figures are shown with alternative text, and films are drawn as they are."""

import base64
import io
from html.parser import HTMLParser
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
import seaborn as sns
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from genailab_helpers.lessons import figures
from genailab_helpers.lessons.figures import figure_html, figure_png, image_grid, show


class Parts(HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.opened, self.closed, self.text = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.opened.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.closed.append(tag)

    def handle_data(self, data):
        self.text += data


def picture_of(page):
    [image] = [attributes for tag, attributes in Parts(page).opened if tag == "img"]
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def curve(colour="red"):
    fig = Figure(figsize=(3, 2))
    fig.subplots().plot([0, 1], [0, 1], color=colour)
    return fig


@settings(max_examples=20, deadline=None)
@given(alt=st.text("\"'<>&;/ =ampé\n", min_size=1).filter(str.strip))
def test_any_alternative_text_arrives_as_written(alt):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "figure_png", lambda fig: b"")  # here only the words count
        parts = Parts(figure_html(Figure(), alt, caption=alt))
    assert [tag for tag, _ in parts.opened] == ["figure", "img", "figcaption"]
    assert parts.closed == ["figcaption", "figure"]
    assert parts.opened[1][1]["alt"] == alt
    assert parts.text == alt


def test_show_puts_one_html_figure_out_and_closes_it(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda data, raw: shown.append((data, raw)))
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.plot([0, 1])
    show(fig, "A line <rising>.", "Figure 1")
    [(data, raw)] = shown
    assert raw is True
    assert data["text/plain"] == "A line <rising>."
    assert data["text/html"].count("<img") == 1
    assert "max-width:100%" in data["text/html"]
    assert not plt.fignum_exists(fig.number)
    picture = picture_of(data["text/html"])
    assert picture.size == (3 * figures.PIXELS_PER_INCH, 2 * figures.PIXELS_PER_INCH)


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_a_figure_without_alternative_text_is_refused(alt):
    with pytest.raises(ValueError, match="alt is empty"):
        show(curve(), alt)


def test_bytes_follow_the_pixels_alone():
    assert figure_png(curve()) == figure_png(curve())
    assert figure_png(curve()) != figure_png(curve("blue"))
    picture = Image.open(io.BytesIO(figure_png(curve())))
    assert picture.info == {}  # no date, no version
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)  # white also on a dark page


def test_grey_figures_are_stored_as_grey_and_nothing_is_lost():
    for colour, mode in [("gray", "L"), ("red", "RGB")]:
        fig = curve(colour)
        drawn = io.BytesIO()
        fig.savefig(drawn, dpi=figures.PIXELS_PER_INCH, facecolor="white")
        stored = Image.open(io.BytesIO(figure_png(fig)))
        assert stored.mode == mode
        assert np.array_equal(stored.convert("RGB"), Image.open(drawn).convert("RGB"))
        assert len(figure_png(fig)) < len(drawn.getvalue())


def films(n, height=16, width=16):
    return torch.linspace(-1, 1, n * height * width).reshape(n, 1, height, width)


def test_every_film_has_the_same_grey_scale():
    fig = image_grid(torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.5)]))
    assert [ax.images[0].get_clim() for ax in fig.axes] == [(-1, 1), (-1, 1)]
    picture = np.asarray(Image.open(io.BytesIO(figure_png(fig))))
    height, width = picture.shape
    drawn = [picture[height // 2, width // 4], picture[height // 2, 3 * width // 4]]
    assert drawn == pytest.approx([255 * (0 + 1) / 2, 255 * (0.5 + 1) / 2], abs=1)


@pytest.mark.parametrize(("n_films", "n_columns", "expected"), [
    (1, None, (1, 1)), (6, None, (1, 6)), (8, None, (2, 4)), (7, 3, (3, 3)), (2, 5, (1, 2)),
])
def test_films_stand_in_even_rows(n_films, n_columns, expected):
    fig = image_grid(films(n_films), n_columns=n_columns)
    assert fig.axes[0].get_subplotspec().get_gridspec().get_geometry() == expected
    assert len(fig.axes) == n_films


def test_titles_are_wrapped_and_do_not_touch():
    fig = image_grid(films(3), titles=["consolidation of the right lower lobe"] * 3)
    fig.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in fig.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert boxes[0].x0 >= 0


@pytest.mark.parametrize("words", [
    {},
    {"titles": ["consolidation of the right lower lobe"] * 3},
    {"masks": {name: torch.ones(3, 16, 16, dtype=torch.bool) for name in ("heart", "left lung", "spine")}},
])
def test_films_are_as_wide_as_asked_whatever_the_words_take(words):
    fig = image_grid(films(3), inches=1.5, **words)
    fig.draw_without_rendering()
    widths = [ax.get_position().width * fig.get_figwidth() for ax in fig.axes]
    assert widths == pytest.approx([1.5] * 3, rel=0.03)


def test_masks_are_coloured_where_they_are_and_named():
    heart, nothing, lung = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    heart[0, :, :8] = True
    lung[0, :8, 8:] = True
    masks = {"heart": heart, "nodule": nothing, "lung": lung}
    fig = image_grid(torch.zeros(1, 1, 16, 16), masks=masks, inches=4)
    [legend] = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["heart", "lung"]
    fig.draw_without_rendering()
    picture = np.asarray(Image.open(io.BytesIO(figure_png(fig))).convert("RGB")).astype(int)
    to_pixels = fig.axes[0].transData
    scale = figures.PIXELS_PER_INCH / fig.dpi

    def colour(x, y):
        column, from_below = (scale * to_pixels.transform((x, y))).round().astype(int)
        return picture[picture.shape[0] - from_below, column]

    assert np.ptp(colour(12, 12)) == 0  # bare film stays grey
    assert np.ptp(colour(3, 3)) > 20
    assert np.ptp(colour(12, 3)) > 20
    assert (colour(3, 3) != colour(12, 3)).any()


def test_a_structure_keeps_its_colour_when_another_is_absent():
    half = torch.zeros(1, 16, 16, dtype=torch.bool)
    half[:, :8] = True
    both = image_grid(films(1), masks={"heart": half, "lung": half}).legends[0].get_patches()
    one = image_grid(films(1), masks={"heart": ~half & half, "lung": half}).legends[0].get_patches()
    assert both[1].get_facecolor() == one[0].get_facecolor()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"images": torch.zeros(1, 16, 16)}, r"\(1, 16, 16\); expected \(N, 1, H, W\)"),
    ({"images": torch.zeros(2, 3, 16, 16)}, "expected"),
    ({"images": torch.zeros(0, 1, 16, 16)}, "at least 1"),
    ({"images": films(2), "titles": ["one"]}, "1 titles for 2 images"),
])
def test_what_does_not_fit_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        image_grid(**arguments)


def test_a_users_matplotlibrc_turns_no_image_upside_down():
    image = torch.full((1, 1, 16, 16), -1.0)
    image[..., :8, :] = 1  # white above
    with plt.rc_context({"image.origin": "lower", "savefig.bbox": "tight", "text.usetex": False}):
        figures.set_house_style()
        picture = Image.open(io.BytesIO(figure_png(image_grid(image, inches=2)))).convert("L")
    middle = picture.width // 2
    assert max(abs(side - 2.08 * figures.PIXELS_PER_INCH) for side in picture.size) < 2
    assert picture.getpixel((middle, picture.height // 4)) > 200
    assert picture.getpixel((middle, 3 * picture.height // 4)) < 50


def test_a_class_with_a_dollar_is_written_and_no_formula():
    def drawn(name):
        fig, ax = plt.subplots()
        ax.barh([name, "b"], [1, 100], label=name)
        ax.set(xscale="symlog", title=name)
        ax.legend()
        return figure_png(fig)

    assert len({drawn(name) for name in ("$x^{$", "$a$", "a")}) == 3  # the first is no formula at all
    fig, ax = plt.subplots()
    ax.plot([1, 1000])
    ax.set_yscale("log")
    figure_png(fig)
    assert all(label.get_parse_math() for label in ax.get_yticklabels())  # 10 to a power is still one


def test_titles_and_masks_belong_to_their_own_image():
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    for i in range(3):
        masks[i, i, i] = True
    fig = image_grid(torch.zeros(3, 1, 8, 8), ["one", "two", "three"], masks={"lung": masks})
    assert [ax.get_title() for ax in fig.axes] == ["one", "two", "three"]
    for i, ax in enumerate(fig.axes):
        assert np.argwhere(np.asarray(ax.images[1].get_array())[..., 3] > 0).tolist() == [[i, i]]
    assert [tuple(ax.images[1].get_array()[i, i, :3]) for i, ax in enumerate(fig.axes)] \
        == [sns.color_palette("colorblind")[0]] * 3
    plt.close(fig)
