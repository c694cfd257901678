"""Every exercise of every lesson: the stub is its solution's, fails its self-check, and the solution passes.

Nothing is executed here. The recorded outputs are read, and the strict notebook regression proves that they
are what the cells print.
"""

import re
from pathlib import Path

import nbformat
import pytest

from genailab_helpers.lessons.exercises import find_exercises, make_stub

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LEAST = 4  # exercises a lesson


def printed(cell):
    return "".join(output.text for output in cell.outputs
                   if output.output_type == "stream" and output.name == "stdout")


def markdown_before(notebook, position):
    """Join the markdown cells that stand directly before a cell."""
    texts = []
    while position > 0 and notebook.cells[position - 1].cell_type == "markdown":
        position -= 1
        texts.insert(0, notebook.cells[position].source)
    return "\n".join(texts)


def faults(notebook, lesson):
    """Name everything that is wrong with the exercises of a notebook; empty if all is well."""
    exercises = find_exercises(notebook)
    found = [] if len(exercises) >= LEAST else [f"{len(exercises)} exercises, expected at least {LEAST}"]
    if str(notebook).count("'exercise-s") != 2 * len(exercises):
        found.append("a stub or a solution stands twice")
    for number, (at_stub, at_solution) in exercises.items():
        stub, solution = notebook.cells[at_stub], notebook.cells[at_solution]
        task = markdown_before(notebook, at_stub)
        demands = {
            "the number belongs to another lesson": number.startswith(f"{lesson}."),
            "the stub is not made from its solution":
                stub.source == make_stub(solution.source) != solution.source,
            "a marker is left in the stub": "SOLUTION" not in stub.source,
            "the solution stands before the stub": at_stub < at_solution,
            "the last line is not the self-check": re.fullmatch(
                rf'(\w+) = check\("{number}", \1\)', solution.source.rstrip().splitlines()[-1]),
            "the stub does not fail its self-check": printed(stub).endswith("\n")
            and printed(stub).splitlines()[-1].startswith(f"Exercise {number} not solved yet: "),
            "the solution does not pass its self-check":
                printed(solution).splitlines()[-1:] == [f"Exercise {number} solved."],
            "no hint before the stub": "<details>" in task and "</details>" in task,
            "no text before the solution": bool(markdown_before(notebook, at_solution).strip()),
            "the solution is not folded": solution.metadata.get("jupyter", {}).get("source_hidden") is True,
        }
        found += [f"{number}: {fault}" for fault, met in demands.items() if not met]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_of_the_lesson(path):
    assert faults(nbformat.read(path, as_version=4), lesson=int(path.name[:2])) == []
