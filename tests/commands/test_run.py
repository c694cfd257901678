"""`genailab run`: lessons executed with parameters, and one clear line for whatever is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from genailab_helpers import execution
from genailab_helpers.commands import _find_lessons, main

DEFAULTS = """N = 3  # how many
RATE = 0.5
FLAG = True
WORD = "a"
SIZES = [1, 2]
DATA = None  # folder
EXTERNAL = None  # another
OUT_DIR = "x"
"""
SAY = "import os, sys\nprint([N, RATE, FLAG, WORD, SIZES])\nprint(os.getcwd())\nprint(sys.executable)"


def write_lesson(path: Path, *cells: nbformat.NotebookNode) -> Path:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=list(cells), metadata=kernel), path)
    return path


def parameters_cell() -> nbformat.NotebookNode:
    return new_code_cell(DEFAULTS, metadata={"tags": ["parameters"]})


@pytest.fixture
def caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with films in it, and lessons in another one."""
    lessons, here = tmp_path / "lessons", tmp_path / "here"
    (here / "films" / "NORMAL").mkdir(parents=True)
    Image.new("L", (32, 32), 90).save(here / "films" / "NORMAL" / "one.png")
    (here / "texts").mkdir()
    (here / "texts" / "notes.txt").write_text("no film")
    (here / "empty").mkdir()
    (here / "a_file").write_text("kept")
    lessons.mkdir()
    write_lesson(
        lessons / "01_first.ipynb", new_markdown_cell("# 1. Films & folders"), parameters_cell(),
        new_code_cell(SAY), new_code_cell("print(os.listdir(DATA))"),
        new_code_cell("raise ValueError('shown on purpose')", metadata={"tags": ["raises-exception"]}))
    stale = new_output("stream", name="stdout", text="output of an earlier run")
    write_lesson(lessons / "02_fails.ipynb", new_markdown_cell("# 2. It fails"), parameters_cell(),
                 new_code_cell("print(1 / (N - 3))"),
                 new_code_cell("print(2)", outputs=[stale], execution_count=3))
    write_lesson(lessons / "03_dies.ipynb", new_code_cell("import os\nos._exit(9)"))
    write_lesson(lessons / "04_last.ipynb", new_markdown_cell("# 4. The last"), new_code_cell("40 + 2"))
    monkeypatch.chdir(here)
    return here


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["run", "--lessons", "../lessons", *arguments])
    return int(stop.value.code or 0)


def outputs(path: Path) -> str:
    cells = nbformat.read(path, 4).cells
    return "".join(o.get("text", "") for cell in cells if cell.cell_type == "code" for o in cell.outputs)


