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
from collections import defaultdict
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

    A name that the self-check is given must be bound outside the blocks, so that the stub runs.
    """
    block = rf"^([ \t]*){BEGIN}[ \t]*\n.*?^[ \t]*{END}[ \t]*$"
    return re.sub(block, rf"\1{BLANK}", source, flags=re.MULTILINE | re.DOTALL)


def find_exercises(notebook: NotebookNode) -> dict[str, tuple[int, int]]:
    """Return the number of each exercise of a notebook with the positions of its stub and its solution."""
    found = defaultdict[str, dict[str, int]](dict)
    for position, cell in enumerate(notebook.cells):
        role, number = (re.search(kind, " ".join(cell.metadata.get("tags", [])))
                        for kind in (f"{STUB}|{SOLUTION}", r"(?<=exercise-)\d+\.\d+"))
        if role and number:
            found[number[0]][role[0]] = position
    return {number: (cells[STUB], cells[SOLUTION]) for number, cells in found.items()}


def refresh_stubs(notebook: NotebookNode) -> None:
    """Write every stub of a notebook anew from its solution, in place."""
    for stub, solution in find_exercises(notebook).values():
        notebook.cells[stub].source = make_stub(notebook.cells[solution].source)


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
