"""The widget draws, follows its controls, and hides no error."""

import ipywidgets
import pytest
from matplotlib.figure import Figure

from genailab_helpers.lessons import explore


def bars(n_bars=3, colour="red"):
    """Show bars side by side.

    More words that are not the alternative text.
    """
    fig = Figure(figsize=(2, 1))
    fig.subplots().bar(range(n_bars), range(1, n_bars + 1), color=colour)
    return fig


def parts(widget):
    controls, picture = widget.children
    return {control.description: control for control in controls.children}, picture


def test_first_values_come_from_the_function_and_the_figure_follows_the_controls():
    controls, picture = parts(explore(bars, n_bars=(1, 9), colour=["blue", "red"]))
    assert isinstance(controls["n bars"], ipywidgets.IntSlider)
    assert isinstance(controls["colour"], ipywidgets.Dropdown)
    assert 'alt="Show bars side by side. (n bars 3, colour red)"' in picture.value
    first = picture.value
    controls["n bars"].value = 5
    assert "(n bars 5, colour red)" in picture.value
    assert picture.value.split("base64,")[1] != first.split("base64,")[1]
    controls["n bars"].value = 3
    assert picture.value == first


def test_without_alternative_text_it_is_refused():
    with pytest.raises(ValueError, match="no alternative text"):
        explore(lambda n_bars: bars(n_bars), n_bars=(1, 9))


def test_sliders_wait_until_they_are_let_go_and_the_longest_name_has_room():
    controls, _ = parts(explore(bars, n_bars=(1, 9), colour=["red"]))
    assert controls["n bars"].continuous_update is False
    assert {control.style.description_width for control in controls.values()} == {f"{len('n bars')}ch"}


def test_values_are_told_in_a_few_digits():
    def draw(width=0.1 + 0.2):
        """Bars."""
        return bars()

    _, picture = parts(explore(draw, width=(0.0, 1.0, 0.1)))
    assert "(width 0.3)" in picture.value


def test_an_error_at_the_first_drawing_stops_the_cell():
    def draw(n_bars=0):
        """Bars."""
        return bars(1 // n_bars)

    with pytest.raises(ZeroDivisionError):
        explore(draw, n_bars=(0, 1))


def test_an_error_at_a_later_drawing_is_raised_and_written_where_the_figure_was():
    def draw(n_bars=1):
        """Bars."""
        if n_bars == 2:
            raise KeyError("<two>")
        return bars(n_bars)

    controls, picture = parts(explore(draw, n_bars=(1, 3)))
    with pytest.raises(KeyError):
        controls["n bars"].value = 2
    assert picture.value == "<pre>KeyError: &#x27;&lt;two&gt;&#x27;</pre>"
    controls["n bars"].value = 3
    assert "<img" in picture.value
