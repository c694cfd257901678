"""Execute a lesson with other parameters and turn the result into a page that needs no network."""

import ast
import html
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jinja2 import DictLoader
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from genailab_helpers.checkpoints import whole_file

# nbconvert's page waits for scripts from three hosts before it shows anything. Widgets cannot work without a
# kernel anyway, and the formulas may arrive late.
_PAGE = """{% extends 'lab/index.html.j2' %}
{% from 'mathjax.html.j2' import mathjax %}
{% block html_head_js_requirejs %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_js_mathjax %}
{{ mathjax(resources.mathjax_url) | replace('<script src', '<script async src') }}
{% endblock %}"""

_INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>GenAI Lab: executed lessons</title>
<style>body {{ font-family: sans-serif; margin: 2em auto; max-width: 60em; }}
th, td {{ text-align: left; padding: .4em 1em .4em 0; vertical-align: top; }}</style></head>
<body><h1>GenAI Lab: executed lessons</h1>
<p>Teaching material, not for diagnosis.</p>
<table><tr><th>Lesson</th><th>Time taken</th><th>Parameters</th><th>Notebook</th></tr>
{rows}
</table></body></html>
"""


FILMS = ("DATA", "EXTERNAL")  # parameters that name a folder of films


def is_path_parameter(name: str) -> bool:
    """Tell whether a parameter names a folder: one of FILMS, or any name ending in `_DIR` or `_FOLDER`."""
    return name in FILMS or name.endswith(("_DIR", "_FOLDER"))


def convert_parameters(lesson: Path, given: dict[str, str]) -> dict[str, Any]:
    """Turn what was typed into values of the types that the lesson's `parameters` cell has.

    Parameters
    ----------
    lesson : Path
        A notebook with one cell tagged `parameters`.
    given : dict of str to str
        Names and values as typed.

    Returns
    -------
    dict
        Values of the type of each parameter's default. A default of None takes any literal, else text. The
        folders of `is_path_parameter` become absolute, because the lesson runs in its own folder.

    Raises
    ------
    ValueError
        If the lesson has no such parameter (the message lists those it has) or the value is of another type.
    """
    known = papermill.inspect_notebook(lesson) if given else {}
    values = {}
    for name, text in given.items():
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"lesson {lesson.stem} has no parameter {name}; its parameters: {listed}")
        value = _convert(name, text, known[name]["default"])
        if isinstance(value, str) and is_path_parameter(name):
            value = str(Path(value).expanduser().resolve())
        values[name] = value
    return values


def _convert(name: str, text: str, default: str) -> Any:
    kind = type(_literal(default))
    value = _literal(text)
    if text in ("true", "false"):  # as other command lines write them
        value = text == "true"
    if kind is float and type(value) is int:
        return float(value)
    if kind is str:
        return text
    if kind is type(value) or kind is type(None):
        return value
    expected = {int: "a whole number", float: "a number", bool: "True or False"}.get(kind, kind.__name__)
    raise ValueError(f"parameter {name}: expected {expected} (its default is {default}), got {text!r}")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def execute_lesson(lesson: Path, parameters: dict[str, Any],
                   on_cell: Callable[[int, int], None]) -> NotebookNode:
    """Execute a notebook from its first cell to its last in a fresh kernel of the running interpreter.

    Papermill sets the parameters; nbclient, on which papermill is built, executes: papermill itself takes the
    error that a cell tagged `raises-exception` is meant to show for a failure.

    Parameters
    ----------
    lesson : Path
        The notebook; it is not changed. Its folder becomes the working directory.
    parameters : dict
        Values for its `parameters` cell.
    on_cell : callable
        Called with (code cells done, code cells in all) before the first cell and after each.

    Returns
    -------
    NotebookNode
        The executed notebook. Its metadata `genailab` holds `title`, `seconds` and `error`: None, or what
        went wrong in which cell.
    """
    notebook = papermill.execute_notebook(str(lesson), None, parameters, prepare_only=True)
    del notebook.metadata["papermill"]  # holds the names of this machine's folders
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:  # what a failure leaves unexecuted must not show the outputs of an earlier run
        cell.outputs, cell.execution_count = [], None
    numbers = {id(cell): number for number, cell in enumerate(cells, 1)}
    current = 0

    def start(cell: NotebookNode, cell_index: int) -> None:
        nonlocal current
        current = numbers[id(cell)]

    # An empty list of folders leaves the native kernel: a user's kernel named python3 may be another Python.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    manager.transport_encryption = "auto"  # else ipykernel warns on stderr that others could listen
    client = NotebookClient(notebook, km=manager, timeout=None, record_timing=False,
                            resources={"metadata": {"path": str(lesson.parent)}}, on_cell_execute=start,
                            on_cell_executed=lambda cell, **_: on_cell(numbers[id(cell)], len(cells)))
    error, began = None, time.monotonic()
    on_cell(0, len(cells))
    try:
        client.execute(cleanup_kc=True)
    except CellExecutionError as raised:
        error = f"cell {current} of {len(cells)}: {raised.ename}: {' '.join(raised.evalue.split())}"
    except DeadKernelError:
        error = f"cell {current} of {len(cells)}: the kernel ended; was it stopped, or did memory run out?"
    except AssertionError:  # nbclient, whose own handler of Ctrl-C has shut the kernel down already
        raise KeyboardInterrupt from None
    notebook.metadata["genailab"] = {"title": _title(notebook) or lesson.stem,
                                     "seconds": round(time.monotonic() - began, 1), "error": error}
    return notebook


def _title(notebook: NotebookNode) -> str:
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return next((line[2:].strip() for line in prose.splitlines() if line.startswith("# ")), "")


def save_lesson(notebook: NotebookNode, name: str, output: Path, given: dict[str, str]) -> Path:
    """Write an executed lesson as notebook and as HTML page, and `index.html` over all that the folder holds.

    Parameters
    ----------
    notebook : NotebookNode
        Result of `execute_lesson`.
    name : str
        The lesson's name. A lesson that failed becomes `name.failed.ipynb`, so that it replaces no good one.
    output : Path
        Folder to write to, each file whole or not at all.
    given : dict of str to str
        The parameters as typed, to be shown in the index.

    Returns
    -------
    Path
        The notebook that was written.

    Raises
    ------
    OSError
        If a file cannot be written; the message names it.
    """
    facts = notebook.metadata["genailab"]
    facts["parameters"] = given
    failed, good = output / f"{name}.failed.ipynb", output / f"{name}.ipynb"
    target = failed if facts["error"] else good
    exporter = HTMLExporter(template_file="lesson.html.j2", embed_images=True,
                            extra_loaders=[DictLoader({"lesson.html.j2": _PAGE})])
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": facts["title"]}})
    _write(target, nbformat.writes(notebook) + "\n")
    _write(target.with_suffix(".html"), page)
    if target == good:  # an earlier failure is mended
        failed.unlink(missing_ok=True)
        failed.with_suffix(".html").unlink(missing_ok=True)
    _write(output / "index.html", _INDEX.format(rows="\n".join(map(_row, sorted(output.glob("*.ipynb"))))))
    return target


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _row(path: Path) -> str:
    facts = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("genailab")
    if facts is None:  # not written by this command
        return ""
    page, name = html.escape(path.with_suffix(".html").name), html.escape(path.name)
    failure = f"<br><strong>Failed in {html.escape(facts['error'])}</strong>" if facts["error"] else ""
    shown = ", ".join(f"{key} = {value}" for key, value in facts["parameters"].items()) or "as in the lesson"
    return (f'<tr><td><a href="{page}">{html.escape(facts["title"])}</a>{failure}</td>'
            f'<td>{facts["seconds"]:.0f} s</td><td>{html.escape(shown)}</td>'
            f'<td><a href="{name}">{name}</a></td></tr>')
