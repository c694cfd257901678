"""Every lesson in JupyterLab: all cells run, no error is shown, and keys move each control and its figure."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
LESSONS = [path.stem for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))]
PATIENCE = 1200  # seconds; a lesson takes 20 to 100 on a quiet machine
PROMPTS = "() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.innerText)"
FAULTS = """() => [...document.querySelectorAll(
    "[data-mime-type$='jupyter.error'], [data-mime-type$='jupyter.stderr']")]
  .map(e => e.innerText.slice(0, 300))"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab on a copy of the lessons without outputs, with settings of its own."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "data" / "samples", folder / "clone" / "data" / "samples")
    (folder / "clone" / "notebooks").mkdir()
    for name in LESSONS:
        lesson = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        for cell in lesson.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(lesson, folder / "clone" / "notebooks" / f"{name}.ipynb")
    settings = folder / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # else cells out of sight are not in the page
    own = {"JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_CONFIG_DIR": "config", "IPYTHONDIR": "ipython",
           "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
           "GENAILAB_CACHE": "cache", "MPLCONFIGDIR": "matplotlib"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0",
               "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={folder / 'clone'}",
               "--IdentityProvider.token=secret",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log,
                                  env=os.environ | {name: str(folder / own[name]) for name in own})
        try:
            for _ in range(300):
                time.sleep(0.3)
                if started := list((folder / "runtime").glob("jpserver-*.json")):
                    break
            time.sleep(1)
            yield json.loads(started[0].read_text())["url"]
        finally:
            server.terminate()
            server.wait()


@pytest.fixture
def page(chromium: Any, lab: str) -> Iterator[Any]:
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    yield page
    page.close()
    header = {"Authorization": "token secret"}
    with urllib.request.urlopen(urllib.request.Request(f"{lab}api/sessions", headers=header)) as answer:
        for session in json.load(answer):  # a kernel keeps its memory
            urllib.request.urlopen(urllib.request.Request(
                f"{lab}api/sessions/{session['id']}", headers=header, method="DELETE")).close()


def run_all(page: Any, lab: str, name: str) -> None:
    """Open a notebook and run all its cells."""
    page.goto(f"{lab}lab/tree/notebooks/{name}.ipynb?token=secret&reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)  # before, it asks for a kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    for running, seconds in ((True, 30), (False, PATIENCE)):
        end = time.monotonic() + seconds
        while any("*" in prompt for prompt in page.evaluate(PROMPTS)) is not running:
            assert time.monotonic() < end, page.evaluate(PROMPTS)
            page.wait_for_timeout(500)


def picture(group: Any) -> str | None:
    """Give the image that a widget shows; it shows a text instead where its drawing stopped with an error."""
    figure = group.query_selector("img")
    return figure and figure.get_attribute("src")


def move(page: Any, control: Any, group: Any) -> None:
    """Move one control by keyboard, and wait until the figure beside it has changed."""
    before = picture(group)
    if control.evaluate("e => e.matches('.noUi-handle')"):
        now, most = (float(control.get_attribute(f"aria-value{end}")) for end in ("now", "max"))
        keys = ["ArrowLeft" if now >= most else "ArrowRight"]
    elif control.evaluate("e => e.tagName == 'SELECT'"):
        # Space opens the menu: JupyterLab takes arrows from a closed one, and goes to the next cell.
        last = control.evaluate("e => e.selectedIndex == e.length - 1")
        keys = ["Space", "ArrowUp" if last else "ArrowDown", "Enter"]
    else:
        keys = ["Space"]
    control.focus()
    for key in keys:
        page.keyboard.press(key)
        page.wait_for_timeout(300)
    for _ in range(600):
        if picture(group) != before:
            break
        page.wait_for_timeout(100)
    moved = control.evaluate("e => e.outerHTML")
    assert picture(group) not in (before, None), f"{group.inner_text()}: {moved}"


@pytest.mark.parametrize("name", LESSONS)
def test_lesson(name: str, page: Any, lab: str, screenshots: Path) -> None:
    said: list[str] = []
    page.on("console", lambda message: message.type == "error" and said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    run_all(page, lab, name)
    assert page.evaluate(FAULTS) == []
    assert all(prompt.strip("[]: ").isdigit() for prompt in page.evaluate(PROMPTS) if prompt)  # folded: ""
    widget = ".jp-OutputArea-output .widget-hbox:has(> .widget-vbox):has(img)"
    page.wait_for_selector(f"{widget} :is(.noUi-handle, select)")
    for i, group in enumerate(page.query_selector_all(widget), 1):
        controls = group.query_selector_all(".noUi-handle, select, input[type=checkbox]")
        assert controls
        for control in reversed(controls):  # in lesson 2 a severity shows only once a finding is chosen
            move(page, control, group)
        group.scroll_into_view_if_needed()
        page.screenshot(path=screenshots / f"lab_{name}_{i}.png")
    images = "[...document.querySelectorAll('.jp-RenderedMarkdown img')]"
    shown = page.evaluate(f"{images}.map(image => image.naturalWidth)")
    assert len(shown) >= 2
    assert all(shown)
    # JupyterLab puts an attachment on the page by its name first, and its data after that
    assert [text for text in said if "ERR_UNKNOWN_URL_SCHEME" not in text] == []
