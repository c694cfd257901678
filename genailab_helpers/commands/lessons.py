"""`genailab run`: execute lessons with other parameters and write pages that need no network."""

import ast
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option, echo

from genailab_helpers.commands.options import complain, write_text
from genailab_helpers.commands.pages import export_page

IMAGES = ("DATA", "EXTERNAL")  # parameters that name a folder of images

_INDEX = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>GenAI Lab: executed lessons</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body { font-family: sans-serif; margin: 2em auto; padding: 0 1em; max-width: 60em }
th, td { text-align: left; padding: .4em 1em .4em 0; vertical-align: top }
td:nth-child(n + 3) { overflow-wrap: anywhere }</style>
<h1>GenAI Lab: executed lessons</h1><p>Teaching material, not for diagnosis.</p><table>
<tr><th>Lesson</th><th>Time taken</th><th>Parameters</th><th>Notebook</th></tr>
"""

_Lessons = Annotated[list[str] | None, Argument(
    metavar="LESSON", help="Number, name or path, such as 2 or 02_synthetic_xrays. All if none is given.")]
_Parameters = Annotated[list[str] | None, Option(
    "-p", metavar="NAME VALUE", help="Set a parameter, such as -p DATA path/to/images. May be repeated.")]
_Output = Annotated[Path, Option(help="Folder for the executed notebooks and pages.")]


def run(lessons: _Lessons = None, parameters: _Parameters = None, output: _Output = Path("build")) -> None:
    """Execute lessons and write the notebooks, with an HTML page each, to a folder."""
    from genailab_helpers.datasets.index import index_images

    given = {name: value for name, _, value in (word.partition("=") for word in parameters or [])}
    jobs = [(lesson, convert_parameters(lesson, given)) for lesson in find_lessons(lessons or [])]
    for folder in {values[name] for _, values in jobs for name in IMAGES if values.get(name)}:
        index_images(folder)  # refuse a folder without radiographs now, not after minutes of lessons
    output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output).close()  # refuse one that cannot be written now as well
    told = {name: Path(text).name if os.path.isabs(text) else text for name, text in given.items()}
    failures = 0
    for number, (lesson, values) in enumerate(jobs, 1):
        notebook, error = _execute(lesson, values, f"[{number}/{len(jobs)}] {lesson.stem}")
        written = _save(notebook, error, lesson.stem, output, told, values)
        if error:
            failures += 1
            complain(f"lesson {lesson.stem} failed in {error} (executed so far: {written})")
    echo(f"Look at {output / 'index.html'}")
    if failures:
        raise Exit(1)


def find_lessons(wanted: Sequence[str]) -> list[Path]:
    """Find lessons by number, name or path; all if none is named.

    They are those of the repository if this is an editable install of it, else of the current folder.
    """
    places = (Path(__file__).resolve().parents[2] / "notebooks", Path("notebooks").resolve())
    known = next(filter(None, (sorted(place.glob("[0-9]*_*.ipynb")) for place in places)), [])
    if not known and not wanted:
        raise FileNotFoundError("no lessons found: expected a folder notebooks/ with files such as "
                                "02_synthetic_xrays.ipynb; run this in a clone of GenAI Lab")
    found: list[Path] = []
    for name in wanted:
        path = Path(os.path.expanduser(name))
        if path.suffix == ".ipynb" and path.is_file():
            found.append(path.resolve())
        elif matches := [lesson for lesson in known if name in (lesson.stem, lesson.name)
                         or name.lstrip("0") == lesson.stem.partition("_")[0].lstrip("0")]:
            found += matches
        else:
            listed = ", ".join(lesson.stem for lesson in known) or "none; run this in a clone of GenAI Lab"
            raise ValueError(f"no lesson {name}; the lessons: {listed}")
    return list(dict.fromkeys(found)) or known


def convert_parameters(lesson: Path, given: dict[str, str]) -> dict[str, Any]:
    """Turn what was typed into values of the types that the lesson's `parameters` cell has.

    Parameters
    ----------
    lesson : Path
        A notebook with one cell tagged `parameters`, which binds names to plain values.
    given : dict of str to str
        Names and values as typed.

    Returns
    -------
    dict
        Values of the type of each parameter's default. A default of None takes any literal, else text. Names
        of folders (`IMAGES`, and what ends in `_DIR` or `_FOLDER`) stay as typed and become absolute, because
        the lesson runs in its own folder.

    Raises
    ------
    ValueError
        If the lesson has no such parameter (the message lists those it has) or the value is of another type.
    """
    import nbformat

    known: dict[str, Any] = {}
    for cell in nbformat.read(lesson, as_version=4).cells if given else ():
        if "parameters" in cell.metadata.get("tags", []):
            exec(cell.source, {}, known)  # as the lesson will: whatever it binds can be set
    for name in given.keys() - known.keys():
        raise ValueError(f"lesson {lesson.stem} has no parameter {name}; its parameters: "
                         f"{', '.join(known) or 'none'}")
    return {name: _convert(name, text, known[name]) for name, text in given.items()}


def _convert(name: str, text: str, default: Any) -> Any:
    if name in IMAGES or name.endswith(("_DIR", "_FOLDER")):
        if not text:
            raise ValueError(f"parameter {name}: expected a folder, got nothing")
        return None if text == "None" and default is None else str(Path(os.path.expanduser(text)).resolve())
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))  # as others write
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is None or type(value) is type(default):
        return value
    expected = {int: "a whole number", float: "a number", bool: "True or False"}.get(type(default), "a list")
    raise ValueError(f"parameter {name}: expected {expected} (its default is {default!r}), got {text!r}")


def _execute(lesson: Path, parameters: dict[str, Any], title: str) -> tuple[Any, str]:
    """Execute a notebook in a fresh kernel of this interpreter; return it and what went wrong where, or "".

    Papermill sets the parameters; nbclient, on which it is built, executes: papermill itself takes the error
    that a cell tagged `raises-exception` is meant to show for a failure.
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient, exceptions
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    from tqdm import tqdm

    notebook = load_notebook_node(str(lesson))
    if parameters:
        notebook = parameterize_notebook(notebook, parameters)
    del notebook.metadata["papermill"]  # holds the names of this machine's folders
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:  # what a failure leaves unexecuted must not show the outputs of an earlier run
        cell.outputs, cell.execution_count = [], None
    # An empty list of folders leaves the native kernel: a user's kernel named python3 may be another Python.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    manager.transport_encryption = "auto"  # else ipykernel warns on stderr that others could listen
    error, began = "", time.monotonic()
    # Nor does a user's own profile of IPython count, which may show every line's value.
    with tempfile.TemporaryDirectory() as os.environ["IPYTHONDIR"], tqdm(
            desc=title, total=len(cells), mininterval=0,
            bar_format="{desc}: cell {n_fmt} of {total_fmt} |{bar:20}| {elapsed}") as bar:
        try:
            NotebookClient(notebook, km=manager, timeout=None, record_timing=False,
                           resources={"metadata": {"path": str(lesson.parent)}},
                           on_cell_execute=lambda **_: bar.update()).execute(cleanup_kc=True)
        except exceptions.CellExecutionError as raised:
            error = f"{raised.ename}: {' '.join(raised.evalue.split())}"
        except exceptions.DeadKernelError:
            error = "the kernel ended; was it stopped, or did memory run out?"
        except AssertionError:  # nbclient, whose own handler of Ctrl-C has shut the kernel down already
            raise KeyboardInterrupt from None
    notebook.metadata["genailab"] = {"seconds": round(time.monotonic() - began)}
    return notebook, error and f"cell {bar.n} of {len(cells)}: {error}"


