"""Raw folders become data sets: nothing lost, nothing mixed, patients whole, shares kept, kills survived."""

import csv
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from genailab_helpers.datasets import duplicates, preparation
from genailab_helpers.datasets.catalog import GRADES, SPLITS
from genailab_helpers.datasets.folders import TABLE, RadiographFolder, index_films
from genailab_helpers.datasets.preparation import (
    TOLERANCE,
    assign_splits,
    create_structure,
    organize,
    preprocess,
    split,
    write_labels,
)
from genailab_helpers.diffusion.datasets import ChestXRayDataset
from genailab_helpers.radiographs import read_radiograph

bounded = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_film(path: Path, seed: int = 0, size: tuple[int, int] = (24, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path


def write_films(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        write_film(root / name, seed)
    return root


def bytes_below(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*")) if path.is_file()}


def rows_of(root: Path) -> list[dict[str, str]]:
    with (root / TABLE).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------------- assign_splits

def excess(labels: list[str], chosen: list[str], ratios: tuple[float, ...]) -> float:
    """Sum what is off beyond the tolerance, written apart from the code under test."""
    totals, held = Counter(labels), Counter(zip(labels, chosen, strict=True))
    return sum(max(0.0, abs(held[label, name] / totals[label] - share) - TOLERANCE)
               for label in totals for name, share in zip(SPLITS, ratios, strict=True) if share > 0)


def films_of(patients: list[list[str]]) -> tuple[list[str], list[str]]:
    """Lay out patients, each a list of its films' classes, as labels and groups."""
    labels = [label for films in patients for label in films]
    return labels, [f"p{i}" for i, films in enumerate(patients) for _ in films]


some_ratios = st.sampled_from([(0.7, 0.15, 0.15), (0.5, 0.25, 0.25), (0.6, 0.4, 0.0), (0.0, 0.5, 0.5),
                               (1.0, 0.0, 0.0)])
some_patients = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=30)


@bounded
@given(some_patients, some_ratios, st.integers(0, 99), st.randoms(use_true_random=False))
def test_groups_stay_whole_in_any_listing_order(
        patients: list[list[str]], ratios: tuple[float, ...], seed: int, order: random.Random) -> None:
    labels, groups = films_of(patients)
    chosen = assign_splits(labels, groups, ratios, seed)
    assert len(set(zip(groups, chosen, strict=True))) == len(set(groups))
    assert not {name for name, share in zip(SPLITS, ratios, strict=True) if share == 0} & set(chosen)
    shuffled = list(range(len(labels)))
    order.shuffle(shuffled)
    again = assign_splits([labels[i] for i in shuffled], [groups[i] for i in shuffled], ratios, seed)
    assert again == [chosen[i] for i in shuffled]


@bounded
@given(st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=5), min_size=1, max_size=6), some_ratios)
def test_no_assignment_of_few_groups_is_better(
        patients: list[list[str]], ratios: tuple[float, ...]) -> None:
    labels, groups = films_of(patients)
    used = [name for name, share in zip(SPLITS, ratios, strict=True) if share > 0]
    best = min(excess(labels, [way[int(group[1:])] for group in groups], ratios)
               for way in itertools.product(used, repeat=len(patients)))
    assert excess(labels, assign_splits(labels, groups, ratios), ratios) == pytest.approx(best, abs=1e-6)


@bounded
@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6), min_size=1, max_size=12),
       st.randoms(use_true_random=False))
def test_shares_are_kept_where_that_is_possible(patients: list[list[str]], order: random.Random) -> None:
    films = [label for patient in patients for label in patient]
    everyone = list(patients)  # val has these films; test and each half of train the same, cut differently
    for _ in range(3):
        order.shuffle(films)
        cuts = sorted(order.sample(range(1, len(films)), order.randint(0, len(films) - 1)))
        everyone += [films[a:b] for a, b in itertools.pairwise([0, *cuts, len(films)])]
    labels, groups = films_of(everyone)
    assert excess(labels, assign_splits(labels, groups, (0.5, 0.25, 0.25)), (0.5, 0.25, 0.25)) == 0


