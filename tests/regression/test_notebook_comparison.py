"""Small notebooks through pytest with the plug-in: what must pass passes, every seeded fault fails.

One notebook is recorded with the sources `then`; the sources `now` take their place; one run of pytest judges
every cell.
"""

import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import pytest

from genailab_helpers.nbregression import main, record

SETUP = """
import sys, warnings
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from ipywidgets import IntSlider, Output, interact, interactive_output
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


@dataclass
class Case:
    then: str
    now: str | None = None  # as `then`
    tags: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    stripped: bool = False
    says: str = ""  # part of the message


CALLBACK = """
@interact(size=(0, 10))
def show(size=3):
    print("size", size)
    {}
"""
FIGURE, BLANK = "plot(0); plt.show()", "plot(0).axes[0].lines[0].remove(); plt.show()"
PASS = {
    "setup": Case(SETUP),
    "nothing changed": Case("print('loss 0.1234'); 1 + 1"),
    "decimal within tolerance": Case("print('loss 0.1234 at 10')", "print('loss 0.1235 at 10')"),
    "decimal within its tag": Case("print('loss 0.123')", "print('loss 0.126')", tags=["tolerance-0.05"]),
    "decimal in HTML": Case("HTML('<b>0.1234</b>')", "HTML('<b>0.1235</b>')"),
    "semicolon": Case("2 + 2;"),
    "graphics cards are hidden": Case("import os; os.environ['CUDA_VISIBLE_DEVICES']"),
    "stdout in pieces": Case("print('a'); sys.stdout.flush(); print('b')", "print('a\\nb')"),
    "figure": Case(FIGURE),
    "figure rendered otherwise": Case(FIGURE, "plot(0, **{'text.hinting': 'none'}); plt.show()"),
    "training curve": Case(FIGURE, "line = plot(0).axes[0].lines[0]\n"
                           "line.set_ydata(1.02 * line.get_ydata()); plt.show()", tags=["tolerance-0.05"]),
    "image in HTML": Case("image(0)", "image(0, **{'text.hinting': 'none'})"),
    "interact": Case(CALLBACK.format("plt.plot([0, size]); plt.show()")),
    "interactive_output": Case("s = IntSlider(3)\n"
                               "display(s, interactive_output(lambda size: print(size), {'size': s}))"),
    "Output": Case("out = Output()\nwith out:\n    print('inside'); display(HTML('<b>x</b>'))\n"
                   "print('outside')\ndisplay(out)"),
    "Output again": Case("display(out)"),
    "progress": Case("for step in tqdm(range(3)):\n    print(step)"),
    "expected error": Case("1 / 0", tags=["raises-exception"]),
    "ignored with a reason": Case("print(1)", "print(2)", tags=["nbval-ignore-output"],
                                  metadata={"nbregression_reason": "the time of day"}),
}
FAIL = {
    "integer off by one": Case("print('1000 films, loss 0.5')", "print('1001 films, loss 0.5')", says="1001"),
    "result off by one": Case("1000", "1001", says="1001"),
    "decimal beyond tolerance": Case("print('loss 0.1234')", "print('loss 0.1236')", says="tolerance 0.001"),
    "decimal beyond its tag": Case("print('loss 0.123')", "print('loss 0.13')", tags=["tolerance-0.05"],
                                   says="tolerance 0.05"),
    "integer under a tag": Case("print(100)", "print(101)", tags=["tolerance-0.05"], says="101"),
    "other text": Case("print('lungs')", "print('Lungs')", says="Lungs"),
    "missing output": Case("print('a'); display(1)", "print('a')", says="missing"),
    "no output at all": Case("print('a')", "pass", says="missing"),
    "extra output": Case("print('a')", "print('a'); display(1)", says="one too many"),
    "other order": Case("print('a'); display(1)", "display(1); print('a')", says="another kind"),
    "stripped": Case("print('a')", stripped=True, says="make record"),
    "outputs stripped": Case("print('a')", stripped=True, metadata={"keep_count": True}, says="one too many"),
    "warning": Case("print('a')", "warnings.warn('old'); print('a')", says="stderr"),
    "warning first and alone": Case("pass", "warnings.warn('old')", says="stderr"),
    "error": Case("print('a')", "print('a'); 1 / 0", says="ZeroDivisionError"),
    "another error than expected": Case("1 / 0", "int('x')", tags=["raises-exception"], says="ValueError"),
    "no error where expected": Case("1 / 0", "1", tags=["raises-exception"], says="ZeroDivisionError"),
    "blank figure": Case(FIGURE, BLANK, says="figure"),
    "figure of other data": Case(FIGURE, "plot(1); plt.show()", says="figure"),
    "blank training curve": Case(FIGURE, BLANK, tags=["tolerance-0.05"], says="figure"),
    "swapped figures": Case("plot(0); plt.show(); plot(1); plt.show()",
                            "plot(1); plt.show(); plot(0); plt.show()", says="output 2"),
    "figure of another size": Case(FIGURE, "plot(0).set_figwidth(5); plt.show()", says="Figure size"),
    "other image in HTML": Case("image(0)", "image(1)", says="figure"),
    "other alt text": Case("image(0)", "image(0, alt='a run')", says="a run"),
    "image gone from HTML": Case("image(0)", "HTML('<p>loss 0.1234</p>')", says="text"),
    "error in a callback": Case(CALLBACK.format("pass"), CALLBACK.format("1 / 0"), says="ZeroDivisionError"),
    "warning in a callback": Case(CALLBACK.format("pass"), CALLBACK.format("warnings.warn('old')"),
                                  says="stderr"),
    "error in an Output": Case("with Output():\n    print(1)", "with Output():\n    1 / 0",
                               says="ZeroDivisionError"),
    "other widget": Case("IntSlider(3)", "IntSlider(4)", says="IntSlider(value=4)"),
    "widget gone": Case("IntSlider(3)", "HTML('IntSlider(value=3)')", says="another kind"),
    "ignored without a reason": Case("print(1)", tags=["nbval-ignore-output"], says="nbregression_reason"),
    "ignored with an empty reason": Case("print(1)", tags=["nbval-ignore-output"],
                                         metadata={"nbregression_reason": " "}, says="nbregression_reason"),
    "ignored by a comment": Case("# NBVAL_IGNORE_OUTPUT\nprint(1)", says="nbregression_reason"),
    "skipped": Case("print(1)", tags=["nbval-skip"], says="skipped"),
    "tolerance that is none": Case("print(0.5)", tags=["tolerance-large"], says="tolerance-0.05"),
    "two tolerances": Case("print(0.5)", tags=["tolerance-0.1", "tolerance-0.2"], says="tolerance-0.05"),
    "tolerance above a half": Case("print(0.5)", tags=["tolerance-0.9"], says="tolerance-0.05"),
}
CASES = PASS | FAIL


def run_pytest(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "genailab_helpers.nbregression", "--nbval",
         "--nbval-current-env", "--nbval-cell-timeout=60", "-p", "no:cacheprovider", "--junitxml=report.xml"],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    """Message of every case, "" where it passed, and what pytest printed."""
    folder = tmp_path_factory.mktemp("notebooks")
    path = folder / "cases.ipynb"
    cells = [nbformat.v4.new_code_cell(case.then, metadata={"tags": case.tags} | case.metadata)
             for case in CASES.values()]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    record(path)
    notebook = nbformat.read(path, as_version=4)
    for cell, case in zip(notebook.cells, CASES.values(), strict=True):
        cell.source = case.now or case.then
        if case.stripped:
            cell.outputs = []
            if not case.metadata.get("keep_count"):
                cell.execution_count = None
    nbformat.write(notebook, path)
    printed = run_pytest(folder).stdout
    tests = ElementTree.parse(folder / "report.xml").iter("testcase")
    problems = ("failure", "error", "skipped")
    messages = ["".join(part.text or "no text" for part in test if part.tag in problems) for test in tests]
    return dict(zip(CASES, messages, strict=True)), printed


@pytest.mark.parametrize("name", PASS)
def test_passes(name: str, judged: tuple[dict[str, str], str]) -> None:
    assert judged[0][name] == ""


@pytest.mark.parametrize("name", FAIL)
def test_fails(name: str, judged: tuple[dict[str, str], str]) -> None:
    assert FAIL[name].says in judged[0][name]
    assert judged[0][name].startswith(f"cases.ipynb, code cell {list(CASES).index(name) + 1}: ")


def test_message_is_short_and_complete(judged: tuple[dict[str, str], str]) -> None:
    number = list(CASES).index("decimal beyond tolerance") + 1
    assert judged[0]["decimal beyond tolerance"].splitlines() == [
        f"cases.ipynb, code cell {number}: Cell outputs differ",
        "output 1 (stdout), number in line 1: old 0.1234, new 0.1236, "
        "relative difference 0.0016, tolerance 0.001",
        "    old  loss 0.1234", "    new  loss 0.1236"]


def test_summary_counts_compared_cells(judged: tuple[dict[str, str], str]) -> None:
    assert "code cells that have output are compared (" in judged[1]


def test_dead_kernel_fails_every_cell_at_once(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(source, execution_count=i)
             for i, source in enumerate(["import os; os._exit(1)", "pass"], start=1)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "dead.ipynb")
    started = time.monotonic()
    printed = run_pytest(tmp_path).stdout
    assert "dead.ipynb, code cell 1: the kernel died" in printed
    assert "dead.ipynb, code cell 2: Kernel dead on test start" in printed
    assert time.monotonic() - started < 50  # the cells' time limit is 60 s


def test_plug_in_is_loaded_in_this_repository_and_inert(request: pytest.FixtureRequest) -> None:
    assert request.config.pluginmanager.hasplugin("genailab_helpers.nbregression")
    code = "import sys, genailab_helpers.nbregression; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_recording_twice_gives_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lesson.ipynb"
    cells = [nbformat.v4.new_code_cell(PASS[name].then) for name in
             ("setup", "stdout in pieces", "figure", "interact", "Output", "Output again", "progress")]
    cells.append(nbformat.v4.new_code_cell("import os; print(os.getcwd() == folder)"))
    cells[1].source += f"\nfolder = {str(tmp_path)!r}"
    cells[0].metadata["execution"] = {"iopub.status.busy": "2026-01-01"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {}, "toc": {}}), path)
    assert main(["record", str(path)]) == 0
    first = path.read_bytes()
    assert main(["record", str(path)]) == 0
    assert path.read_bytes() == first
    notebook = nbformat.reads(first.decode(), as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert [cell.execution_count for cell in notebook.cells] == list(range(1, 9))
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    assert [output.text for output in notebook.cells[1].outputs] == ["a\nb\n"]
    assert notebook.cells[-1].outputs[0].text == "True\n"
    assert capsys.readouterr().out == f"recorded {path}\n" * 2


@pytest.mark.parametrize(("source", "says"), [
    ("1 / 0", "code cell 2 stopped with ZeroDivisionError: division by zero"),
    ("from ipywidgets import Output\nwith Output():\n    1 / 0", "code cell 2 stopped with"),
    ("import os; os._exit(1)", "kernel died"),
])
def test_a_cell_that_stops_is_named_and_nothing_is_written(
        source: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lesson.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell("print(1)"), nbformat.v4.new_markdown_cell("text"),
        nbformat.v4.new_code_cell(source)]), path)
    before = path.read_bytes()
    assert main(["record", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert str(path) in error
    assert says in error
    assert "\n" not in error
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "no notebook", "{}", "[]", None])
def test_what_is_no_notebook_is_refused(text: str | None, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lesson.ipynb"
    if text is not None:
        path.write_text(text)
    assert main(["record", str(path)]) == 2
    assert f"{path}: expected a Jupyter notebook, " in capsys.readouterr().err
