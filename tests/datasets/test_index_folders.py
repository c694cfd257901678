"""What is found below a folder, and which image a row of a table means."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genailab_helpers.datasets.index import TABLE, index_images, match_table, read_table


def make_tree(root: Path, tree: dict[str, list[str]]) -> Path:
    for folder, names in tree.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.fromarray(np.zeros((16, 16), np.uint8)).save(root / folder / name)
    return root


def test_images_are_found_in_an_order_of_their_names_alone(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "set", {"b": ["2.png", "10.PNG"], "a/deep": ["x.jpeg", "w y, z.webp"],
                                        "a": ["y.bmp"], "a/Masks": ["m.png"], ".hidden": ["h.png"]})
    (root / "noext").write_bytes(bytes(128) + b"DICM")
    for name in (".image.png", "._image.png", ".DS_Store", "notes.txt", "readme"):
        (root / name).write_text("no image")
    names = ["a/deep/w y, z.webp", "a/deep/x.jpeg", "a/y.bmp", "b/10.PNG", "b/2.png", "noext"]
    assert index_images(root).index.tolist() == names
    walk = os.walk

    def backwards(*args, **kwargs):
        for folder, folders, files in walk(*args, **kwargs):
            folders.reverse()
            yield folder, folders, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert index_images(str(root)).index.tolist() == names


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pipe_is_no_image_and_a_link_to_nothing_is_one_that_cannot_be_read(tmp_path):
    root = make_tree(tmp_path / "set", {"a": ["1.png"]})
    os.mkfifo(root / "a" / "2.png")
    (root / "a" / "3.png").symlink_to(tmp_path / "absent")
    assert index_images(root).index.tolist() == ["a/1.png", "a/3.png"]


def test_class_split_and_patient_of_each_image(tmp_path):
    make_tree(tmp_path, {"train/PNEUMONIA": ["person1_virus_2.png"], "test/NORMAL/images": ["x.png"],
                         "Validation/NORMAL": ["IM-0001-0001.png"], "test": ["loose.png"]})
    images = index_images(tmp_path)
    assert images["path"].tolist() == [str(tmp_path / name) for name in images.index]
    assert images.drop(columns="path").T.to_dict("list") == {
        "Validation/NORMAL/IM-0001-0001.png": ["Normal", "val", "IM-0001", "file name"],
        "test/NORMAL/images/x.png": ["Normal", "test", "test/NORMAL/images/x", "own"],
        "test/loose.png": ["", "test", "test/loose", "own"],
        "train/PNEUMONIA/person1_virus_2.png": ["Pneumonia", "train", "person1", "file name"]}


def test_the_table_of_a_set_is_found_beside_its_splits_too(tmp_path):
    make_tree(tmp_path, {"train/a": ["person1_virus_2.png", "person3_virus_1.png"]})
    (tmp_path / TABLE).write_text("file,patient\ntrain/a/person1_virus_2.png,smith\n")
    for root in (tmp_path, tmp_path / "train"):
        images = index_images(root)
        assert images.attrs["table"] == str(tmp_path / TABLE)
        assert images["patient"].tolist() == ["smith", "person3"]
    assert index_images(tmp_path / "train" / "a")["patient"].tolist() == ["person1", "person3"]


@pytest.mark.parametrize("text", [
    "filename,class,patient_id,split\na/x 1.png,NORMAL,7,valid\n",
    "\ufeffImage Index;Finding Labels;Patient ID;subset\na\\x 1.png;No Finding;7;validation\n\n",
    'other\tgroup\tGrade\tpath\tsplit\n1\t7\tnormal\t"./a/x 1.png"\tval\n'])
def test_a_table_is_read_whatever_its_dialect_and_columns(tmp_path, text):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    assert read_table(tmp_path / "t.csv").to_dict("index") == {
        2: {"file": "a/x 1.png", "class": "Normal", "patient": "7", "split": "val"}}


def match(tmp_path: Path, images: list[str], rows: list[str], table: str = "t.csv") -> list[str]:
    make_tree(tmp_path / "set", {str(Path(name).parent): [] for name in images})
    for name in images:
        (tmp_path / "set" / name).touch()
    (tmp_path / table).write_text("\n".join(["file", *rows]) + "\n")
    return match_table(index_images(tmp_path / "set"), tmp_path / table)["image"].tolist()


def test_a_row_means_the_image_at_its_path_or_whose_folders_agree(tmp_path):
    images = ["COVID/1.png", "Normal/1.png", "Normal/2.jpg", "a/b/3.png"]
    rows = ["COVID/1.png", "NORMAL/1.png", "b/3"]
    assert match(tmp_path, images, rows) == ["COVID/1.png", "Normal/1.png", "a/b/3.png"]
    rows = ["raw/Normal/2.jpg", "2", "2.dcm", "Normal/images/2.jpg"]
    assert match(tmp_path, images, rows) == ["Normal/2.jpg"] * 4


def test_a_row_of_another_folder_means_no_image(tmp_path):
    assert match(tmp_path, ["Normal/1.png", "x/2.png"], ["COVID/1.png", "c/b/2.png", "3.png"]) == ["", "", ""]


def test_a_path_may_start_where_the_table_lies(tmp_path):
    images = ["Normal/1.png", "COVID/1.png"]
    assert match(tmp_path, images, ["../Normal/1.png"], "set/COVID/t.csv") == ["Normal/1.png"]


def test_a_label_file_whose_classes_have_no_folders_numbers_them(tmp_path):
    make_tree(tmp_path, {"Normal": ["1.png"], "COVID": ["2.png"]})
    (tmp_path / "dataset.json").write_text('{"labels": [["COVID/2.png", 1], ["Normal/1.png", 1]]}')
    images = index_images(tmp_path / "dataset.json")
    assert images.attrs["classes"] == ["class 0", "class 1"]
    assert images["class"].to_dict() == {"COVID/2.png": "class 1", "Normal/1.png": "class 1"}
