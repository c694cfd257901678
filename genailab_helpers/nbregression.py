"""Compare executed notebooks with what is committed: nbval with tolerances and figures.

`pytest --nbval --nbval-current-env notebooks/` runs every notebook on a fresh kernel and compares every
cell with the outputs in the file. nbval alone compares text as strings and passes over figures; this pytest
plug-in, inert without `--nbval`, changes that. The rules:

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
Recordings
    A recorded cell keeps a digest of its source and outputs, a notebook those of the files in data/samples
    that it names; `changed_since` tells what an editor or a merge has changed since.
Tags and metadata of a cell
    `tolerance-0.05` sets the relative tolerance for that cell, for what training makes inexact. Its figures
    may then also shift by that share of their longer side (a curve that is 5 % higher moves by at most 5 %
    of the axis); blank and unrelated ones still fail. No cell may be skipped, ignored or lack its
    execution count.
Graphics cards
    Kernels see none, as its rounding is its own, unless `CUDA_VISIBLE_DEVICES` is set already.

`python -m genailab_helpers.nbregression record notebooks/*.ipynb` runs notebooks and writes the reference.
"""

import base64
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode
from nbval.plugin import IPyNbCell, IPyNbFile, NbCellError
from PIL import Image, ImageChops, ImageFilter

TOLERANCE, FLOOR = 1e-3, 1e-12
CELL, WORST, FIGURE_THRESHOLD = 8, 8, 0.05  # the first in pixels
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

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
    lines = itertools.zip_longest(old.split("\n"), new.split("\n"), fillvalue="(no such line)")
    for number, (was, now) in enumerate(lines, start=1):
        if differing := was != now and _compare_line(was, now, tolerance):
            return f"line {number}, {differing}\n    old  {was[:300]}\n    new  {now[:300]}"
    return None


def _compare_line(old: str, new: str, tolerance: float) -> str | None:
    """Return what differs, or None."""
    if _DECIMAL.sub("\0", old) != _DECIMAL.sub("\0", new):
        return "text"
    for was, now in zip(_DECIMAL.finditer(old), _DECIMAL.finditer(new), strict=True):
        a, b = (float(match["number"].replace(",", "")) for match in (was, now))
        off, size = abs(a - b), max(abs(a), abs(b))
        if off > tolerance * size + FLOOR:
            return (f"old {was['number']}, new {now['number']}, relative difference {off / size:.2g}, "
                    f"tolerance {tolerance:g}")
        if len(was[0]) != len(now[0]) and was.group("before", "after") != now.group("before", "after"):
            return "blanks"
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
    return None if difference <= FIGURE_THRESHOLD else (
        f"figure: content differs by {difference:.3f} of full scale, tolerance {FIGURE_THRESHOLD:g}")


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
    for number, pair in enumerate(itertools.zip_longest(old, new), start=1):
        was, now = (_contents(output) if output else {} for output in pair)
        if was.keys() != now.keys():
            reports.append(f"output {number} is of another kind: old {', '.join(was) or 'missing'}, "
                           f"new {', '.join(now) or 'missing'}")
        for kind in was:
            if kind in now and (report := _compare_content(was[kind], now[kind], tolerance)):
                reports.append(f"output {number} ({kind}), {report}")
    return reports


def _contents(output: NotebookNode) -> dict[str, str]:
    """Return what is compared of an output, by the name of its kind; pictures as in HTML."""
    if output.output_type == "stream":
        return {output.name: output.text}
    if output.output_type == "error":
        return {"error": f"{output.ename}: {output.evalue}"}  # a traceback holds paths
    return {kind: "" if kind == WIDGET_VIEW else
            f"data:{kind};base64,{content}" if kind.startswith("image/") else str(content)
            for kind, content in output.data.items()}


def _compare_content(old: str, new: str, tolerance: float) -> str | None:
    report = compare_text(_EMBEDDED.sub("<figure>", old), _EMBEDDED.sub("<figure>", new), tolerance)
    for was, now in zip(_EMBEDDED.findall(old), _EMBEDDED.findall(new), strict=False):
        report = report or compare_figures(base64.b64decode(was), base64.b64decode(now), tolerance)
    return report


# ---------------------------------------------------------------------------------------------- the plug-in

