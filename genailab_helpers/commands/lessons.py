"""`genailab run`: execute lessons with other parameters and write pages that need no network."""

import ast
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option, echo

from genailab_helpers.commands.options import complain, write_text
from genailab_helpers.commands.pages import export_page

IMAGES = ("DATA", "EXTERNAL")  # parameters that name a folder of images

_INDEX = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>GenAI Lab: executed lessons</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body { font-family: sans-serif; margin: 2em auto; padding: 0 1em; max-width: 60em }</style>
<h1>GenAI Lab: executed lessons</h1><p>Teaching material, not for diagnosis.</p><ul>
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
    jobs = [(lesson, *parameterize(lesson, given)) for lesson in find_lessons(lessons or [])]
    for folder in {values[name] for *_, values in jobs for name in IMAGES if values.get(name)}:
        index_images(folder)  # refuse a folder without radiographs now, not after minutes of lessons
    output.mkdir(parents=True, exist_ok=True)
    failed = False
    for number, (lesson, notebook, values) in enumerate(jobs, 1):
        for left in output.glob(f"{lesson.stem}.failed.*"):  # by an earlier run
            left.unlink()
        error = execute(notebook, lesson.parent, f"[{number}/{len(jobs)}] {lesson.stem}")
        written = output / f"{lesson.stem}{'.failed' * bool(error)}.ipynb"
        _save(notebook, written, values)
        if error:
            failed = True
            complain(f"lesson {lesson.stem} failed in {error} (executed so far: {written})")
        pages = [page for page in sorted(output.glob("*.html")) if page.with_suffix(".ipynb").is_file()]
        listed = (f'<li><a href="{escape(page.name)}">{escape(page.stem)}</a>\n' for page in pages)
        write_text(output / "index.html", _INDEX + "".join(listed))
    echo(f"Look at {output / 'index.html'}")
    raise Exit(int(failed))


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
        own = Path(name).suffix == ".ipynb" and Path(name).is_file()
        named = re.compile(rf"0*{re.escape(name)}(_.*|\.ipynb)?")
        matches = [Path(name).resolve()] if own else [path for path in known if named.fullmatch(path.name)]
        if not matches:
            raise ValueError(f"no lesson {name}; the lessons: {', '.join(path.stem for path in known)}")
        found += matches
    return list(dict.fromkeys(found)) or known


def parameterize(lesson: Path, given: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    """Read a lesson and set parameters, by values of the types that its `parameters` cell has.

    Parameters
    ----------
    lesson : Path
        A notebook with one cell tagged `parameters`, which binds names to plain values.
    given : dict of str to str
        Names and values as typed.

    Returns
    -------
    notebook : NotebookNode
        The lesson with the new values.
    values : dict
        Those of the type of each parameter's default. A default of None takes any literal, else text. Names
        of folders (`IMAGES`, and what ends in `_DIR` or `_FOLDER`) stay as typed and become absolute, because
        the lesson runs in its own folder.

    Raises
    ------
    ValueError
        If the lesson has no such parameter (the message lists those it has) or the value is of another type.
    """
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    notebook, known = load_notebook_node(str(lesson)), dict[str, Any]()
    for cell in notebook.cells if given else ():
        if "parameters" in cell.metadata.get("tags", []):
            exec(cell.source, {}, known)  # as the lesson will: whatever it binds can be set
    for name in given.keys() - known.keys():
        raise ValueError(f"lesson {lesson.stem} has no parameter {name}; its parameters: "
                         f"{', '.join(known) or 'none'}")
    values = {name: _convert(name, text, known[name]) for name, text in given.items()}
    notebook = parameterize_notebook(notebook, values) if values else notebook
    del notebook.metadata["papermill"]  # holds the names of this machine's folders
    return notebook, values


def _convert(name: str, text: str, default: Any) -> Any:
    if name in IMAGES or name.endswith(("_DIR", "_FOLDER")):
        if not text:
            raise ValueError(f"parameter {name}: expected a folder, got nothing")
        return None if text == "None" and default is None else str(Path(text).resolve())
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))  # as others write
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        kinds = {int: "a whole number", float: "a number", bool: "True or False"}
        raise ValueError(f"parameter {name}: expected {kinds.get(type(default), 'a list')} "
                         f"(its default is {default!r}), got {text!r}")
    return value


def execute(notebook: Any, folder: Path, title: str) -> str:
    """Execute a notebook in a fresh kernel of this interpreter, without what the user has set for others.

    Papermill's own executor takes the error that a cell tagged `raises-exception` shows for a failure.

    Parameters
    ----------
    notebook : NotebookNode
        Receives the new outputs; the old ones go first, so that no failure shows them.
    folder : Path
        Where it runs.
    title : str
        Name of the bar that shows its progress.

    Returns
    -------
    str
        Which cell failed and why, or "".
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient, exceptions
    from tqdm import tqdm

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    # An empty list of folders leaves the native kernel: a user's kernel named python3 may be another Python.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    # Nor does a user's own profile of IPython count, which may show every line's value.
    with tempfile.TemporaryDirectory() as os.environ["IPYTHONDIR"], tqdm(
            desc=title, total=len(cells), unit="cell") as bar:
        client = NotebookClient(notebook, km=manager, timeout=None, record_timing=False,
                                resources={"metadata": {"path": str(folder)}},
                                on_cell_execute=lambda **_: bar.update())
        try:
            client.execute(cleanup_kc=True, stderr=subprocess.DEVNULL)  # its own log
            return ""
        except exceptions.CellExecutionError as raised:
            error = f"{raised.ename}: {' '.join(raised.evalue.split())}"
        except exceptions.DeadKernelError:
            error = "the kernel ended; was it stopped, or did memory run out?"
        except AssertionError:  # nbclient, whose own handler of Ctrl-C has shut the kernel down already
            raise KeyboardInterrupt from None
    return f"cell {bar.n} of {len(cells)}: {error}"


def _save(notebook: Any, target: Path, values: Mapping[str, Any]) -> None:
    """Write notebook and page. They may travel, so they name no folder of this machine."""
    import nbformat

    folders = {str(value): Path(value).name for value in values.values() if os.path.isabs(str(value))}
    text = nbformat.writes(notebook)
    for folder, told in {**folders, os.path.expanduser("~").rstrip(os.sep) or "~": "~"}.items():
        written, shown = (json.dumps(one)[1:-1] for one in (folder, told))
        text = re.sub(rf"{re.escape(written)}(?![\w+=.-])", shown.replace("\\", r"\\"), text)
    write_text(target, text + "\n")
    write_text(target.with_suffix(".html"), export_page(nbformat.reads(text, as_version=4), target.stem))
