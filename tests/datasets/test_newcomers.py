"""Folders as people have them: what would be wrong in silence is right, or said."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from genailab_helpers.commands import main
from genailab_helpers.datasets.audit import audit_images
from genailab_helpers.datasets.index import index_images, read_table, torn_patients
from genailab_helpers.datasets.preparation import organize, preprocess, split


def draw(*files: Path, colour: bool = False) -> None:
    """Write a small image of noise at each path."""
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (48, 48, 3 if colour else 1), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).save(file)


def table(place: Path, /, **columns: list[str]) -> Path:
    pd.DataFrame(columns).to_csv(place, index=False)
    return place


def test_a_table_that_names_no_image_is_refused_in_one_line(tmp_path):
    draw(tmp_path / "in/a.png")
    wrong = table(tmp_path / "wrong.csv", file=["x.png", "y.png"], label=["Normal", "COVID"])
    with pytest.raises(ValueError, match=r"none of its 2 rows names an image below .*a\.png.*file: file"):
        organize(index_images(tmp_path / "in", wrong), tmp_path / "out")


def test_a_name_is_the_same_in_both_unicode_forms(tmp_path):
    draw(tmp_path / "in/Mu\u0308ller.png", tmp_path / "in/other.png")  # as macOS decomposes it
    listed = table(tmp_path / "t.csv", file=["M\u00fcller.png", "other"], label=["Normal", "COVID"])
    done = organize(index_images(tmp_path / "in", listed), tmp_path / "out")
    assert done.counts == {("Normal", ""): 1, ("COVID", ""): 1}
    assert "Read from t.csv: file: file, class: label, patient: no column, split: no column." in done.notes


def test_images_without_a_label_are_no_class_of_their_own(tmp_path):
    draw(*(tmp_path / f"films/{n}.png" for n in range(5)))
    listed = table(tmp_path / "t.csv", file=["0", "1", "2", "3"], label=["Benign", "Benign", "Malignant", ""])
    images = index_images(tmp_path / "films", listed)
    assert images["class"].tolist() == ["Benign", "Benign", "Malignant", "", ""]
    done = split(images, tmp_path / "out", near_duplicates=False)
    assert done.left_out["not in a class folder"] == ["3.png", "4.png"]


@pytest.mark.parametrize("number", ["0", "3"])
def test_grades_are_found_below_folders_that_hold_nothing_else(tmp_path, number):
    draw(*(tmp_path / f"archive/knees/{grade}/{n}.png" for grade in range(5) for n in range(2)))
    images = index_images(tmp_path)
    assert images["class"].loc[f"archive/knees/{number}/1.png"] == f"grade_{number}"


def test_one_class_is_said_with_the_folders_that_may_be_meant(tmp_path):
    draw(*(tmp_path / f"archive/sets/{name}/{n}.png" for name in ("Benign", "Malignant") for n in range(2)))
    [said] = [found.message for found in audit_images(index_images(tmp_path)).findings
              if found.check == "one class"]
    assert said == ("The images are of one class, archive, in archive/sets/Benign, archive/sets/Malignant.")


@pytest.mark.parametrize(("train", "test"), [("training_set", "test_set"), ("Train-Data", "TEST data")])
def test_common_names_of_splits_are_no_classes(tmp_path, train, test):
    draw(*(tmp_path / part / name / "1.png" for part in (train, test) for name in ("Benign", "Malignant")))
    images = index_images(tmp_path)
    assert (sorted(set(images["split"])), images.attrs["classes"]) == (["test", "train"],
                                                                        ["Benign", "Malignant"])


def test_columns_of_one_meaning_are_refused_and_patients_found(tmp_path):
    two = table(tmp_path / "two.csv", file=["a"], grade1=["0"], grade2=["1"])
    with pytest.raises(ValueError, match="the columns grade1, grade2 may all be the class; keep one"):
        read_table(two)
    one = table(tmp_path / "one.csv", file=["a"], PatientNo=["7"])
    assert read_table(one)["patient"].tolist() == ["7"]


def test_files_that_are_no_images_are_named_by_every_step(tmp_path):
    draw(*(tmp_path / f"in/{name}/{n}.png" for name in ("Normal", "COVID") for n in range(2)))
    Image.new("L", (48, 48)).save(tmp_path / "in/COVID/moving.gif")
    (tmp_path / "in/more.zip").write_bytes(b"PK")
    images = index_images(tmp_path / "in")
    for step in (organize, preprocess, split):
        done = step(images, tmp_path / step.__name__)
        assert done.left_out["not an image"] == ["COVID/moving.gif", "more.zip"], step
    [found] = [found for found in audit_images(images).findings if found.check == "other files"]
    assert set(found.files) == {"COVID/moving.gif", "more.zip"}


def test_photographs_are_an_error_of_the_audit(tmp_path):
    draw(*(tmp_path / name / f"{n}.png" for name in ("Normal", "COVID") for n in range(4)), colour=True)
    assert "in colour" in {found.check for found in audit_images(index_images(tmp_path)).findings}


def test_unknown_patients_are_counted_as_such(tmp_path):
    draw(*(tmp_path / f"in/{name}/{n}.png" for name in ("Normal", "COVID") for n in range(3)))
    done = split(index_images(tmp_path / "in"), tmp_path / "out", near_duplicates=False)
    assert any("of 6 images the patient is not known" in note for note in done.notes)


def test_a_folder_called_like_a_patient_is_one(tmp_path):
    draw(*(tmp_path / f"in/train/{name}/{person}/study1/{k}.png" for name in ("Normal", "COVID")
           for person in ("patient1", "Case 02") for k in range(2)),
         *(tmp_path / "in/test" / name for name in ("COVID/patient1/9.png", "Normal/1/9.png")))
    images = index_images(tmp_path / "in")
    assert images["class"].value_counts().to_dict() == {"COVID": 5, "Normal": 5}
    assert images["known"].value_counts().to_dict() == {"folder name": 9, "own": 1}
    assert images["patient"].nunique() == 5
    assert torn_patients(images) == ["COVID/patient1"]


def test_a_patient_keeps_the_name_however_the_class_is_written(tmp_path):
    draw(*(tmp_path / "in" / name for name in (
        "train/NORMAL/patient1/IM-0001-0001.png", "train/NORMAL/patient1/case1/IM-0002-0001.png",
        "train/COVID/patient1/IM-0001-0002.png", "test/Normal/patient1/a.png",
        "test/Covid-19/patient2/a.png")))
    images = index_images(tmp_path / "in")
    assert torn_patients(images) == ["Normal/patient1"]
    assert sorted(set(images["patient"])) == ["COVID/patient1", "COVID/patient2", "Normal/patient1"]


def test_folders_of_patients_are_no_classes_and_a_table_beside_is_named(tmp_path):
    names = [f"train/patient{k // 2:05}/study{k}/view1.png" for k in range(8)]
    draw(*(tmp_path / "in" / name for name in names))
    told = table(tmp_path / "in/train.csv", Path=names, Finding=["Normal", "COVID"] * 4)
    images = index_images(tmp_path / "in")
    assert (images["class"].nunique(), images["patient"].nunique()) == (1, 4)
    [said] = [found.message for found in audit_images(images).findings if found.check == "one class"]
    assert said.endswith("Folders called like patients are no classes. "
                         f"A table may know the classes (--table): {told}.")
    images = index_images(tmp_path / "in", told)
    assert images["class"].value_counts().to_dict() == {"COVID": 4, "Normal": 4}
    assert images["patient"].nunique() == 4


@pytest.mark.parametrize(("names", "patients"), [
    (["COVID/sub-S03045/ses-1/a.png", "Normal/sub-S03045/b.png"], {"sub-S03045"}),  # BIMCV
    (["XR_HAND/patient00012/1.png", "XR_WRIST/patient00012/1.png"], {"patient00012"}),  # MURA
    (["Normal/XK7/IM-0001-0001.png", "Normal/XK8/IM-0001-0001.png"], {"XK7", "XK8"}),  # OsiriX
    (["0001-F-037Y0.png", "0001-F-037Y1.png"], {"0001-F-037Y"}),  # BUU-LSPINE
    (["Meyer^Anna/1/a.png", "Meyer^Anna/2/b.png"], {hashlib.sha256(b"Meyer^Anna").hexdigest()[:12]}),
    (["Normal/20230114_001.png", "Normal/20230114_002.png"], {"Normal/20230114_001", "Normal/20230114_002"})])
def test_patients_are_known_as_public_sets_name_them(tmp_path, names, patients):
    draw(*(tmp_path / name for name in names))
    assert set(index_images(tmp_path)["patient"]) == patients


def test_a_named_table_knows_the_classes_where_folders_are_archives(tmp_path):
    names = [f"images_00{k % 2}/images/{k}.png" for k in range(6)]
    draw(*(tmp_path / "in" / name for name in names), tmp_path / "in/images_001/leftMask/0.png")
    told = table(tmp_path / "nih.csv", **{"Image Index": [f"{k}.png" for k in range(6)],
                                          "Finding Labels": ["No Finding", "Pneumonia"] * 3})
    assert set(index_images(tmp_path / "in")["class"]) == {"images"}
    images = index_images(tmp_path / "in", told)
    assert images["class"].value_counts().to_dict() == {"Normal": 3, "Pneumonia": 3}
    found = {finding.check for finding in audit_images(images).findings}
    assert not found & {"conflicting labels", "outside classes"}


@pytest.mark.parametrize(("folder", "split"), [
    ("stage_2_train_images", "train"), ("dicom-images-test/1.2.276.0.7230/1.2.276.0.1", "test"),
    ("train_data/train", "train"), ("validate", "val")])
def test_splits_are_known_as_public_sets_name_them(tmp_path, folder, split):
    draw(tmp_path / "in" / folder / "a.png", tmp_path / "in" / folder / "b.png")
    images = index_images(tmp_path / "in")
    assert (set(images["split"]), set(images["class"])) == ({split}, {"in"})


def test_a_number_that_a_spreadsheet_has_rounded_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"line 2: the patient 8,36485E\+37 was rounded by a spreadsheet"):
        read_table(table(tmp_path / "a.csv", file=["a.png"], patient=["8,36485E+37"]))


@pytest.mark.parametrize(("folder", "n_patients"), [("M{}ller_Anna_1957-03-02", 6), ("{}", 12)])
def test_images_of_a_small_folder_within_a_class_stay_together(tmp_path, folder, n_patients):
    """A person's name is the same person in every class; a number is not."""
    draw(*(tmp_path / "in" / name / folder.format(k) / f"{n}.png" for name in ("Normal", "COVID")
           for k in range(1, 7) for n in range(3)))
    images = index_images(tmp_path / "in")
    assert set(images["known"]) == {"subfolder"}
    assert images["patient"].nunique() == n_patients
    assert not images["patient"].str.contains("Anna").any()
    assert set(index_images(tmp_path / "in" / "COVID")["known"]) == {"own"}  # few folders may be anything


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8", "utf-8-sig"])
def test_a_table_is_read_as_excel_writes_it(tmp_path, encoding):
    draw(tmp_path / "in/M\u00fcller.png", tmp_path / "in/other.png")
    lines = "sep=;", "image;label;Patient Name", "M\u00fcller.png;Normal;A", "other.png;COVID;B", ""
    (tmp_path / "t.csv").write_bytes("\r\n".join(lines).encode(encoding))
    images = index_images(tmp_path / "in", tmp_path / "t.csv")
    assert images["class"].tolist() == ["Normal", "COVID"]
    [found] = [found for found in audit_images(images).findings if "The table" in found.message]
    assert (found.check, "Patient Name" in found.message) == ("personal data", True)