def _save(notebook: Any, error: str, name: str, output: Path, given: dict[str, str], values: Any) -> Path:
    """Write notebook, page and the index of all that the folder holds; a failure replaces no good lesson.

    They may travel, so they name no folder of this machine.
    """
    import nbformat

    text = nbformat.writes(notebook)
    folders = [(value, given[name]) for name, value in values.items() if os.path.isabs(str(value))]
    for place in [*folders, (os.path.expanduser("~").rstrip(os.sep) or "~", "~")]:
        folder, told = (json.dumps(one)[1:-1] for one in place)
        text = re.sub(rf"{re.escape(folder)}(?![\w+=.-])", told.replace("\\", r"\\"), text)
    notebook = nbformat.reads(text, as_version=4)
    title = next((cell.source[2:].splitlines()[0] for cell in notebook.cells if cell.source[:2] == "# "),
                 name)
    target = output / f"{name}{'.failed' * bool(error)}.ipynb"
    page, link, facts = target.with_suffix(".html"), escape(target.name), notebook.metadata["genailab"]
    shown = ", ".join(f"{key} = {value}" for key, value in given.items()) or "as in the lesson"
    failure = f"<br><strong>Failed in {escape(error)}</strong>" if error else ""
    facts["row"] = (f'<tr><td><a href="{escape(page.name)}">{escape(title)}</a>{failure}'
                    f'<td>{facts["seconds"]} s<td>{escape(shown)}<td><a href="{link}">{link}</a>')
    write_text(target, nbformat.writes(notebook) + "\n")
    write_text(page, export_page(notebook, title))
    for suffix in () if error else ("ipynb", "html"):  # an earlier failure is mended
        (output / f"{name}.failed.{suffix}").unlink(missing_ok=True)
    rows = []
    for path in sorted(output.glob("*.ipynb")):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # not one of ours
            rows.append(json.loads(path.read_bytes())["metadata"]["genailab"]["row"])
    write_text(output / "index.html", _INDEX + "\n".join(map(str, rows)))
    return target
