"""What the site is made of, and that its check finds each fault. `make test-browser` reads it."""

import importlib.util
import io
import json
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "site" / "build.py")
assert spec is not None
assert spec.loader is not None
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_a_thumbnail_folded_solutions_and_no_controls(path: Path) -> None:
    lesson = nbformat.read(path, as_version=4)
    image = Image.open(io.BytesIO(build.thumbnail(lesson, path.name[:2])))
    assert max(image.size) == 640
    for cell in build.page_of(lesson).cells:
        tags = cell.metadata.get("tags", [])
        assert ("exercise-solution" in tags) == ("hide-input" in tags)
        assert "widget-view" not in str([list(output.get("data", ())) for output in cell.get("outputs", ())])


def test_a_figure_that_is_gone_is_missed() -> None:
    with pytest.raises(ValueError, match="lesson 01: no figure"):
        build.thumbnail(nbformat.v4.new_notebook(), "01")


def test_every_lesson_of_readme_has_a_card() -> None:
    cards = re.findall(r"!\[\]\((.+?)\.png\)\n\n\*\*\[\d\. .+?\]\((.+?)\.ipynb\)\*\*", build.lesson_cards())
    assert [(f"notebooks/{path.stem}",) * 2 for path in LESSONS] == cards


def site(folder: Path, body: str) -> Path:
    (folder / "other.html").write_text('<p id="here">text</p>')
    (folder / "index.html").write_text(body)
    return folder


def test_a_right_site_has_no_faults(tmp_path: Path) -> None:
    assert build.faults(site(tmp_path, """<link href="other.html"><a href="other.html#here">a</a>
        <a href="#b" id="b">b</a> <a href="https://example.org">out</a>
        <details><summary>Hint</summary></details><img src="data:image/png;base64,AA">""")) == []


@pytest.mark.parametrize(("body", "fault"), [
    ('<a href="gone.html">a</a>', "index.html: gone.html does not exist"),
    ('<img src="gone.png">', "index.html: gone.png does not exist"),
    ('<a href="other.html#gone">a</a>', "index.html: other.html#gone names a place that other.html has not"),
    ("<details open><summary>Hint</summary></details>", "index.html: 1 folds are open"),
    ('<script src="https://example.org/a.js"></script>', "index.html: loads https://example.org/a.js"),
    ('<link href="//example.org/a.css">', "index.html: loads //example.org/a.css"),
    ("<style>@font-face { src: url('https://example.org/a') }</style>", "index.html: loads https://example.org/a"),
])
def test_each_fault_of_a_site_is_found(body: str, fault: str, tmp_path: Path) -> None:
    assert build.faults(site(tmp_path, body)) == [fault]


def test_a_style_sheet_that_loads_from_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text('@import "https://example.org/b.css"; p { src: url(//example.org/c) }')
    assert build.faults(tmp_path) == [f"a.css: loads {url}" for url in
                                      ("https://example.org/b.css", "//example.org/c")]


def test_the_dev_container_installs_the_tested_versions_and_opens_a_lesson() -> None:
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert "pip install -e . -c constraints.txt" in container["postCreateCommand"]
    assert all((ROOT / name).is_file() for name in container["customizations"]["codespaces"]["openFiles"])
