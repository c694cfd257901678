"""One table says whose images these are, and everything follows it: no patient on two sides of a split."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from genailab_helpers.datasets.folders import RadiographFolder, read_parts
from genailab_helpers.datasets.index import index_images, match_table, read_table, torn_patients
from genailab_helpers.datasets.names import GRADE_NAMES, GRADES
from genailab_helpers.datasets.preparation import organize, split
from genailab_helpers.datasets.shortcuts import audit_shortcuts, label_signal
from genailab_helpers.phantoms.chest import render_chests, sample_chests


def put(root: Path, *names: str, seed: int = 0) -> Path:
    """Write small images of random pixels, each another."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, number])
        Image.fromarray(rng.integers(0, 255, (32, 32), np.uint8)).save(path, format="PNG")
    return root


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat layout as NIH gives it: images with numbers for names, and a table of bare names."""
    root = tmp_path_factory.mktemp("followed")
    chests = render_chests(sample_chests(96, seed=5), 32).images[:, 0]
    rows = []
    for i, levels in enumerate(((chests + 1) * 127.5).round().byte().numpy()):
        path = root / "data" / ("Normal", "Effusion")[i % 2] / f"image_{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels).save(path)
        rows.append((path.name, f"P{i // 2 // 3:02d}{i % 2}"))  # three images a patient, one class each
    pd.DataFrame(rows, columns=["Image Index", "Patient ID"]).to_csv(root / "table.csv", index=False)
    return root


# ------------------------------------------------------------------------------------------------ the leak

def patients_of(images: pd.DataFrame, table: Path) -> dict[str, str]:
    said = pd.read_csv(table).set_index("Image Index")["Patient ID"]
    return {name: said[Path(name).name] for name in images.index}


def test_a_table_of_bare_names_is_followed_from_the_folder_to_the_split(followed, tmp_path):
    images = index_images(followed / "data", followed / "table.csv")
    assert images["patient"].to_dict() == patients_of(images, followed / "table.csv")
    assert set(images["known"]) == {"table"}
    split(images, tmp_path / "split", near_duplicates=False)
    divided = index_images(tmp_path / "split")  # films.csv carries the patients on
    assert divided["patient"].to_dict() == patients_of(divided, followed / "table.csv")
    assert torn_patients(divided) == []
    assert set(divided["split"]) == {"train", "val", "test"}


def test_training_shortcuts_and_label_signal_follow_it(followed):
    images = index_images(followed / "data", followed / "table.csv")
    parts, _ = read_parts(images, 32, test=True)
    held = {name: {part.dataset.patients[i] for i in part.indices} for name, part in parts.items()}
    assert sum(map(len, held.values())) == len(set.union(*held.values()))
    n_patients = images["patient"].nunique()
    assert n_patients == 32
    assert audit_shortcuts(images).rows[0].score.n == n_patients
    assert label_signal(images).score.n == n_patients


def test_a_patient_in_two_parts_by_the_table_is_refused(followed, tmp_path):
    for name, folder in (("image_000.png", "train"), ("image_002.png", "val")):
        put(tmp_path, f"{folder}/Normal/{name}", f"{folder}/Effusion/other_{folder}.png")
    images = index_images(tmp_path, followed / "table.csv")
    assert torn_patients(images) == ["P000"]
    with pytest.raises(ValueError, match=r"1 patients \(P000\) lie in several of its parts"):
        read_parts(images, 32)


def test_people_of_one_file_name_in_two_parts_are_two(tmp_path):
    put(tmp_path, "train/Normal/1.png", "test/Normal/1.png")
    assert index_images(tmp_path)["patient"].tolist() == ["test/Normal/1", "train/Normal/1"]


@pytest.mark.parametrize(("pattern", "table", "known", "patient"), [
    (r"IM-(\d+)", "x", "pattern", "0115"), (None, "x", "table", "T7"), (None, None, "file name", "IM-0115")])
def test_pattern_goes_before_table_before_name(tmp_path, pattern, table, known, patient):
    put(tmp_path, "Normal/IM-0115-0001.png")
    if table:
        (tmp_path / "t.csv").write_text("file,patient\nIM-0115-0001,T7\n")
        table = tmp_path / "t.csv"
    row = index_images(tmp_path, table, pattern).iloc[0]
    assert (row["known"], row["patient"]) == (known, patient)


# ---------------------------------------------------------------------------------------------- the tables

@pytest.mark.parametrize("file", [
    "COVID/images/a.png", "./COVID/images/a.png", "COVID\\images\\a.png", "set/COVID/a.png", "Covid-19/a.jpg",
    "a", "a.png"])
def test_a_row_finds_its_image(tmp_path, file):
    put(tmp_path, "COVID/images/a.png", "Normal/images/b.png")
    (tmp_path / "t.csv").write_text(f"file;patient\n{file};P1\n")
    assert match_table(index_images(tmp_path), tmp_path / "t.csv")["image"].tolist() == ["COVID/images/a.png"]


def test_a_row_that_fits_several_images_names_them(tmp_path):
    put(tmp_path, "Normal/a.png", "COVID/a.png")
    (tmp_path / "t.csv").write_text("file,patient\nb,P0\na.png,P1\n")
    with pytest.raises(ValueError, match=r"line 3: a.png fits 2 images: COVID/a.png, Normal/a.png; expected"):
        index_images(tmp_path, tmp_path / "t.csv")


def test_cells_are_text_and_say_nothing_where_they_are_blank(tmp_path):
    (tmp_path / "t.csv").write_text(
        "Image Index,Patient ID,Finding Labels,Split\na.png,007,NORMAL,training\nb.png,12.0,2.0,\n"
        "c.png,NA,nan,x\n\nd.png, ,Covid-19,TEST\n", encoding="utf-8-sig")
    rows = read_table(tmp_path / "t.csv")
    assert rows["patient"].tolist() == ["007", "12", "", ""]
    assert rows["class"].tolist() == ["Normal", "2", "", "COVID"]
    assert rows["split"].tolist() == ["train", "", "", "test"]
    assert rows.index.tolist() == [2, 3, 4, 6]


def test_two_patients_of_one_image_are_refused(tmp_path):
    put(tmp_path, "Normal/a.png")
    (tmp_path / "films.csv").write_text("file,patient\na.png,P1\nNormal/a.png,P2\n")
    with pytest.raises(ValueError, match=r"gives Normal/a.png the patients P1 and P2"):
        index_images(tmp_path)


@pytest.mark.parametrize(("text", "message"), [
    ("name,patient\na,b\n", "no column for the image"), ("", "expected a CSV table"),
    ("file\n\xff", "UTF-8")])
def test_what_is_no_table_is_said(tmp_path, text, message):
    (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "t.csv")


# --------------------------------------------------------------------------------------------- the classes

def classes_of(root: Path, **options: bool) -> list[str]:
    return index_images(root, **options).attrs["classes"]


def test_numbers_are_grades_only_among_all_five_or_where_asked(tmp_path):
    put(tmp_path / "five", *(f"{grade}/a.png" for grade in range(5)))
    put(tmp_path / "words", *(f"{name}/a.png" for name in GRADE_NAMES))
    put(tmp_path / "two", "0/a.png", "1/b.png")
    put(tmp_path / "ends", "Healthy/a.png", "Severe/b.png")
    put(tmp_path / "parts", *(f"train/{grade}/a.png" for grade in range(5)), "val/0/b.png", "val/1/c.png")
    assert classes_of(tmp_path / "five") == classes_of(tmp_path / "words") == list(GRADES)
    assert classes_of(tmp_path / "parts") == list(GRADES)
    assert classes_of(tmp_path / "two") == ["0", "1"]
    assert classes_of(tmp_path / "ends") == ["Healthy", "Severe"]
    for name in ("two", "ends"):
        assert classes_of(tmp_path / name, graded=True) == list(GRADES)
    assert index_images(tmp_path / "two", graded=True)["class"].tolist() == ["grade_0", "grade_1"]


def test_folders_inside_a_class_are_no_class(tmp_path):
    put(tmp_path / "raw", "COVID/patient7/1/2.png", "COVID/Normal/3.png", "Normal/viral/4.png",
        "Normal/0/images/5.png")
    images = index_images(tmp_path / "raw")
    assert images["class"].tolist() == ["COVID", "COVID", "Normal", "Normal"]
    organize(images, tmp_path / "organized")
    assert index_images(tmp_path / "organized")["class"].value_counts().to_dict() == {"COVID": 2, "Normal": 2}


def test_names_that_differ_in_case_or_unicode_form_are_one_class(tmp_path):
    put(tmp_path, "Ödem/a.png", "O\u0308dem/b.png", "ÖDEM/c.png", "other/d.png")
    assert len(classes_of(tmp_path)) == 2


def test_what_kaggle_unpacks_is_understood(tmp_path):
    put(tmp_path, "archive/chest_xray/train/NORMAL/a.png", "archive/chest_xray/train/PNEUMONIA/b.png",
        "archive/chest_xray/test/NORMAL/c.png", "archive/chest_xray/__MACOSX/train/NORMAL/d.png",
        "archive/chest_xray/chest_xray/train/NORMAL/a.png")
    images = index_images(tmp_path / "archive")
    assert images.attrs["classes"] == ["Normal", "Pneumonia"]
    assert images.loc[images["class"] == ""].index.tolist() == ["chest_xray/chest_xray/train/NORMAL/a.png"]
    assert images["split"].value_counts().to_dict() == {"train": 2, "test": 1, "": 1}


@pytest.mark.parametrize("of", ["file", "folder"])
@pytest.mark.parametrize("target", ["train/Normal", "val/COVID"])
def test_a_link_into_another_class_or_split_is_refused(tmp_path, of, target):
    put(tmp_path, "train/COVID/a.png", f"{target}/b.png")
    link = tmp_path / "train" / "COVID" / ("link.png" if of == "file" else "link")
    link.symlink_to(tmp_path / target / ("b.png" if of == "file" else ""))
    with pytest.raises(ValueError, match=rf"train/COVID/link.*: a link to {target}/b.png, in another class"):
        index_images(tmp_path)


def test_links_out_of_the_folder_and_back_up_are_followed_or_left(tmp_path):
    put(tmp_path / "elsewhere", "b.png")
    put(tmp_path / "data", "Normal/a.png")
    (tmp_path / "data" / "COVID").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "Normal" / "up").symlink_to(tmp_path / "data")
    assert index_images(tmp_path / "data").index.tolist() == ["COVID/b.png", "Normal/a.png"]


# -------------------------------------------------------------------------------- nothing without a word

def test_rare_names_of_images_are_taken(tmp_path):
    put(tmp_path, "Normal/a.jfif", "Normal/b.jpe", "Normal/c.IMA", "Normal/._d.png", "Normal/masks/e.png",
        ".git/f.png")
    dicom = tmp_path / "Normal" / "1.2.840.113619.2.55"
    dicom.write_bytes(bytes(128) + b"DICM" + bytes(20))
    found = [Path(name).name for name in index_images(tmp_path).index]
    assert found == ["1.2.840.113619.2.55", "a.jfif", "b.jpe", "c.IMA"]


def test_images_beside_the_splits_are_named_by_what_leaves_them_out(tmp_path, capsys):
    put(tmp_path, *(f"{part}/{label}/{i}.png" for part in ("train", "val", "dev")
                    for label in ("Normal", "COVID") for i in range(2)), "stray.png")
    images = index_images(tmp_path)
    assert (images["class"] == "").sum() == 5
    parts, _ = read_parts(images, 32)
    assert {name: len(part) for name, part in parts.items()} == {"train": 4, "val": 4}
    told = "5 images are left out, in no class folder of train, val or test: dev/COVID/0.png"
    assert told in capsys.readouterr().out
    summary = split(images, tmp_path.with_name("out"), dry_run=True)
    assert summary.left_out == {"not in a class folder": images.index[images["class"] == ""].tolist()}




def test_a_folder_without_rights_is_said(tmp_path, monkeypatch):
    put(tmp_path, "Normal/a.png", "COVID/b.png")
    scan = os.scandir

    def refusing(path):
        if Path(path).name == "COVID":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root, as whom tests may run, may read everything
    with pytest.raises(ValueError, match=r"COVID: this folder may not be read \(Permission denied\)"):
        index_images(tmp_path)


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: None, "no such folder"), (lambda path: path.write_text(""), "a file"),
    (lambda path: path.mkdir(), "empty folder"),
    (lambda path: put(path, "notes.txt"), r"no radiographs among 1 files \(1 .txt\)")])
def test_what_holds_no_images_is_said(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        index_images(tmp_path / "data")


# ----------------------------------------------------------------------------------------- label files

def test_a_label_file_says_which_class_has_which_number(tmp_path):
    put(tmp_path, "COVID/a.png", "NORMAL/b.png")
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({"labels": [["NORMAL/b.png", 1], ["COVID/a.png", 0]]}))
    folder = RadiographFolder(file, 32)
    assert folder.classes == ["COVID", "Normal"]
    assert folder.samples == [(str(tmp_path / "COVID/a.png"), 0), (str(tmp_path / "NORMAL/b.png"), 1)]


@pytest.mark.parametrize("labels", [
    [["../a.png", 0]], [["/a.png", 0]], [["a.png", -1]], [["a.png"]], [], "x"])
def test_label_files_that_lead_out_or_say_nothing_are_refused(tmp_path, labels):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(ValueError, match=r"dataset.json: expected"):
        index_images(tmp_path / "dataset.json")


def test_real_sets(real_data):
    chest = index_images(real_data / "chest_xray")
    assert chest.attrs["classes"] == ["Normal", "Pneumonia"]
    assert torn_patients(chest) == []
    assert set(chest["known"]) == {"file name"}
    covid = index_images(real_data / "covid_1125")
    assert covid.groupby("known").size().to_dict() == {"file name": 1000, "own": 124}
    assert index_images(real_data / "knee_kl").attrs["classes"] == list(GRADES)
    assert set(index_images(real_data / "COVID-19_Radiography_Dataset")["known"]) == {"own"}
