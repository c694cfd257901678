"""The site's pages and those of `genailab run`, on a telephone and on a desk, in Chromium."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (400, 1200)
# Elements that stick out of the page, unless something around them scrolls or cuts.
STICKING_OUT = """() => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return [];
  const out = [...document.querySelectorAll("body *")]
    .filter(e => e.getBoundingClientRect().right > width + 1);
  return ["page", ...out.slice(0, 3).map(e => e.outerHTML.slice(0, 100))];
}"""
# What lies in a box that neither shows nor scrolls to all of it.
CUT_OFF = """() => [...document.querySelectorAll("pre, img, svg, table")].filter(e => {
  for (let box = e; box !== document.body; box = box.parentElement) {
    const overflow = getComputedStyle(box).overflowX;
    if (overflow === "auto" || overflow === "scroll") return false;
    if (overflow === "hidden" && box.scrollWidth > box.clientWidth + 1) return true;
  }
  return false;
}).map(e => e.outerHTML.slice(0, 100))"""
OPEN = "() => [...document.querySelectorAll('details[open]')].map(e => e.outerHTML.slice(0, 100))"
GRAVE = """async () => (await axe.run()).violations.filter(v => ["serious", "critical"].includes(v.impact))
  .map(v => `${v.id}: ${v.nodes.length} times, first ${v.nodes[0].html.slice(0, 200)}`)"""


def listed(folder: Path) -> list[Path]:
    """Give the pages; of the many pages of functions, the first alone."""
    functions, others = [], []
    for path in sorted(folder.rglob("*.html")):
        (functions if path.parent.name == "modules" else others).append(path)
    return others + functions[:1]


@pytest.fixture(params=["site", "run_pages"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(params=WIDTHS)
def page(request: pytest.FixtureRequest, chromium: Any) -> Iterator[Any]:
    page = chromium.new_page(viewport={"width": request.param, "height": 900})
    yield page
    page.close()


def test_a_page_fits_is_folded_and_stays_at_home(folder: Path, page: Any, screenshots: Path) -> None:
    width, faults = page.viewport_size["width"], []
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    for path in listed(folder):
        asked.clear()
        page.goto(path.as_uri())
        name = path.relative_to(folder)
        faults += [f"{name}: sticks out: {what}" for what in page.evaluate(STICKING_OUT)]
        faults += [f"{name}: cut off: {what}" for what in page.evaluate(CUT_OFF)]
        faults += [f"{name}: open: {what}" for what in page.evaluate(OPEN)]
        faults += [f"{name}: asks for {url}" for url in asked if not url.startswith(("file:", "data:"))]
        shot = f"{folder.name}_{'_'.join(name.with_suffix('').parts)}_{width}.png"
        page.screenshot(path=screenshots / shot, full_page=True)
    assert not faults, "\n".join(faults)


def test_axe_finds_nothing_grave(folder: Path, page: Any, axe: Path) -> None:
    faults = []
    for path in listed(folder):
        page.goto(path.as_uri())
        page.add_script_tag(path=axe)
        faults += [f"{path.relative_to(folder)}: {fault}" for fault in page.evaluate(GRAVE)]
    assert not faults, "\n".join(faults)


BROKEN = """<!DOCTYPE html><html lang="en"><title>Broken</title><main><h1>Broken</h1>
<div style="width: 1300px; background: grey">wide</div><details open><summary>Hint</summary>told</details>
<div style="overflow: hidden; width: 9em"><pre>print("a line of code that is too long")</pre></div>
<img src="https://example.org/a.png"></main></html>"""


def test_a_broken_page_is_found_out(chromium: Any, axe: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.html").write_text(BROKEN)
    for width in WIDTHS:
        page = chromium.new_page(viewport={"width": width, "height": 900})
        with pytest.raises(AssertionError) as fits:
            test_a_page_fits_is_folded_and_stays_at_home(tmp_path, page, tmp_path)
        for fault in ("sticks out", "cut off: <pre>", "open: <details", "asks for https://example.org"):
            assert fault in str(fits.value)
        with pytest.raises(AssertionError, match="image-alt"):
            test_axe_finds_nothing_grave(tmp_path, page, axe)
        page.close()
