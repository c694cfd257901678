"""What a generator has seen is known by what the images show, however they were stored."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genailab_helpers.datasets.index import image_hashes
from genailab_helpers.radiographs import read_radiograph


def noise(n: int, seed: int) -> Tensor:
    return torch.rand((n, 1, 24, 20), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_an_image_keeps_its_name_in_a_file(tmp_path: Path, write: Callable[..., Path]) -> None:
    images = noise(4, 0)
    stored = [read_radiograph(write(tmp_path / f"{i}.png", image)) for i, image in enumerate(images)]
    assert image_hashes(torch.stack(stored)) == image_hashes(images)


def test_other_images_and_other_shapes_have_other_names() -> None:
    images = noise(6, 0)
    changed = images.clone()
    changed[0, 0, 3, 3] = -changed[0, 0, 3, 3].sign()
    names = [*image_hashes(images), image_hashes(changed)[0], *image_hashes(images.mT.contiguous())]
    assert len(set(names)) == 13
    assert image_hashes(images.reshape(6, 1, 20, 24))[0] not in names  # same bytes, other shape
    with pytest.raises(ValueError, match="0 to 255"):
        image_hashes(images * 255)