def test_another_seed_draws_others_and_large_groups_go_everywhere() -> None:
    patients = [["a"] * (10 if i < 20 else 1) for i in range(220)]
    labels, groups = films_of(patients)
    first, second = (assign_splits(labels, groups, seed=seed) for seed in (1, 2))
    assert first != second
    large = Counter(name for group, name in set(zip(groups, first, strict=True)) if int(group[1:]) < 20)
    assert large == {"train": 14, "val": 3, "test": 3}  # 70, 15 and 15 % of the 20


def test_nih_sized_set_within_ten_seconds() -> None:
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.zipf(1.6, 30_805), 184)  # skewed as there: at most 184 films of one patient
    while (missing := 112_120 - sizes.sum()) > 0:
        sizes[rng.integers(len(sizes), size=min(missing, 1000))] += 1
    while (surplus := sizes.sum() - 112_120) > 0:
        where = rng.integers(len(sizes), size=min(surplus, 1000))
        sizes[where] = np.maximum(1, sizes[where] - 1)
    weights = 1 / np.arange(1, 16) ** 2
    patients = np.repeat(np.arange(len(sizes)), sizes)
    favourite = rng.choice(15, len(sizes), p=weights / weights.sum())[patients]
    other = rng.choice(15, len(patients), p=weights / weights.sum())
    labels = [f"class {i:02}" for i in np.where(rng.random(len(patients)) < 0.4, favourite, other)]
    groups = [f"{i:08}" for i in patients]
    assert len(labels) == 112_120
    start = time.perf_counter()
    chosen = assign_splits(labels, groups)
    assert time.perf_counter() - start < 10
    assert len(set(zip(groups, chosen, strict=True))) == 30_805
    assert excess(labels, chosen, preparation.RATIOS) == 0


