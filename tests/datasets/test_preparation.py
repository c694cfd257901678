"""Raw folders become data sets: nothing lost, nothing mixed, patients whole, ratios kept, kills survived."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from genailab_helpers.datasets import duplicates, preparation
from genailab_helpers.datasets.folders import RadiographFolder
from genailab_helpers.datasets.index import TABLE, index_images
from genailab_helpers.datasets.names import GRADES, SPLITS
from genailab_helpers.datasets.preparation import Summary, assign_splits, create_structure
from genailab_helpers.radiographs import read_radiograph

bounded = settings(max_examples=40, deadline=None, derandomize=True)


def bytes_below(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*")) if path.is_file()}


def rows_of(root: Path) -> list[dict[str, str]]:
    return pd.read_csv(root / TABLE, dtype=str, keep_default_na=False).to_dict("records")


def organize(raw: Path, output: Path, table: Path | None = None, **options: object) -> Summary:
    return preparation.organize(index_images(raw, table), output, **options)


def preprocess(raw: Path, output: Path, *options: object, **more: object) -> Summary:
    return preparation.preprocess(index_images(raw), output, *options, **more)


def split(raw: Path, output: Path, near_duplicates: bool = False, **options: object) -> Summary:
    return preparation.split(index_images(raw), output, near_duplicates=near_duplicates, **options)


# -------------------------------------------------------------------------------------------- assign_splits

def images_of(patients: list[list[str]]) -> tuple[list[str], list[str]]:
    """Lay out patients, each a list of the classes of their images, as labels and groups."""
    return ([label for images in patients for label in images],
            [f"p{i}" for i, images in enumerate(patients) for _ in images])


def points_off(labels: list[str], chosen: list[str], ratios: tuple[float, ...] = (0.7, 0.15, 0.15)) -> float:
    """Return by how many points the class that is furthest off misses a ratio."""
    totals, held = Counter(labels), Counter(zip(labels, chosen, strict=True))
    return 100 * max(abs(held[label, name] / totals[label] - share)
                     for label in totals for name, share in zip(SPLITS, ratios, strict=True))


@bounded
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=40),
       st.sampled_from([(0.7, 0.15, 0.15), (0.5, 0.25, 0.25), (0.6, 0.4, 0), (0, 0.5, 0.5), (1, 0, 0)]),
       st.integers(0, 99), st.randoms(use_true_random=False))
def test_groups_stay_whole_in_any_listing_order(patients, ratios, seed, order) -> None:
    labels, groups = images_of(patients)
    chosen = assign_splits(labels, groups, ratios, seed)
    assert len(set(zip(groups, chosen, strict=True))) == len(set(groups))
    assert not {name for name, share in zip(SPLITS, ratios, strict=True) if share == 0} & set(chosen)
    shuffled = order.sample(range(len(labels)), len(labels))
    again = assign_splits([labels[i] for i in shuffled], [groups[i] for i in shuffled], ratios, seed)
    assert again == [chosen[i] for i in shuffled]


def test_another_seed_draws_others_and_large_groups_do_not_spoil_the_ratios() -> None:
    labels, groups = images_of([["ab"[i % 2]] * (10 if i < 20 else 1) for i in range(220)])
    first, second = (assign_splits(labels, groups, seed=seed) for seed in (42, 43))
    assert first != second
    assert max(points_off(labels, first), points_off(labels, second)) < 1.5


def test_few_groups_reach_every_split() -> None:
    for classes in ("a", "ab"):
        chosen = assign_splits(list(12 // len(classes) * classes), [f"p{i}" for i in range(12)])
        counts = Counter(chosen)
        assert set(counts) == set(SPLITS)
        assert 7 <= counts["train"] <= 10
    for seed in range(5):
        assert len(set(assign_splits("aab", ["p", "p", "q"], seed=seed)[:2])) == 1


@pytest.mark.slow
def test_nih_sized_set_within_a_minute() -> None:
    rng = np.random.default_rng(0)
    skew = np.minimum(rng.zipf(1.6, 30_805), 2000)  # as there: up to 184 images of a patient, here 174
    sizes = 1 + rng.multinomial(112_120 - 30_805, skew / skew.sum())
    weights = 1 / np.arange(1, 16) ** 2
    patients = np.repeat(np.arange(len(sizes)), sizes)
    favourite = rng.choice(15, len(sizes), p=weights / weights.sum())[patients]
    other = rng.choice(15, len(patients), p=weights / weights.sum())
    labels = [f"class {i:02}" for i in np.where(rng.random(len(patients)) < 0.4, favourite, other)]
    start = time.process_time()
    chosen = assign_splits(labels, [f"{i:08}" for i in patients])
    assert time.process_time() - start < 60
    assert len(set(zip(patients.tolist(), chosen, strict=True))) == 30_805
    assert points_off(labels, chosen) < 1.5


def test_classes_of_fewer_images_than_folds_are_divided() -> None:
    chosen = Counter(zip("abcde" * 14, assign_splits("abcde" * 14, map(str, range(70))), strict=True))
    assert [[chosen[label, name] for name in SPLITS] for label in "abcde"] == [[10, 2, 2]] * 5


# ------------------------------------------------------------------------------------------ create, organize

def test_create_makes_the_tree_and_organize_fills_such_a_tree(tmp_path: Path, put) -> None:
    out = tmp_path / "dataset"
    create_structure(out, ["grade_3", "grade 0", "NORMAL"])
    made = {path.relative_to(out).as_posix() for path in out.glob("*/*")}
    assert made == {f"{part}/{name}" for part in SPLITS for name in ("grade_0", "grade_3", "Normal")}
    organize(put(tmp_path / "raw", "grade 0/a.png"), out, replace=True)
    assert set(bytes_below(out)) == {"grade_0/a.png", TABLE}
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        create_structure(out, ["Normal"])
    with pytest.raises(ValueError, match="names that a folder can have"):
        create_structure(tmp_path / "other", ["a/b"])


def test_organize_maps_names_and_keeps_splits_where_all_images_have_one(tmp_path: Path, put) -> None:
    raw = put(tmp_path / "raw", "training/Covid-19/a.png", "valid/Viral/images/b.png",
              "test/No_findings/deep/er/c.png", "valid/Viral/masks/b.png", "test/NORMAL/.c.png")
    summary = organize(raw, tmp_path / "out")
    assert set(bytes_below(tmp_path / "out")) == {
        "train/COVID/a.png", "val/Viral Pneumonia/b.png", "test/Normal/c.png", TABLE}
    assert not summary.left_out
    put(raw, "Lung/d.png")
    assert "dropped" in str(organize(raw, tmp_path / "out", replace=True))
    assert set(bytes_below(tmp_path / "out")) == {
        "COVID/a.png", "Viral Pneumonia/b.png", "Normal/c.png", "Lung_Opacity/d.png", TABLE}


part = st.sampled_from(["NORMAL", "normal", "Covid-19", "COVID", "images", "x", "X", "train", "masks",
                        ".hidden"])
name = st.sampled_from(["a.png", "A.png", "a.PNG", "a.jpg", "b.png", "a__x.png", "a__NORMAL.png",
                        "a__x-x.png", "notes.txt", ".a.png"])


@bounded
@given(st.sets(st.tuples(st.lists(part, max_size=3).map("/".join), name), min_size=1, max_size=14))
def test_every_image_is_in_the_output_once_or_listed(places: set[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder, "raw"), Path(folder, "out")
        names = {f"{place}/{image}".lstrip("/") for place, image in places}
        for image in names:
            (raw / image).parent.mkdir(parents=True, exist_ok=True)
            (raw / image).write_bytes(image.encode())
        before = bytes_below(raw)
        visible = {image for image in names
                   if not any(part.startswith(".") or part == "masks" for part in image.split("/"))}
        placeable = {image for image in visible if not image.endswith(".txt")
                     and {"NORMAL", "normal", "Covid-19", "COVID"} & set(image.split("/")[:-1])}
        if not placeable:
            with pytest.raises(ValueError, match=r"no radiographs|empty folder|known class"):
                organize(raw, out)
            assert not out.exists()
            return
        images = index_images(raw)
        summary = preparation.organize(images, out)
        written = bytes_below(out)
        del written[TABLE]
        assert sorted(content.decode() for content in written.values()) == sorted(placeable)
        assert sorted(itertools.chain(*summary.left_out.values())) == sorted(visible - placeable)
        assert len({place.casefold() for place in written}) == len(written)
        assert {row["file"]: row["source"] for row in rows_of(out)} == {
            place: content.decode() for place, content in written.items()}
        preparation.organize(images[::-1], Path(folder, "again"))
        assert bytes_below(Path(folder, "again")) == bytes_below(out)
        assert bytes_below(raw) == before


def test_organize_by_a_table(tmp_path: Path, put) -> None:
    raw = put(tmp_path / "set" / "raw", "x/b.png", *(f"{image}.png" for image in "acdfghi"))
    (raw / "notes.txt").write_text("no image")
    table = tmp_path / "set" / "labels.csv"
    table.write_text("\n".join([
        "Image Index,Finding Labels,Patient ID",
        "a.png,grade 0,P1",  # below the input
        "raw\\x\\b.png,grade 1,P1",  # below the folder of the table
        "elsewhere/c.png,grade-0,",  # the name alone
        "d,grade_4,P2",  # the stem alone
        "f.png,grade 0,P4", "f.png,grade 1,P4",  # two classes
        "g.png,1|2,P5",  # no class
        "h.png,Own Class,P6", "h.png,Own Class,P6",  # twice the same is no contradiction
        "absent.png,grade 0,P7"]))
    summary = organize(raw, tmp_path / "out", table)
    rows = {row["source"]: (row["file"], row["patient"]) for row in rows_of(tmp_path / "out")}
    assert rows == {"a.png": ("grade_0/a.png", "P1"), "x/b.png": ("grade_1/b.png", "P1"),
                    "c.png": ("grade_0/c.png", ""), "d.png": ("grade_4/d.png", "P2"),
                    "h.png": ("Own Class/h.png", "P6")}
    assert summary.left_out == {"table rows without their image": ["line 11 (absent.png)"],
                                "not in the table, or there with two classes": ["f.png", "i.png"],
                                "several classes in one cell": ["g.png"], "not an image": ["notes.txt"]}
    few = organize(raw, tmp_path / "few", table, classes=["grade 0"])
    assert few.left_out["several classes in one cell"] == ["g.png"]
    assert few.left_out["no known class in the path or the table"] == ["d.png", "h.png", "x/b.png"]
    assert few.counts == {("grade_0", ""): 2}


# ----------------------------------------------------------------------------------------------- preprocess

def test_preprocess_makes_one_kind_of_image_of_all(tmp_path: Path, write) -> None:
    raw = tmp_path / "raw" / "COVID"
    grey = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))
    image = Image.open(write(raw / "l.png", grey))
    image.convert("RGB").save(raw / "rgb.png")
    image.convert("RGBA").save(raw / "rgba.tif")
    image.convert("LA").save(raw / "la.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(raw / "deep.png")
    preprocess(tmp_path / "raw", tmp_path / "out", 32)
    written = sorted((tmp_path / "out" / "COVID").iterdir())
    assert [path.name for path in written] == ["deep.png", "l.png", "la.png", "rgb.png", "rgba.png"]
    expected = 127.5 * (read_radiograph(raw / "l.png", 32)[0].numpy() + 1)
    for path in written:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))
            assert np.abs(np.asarray(image) - expected).max() <= 1, path.name


def test_letterbox_keeps_the_aspect_squash_fills_and_crop_takes_the_middle(tmp_path: Path, write) -> None:
    wide = np.zeros((60, 120), np.uint8)
    wide[:, 30:90] = np.arange(1, 61, dtype=np.uint8)[:, None] * 4
    for name, pixels in (("wide", wide), ("tall", wide.T)):
        write(tmp_path / "raw" / f"{name}.png", pixels)
    for fit, expected in (("crop", wide[:, 30:90]), ("letterbox", None), ("squash", None)):
        preprocess(tmp_path / "raw", tmp_path / fit, 60, fit)
        first, second = (np.asarray(Image.open(tmp_path / fit / f"{name}.png")) for name in ("wide", "tall"))
        assert np.array_equal(first, second.T)
        assert expected is None or np.array_equal(first, expected)
        rows, columns = np.flatnonzero(first.max(1)), np.flatnonzero(first.max(0) > 60)  # edges bleed
        assert (len(rows), len(columns)) == {"crop": (60, 60), "letterbox": (30, 30), "squash": (60, 30)}[fit]
        assert rows[0] == (15 if fit == "letterbox" else 0)


def test_preprocess_lists_what_it_cannot_read_and_tells_namesakes_apart(tmp_path: Path, put) -> None:
    raw = put(tmp_path / "raw", "NORMAL/x.png", "NORMAL/x.jpg", "NORMAL/y.png")
    (raw / "NORMAL" / "broken.png").write_bytes((raw / "NORMAL" / "y.png").read_bytes()[:200])
    before = bytes_below(raw)
    summary = preprocess(raw, tmp_path / "out", 16)
    names = {row["source"]: row["file"] for row in rows_of(tmp_path / "out")}
    assert {TABLE, *names.values()} == set(bytes_below(tmp_path / "out"))
    assert {source: name.partition("__")[0] for source, name in names.items()} == {
        "NORMAL/x.png": "NORMAL/x", "NORMAL/x.jpg": "NORMAL/x", "NORMAL/y.png": "NORMAL/y.png"}
    assert summary.counts == {("Normal", ""): 3}
    (listed,) = summary.left_out["cannot be read"]
    assert listed.startswith("NORMAL/broken.png: damaged")
    assert bytes_below(raw) == before
    for path in list(raw.rglob("*.*g")):
        path.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="none of 4 images can be read"):
        preprocess(raw, tmp_path / "none", 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


# ---------------------------------------------------------------------------------------------------- split

@pytest.fixture
def organized(tmp_path: Path, put) -> Path:
    """40 normal images of 20 patients and 20 of COVID, each of its own patient."""
    return put(tmp_path / "organized", *(f"Normal/IM-{i // 2:04}-{i:04}.png" for i in range(40)),
               *(f"COVID/{i}.png" for i in range(20)))


def test_split_keeps_ratios_and_patients(organized: Path, tmp_path: Path) -> None:
    summary = split(organized, tmp_path / "out")
    assert summary.counts == {("Normal", "train"): 28, ("Normal", "val"): 6, ("Normal", "test"): 6,
                              ("COVID", "train"): 14, ("COVID", "val"): 3, ("COVID", "test"): 3}
    images = index_images(tmp_path / "out")
    assert images["patient"].nunique() == 40
    assert (images.groupby("patient")["split"].nunique() == 1).all()
    written = bytes_below(tmp_path / "out")
    written.pop(TABLE)
    assert sorted(written.values()) == sorted(bytes_below(organized).values())
    split(organized, tmp_path / "again")
    assert bytes_below(tmp_path / "again") == bytes_below(tmp_path / "out")


def test_copies_and_near_copies_stay_together(organized, tmp_path, monkeypatch) -> None:
    (organized / "Normal" / "copy.png").write_bytes((organized / "COVID" / "0.png").read_bytes())

    def pairs(images: torch.Tensor) -> list[SimpleNamespace]:
        assert images.shape == (61, 1, duplicates.SIDE, duplicates.SIDE)
        return [SimpleNamespace(first=i, second=i + 1) for i in range(9)]  # 0.png .. of COVID come first

    monkeypatch.setattr(duplicates, "find_duplicates", pairs)
    for seed in range(5):
        summary = split(organized, tmp_path / str(seed), seed=seed, near_duplicates=True)
        rows = {row["source"]: row["split"] for row in rows_of(tmp_path / str(seed))}
        assert rows["COVID/0.png"] == rows["Normal/copy.png"]
        assert len({rows[name] for name in sorted(rows)[:10]}) == 1
        said = " ".join(str(summary).split())
        assert "equal images (1), pairs of near duplicates (9)" in said
        assert "the largest of 11 images" in said


def test_split_by_link_and_manifest(organized: Path, tmp_path: Path) -> None:
    split(organized, tmp_path / "link", mode="link")
    split(organized, tmp_path / "copy")
    assert bytes_below(tmp_path / "link") == bytes_below(tmp_path / "copy")
    assert all((organized / row["source"]).samefile(tmp_path / "link" / row["file"])
               for row in rows_of(tmp_path / "link"))
    split(organized, tmp_path / "manifest", mode="manifest")
    assert set(bytes_below(tmp_path / "manifest")) == {TABLE}
    rows = rows_of(tmp_path / "manifest")
    assert [row["file"] for row in rows] == sorted(bytes_below(organized))
    assert ({(row["source"], row["split"]) for row in rows}
            == {(row["source"], row["split"]) for row in rows_of(tmp_path / "copy")})


def test_split_says_what_cannot_be_kept(organized: Path, tmp_path: Path, put) -> None:
    root = put(tmp_path / "root", "test/Normal/a.png", "test/Normal/b.png",
               *(f"train/COVID/person{i // 20}_virus_{i}.png" for i in range(40)), "loose.png")
    summary = split(root, tmp_path / "out")
    text = str(summary)
    assert "splits that the images lie in were ignored" in text
    assert "points in " in text
    assert "its 40 images are in 2 groups that stay whole" in text
    assert "Normal: no image in" in text
    assert summary.left_out == {"not in a class folder": ["loose.png"]}
    odd, even = (str(split(organized, tmp_path / "x", ratios=ratios, dry_run=True))
                 for ratios in ((0.72, 0.14, 0.14), (0.7, 0.2, 0.1)))
    assert "Ratios are kept to twentieths: train 0.70, val 0.15, test 0.15." in odd
    assert "twentieths" not in even
    assert "points in " not in odd + even
    with pytest.raises(ValueError, match="each of them 0, or at least a twentieth"):
        split(organized, tmp_path / "x", ratios=(0.96, 0.04, 0))


# --------------------------------------------------------------------------------------------------- labels

@pytest.mark.parametrize(("names", "classes"), [
    (("COVID/b.png", "NORMAL/a.png", "NORMAL/c.png", "Own/d.png"), ["Normal", "COVID", "Own"]),
    (("grade 4/a.png", "grade 1/b.png"), list(GRADES))])
def test_labels_agree_with_the_folder(tmp_path, put, names, classes) -> None:
    root = put(tmp_path / "set", *names)
    preparation.write_labels(index_images(root))
    content = (root / "dataset.json").read_bytes()
    folder = RadiographFolder(root, 16)
    assert json.loads(content)["labels"] == sorted(
        [Path(path).relative_to(root).as_posix(), label] for path, label in folder.samples)
    assert folder.classes == classes
    with pytest.raises(FileExistsError, match="--replace"):
        preparation.write_labels(index_images(root))
    preparation.write_labels(index_images(root), replace=True)
    assert (root / "dataset.json").read_bytes() == content
    (root / "dataset.json").write_text("mine")
    with pytest.raises(FileExistsError, match="label file"):
        preparation.write_labels(index_images(root), replace=True)
    with pytest.raises(ValueError, match="because the paths in it start there"):
        preparation.write_labels(index_images(root), tmp_path / "labels.json")


# ---------------------------------------------------------------------------------- whole or not at all

def test_places_that_are_refused(organized: Path, tmp_path: Path) -> None:
    for output in (organized, organized / "out", tmp_path):
        with pytest.raises(ValueError, match="folder apart"):
            organize(organized, output)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        organize(organized, tmp_path / "file", replace=True)
    assert (tmp_path / "file").is_file()


def test_only_what_an_earlier_run_has_written_is_replaced(organized: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split(organized, out)
    preparation.write_labels(index_images(out))
    with pytest.raises(FileExistsError, match="--replace"):
        organize(organized, out)
    organize(organized, out, replace=True)
    assert not (out / "train").exists()
    (out / "Normal" / "mine.txt").write_text("mine")
    before = bytes_below(out)
    for again in (partial(organize, organized), partial(preprocess, organized), partial(split, organized)):
        with pytest.raises(FileExistsError, match=r"1 files such as Normal/mine\.txt"):
            again(out, replace=True)
    (out / "Normal" / "mine.txt").unlink()
    (out / TABLE).unlink()
    with pytest.raises(FileExistsError, match=r"60 files such as COVID/0\.png"):
        organize(organized, out, replace=True)
    assert {**bytes_below(out), "Normal/mine.txt": b"mine", TABLE: before[TABLE]} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forked processes")
def test_a_killed_run_leaves_the_old_folder_and_runs_again(tmp_path, put, monkeypatch) -> None:
    raw, out = put(tmp_path / "raw", "COVID/0.png", "COVID/1.png"), tmp_path / "here" / "out"
    organize(put(tmp_path / "other", "Normal/x.png"), out)
    old = bytes_below(out)

    def deadly(source: str, target: Path) -> None:
        target.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", deadly)
        child = multiprocessing.get_context("fork").Process(target=partial(organize, raw, out, replace=True))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert bytes_below(out) == old
    organize(raw, out, replace=True)
    assert set(bytes_below(out)) == {"COVID/0.png", "COVID/1.png", TABLE}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_link_to_nothing_is_listed_and_left(tmp_path: Path, put) -> None:
    raw = put(tmp_path / "raw", *(f"Normal/{i}.png" for i in range(4)))
    (raw / "Normal" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for step, output in ((organize, "o"), (preprocess, "p"), (split, "s")):
        summary = step(raw, tmp_path / output)
        [said] = summary.left_out["cannot be read"]
        assert said.startswith("Normal/gone.png: ")
        assert sum(summary.counts.values()) == 4


def test_real_sets_flow(real_data: Path, tmp_path: Path) -> None:
    spine = organize(real_data / "spine_ap", tmp_path / "spine", real_data / "spine_ap_labels.csv")
    assert not spine.left_out
    assert [spine.counts[grade, ""] for grade in GRADES] == [18, 55, 100, 157, 151]  # the folder's README
    split(tmp_path / "spine", tmp_path / "spine_split")
    rows = pd.read_csv(tmp_path / "spine_split" / TABLE, dtype=str)
    assert set(rows["patient"]) == set(pd.read_csv(real_data / "spine_ap_labels.csv", dtype=str)["group"])
    assert (rows.groupby("patient")["split"].nunique() == 1).all()

    covid = organize(real_data / "COVID-19_Radiography_Dataset", tmp_path / "covid")
    assert covid.counts == {("COVID", ""): 31, ("Lung_Opacity", ""): 32, ("Normal", ""): 39,
                            ("Viral Pneumonia", ""): 22}
    preprocess(tmp_path / "covid", tmp_path / "grey", 256)
    with Image.open(tmp_path / "grey" / "Viral Pneumonia" / "Viral Pneumonia-205.png") as image:
        assert (image.mode, image.size) == ("L", (256, 256))


def test_the_seed_decides_where_large_patients_go() -> None:
    sizes = np.random.default_rng(0).geometric(0.2, 300)
    groups = np.repeat(np.arange(300), sizes).astype(str)
    largest = list(groups).index(str(sizes.argmax()))
    went = [assign_splits(["a"] * len(groups), groups, seed=seed)[largest] for seed in range(20)]
    assert 8 <= went.count("train") <= 19  # 14 are expected
