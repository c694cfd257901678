"""What a generator has seen is known by what the films show, however they were stored."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from genailab_helpers.datasets.manifests import check_manifest, film_hashes
from genailab_helpers.radiographs import read_radiograph


def films(n: int, seed: int) -> Tensor:
    return torch.rand((n, 1, 24, 20), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_film_keeps_its_name_in_a_file(tmp_path: Path) -> None:
    drawn = films(4, 0)
    stored = []
    for i, film in enumerate(drawn):
        Image.fromarray(((film[0] + 1) * 127.5).round().byte().numpy()).save(tmp_path / f"{i}.png")
        stored.append(read_radiograph(tmp_path / f"{i}.png"))
    assert film_hashes(torch.stack(stored)) == film_hashes(drawn)


def test_other_films_and_other_shapes_have_other_names() -> None:
    drawn = films(6, 0)
    changed = drawn.clone()
    changed[0, 0, 3, 3] = -changed[0, 0, 3, 3].sign()
    names = [*film_hashes(drawn), film_hashes(changed)[0], *film_hashes(drawn.mT.contiguous())]
    assert len(set(names)) == 13
    assert film_hashes(drawn.reshape(6, 1, 20, 24))[0] not in names  # same bytes, other shape


def test_a_film_of_another_part_is_a_leak() -> None:
    train, val, test = films(5, 1), films(4, 2), films(4, 3)
    check_manifest(film_hashes(train), train, val=val, test=test)
    check_manifest(film_hashes(train[:3]), train, val=val, test=test)  # fewer than there are is no leak
    with pytest.raises(ValueError, match="test: the generator has seen 2 of its 4 films"):
        check_manifest(film_hashes(torch.cat([train, test[:2]])), train, val=val, test=test)
    with pytest.raises(ValueError, match="val: the generator has seen 1 of its 4 films"):
        check_manifest(film_hashes(torch.cat([train, val[-1:]])), torch.cat([train, val[-1:]]), val=val)


def test_a_film_of_nowhere_is_named_too() -> None:
    train = films(5, 1)
    with pytest.raises(ValueError, match="1 of 6 films are none of the training"):
        check_manifest(film_hashes(torch.cat([train, films(1, 9)])), train, test=films(3, 2))
