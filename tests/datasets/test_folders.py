"""Folders of films: what is found, what it is called, and that the cache is right whatever happens to it."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from multiprocessing import get_all_start_methods
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from genailab_helpers.datasets import folders
from genailab_helpers.datasets.catalog import FINDINGS, GRADES, canonical_class, patient_of, sort_classes
from genailab_helpers.datasets.folders import RadiographFolder, list_radiographs, read_radiographs
from genailab_helpers.radiographs import UnreadableRadiographError, read_radiograph


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """List the names of films that are decoded while the test runs."""
    names: list[str] = []

    def read(path: Path, img_size: int) -> torch.Tensor:
        names.append(Path(path).name)
        return read_radiograph(path, img_size)

    monkeypatch.setattr(folders, "read_radiograph", read)
    return names


def make_film(path: Path, seed: int = 0, side: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_tree(root: Path, tree: dict[str, list[str]]) -> Path:
    for number, (folder, names) in enumerate(tree.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for place, name in enumerate(names):
            make_film(root / folder / name, seed=100 * number + place)
    return root


# ---------------------------------------------------------------- names

@pytest.mark.parametrize(("aliases", "name"), [
    (["0", "Healthy", "grade_0", "grade 0", "Grade-0", "GRADE0", "0Healthy", "healthy"], "grade_0"),
    (["4", "Severe", "grade_4"], "grade_4"),
    (["NORMAL", "Normal", "No_findings", "No Finding", "no-finding"], "Normal"),
    (["PNEUMONIA", "Pneumonia"], "Pneumonia"),
    (["COVID", "Covid-19", "COVID_19", "covid19"], "COVID"),
    (["Lung", "Lung_Opacity", "Lung Opacity"], "Lung_Opacity"),
    (["Viral", "Viral Pneumonia", "viral_pneumonia"], "Viral Pneumonia"),
    (["Shoulder 5"], "Shoulder 5")])
def test_class_aliases(aliases, name):
    assert {canonical_class(alias) for alias in aliases} == {name}


def test_canonical_names_are_their_own_aliases():
    for name in (*GRADES, *FINDINGS):
        assert canonical_class(name) == name


def test_classes_are_ordered_by_grade_then_finding_then_alphabet():
    assert sort_classes(["zebra", "COVID", "Normal", "grade_3", "ape", "grade_1", "COVID"]) == [
        "grade_1", "grade_3", "Normal", "COVID", "ape", "zebra"]


@pytest.mark.parametrize(("path", "patient"), [
    ("PNEUMONIA/person12_virus_33.jpeg", "person12"), ("person12_bacteria_4.jpeg", "person12"),
    ("NORMAL2-IM-0381-0001.jpeg", "NORMAL2-IM-0381"), ("IM-0115-0001.jpeg", "IM-0115"),
    ("IM-0519-0001-0001.jpeg", "IM-0519"),
    ("No_findings/00000061_012.jpg", "00000061"), ("00000061_013.jpg", "00000061"),
    ("9003316L.png", "9003316"), ("9003316R.jpg", "9003316"),
    ("grade_1/case012_0.jpg", "case012"), ("case012_1.jpg", "case012"),
    ("COVID/images/COVID-17.png", "COVID/images/COVID-17"), ("a/film.png", "a/film"),
    ("b/film.png", "b/film"), ("9003316Left.jpg", "9003316Left"), ("00000061_0123.jpg", "00000061_0123")])
def test_patients(path, patient):
    assert patient_of(path) == patient
    assert patient_of(Path(path)) == patient


# ---------------------------------------------------------------- finding and reading

def test_films_are_found_in_an_order_of_their_names_alone(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "set", {"b": ["2.png", "10.PNG"], "a/deep": ["x.jpeg", "w y, z.webp"],
                                        "a": ["y.bmp"], "masks": ["m.png"], "a/Masks": ["m.png"],
                                        ".hidden": ["h.png"]})
    make_film(root / ".film.png")
    (root / "._film.png").write_bytes(b"fork")
    (root / ".DS_Store").write_bytes(b"macOS")
    (root / "notes.txt").write_text("no film")
    (root / "noext").write_bytes(bytes(128) + b"DICM")
    (root / "readme").write_text("no film")
    names = ["a/deep/w y, z.webp", "a/deep/x.jpeg", "a/y.bmp", "b/10.PNG", "b/2.png", "noext"]
    assert [path.relative_to(root).as_posix() for path in list_radiographs(root)] == names
    walk = os.walk

    def backwards(*args, **kwargs):
        for folder, folders_in, files in walk(*args, **kwargs):
            folders_in.reverse()
            yield folder, folders_in, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert [path.relative_to(root).as_posix() for path in list_radiographs(str(root))] == names


def test_links_are_followed_and_loops_are_not(tmp_path):
    root = make_tree(tmp_path / "set", {"a": ["1.png"]})
    make_film(tmp_path / "elsewhere" / "2.png")
    try:
        (root / "b").symlink_to(tmp_path / "elsewhere")
        (root / "a" / "up").symlink_to(root)
    except OSError:
        pytest.skip("this system makes no links")
    assert [path.relative_to(root).as_posix() for path in list_radiographs(root)] == ["a/1.png", "b/2.png"]


def test_folders_without_films_are_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    for name in ("a.txt", "b.txt", "c.csv", ".DS_Store"):
        (tmp_path / "others" / name).touch()
    for name, reason in {"absent": "no such folder", "file": "a file", "empty": "empty folder",
                         "others": r"no radiographs among 4 files \(2 .txt, 1 .*\)"}.items():
        for use in (list_radiographs, lambda root: RadiographFolder(root, 32)):
            with pytest.raises(ValueError, match=f"{name}: {reason}; expected "):
                use(tmp_path / name)
    assert not (tmp_path / "cache" / "films").exists()


def with_a_bad_film(root: Path) -> list[Path]:
    paths = [make_film(root / f"{name}.png", seed) for seed, name in enumerate("abcd")]
    paths[1].write_bytes(paths[1].read_bytes()[:300])
    return paths


def test_a_bad_film_stops_or_is_left_out(tmp_path):
    paths = with_a_bad_film(tmp_path / "set")
    advice = r'b\.png: damaged .*; on_unreadable="skip" leaves such films out$'
    with pytest.raises(UnreadableRadiographError, match=advice) as caught:
        read_radiographs(paths, 32)
    assert caught.value.path == paths[1]
    summary = r"^1 of 4 films cannot be read and are left out: .*b\.png: damaged"
    with pytest.warns(UserWarning, match=summary) as warned:
        images, kept = read_radiographs(paths, 32, on_unreadable="skip")
    assert len(warned) == 1
    assert Path(warned[0].filename) == Path(__file__)
    assert kept == [paths[0], paths[2], paths[3]]
    assert images.shape == (3, 1, 32, 32)
    torch.testing.assert_close(images[1], read_radiograph(paths[2], 32))


def test_many_bad_films_are_named_in_one_short_warning(tmp_path):
    paths = [make_film(tmp_path / "good.png")]
    for number in range(9):
        paths.append(tmp_path / f"bad{number}.png")
        paths[-1].write_bytes(b"")
    with pytest.warns(UserWarning, match="9 of 10 films .*bad0.*bad1.*bad2.*and 6 more$") as warned:
        read_radiographs(paths, 32, on_unreadable="skip")
    assert len(warned) == 1
    with pytest.raises(ValueError, match=r"none of 9 films can be read; the first: .*bad0\.png: empty"):
        read_radiographs(paths[1:], 32, on_unreadable="skip")


def test_wrong_arguments(tmp_path):
    path = make_film(tmp_path / "set" / "a.png")
    with pytest.raises(ValueError, match='on_unreadable=\'ignore\': expected "stop" or "skip"'):
        read_radiographs([path], 32, on_unreadable="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no films given"):
        read_radiographs([], 32)
    for img_size in (0, -1, 15, 3.5):
        with pytest.raises(ValueError, match="img_size="):
            read_radiographs([path], img_size)
        with pytest.raises(ValueError, match="img_size="):
            RadiographFolder(path.parent, img_size)


# ---------------------------------------------------------------- the data set

def test_the_conventions_of_torchvision(tmp_path):
    root = make_tree(tmp_path / "set", {"PNEUMONIA": ["person2_virus_1.png", "person1_virus_9.png"],
                                        "NORMAL": ["IM-0115-0001.png"], "masks": ["m.png"]})
    films = RadiographFolder(root, 32)
    assert films.classes == ["Normal", "Pneumonia"]
    assert films.class_to_idx == {"Normal": 0, "Pneumonia": 1}
    assert films.samples == [(str(root / "NORMAL/IM-0115-0001.png"), 0),
                             (str(root / "PNEUMONIA/person1_virus_9.png"), 1),
                             (str(root / "PNEUMONIA/person2_virus_1.png"), 1)]
    assert films.targets == [0, 1, 1]
    assert films.patients == ["IM-0115", "person1", "person2"]
    assert len(films) == len(list(films)) == 3
    image, label = films[-1]
    assert (image.shape, image.dtype, label) == ((1, 32, 32), torch.float32, 1)
    assert RadiographFolder(root, 32, transform=lambda image: image.mean() * 0 + 7)[1] == (7, 1)
    images, labels = next(iter(DataLoader(films, batch_size=3)))
    assert images.shape == (3, 1, 32, 32)
    assert labels.tolist() == [0, 1, 1]


def test_eight_bits_keep_an_image_to_half_a_level(tmp_path):
    make_film(tmp_path / "set" / "a.png", side=50)
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "set" / "ramp.png")
    for (image, _), name in zip(RadiographFolder(tmp_path / "set", 32), ("a.png", "ramp.png"), strict=True):
        difference = (image - read_radiograph(tmp_path / "set" / name, 32)).abs().max()
        assert 0 < difference <= 1 / 255 + 1e-6
    assert (image.min(), image.max()) == (-1, 1)  # black and white are exact


def test_an_item_may_be_changed_without_changing_the_cache(tmp_path):
    films = RadiographFolder(make_tree(tmp_path / "set", {"a": ["1.png"]}), 32)
    before = films[0][0].clone()
    films[0][0].zero_()
    assert torch.equal(films[0][0], before)


def test_two_names_of_one_class_are_one_class(tmp_path):
    root = make_tree(tmp_path / "set", {"No_findings": ["1.png"], "COVID": ["2.png"], "normal": ["3.png"]})
    films = RadiographFolder(root, 32)
    assert films.classes == ["Normal", "COVID"]
    assert [(Path(path).parent.name, label) for path, label in films.samples] == [
        ("No_findings", 0), ("normal", 0), ("COVID", 1)]


def test_the_layout_of_the_radiography_database(tmp_path):
    root = make_tree(tmp_path / "set", {"COVID/images": ["COVID-1.png"], "COVID/masks": ["COVID-1.png"],
                                        "Normal/images": ["Normal-1.png"], "Viral Pneumonia/images": []})
    films = RadiographFolder(root, 32)
    assert films.classes == ["Normal", "COVID", "Viral Pneumonia"]
    assert films.targets == [0, 1]
    assert films.patients == ["Normal/images/Normal-1", "COVID/images/COVID-1"]  # no place of this machine
    for one in ("COVID", "COVID/images"):
        single = RadiographFolder(root / one, 32)
        assert (single.classes, single.targets) == (["COVID"], [0])


def test_one_class_folder(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "set", {"NORMAL": ["1.png", "2.png"]})
    assert RadiographFolder(root / "NORMAL", 32).classes == ["Normal"]
    monkeypatch.chdir(root / "NORMAL")
    assert RadiographFolder(".", 32).classes == ["Normal"]


def test_a_grade_is_its_label_even_where_grades_are_missing(tmp_path):
    root = make_tree(tmp_path / "set", {"grade_1": ["1.png"], "Severe": ["2.png"], "0": []})
    films = RadiographFolder(root, 32)
    assert films.classes == list(GRADES)
    assert films.targets == [1, 4]


def test_roots_that_are_no_class_folders(tmp_path):
    root = make_tree(tmp_path / "set", {"train/NORMAL": ["1.png"], "Test/NORMAL": ["2.png"]})
    with pytest.raises(ValueError, match="set: holds the splits Test, train; expected classes"):
        RadiographFolder(root, 32)
    root = make_tree(tmp_path / "other", {"NORMAL": ["1.png"], ".": ["sheet.png"]})
    with pytest.raises(ValueError, match=r"other: 1 films such as sheet\.png lie beside class folders"):
        RadiographFolder(root, 32)


def test_a_bad_film_in_a_data_set_stops_or_is_left_out(tmp_path, decoded):
    with_a_bad_film(tmp_path / "set")
    with pytest.raises(UnreadableRadiographError, match=r"b\.png: damaged"):
        RadiographFolder(tmp_path / "set", 32)
    with pytest.warns(UserWarning, match="1 of 4 films"):
        films = RadiographFolder(tmp_path / "set", 32, on_unreadable="skip")
    assert [Path(path).name for path, _ in films.samples] == ["a.png", "c.png", "d.png"]
    assert len(films.targets) == len(films.patients) == len(films) == 3
    assert sorted(set(decoded)) == ["a.png", "b.png", "c.png", "d.png"]
    assert decoded.count("a.png") == 1  # it was kept when b.png stopped it


# ---------------------------------------------------------------- the cache

def test_a_film_is_decoded_once(tmp_path, decoded):
    root = make_tree(tmp_path / "set", {"a": ["1.png", "2.png"], "b": ["3.png"]})
    (root / "b" / "copy.png").write_bytes((root / "a" / "1.png").read_bytes())
    first = RadiographFolder(root, 32)
    assert decoded == ["1.png", "2.png", "3.png"]
    assert torch.equal(first[0][0], first[3][0])
    list(first), list(first), RadiographFolder(root, 32), RadiographFolder(root / "a", 32)
    (root / "a").rename(root / "moved")
    make_film(root / "moved" / "new.png", seed=9)
    RadiographFolder(root, 32)
    assert decoded[3:] == ["new.png"]
    RadiographFolder(root / "b", 48)
    assert decoded[4:] == ["3.png", "copy.png"]  # another size is another film


def test_sizes_are_kept_apart(tmp_path):
    """17 rows of 16 + 32 * 32 bytes are as many bytes as 65 rows of 16 + 16 * 16."""
    root = make_tree(tmp_path / "set", {"a": [f"{number:02d}.png" for number in range(17)]})
    for img_size in (32, 16):
        images = torch.stack([image for image, _ in RadiographFolder(root, img_size)])
        expected, _ = read_radiographs(list_radiographs(root), img_size)
        assert (images - expected).abs().max() <= 1 / 255 + 1e-6


def test_other_content_under_an_old_name_is_seen(tmp_path):
    path = tmp_path / "set" / "film.bmp"  # every BMP of this size has the same number of bytes
    make_film(path, seed=1)
    stat = path.stat()
    before = RadiographFolder(path.parent, 32)[0][0]
    make_film(path, seed=2)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = RadiographFolder(path.parent, 32)[0][0]
    assert (after - read_radiograph(path, 32)).abs().max() <= 1 / 255 + 1e-6
    assert not torch.equal(before, after)


def test_large_sets_become_several_packs(tmp_path, own_cache, decoded):
    root = make_tree(tmp_path / "set", {"a": [f"{number:03d}.png" for number in range(300)]})
    films = RadiographFolder(root, 16)
    assert len(list(own_cache.rglob("pack-*.u8"))) == 2
    for index in (0, 255, 256, 299):
        expected = read_radiograph(films.samples[index][0], 16)
        assert (films[index][0] - expected).abs().max() <= 1 / 255 + 1e-6
    assert len(decoded) == 300


def test_a_damaged_or_deleted_cache_is_made_again(tmp_path, own_cache, decoded):
    root = make_tree(tmp_path / "set", {"a": ["1.png", "2.png"]})
    good = torch.cat([image for image, _ in RadiographFolder(root, 32)])
    pack, = own_cache.rglob("pack-*.u8")
    for content in (pack.read_bytes()[:-1], b"", None):
        if content is None:
            pack.unlink()
        else:
            pack.write_bytes(content)
        assert torch.equal(torch.cat([image for image, _ in RadiographFolder(root, 32)]), good)
    assert len(decoded) == 8


@pytest.mark.parametrize("start", [way for way in ("fork", "spawn") if way in get_all_start_methods()])
def test_worker_processes_give_the_same_films(tmp_path, start):
    root = make_tree(tmp_path / "set", {"a": [f"{number}.png" for number in range(12)]})
    films = RadiographFolder(root, 32)
    alone = torch.cat([images for images, _ in DataLoader(films, batch_size=5)])
    loader = DataLoader(films, batch_size=5, num_workers=2, multiprocessing_context=start)
    shared = torch.cat([images for images, _ in loader])
    assert torch.equal(alone, shared)


def test_workers_get_names_and_not_pixels(tmp_path):
    root = make_tree(tmp_path / "set", {"a": [f"{number}.png" for number in range(4)]})
    films = RadiographFolder(root, 512)
    list(films)
    assert len(pickle.dumps(films)) < 512 * 512


FILL = """
    import os, sys, torch
    from genailab_helpers.datasets import folders
    from genailab_helpers.radiographs import read_radiograph
    def read(path, img_size):
        os.write(1, b"decoding\\n")  # in one piece, whichever thread
        return read_radiograph(path, img_size)
    folders.read_radiograph = read
    films = folders.RadiographFolder(sys.argv[1], 16)
    print("sum", sum(image.double().sum().item() for image, _ in films))
