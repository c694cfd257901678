"""Small notebooks through pytest with the plug-in: what must pass passes, every seeded fault fails.

One notebook is recorded with the sources `then`; the sources `now` take their place; one run of pytest judges
every cell.
"""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest

from genailab_helpers.nbregression import changed_since, record

SETUP = """
import sys, warnings
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from ipywidgets import IntSlider
from tqdm.auto import tqdm
from base64 import b64encode
from io import BytesIO

def plot(seed, **settings):
    with plt.rc_context(settings):
        fig, ax = plt.subplots(figsize=(4, 3))
        ax.plot(np.random.default_rng(seed).standard_normal(40).cumsum())
        ax.set_ylim(-12, 12)
    return fig

def image(seed, alt="a walk", **settings):
    fig, drawn = plot(seed, **settings), BytesIO()
    fig.savefig(drawn, format="png", dpi=72)
    plt.close(fig)
    source = b64encode(drawn.getvalue()).decode()
    return HTML(f'<p>loss 0.1234</p><img alt="{alt}" src="data:image/png;base64,{source}">')
"""


class Case(NamedTuple):
    then: str
    now: str | None = None  # as `then`
    tags: tuple[str, ...] = ()
    says: str = ""  # part of the message


FIGURE, BLANK = "plot(0); plt.show()", "plot(0).axes[0].lines[0].remove(); plt.show()"
PASS = {
    "setup": Case(SETUP),
    "nothing changed": Case("print('loss 0.1234'); 1 + 1"),
    "decimal within tolerance": Case("print('loss 0.1234 at 10')", "print('loss 0.1235 at 10')"),
    "decimal within its tag": Case("print('loss 0.123')", "print('loss 0.126')", tags=("tolerance-0.05",)),
    "decimal in HTML": Case("HTML('<b>0.1234</b>')", "HTML('<b>0.1235</b>')"),
    "graphics cards are hidden": Case("import os; os.environ['CUDA_VISIBLE_DEVICES']"),
    "stdout in pieces": Case("print('a'); sys.stdout.flush(); print('b')", "print('a\\nb')"),
    "figure": Case(FIGURE),
    "figure rendered otherwise": Case(FIGURE, "plot(0, **{'text.hinting': 'none'}); plt.show()"),
    "training curve": Case(FIGURE, "line = plot(0).axes[0].lines[0]\n"
                           "line.set_ydata(1.02 * line.get_ydata()); plt.show()", tags=("tolerance-0.05",)),
    "image in HTML": Case("image(0)", "image(0, **{'text.hinting': 'none'})"),
    "widget": Case("IntSlider(3)"),
    "progress": Case("for step in tqdm(range(3)):\n    print(step)"),
    "expected error": Case("1 / 0", tags=("raises-exception",)),
}
FAIL = {
    "integer off by one": Case("print('1000 films, loss 0.5')", "print('1001 films, loss 0.5')", says="1001"),
    "decimal beyond tolerance": Case("print('loss 0.1234')", "print('loss 0.1236')", says="tolerance 0.001"),
    "decimal beyond its tag": Case("print('loss 0.123')", "print('loss 0.13')", tags=("tolerance-0.05",),
                                   says="tolerance 0.05"),
    "integer under a tag": Case("print(100)", "print(101)", tags=("tolerance-0.05",), says="101"),
    "other text": Case("print('lungs')", "print('Lungs')", says="Lungs"),
    "missing output": Case("print('a'); display(1)", "print('a')", says="old text/plain, new missing"),
    "extra output": Case("print('a')", "print('a'); display(1)", says="old missing, new text/plain"),
    "other order": Case("print('a'); display(1)", "display(1); print('a')", says="another kind"),
    "stripped": Case("print('a')", says="make record"),
    "warning": Case("print('a')", "warnings.warn('old'); print('a')", says="stderr"),
    "error": Case("print('a')", "print('a'); 1 / 0", says="ZeroDivisionError"),
    "another error than expected": Case("1 / 0", "int('x')", tags=("raises-exception",), says="ValueError"),
    "no error where expected": Case("1 / 0", "1", tags=("raises-exception",),
                                     says="old error, new text/plain"),
    "blank figure": Case(FIGURE, BLANK, says="figure"),
    "figure of other data": Case(FIGURE, "plot(1); plt.show()", says="figure"),
    "blank training curve": Case(FIGURE, BLANK, tags=("tolerance-0.05",), says="figure"),
    "swapped figures": Case("plot(0); plt.show(); plot(1); plt.show()",
                            "plot(1); plt.show(); plot(0); plt.show()", says="output 2"),
    "other image in HTML": Case("image(0)", "image(1)", says="figure"),
    "other alt text": Case("image(0)", "image(0, alt='a run')", says="a run"),
    "image gone from HTML": Case("image(0)", "HTML('<p>loss 0.1234</p>')", says="text"),
    "other widget": Case("IntSlider(3)", "IntSlider(4)", says="IntSlider(value=4)"),
    "widget gone": Case("IntSlider(3)", "HTML('IntSlider(value=3)')", says="another kind"),
    "ignored": Case("print(1)", tags=("nbval-ignore-output",), says="every cell must be compared"),
    "ignored by a comment": Case("# NBVAL_IGNORE_OUTPUT\nprint(1)", says="every cell must be compared"),
    "skipped": Case("print(1)", tags=("nbval-skip",), says="every cell must be compared"),
    "tolerance that is none": Case("print(0.5)", tags=("tolerance-large",), says="tolerance-0.05"),
    "tolerance above a half": Case("print(0.5)", tags=("tolerance-0.9",), says="tolerance-0.05"),
}
CASES = PASS | FAIL


