"""Near duplicates are found through every edit, strangers are not; on phantoms, and on real images."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from genailab_helpers.datasets.duplicates import SIDE, DuplicatePair, find_duplicates
from genailab_helpers.datasets.folders import read_images
from genailab_helpers.datasets.index import index_images
from genailab_helpers.phantoms.chest import render_chests, sample_chests

N_PHANTOMS = 12


@pytest.fixture(scope="module")
def film_edits(load_script):
    return load_script("film_edits")


@pytest.fixture(scope="module")
def files(tmp_path_factory, write) -> list[Path]:
    """Phantoms of 256 px, which are edited at that size."""
    folder = tmp_path_factory.mktemp("phantoms")
    images = render_chests(sample_chests(N_PHANTOMS, seed=3), img_size=256).images
    return [write(folder / f"{row:02d}.png", image) for row, image in enumerate(images)]


def read(folder: Path) -> torch.Tensor:
    return read_images(index_images(folder), SIDE)[0]


@pytest.fixture
def phantoms(files) -> torch.Tensor:
    return read(files[0].parent)


def _ends(pairs: list[DuplicatePair]) -> set[tuple[int, int]]:
    return {pair[:2] for pair in pairs}


def test_edited_phantoms_are_found(film_edits, files, phantoms, tmp_path):
    for name, (_, recall) in film_edits.EDITS.items():
        film_edits.edit_images(files, tmp_path / name, [name])
        edited = read(tmp_path / name)
        assert not (edited == phantoms).all(), name
        pairs = find_duplicates(torch.cat([phantoms, edited]))
        assert all(pair.second == pair.first + N_PHANTOMS for pair in pairs), name
        assert len(pairs) >= recall * N_PHANTOMS, name
        for pair in pairs:
            assert pair.flipped == (name == "flip")
            assert pair.inverted == (name == "inversion")
            assert .9 < pair.similarity <= 1


def test_the_frame_does_not_decide(phantoms):
    framed = phantoms.clone()
    framed[:, :, :6], framed[:, :, -6:], framed[:, :, :, :6], framed[:, :, :, -6:] = 1, 1, 1, 1
    framed[:, :, 8:14, 8:20] = 1
    assert find_duplicates(framed) == []  # strangers in one frame
    assert _ends(find_duplicates(torch.cat([phantoms, framed[:1]]))) == {(0, N_PHANTOMS)}


def test_strangers_and_noise_are_not_flagged():
    images = render_chests(sample_chests(150, seed=11), img_size=SIDE).images
    assert len({row for pair in find_duplicates(images) for row in pair[:2]}) <= 1  # 1 % of the images
    noise = torch.rand(30, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    assert find_duplicates(noise) == []


def test_neither_order_nor_repetition_matters_and_the_input_stays(phantoms):
    images = torch.cat([phantoms, phantoms[:4].flip(-1), -phantoms[4:6]])
    before = images.clone()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(5))
    pairs, permuted = find_duplicates(images), find_duplicates(images[order])
    back = {tuple(sorted(order[list(pair[:2])].tolist())): pair for pair in permuted}
    assert set(back) == _ends(pairs) == {(0, 12), (1, 13), (2, 14), (3, 15), (4, 16), (5, 17)}
    for pair in pairs:
        assert back[pair[:2]].similarity == pytest.approx(pair.similarity, abs=1e-3)
        assert back[pair[:2]][3:] == pair[3:]
    assert find_duplicates(images) == pairs
    assert torch.equal(images, before)


def test_equal_images_are_paired_with_the_first(phantoms):
    images = torch.cat([phantoms[:3], phantoms[1:2], phantoms[1:2], phantoms[1:2].flip(-1)])
    pairs = find_duplicates(images)
    assert _ends(pairs) == {(1, 3), (1, 4), (1, 5)}
    assert pairs[:2] == [DuplicatePair(1, 3, 1., False, False), DuplicatePair(1, 4, 1., False, False)]


def test_blank_images_are_pairs_only_if_equal(phantoms):
    blank = torch.stack([torch.full((1, SIDE, SIDE), level) for level in (-1., 0., .3, 0.)])
    assert find_duplicates(torch.cat([phantoms[:2], blank])) == [DuplicatePair(3, 5, 1., False, False)]
    assert find_duplicates(blank[:3]) == []


def test_pale_images_whose_detail_jpeg_has_taken_are_found(files, phantoms, tmp_path):
    for file in files:
        with Image.open(file) as image:
            image.point(lambda level: 76 + 0.4 * level).save(tmp_path / f"{file.stem}.jpg", quality=30)
    pale = 0.4 * phantoms
    pairs = find_duplicates(torch.cat([pale, read(tmp_path)]))
    assert _ends(pairs) == {(row, row + N_PHANTOMS) for row in range(N_PHANTOMS)}


@pytest.mark.slow
def test_real_images(film_edits, real_data, tmp_path):
    """Each of 1,124 images edited once, 86 or 87 images an edit, searched in one go with the originals."""
    images = index_images(real_data / "covid_1125")
    edits = film_edits.edit_images(images["path"], tmp_path / "edited")
    pairs = find_duplicates(torch.cat([read_images(images, SIDE)[0], read(tmp_path / "edited")]))
    found = {pair.first for pair in pairs if pair.second == pair.first + len(images)}
    for name, (_, bar) in film_edits.EDITS.items():
        rows = {row for row, edit in enumerate(edits) if edit == name}
        assert len(rows & found) >= bar * len(rows), name
    # The originals alone: 4 images are 2 true pairs (00002658_001 and _002; two names of one COVID image).
    stems = [Path(name).stem for name in images.index]
    flagged = {stems[row] for pair in pairs if pair.second < len(images) for row in pair[:2]}
    true = {stem for stem in flagged if stem.startswith(("00002658_00", "E63574A7", "F4341CE7"))}
    assert len(true) == 4
    assert len(flagged - true) <= .01 * len(images)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["knee_kl/val", "COVID-19_Radiography_Dataset"])
def test_other_images_are_not_flagged(folder, real_data):
    images = read(real_data / folder)
    flagged = {row for pair in find_duplicates(images) for row in pair[:2]}
    assert len(flagged) <= .01 * len(images)
