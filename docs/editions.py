"""Write two editions of the lessons: one for students, one with the solutions in view.

    python docs/editions.py OUTPUT

`OUTPUT/student/` holds the lessons without outputs and without solutions, `OUTPUT/solutions/` the lessons
with outputs, and with the solutions in place of the stubs. The lessons read `../data/samples`, so a copy of
it is written to `OUTPUT/data/samples`, and both editions run where they lie. To move one of them alone, put
its folder beside `notebooks/` and `data/` of a clone. Notebooks in OUTPUT are replaced: hand out copies, and
write no answers into OUTPUT.
"""

import argparse
import copy
import shutil
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from genailab_helpers.lessons.exercises import find_exercises

ROOT = Path(__file__).resolve().parents[1]
FOLDED = " is folded below."  # how the cell before a solution ends


def student_edition(lesson: NotebookNode) -> NotebookNode:
    """Return a copy of a lesson without outputs, solutions, and the cells that announce them."""
    edition, left_out = copy.deepcopy(lesson), set()
    for number, (_, solution) in find_exercises(lesson).items():
        before = lesson.cells[solution - 1]
        if before.cell_type != "markdown" or not before.source.endswith(FOLDED) or "\n" in before.source:
            raise ValueError(f"exercise {number}: expected one line before the solution that ends{FOLDED}")
        left_out |= {solution - 1, solution}
    edition.cells = [cell for i, cell in enumerate(edition.cells) if i not in left_out]
    for cell in edition.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return edition


def solutions_edition(lesson: NotebookNode) -> NotebookNode:
    """Return a copy of a lesson with its outputs, in which visible solutions replace the stubs."""
    edition, pairs = copy.deepcopy(lesson), find_exercises(lesson).values()
    for _, solution in pairs:
        edition.cells[solution].metadata.pop("jupyter", None)
        before = edition.cells[solution - 1]
        before.source = before.source.replace(FOLDED, ":")
    stubs = {stub for stub, _ in pairs}
    edition.cells = [cell for i, cell in enumerate(edition.cells) if i not in stubs]
    return edition


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a student's and a solutions edition of each lesson.")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder; notebooks in it are replaced")
    output = parser.parse_args().output
    for path in sorted((ROOT / "notebooks").glob("[0-9]*_*.ipynb")):
        lesson = nbformat.read(path, as_version=4)
        for name, make in (("student", student_edition), ("solutions", solutions_edition)):
            (output / name).mkdir(parents=True, exist_ok=True)
            nbformat.write(make(lesson), output / name / path.name)
    shutil.copytree(ROOT / "data" / "samples", output / "data" / "samples", dirs_exist_ok=True)
