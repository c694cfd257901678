"""What the recorded tables of lessons 4 and 5 share: many trainings in two processes, one row a file."""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from genailab_helpers.checkpoints import whole_file

N_PROCESSES = 2


class Named(Protocol):
    """A way to train."""

    @property
    def name(self) -> str:
        """Tell it from the others."""
        ...


Row = dict[str, Any]


def measure_all(measure: Callable[[Any, int], Row], jobs: Sequence[tuple[Named, int]],
                keep: Path | None = None) -> list[Row]:
    """Measure arms and seeds in two processes; rows kept in a folder are not measured again."""
    rows: dict[tuple[str, int], Row] = {}
    pool = ProcessPoolExecutor(N_PROCESSES, multiprocessing.get_context("spawn"))
    with pool, tqdm(total=len(jobs), desc="trainings") as bar:
        waiting = {}
        for arm, seed in jobs:
            file = keep and keep / f"{arm.name}, seed {seed}.json"
            if file and file.is_file():
                rows[arm.name, seed] = json.loads(file.read_text(encoding="utf-8"))
                bar.update()
            else:
                waiting[pool.submit(measure, arm, seed)] = file
        for done in as_completed(waiting):
            row = done.result()
            rows[row["arm"], row["seed"]] = row
            if file := waiting[done]:
                with whole_file(file) as path:
                    path.write_text(json.dumps(row), encoding="utf-8")
            bar.update()
    return [rows[arm.name, seed] for arm, seed in jobs]


def rounded(row: Row) -> Row:
    """Keep four digits of each number."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def write_table(path: Path, head: Row, rows: Sequence[Row]) -> None:
    """Write a table as JSON, a row a line, in one order."""
    first = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items())
    lines = ",\n".join(json.dumps(row) for row in sorted(rows, key=lambda row: (row["arm"], row["seed"])))
    with whole_file(path) as temporary:
        temporary.write_text(f'{{{first},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")
