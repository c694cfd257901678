"""The folder of lesson 1: made by its recorded command, and what it claims to hold."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genailab_helpers.datasets.audit import audit_images
from genailab_helpers.datasets.index import index_images

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "data" / "samples" / "faulty_chests"
PLANTED: dict[str, list[str]] = json.loads((FOLDER / "planted.json").read_text())


def files_of(root: Path) -> dict[str, Path]:
    return {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("pinned")
def test_the_recorded_command_makes_the_folder_again_and_it_is_small(tmp_path):
    subprocess.run([sys.executable, ROOT / "benchmarks" / "make_faulty_chests.py", tmp_path / "again"],
                   check=True)
    shipped, again = files_of(FOLDER), files_of(tmp_path / "again")
    assert shipped.keys() == again.keys()
    assert sum(path.stat().st_size for path in shipped.values()) < 2_000_000
    broken = PLANTED["unreadable"] + PLANTED["not an image"]
    for name, path in shipped.items():
        if path.suffix in (".png", ".jpg") and name not in broken:  # another zlib packs other bytes
            # Another make of processor rounds other last digits. From Intel to AMD, 11 images differed by one
            # level in one pixel, and a JPEG by one level in 22 pixels of the block where that pixel lies.
            rendered, kept = (np.asarray(Image.open(file)).astype(int) for file in (again[name], path))
            assert rendered.shape == kept.shape, name
            assert np.abs(rendered - kept).max() <= 1, name
            assert np.count_nonzero(rendered != kept) <= (3 if path.suffix == ".png" else 64), name
        elif name not in broken:
            assert path.read_bytes() == again[name].read_bytes(), name


def test_the_audit_finds_every_planted_fault_and_names_its_files():
    images = index_images(FOLDER)
    assert set(images["class"]) == {"Normal", "Pneumonia", "COVID", "unsorted"}
    assert set(images["split"]) == {"train", "val", "test"}
    found: dict[str, set[str]] = {}
    report = audit_images(images)
    for finding in report.findings:
        found.setdefault(finding.check, set()).update(finding.files)
    for check in set(PLANTED) - {"shortcut"}:
        assert set(PLANTED[check]) <= found[check], check
