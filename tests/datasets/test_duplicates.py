"""Near duplicates are found through every edit, strangers are not; on phantoms, and on real films."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genailab_helpers.datasets.duplicates import SIDE, DuplicatePair, find_duplicates, group_duplicates
from genailab_helpers.datasets.folders import cached_radiographs, list_radiographs, read_radiographs
from genailab_helpers.phantoms.chest import render_chests, sample_chests

_spec = importlib.util.spec_from_file_location("film_edits", Path(__file__).with_name("film_edits.py"))
assert _spec is not None
assert _spec.loader is not None
film_edits = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(film_edits)

STORED = 256  # px of the phantoms that are edited
N_PHANTOMS = 12


@pytest.fixture(scope="module")
def phantom_files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("phantoms")
    images = render_chests(sample_chests(N_PHANTOMS, seed=3), img_size=STORED).images
    files = [folder / f"{row:02d}.png" for row in range(N_PHANTOMS)]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(((image[0].numpy() + 1) * 127.5).round().astype(np.uint8)).save(file)
    return files


@pytest.fixture(scope="module")
def phantoms(phantom_files) -> torch.Tensor:
    return read_radiographs(phantom_files, SIDE)[0]


def _ends(pairs: list[DuplicatePair]) -> set[tuple[int, int]]:
    return {pair[:2] for pair in pairs}


@pytest.mark.parametrize("number", range(len(film_edits.EDITS)), ids=list(film_edits.EDITS))
def test_edited_phantoms_are_found(number, phantom_files, phantoms, tmp_path):
    edited = []
    for row, file in enumerate(phantom_files):  # one call a film: all get the same edit
        (tmp_path / str(row)).mkdir()
        edited += film_edits.edit_films([file], tmp_path / str(row), first_edit=number)
    name = edited[0][0]
    pairs = find_duplicates(torch.cat([phantoms, read_radiographs([file for _, file in edited], SIDE)[0]]))
    assert all(pair.second == pair.first + N_PHANTOMS for pair in pairs)
    assert len(pairs) >= film_edits.EDITS[name][1] * N_PHANTOMS  # the bars of the table
    for pair in pairs:
        assert pair.flipped == (name == "flip")
        assert pair.inverted == (name == "inversion")
        assert .9 < pair.similarity <= 1


def test_edits_change_films(phantom_files, tmp_path):
    for number, name in enumerate(film_edits.EDITS):
        (_, edited), = film_edits.edit_films(phantom_files[:1], tmp_path, first_edit=number)
        before, after = read_radiographs([phantom_files[0], edited], SIDE)[0]
        assert not torch.equal(before, after), name


def test_two_edits_at_once(phantoms):
    turned = -phantoms[:1].flip(-1)  # a mirror image and a negative
    pair, = find_duplicates(torch.cat([phantoms, turned]))
    assert pair[:2] == (0, N_PHANTOMS)
    assert pair.flipped
    assert pair.inverted


def test_the_frame_does_not_decide(phantoms):
    framed = phantoms.clone()
    framed[:, :, :6], framed[:, :, -6:], framed[:, :, :, :6], framed[:, :, :, -6:] = 1, 1, 1, 1
    framed[:, :, 8:14, 8:20] = 1
    assert find_duplicates(framed) == []  # strangers in one frame
    pair, = find_duplicates(torch.cat([phantoms, framed[:1]]))
    assert pair[:2] == (0, N_PHANTOMS)


def test_strangers_are_not_flagged():
    images = render_chests(sample_chests(150, seed=11), img_size=SIDE).images
    assert len({row for pair in find_duplicates(images) for row in pair[:2]}) <= 1  # 1 % of the films


def test_the_order_of_the_films_does_not_matter(phantoms):
    films = torch.cat([phantoms, phantoms[:4].flip(-1), -phantoms[4:6]])
    order = torch.randperm(len(films), generator=torch.Generator().manual_seed(5))
    pairs, permuted = find_duplicates(films), find_duplicates(films[order])
    back = {tuple(sorted(order[list(pair[:2])].tolist())): pair for pair in permuted}
    assert set(back) == _ends(pairs) == {(0, 12), (1, 13), (2, 14), (3, 15), (4, 16), (5, 17)}
    for pair in pairs:
        assert back[pair[:2]].similarity == pytest.approx(pair.similarity, abs=1e-3)
        assert back[pair[:2]][3:] == pair[3:]


def test_nothing_changes_on_a_second_run_or_in_the_input(phantoms):
    films = torch.cat([phantoms, phantoms[:4].flip(-1)])
    before = films.clone()
    assert find_duplicates(films) == find_duplicates(films)
    assert torch.equal(films, before)


def test_equal_films_are_paired_with_the_first(phantoms):
    films = torch.cat([phantoms[:3], phantoms[1:2], phantoms[1:2], phantoms[1:2].flip(-1)])
    pairs = find_duplicates(films)
    assert _ends(pairs) == {(1, 3), (1, 4), (1, 5)}
    assert pairs[:2] == [DuplicatePair(1, 3, 1., False, False), DuplicatePair(1, 4, 1., False, False)]
    assert group_duplicates(6, pairs) == [0, 1, 2, 1, 1, 1]


def test_blank_films_are_pairs_only_if_equal(phantoms):
    blank = torch.stack([torch.full((1, SIDE, SIDE), level) for level in (-1., 0., .3, 0.)])
    assert find_duplicates(torch.cat([phantoms[:2], blank])) == [DuplicatePair(3, 5, 1., False, False)]
    assert find_duplicates(blank[:3]) == []


@pytest.mark.parametrize("n_films", [1, 2])
def test_few_films(n_films, phantoms):
    assert find_duplicates(phantoms[:n_films]) == []


def test_two_copies_alone(phantoms):
    assert _ends(find_duplicates(torch.cat([phantoms[:1], phantoms[:1].flip(-1)]))) == {(0, 1)}


def test_films_of_another_size(phantom_files):
    images = read_radiographs(phantom_files[:3], STORED)[0]
    assert _ends(find_duplicates(torch.cat([images, images[2:].flip(-1)]))) == {(2, 3)}


def test_noise_is_nobodys_copy():
    noise = torch.rand(30, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    assert find_duplicates(noise) == []


def test_what_is_no_batch_is_refused(phantoms):
    with pytest.raises(ValueError, match="shape"):
        find_duplicates(phantoms[0])
    with pytest.raises(ValueError, match="values"):
        find_duplicates(phantoms * float("nan"))


def test_groups_are_joined_through_chains():
    pairs = [DuplicatePair(1, 4, .95, False, False), DuplicatePair(4, 6, .95, True, False),
             DuplicatePair(2, 3, .95, False, False)]
    assert group_duplicates(7, pairs) == [0, 1, 2, 2, 1, 5, 1]
    assert group_duplicates(3, []) == [0, 1, 2]
    assert group_duplicates(0, []) == []


@pytest.mark.slow
def test_real_films(real_data, tmp_path):
    """Each of 1,124 films edited once, 86 or 87 films an edit, searched in one go with the originals."""
    films = list_radiographs(real_data / "covid_1125")
    images = cached_radiographs(films, SIDE)[0]
    edited = film_edits.edit_films(films, tmp_path)
    pairs = find_duplicates(torch.cat([images, read_radiographs([file for _, file in edited], SIDE)[0]]))
    found = {pair.first for pair in pairs if pair.second == pair.first + len(films)}
    for name, (_, bar) in film_edits.EDITS.items():
        rows = {row for row, (edit, _) in enumerate(edited) if edit == name}
        assert len(rows & found) >= bar * len(rows), name
    # The originals alone: 4 films are 2 true pairs (00002658_001 and _002; two names of one COVID film).
    flagged = {films[row].stem for pair in pairs if pair.second < len(films) for row in pair[:2]}
    true = {stem for stem in flagged if stem.startswith(("00002658_00", "E63574A7", "F4341CE7"))}
    assert len(true) == 4
    assert len(flagged - true) <= .01 * len(films)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["knee_kl/val", "COVID-19_Radiography_Dataset"])
def test_other_films_are_not_flagged(folder, real_data):
    images = cached_radiographs(list_radiographs(real_data / folder), SIDE)[0]
    flagged = {row for pair in find_duplicates(images) for row in pair[:2]}
    assert len(flagged) <= .01 * len(images)


@pytest.mark.slow
def test_copies_under_other_cases_are_found(real_data):
    """Two cases of the spine set hold the same four films, differently exposed and cropped (seen by eye)."""
    films = list_radiographs(real_data / "spine_ap")
    pairs = find_duplicates(cached_radiographs(films, SIDE)[0])
    found = {frozenset((films[pair.first].stem, films[pair.second].stem)) for pair in pairs}
    assert {frozenset((f"case118_{view}", f"case119_{view}")) for view in range(4)} <= found
