"""Every lesson passes with one thread, and stays within its time and memory."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS, BYTES = 90, 2 * 2**30  # a lesson, on 2 quiet cores


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_lesson_passes_within_its_budget(path: Path) -> None:
    # In a process of its own, because the peak memory of children is that of the largest there ever was.
    script = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)\n"
        "print(done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss)\n")
    options = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=300", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", *options, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # `make test` runs it with two
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, cwd=ROOT,
                          env=environment, check=True)
    elapsed = time.monotonic() - began
    code, cpu_seconds, peak = done.stdout.split()
    assert code == "0", done.stderr
    scale = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux
    assert int(peak) * scale <= BYTES
    # Where the machine is shared, the wall clock measures others too; the lesson's own work may not exceed
    # what 2 cores do in its time.
    assert elapsed <= SECONDS or float(cpu_seconds) <= 2 * SECONDS, f"{elapsed:.0f} s, {cpu_seconds} s of CPU"
