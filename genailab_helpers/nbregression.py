"""Compare executed notebooks with what is committed: nbval with tolerances, figures and Output widgets.

`pytest --nbval --nbval-current-env notebooks/` runs every notebook on a fresh kernel and compares every
cell with the outputs in the file. nbval alone compares text as strings, passes over pictures and knows no
Output widget; this pytest plug-in, inert without `--nbval`, changes that. The rules:

Order and kind
    Outputs are compared one by one, in order, each with the same kinds of content (`text/plain`,
    `text/html`). All that a cell writes to stdout counts as one output. The model id of a widget view is
    random, so it is passed over.
Numbers
    A number with a decimal point and digits after it, or with an exponent, passes if |old - new| is at most
    `TOLERANCE` times the larger magnitude, plus `FLOOR`. So 0.1234 and 0.1235 agree while 0.12 and 0.13 do
    not: the reader sees only the printed digits and the prose quotes them, so no last digit is given away,
    however few there are. `FLOOR` is far below the last digit that any lesson prints and lets only the
    debris of float64 pass ("0.0" against "1.2e-17"). Integers are exact, and so are "12." (NumPy's 12.0, or
    the end of a sentence), "1.2.3" (a version) and "nan". Blanks around a decimal may shift if number and
    blanks keep their width, as in right-aligned columns.
Everything else
    Text between the numbers, HTML and JSON must be equal to the letter; what goes to stderr is compared
    too.
Figures
    PNG and JPEG outputs and the `<img src="data:image/...">` in HTML are decoded, laid on white and
    compared in colour on a grid of cells of `CELL` by `CELL` pixels; sides may differ by 2 % (at least 2
    pixels). A cell differs by as much as it lies outside the range that the other figure's cell takes when
    that figure is shifted by up to one pixel, and the other way round. So font hinting and rounding of the
    resolution cost little, while a line that moved by a few pixels costs its full contrast. A figure passes
    if its `WORST` worst cells differ by at most `FIGURE_THRESHOLD` of full scale on average. Measured on
    matplotlib figures (tests/regression/test_figure_comparison.py): other hinting, snapping and resolution
    up to .042; a curve moved by 2 % .059, thin grey curves of other data .065, one moved point of a scatter
    plot .100, other films above .25. Fine noise inside a picture averages out: it is not compared.
Tags and metadata of a cell
    `tolerance-0.05` sets the relative tolerance for that cell, for what training makes inexact. Its figures
    may then also shift by that share of their longer side (a curve that is 5 % higher moves by at most 5 %
    of the axis); blank and unrelated ones still fail. `nbval-ignore-output` needs a written reason in the
    cell's metadata, `nbregression_reason`. No cell may be skipped or lack its execution count.
Graphics cards
    Kernels see none, as its rounding is its own, unless `CUDA_VISIBLE_DEVICES` is set already.
Widgets
    What an Output widget (`interact`, `interactive_output`) captures is no output of the cell and held
    back, but for errors and stderr, which fail the cell.

`python -m genailab_helpers.nbregression record notebooks/*.ipynb` runs notebooks and writes the reference.
"""

import argparse
import base64
import io
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import numpy as np
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbclient.output_widget import OutputWidget
from nbformat import NotebookNode
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, NbvalKernelspecManager, RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile, NbCellError
from PIL import Image, ImageChops, ImageFilter

TOLERANCE = 1e-3
FLOOR = 1e-12
CELL = 8  # pixels
WORST = 8
FIGURE_THRESHOLD = 0.05
REASON = "nbregression_reason"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
CAPTURED = {"stream", "display_data", "execute_result", "update_display_data", "clear_output"}

_DECIMAL = re.compile(
    r"(?P<before> *)"
    # no range (1-2.5), no name (x0.5), no version (1.2.3), no colour (#1e3)
    r"(?P<number>(?:(?<![\w.)\]])[-+])?(?<![\w.#])"
    r"(?>(?:\d{1,3}(?:,\d{3})+|\d*)\.\d+(?:[eE][-+]?\d+)?|\d+\.?[eE][-+]?\d+(?!\w))(?!\.\d))"
    r"(?P<after> *)")
_EMBEDDED = re.compile(r"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=\s]+)")


# ---------------------------------------------------------------------------------------------- comparison

