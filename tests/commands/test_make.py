"""The Makefile's own logic, with stand-ins for the programs that it calls."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32" or not shutil.which("make"), reason="needs make")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile and an environment that was made, whose python is a script."""
    folder = tmp_path / "clone"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "tests").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for made in (".made", ".made-test", ".made-bench", ".made-docs", ".made-browser"):
        (folder / ".venv" / made).touch()
    return folder


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def make(clone: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # A make around this test must not hand its flags and variables to the one under test.
    outer = ("GENAILAB_REAL_DATA", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON")
    env = {name: value for name, value in os.environ.items() if name not in outer} | variables
    return subprocess.run(["make", *arguments], cwd=clone, env=env, capture_output=True, text=True)


def test_help_names_every_target(clone: Path) -> None:
    said = make(clone).stdout
    for target in ("run", "test", "test-slow", "test-fuzz", "test-faults", "test-browser", "coverage",
                   "report-determinism", "budgets", "test-oldest", "test-newest", "lab", "record", "editions",
                   "site", "bench", "bench-diffusion", "clean"):
        assert f"make {target} " in said


def test_the_environment_is_made_again_when_its_files_change(clone: Path) -> None:
    assert make(clone, "-n", "run").stdout == ".venv/bin/genailab run\n"
    for name in ("pyproject.toml", "constraints.txt"):
        later = (clone / ".venv" / ".made").stat().st_mtime + 10
        os.utime(clone / name, (later, later))
        assert "pip install -c constraints.txt -e .\n" in make(clone, "-n", "run", "UV=").stdout
        assert 'pip install -c constraints.txt -e ".[test]"\n' in make(clone, "-n", "test", "UV=").stdout
        os.utime(clone / name, (later - 100, later - 100))


def test_an_old_python_is_refused_before_anything_is_removed(clone: Path) -> None:
    (clone / ".venv" / ".made").unlink()
    (clone / ".venv" / "kept").touch()
    script(clone / "python3.10", "exit 1")  # what the check of the version does there
    done = make(clone, "run", "PYTHON=./python3.10")
    assert done.returncode != 0
    assert "GenAI Lab needs Python 3.11 or newer, and ./python3.10 is not" in done.stderr
    assert (clone / ".venv" / "kept").exists()


@pytest.mark.parametrize(("code", "tests", "passes"), [
    (0, "", True), (1, "", False), (5, "", True), (5, "@pytest.mark.slow", False)])
def test_no_slow_tests_is_no_error_only_where_there_are_none(
        clone: Path, code: int, tests: str, passes: bool) -> None:
    (clone / "tests" / "test_any.py").write_text(tests)
    script(clone / ".venv" / "bin" / "python", f"exit {code}")
    assert (make(clone, "test-slow").returncode == 0) is passes


def test_real_films_are_found_beside_the_clone(clone: Path) -> None:
    script(clone / ".venv" / "bin" / "python", 'echo "films: $GENAILAB_REAL_DATA."')
    assert "films: .\n" in make(clone, "test-slow").stdout
    films = clone.parent / "shared" / "data"
    films.mkdir(parents=True)
    assert f"films: {films}.\n" in make(clone, "test-slow").stdout
    assert "films: elsewhere.\n" in make(clone, "test-slow", GENAILAB_REAL_DATA="elsewhere").stdout


def test_tests_have_a_cache_of_their_own(clone: Path) -> None:
    script(clone / ".venv" / "bin" / "python", 'echo "cache: $GENAILAB_CACHE."')
    assert f"cache: {clone / 'build/cache'}.\n" in make(clone, "test-slow", GENAILAB_CACHE="elsewhere").stdout


def test_bench_runs_every_script_also_after_a_failure(clone: Path) -> None:
    (clone / "benchmarks").mkdir()
    for name in ("benchmarks/bench_a.py", "benchmarks/bench_b.py", "benchmarks/record_c.py"):
        (clone / name).touch()
    script(clone / ".venv" / "bin" / "python", 'echo "ran $1"')
    said = make(clone, "bench")
    assert said.returncode == 0
    assert [line for line in said.stdout.splitlines() if line.startswith("ran")] == [
        "ran benchmarks/bench_a.py", "ran benchmarks/bench_b.py"]
    script(clone / ".venv" / "bin" / "python", 'echo "ran $1"; exit 3')
    failed = make(clone, "bench")
    assert failed.returncode != 0
    assert "ran benchmarks/bench_b.py" in failed.stdout  # a missed bar hides no other figure