def test_a_lesson_runs_with_the_callers_parameters_in_the_running_interpreter(caller: Path) -> None:
    lesson = caller.parent / "lessons" / "01_first.ipynb"
    before = lesson.read_bytes()
    foreign = caller.parent / "jupyter" / "kernels" / "python3"  # a user's own kernel of the same name
    foreign.mkdir(parents=True)
    spec = {"argv": ["no-such-python"], "display_name": "x", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    values = {"N": "-5", "RATE": "2", "FLAG": "false", "WORD": "7", "SIZES": "[3]", "DATA": "films"}
    given = [word for name, value in values.items() for word in ("-p", name, value)]
    done = subprocess.run(
        [sys.executable, "-m", "genailab_helpers.commands", "run", "--lessons", "../lessons", "1", *given],
        capture_output=True, text=True, encoding="utf-8", cwd=caller,
        env={**os.environ, "JUPYTER_PATH": str(foreign.parent.parent), "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Look at {Path('build') / 'index.html'}\n"

    said = outputs(caller / "build" / "01_first.ipynb").splitlines()
    assert said == ["[-5, 2.0, False, '7', [3]]", str(lesson.parent.resolve()), sys.executable, "['NORMAL']"]
    assert lesson.read_bytes() == before

    bar = done.stderr.replace("\r", "\n").strip().splitlines()
    assert all(line.startswith("[1/1] 01_first: cell ") for line in bar if line), done.stderr
    shown = re.findall(r"cell (\d+) of 5", done.stderr)  # four cells and papermill's one with the parameters
    assert list(dict.fromkeys(shown)) == ["0", "1", "2", "3", "4", "5"]

    names = sorted(path.name for path in (caller / "build").iterdir())
    assert names == ["01_first.html", "01_first.ipynb", "index.html"]
    page = (caller / "build" / "01_first.html").read_text(encoding="utf-8")
    assert "shown on purpose" in page
    sources = re.findall(r"<script[^>]*src=[^>]*>", page)
    assert all("async" in source for source in sources), "the page must not wait for the network"
    index = (caller / "build" / "index.html").read_text(encoding="utf-8")
    assert '<a href="01_first.html">1. Films &amp; folders</a>' in index
    assert "DATA = films" in index
    assert str(caller) not in index
    assert str(caller) not in json.dumps(nbformat.read(caller / "build" / "01_first.ipynb", 4).metadata)


def test_a_failing_lesson_is_kept_apart_and_the_next_one_still_runs(
        caller: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = caller / "build"
    assert run("2", "3", "4") == 1
    said = capsys.readouterr()
    complaints = [line for line in re.split(r"[\r\n]", said.err) if line.startswith("genailab: ")]
    kept = [build.name + os.sep + name for name in ("02_fails.failed.ipynb", "03_dies.failed.ipynb")]
    assert complaints == [
        "genailab: lesson 02_fails failed in cell 2 of 3: ZeroDivisionError: division by zero "
        f"(executed so far: {kept[0]})",
        "genailab: lesson 03_dies failed in cell 1 of 1: the kernel ended; was it stopped, "
        f"or did memory run out? (executed so far: {kept[1]})"]
    assert "Traceback" not in said.err
    assert "earlier run" not in (build / "02_fails.failed.ipynb").read_text(encoding="utf-8")
    assert (build / "04_last.ipynb").exists()
    assert not (build / "02_fails.ipynb").exists()
    assert "Failed in cell 2 of 3: ZeroDivisionError" in (build / "index.html").read_text(encoding="utf-8")

    assert run("02_fails", "-p", "N", "4") == 0  # mended: the failure is gone, the other lessons stay listed
    assert outputs(build / "02_fails.ipynb") == "1.0\n2\n"
    index = (build / "index.html").read_text(encoding="utf-8")
    assert "ZeroDivisionError" not in index
    assert "4. The last" in index
    assert not list(build.glob("02_fails.failed.*"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs Unix signals")
def test_ctrl_c_stops_and_writes_nothing(caller: Path) -> None:
    waiting = caller / "waiting"
    source = f"import time, pathlib\npathlib.Path({str(waiting)!r}).touch()\ntime.sleep(100)"
    write_lesson(caller / "long.ipynb", new_code_cell(source))
    command = [sys.executable, "-m", "genailab_helpers.commands", "run", "long.ipynb"]
    running = subprocess.Popen(command, cwd=caller, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 60
    while not waiting.exists() and time.monotonic() < give_up:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode not in (0, None)
    assert "commands.py" not in said  # the kernel may moan about its end, the command must not
    assert list((caller / "build").iterdir()) == []


@pytest.mark.parametrize(("arguments", "words"), [
    (["9"], ["no lesson 9", "01_first, 02_fails, 03_dies, 04_last"]),
    (["01_first.ipynb.bak"], ["no lesson 01_first.ipynb.bak"]),
    (["1", "-p", "M", "1"], ["01_first has no parameter M", "N, RATE, FLAG, WORD, SIZES, DATA"]),
    (["1", "4", "-p", "N", "1"], ["04_last has no parameter N", "none"]),
    (["1", "-p", "N", "3.5"], ["N", "a whole number", "'3.5'"]),
    (["1", "-p", "N", "True"], ["N", "a whole number", "'True'"]),
    (["1", "-p", "RATE", "fast"], ["RATE", "a number", "'fast'"]),
    (["1", "-p", "FLAG", "1"], ["FLAG", "True or False", "'1'"]),
    (["1", "-p", "SIZES", "3"], ["SIZES", "list", "'3'"]),
    (["1", "-p", "N"], ["-p N", "a name and a value"]),
    (["1", "-p", "DATA", "nowhere"], ["nowhere"]),
    (["1", "-p", "DATA", "empty"], ["empty"]),
    (["1", "-p", "EXTERNAL", "nowhere"], ["nowhere"]),
    (["1", "-p", "DATA", "texts"], ["texts", ".txt"]),
    (["1", "--output", "a_file"], ["a_file", "expected a folder", "--output"]),
    (["1", "--output", "a_file/build"], [f"a_file{os.sep}build", "expected a folder", "--output"]),
    (["--lessons", "empty"], ["no lessons found", "02_synthetic_xrays.ipynb"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_input_is_one_line_and_status_2(
        caller: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    before = sorted(caller.rglob("*"))
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("genailab: ")
    for word in words:
        assert word in said.err
    assert sorted(caller.rglob("*")) == before


def test_a_lesson_is_named_by_number_name_or_path(caller: Path) -> None:
    lesson = caller.parent / "lessons" / "02_fails.ipynb"
    for name in ("2", "02", "02_fails", "02_fails.ipynb", "../lessons/02_fails.ipynb", str(lesson)):
        assert find(name) == [lesson.resolve()], name
    own = write_lesson(caller / "my lesson.ipynb", new_code_cell("1"))
    assert find("4", "my lesson.ipynb", "04") == [lesson.with_name("04_last.ipynb").resolve(), own.resolve()]
    assert [path.stem[:2] for path in find()] == ["01", "02", "03", "04"]


def find(*names: str) -> list[Path]:
    return _find_lessons(names, Path("../lessons"))


@pytest.mark.parametrize(("name", "text", "value"), [
    ("N", "7", 7), ("N", "-7", -7), ("RATE", "1", 1.0), ("RATE", "1e-3", 1e-3), ("FLAG", "true", True),
    ("FLAG", "False", False), ("WORD", "12", "12"), ("WORD", "a=b c", "a=b c"), ("SIZES", "[4, 5]", [4, 5]),
    ("DATA", "None", None),
])
def test_values_take_the_type_of_the_default(caller: Path, name: str, text: str, value: object) -> None:
    converted = execution.convert_parameters(caller.parent / "lessons" / "01_first.ipynb", {name: text})[name]
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize("name", ["DATA", "EXTERNAL", "OUT_DIR"])
def test_folders_start_at_the_callers(caller: Path, name: str) -> None:
    lesson = caller.parent / "lessons" / "01_first.ipynb"
    assert execution.convert_parameters(lesson, {name: "films"}) == {name: str(caller.resolve() / "films")}
    assert execution.convert_parameters(lesson, {"WORD": "films"}) == {"WORD": "films"}


def test_a_full_disk_leaves_the_earlier_page_and_says_which_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs the file size limit of a Unix system")
    notebook = new_notebook(cells=[new_markdown_cell("# 1. Short")])
    notebook.metadata["genailab"] = {"title": "1. Short", "seconds": 1.0, "error": None}
    (tmp_path / "short.html").write_text("earlier")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a page is larger, a notebook smaller
    try:
        with pytest.raises(OSError, match=r"short\.html"):
            execution.save_lesson(notebook, "short", tmp_path, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "short.html").read_text(encoding="utf-8") == "earlier"
    assert {path.name for path in tmp_path.iterdir()} <= {"short.html", "short.ipynb"}


def test_help_needs_none_of_the_slow_libraries() -> None:
    code = ("import sys\nfrom genailab_helpers.commands import main\n"
            "try: main(['run', '--help'])\nexcept SystemExit as stop: assert not stop.code\n"
            "print([name for name in ('torch', 'papermill', 'nbconvert') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "NAME VALUE" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
