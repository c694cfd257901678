"""`genailab run`: lessons executed with parameters, and one clear line for whatever is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock, Mock
from urllib.error import URLError

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from genailab_helpers.commands.lessons import find_lessons, parameterize
from genailab_helpers.datasets import download

DEFAULTS = """N, M = 3, 4  # how many
RATE: float = 0.5
FLAG = True
WORD = "a"
SIZES = [1, 2]
ANY = None
DATA = None  # folder
EXTERNAL = None  # another
OUT_DIR = "x"
"""
SAY = "import os, sys\nprint([N, M, RATE, FLAG, WORD, SIZES])\nprint(os.getcwd())\nprint(sys.executable)"
NAMES = ("01_first", "02_fails", "03_dies", "04_last")
FIRST, FAILS, DIES, LAST = (f"../lessons/{name}.ipynb" for name in NAMES)


def write_lesson(path: Path, *cells: nbformat.NotebookNode) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=list(cells), metadata=kernel), path)


@pytest.fixture
def caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with images in it, and lessons in another one."""
    lessons, here = tmp_path / "lessons", tmp_path / "here"
    lessons.mkdir()
    for folder in ("images", "0", "texts", "empty"):
        (here / folder).mkdir(parents=True)
    for folder in ("images", "0"):
        (here / folder / "NORMAL").mkdir()
        Image.new("L", (32, 32), 90).save(here / folder / "NORMAL" / "one.png")
    (here / "texts" / "notes.txt").write_text("no image")
    (here / "a_file").write_text("kept")
    parameters = new_code_cell(DEFAULTS, metadata={"tags": ["parameters"]})
    write_lesson(
        lessons / "01_first.ipynb", new_markdown_cell("# 1. Films & folders"), parameters,
        new_code_cell(SAY), new_code_cell("print(os.listdir(DATA))"),
        new_code_cell("raise ValueError('shown on purpose')", metadata={"tags": ["raises-exception"]}))
    stale = new_output("stream", name="stdout", text="output of an earlier run")
    write_lesson(lessons / "02_fails.ipynb", new_markdown_cell("# 2. It fails"), parameters,
                 new_code_cell("print(1 / (N - 3))"),
                 new_code_cell("print(2)", outputs=[stale], execution_count=3))
    write_lesson(lessons / "03_dies.ipynb", new_code_cell("import os\nos._exit(9)"))
    write_lesson(lessons / "04_last.ipynb", new_markdown_cell("# 4. The last"), new_code_cell("40 + 2"))
    monkeypatch.chdir(here)
    return here


def outputs(path: Path) -> str:
    cells = nbformat.read(path, 4).cells
    return "".join(o.get("text", "") for cell in cells if cell.cell_type == "code" for o in cell.outputs)


