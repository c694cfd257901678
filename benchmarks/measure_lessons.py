"""Measure how long each lesson runs and how much memory it takes, and write docs/lessons.json.

`make budgets`, on a machine that does nothing else: README and the lessons quote that file, and a test
compares them with it. Each lesson is compared with its recorded outputs (strict nbval) with one thread, in a
process of its own, because the peak memory of children is that of the largest there ever was.
"""

import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NBVAL = ("--nbval", "--nbval-current-env", "--nbval-cell-timeout=300", "-p", "no:cacheprovider", "-q")
CHILD = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)
print(done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


class Measured(NamedTuple):
    """Whether a lesson passed; seconds by clock and of the processor; peak memory; what pytest said."""

    passed: bool
    seconds: float
    processor_seconds: float
    peak_mib: float
    said: str


def measure(path: Path) -> Measured:
    """Run a lesson against its recorded outputs."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CHILD, sys.executable, "-m", "pytest", *NBVAL, str(path)],
                          capture_output=True, text=True, cwd=ROOT, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # `make test` runs it with two
    code, cpu, peak = done.stdout.split()
    scale = 2**20 if sys.platform == "darwin" else 2**10  # Linux counts kilobytes
    return Measured(code == "0", time.monotonic() - began, float(cpu), int(peak) / scale, done.stderr)


def main() -> None:
    """Measure all lessons and write the file."""
    lessons = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        found = measure(path)
        if not found.passed:
            raise SystemExit(f"{path.name}: differs from what is recorded\n{found.said}")
        lessons[path.stem] = {"seconds": round(found.seconds), "peak_mib": round(found.peak_mib),
                              "processor_seconds": round(found.processor_seconds)}
        print(path.stem, lessons[path.stem], flush=True)
    content = {"measured": f"{datetime.now(UTC):%d %B %Y}", "python": platform.python_version(),
               "machine": f"{os.cpu_count()} cores of {processor()}, one thread", "lessons": lessons}
    (ROOT / "docs" / "lessons.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def processor() -> str:
    """Return the name of the processor, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
             if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