def write_notebook(path: Path, *cells: nbformat.NotebookNode, **metadata: object) -> None:
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells), metadata=metadata), path)


def run_pytest(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "genailab_helpers.nbregression", "--nbval",
         "--nbval-current-env", "--nbval-cell-timeout=60", "-p", "no:cacheprovider", "--junitxml=report.xml"],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Message of every case, "" where it passed."""
    folder = tmp_path_factory.mktemp("notebooks")
    path = folder / "cases.ipynb"
    write_notebook(path, *(nbformat.v4.new_code_cell(case.then, metadata={"tags": [*case.tags]})
                           for case in CASES.values()))
    record(path)
    notebook = nbformat.read(path, as_version=4)
    for cell, (name, case) in zip(notebook.cells, CASES.items(), strict=True):
        cell.source = case.now or case.then
        if name == "stripped":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)
    run_pytest(folder)
    tests = ElementTree.parse(folder / "report.xml").iter("testcase")
    problems = ("failure", "error", "skipped")
    messages = ["".join(part.text or "no text" for part in test if part.tag in problems) for test in tests]
    return dict(zip(CASES, messages, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_case_passes_or_says_what_differs(name: str, judged: dict[str, str]) -> None:
    if name in PASS:
        assert judged[name] == ""
    else:
        assert FAIL[name].says in judged[name]
        assert judged[name].startswith(f"cases.ipynb, code cell {list(CASES).index(name) + 1}: ")


def test_message_is_short_and_complete(judged: dict[str, str]) -> None:
    number = list(CASES).index("decimal beyond tolerance") + 1
    assert judged["decimal beyond tolerance"].splitlines() == [
        f"cases.ipynb, code cell {number}: Cell outputs differ",
        "output 1 (stdout), line 1, old 0.1234, new 0.1236, relative difference 0.0016, tolerance 0.001",
        "    old  loss 0.1234", "    new  loss 0.1236"]


def test_plug_in_is_loaded_in_this_repository_and_inert(request: pytest.FixtureRequest) -> None:
    assert request.config.pluginmanager.hasplugin("genailab_helpers.nbregression")
    code = "import sys, genailab_helpers.nbregression; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_recording_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "lesson.ipynb"
    cells = [nbformat.v4.new_code_cell(PASS[name].then) for name in
             ("setup", "stdout in pieces", "figure", "widget", "progress")]
    cells.append(nbformat.v4.new_code_cell("import os; print(os.getcwd() == folder)"))
    cells[1].source += f"\nfolder = {str(tmp_path)!r}"
    cells[0].metadata["execution"] = {"iopub.status.busy": "2026-01-01"}
    write_notebook(path, *cells, widgets={}, toc={})
    record(path)
    first = path.read_bytes()
    record(path)
    assert path.read_bytes() == first
    notebook = nbformat.reads(first.decode(), as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert [cell.execution_count for cell in notebook.cells] == list(range(1, 7))
    assert changed_since(notebook, tmp_path) == []
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    assert [output.text for output in notebook.cells[1].outputs] == ["a\nb\n"]
    assert notebook.cells[-1].outputs[0].text == "True\n"


def test_what_was_changed_since_is_named(tmp_path: Path) -> None:
    """Whatever a tolerance would let pass: the file itself has changed."""
    table, path = tmp_path / "data" / "samples" / "table.csv", tmp_path / "notebooks" / "lesson.ipynb"
    for file in (table, path):
        file.parent.mkdir(parents=True)
    table.write_text("a,b\n1,2\n")
    write_notebook(path, nbformat.v4.new_code_cell("print(0.123)", metadata={"tags": ["tolerance-0.05"]}),
                   nbformat.v4.new_code_cell("print(open('../data/samples/table.csv').read())"))
    record(path)
    notebook = nbformat.read(path, as_version=4)
    assert changed_since(notebook, path.parent) == []
    notebook.cells[0].outputs[0].text = "0.124\n"
    assert changed_since(notebook, path.parent) == ["code cell 1"]
    notebook.cells[1].source += "  # more"
    table.write_text("a,b\n1,3\n")
    assert changed_since(notebook, path.parent) == ["code cell 1", "code cell 2", "data/samples/table.csv"]


@pytest.mark.parametrize(("source", "says"), [
    ("1 / 0", "cell 2 of 2: ZeroDivisionError: division by zero"),
    ("import os; os._exit(1)", "cell 2 of 2: the kernel ended"),
])
def test_a_cell_that_stops_is_named_and_nothing_is_written(
        source: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "lesson.ipynb"
    write_notebook(path, nbformat.v4.new_code_cell("print(1)"), nbformat.v4.new_markdown_cell("text"),
                   nbformat.v4.new_code_cell(source))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"not recorded, stopped in {says}"):
        record(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
