"""Images of a lesson from a folder: no patient is on both sides, and a split that is there is kept."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from genailab_helpers.datasets.index import image_hashes
from genailab_helpers.lessons.sources import chest_parts

SIZE = 16


def write(folder: Path, patient: int, visit: int, grey: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("L", (SIZE, SIZE), grey).save(folder / f"{patient:08d}_{visit:03d}.png")


def greys(images: torch.Tensor) -> set[int]:
    return set(((images.amax((1, 2, 3)) + 1) * 127.5).round().int().tolist())


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_of_a_folder_is_on_both_sides(tmp_path: Path, own_cache: Path, seed: int) -> None:
    """Every image of a patient has the grey of that patient."""
    for patient in range(20):
        for visit in range(4):
            write(tmp_path / ("Normal" if patient % 2 else "COVID"), patient, visit, 10 * patient + 20)
    parts = chest_parts(tmp_path, SIZE, n_train=80, n_held_out=80, seed=seed)
    assert len(parts.images) + len(parts.held_out) == 80
    assert len(greys(parts.held_out)) == 6  # three of ten patients
    assert not greys(parts.images) & greys(parts.held_out)
    assert parts.kind == "real"
    assert parts.classes == ["Normal", "COVID"]


def test_a_split_that_is_there_is_kept(tmp_path: Path, own_cache: Path) -> None:
    for part, grey in (("train", 40), ("test", 200)):
        for patient in range(4):
            write(tmp_path / part / ("Normal" if patient % 2 else "COVID"), patient + grey, 0, grey + patient)
    parts = chest_parts(tmp_path, SIZE, n_train=4, n_held_out=4, seed=0, labels=True)
    assert greys(parts.images) <= set(range(40, 44))
    assert greys(parts.held_out) == set(range(200, 204))
    assert len(parts.images) == len(parts.labels) == 4


def test_phantoms_of_both_sides_differ() -> None:
    parts = chest_parts(None, SIZE, n_train=6, n_held_out=4, seed=3, labels=True)
    assert (len(parts.images), len(parts.held_out), parts.kind) == (6, 4, "phantoms")
    assert not set(image_hashes(parts.images)) & set(image_hashes(parts.held_out))