@pytest.mark.parametrize("ratios", [(0.7, 0.3), (0.7, 0.2, 0.2), (1.2, -0.1, -0.1), (0.0, 0.0, 0.0)])
def test_ratios_that_are_none(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        assign_splits(["a"], ["p"], ratios)


# ------------------------------------------------------------------------------------------ create, organize

def test_create_makes_the_tree_and_organize_fills_such_a_tree(tmp_path: Path) -> None:
    create_structure(tmp_path / "dataset", ["3", "grade 0", "Severe"])
    made = {path.relative_to(tmp_path / "dataset").as_posix() for path in (tmp_path / "dataset").glob("*/*")}
    assert made == {f"{part}/{GRADES[i]}" for part in SPLITS for i in (0, 3, 4)}
    create_structure(tmp_path / "dataset", ["NORMAL"])
    assert sorted(path.name for path in (tmp_path / "dataset" / "val").iterdir()) == ["Normal"]
    organize(write_films(tmp_path / "raw", "0/a.png"), tmp_path / "dataset")
    assert set(bytes_below(tmp_path / "dataset")) == {"grade_0/a.png", TABLE}
    with pytest.raises(FileExistsError, match="holds files"):
        create_structure(tmp_path / "dataset", ["Normal"])
    with pytest.raises(ValueError, match="names that a folder can have"):
        create_structure(tmp_path / "other", ["a/b"])


def test_organize_maps_names_and_keeps_splits_where_all_films_have_one(tmp_path: Path) -> None:
    raw = write_films(tmp_path / "raw", "training/Covid-19/a.png", "valid/Viral/images/b.png",
                      "test/No_findings/deep/er/c.png", "valid/Viral/masks/b.png", "test/NORMAL/.c.png")
    summary = organize(raw, tmp_path / "out")
    assert set(bytes_below(tmp_path / "out")) == {
        "train/COVID/a.png", "val/Viral Pneumonia/b.png", "test/Normal/c.png", TABLE}
    assert not summary.left_out
    write_film(raw / "Lung" / "d.png")
    assert "dropped" in str(organize(raw, tmp_path / "out", replace=True))
    assert set(bytes_below(tmp_path / "out")) == {
        "COVID/a.png", "Viral Pneumonia/b.png", "Normal/c.png", "Lung_Opacity/d.png", TABLE}


part = st.sampled_from(["NORMAL", "normal", "Covid-19", "COVID", "images", "x", "X", "train", "masks",
                        ".hidden"])
name = st.sampled_from(["a.png", "A.png", "a.PNG", "a.jpg", "b.png", "a__x.png", "a__NORMAL.png",
                        "a__x-x.png", "notes.txt", ".a.png"])


@bounded
@given(st.sets(st.tuples(st.lists(part, max_size=3).map("/".join), name), min_size=1, max_size=14))
def test_every_film_is_in_the_output_once_or_listed(places: set[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder, "raw"), Path(folder, "out")
        names = {f"{place}/{film}".lstrip("/") for place, film in places}
        for film in names:
            (raw / film).parent.mkdir(parents=True, exist_ok=True)
            (raw / film).write_bytes(film.encode())
        before = bytes_below(raw)
        visible = {film for film in names
                   if not any(part.startswith(".") or part == "masks" for part in film.split("/"))}
        films = {film for film in visible if not film.endswith(".txt")}
        placeable = {film for film in films
                     if {"NORMAL", "normal", "Covid-19", "COVID"} & set(film.split("/")[:-1])}
        if not placeable:
            with pytest.raises(ValueError, match=r"no films|no radiographs|empty folder|known class"):
                organize(raw, out)
            assert not out.exists()
            return
        summary = organize(raw, out)
        written = bytes_below(out)
        table = written.pop(TABLE).decode().splitlines()[1:]
        assert sorted(content.decode() for content in written.values()) == sorted(placeable)
        assert sorted(itertools.chain(*summary.left_out.values())) == sorted(visible - placeable)
        assert len({place.casefold() for place in written}) == len(written)
        sources = {row.split(",")[0]: row.split(",")[-1] for row in table}
        assert sources == {place: content.decode() for place, content in written.items()}
        assert bytes_below(raw) == before


@bounded
@given(st.lists(st.tuples(name, part, st.integers(0, 999).map(str)), unique_by=lambda film: film[2]),
       st.randoms(use_true_random=False))
def test_names_do_not_depend_on_listing_order(
        films: list[tuple[str, str, str]], order: random.Random) -> None:
    names = dict(zip(films, preparation._names_apart(films), strict=True))
    assert len({name.casefold() for name in names.values()}) == len(films)
    shuffled = order.sample(films, len(films))
    assert dict(zip(shuffled, preparation._names_apart(shuffled), strict=True)) == names


def test_namesakes_keep_the_start_that_tells_the_patient(tmp_path: Path) -> None:
    raw = write_films(tmp_path / "raw", "1/PNEUMONIA/person7_virus_1.png", "2/PNEUMONIA/person7_virus_1.png")
    organize(raw, tmp_path / "out", classes=["PNEUMONIA"])
    assert set(bytes_below(tmp_path / "out")) == {
        "Pneumonia/person7_virus_1__1-PNEUMONIA.png", "Pneumonia/person7_virus_1__2-PNEUMONIA.png", TABLE}
    assert {film.patient for film in index_films(tmp_path / "out")} == {"person7"}


def test_organize_by_a_table(tmp_path: Path) -> None:
    raw = write_films(tmp_path / "set" / "raw", "a.png", "x/b.png", "c.png", "d.png", "x/e.png", "y/e.png",
                      "f.png", "g.png", "h.png", "i.png")
    (raw / "notes.txt").write_text("no film")
    table = tmp_path / "set" / "labels.csv"
    table.write_text("Image Index,Finding Labels,Patient ID\n"
                     "a.png,0,P1\n"  # below the input
                     "raw\\x\\b.png,grade 1,P1\n"  # below the folder of the table
                     "elsewhere/c.png,Healthy,\n"  # the name alone
                     "d,4,P2\n"  # the stem alone
                     "e.png,1,P3\n"  # two such films
                     "f.png,0,P4\nf.png,1,P4\n"  # two classes
                     "g.png,1|2,P5\n"  # no class
                     "h.png,Own Class,P6\nh.png,Own Class,P6\n"  # twice the same is no contradiction
                     "absent.png,0,P7\n")
    summary = organize(raw, tmp_path / "out", table)
    rows = {row["source"]: (row["file"], row["patient"]) for row in rows_of(tmp_path / "out")}
    assert rows == {"a.png": ("grade_0/a.png", "P1"), "x/b.png": ("grade_1/b.png", "P1"),
                    "c.png": ("grade_0/c.png", ""), "d.png": ("grade_4/d.png", "P2"),
                    "h.png": ("Own Class/h.png", "P6")}
    assert summary.left_out == {
        "table rows that fit several films": ["line 6 (e.png)"],
        "table rows without their film": ["line 12 (absent.png)"],
        "in the table twice and differently": ["f.png"],
        "not in the table, or there with two classes": ["f.png", "i.png", "x/e.png", "y/e.png"],
        "no known class in the table": ["g.png"], "not a film": ["notes.txt"]}
    again = organize(raw, tmp_path / "few", table, classes=["0"])
    assert again.counts == {("grade_0", ""): 2}
    assert again.left_out["no known class in the table"] == ["d.png", "g.png", "h.png", "x/b.png"]


# ----------------------------------------------------------------------------------------------- preprocess

def test_preprocess_makes_one_kind_of_film_of_all(tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "COVID"
    raw.mkdir(parents=True)
    grey = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))
    film = Image.fromarray(grey)
    film.save(raw / "l.png")
    film.convert("RGB").save(raw / "rgb.png")
    film.convert("RGBA").save(raw / "rgba.tif")
    film.convert("LA").save(raw / "la.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(raw / "deep.png")
    preprocess(tmp_path / "raw", tmp_path / "out", 32)
    written = sorted((tmp_path / "out" / "COVID").iterdir())
    assert [path.name for path in written] == ["deep.png", "l.png", "la.png", "rgb.png", "rgba.png"]
    expected = 127.5 * (read_radiograph(raw / "l.png", 32)[0].numpy() + 1)
    for path in written:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))
            assert np.abs(np.asarray(image) - expected).max() <= 1, path.name


