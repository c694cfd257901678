"""Controls beside a figure."""

import html
import inspect
from collections.abc import Callable
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from genailab_helpers.lessons.figures import figure_html


def explore(draw: Callable[..., Figure], **controls: Any) -> ipywidgets.Widget:
    """Put sliders and menus beside a figure that follows them.

    A widget needs a running kernel: on a page, or in a notebook that has not been run, the reader sees
    nothing. So a static figure that says the same (`show`) stands in the cell before or after.

    Parameters
    ----------
    draw : callable
        `draw(**values)` returns the figure for one setting of the controls. Defaults of its arguments are the
        controls' first values; the first line of its docstring, with the values, is the alternative text.
    **controls
        One a argument of `draw`, in the short forms of `ipywidgets.interact`: `(low, high, step)` makes a
        slider, a list makes a menu, True or False makes a box to tick; any value widget is taken as it is.

    Returns
    -------
    ipywidgets.Widget
        The controls beside the figure; show it as the last line of a cell.

    Raises
    ------
    ValueError
        If `draw` has no docstring.
    Exception
        Whatever `draw` raises. At the first drawing it stops the cell; later it is also written in the place
        of the figure.
    """
    described = (inspect.getdoc(draw) or "").partition("\n")[0]
    if not described:
        raise ValueError("explore has no alternative text; give the drawing function a docstring")
    parameters = inspect.signature(draw).parameters
    widgets = {}
    for name, control in controls.items():
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        widget = ipywidgets.interactive.widget_from_abbrev(control, default)
        widget.description = widget.description or name.replace("_", " ")
        if "continuous_update" in widget.traits():
            widget.continuous_update = False  # draw when the slider is let go, not at every pixel of its way
        widgets[name] = widget
    longest = max((len(widget.description) for widget in widgets.values()), default=0)
    for widget in widgets.values():  # names are not cut off, and what follows them stands in one column
        widget.style.description_width = f"{longest}ch"
        widget.layout.width = f"calc({longest}ch + 16em)"
    picture = ipywidgets.HTML()

    def redraw(_change: object = None) -> None:
        values = {name: widget.value for name, widget in widgets.items()}
        try:
            setting = ", ".join(f"{w.description} {_words(values[name])}" for name, w in widgets.items())
            picture.value = figure_html(draw(**values), f"{described} ({setting})")
        except Exception as error:
            picture.value = f"<pre>{html.escape(f'{type(error).__name__}: {error}')}</pre>"
            raise

    redraw()
    for widget in widgets.values():
        widget.observe(redraw, names="value")
    beside = ipywidgets.Layout(flex_flow="row wrap", align_items="flex-start")
    return ipywidgets.HBox([ipywidgets.VBox(list(widgets.values())), picture], layout=beside)


def _words(value: object) -> str:
    # A slider adds up its steps: 0.1, 0.2, 0.30000000000000004.
    return f"{value:.6g}" if isinstance(value, float) else str(value)
