"""An exported page folds every hint and solution, and needs no network to show its formulas."""

import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from genailab_helpers.commands.pages import draw_formulas, export_page
from genailab_helpers.lessons.exercises import find_exercises

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


class Folds(HTMLParser):
    """Collect the text of each `<details>`, and what stands outside of all."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.outside, self.depth = "", 0
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "details":
            assert "open" not in dict(attributes)
            self.depth += 1
            self.inside.append("")

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "details"

    def handle_data(self, text: str) -> None:
        if self.depth:
            self.inside[-1] += text
        else:
            self.outside += text


@pytest.mark.slow  # nbconvert takes seconds a page
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_hints_and_solutions_are_folded_and_formulas_drawn(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    html = export_page(notebook, "title")
    assert not re.search(r"<script[^>]*src=", html)
    assert "HBox(children" not in html
    controls = [output for cell in notebook.cells for output in cell.get("outputs", ())
                if "application/vnd.jupyter.widget-view+json" in output.get("data", {})
                and output.output_type == "execute_result"]
    assert html.count("open the notebook in JupyterLab") == len(controls) > 0
    folds = Folds(html)
    prose = re.sub(r"(?s)<pre.*?</pre>|<code>.*?</code>", "", html[html.index("<main>"):])
    assert re.findall(r"\$[^$<>]{1,200}\$|formula-no-", prose) == []
    solutions = [notebook.cells[solution].source for _, solution in find_exercises(notebook).values()]
    hints = [text for cell in notebook.cells if cell.cell_type == "markdown"
             for text in cell.source.split("<details>")[1:]]
    assert folds.depth == 0
    assert len(folds.inside) == len(solutions) + len(hints)
    for source in solutions:
        written = source.split("# BEGIN SOLUTION")[1].strip().splitlines()[0]
        assert any(written in text for text in folds.inside)
    assert all(len(text.strip()) > len("One way to solve it") + 20 for text in folds.inside)
    assert "BEGIN SOLUTION" not in folds.outside


def test_a_formula_stands_on_the_line_and_keeps_its_source() -> None:
    text, drawn = draw_formulas("So $x_0$ in `$code$`, and $$\\sum_i x_i$$ but not $\\nonsense{x}$.", 5)
    assert text.startswith("So formula-no-5-here in `$code$`, and formula-no-6-here but not ")
    assert 'aria-label="x_0"' in drawn[0]
    assert "display:block" in drawn[1]
    assert drawn[2] == "$\\nonsense{x}$"
