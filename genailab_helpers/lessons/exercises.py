"""Exercises: the solution cell is the only source, the stub is made from it, a self-check judges both.

An exercise in a notebook is, in this order, a markdown cell with the task and a hint in `<details>`; the
stub (tags `exercise-stub` and `exercise-2.1`); and the folded solution (tags `exercise-solution` and
`exercise-2.1`). In the solution, what the learner is to write stands between `# BEGIN SOLUTION` and
`# END SOLUTION`, and the last line is the self-check, `check("2.1", answer)`, which the stub keeps. Running
the notebook runs both: the stub's output says "not solved yet", the solution's says "solved".
"""

import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from nbformat import NotebookNode

from genailab_helpers.lessons.checks import CHECKS, NotSolved

STUB, SOLUTION = "exercise-stub", "exercise-solution"  # tags of cells
BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"
BLANK = "...  # your code here"
_own: dict[str, Any] = {}  # answers of the reader that passed, by the number of the exercise


def check(number: str, answer: Any) -> Any:
    """Print one line that says whether an exercise is solved, and if not, what is wrong.

    A solution is judged too, but never takes the place of an answer of the reader's own that passed.

    Parameters
    ----------
    number : str
        The exercise as "lesson.exercise", for example "2.1".
    answer : object
        What the exercise asks for. A function is called by the self-check; whatever it raises becomes part of
        the line, and an answer of None or `...` counts as not yet written.

    Returns
    -------
    object
        What later cells are to use: `answer`, or the reader's own where `answer` is the solution.

    Raises
    ------
    ValueError
        If there is no such exercise.
    """
    if number not in CHECKS:
        raise ValueError(f"there is no exercise {number!r}; expected one of {', '.join(sorted(CHECKS))}")
    try:
        _refuse_blank(answer)
        CHECKS[number](_refusing_blanks(answer) if inspect.isfunction(answer) else answer)
    except NotSolved as reason:
        print(f"Exercise {number} not solved yet: {reason}")
    except Exception as error:
        message = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        print(f"Exercise {number} not solved yet: your code stopped with {message}")
    else:
        if not _is_solution(answer):
            _own[number] = answer
        kept = _own.get(number, answer)
        print(f"Exercise {number} solved." + (" Your own answer stays in use." if kept is not answer else ""))
        return kept
    if not _is_solution(answer):
        _own.pop(number, None)
    return answer


def _is_solution(answer: Any) -> bool:
    try:
        return BEGIN in inspect.getsource(answer)
    except (TypeError, OSError):
        return False


def make_stub(source: str) -> str:
    """Make the learner's cell from a solution: each marked block becomes one blank, the rest stays.

    Parameters
    ----------
    source : str
        Code of a solution with at least one block between `# BEGIN SOLUTION` and `# END SOLUTION`. A name
        that the self-check is given must be bound outside the blocks, so that the stub runs.

    Returns
    -------
    str
        Code that runs, with `...  # your code here` at the indentation of each block.

    Raises
    ------
    ValueError
        If the markers are missing or do not pair, or the stub is not valid Python.
    """
    block = rf"^([ \t]*){BEGIN}[ \t]*\n.*?^[ \t]*{END}[ \t]*$"
    code, n_blocks = re.subn(block, rf"\1{BLANK}", source, flags=re.MULTILINE | re.DOTALL)
    if n_blocks == 0 or BEGIN in code or END in code:
        raise ValueError(f"expected at least one block from {BEGIN!r} to {END!r}; blocks do not nest")
    try:
        compile(code, "stub", "exec")
    except SyntaxError as error:
        raise ValueError(f"the stub is not valid Python: {error}") from error
    return code


def find_exercises(notebook: NotebookNode) -> dict[str, tuple[int, int]]:
    """Find the exercises of a notebook.

    Parameters
    ----------
    notebook : NotebookNode
        A notebook in format 4.

    Returns
    -------
    dict of str to (int, int)
        Exercise number to the positions of its stub and its solution, in the order of the notebook.

    Raises
    ------
    ValueError
        If an exercise has not exactly one stub and, after it, exactly one solution, or a cell lacks its
        number.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for i, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        roles = [role for role in (STUB, SOLUTION) if role in tags]
        if not roles:
            continue
        numbers = [tag.removeprefix("exercise-") for tag in tags if re.fullmatch(r"exercise-\d+\.\d+", tag)]
        if len(roles) != 1 or len(numbers) != 1:
            raise ValueError(f"cell {i} has the tags {tags}; expected one of {STUB} and {SOLUTION} "
                             "and one such as exercise-2.1")
        found.setdefault(numbers[0], {STUB: [], SOLUTION: []})[roles[0]].append(i)
    pairs = {}
    for number, cells in found.items():
        stubs, solutions = cells[STUB], cells[SOLUTION]
        if len(stubs) != 1 or len(solutions) != 1 or stubs[0] > solutions[0]:
            raise ValueError(f"exercise {number} has stubs in cells {stubs} and solutions in cells "
                             f"{solutions}; expected one stub and one solution after it")
        pairs[number] = (stubs[0], solutions[0])
    return pairs


def refresh_stubs(notebook: NotebookNode) -> None:
    """Write every stub of a notebook anew from its solution.

    Parameters
    ----------
    notebook : NotebookNode
        Changed in place: the source of the stubs, nothing else.

    Raises
    ------
    ValueError
        If an exercise has not one stub and one solution after it, or a solution makes no stub; the message
        names the exercise and the notebook is as it was.
    """
    stubs = {}
    for number, (stub, solution) in find_exercises(notebook).items():
        try:
            stubs[stub] = make_stub(notebook.cells[solution].source)
        except ValueError as error:
            raise ValueError(f"exercise {number}: {error}") from error
    for i, source in stubs.items():
        notebook.cells[i].source = source


def _refuse_blank(answer: Any) -> None:
    if answer is None or answer is ...:
        raise NotSolved("nothing has been returned yet")


def _refusing_blanks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a learner's function so that a blank answer is told from a wrong one."""
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        answer = function(*args, **kwargs)
        _refuse_blank(answer)
        return answer
    return call