@pytest.mark.parametrize(("patients", "merged"), [
    (["a", "", "b", "", "", "c", ""], 4), (["a", "a", "b", "", "", "c", ""], 0), ([""] * 7, 0),
    (["", "a", "", "b", "", "", "c"], 0), (["a", "b", "c", "", "", "", ""], 0)])
def test_merged_cells_of_a_spreadsheet_are_suspected(tmp_path, patients, merged):
    files = [f"{n}.png" for n in range(7)]
    draw(*(tmp_path / "in/Normal" / name for name in files))
    images = index_images(tmp_path / "in", table(tmp_path / "t.csv", file=files, patient=patients))
    found = [found for found in audit_images(images).findings if found.check == "merged cells"]
    assert [len(one.files) for one in found] == [merged] * bool(merged)
    (tmp_path / "t.csv").rename(tmp_path / "in/films.csv")  # where blank cells are those of nobody known
    assert "merged cells" not in {one.check for one in audit_images(index_images(tmp_path / "in")).findings}


def test_columns_about_persons_are_found_in_a_table_that_is_damaged(tmp_path):
    draw(tmp_path / "Normal/a.png")
    (tmp_path / "x.csv").write_bytes(b"Patient Name;x\nRen\xc3\xa9;\x00\xff\n")
    assert "The table x.csv has columns about persons: Patient Name." in {
        found.message for found in audit_images(index_images(tmp_path)).findings}


