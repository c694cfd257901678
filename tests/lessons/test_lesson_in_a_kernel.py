"""A tiny lesson runs on a kernel: exercise and widget."""

import nbformat
import pytest
from nbclient import NotebookClient

from genailab_helpers.lessons.exercises import refresh_stubs

pytestmark = pytest.mark.slow  # a kernel imports torch

START = """\
import torch
from genailab_helpers.lessons import check, explore, image_grid, start_lesson
from genailab_helpers.lessons.checks import expect, self_check

generator = start_lesson(seed=1)


@self_check("99.1")
def _(double):
    expect(double(2), 4, "twice two")"""
SOLUTION = """\
def double(x):
    # BEGIN SOLUTION
    return 2 * x
    # END SOLUTION

double = check("99.1", double)"""
WIDGET = """\
def draw(n_films=1):
    "Films of noise."
    print("drawing")
    return image_grid(torch.zeros(n_films, 1, 16, 16))

explore(draw, n_films=(0, 4))"""
BROKEN_WIDGET = WIDGET.replace("=1", "=0")  # no films: image_grid refuses
MOVED_WIDGET = WIDGET.replace("explore(", "widget = explore(") + """
widget.children[0].children[0].value = 3
'(n films 3)' in widget.children[1].value"""


def code(source, *tags):
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})


@pytest.fixture(scope="module")
def lesson():
    """Run the tiny lesson, going on after an error."""
    notebook = nbformat.v4.new_notebook(cells=[
        code(START),
        code("", "exercise-stub", "exercise-99.1"),
        code(SOLUTION, "exercise-solution", "exercise-99.1"),
        code(WIDGET), code(MOVED_WIDGET), code(BROKEN_WIDGET)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    refresh_stubs(notebook)
    NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True).execute()
    return notebook


def test_the_stub_fails_and_the_solution_passes(lesson):
    assert lesson.cells[0].outputs == []
    assert [output.text for output in lesson.cells[1].outputs] == [
        "Exercise 99.1 not solved yet: nothing has been returned yet\n"]
    assert [output.text for output in lesson.cells[2].outputs] == ["Exercise 99.1 solved.\n"]


def test_a_widget_cell_holds_the_view_and_follows_its_slider(lesson):
    [printed, view] = lesson.cells[3].outputs
    assert printed.text == "drawing\n"
    assert set(view.data) == {"text/plain", "application/vnd.jupyter.widget-view+json"}
    assert lesson.cells[4].outputs[-1].data["text/plain"] == "True"


def test_an_error_in_the_drawing_function_is_the_cells_error(lesson):
    [error] = [output for output in lesson.cells[5].outputs if output.output_type == "error"]
    assert error.ename == "ValueError"
    assert "expected (N, 1, H, W)" in error.evalue
