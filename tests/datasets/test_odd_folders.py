"""Folders and tables that strangers have: one bad thing is named, and the rest goes on."""

import os
import stat
from functools import partial

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from genailab_helpers.checkpoints import whole_file, whole_folder
from genailab_helpers.datasets.audit import audit_images
from genailab_helpers.datasets.index import TABLE, index_images, read_table
from genailab_helpers.datasets.preparation import create_structure, organize, preprocess, split

posix = pytest.mark.skipif(os.name == "nt", reason="modes, pipes and long names of POSIX")


@pytest.mark.parametrize("bits", [None, [12, 12]])
def test_an_odd_header_does_not_end_an_audit(tmp_path, put, bits):
    pydicom = pytest.importorskip("pydicom")
    put(tmp_path, *(f"Normal/{i}.png" for i in range(3)))
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = "1.2", "1.2.3"
    data.Rows = data.Columns = 32
    data.PhotometricInterpretation, data.BitsAllocated, data.BitsStored = "MONOCHROME2", 16, bits
    data.save_as(tmp_path / "Normal/odd.dcm", enforce_file_format=True)
    report = audit_images(index_images(tmp_path))
    [found] = [finding for finding in report.findings if finding.check == "unreadable"]
    assert found.files == ("Normal/odd.dcm",)


@posix
@pytest.mark.parametrize("kind", ["pipe", "dead link", "folder"])
def test_what_is_called_like_a_table_and_is_none(tmp_path, put, kind):
    root = put(tmp_path / "set", "Normal/a.png", "COVID/b.png")
    make = {"pipe": os.mkfifo, "dead link": partial(os.symlink, "nowhere"), "folder": os.mkdir}[kind]
    make(root / TABLE)
    images = index_images(root)
    audit_images(images)
    organize(images, tmp_path / "out")
    make(tmp_path / "out2")
    said = r"films\.csv: expected a CSV table in UTF-8, UTF-16 or Windows-1252 \(no such file\)"
    with pytest.raises(ValueError, match=said):
        read_table(root / TABLE)
    (tmp_path / "full").mkdir()
    make(tmp_path / "full" / TABLE)
    if kind != "folder":
        organize(images, tmp_path / "full", replace=True)


def test_what_a_spreadsheet_would_compute_is_text_in_films_csv_and_comes_back(tmp_path, put):
    put(tmp_path / "raw", "=1+1/-b.png", "@x/c.png")
    table = "file,patient\n=1+1/-b.png,+p1\n@x/c.png,=cmd|' /C calc'!A0\n"
    (tmp_path / "table.csv").write_text(table)
    images = index_images(tmp_path / "raw", tmp_path / "table.csv")
    organize(images, tmp_path / "out", ["=1+1", "@x"])
    stored = pd.read_csv(tmp_path / "out" / TABLE, dtype=str, keep_default_na=False)
    assert not [cell for cell in stored.to_numpy().ravel() if cell[:1] in ("=", "+", "-", "@")]
    again = index_images(tmp_path / "out")
    assert sorted(again["patient"]) == sorted(["+p1", "=cmd|' /C calc'!A0"])
    assert set(again["class"]) == {"=1+1", "@x"}
    organize(images, tmp_path / "out", ["=1+1"], replace=True)  # the folder is known as our own


# ---------------------------------------------------------------- names and modes


@posix
@pytest.mark.parametrize("length", [241, 251, 255])
def test_long_names_are_written(tmp_path, put, length):
    long = "ä" * ((length - 6) // 2)
    put(tmp_path / "raw", *(f"{part}/Normal/{long}{i}.png" for part in "ab" for i in "01"),
        f"c/Normal/{'y' * length}", f"c/Normal/{'y' * (length - 1)}z")
    first = tmp_path / "raw" / index_images(tmp_path / "raw").index[0]
    first.rename(first.with_name("z" * (length - 4) + ".dcm"))
    for number, step in enumerate((preprocess, organize)):
        images = index_images(tmp_path / "raw")
        step(images, tmp_path / f"out{number}")
        assert len(index_images(tmp_path / f"out{number}")) == len(images)
    with whole_file(tmp_path / ("n" * (length - 5) + ".json")) as path:
        path.write_text("x")
    for _ in range(2):
        with whole_folder(tmp_path / ("f" * length), lambda folder: None) as path:
            (path / "x").touch()
    assert [path.name[:2] for path in tmp_path.glob(".*")] == []


@posix
def test_a_name_that_is_no_utf_8_is_told(tmp_path, put):
    root = put(tmp_path, "Normal/a.png")
    os.rename(os.fsencode(root / "Normal/a.png"), os.fsencode(root) + b"/Normal/caf\xe9.png")
    with pytest.raises(ValueError, match=r"the name 'Normal/caf.udce9.png' is no UTF-8; rename it") as caught:
        index_images(root)
    str(caught.value).encode()


def test_names_that_some_system_cannot_have():
    for name in ("CON", "nul", "com1.x", "Normal.", "a/b", "..", "", "a\nb", "a:b", "a\0", "lpt1"):
        with pytest.raises(ValueError, match="expected names that a folder can have"):
            create_structure("never", [name])
    create_structure("never", ["Normal", "Lung_Opacity", "COVID-19", "$x", "console", "été"], dry_run=True)


@posix
def test_what_is_private_stays_private(tmp_path, put):
    root = put(tmp_path / "raw", *(f"Normal/{i}.png" for i in range(30)))
    for path in root.rglob("*.png"):
        path.chmod(0o600)
    (root / "Normal/0.png").chmod(0o644)
    for number, step in enumerate((organize, preprocess, split)):
        step(index_images(root), tmp_path / f"out{number}")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode)
                 for path in (tmp_path / f"out{number}").rglob("*.png")}
        assert modes.pop("0.png") == 0o644
        assert set(modes.values()) == {0o600}
        assert stat.S_IMODE((tmp_path / f"out{number}" / TABLE).stat().st_mode) == 0o600
    (tmp_path / "kept").write_text("old")
    (tmp_path / "kept").chmod(0o600)
    with whole_file(tmp_path / "kept") as path:
        path.write_text("new")
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o600


@posix
def test_no_link_is_followed_and_a_full_disk_leaves_nothing(tmp_path):
    with whole_file(tmp_path / "a.json") as path:
        assert not path.is_symlink()
        seen = path.name
    with whole_file(tmp_path / "a.json") as path:
        assert path.name != seen  # nobody can have put a link there
    (tmp_path / "target").write_text("theirs")
    (tmp_path / "a.json").unlink()
    (tmp_path / "a.json").symlink_to("target")
    with whole_file(tmp_path / "a.json") as path:
        path.write_text("ours")
    assert (tmp_path / "target").read_text() == "theirs"


@pytest.mark.parametrize("known", ["²", "99", "7", "\xff", ""])
def test_a_damaged_note_of_bits_is_made_again(tmp_path, own_cache, known):
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(tmp_path / "a.png")
    assert index_images(tmp_path).attrs["bit_depth"].bits == 10
    [note] = own_cache.rglob("*.bits")
    note.write_bytes(known.encode("latin-1"))
    assert index_images(tmp_path).attrs["bit_depth"].bits == 10


def test_a_home_of_nobody_is_a_folder_like_any_other():
    with pytest.raises(ValueError, match=r"~nobody_here/images: no such folder"):
        index_images("~nobody_here/images")