"""


def fill(root: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(FILL), str(root)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL exists on POSIX only")
def test_a_kill_while_the_cache_is_filled_keeps_what_was_whole(tmp_path, own_cache, decoded):
    root = make_tree(tmp_path / "set", {"a": [f"{number:03d}.png" for number in range(400)]})
    process = fill(root)
    assert process.stdout is not None
    for _ in range(330):  # 256 in a pack, and some that are decoded ahead
        assert process.stdout.readline() == "decoding\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    whole = list(own_cache.rglob("pack-*.u8"))
    films = RadiographFolder(root, 16)
    assert len(decoded) == 400 - 256 * len(whole)
    assert len(whole) == 1
    for index in (0, 399):
        expected = read_radiograph(films.samples[index][0], 16)
        assert (films[index][0] - expected).abs().max() <= 1 / 255 + 1e-6


def test_films_are_decoded_by_several_threads_in_the_order_of_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    root = make_tree(tmp_path / "set", {"a": [f"{number:03d}.png" for number in range(40)]})
    together = threading.Barrier(4)  # opens when four films are being decoded

    def read(path: Path, img_size: int) -> torch.Tensor:
        together.wait(timeout=30)
        return read_radiograph(path, img_size)

    monkeypatch.setattr(folders, "read_radiograph", read)
    images = torch.stack([image for image, _ in RadiographFolder(root, 16)])
    monkeypatch.undo()
    expected, _ = read_radiographs(list_radiographs(root), 16)
    assert (images - expected).abs().max() <= 1 / 255 + 1e-6


def test_reading_in_threads_leaves_the_filters_of_warnings_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    root = make_tree(tmp_path / "set", {"a": [f"{number:03d}.png" for number in range(40)]})

    def read(path: Path, img_size: int) -> torch.Tensor:
        with warnings.catch_warnings():  # as the reader does
            warnings.simplefilter("ignore")
            time.sleep(0.001 * (int(path.stem) % 5))  # the first to come is not the last to go
        return read_radiograph(path, img_size)

    monkeypatch.setattr(folders, "read_radiograph", read)
    before = list(warnings.filters)
    RadiographFolder(root, 16)
    assert warnings.filters == before


def test_a_cache_that_is_emptied_meanwhile_is_done_without(tmp_path, own_cache):
    films = RadiographFolder(make_tree(tmp_path / "set", {"a": ["1.png", "2.png"]}), 16)
    before = torch.stack([image for image, _ in films])
    pack, = own_cache.rglob("pack-*.u8")
    for empty in (lambda: pack.write_bytes(b"short"), pack.unlink):
        empty()
        assert torch.equal(torch.stack([image for image, _ in films]), before)


def test_a_large_cache_is_announced_and_refused_before_it_starts(tmp_path, decoded, monkeypatch, capsys):
    root = make_tree(tmp_path / "set", {"a": [f"{number}.png" for number in range(20)]})
    monkeypatch.setattr(folders, "_LARGE_CACHE", 20 * (16 + 32 * 32) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 5000))
    with pytest.raises(OSError, match="no room to write 20 decoded films: 0 MB are needed") as error:
        RadiographFolder(root, 32)
    assert "GENAILAB_CACHE" in str(error.value)
    assert decoded == []
    monkeypatch.undo()
    monkeypatch.setattr(folders, "_LARGE_CACHE", 20 * (16 + 32 * 32) - 1)
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path / "cache"))
    for announced in ("20 films are decoded once, into 0 MB", ""):  # the second time nothing is left to do
        RadiographFolder(root, 32)
        said = capsys.readouterr().err
        assert announced in said
        assert bool(announced) == bool(said)


def test_two_processes_may_fill_the_cache_at_once(tmp_path, own_cache, decoded):
    root = make_tree(tmp_path / "set", {"a": [f"{number:03d}.png" for number in range(300)]})
    both = [fill(root), fill(root)]
    said = [process.communicate() for process in both]
    assert [errors for _, errors in said] == ["", ""]
    films = RadiographFolder(root, 16)
    assert decoded == []
    total = sum(image.double().sum().item() for image, _ in films)
    assert [out.splitlines()[-1] for out, _ in said] == [f"sum {total}"] * 2
    assert [path.name for path in own_cache.rglob("*") if path.name.startswith(".")] == []


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE exists on POSIX only")
def test_a_disk_without_room_for_the_cache_is_one_clear_error(tmp_path, own_cache):
    root = make_tree(tmp_path / "set", {"a": [f"{number}.png" for number in range(30)]})
    code = """
        import resource, signal, sys
        from genailab_helpers.datasets.folders import RadiographFolder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            RadiographFolder(sys.argv[1], 64)
        except OSError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(root)],
                          capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert "no room to write" in done.stdout
    assert str(own_cache) in done.stdout
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []


# ---------------------------------------------------------------- real films

@pytest.mark.parametrize(("folder", "classes", "counts"), [
    ("covid_1125", ["Normal", "Pneumonia", "COVID"], [500, 500, 124]),
    ("COVID-19_Radiography_Dataset", ["Normal", "COVID", "Lung_Opacity", "Viral Pneumonia"],
     [39, 31, 32, 22]),
    ("knee_kl/val", list(GRADES), [60, 60, 60, 50, 14])])
def test_real_sets_have_the_counts_of_their_card(real_data, folder, classes, counts):
    if not (real_data / folder).is_dir():
        pytest.skip(f"{real_data} has no {folder}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        films = RadiographFolder(real_data / folder, 32)
    assert films.classes == classes
    assert np.bincount(films.targets).tolist() == counts


def test_patients_of_the_real_set_of_1125(real_data):
    """Its card: 249 and 205 of 500 films are of patients with several, 21 patients are in both classes."""
    root = real_data / "covid_1125"
    if not root.is_dir():
        pytest.skip(f"{real_data} has no covid_1125")
    normal, pneumonia = ([patient_of(path.relative_to(root)) for path in list_radiographs(root / name)]
                         for name in ("No_findings", "Pneumonia"))
    assert sum(normal.count(patient) > 1 for patient in normal) == 249
    assert sum(pneumonia.count(patient) > 1 for patient in pneumonia) == 205
    assert len(set(normal) & set(pneumonia)) == 21


def test_hard_inputs_are_listed_and_the_bad_ones_left_out(real_data):
    if not (real_data / "hard_inputs").is_dir():
        pytest.skip(f"{real_data} has no hard_inputs")
    assert len(list_radiographs(real_data / "hard_inputs")) == 30  # without .DS_Store and the macOS fork
    with pytest.warns(UserWarning, match="10 of 30 films cannot be read"):
        films = RadiographFolder(real_data / "hard_inputs", 32, on_unreadable="skip")
    assert len(films) == 20


# ---------------------------------------------------------------- lists of films, tables, label files

def test_an_index_knows_class_split_and_patient_of_each_film(tmp_path):
    make_tree(tmp_path, {"train/PNEUMONIA": ["person1_virus_2.png"],
                         "Validation/NORMAL": ["IM-0001-0001.png"],
                         "test/NORMAL/images": ["x.png"], "test": ["loose.png"]})
    assert [film[1:] for film in folders.index_films(tmp_path)] == [
        ("Validation/NORMAL/IM-0001-0001.png", "Normal", "val", "IM-0001"),
        ("test/NORMAL/images/x.png", "Normal", "test", "test/NORMAL/images/x"),
        ("test/loose.png", "", "test", "test/loose"),
        ("train/PNEUMONIA/person1_virus_2.png", "Pneumonia", "train", "person1")]


def test_a_patient_comes_from_the_pattern_before_the_table_before_the_name(tmp_path):
    make_tree(tmp_path, {"train/a": ["person1_virus_2.png", "person3_virus_1.png"]})
    (tmp_path / folders.TABLE).write_text("file,patient\ntrain/a/person1_virus_2.png,smith\n")
    films = folders.index_films(tmp_path)
    assert [film.patient for film in films] == ["smith", "person3"]
    assert [film.patient for film in folders.index_films(tmp_path / "train")] == ["smith", "person3"]
    assert RadiographFolder(tmp_path / "train", 16).patients == ["smith", "person3"]
    assert [film.patient for film in folders.index_films(tmp_path, r"virus_(\d)")] == ["2", "1"]
    assert [film.patient for film in folders.index_films(tmp_path, r"\d")] == ["1", "3"]
    with pytest.raises(ValueError, match=r"person1_virus_2.*finds no patient"):
        folders.index_films(tmp_path, r"case\d")
    with pytest.raises(ValueError, match="no regular expression"):
        folders.index_films(tmp_path, "(")


@pytest.mark.parametrize("text", [
    "filename,class,patient_id,split\na/x 1.png,NORMAL,7,valid\n",
    "\ufeffImage Index;Finding Labels;Patient ID;subset\na\\x 1.png;No Finding;7;validation\n\n",
    'other\tgroup\tGrade\tpath\tsplit\n1\t7\tnormal\t"./a/x 1.png"\tval\n'])
def test_a_table_is_read_whatever_its_dialect_and_columns(tmp_path, text):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    assert folders.read_table(tmp_path / "t.csv") == [(2, "a/x 1.png", "Normal", "7", "val")]


@pytest.mark.parametrize(("content", "complaint"), [
    (b"a,b\n1,2\n", r"t\.csv: no column for the film among 'a,b'"), (b"", "no column for the film"),
    (b"\xff\xfe\x00", r"t\.csv: expected a CSV table in UTF-8")])
def test_what_is_no_table_is_named(tmp_path, content, complaint):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        folders.read_table(tmp_path / "t.csv")


def test_a_label_file_is_a_data_set(tmp_path):
    make_tree(tmp_path, {"Normal": ["1.png"], "COVID": ["2.png"]})
    file = tmp_path / "dataset.json"
    file.write_text('{"labels": [["COVID/2.png", 1], ["Normal/1.png", 0]]}')
    films = RadiographFolder(file, 16)
    assert films.classes == ["Normal", "COVID"]
    assert films.samples == [(str(tmp_path / "Normal/1.png"), 0), (str(tmp_path / "COVID/2.png"), 1)]
    file.write_text('{"labels": [["COVID/2.png", 0], ["Normal/1.png", 0]]}')
    assert RadiographFolder(file, 16).classes == ["class 0"]


@pytest.mark.parametrize("text", ["", "[]", '{"labels": null}', '{"labels": []}', '{"labels": [["a", null]]}',
                                  '{"labels": [["../a.png", 0]]}', '{"labels": [["/a.png", 0]]}',
                                  '{"labels": [["a.png", -1]]}'])
def test_what_is_no_label_file_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=r"dataset\.json: expected"):
        RadiographFolder(tmp_path / "dataset.json", 16)