@pytest.mark.parametrize("label", ["Pneumonia|Effusion", "Pneumonia;Effusion"])
def test_an_image_of_several_findings_is_said(tmp_path, label):
    draw(*(tmp_path / f"in/{n}.png" for n in range(3)))
    listed = table(tmp_path / "t.csv", file=["0", "1", "2"], label=["Normal", label, "Normal"])
    done = organize(index_images(tmp_path / "in", listed), tmp_path / "out")
    assert done.left_out == {"several classes in one cell": ["1.png"]}


def test_arms_of_a_study_are_no_patients(tmp_path):
    rows = read_table(table(tmp_path / "a.csv", file=[f"{k}.png" for k in range(40)], Group=["A", "B"] * 20))
    assert set(rows["patient"]) == {""}
    assert "patient: no column" in rows.attrs["columns"]


def test_folders_of_patients_with_other_names_are_doubted_and_a_pattern_sees_them(tmp_path):
    draw(*(tmp_path / f"in/{k}/ST-1/{n}.png" for k in range(1001, 1013) for n in range(2)))
    (tmp_path / "in/annotations").mkdir()
    (tmp_path / "in/annotations/train.txt").write_text("a note")
    images = index_images(tmp_path / "in")
    found = {finding.check for finding in audit_images(images).findings}
    assert "many classes" in found
    assert "empty class" not in found
    assert index_images(tmp_path / "in", None, r"^(\d{4})/")["patient"].nunique() == 12