def compare_text(old: str, new: str, tolerance: float = TOLERANCE) -> str | None:
    """Compare two texts: decimals within a tolerance, all else to the letter.

    Parameters
    ----------
    old, new : str
        Reference and new text.
    tolerance : float, default TOLERANCE
        Relative tolerance of decimal numbers; the module's docstring has the whole rule.

    Returns
    -------
    str or None
        None if they agree, else a few lines with the first place where they do not.
    """
    if old == new:
        return None
    if _DECIMAL.sub("\0", old) != _DECIMAL.sub("\0", new):
        lines = itertools.zip_longest(*(_DECIMAL.sub("\0", text).split("\n") for text in (old, new)))
        return _report_text(old, new, next(i for i, (was, now) in enumerate(lines) if was != now))
    for was, now in zip(_DECIMAL.finditer(old), _DECIMAL.finditer(new), strict=True):
        line = old.count("\n", 0, was.start("number"))
        a, b = (float(match["number"].replace(",", "")) for match in (was, now))
        if abs(a - b) > tolerance * max(abs(a), abs(b)) + FLOOR:
            relative = abs(a - b) / max(abs(a), abs(b))
            return (f"number in line {line + 1}: old {was['number']}, new {now['number']}, "
                    f"relative difference {relative:.2g}, tolerance {tolerance:g}\n{_lines(old, new, line)}")
        if len(was[0]) != len(now[0]) and was.group("before", "after") != now.group("before", "after"):
            return _report_text(old, new, line)
    return None


def compare_figures(old: bytes, new: bytes, tolerance: float = TOLERANCE) -> str | None:
    """Compare two encoded pictures by what a reader sees of them.

    Parameters
    ----------
    old, new : bytes
        Reference and new picture, PNG or JPEG.
    tolerance : float, default TOLERANCE
        Share of the longer side, in whole cells, by which content may shift.

    Returns
    -------
    str or None
        None if they agree, else one line that says by how much they do not.
    """
    if old == new:
        return None
    before, after = _on_white(old), _on_white(new)
    if any(abs(a - b) > max(2, 0.02 * a) for a, b in zip(before.size, after.size, strict=True)):
        return "size of figure: old {}x{}, new {}x{} pixels, tolerance 2 %".format(*before.size, *after.size)
    difference = figure_difference(before, after, tolerance)
    if difference <= FIGURE_THRESHOLD:
        return None
    return f"figure: content differs by {difference:.3f} of full scale, tolerance {FIGURE_THRESHOLD:g}"


def figure_difference(old: Image.Image, new: Image.Image, tolerance: float = TOLERANCE) -> float:
    """Measure how unlike two pictures are, forgiving shifts of one pixel.

    Parameters
    ----------
    old, new : Image
        RGB pictures of about the same size; the grid is that of `old`.
    tolerance : float, default TOLERANCE
        Share of the longer side, in whole cells, by which content may shift besides.

    Returns
    -------
    float
        Mean of the `WORST` largest differences of cells, 0 (alike) to 1 (black against white).
    """
    columns, rows = (max(1, round(side / CELL)) for side in old.size)
    reach = 2 * round(tolerance * max(columns, rows)) + 1
    pictures = [_cells(picture, (columns, rows), reach) for picture in (old, new)]
    outside = [np.asarray(difference)
               for (cells, _, _), (_, low, high) in itertools.permutations(pictures)
               for difference in (ImageChops.subtract(cells, high), ImageChops.subtract(low, cells))]
    by_cell = np.max(outside, axis=(0, -1)).ravel() / 255
    return float(np.sort(by_cell)[-WORST:].mean())


def _cells(picture: Image.Image, grid: tuple[int, int], reach: int) -> tuple[Image.Image, ...]:
    """Average a picture over cells; also the least and the largest that its shifts put into each cell."""
    shifted = [ImageChops.offset(picture, dx, dy).resize(grid, Image.Resampling.BILINEAR)
               for dx, dy in itertools.product((0, -1, 1), repeat=2)]
    low = high = shifted[0]
    for cells in shifted:
        low, high = ImageChops.darker(low, cells), ImageChops.lighter(high, cells)
    if reach > 1:  # a filter of size 1 changes nothing, and ends the process in Pillow 12.3
        low, high = low.filter(ImageFilter.MinFilter(reach)), high.filter(ImageFilter.MaxFilter(reach))
    return shifted[0], low, high


