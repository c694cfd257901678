"""Set the comparison of notebooks beside its peers, on lessons that were run already.

`make test-faults` keeps the lessons whose own cells hold a fault, `make report-determinism` the sound ones in
eight settings: what do nbval, pytest-notebook and this project's comparison see, and what do they call
changed that is not? Needs the extra `bench`; writes docs/notebook_peers.md.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import nbformat
from nbformat import NotebookNode
from report_determinism import code_cells, declared_tolerance

from genailab_helpers.nbregression import compare_outputs

ROOT = Path(__file__).parents[1]
Compare = Callable[[NotebookNode, NotebookNode], bool]  # of the recorded and the new cell: do they differ?


def ours(old: NotebookNode, new: NotebookNode) -> bool:
    """Whether this project's comparison, with the tolerance of the cell, calls it changed."""
    return bool(compare_outputs(old.outputs, new.outputs, declared_tolerance(old)))


def nbval(old: NotebookNode, new: NotebookNode) -> bool:
    """Whether nbval, strict, calls it changed."""
    from nbval.plugin import IPyNbCell, bcolors

    skipped = ("metadata", "traceback", "prompt_number", "output_type", "name", "execution_count",
               "application/vnd.jupyter.widget-view+json", "image/png", "image/jpeg")  # nbval's own list
    cell = SimpleNamespace(parent=SimpleNamespace(skip_compare=skipped), colors=bcolors,
                           sanitize=lambda text: text, format_output_compare=lambda *outputs: None)
    return not IPyNbCell.compare_outputs(cell, new.outputs, old.outputs)


def pytest_notebook(old: NotebookNode, new: NotebookNode) -> bool:
    """Whether pytest-notebook, as it comes, calls it changed."""
    from pytest_notebook.diffing import diff_notebooks, filter_diff
    from pytest_notebook.nb_regression import DEFAULT_DIFF_IGNORE

    if old.outputs == new.outputs:
        return False  # at once: a diff of two long texts takes minutes
    pair = (nbformat.v4.new_notebook(cells=[_with_short_texts(cell)]) for cell in (old, new))
    return bool(filter_diff(diff_notebooks(*pair), DEFAULT_DIFF_IGNORE))


def _with_short_texts(cell: NotebookNode) -> NotebookNode:
    """Put a digest in the place of a picture's text: it differs where the picture does, and is short."""
    short = re.sub(r"base64,[A-Za-z0-9+/=]+", lambda found: hashlib.sha256(found[0].encode()).hexdigest(),
                   json.dumps(cell))
    return nbformat.from_dict(json.loads(short))


COMPARISONS: dict[str, Compare] = {"ours": ours, "nbval": nbval, "pytest-notebook": pytest_notebook}


def changed(run: Path, compare: Compare) -> int:
    """Return how many cells of a run differ from what is recorded of the lesson of this name or number."""
    stem = run.stem if run.stem[0] == "0" else f"0{run.stem.removeprefix('lesson_')[0]}"
    recorded = next((ROOT / "notebooks").glob(f"{stem}*.ipynb"))
    count = 0
    for old, new in zip(code_cells(recorded), code_cells(run), strict=True):
        new.source, new.metadata = old.source, old.metadata  # the outputs alone are judged
        count += compare(old, new)
    return count


def rows(faulty: Sequence[Path], sound: Sequence[Path]) -> list[str]:
    """Return a table: a comparison a row."""
    lines = ["| comparison | faults seen | sound runs called changed | cells of sound runs called changed |",
             "|---|---|---|---|"]
    n_cells = sum(len(code_cells(run)) for run in sound)
    for name, compare in COMPARISONS.items():
        seen = sum(changed(run, compare) > 0 for run in faulty)
        alarms = [changed(run, compare) for run in sound]
        runs = sum(alarm > 0 for alarm in alarms)
        lines.append(f"| {name} | {seen} of {len(faulty)} | {runs} of {len(sound)} "
                     f"| {sum(alarms)} of {n_cells} |")
    return lines


def main() -> None:
    """Write the page."""
    faulty = sorted((ROOT / "build" / "faults" / "executed").glob("*.ipynb"))
    sound = sorted((ROOT / "build" / "determinism").glob("*/notebooks/0*.ipynb"))
    if not faulty or not sound:
        raise SystemExit("nothing to compare: run `make test-faults` and `make report-determinism` first")
    lines = ["# The comparison of notebooks beside its peers", "",
             f"`python benchmarks/compare_notebook_tests.py`, {datetime.now(UTC):%d %B %Y}: {len(faulty)} "
             f"runs of lessons with a fault in one of their own cells, and {len(sound)} runs of sound "
             "lessons with one and two threads, with and without the instructions beyond AVX2. Each "
             "comparison judges the same outputs, as it comes; ours by the tolerances of the cells.", "",
             *rows(faulty, sound), ""]
    (ROOT / "docs" / "notebook_peers.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