def test_a_lesson_runs_with_the_callers_parameters_in_the_running_interpreter(caller: Path) -> None:
    before = Path(FIRST).read_bytes()
    foreign = caller.parent / "jupyter" / "kernels" / "python3"  # a user's own kernel of the same name
    foreign.mkdir(parents=True)
    spec = {"argv": ["no-such-python"], "display_name": "x", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    given = ["-p", "N=-5", "-p", "M", "6", "-p", "RATE", "2", "-p", "FLAG", "false", "-p", "WORD", "7",
             "-p", "SIZES", "[3]", "-p", "DATA", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "genailab_helpers.commands", "run", *given, FIRST],
        capture_output=True, text=True, encoding="utf-8", cwd=caller,
        env={**os.environ, "JUPYTER_PATH": str(foreign.parent.parent), "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Look at {Path('build') / 'index.html'}\n"

    said = outputs(Path("build/01_first.ipynb")).splitlines()
    assert said == ["[-5, 6, 2.0, False, '7', [3]]", str(Path(FIRST).parent.resolve()), sys.executable,
                    "['NORMAL']"]
    assert Path(FIRST).read_bytes() == before

    bar = done.stderr.replace("\r", "\n").strip().splitlines()
    assert all(line.startswith("[1/1] 01_first: ") for line in bar if line), done.stderr
    assert "5/5" in bar[-1]  # four cells and papermill's one with the parameters

    names = sorted(path.name for path in Path("build").iterdir())
    assert names == ["01_first.html", "01_first.ipynb", "index.html"]
    page = Path("build/01_first.html").read_text(encoding="utf-8")
    assert "shown on purpose" in page
    assert not re.search(r"<script[^>]*src=", page), "the page must not wait for the network"
    index = Path("build/index.html").read_text(encoding="utf-8")
    assert '<a href="01_first.html">01_first</a>' in index
    assert str(caller) not in index
    assert str(caller) not in json.dumps(nbformat.read("build/01_first.ipynb", 4).metadata)


def test_a_failing_lesson_is_kept_apart_and_the_next_one_still_runs(caller: Path, genailab) -> None:
    build = caller / "build"
    status, _, err = genailab("run", FAILS, DIES, LAST)
    assert status == 1
    kept = [build.name + os.sep + name for name in ("02_fails.failed.ipynb", "03_dies.failed.ipynb")]
    assert [line for line in re.split(r"[\r\n]", err) if line.startswith("genailab: ")] == [
        "genailab: lesson 02_fails failed in cell 2 of 3: ZeroDivisionError: division by zero "
        f"(executed so far: {kept[0]})",
        "genailab: lesson 03_dies failed in cell 1 of 1: the kernel ended; was it stopped, "
        f"or did memory run out? (executed so far: {kept[1]})"]
    assert "Traceback" not in err
    assert "earlier run" not in (build / "02_fails.failed.ipynb").read_text(encoding="utf-8")
    assert (build / "04_last.ipynb").exists()
    assert not (build / "02_fails.ipynb").exists()
    assert "02_fails.failed.html" in (build / "index.html").read_text(encoding="utf-8")

    genailab.run("run", FAILS, "-p", "N", "4")  # mended: the failure is gone, the others stay listed
    assert outputs(build / "02_fails.ipynb") == "1.0\n2\n"
    index = (build / "index.html").read_text(encoding="utf-8")
    assert "02_fails.failed" not in index
    assert "04_last.html" in index
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
    assert "genailab_helpers" not in said  # the kernel may moan about its end, the command must not
    assert list((caller / "build").iterdir()) == []


@pytest.mark.parametrize(("arguments", "words"), [
    (["9"], ["no lesson 9", "01_data_exploration, 02_synthetic_xrays, 03_chest_diffusion"]),
    (["01_first.ipynb.bak"], ["no lesson 01_first.ipynb.bak"]),
    ([FIRST, "-p", "X", "1"], ["01_first has no parameter X", "N, M, RATE, FLAG, WORD, SIZES, ANY, DATA"]),
    ([FIRST, LAST, "-p", "N", "1"], ["04_last has no parameter N", "none"]),
    ([FIRST, "-p", "N", "3.5"], ["N", "a whole number", "'3.5'"]),
    ([FIRST, "-p", "N", "True"], ["N", "a whole number", "'True'"]),
    ([FIRST, "-p", "RATE", "fast"], ["RATE", "a number", "'fast'"]),
    ([FIRST, "-p", "FLAG", "1"], ["FLAG", "True or False", "'1'"]),
    ([FIRST, "-p", "SIZES", "3"], ["SIZES", "list", "'3'"]),
    ([FIRST, "-p", "N"], ["N", "a whole number", "''"]),
    ([FIRST, "-p", "DATA="], ["parameter DATA: expected a folder, got nothing"]),
    ([FIRST, "-p", "DATA", ""], ["parameter DATA: expected a folder, got nothing"]),
    ([FIRST, "-p", "DATA", "2019"], [f"{os.sep}2019"]),
    ([FIRST, "-p", "DATA", "empty"], ["empty"]),
    ([FIRST, "-p", "EXTERNAL", "nowhere"], ["nowhere"]),
    ([FIRST, "-p", "DATA", "texts"], ["texts", ".txt"]),
    ([FIRST, "--output", "a_file"], ["a_file", "exists"]),
    ([FIRST, "--output", "a_file/build"], ["a_file", "Not a directory"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_input_is_one_line_and_status_2(
        caller: Path, genailab, arguments: list[str], words: list[str]) -> None:
    before = sorted(caller.rglob("*"))
    line = genailab.refuse("run", *arguments)
    for word in words:
        assert word in line
    assert sorted(caller.rglob("*")) == before


def test_a_lesson_is_named_by_number_name_or_path(caller: Path) -> None:
    folder = Path(__file__).resolve().parents[2] / "notebooks"
    lesson = folder / "02_synthetic_xrays.ipynb"
    for name in ("2", "02", "02_synthetic_xrays", "02_synthetic_xrays.ipynb", str(lesson)):
        assert find_lessons([name]) == [lesson], name
    own = caller / "my lesson.ipynb"
    own.touch()
    assert find_lessons(["4", "my lesson.ipynb", "04"]) == [folder / "04_spine_grading.ipynb", own.resolve()]
    assert [path.stem[:2] for path in find_lessons([])] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize(("name", "text", "value"), [
    ("N", "7", 7), ("M", "-7", -7), ("RATE", "1", 1.0), ("RATE", "1e-3", 1e-3), ("FLAG", "true", True),
    ("FLAG", "False", False), ("WORD", "12", "12"), ("WORD", "a=b c", "a=b c"), ("WORD", "images", "images"),
    ("SIZES", "[4, 5]", [4, 5]), ("ANY", "4", 4), ("ANY", "all", "all"), ("DATA", "None", None),
    *((name, text, Path(text)) for name in ("DATA", "EXTERNAL", "OUT_DIR")
      for text in ("images", "0", "2019", "True", "1e5")),
])
def test_values_take_the_type_of_the_default_and_folders_start_at_the_callers(
        caller: Path, name: str, text: str, value: object) -> None:
    wanted = str(caller.resolve() / value) if isinstance(value, Path) else value
    converted = parameterize(Path(FIRST), {name: text})[1][name]
    assert converted == wanted
    assert type(converted) is type(wanted)


def test_every_parameter_of_every_lesson_can_be_set() -> None:
    for lesson in find_lessons([]):
        [cell] = [cell for cell in nbformat.read(lesson, 4).cells
                  if "parameters" in cell.metadata.get("tags", [])]
        defaults: dict[str, object] = {}
        exec(cell.source, {}, defaults)
        assert len(defaults) > 2
        assert parameterize(lesson, {name: str(value) for name, value in defaults.items()})[1] == defaults


def test_help_needs_none_of_the_slow_libraries() -> None:
    code = ("import sys\nfrom genailab_helpers.commands import main\n"
            "try: main([*sys.argv[1:], '--help'])\nexcept SystemExit as stop: assert not stop.code\n"
            "slow = {'torch', 'scipy', 'PIL', 'pandas', 'papermill', 'nbconvert', 'nbformat'}\n"
            "print(sorted(slow & set(sys.modules)))")
    for words, says in (["run", "NAME VALUE"], ["data", "organize"], ["sample", "guidance"]):
        done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, check=True)
        assert says in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("error", "says"), [
    (None, "no card of that name"), (FileNotFoundError(2, "Not there", "images"), "Not there: 'images'"),
    (URLError("no network"), "no network")])
def test_errors_that_are_raised_on_purpose_are_one_line(
        genailab, monkeypatch: pytest.MonkeyPatch, error: Exception | None, says: str) -> None:
    if error:
        monkeypatch.setattr(download, "cards", Mock(side_effect=error))
    assert says in genailab.refuse("data", "cards", "x")


@pytest.mark.parametrize("error", [ValueError("a fault"), OSError("no file is named"), KeyError("a fault")])
def test_a_fault_shows_its_traceback(genailab, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    cards = MagicMock(__contains__=Mock(side_effect=error))  # met while our own code runs
    monkeypatch.setattr(download, "CARDS", cards)
    with pytest.raises(type(error), match=re.escape(str(error))):
        genailab("data", "download", "x")