def _on_white(encoded: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(encoded)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def compare_outputs(old: Sequence[NotebookNode], new: Sequence[NotebookNode],
                    tolerance: float = TOLERANCE) -> list[str]:
    """Compare the outputs of a cell.

    Parameters
    ----------
    old, new : sequence of NotebookNode
        Reference and new outputs, streams merged.
    tolerance : float, default TOLERANCE
        Relative tolerance of decimal numbers, and shift of figures.

    Returns
    -------
    list of str
        One report for each output that differs; empty if all agree.
    """
    reports = []
    for number, (was, now) in enumerate(itertools.zip_longest(old, new), start=1):
        if was is None or now is None:
            what = "missing, old" if now is None else "one too many, new"
            reports.append(f"output {number} is {what}:\n{_excerpt(was or now)}")
            continue
        contents, others = _contents(was), _contents(now)
        if contents.keys() != others.keys():
            reports.append(f"output {number} is of another kind\n"
                           f"    old  {', '.join(contents)}\n{_excerpt(was)}\n"
                           f"    new  {', '.join(others)}\n{_excerpt(now)}")
            continue
        for kind, content in contents.items():
            report = _compare_content(kind, content, others[kind], tolerance)
            if report:
                reports.append(f"output {number} ({kind}), {report}")
    return reports


def _contents(output: NotebookNode) -> dict[str, Any]:
    """Return what is compared of an output, by the name of its kind."""
    if output.output_type == "stream":
        return {output.name: output.text}
    if output.output_type == "error":
        return {"error": f"{output.ename}: {output.evalue}"}  # a traceback holds paths
    return dict(sorted(output.data.items()))


def _compare_content(kind: str, old: Any, new: Any, tolerance: float) -> str | None:
    if kind == WIDGET_VIEW:
        return None
    if kind in ("image/png", "image/jpeg"):
        return compare_figures(base64.b64decode(old), base64.b64decode(new), tolerance)
    if not isinstance(old, str) or not isinstance(new, str):
        return None if old == new else f"content\n    old  {old}\n    new  {new}"
    report = compare_text(_EMBEDDED.sub("<figure>", old), _EMBEDDED.sub("<figure>", new), tolerance)
    for was, now in zip(_EMBEDDED.findall(old), _EMBEDDED.findall(new), strict=False):
        report = report or compare_figures(base64.b64decode(was), base64.b64decode(now), tolerance)
    return report


def _report_text(old: str, new: str, line: int) -> str:
    return f"text in line {line + 1}\n{_lines(old, new, line)}"


def _lines(old: str, new: str, line: int) -> str:
    shown = [[*text.split("\n"), *["(no such line)"] * (line + 1)][line] for text in (old, new)]
    return "\n".join(f"    {name}  {text[:300]}" for name, text in zip(("old", "new"), shown, strict=True))


def _excerpt(output: NotebookNode) -> str:
    contents = _contents(output)
    kind = "text/plain" if "text/plain" in contents else next(iter(contents))
    return f"    {kind}: {str(contents[kind])[:300].rstrip()}"


# ---------------------------------------------------------------------------------------------- the plug-in

class Notebook(IPyNbFile):
    """A notebook of which the outputs are compared by this module's rules."""

    def setup(self) -> None:
        """Start the kernel; keep a history, without which a trailing `;` suppresses nothing (nbval #194)."""
        with _cards_hidden():
            super().setup()
        self.kernel.execute_cell_input = partial(self.kernel.kc.execute, stop_on_error=False)
        self.kernel.get_message = partial(_get_message, self.kernel, self.kernel.get_message)
        self.captures: dict[str, str] = {}  # Output widget: the message whose outputs it captures, or ""

    def collect(self) -> Iterator["Cell"]:
        """Collect one test a code cell."""
        for cell in super().collect():
            yield Cell.from_parent(self, name=cell.name, cell_num=cell.cell_num, cell=cell.cell,
                                   options=cell.options)

    def get_kernel_message(self, timeout: float | None = None, stream: str = "iopub") -> dict[str, Any]:
        """Return the next message of the kernel that no Output widget captures."""
        while True:
            message: dict[str, Any] = super().get_kernel_message(timeout, stream)
            self._follow_widget(message)
            if not self._is_captured(message):
                return message

    def _follow_widget(self, message: dict[str, Any]) -> None:
        content = message["content"]
        state = content.get("data", {}).get("state", {}) if message["msg_type"].startswith("comm_") else {}
        if state.get("_model_name") == "OutputModel" or content.get("comm_id") in self.captures:
            known = self.captures.get(content["comm_id"], "")
            self.captures[content["comm_id"]] = state.get("msg_id", known)

    def _is_captured(self, message: dict[str, Any]) -> bool:
        parent = message["parent_header"].get("msg_id")
        return (bool(parent) and parent in self.captures.values() and message["msg_type"] in CAPTURED
                and message["content"].get("name") != "stderr")


def _get_message(kernel: RunningKernel, get: Callable[..., Any], stream: str, timeout: float) -> Any:
    """Wait for a message as long as the kernel lives; nbval waits for that of a dead one too."""
    end = time.monotonic() + timeout
    while True:
        try:
            return get(stream, timeout=min(1.0, max(0.0, end - time.monotonic())))
        except Empty:
            if not kernel.is_alive():
                raise RuntimeError("the kernel died, out of memory?") from None
            if time.monotonic() >= end:
                raise


class Cell(IPyNbCell):
    """A code cell of which the outputs are compared by this module's rules."""

    def runtest(self) -> None:
        """Run the cell and compare it; a cell that could not be compared fails."""
        if self.options["skip"]:
            self.raise_cell_error("the cell is marked to be skipped; every cell must run")
        if not self.options["check"]:
            reason = self.cell.metadata.get(REASON)
            if not isinstance(reason, str) or not reason.strip():
                self.raise_cell_error(f'the output is ignored without a reason; write one, "{REASON}", '
                                      "into the cell's metadata")
        if self.cell.execution_count is None:
            self.raise_cell_error("the cell has no execution count, so no reference; run `make record`")
        if self.cell.outputs:
            self.user_properties.append(("nbregression", "compared" if self.options["check"] else "ignored"))
        super().runtest()

    def compare_outputs(self, test: Sequence[NotebookNode], ref: Sequence[NotebookNode],
                        skip_compare: object = None) -> bool:
        """Compare new outputs (`test`) with the reference (`ref`); nbval calls this."""
        old, new = self.sanitize_outputs(ref), self.sanitize_outputs(test)
        self.comparison_traceback = compare_outputs(old, new, self.tolerance())
        return not self.comparison_traceback

    def tolerance(self) -> float:
        """Return the relative tolerance that the cell's tags declare, else `TOLERANCE`."""
        declared = [tag for tag in self.cell.metadata.get("tags", []) if tag.startswith("tolerance")]
        if not declared:
            return TOLERANCE
        number = re.fullmatch(r"tolerance-(0?\.\d+)", " ".join(declared))
        tolerance = float(number[1]) if number else 0.0
        if not TOLERANCE <= tolerance <= 0.5:
            self.raise_cell_error(f"tags {declared}: expected one, such as tolerance-0.05, "
                                  f"from {TOLERANCE:g} to 0.5")
        return tolerance

    def repr_failure(self, excinfo: Any) -> str:
        """Say which cell failed and why."""
        error = excinfo.value
        if not isinstance(error, NbCellError | RuntimeError):
            return str(pytest.Item.repr_failure(self, excinfo))
        return (f"{self.path.name}, code cell {self.cell_num + 1}: {error}\n"
                f"{getattr(error, 'inner_traceback', None) or ''}")


@contextmanager
def _cards_hidden() -> Iterator[None]:
    """Let a kernel that starts compute on the processor: a graphics card rounds otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Iterator[None]:
    """Put this module's notebook in the place of nbval's in strict mode."""
    collected = yield
    return [Notebook.from_parent(parent, path=node.path)  # type: ignore[return-value]
            if isinstance(node, IPyNbFile) and parent.config.option.nbval else node
            for node in collected]  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many of the cells that have output were compared."""
    marks = [value for reports in terminalreporter.stats.values() for report in reports
             if getattr(report, "when", None) == "call"
             for name, value in report.user_properties if name == "nbregression"]
    if marks:
        compared = marks.count("compared")
        terminalreporter.write_line(f"notebooks: {compared} of {len(marks)} code cells that have output are "
                                    f"compared ({100 * compared / len(marks):.1f} %)")


# ---------------------------------------------------------------------------------------------- recording

class RecordingError(Exception):
    """A notebook could not be recorded; the message names it, the cell and the error."""


class _SilentOutput(OutputWidget):
    """An Output widget that keeps what it captures from the kernel, whose repr of it would show that."""

    def sync_state(self) -> None:
        """Tell the kernel nothing: nbval does not either."""


class _Recorder(NotebookClient):
    """Run a notebook as the comparison does: on this Python; errors and stderr escape an Output widget."""

    def __init__(self, notebook: NotebookNode, folder: Path) -> None:
        super().__init__(notebook, store_widget_state=True, record_timing=False,
                         resources={"metadata": {"path": str(folder)}}, on_cell_executed=self.refuse_error)
        self.widget_registry = {"@jupyter-widgets/output": {"OutputModel": _SilentOutput}}

    def create_kernel_manager(self) -> AsyncKernelManager:
        self.km = AsyncKernelManager(kernel_name=CURRENT_ENV_KERNEL_NAME,
                                     kernel_spec_manager=NbvalKernelspecManager())
        return self.km

    def output(self, outs: list[NotebookNode], msg: dict[str, Any], display_id: str | None,
               cell_index: int) -> NotebookNode | None:
        if msg["msg_type"] == "error" or msg["content"].get("name") == "stderr":
            outs.append(nbformat.v4.output_from_msg(msg))
            return None
        return super().output(outs, msg, display_id, cell_index)

    def refuse_error(self, cell: NotebookNode, cell_index: int, **_: object) -> None:
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors and "raises-exception" not in cell.metadata.get("tags", []):
            number = sum(c.cell_type == "code" for c in self.nb.cells[:cell_index + 1])
            raise RecordingError(f"code cell {number} stopped with {errors[0].ename}: {errors[0].evalue}")


def record(path: str | Path) -> None:
    """Run a notebook on a fresh kernel of this Python and write it with its outputs, the new reference.

    The stubs of its exercises are written anew first. Only what depends on code and data stays in the file,
    so that recording twice gives the same bytes. The notebook's folder is the working folder.

    Parameters
    ----------
    path : str or Path
        The notebook, replaced as a whole once every cell has run.

    Raises
    ------
    RecordingError
        If it is no notebook, its exercises are malformed or a cell stopped, in a widget's callback too; the
        file is as it was then.
    """
    # imported here because both import torch, which a plain run of pytest need not wait for
    from genailab_helpers.checkpoints import whole_file
    from genailab_helpers.lessons.exercises import refresh_stubs

    path = Path(path)
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, AttributeError, nbformat.ValidationError) as error:
        raise RecordingError(f"{path}: expected a Jupyter notebook, {str(error).splitlines()[0]}") from error
    try:
        refresh_stubs(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        with _cards_hidden():
            _Recorder(notebook, path.parent).execute(stderr=subprocess.DEVNULL)  # its own log
    except (ValueError, RecordingError) as error:  # ValueError: an exercise is malformed
        raise RecordingError(f"{path}: {error}; nothing was written") from error
    except DeadKernelError as error:
        raise RecordingError(f"{path}: the kernel died, out of memory?; nothing was written") from error
    _normalise(notebook)
    with whole_file(path) as temporary:
        temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def _normalise(notebook: NotebookNode) -> None:
    """Take out what differs from run to run and from machine to machine."""
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _merge_streams(cell.outputs)
            for output in cell.outputs:
                if output.output_type == "error":
                    output.traceback = [f"{output.ename}: {output.evalue}"]  # the whole one holds paths
                elif WIDGET_VIEW in output.get("data", {}):
                    output.data[WIDGET_VIEW]["model_id"] = "0" * 32


def _merge_streams(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Join consecutive outputs of one stream, which arrive in pieces of random length."""
    merged: list[NotebookNode] = []
    for name, group in itertools.groupby(outputs, key=lambda output: output.get("name")):
        pieces = list(group)
        if name:
            pieces[0].text = "".join(piece.text for piece in pieces)
            del pieces[1:]
        merged += pieces
    return merged


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `record NOTEBOOK...`; return the exit status, 2 if a notebook could not be recorded."""
    parser = argparse.ArgumentParser(prog="python -m genailab_helpers.nbregression")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "record", help="run notebooks and write them with their outputs, the reference of the comparison")
    command.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    for path in parser.parse_args(arguments).notebooks:
        try:
            record(path)
        except RecordingError as error:
            print(error, file=sys.stderr)
            return 2
        print(f"recorded {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
