"""The examples in docstrings and on pages run, and say what they show."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [path for path in sorted((ROOT / "genailab_helpers").rglob("*.py"))
           if ">>>" in path.read_text("utf-8")]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [(page.name, block) for page in PAGES for block in BLOCK.findall(page.read_text("utf-8"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_examples_of_a_module(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[page for page, _ in BLOCKS])
def test_examples_of_a_page(page: str, block: str) -> None:
    """With few images and one epoch in the place of many."""
    block = re.sub(r"n_samples=\d+", "n_samples=32", re.sub(r"n_epochs=\d+", "n_epochs=1", block))
    exec(compile(block, page, "exec"), {})


def test_there_are_examples() -> None:
    assert len(MODULES) >= 7
    assert BLOCKS
