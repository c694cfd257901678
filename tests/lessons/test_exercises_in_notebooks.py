"""Every exercise of every lesson: the stub is its solution's, fails its self-check, and the solution passes.

Nothing is executed here. The recorded outputs are read, and the strict notebook regression proves that they
are what the cells print.
"""

import copy
from pathlib import Path

import nbformat
import pytest

from genailab_helpers.lessons.exercises import find_exercises, make_stub, refresh_stubs

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
    try:
        exercises = find_exercises(notebook)
    except ValueError as error:
        return [str(error)]
    found = [] if len(exercises) >= LEAST else [f"{len(exercises)} exercises, expected at least {LEAST}"]
    for number, (at_stub, at_solution) in exercises.items():
        stub, solution = notebook.cells[at_stub], notebook.cells[at_solution]
        task = markdown_before(notebook, at_stub)
        try:
            expected = make_stub(solution.source)
        except ValueError as error:
            found.append(f"{number}: {error}")
            continue
        demands = {
            "the number belongs to another lesson": number.startswith(f"{lesson}."),
            "the stub is not made from its solution": stub.source == expected,
            "the last line is not the self-check": solution.source.rstrip().splitlines()[-1].startswith(
                f'check("{number}", '),
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


def code(source, printed_line, number, role):
    output = nbformat.v4.new_output("stream", name="stdout", text=f"{printed_line}\n")
    tags = [f"exercise-{role}", f"exercise-{number}"]
    return nbformat.v4.new_code_cell(source, metadata={"tags": tags}, outputs=[output], execution_count=1)


def sound_notebook():
    """Write a small notebook, as recorded, with four sound exercises of lesson 2."""
    cells = []
    for number in ("2.1", "2.2", "2.3", "2.4"):
        source = f'def f():\n    # BEGIN SOLUTION\n    return 1\n    # END SOLUTION\n\ncheck("{number}", f)'
        solution = code(source, f"Exercise {number} solved.", number, "solution")
        solution.metadata["jupyter"] = {"source_hidden": True}
        cells += [nbformat.v4.new_markdown_cell("Task.\n\n<details><summary>Hint</summary>Count.</details>"),
                  code("", f"Exercise {number} not solved yet: nothing has been returned", number, "stub"),
                  nbformat.v4.new_markdown_cell("**Solution**"), solution]
    notebook = nbformat.v4.new_notebook(cells=cells)
    refresh_stubs(notebook)
    return notebook


def test_a_sound_notebook_has_no_faults():
    assert faults(sound_notebook(), lesson=2) == []


def set_source(position, source):
    return lambda notebook: notebook.cells[position].update(source=source)


def set_printed(position, text):
    return lambda notebook: notebook.cells[position].outputs[0].update(text=text)


def retag(notebook):
    for i in (1, 3):
        notebook.cells[i].metadata.tags[1] = "exercise-3.1"


def drop_self_check(notebook):
    for i in (1, 3):
        notebook.cells[i].source = notebook.cells[i].source.removesuffix('check("2.1", f)')


def unbind(notebook):
    notebook.cells[3].source = notebook.cells[3].source.replace("f()", "g()")


NOT_MADE = "2.1: the stub is not made from its solution"
NOT_FAILING = "2.1: the stub does not fail its self-check"
NOT_PASSING = "2.1: the solution does not pass its self-check"
FAULTS = {
    "stub edited by hand": (set_source(1, 'def f():\n    return 1\n\ncheck("2.1", f)'), NOT_MADE),
    "solution changed, stub not": (unbind, NOT_MADE),
    "stub passes": (set_printed(1, "Exercise 2.1 solved.\n"), NOT_FAILING),
    "stub says nothing": (lambda notebook: notebook.cells[1].update(outputs=[]), NOT_FAILING),
    "stub fails another exercise": (set_printed(1, "Exercise 2.2 not solved yet: x\n"), NOT_FAILING),
    "solution fails": (set_printed(3, "Exercise 2.1 not solved yet: x\n"), NOT_PASSING),
    "solution never run": (lambda notebook: notebook.cells[3].update(outputs=[]), NOT_PASSING),
    "solution has no blanks": (set_source(3, 'check("2.1", 1)'), "2.1: expected at least one block"),
    "no self-check": (drop_self_check, "2.1: the last line is not the self-check"),
    "no hint": (set_source(0, "Task."), "2.1: no hint before the stub"),
    "hint of another exercise": (lambda notebook: notebook.cells.pop(4), "2.2: no hint before the stub"),
    "no text before the solution": (
        lambda notebook: notebook.cells.pop(2), "2.1: no text before the solution"),
    "solution not folded": (
        lambda notebook: notebook.cells[3].metadata.pop("jupyter"), "2.1: the solution is not folded"),
    "no stub": (lambda notebook: notebook.cells.pop(1), "exercise 2.1 has stubs in cells []"),
    "two stubs": (lambda notebook: notebook.cells.insert(1, copy.deepcopy(notebook.cells[1])),
                  "exercise 2.1 has stubs in cells [1, 2]"),
    "too few exercises": (
        lambda notebook: notebook.update(cells=notebook.cells[:12]), "3 exercises, expected at least 4"),
    "exercise of another lesson": (retag, "3.1: the number belongs to another lesson"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found(name):
    spoil, message = FAULTS[name]
    notebook = sound_notebook()
    spoil(notebook)
    assert any(fault.startswith(message) for fault in faults(notebook, lesson=2)), faults(notebook, lesson=2)
