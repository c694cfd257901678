"""The audit of a folder: each planted fault is found by its name, and clean sets stay clean."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from genailab_helpers.datasets import audit, privacy, shortcuts
from genailab_helpers.datasets.audit import CHECKS, SEVERITIES, AuditReport, audit_folder
from genailab_helpers.datasets.folders import list_radiographs
from genailab_helpers.datasets.privacy import names_somebody
from genailab_helpers.phantoms.chest import FINDINGS, render_chests, sample_chests
from genailab_helpers.phantoms.spine import render_spines, sample_spines

N_FILMS = 48
SPLITS = ("train", "train", "val", "test")


def levels(image: torch.Tensor) -> np.ndarray:
    return ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()


def draw(n_films: int, seed: int, finding: tuple[str, ...] = ("Normal", "Pneumonia")
         ) -> tuple[list[np.ndarray], list[str]]:
    chests = sample_chests(n_films, seed, finding)
    return ([levels(image) for image in render_chests(chests, 128).images],
            [FINDINGS[number] for number in chests.finding])


def save(pixels: np.ndarray, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def lateral(seed: int, side: int = 128) -> np.ndarray:
    """Draw a body seen from its side: one lung field, the spine behind it, the heart in front."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:side * 1j, 0:1:side * 1j] + random.normal(0, 0.02, (2, 1, 1))

    def solid(centre_x: float, centre_y: float, width: float, height: float, thickness: float) -> np.ndarray:
        return thickness * np.sqrt(np.clip(1 - ((x - centre_x) / width)**2
                                           - ((y - centre_y) / height)**2, 0, None))

    path = (solid(.5, .6, .36, .75, 1) + solid(.76, .5, .07, .8, .55) + solid(.38, .66, .15, .14, .4)
            + solid(.42, 1.05, .4, .3, .6) - solid(.52, .45, .2, .33, .75 + .1 * random.normal()))
    film = 255 * (1 - np.exp(-1.3 * path.clip(0))) + random.normal(0, 2, path.shape)
    return film.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, Path]:
    """Two clean data sets of the same films, without and with splits; tests change copies of them."""
    base = tmp_path_factory.mktemp("clean")
    for number, (pixels, label) in enumerate(zip(*draw(N_FILMS, 11), strict=True)):
        save(pixels, base / "whole" / label / f"film_{number:03}.png")
        save(pixels, base / "split" / SPLITS[number // 2 % 4] / label / f"film_{number:03}.png")
    return {"whole": base / "whole", "split": base / "split", "cache": base / "cache"}


@pytest.fixture(autouse=True)
def own_cache(drawn, monkeypatch):
    monkeypatch.setenv("GENAILAB_CACHE", str(drawn["cache"]))


@pytest.fixture
def quick(monkeypatch):
    """Leave out what has its own tests and needs seconds: shortcuts and label signal, found faultless."""
    class Clean:
        flagged = ()
        signal = True

    monkeypatch.setattr(shortcuts, "audit_shortcuts", lambda *args, **kwargs: Clean())
    monkeypatch.setattr(shortcuts, "label_signal", lambda *args, **kwargs: Clean())


@pytest.fixture
def whole(drawn, tmp_path) -> Path:
    return Path(shutil.copytree(drawn["whole"], tmp_path / "whole"))


@pytest.fixture
def split(drawn, tmp_path) -> Path:
    return Path(shutil.copytree(drawn["split"], tmp_path / "split"))


def films_of(root: Path, pattern: str = "**/*.png") -> list[Path]:
    return sorted(root.glob(pattern))


def found(report: AuditReport, check: str) -> list[str]:
    return [name for finding in report.findings if finding.check == check for name in finding.files]


def names(root: Path, *paths: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in paths}


def grave(report: AuditReport) -> set[str]:
    return {finding.check for finding in report.findings if finding.severity != "note"}


def test_clean_sets_raise_no_alarm(drawn, quick):
    for kind in ("whole", "split"):
        report = audit_folder(drawn[kind])
        assert grave(report) == set(), str(report)
        assert report.ok


# ---------------------------------------------------------------- one fault each

Plant = Callable[[Path], list[Path]]  # changes a set; returns the files that the finding must name


def _change(root: Path, change: Callable[[Image.Image], Image.Image], count: int = 1) -> list[Path]:
    chosen = films_of(root, "**/Normal/*.png")[:count]
    for path in chosen:
        change(Image.open(path)).save(path)
    return chosen


def unreadable(root: Path) -> list[Path]:
    path = films_of(root)[3]
    path.write_bytes(path.read_bytes()[:600])
    return [path]


def text_named_png(root: Path) -> list[Path]:
    path = root / films_of(root)[0].parent / "notes.png"
    path.write_text("no picture")
    return [path]


def other_file(root: Path) -> list[Path]:
    path = films_of(root)[0].parent / "notes.txt"
    path.write_text("no picture")
    return [path]


def loose(root: Path) -> list[Path]:
    return [films_of(root)[0].rename(root / "loose.png")]


def extra_class(root: Path) -> list[Path]:
    return [save(lateral(1), root / "dogs" / "rex.png")]


def empty_class(root: Path) -> list[Path]:
    (root / "COVID").mkdir()
    return [root / "COVID"]


def colour(root: Path) -> list[Path]:
    return _change(root, lambda film: film.convert("RGB"), 2)


def deep(root: Path) -> list[Path]:
    return _change(root, lambda film: Image.fromarray(np.asarray(film).astype(np.uint16) * 257))


def large(root: Path) -> list[Path]:
    return _change(root, lambda film: film.resize((300, 300)))


def wide(root: Path) -> list[Path]:
    return _change(root, lambda film: film.resize((256, 128)))


def faint(root: Path) -> list[Path]:
    return _change(root, lambda film: film.point(lambda level: 110 + level // 12))


def black(root: Path) -> list[Path]:
    return _change(root, lambda film: Image.new("L", film.size, 7))


def negative(root: Path) -> list[Path]:
    return _change(root, lambda film: film.point(lambda level: 255 - level), 2)


def laterals(root: Path) -> list[Path]:
    return [save(lateral(seed), root / "Normal" / f"film_9{seed}.png") for seed in range(4)]


def named_lateral(root: Path) -> list[Path]:
    path = films_of(root)[0]
    return [path.rename(path.with_name("film_900_LAT.png"))]


def copy_inside(root: Path) -> list[Path]:
    path = films_of(root, "Normal/*.png")[0]
    return [path, Path(shutil.copy(path, path.with_name("film_900.png")))]


def copy_between_classes(root: Path) -> list[Path]:
    path = films_of(root, "Normal/*.png")[0]
    return [path, Path(shutil.copy(path, root / "Pneumonia" / "film_900.png"))]


def near_copy_inside(root: Path) -> list[Path]:
    path = films_of(root, "Normal/*.png")[0]
    return [path, save(np.asarray(Image.open(path)), path.with_name("film_900.jpg"), quality=40)]


def near_copy_between_classes(root: Path) -> list[Path]:
    path = films_of(root, "Normal/*.png")[0]
    return [path, save(np.asarray(Image.open(path)), root / "Pneumonia" / "film_900.jpg", quality=40)]


def person_in_name(root: Path) -> list[Path]:
    names = ("Maria_Schmidt_01.png", "Dr_Okonkwo-3.png", "Meyer, Hans.png", "film^johnson.png")
    return [path.rename(path.with_name(name)) for path, name in zip(films_of(root), names, strict=False)]


def person_in_exif(root: Path) -> list[Path]:
    path = films_of(root)[0]
    exif = Image.Exif()
    exif[0x013B] = "Q. Someone"  # Artist
    with Image.open(path) as film:
        film.save(path, exif=exif)
    return [path]


def person_in_text(root: Path) -> list[Path]:
    path = films_of(root)[0]
    text = PngInfo()
    text.add_text("Comment", "patient no 7, born in spring")
    with Image.open(path) as film:
        film.save(path, pnginfo=text)
    return [path]


def person_in_dicom(root: Path) -> list[Path]:
    pydicom = pytest.importorskip("pydicom")
    path = films_of(root)[0]
    pixels = np.asarray(Image.open(path))
    film = pydicom.Dataset()
    film.file_meta = pydicom.dataset.FileMetaDataset()
    film.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    film.Modality, film.PhotometricInterpretation, film.SamplesPerPixel = "DX", "MONOCHROME2", 1
    film.Rows, film.Columns = pixels.shape
    film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = 8, 8, 7, 0
    film.PixelData = pixels.tobytes()
    film.PatientName = "Nobody^Nemo"
    film.SOPClassUID, film.SOPInstanceUID = pydicom.uid.DigitalXRayImageStorageForPresentation, "1.2.3"
    film.save_as(path.with_suffix(".dcm"), enforce_file_format=True)
    path.unlink()
    return [path.with_suffix(".dcm")]


def system_file(root: Path) -> list[Path]:
    (root / "Normal" / "._film_001.png").write_bytes(b"fork")
    return [root / "Normal" / "._film_001.png"]


@pytest.mark.parametrize(("check", "plant"), [
    ("unreadable", unreadable), ("not an image", text_named_png), ("other files", other_file),
    ("outside classes", loose), ("extra class", extra_class), ("empty class", empty_class),
    ("mixed channels", colour), ("mixed depth", deep), ("odd size", large), ("odd aspect", wide),
    ("low contrast", faint), ("blank", black), ("inverted", negative), ("mixed views", laterals),
    ("mixed views", named_lateral), ("exact duplicate", copy_inside),
    ("conflicting labels", copy_between_classes), ("near duplicate", near_copy_inside),
    ("conflicting labels by sight", near_copy_between_classes), ("personal data", person_in_name),
    ("personal data", person_in_exif), ("personal data", person_in_text), ("personal data", person_in_dicom),
    ("system files", system_file)], ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_fault_is_found(whole, quick, check, plant: Plant):
    expected = names(whole, *plant(whole))
    report = audit_folder(whole)
    assert set(found(report, check)) == expected, str(report)
    if CHECKS[check][0] == "error":
        assert not report.ok


def test_copies_that_cross_splits(split, quick):
    first, second, third = films_of(split, "train/Normal/*.png")[:3]
    exact = Path(shutil.copy(first, split / "val" / "Normal" / "film_900.png"))
    near = save(np.asarray(Image.open(second)), split / "test" / "Normal" / "film_901.jpg", quality=40)
    smaller = split / "test" / "Normal" / third.name
    Image.open(third).resize((96, 96), Image.Resampling.LANCZOS).save(smaller)
    report = audit_folder(split)
    assert set(found(report, "duplicate across splits")) == names(split, first, exact)
    assert set(found(report, "near duplicate across splits")) >= names(split, second, near)
    assert set(found(report, "same name in two splits")) == names(split, third, smaller)


def test_one_name_for_two_pictures_is_no_leak(split, quick):
    films = films_of(split, "train/Normal/*.png")
    other = films_of(split, "test/Normal/*.png")[0]
    other.rename(other.with_name(films[0].name))
    assert grave(audit_folder(split)) == set()


def test_patient_in_two_splits(split, quick):
    one = films_of(split, "train/Normal/*.png")[0]
    two = films_of(split, "test/Normal/*.png")[0]
    torn = [one.rename(one.with_name("person7_virus_1.png")),
            two.rename(two.with_name("person7_virus_2.png"))]
    report = audit_folder(split)
    assert set(found(report, "patient in two splits")) == names(split, *torn)
    assert not audit_folder(split, patient_pattern="film|person7").ok
    assert "by the pattern" in str(audit_folder(split, patient_pattern=r".+"))


def test_missing_class_in_a_split(split, quick):
    shutil.rmtree(split / "val" / "Pneumonia")
    report = audit_folder(split)
    assert [f.message for f in report.findings if f.check == "missing class"] == ["No film of val/Pneumonia."]


def test_expected_classes(whole, quick):
    report = audit_folder(whole, classes=["NORMAL", "Covid-19"])
    assert "No film of COVID." in str(report)
    assert {Path(name).parts[0] for name in found(report, "extra class")} == {"Pneumonia"}


@pytest.mark.parametrize(("grades", "missing"), [
    ("0 1", ""), ("0 2", "grade_1"), ("0 1 3", "grade_2"), ("0 1 2", "grade_3"), ("0 1 2 3 4", "")])
def test_gaps_in_grades(tmp_path, drawn, quick, grades, missing):
    for number, grade in enumerate(grades.split()):
        folder = tmp_path / "knees" / f"grade_{grade}"
        folder.mkdir(parents=True)
        for path in films_of(drawn["whole"])[4 * number:4 * number + 4]:
            shutil.copy(path, folder)
    messages = [f.message for f in audit_folder(tmp_path / "knees").findings if f.check == "missing class"]
    assert (missing in messages[0]) if missing else messages == []


def test_table(whole, quick):
    films = films_of(whole)
    rows = [f"{path.relative_to(whole).as_posix()},{path.parent.name},p{number}"
            for number, path in enumerate(films)]
    table = whole / "films.csv"
    table.write_text("\n".join(["file,class,patient", *rows]))
    report = audit_folder(whole)
    assert grave(report) == set()
    assert f"{len(films)} patients told by the table" in str(report)
    rows[0] = rows[0].replace("Normal,", "Pneumonia,")
    gone = films.pop()
    gone.unlink()
    new = save(lateral(3), whole / "Normal" / "new.png")
    table.write_text("\n".join(["file,class,patient,Patient Name", *rows]))
    report = audit_folder(whole)
    assert found(report, "conflicting labels") == [films[0].relative_to(whole).as_posix()]
    assert found(report, "absent files") == [gone.relative_to(whole).as_posix()]
    assert found(report, "not in table") == [new.relative_to(whole).as_posix()]
    assert "columns about persons: Patient Name" in str(report)


def test_a_table_splits_films_without_folders(whole, quick):
    films = films_of(whole)
    rows = [f"{path.name},{path.parent.name},{SPLITS[number % 4]},p{number // 2}"
            for number, path in enumerate(films)]
    table = whole.parent / "manifest.csv"
    table.write_text("\n".join(["file,class,split,patient", *rows]))
    report = audit_folder(whole, table=table)
    assert list(report.counts) == ["train", "val", "test"]
    assert len(found(report, "patient in two splits")) == N_FILMS / 2


@pytest.mark.parametrize("name", [
    "1-s2.0-S0140673620303706-fx1_lrg.jpg", "radiopaedia_org_covid-19-pneumonia-7_85703_0-dcm.jpg",
    "NORMAL2-IM-0381-0001.jpeg", "person1413_bacteria_3615.jpeg", "Viral Pneumonia-12.png",
    "01E392EE-69F9-4E33-BFCE-E5C968654078.jpg", "nejmoa2001191_f1-PA.jpg", "DR_chest_01.png",
    "auntminnie-a-2020_01_28_23_51_6665_2020_01_28_Vietnam_coronavirus.jpg", "9003316L.jpg"])
def test_names_that_are_nobodys(whole, quick, name):
    path = films_of(whole)[0]
    with Image.open(path) as film:
        film.save(path.parent / name)
    path.unlink()
    assert "personal data" not in grave(audit_folder(whole))


def test_a_dicom_name_is_never_printed(whole, quick):
    person_in_dicom(whole)
    report = audit_folder(whole)
    assert "PatientName" in str(report)
    assert "Nobody" not in str(report) + report.to_json()
    assert "Nemo" not in str(report) + report.to_json()


def test_several_faults_at_once(split, quick):
    root = split / "train"
    expected = {"unreadable": unreadable(root), "odd aspect": wide(root),
                "exact duplicate": copy_inside(root)}
    save(lateral(5), split / "val" / "Normal" / "Maria_Schmidt.png")
    report = audit_folder(split)
    assert grave(report) >= {*expected, "personal data"}
    for check, paths in expected.items():
        assert names(split, *paths) <= set(found(report, check)), str(report)


def test_what_the_other_tools_find_is_passed_on(whole, monkeypatch):
    class Report:
        flagged = ("border",)
        signal = False
        p = 0.4

    def refuse(*args, **kwargs):
        raise ValueError("too few films")

    monkeypatch.setattr(audit, "_ENOUGH", N_FILMS)
    monkeypatch.setattr(shortcuts, "audit_shortcuts", lambda *args, **kwargs: Report())
    monkeypatch.setattr(shortcuts, "label_signal", lambda *args, **kwargs: Report())
    report = audit_folder(whole)
    assert grave(report) == {"shortcut", "no label signal"}
    assert "border" in str(report)
    monkeypatch.setattr(audit, "_ENOUGH", N_FILMS + 1)
    assert grave(audit_folder(whole)) == {"shortcut"}
    monkeypatch.setattr(shortcuts, "label_signal", refuse)
    report = audit_folder(whole)
    assert "too few films" in str(report)
    assert report.ok


def test_one_class_is_told_and_not_judged(whole, quick):
    report = audit_folder(whole / "Normal")
    assert report.counts == {"all": {"Normal": len(films_of(whole / "Normal"))}}
    assert "there is only one class" in str(report)
    assert grave(report) == set()


def test_a_set_that_cannot_be_read_at_all_is_still_reported(tmp_path, quick):
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"")
    assert set(found(audit_folder(tmp_path / "x"), "unreadable")) == {"a/1.png", "b/2.png"}


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_no_films_is_one_clear_error(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=folder if folder == "empty" else "no such folder"):
        audit_folder(tmp_path / folder)


def test_report_as_text_and_json(whole, quick):
    for path in films_of(whole)[:7]:
        path.write_bytes(path.read_bytes()[:600])
    report = audit_folder(whole)
    text = str(report)
    assert "... and 2 more" in text
    assert "1 error (make" in text, text
    assert CHECKS["unreadable"][1] in text
    data = json.loads(report.to_json())
    assert data["ok"] is report.ok is False
    assert data["counts"] == report.counts
    assert sum(report.counts["all"].values()) == N_FILMS
    first = data["findings"][0]
    assert (first["check"], len(first["files"])) == ("unreadable", 7)
    order = [SEVERITIES.index(finding["severity"]) for finding in data["findings"]]
    assert order == sorted(order)


def test_nothing_is_written(whole, quick):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in whole.rglob("*")}
    audit_folder(whole)
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in whole.rglob("*")}


# ---------------------------------------------------------------- larger sets

def write_set(root: Path, n_films: int, seed: int, finding: tuple[str, ...], splits: bool) -> Path:
    for number, (pixels, label) in enumerate(zip(*draw(n_films, seed, finding), strict=True)):
        folder = root / SPLITS[number % 4] if splits else root
        save(pixels, folder / label / f"film_{number:04}.png")
    return root


@pytest.mark.slow
def test_twenty_clean_sets_raise_no_alarm(tmp_path):
    alarms = {}
    for seed in range(20):
        finding = ("Normal", "Pneumonia", "COVID")[:2 + seed % 2]
        n_films = (120, 160, 200)[seed % 3]
        report = audit_folder(write_set(tmp_path / f"set{seed}", n_films, 100 + seed, finding, seed % 4 > 1))
        if grave(report):
            alarms[seed] = str(report)
    assert not alarms, "\n".join(alarms.values())


@pytest.mark.slow
def test_swapped_labels_are_found_in_a_separable_set(tmp_path, quick):
    """Five labels of 150 swapped: most are named, and nearly no others. A border makes the set separable."""
    other = {"Normal": "COVID", "COVID": "Normal"}
    hits = named = 0
    for seed in range(3):
        root = tmp_path / str(seed)
        chests = sample_chests(150, 300 + seed, ("Normal", "COVID"), {"border": {"COVID": 1.0}})
        labels = [FINDINGS[number] for number in chests.finding]
        swapped = np.random.default_rng(seed).choice(150, 5, replace=False)
        for number, image in enumerate(render_chests(chests, 128).images):
            label = other[labels[number]] if number in swapped else labels[number]
            save(levels(image), root / label / f"film_{number:03}.png")
        doubted = {int(Path(name).stem[5:]) for name in found(audit_folder(root), "likely mislabelled")}
        hits += len(doubted & set(swapped))
        named += len(doubted)
    assert hits / 15 >= 0.7
    assert hits / named >= 0.9


@pytest.mark.slow
def test_real_sets(real_data, quick):
    """What is known of the real sets is said, and nothing is said of them that was looked at and is wrong."""
    knees = audit_folder(real_data / "knee_kl")
    assert len(found(knees, "inverted")) == 14  # counted on a contact sheet: air white, bone dark
    assert "personal data" not in grave(knees)
    database = audit_folder(real_data / "COVID-19_Radiography_Dataset")
    assert found(database, "mixed channels") == ["Viral Pneumonia/images/Viral Pneumonia-205.png"]
    odd = audit_folder(real_data / "hard_inputs")
    assert set(found(odd, "mixed views")) >= {"Lat_Vertebra.png"}
    assert found(odd, "blank") == ["all_black.png"]
    assert found(odd, "not an image") == ["text_as_png.png"]
    broken = {"truncated_60.png", "bad_crc.png", "zero_bytes.png", "header_only.jpeg", "one_pixel.png"}
    assert broken <= set(found(odd, "unreadable"))
    assert "RG1_J2KI.dcm" in found(odd, "personal data")
    spines = audit_folder(real_data / "spine_ap", table=real_data / "spine_ap_labels.csv")
    assert "told by the table" in str(spines)
    assert not found(spines, "absent files")


def test_names_in_real_sets_are_nobodys(real_data):
    for path in list_radiographs(real_data):
        assert not names_somebody(path.relative_to(real_data).as_posix())


def test_one_film_repeated_does_not_stop_the_search_for_other_views(tmp_path):
    features = np.random.default_rng(0).random((60, 40))
    for row in range(20):
        again = np.vstack([features, features[row] * 3, features[row] * 3])
        assert audit._second_group(again).shape == (62,)
    assert not audit._second_group(np.ones((60, 40))).any()


def test_a_table_row_of_another_folder_is_an_absent_film(whole, quick):
    name = films_of(whole, "Normal/*.png")[0].name
    (whole / "t.csv").write_text(f"file,class\nPneumonia/no_{name},Pneumonia\nCOVID/{name},COVID\n")
    report = audit_folder(whole, table=whole / "t.csv")
    assert set(found(report, "absent files")) == {f"Pneumonia/no_{name}", f"COVID/{name}"}
    assert not found(report, "conflicting labels")


def test_a_date_in_a_file_name_and_a_name_in_a_text_field_are_personal():
    assert privacy.identifies("x/Mueller_K_1961-03-04.png")
    assert not privacy.identifies("x/00000061_012.png")
    assert not privacy.identifies("x/1961-13-04.png")


@pytest.mark.parametrize(("n_ap", "n_lateral", "odd"), [(60, 6, "side"), (6, 60, "front"), (66, 0, "")])
def test_lateral_and_frontal_spines_are_told_apart(tmp_path, quick, n_ap, n_lateral, odd):
    for view, name, n_films in (("ap", "front", n_ap), ("lateral", "side", n_lateral)):
        spines = sample_spines(n_films, 4, view) if n_films else []
        for number, image in enumerate(render_spines(spines, 96).images if n_films else ()):
            save(levels(image), tmp_path / f"grade_{min(4, int(5 * spines.severity[number]))}"
                 / f"{name}_{number:02}.png")
    odd_ones = found(audit_folder(tmp_path), "mixed views")
    named = Counter(Path(name).name.partition("_")[0] for name in odd_ones)
    assert named[odd] == min(n_ap, n_lateral)
    assert named.total() - named[odd] <= (2 if odd else 0)  # a film or two of the others may join them