def test_letterbox_keeps_the_aspect_and_squash_fills(tmp_path: Path) -> None:
    (tmp_path / "raw" / "Normal").mkdir(parents=True)
    Image.new("L", (40, 80), 255).save(tmp_path / "raw" / "Normal" / "tall.png")
    Image.new("L", (80, 20), 255).save(tmp_path / "raw" / "Normal" / "wide.png")
    preprocess(tmp_path / "raw", tmp_path / "box", 32)
    preprocess(tmp_path / "raw", tmp_path / "full", 32, "squash")
    tall, wide = (read_radiograph(tmp_path / "box" / "Normal" / name)[0] for name in ("tall.png", "wide.png"))
    assert torch.equal(tall == 1, torch.zeros(32, 32).index_fill(1, torch.arange(8, 24), 1).bool())
    assert torch.equal(wide == 1, torch.zeros(32, 32).index_fill(0, torch.arange(12, 20), 1).bool())
    assert set(torch.cat([tall, wide]).unique().tolist()) == {-1, 1}
    assert read_radiograph(tmp_path / "full" / "Normal" / "tall.png").min() == 1


def test_crop_keeps_the_middle_square_whatever_the_shape(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    film = np.zeros((60, 100), np.uint8)
    film[:, 20:80] = np.arange(60, dtype=np.uint8)[:, None] * 4
    Image.fromarray(film).save(tmp_path / "raw" / "wide.png")
    Image.fromarray(film.T).save(tmp_path / "raw" / "tall.png")
    preprocess(tmp_path / "raw", tmp_path / "out", 60, "crop")
    for name, expected in (("wide", film[:, 20:80]), ("tall", film[:, 20:80].T)):
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert np.array_equal(np.asarray(image), expected), name


@pytest.mark.parametrize("fit", ["letterbox", "squash", "crop"])
def test_reduction_is_antialiased(tmp_path: Path, fit: str) -> None:
    (tmp_path / "raw").mkdir()
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "raw" / "stripes.png")
    preprocess(tmp_path / "raw", tmp_path / "out", 32, fit)  # type: ignore[arg-type]
    inner = read_radiograph(tmp_path / "out" / "stripes.png")[..., 2:-2]
    assert inner.abs().max() < 0.05  # every pixel averages eight columns; a plain pick would give -1 or 1


