"""The students' edition gives nothing away, the solutions' edition shows all, and neither loses a cell."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from genailab_helpers.lessons.exercises import find_exercises

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*_*.ipynb"))


@pytest.fixture(scope="module")
def editions(tmp_path_factory):
    output = tmp_path_factory.mktemp("editions")
    subprocess.run([sys.executable, ROOT / "docs" / "editions.py", output], check=True, cwd=ROOT)
    return output


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def ids(cells):
    return [cell.id for cell in cells]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_students_edition_lacks_solutions_and_outputs_alone(path, editions):
    lesson, student = read(path), read(editions / "student" / path.name)
    pairs = find_exercises(lesson).values()
    assert pairs
    announced = {solution - 1 for _, solution in pairs} | {solution for _, solution in pairs}
    assert ids(student.cells) == [cell.id for i, cell in enumerate(lesson.cells) if i not in announced]
    sources = {cell.id: cell.source for cell in lesson.cells}
    assert all(cell.source == sources[cell.id] for cell in student.cells)
    text = "\n".join(cell.source for cell in student.cells)
    for stub, solution in pairs:
        assert lesson.cells[stub].source in text
        for block in re.findall(r"(?s)# BEGIN SOLUTION\n(.*?)# END", lesson.cells[solution].source):
            assert block.strip() not in text
    assert "SOLUTION" not in text
    assert "folded below" not in text
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in student.cells)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_solutions_edition_lacks_stubs_alone(path, editions):
    lesson, shown = read(path), read(editions / "solutions" / path.name)
    pairs = find_exercises(lesson).values()
    stubs = {stub for stub, _ in pairs}
    assert ids(shown.cells) == [cell.id for i, cell in enumerate(lesson.cells) if i not in stubs]
    by_id = {cell.id: cell for cell in shown.cells}
    for _, solution in pairs:
        cell = by_id[lesson.cells[solution].id]
        assert cell.source == lesson.cells[solution].source
        assert not cell.metadata.get("jupyter", {}).get("source_hidden")
    assert "your code here" not in "\n".join(cell.source for cell in shown.cells)
    for cell in lesson.cells:
        if cell.id in by_id and cell.cell_type == "code":
            assert by_id[cell.id].outputs == cell.outputs


@pytest.mark.parametrize("edition", ["student", "solutions"])
def test_an_edition_finds_the_samples_where_it_lies(editions, edition):
    text = "".join(cell.source for path in (editions / edition).glob("*.ipynb") for cell in read(path).cells)
    used = re.findall(r"\.\./data/samples[\w./]*", text)
    assert used
    assert [place for place in used if not (editions / edition / place).exists()] == []
