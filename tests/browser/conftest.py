"""Chromium, the pages that it looks at, and a place for screenshots."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from genailab_helpers.commands.pages import export_page

ROOT = Path(__file__).parents[2]
AXE = "4.14.1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser of this machine, driven by playwright, which downloads none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: the extra `browser`")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("needs Chromium or Chrome; on Debian: apt install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def screenshots() -> Path:
    folder = ROOT / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make site` builds it."""
    folder = tmp_path_factory.mktemp("pages") / "site"
    done = subprocess.run([sys.executable, ROOT / "docs/site/build.py", folder], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def run_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of `genailab run`: the index of a run of titles alone, and the lessons as recorded."""
    short, folder = tmp_path_factory.mktemp("titles"), tmp_path_factory.mktemp("pages") / "run"
    lessons = {path.stem: nbformat.read(path, as_version=4)
               for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}
    for name, lesson in lessons.items():
        nbformat.write(nbformat.v4.new_notebook(cells=lesson.cells[:1]), short / f"{name}.ipynb")
    subprocess.run([sys.executable, "-m", "genailab_helpers.commands", "run", *sorted(short.iterdir()),
                    "--output", folder], check=True, capture_output=True)
    for name, lesson in lessons.items():
        (folder / f"{name}.html").write_text(export_page(lesson, name), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def axe() -> Path:
    """The script of axe-core, which looks for what keeps people from reading a page."""
    script = ROOT / "build" / "axe" / AXE / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists():
        if not shutil.which("npm"):
            pytest.skip("needs npm, to get axe-core")
        subprocess.run(["npm", "install", "--prefix", script.parents[2], "--ignore-scripts", "--no-audit",
                        "--no-fund", f"axe-core@{AXE}"], check=True, capture_output=True)
    return script