class Notebook(IPyNbFile):
    """A notebook of which the outputs are compared by this module's rules."""

    def setup(self) -> None:
        """Start the kernel."""
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # a graphics card rounds otherwise
        self.profile = tempfile.TemporaryDirectory()  # the user's own of IPython may show every line's value
        os.environ["IPYTHONDIR"] = self.profile.name
        super().setup()

    def collect(self) -> Iterator["Cell"]:
        """Collect one test a code cell."""
        for cell in super().collect():
            yield Cell.from_parent(self, name=cell.name, cell_num=cell.cell_num, cell=cell.cell,
                                   options=cell.options)


class Cell(IPyNbCell):
    """A code cell of which the outputs are compared by this module's rules."""

    def runtest(self) -> None:
        """Run the cell and compare it; a cell that could not be compared fails."""
        if self.options["skip"] or not self.options["check"]:
            self.raise_cell_error("the cell is marked to be skipped or ignored; every cell must be compared")
        if self.cell.execution_count is None:
            self.raise_cell_error("the cell has no execution count, so no reference; run `make record`")
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
        number = re.fullmatch(r"(?:tolerance-(0?\.\d+))?", " ".join(declared))
        tolerance = float(number[1] or TOLERANCE) if number else 0.0
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


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Iterator[None]:
    """Put this module's notebook in the place of nbval's in strict mode."""
    collected = yield
    return [Notebook.from_parent(parent, path=node.path)  # type: ignore[return-value]
            if isinstance(node, IPyNbFile) and parent.config.option.nbval else node
            for node in collected]  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------- recording

def record(path: Path) -> None:
    """Run a notebook on a fresh kernel of this Python and write it with its outputs, the new reference.

    The stubs of its exercises are written anew first. Only what depends on code and data stays in the file,
    so that recording twice gives the same bytes. The notebook's folder is the working folder.

    Parameters
    ----------
    path : Path
        The notebook, replaced as a whole once every cell has run.

    Raises
    ------
    ValueError
        If its exercises are malformed or a cell stopped; the file is as it was then.
    """
    # imported here because both take seconds, which a plain run of pytest need not wait for
    from genailab_helpers.checkpoints import whole_file
    from genailab_helpers.commands.lessons import execute
    from genailab_helpers.lessons.exercises import refresh_stubs

    notebook = nbformat.read(path, as_version=4)
    refresh_stubs(notebook)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # a graphics card rounds otherwise
    if error := execute(notebook, path.parent, path.stem):
        raise ValueError(f"{path}: not recorded, stopped in {error}")
    _normalise(notebook)
    if samples := _samples(notebook, path.parent):
        notebook.metadata["samples"] = samples
    with whole_file(path) as temporary:
        temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def fingerprint(cell: NotebookNode) -> str:
    """Return a digest of what a cell says and shows."""
    content = json.dumps([cell.source, cell.outputs], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def changed_since(notebook: NotebookNode, folder: Path) -> list[str]:
    """Return which cells of a notebook in `folder`, and which samples that it names, were changed since."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    known, now = notebook.metadata.get("samples", {}), _samples(notebook, folder)
    return [*(f"code cell {number}" for number, cell in enumerate(code, start=1)
              if cell.metadata.get("recorded") != fingerprint(cell)),
            *sorted(f"data/samples/{name}" for name in {*known, *now} if known.get(name) != now.get(name))]


def _samples(notebook: NotebookNode, folder: Path) -> dict[str, str]:
    """Return digests of the files and folders of data/samples that a notebook's code names."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    found = {}
    for sample in sorted(folder.absolute().parent.glob("data/samples/*")):
        if sample.name in code:
            files = [sample] if sample.is_file() else sorted(sample.rglob("*.*"))
            content = b"".join(file.name.encode() + file.read_bytes() for file in files if file.is_file())
            found[sample.name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def _normalise(notebook: NotebookNode) -> None:
    """Take out what differs from run to run and from machine to machine."""
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    CoalesceStreamsPreprocessor().preprocess(notebook, {})  # they arrive in pieces of random length
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            for output in cell.outputs:
                if output.output_type == "error":
                    output.traceback = [f"{output.ename}: {output.evalue}"]  # the whole one holds paths
                elif WIDGET_VIEW in output.get("data", {}):
                    output.data[WIDGET_VIEW]["model_id"] = "0" * 32
            cell.metadata["recorded"] = fingerprint(cell)


def main() -> None:
    """Record the notebooks named after `record` on the command line."""
    if sys.argv[1:2] != ["record"]:
        sys.exit("usage: python -m genailab_helpers.nbregression record NOTEBOOK...")
    for path in map(Path, sys.argv[2:]):
        record(path)
        print(f"recorded {path}")


if __name__ == "__main__":
    main()