def test_preprocess_lists_what_it_cannot_read_and_tells_namesakes_apart(tmp_path: Path) -> None:
    raw = write_films(tmp_path / "raw", "NORMAL/x.png", "NORMAL/x.jpg", "NORMAL/y.png")
    (raw / "NORMAL" / "broken.png").write_bytes((raw / "NORMAL" / "y.png").read_bytes()[:200])
    before = bytes_below(raw)
    summary = preprocess(raw, tmp_path / "out", 16)
    assert set(bytes_below(tmp_path / "out")) == {
        "NORMAL/x__png.png", "NORMAL/x__jpg.png", "NORMAL/y.png", TABLE}
    assert summary.counts == {("Normal", ""): 3}
    (listed,) = summary.left_out["cannot be read"]
    assert listed.startswith("NORMAL/broken.png: damaged")
    assert bytes_below(raw) == before
    for path in list(raw.rglob("*.*g")):
        path.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="none of 4 films can be read"):
        preprocess(raw, tmp_path / "none", 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


# ---------------------------------------------------------------------------------------------------- split

@pytest.fixture
def organized(tmp_path: Path) -> Path:
    """40 normal films of 20 patients and 20 of COVID, each of its own patient."""
    return write_films(tmp_path / "organized", *(f"Normal/IM-{i // 2:04}-{i:04}.png" for i in range(40)),
                       *(f"COVID/{i}.png" for i in range(20)))


def test_split_keeps_shares_and_patients(organized: Path, tmp_path: Path) -> None:
    summary = split(organized, tmp_path / "out", near_duplicates=False)
    assert summary.counts == {("Normal", "train"): 28, ("Normal", "val"): 6, ("Normal", "test"): 6,
                              ("COVID", "train"): 14, ("COVID", "val"): 3, ("COVID", "test"): 3}
    where = defaultdict(set)
    for film in index_films(tmp_path / "out"):
        where[film.patient].add(film.split)
    assert len(where) == 40
    assert all(len(splits) == 1 for splits in where.values())
    films = bytes_below(tmp_path / "out")
    films.pop(TABLE)
    assert sorted(films.values()) == sorted(bytes_below(organized).values())
    split(organized, tmp_path / "again", near_duplicates=False)
    assert bytes_below(tmp_path / "again") == bytes_below(tmp_path / "out")


def test_copies_and_near_copies_stay_together(
        organized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (organized / "Normal" / "copy.png").write_bytes((organized / "COVID" / "0.png").read_bytes())

    def pairs(images: torch.Tensor) -> list[SimpleNamespace]:
        assert images.shape == (61, 1, duplicates.SIDE, duplicates.SIDE)
        return [SimpleNamespace(first=i, second=i + 1) for i in range(9)]  # 0.png .. of COVID come first

    monkeypatch.setattr(duplicates, "find_duplicates", pairs)
    for seed in range(5):
        summary = split(organized, tmp_path / str(seed), seed=seed)
        rows = {row["source"]: row["split"] for row in rows_of(tmp_path / str(seed))}
        assert rows["COVID/0.png"] == rows["Normal/copy.png"]
        assert len({rows[name] for name in sorted(rows)[:10]}) == 1
        said = " ".join(str(summary).split())
        assert "exact copies (1), pairs of near duplicates (9)" in said
        assert "the largest of 11 films" in said


def test_a_patient_column_survives_the_whole_flow(tmp_path: Path) -> None:
    raw = write_films(tmp_path / "raw", *(f"{i}.png" for i in range(30)))
    (raw / "labels.csv").write_text("file,class,patient\n" + "".join(
        f"{i}.png,{('Normal', 'COVID')[i % 2]},{'one' if i < 12 else i}\n" for i in range(30)))
    organize(raw, tmp_path / "a", raw / "labels.csv")
    preprocess(tmp_path / "a", tmp_path / "b", 16)
    split(tmp_path / "b", tmp_path / "c", near_duplicates=False)
    films = index_films(tmp_path / "c")
    assert Counter(film.patient for film in films)["one"] == 12
    assert len({film.split for film in films if film.patient == "one"}) == 1
    assert len({film.patient for film in films}) == 19


def test_split_by_pattern_and_by_table(organized: Path, tmp_path: Path) -> None:
    # Films named ..0 to ..9 by their last digit: ten patients by pattern, across both classes.
    split(organized, tmp_path / "a", patient_pattern=r"(\d)\.png$", near_duplicates=False)
    (tmp_path / "who.csv").write_text("file,patient\n" + "".join(
        f"{path.name},{path.stem[-1]}\n" for path in sorted(organized.rglob("*.png"))))
    split(organized, tmp_path / "b", patients=tmp_path / "who.csv", near_duplicates=False)
    assert bytes_below(tmp_path / "a") == bytes_below(tmp_path / "b")
    assert len({(row["patient"], row["split"]) for row in rows_of(tmp_path / "a")}) == 10
    with pytest.raises(ValueError, match="one of the two"):
        split(organized, tmp_path / "c", patient_pattern="x", patients=tmp_path / "who.csv")


def test_split_by_link_and_manifest(organized: Path, tmp_path: Path) -> None:
    split(organized, tmp_path / "link", mode="link", near_duplicates=False)
    split(organized, tmp_path / "copy", near_duplicates=False)
    assert bytes_below(tmp_path / "link") == bytes_below(tmp_path / "copy")
    assert all((organized / row["source"]).samefile(tmp_path / "link" / row["file"])
               for row in rows_of(tmp_path / "link"))
    split(organized, tmp_path / "manifest", mode="manifest", near_duplicates=False)
    assert set(bytes_below(tmp_path / "manifest")) == {TABLE}
    rows = rows_of(tmp_path / "manifest")
    assert [row["file"] for row in rows] == sorted(bytes_below(organized))
    assert ({(row["source"], row["split"]) for row in rows}
            == {(row["source"], row["split"]) for row in rows_of(tmp_path / "copy")})


def test_split_says_what_cannot_be_kept(tmp_path: Path) -> None:
    root = write_films(tmp_path / "root", "test/Normal/a.png", "test/Normal/b.png",
                       *(f"train/COVID/person1_virus_{i}.png" for i in range(20)),
                       *(f"train/COVID/person2_virus_{i}.png" for i in range(20)))
    write_film(root / "loose.png")
    summary = split(root, tmp_path / "out", near_duplicates=False)
    text = str(summary)
    assert "splits that the films lie in were ignored" in text
    assert "2 films cannot be divided closer" in text
    assert "its 40 films are in 2 groups that stay whole" in text
    assert "no film in" in text
    assert summary.left_out == {"not in a class folder": ["loose.png"]}
    assert {path.name for path in (tmp_path / "out" / "test").iterdir()} == {"Normal", "COVID"}


# --------------------------------------------------------------------------------------------------- labels

@pytest.mark.parametrize(("films", "classes"), [
    (("COVID/b.png", "NORMAL/a.png", "NORMAL/c.png", "Own/d.png"), ["Normal", "COVID", "Own"]),
    (("Severe/a.png", "grade 1/b.png"), list(GRADES)),
])
def test_labels_agree_with_the_folder_and_read_back(
        tmp_path: Path, films: tuple[str, ...], classes: list[str]) -> None:
    root = write_films(tmp_path / "set", *films)
    write_labels(root)
    content = (root / "dataset.json").read_bytes()
    folder, back = RadiographFolder(root, 16), RadiographFolder(root / "dataset.json", 16)
    listed = json.loads(content)["labels"]
    assert listed == sorted([Path(path).relative_to(root).as_posix(), label]
                            for path, label in folder.samples)
    assert folder.classes == back.classes == classes
    assert folder.samples == back.samples
    trained = ChestXRayDataset(root / "dataset.json", 16, labels=True)
    assert trained.targets == folder.targets
    with pytest.raises(FileExistsError, match="--replace"):
        write_labels(root)
    write_labels(root, replace=True)
    assert (root / "dataset.json").read_bytes() == content


def test_labels_over_splits_are_those_of_every_split(organized: Path, tmp_path: Path) -> None:
    split(organized, tmp_path / "out", near_duplicates=False)
    write_labels(tmp_path / "out")
    listed = dict(json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"])
    assert len(listed) == 60
    for part in SPLITS:
        folder = RadiographFolder(tmp_path / "out" / part, 16)
        assert {Path(path).relative_to(tmp_path / "out").as_posix(): label for path, label in folder.samples
                } == {name: label for name, label in listed.items() if name.startswith(part)}


# ---------------------------------------------------------------------------------- whole or not at all

def test_places_that_are_refused(organized: Path, tmp_path: Path) -> None:
    for output in (organized, organized / "out", tmp_path):
        with pytest.raises(ValueError, match="folder apart"):
            organize(organized, output)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="a file"):
        organize(organized, tmp_path / "file")
    (tmp_path / "full" / "sub").mkdir(parents=True)
    (tmp_path / "full" / "sub" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files"):
        organize(organized, tmp_path / "full")
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not made by this"):
        organize(organized, tmp_path / "new")
    assert (tmp_path / ".new.partial" / "mine.txt").read_text() == "mine"
    organize(organized, tmp_path / "full", replace=True)
    assert not (tmp_path / "full" / "sub").exists()


def test_dry_run_writes_nothing_and_counts_the_same(organized: Path, tmp_path: Path) -> None:
    def steps(dry_run: bool) -> Iterator[preparation.Summary]:
        yield create_structure(tmp_path / "a", ["Normal"], dry_run)
        yield organize(organized, tmp_path / "b", dry_run=dry_run)
        yield preprocess(organized, tmp_path / "c", 16, dry_run=dry_run)
        yield split(organized, tmp_path / "d", near_duplicates=False, dry_run=dry_run)
        yield write_labels(organized, dry_run=dry_run)

    before = bytes_below(tmp_path)
    dry = [str(summary) for summary in steps(True)]
    assert bytes_below(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["organized"]
    assert all("dry run" in text for text in dry)
    wet = [str(summary) for summary in steps(False)]
    assert [text.replace(" (dry run: nothing was written)", "") for text in dry] == wet


def run_and_die(step: Callable[[], object], at_event: int) -> None:
    """In a forked process: run the step and be killed at the n-th change of the file system."""
    count = itertools.count()
    changes = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "shutil.copyfile")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)  # type: ignore[operator]
        if (event in changes or writes) and next(count) == at_event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    step()


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(),
                                reason="kills forked processes, which this system does not have")


@needs_fork
@pytest.mark.parametrize("begun", ["nothing", "old files", pytest.param("empty tree", marks=pytest.mark.slow),
                                   pytest.param("another plan", marks=pytest.mark.slow)])
def test_killed_at_every_change_of_the_file_system(tmp_path: Path, begun: str) -> None:
    raw = write_films(tmp_path / "raw", "COVID/b.png", "COVID/images/b.png")
    organize(raw, tmp_path / "undisturbed")
    wanted = bytes_below(tmp_path / "undisturbed")
    target = tmp_path / "here" / "out"

    def step() -> None:
        organize(raw, target, replace=begun == "old files")

    fork = multiprocessing.get_context("fork")
    for at_event in itertools.count():
        old = {}
        if begun == "empty tree":
            create_structure(target, ["COVID"])
        elif begun == "old files":
            old = bytes_below(write_films(target, "old.png", "more/old.png"))
        elif begun == "another plan":
            other = fork.Process(target=run_and_die, args=(lambda: preprocess(raw, target, 16), 12))
            other.start()
            other.join()
            assert (tmp_path / "here" / ".out.partial" / "plan.json").exists()
        child = fork.Process(target=run_and_die, args=(step, at_event))
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        assert bytes_below(target) in ({}, old, wanted), at_event
        if child.exitcode == -signal.SIGKILL:
            try:
                step()
            except FileExistsError:  # killed after all was done: the target counts as any that holds files
                assert bytes_below(target) == wanted, at_event
        assert bytes_below(target) == wanted, at_event
        assert [path.name for path in target.parent.iterdir()] == ["out"]
        if child.exitcode == 0:
            break
        for path in sorted(target.parent.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    assert at_event > 20


@needs_fork
def test_killed_while_it_clears_what_another_call_had_begun(tmp_path: Path) -> None:
    raw = write_films(tmp_path / "raw", "COVID/a.png")
    preprocess(raw, tmp_path / "undisturbed", 16)
    fork = multiprocessing.get_context("fork")
    for at_event in range(12):
        target = tmp_path / f"{at_event}"
        create_structure(target, ["Normal"])
        steps = (partial(preprocess, raw, target, 16), 8), (partial(organize, raw, target), at_event)
        for step, event in steps:
            child = fork.Process(target=run_and_die, args=(step, event))
            child.start()
            child.join()
            assert child.exitcode == -signal.SIGKILL
        assert bytes_below(target) == {}
        preprocess(raw, target, 16)
        assert bytes_below(target) == bytes_below(tmp_path / "undisturbed"), at_event


@needs_fork
def test_what_was_to_be_replaced_comes_back_for_a_call_that_may_not_replace(tmp_path: Path) -> None:
    raw = write_films(tmp_path / "raw", "COVID/a.png")
    for at_event in itertools.count():  # until it is killed between its two last renames
        target = tmp_path / f"{at_event}"
        old = bytes_below(write_films(target, "old.png"))
        step = partial(organize, raw, target, replace=True)
        child = multiprocessing.get_context("fork").Process(target=run_and_die, args=(step, at_event))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        if not target.exists():
            break
        assert bytes_below(target) == old
    with pytest.raises(FileExistsError, match="holds files"):
        preprocess(raw, target, 16)
    assert bytes_below(target) == old


@needs_fork
def test_killed_in_the_middle_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_films(tmp_path / "raw", "COVID/a.png", "COVID/b.png")

    def write_half(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:50])
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", write_half)
        child = multiprocessing.get_context("fork").Process(target=organize, args=(raw, tmp_path / "out"))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    organize(raw, tmp_path / "out")
    assert {name: data for name, data in bytes_below(tmp_path / "out").items() if name != TABLE
            } == bytes_below(raw)


@needs_fork
def test_killed_at_random_moments_and_taken_up_again(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for i in range(60):
        write_film(raw / "COVID" / f"{i}.png", i, (200, 200))
    preprocess(raw, tmp_path / "undisturbed", 64)
    fork, delays = multiprocessing.get_context("fork"), random.Random(0)
    kills = 0
    for _ in range(12):
        child = fork.Process(target=preprocess, args=(raw, tmp_path / "out", 64))
        child.start()
        child.join(delays.uniform(0, 0.1))
        kills += child.exitcode is None
        child.kill()
        child.join()
        if (tmp_path / "out").exists():
            break
    assert kills
    if not (tmp_path / "out").exists():
        preprocess(raw, tmp_path / "out", 64)
    assert bytes_below(tmp_path / "out") == bytes_below(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw", "undisturbed"]


def test_what_was_made_is_not_made_again(organized: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = preparation._copy, []

    def copy(source: Path, target: Path, room: int = 10) -> None:
        if len(made) == room:
            raise OSError(28, "No space left on device", str(target))
        made.append(target.name)
        real(source, target)

    monkeypatch.setattr(preparation, "_copy", copy)
    with pytest.raises(OSError, match="No space left"):
        organize(organized, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(preparation, "_copy", lambda source, target: copy(source, target, 99))
    organize(organized, tmp_path / "out")
    assert len(made) == len(set(made)) == 60  # none twice


# -------------------------------------------------------------------------------------------- on real films

def test_real_sets_flow(real_data: Path, tmp_path: Path) -> None:
    spine = organize(real_data / "spine_ap", tmp_path / "spine", real_data / "spine_ap_labels.csv")
    assert not spine.left_out
    assert [spine.counts[grade, ""] for grade in GRADES] == [18, 55, 100, 157, 151]  # the folder's README
    split(tmp_path / "spine", tmp_path / "spine_split", near_duplicates=False)
    where = defaultdict(set)
    for row in rows_of(tmp_path / "spine_split"):
        where[row["patient"]].add(row["split"])
    with (real_data / "spine_ap_labels.csv").open() as file:
        assert set(where) == {row["group"] for row in csv.DictReader(file)}
    assert all(len(splits) == 1 for splits in where.values())

    covid = organize(real_data / "COVID-19_Radiography_Dataset", tmp_path / "covid")
    assert covid.counts == {("COVID", ""): 31, ("Lung_Opacity", ""): 32, ("Normal", ""): 39,
                            ("Viral Pneumonia", ""): 22}
    preprocess(tmp_path / "covid", tmp_path / "grey", 256)
    with Image.open(tmp_path / "grey" / "Viral Pneumonia" / "Viral Pneumonia-205.png") as film:
        assert (film.mode, film.size) == ("L", (256, 256))


def test_a_link_to_nothing_is_listed_and_left(tmp_path: Path) -> None:
    raw = write_films(tmp_path / "raw", *(f"Normal/{i}.png" for i in range(4)))
    (raw / "Normal" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for summary in (organize(raw, tmp_path / "o"), preprocess(raw, tmp_path / "p", 32),
                    split(raw, tmp_path / "s", near_duplicates=False)):
        assert summary.left_out["a link to nothing"] == ["Normal/gone.png"]
        assert sum(summary.counts.values()) == 4


def test_labels_lie_in_the_folder_that_their_paths_start_from(organized: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="because the paths in it start there"):
        write_labels(organized, tmp_path / "labels.json")