@pytest.mark.parametrize(("numbers", "n_patients"), [
    (["117", "118 "], 2), (["ANON"], 6), (["ANON", "Anonymous"], 6), ([], 6)])
def test_dicom_files_of_one_number_are_one_patient(tmp_path, save_dicom, numbers, n_patients):
    pixels = np.random.default_rng(0).integers(0, 4096, (6, 48, 48), dtype=np.uint16)
    for k in range(6):
        file = tmp_path / "in" / "AB"[k % 2] / f"{k}{'.dcm' * (k % 3 == 0)}"
        file.parent.mkdir(parents=True, exist_ok=True)
        tags = {"PatientID": numbers[k // 3 % len(numbers)]} if numbers else {}
        save_dicom(file, pixels[k], BitsStored=12, **tags)
    images = index_images(tmp_path / "in")
    assert images["patient"].nunique() == n_patients
    assert set(images["known"]) == {"DICOM header" if n_patients == 2 else "own"}
    preprocess(images, tmp_path / "out", 16)
    assert not re.search(r"\b11[78]\b", (tmp_path / "out" / "films.csv").read_text())
    assert index_images(tmp_path / "out")["patient"].nunique() == n_patients


@pytest.mark.parametrize("words", [("classify", "IMAGE", "M"), ("segment", "FOLDER"), ("sample", "IMAGE")])
def test_a_wrong_order_is_told(tmp_path, capsys, words):
    draw(tmp_path / "films/a.png")
    places = {"IMAGE": str(tmp_path / "films/a.png"), "FOLDER": str(tmp_path / "films"), "M": "m"}
    with pytest.raises(SystemExit) as ended:
        main([places.get(word, word) for word in words] + ["--output", str(tmp_path / "out")] * (
            words[0] != "classify"))
    assert ended.value.code == 2
    assert "no model; expected a folder that `genailab train` wrote" in capsys.readouterr().err


def test_classes_asked_for_are_those_of_another_case(tmp_path):
    draw(*(tmp_path / f"in/archive/{name}/{n}.png" for name in ("Benign", "Malignant") for n in range(2)))
    done = organize(index_images(tmp_path / "in"), tmp_path / "out", ["benign", "MALIGNANT"])
    assert sum(done.counts.values()) == 4
    report = audit_images(index_images(tmp_path / "out"), ["benign", "malignant"])
    found = {finding.check for finding in report.findings}
    assert not found & {"missing class", "extra class"}
    with pytest.raises(ValueError, match=r"has one known class by path \(Benign, Malignant, archive\)"):
        organize(index_images(tmp_path / "in"), tmp_path / "other")
