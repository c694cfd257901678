"""One table says whose images these are, and everything follows it: no patient on two sides of a split."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from genailab_helpers.datasets.folders import read_parts
from genailab_helpers.datasets.index import TABLE, index_images, match_table, read_table, torn_patients
from genailab_helpers.datasets.names import GRADES
from genailab_helpers.datasets.preparation import organize, split
from genailab_helpers.datasets.shortcuts import audit_shortcuts, label_signal
from genailab_helpers.phantoms.chest import render_chests, sample_chests


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, write: Callable[..., Path]) -> Path:
    """A flat layout as NIH gives it: images with numbers for names, and a table of bare names."""
    root = tmp_path_factory.mktemp("followed")
    rows = []
    for i, image in enumerate(render_chests(sample_chests(96, seed=5), 32).images):
        path = write(root / "data" / ("Normal", "Effusion")[i % 2] / f"image_{i:03d}.png", image)
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


def test_a_patient_in_two_parts_by_the_table_is_refused(followed, tmp_path, put):
    for name, folder in (("image_000.png", "train"), ("image_002.png", "val")):
        put(tmp_path, f"{folder}/Normal/{name}", f"{folder}/Effusion/other_{folder}.png")
    images = index_images(tmp_path, followed / "table.csv")
    assert torn_patients(images) == ["P000"]
    with pytest.raises(ValueError, match=r"1 patients \(P000\) lie in several of its parts"):
        read_parts(images, 32)


@pytest.mark.parametrize(("pattern", "table", "known", "patient"), [
    (r"IM-(\d+)", "x", "pattern", "0115"), (None, "x", "table", "T7"), (None, None, "file name", "IM-0115")])
def test_pattern_goes_before_table_before_name(tmp_path, put, pattern, table, known, patient):
    put(tmp_path, "Normal/IM-0115-0001.png")
    if table:
        (tmp_path / "t.csv").write_text("file,patient\nIM-0115-0001,T7\n")
        table = tmp_path / "t.csv"
    row = index_images(tmp_path, table, pattern).iloc[0]
    assert (row["known"], row["patient"]) == (known, patient)


# ---------------------------------------------------------------------------------------------- the tables

@pytest.mark.parametrize(("file", "image"), [
    ("COVID/1.png", "COVID/1.png"), ("./COVID/1.png", "COVID/1.png"), ("COVID\\1.png", "COVID/1.png"),
    ("NORMAL/1.png", "Normal/images/1.png"), ("set/Normal/1.jpg", "Normal/images/1.png"),
    ("../Normal/images/1.png", "Normal/images/1.png"), ("b/3", "a/b/3.png"), ("2", "Normal/2.jpg"),
    ("2.dcm", "Normal/2.jpg"), ("Normal/images/2.jpg", "Normal/2.jpg"), ("raw/Normal/2.jpg", "Normal/2.jpg"),
    ("COVID/2.jpg", ""), ("c/b/3.png", ""), ("4.png", "")])
def test_a_row_means_the_image_at_its_path_or_whose_folders_agree(tmp_path, put, file, image):
    put(tmp_path, "COVID/1.png", "Normal/images/1.png", "Normal/2.jpg", "a/b/3.png")
    table = tmp_path / "COVID" / "t.csv"  # a path may start where the table lies, too
    table.write_text(f"file;patient\n{file};P1\n")
    assert match_table(index_images(tmp_path), table)["image"].tolist() == [image]


@pytest.mark.parametrize(("text", "line"), [
    ("filename,class,patient_id,split\na/x 1.png,NORMAL,7,valid\n", 2),
    ("\ufeffImage Index;Finding Labels;Patient ID;subset\na\\x 1.png;No Finding;7;validation\n\n", 2),
    ('other\tgroup\tGrade\tpath\tsplit\n1\t7\tnormal\t"./a/x 1.png"\tval\n', 2),
    ("sep=;\nfile;patient;class;split\na/x 1.png;7;Normal;val\n", 3),  # as Excel writes it
    ("\n;;\nfile;patient;class;split\n;;;\na/x 1.png;7;Normal;val\n\n", 5),
    ('\ufeff"sep=;"\r\n\r\nfile;patient;class;split\r\na/x 1.png;7;Normal;val\r\n', 4)])
def test_a_table_is_read_whatever_its_dialect_and_columns(tmp_path, text, line):
    (tmp_path / "t.csv").write_bytes(text.encode())
    assert read_table(tmp_path / "t.csv").to_dict("index") == {
        line: {"file": "a/x 1.png", "class": "Normal", "patient": "7", "split": "val"}}


@pytest.mark.parametrize("root", [".", "train"])
def test_the_table_of_a_set_is_found_beside_its_splits_too(tmp_path, put, root):
    put(tmp_path, "train/a/person1_virus_2.png", "train/a/person3_virus_1.png")
    (tmp_path / TABLE).write_text("file,patient\ntrain/a/person1_virus_2.png,smith\n")
    images = index_images(tmp_path / root)
    assert images.attrs["table"] == str(tmp_path / TABLE)
    assert images["patient"].tolist() == ["smith", "person3"]
    assert index_images(tmp_path / "train" / "a")["patient"].tolist() == ["person1", "person3"]


@pytest.mark.parametrize(("rows", "message"), [
    ("b,P0\na.png,P1", r"line 3: a.png fits 2 images: COVID/a.png, Normal/a.png; expected"),
    ("c.png,P1\nNormal/c.png,P2", "gives Normal/c.png several patients; expected one")])
def test_rows_that_fit_several_images_or_give_two_patients_are_refused(tmp_path, put, rows, message):
    put(tmp_path, "Normal/a.png", "COVID/a.png", "Normal/c.png")
    (tmp_path / TABLE).write_text(f"file,patient\n{rows}\n")
    with pytest.raises(ValueError, match=message):
        index_images(tmp_path)


def test_cells_are_text_and_say_nothing_where_they_are_blank(tmp_path):
    (tmp_path / "t.csv").write_text(
        "Image Index,Patient ID,Finding Labels,Split\na.png,007,NORMAL,training\nb.png,12.0,2.0,\n"
        "c.png,NA,nan,x\n\nd.png, ,Covid-19,TEST\n", encoding="utf-8-sig")
    rows = read_table(tmp_path / "t.csv")
    assert rows["patient"].tolist() == ["007", "12", "", ""]
    assert rows["class"].tolist() == ["Normal", "2", "", "COVID"]
    assert rows["split"].tolist() == ["train", "", "", "test"]
    assert rows.index.tolist() == [2, 3, 4, 6]


@pytest.mark.parametrize(("text", "message"), [
    ("name,patient\na,b\n", "no column for the image"), ("", "expected a CSV table"),
    ("file\nM\xc3\xbcller\xff", "utf-8"), ("PK\3\4\0\0\xff", "no text"),
    ("file,label\na,\xcd\xee\xf0\xec\xe0\n", "Windows-1252")])  # the last in Cyrillic
def test_what_is_no_table_is_said(tmp_path, text, message):
    (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "t.csv")


# --------------------------------------------------------------------------------------------- the classes

@pytest.mark.parametrize(("names", "classes"), [
    ([*(f"train/{grade}/a.png" for grade in range(5)), "val/0/b.png", "val/1/c.png"], list(GRADES)),
    (["0/a.png", "1/b.png"], ["0", "1"]), (["Healthy/a.png", "Severe/b.png"], ["Healthy", "Severe"])])
def test_numbers_are_grades_only_among_all_five_or_where_asked(tmp_path, put, names, classes):
    put(tmp_path, *names)
    assert index_images(tmp_path).attrs["classes"] == classes
    graded = index_images(tmp_path, graded=True)
    assert graded.attrs["classes"] == list(GRADES)
    assert {"grade_0"} <= set(graded["class"]) <= set(GRADES)


def test_folders_inside_a_class_are_no_class(tmp_path, put):
    put(tmp_path / "raw", "COVID/patient7/1/2.png", "COVID/Normal/3.png", "Normal/viral/4.png",
        "Normal/0/images/5.png")
    images = index_images(tmp_path / "raw")
    assert images["class"].tolist() == ["COVID", "COVID", "Normal", "Normal"]
    organize(images, tmp_path / "organized")
    assert index_images(tmp_path / "organized")["class"].value_counts().to_dict() == {"COVID": 2, "Normal": 2}


def test_names_that_differ_in_case_or_unicode_form_are_one_class(tmp_path, put):
    put(tmp_path, "Ödem/a.png", "O\u0308dem/b.png", "ÖDEM/c.png", "other/d.png")
    assert len(index_images(tmp_path).attrs["classes"]) == 2


def test_what_kaggle_unpacks_is_understood(tmp_path, put):
    put(tmp_path, "archive/chest_xray/train/NORMAL/a.png", "archive/chest_xray/train/PNEUMONIA/b.png",
        "archive/chest_xray/test/NORMAL/c.png", "archive/chest_xray/__MACOSX/train/NORMAL/d.png",
        "archive/chest_xray/chest_xray/train/NORMAL/a.png")
    images = index_images(tmp_path / "archive")
    assert images.attrs["classes"] == ["Normal", "Pneumonia"]
    assert images.loc[images["class"] == ""].index.tolist() == ["chest_xray/chest_xray/train/NORMAL/a.png"]
    assert images["split"].value_counts().to_dict() == {"train": 2, "test": 1, "": 1}


@pytest.mark.parametrize("of", ["file", "folder"])
@pytest.mark.parametrize("target", ["train/Normal", "val/COVID"])
def test_a_link_into_another_class_or_split_is_refused(tmp_path, put, of, target):
    put(tmp_path, "train/COVID/a.png", f"{target}/b.png")
    link = tmp_path / "train" / "COVID" / ("link.png" if of == "file" else "link")
    link.symlink_to(tmp_path / target / ("b.png" if of == "file" else ""))
    with pytest.raises(ValueError, match=r"b.png: the same file as .*; remove the link") as caught:
        index_images(tmp_path)
    assert str(link) in str(caught.value)


def test_links_out_of_the_folder_are_followed_and_those_back_up_refused(tmp_path, put):
    put(tmp_path / "elsewhere", "b.png")
    put(tmp_path / "data", "Normal/a.png")
    (tmp_path / "data" / "COVID").symlink_to(tmp_path / "elsewhere")
    assert index_images(tmp_path / "data").index.tolist() == ["COVID/b.png", "Normal/a.png"]
    (tmp_path / "data" / "Normal" / "up").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match=r"Normal/up/COVID/b.png: the same file as .*/data/COVID/b.png"):
        index_images(tmp_path / "data")
    (tmp_path / "data" / "Normal" / "up").unlink()
    (tmp_path / "data" / "Viral").symlink_to(tmp_path / "elsewhere")  # one image would have two classes
    with pytest.raises(ValueError, match="the same file as"):
        index_images(tmp_path / "data")


# -------------------------------------------------------------------------------- nothing without a word

def test_images_are_found_by_names_common_and_rare_in_an_order_of_these_alone(tmp_path, put, monkeypatch):
    names = ["a/1.2.840.113619.2.55", "a/deep/w y, z.webp", "a/deep/x.jpeg", "a/v.IMA", "a/w.jpe", "a/x.jfif",
             "a/y.bmp", "b/10.PNG", "b/2.png", "noext"]
    root = put(tmp_path / "set", *names, "a/Masks/m.png", ".hidden/h.png", ".image.png", "a/._image.png",
               ".DS_Store", "notes.txt", "readme")
    for dicom in (names[0], names[-1]):
        (root / dicom).write_bytes(bytes(128) + b"DICM" + bytes(20))
    assert index_images(root).index.tolist() == names
    walk = os.walk

    def backwards(*args, **kwargs):
        for folder, folders, files in walk(*args, **kwargs):
            folders.reverse()
            yield folder, folders, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert index_images(str(root)).index.tolist() == names


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pipe_is_no_image_and_a_link_to_nothing_is_one_that_cannot_be_read(tmp_path, put):
    root = put(tmp_path / "set", "a/1.png")
    os.mkfifo(root / "a" / "2.png")
    (root / "a" / "3.png").symlink_to(tmp_path / "absent")
    assert index_images(root).index.tolist() == ["a/1.png", "a/3.png"]


def test_class_split_and_patient_of_each_image(tmp_path, put):
    put(tmp_path, "train/PNEUMONIA/person1_virus_2.png", "test/NORMAL/images/x.png", "test/loose.png",
        "train/NORMAL/images/x.png", "Validation/NORMAL/IM-0001-0001.png")
    images = index_images(tmp_path)
    assert images["path"].tolist() == [str(tmp_path / name) for name in images.index]
    assert images.drop(columns="path").T.to_dict("list") == {
        "Validation/NORMAL/IM-0001-0001.png": ["Normal", "val", "IM-0001", "file name"],
        "test/NORMAL/images/x.png": ["Normal", "test", "test/NORMAL/images/x", "own"],  # not the x of train
        "test/loose.png": ["", "test", "test/loose", "own"],
        "train/NORMAL/images/x.png": ["Normal", "train", "train/NORMAL/images/x", "own"],
        "train/PNEUMONIA/person1_virus_2.png": ["Pneumonia", "train", "person1", "file name"]}


def test_images_beside_the_splits_are_named_by_what_leaves_them_out(tmp_path, put, capsys):
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


def test_a_folder_without_rights_is_said(tmp_path, put, monkeypatch):
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
    (lambda path, put: None, "no such folder"), (lambda path, put: path.write_text(""), "a file"),
    (lambda path, put: path.mkdir(), "empty folder"),
    (lambda path, put: put(path, "notes.txt"), r"no radiographs among 1 files \(1 .txt\)")])
def test_what_holds_no_images_is_said(tmp_path, put, make, message):
    make(tmp_path / "data", put)
    with pytest.raises(ValueError, match=message):
        index_images(tmp_path / "data")


def test_real_sets(real_data):
    chest = index_images(real_data / "chest_xray")
    assert chest.attrs["classes"] == ["Normal", "Pneumonia"]
    assert torn_patients(chest) == []
    assert set(chest["known"]) == {"file name"}
    covid = index_images(real_data / "covid_1125")
    assert covid.groupby("known").size().to_dict() == {"file name": 1000, "own": 124}
    assert index_images(real_data / "knee_kl").attrs["classes"] == list(GRADES)
    assert set(index_images(real_data / "COVID-19_Radiography_Dataset")["known"]) == {"own"}