def test_cached_films_are_decoded_once(tmp_path, decoded):
    paths = [make_film(tmp_path / f"{n}.png", n) for n in range(3)]
    (tmp_path / "bad.png").write_bytes(b"no film")
    with pytest.warns(UserWarning, match="1 of 4 films"):
        images, kept = folders.cached_radiographs([*paths, tmp_path / "bad.png"], 16, "skip")
    again, _ = folders.cached_radiographs(paths, 16)
    assert kept == paths
    assert decoded == ["0.png", "1.png", "2.png", "bad.png"]
    assert torch.equal(images, again)
    assert (images - read_radiographs(paths, 16)[0]).abs().max() <= 1 / 255 + 1e-6


def matched(tmp_path: Path, films: list[str], rows: list[str], beside: str = "") -> list[list[str]]:
    for name in films:
        make_film(tmp_path / "set" / name)
    (tmp_path / "t.csv").write_text("\n".join(["file", *rows]) + "\n")
    table = folders.read_table(tmp_path / "t.csv")
    return [names for _, names in folders.match_rows(table, folders.index_films(tmp_path / "set"), beside)]


def test_a_row_means_the_film_at_its_path_or_whose_folders_agree(tmp_path):
    films = ["COVID/1.png", "Normal/1.png", "Normal/2.jpg", "a/b/3.png"]
    assert matched(tmp_path, films, ["COVID/1.png", "NORMAL/1.png", "raw/Normal/2.jpg", "2", "2.dcm", "b/3",
                                     "Normal/images/2.jpg"]) == [
        ["COVID/1.png"], ["Normal/1.png"], ["Normal/2.jpg"], ["Normal/2.jpg"], ["Normal/2.jpg"],
        ["a/b/3.png"], ["Normal/2.jpg"]]


def test_a_row_of_another_folder_means_no_film(tmp_path):
    films = ["Normal/1.png", "x/2.png"]
    assert matched(tmp_path, films, ["COVID/1.png", "c/b/2.png", "3.png"]) == [[], [], []]


def test_a_bare_name_may_mean_several_films_and_a_table_may_lie_elsewhere(tmp_path):
    films = ["Normal/1.png", "COVID/1.png"]
    assert matched(tmp_path, films, ["1.png"]) == [["COVID/1.png", "Normal/1.png"]]
    assert matched(tmp_path, films, ["../Normal/1.png"], beside="COVID") == [["Normal/1.png"]]


def test_a_pipe_is_no_film(tmp_path):
    make_film(tmp_path / "a" / "1.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    assert [path.name for path in list_radiographs(tmp_path)] == ["1.png"]
