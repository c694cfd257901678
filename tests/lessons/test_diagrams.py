"""The diagrams in the lessons are those that docs/diagrams.py draws."""

import base64
import importlib.util
import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("diagrams", ROOT / "docs" / "diagrams.py")
assert spec is not None
assert spec.loader is not None
diagrams = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diagrams)


def shown(path: Path) -> dict[str, bytes]:
    """Return the diagrams that the text cells of a lesson name, as they are attached."""
    cells = nbformat.read(path, as_version=4).cells
    return {name: base64.b64decode(cell.attachments[f"{name}.png"]["image/png"])
            for cell in cells if cell.cell_type == "markdown" for name in diagrams.named(cell.source)}


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("path", diagrams.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_lesson_carries_its_diagrams_as_they_are_drawn(path: Path) -> None:
    attached = shown(path)
    assert len(attached) >= 2
    for name, picture in attached.items():
        now, was = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)
                    for png in (diagrams.draw(name), picture))
        assert now.shape == was.shape, f"{name}: run python docs/diagrams.py"
        # 8 of 255 for the rounding of a phantom on another processor; one word is hundreds
        assert np.abs(now - was).max() <= 8, f"{name}: run python docs/diagrams.py"


def test_every_diagram_is_shown_once() -> None:
    assert sorted(name for path in diagrams.NOTEBOOKS for name in shown(path)) == sorted(diagrams.DIAGRAMS)
