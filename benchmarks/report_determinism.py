"""Run every lesson in several settings, and say which cells differ from what is recorded, and by how much.

`make report-determinism`: one thread and two, all instructions of the processor and none beyond AVX2, each
twice; half an hour on two cores. It writes docs/determinism.md, beside which the tolerances of cells stand.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from measure_lessons import processor

from genailab_helpers.nbregression import TOLERANCE, compare_outputs

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "determinism"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"}
STEPS = (0, *(mantissa * 10.0**power for power in range(-6, 0) for mantissa in (1, 2, 5)))  # tolerances tried


def settings() -> dict[str, dict[str, str]]:
    """Return the variables of each setting by its name."""
    return {f"{threads}, {'AVX2' if limited else 'all'}, {turn}":
            {"OMP_NUM_THREADS": str(threads), "GENAILAB_CACHE": str(WORK / f"cache_{place}"), **limited}
            for place, (turn, threads, limited) in enumerate(product((1, 2), (1, 2), ({}, AVX2)))}


def execute(path: Path, name: str, variables: dict[str, str]) -> Path:
    """Run a copy of a lesson as `make record` does, unless it was run before; return where it is."""
    folder = WORK / name.replace(", ", "_")
    done = folder / "notebooks" / path.name
    if not done.exists():
        done.parent.mkdir(parents=True, exist_ok=True)
        if not (folder / "data").exists():
            (folder / "data").symlink_to(ROOT / "data")
        running = done.with_stem(f"running_{path.stem}")
        running.write_bytes(path.read_bytes())
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "genailab_helpers.nbregression", "record", str(running)],
                       check=True, env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
                       stdout=subprocess.DEVNULL)
        running.rename(done)
        print(f"{path.stem} with {name}: {time.monotonic() - began:.0f} s", flush=True)
    return done


def least_tolerance(old: list[Any], new: list[Any], kind: Callable[[Any], bool]) -> float:
    """Return the smallest tolerance of STEPS within which outputs of a kind agree; infinity if none does."""
    was, now = (list(filter(kind, outputs)) for outputs in (old, new))
    return next((step for step in STEPS if not compare_outputs(was, now, step)), np.inf)


def code_cells(path: Path) -> list[Any]:
    """Return the code cells of a notebook."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def declared_tolerance(cell: Any) -> float:
    """Return the tolerance that the tags of a cell declare, or else the usual one."""
    return next((float(tag.removeprefix("tolerance-")) for tag in cell.metadata.get("tags", ())
                 if tag.startswith("tolerance-")), TOLERANCE)


def differences(path: Path, runs: Iterable[Path]) -> list[tuple[int, float, float, float]]:
    """Return number, declared tolerance, and what numbers and figures need, of each cell of a lesson."""
    def is_stream(output: Any) -> bool:
        return output.output_type == "stream"

    cells, *others = (code_cells(place) for place in (path, *runs))
    found = []
    for number, cell in enumerate(cells):
        text, figure = (max(least_tolerance(cell.outputs, other[number].outputs, kind) for other in others)
                        for kind in (is_stream, lambda output: not is_stream(output)))
        found.append((number + 1, declared_tolerance(cell), text, figure))
    return found


def main() -> None:
    """Run what was not run yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", type=int, default=8, help="only the first so many; 4 run each once")
    chosen = dict(list(settings().items())[:parser.parse_args().settings])
    lines = ["# The same lessons in other settings", "",
             f"`make report-determinism`, {datetime.now(UTC):%d %B %Y}, {os.cpu_count()} cores of "
             f"{processor()}, Python {platform.python_version()}. Threads, instructions and turn: "
             f"{'; '.join(chosen)}.",
             "A row is a cell whose outputs were not the same everywhere, or that declares a tolerance: the "
             "smallest tolerance within which its numbers, and its figures, agree with what is recorded.",
             "Tolerances are 3 to 10 times the largest difference seen; where none was seen, a cell that "
             "follows a training keeps 0.01 to 0.05, which is one unit of the last digit that it prints.", ""]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        runs = [execute(path, name, variables) for name, variables in chosen.items()]
        rows = differences(path, runs)
        shown = [row for row in rows if max(row[2:]) > 0 or row[1] > TOLERANCE]
        lines += [f"## {path.stem}", "", f"{len(rows) - len(shown)} of {len(rows)} cells are the same "
                  "everywhere and declare nothing.", "",
                  "| cell | declared | numbers need | figures need |", "|---|---|---|---|",
                  *(f"| {number} | {declared:g} | {text:g} | {figure:g} |"
                    for number, declared, text, figure in shown), ""]
    (ROOT / "docs" / "determinism.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
