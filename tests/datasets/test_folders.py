"""Data sets of images: what an item is, and that the cache is right whatever happens to it."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_all_start_methods
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from genailab_helpers.datasets import folders
from genailab_helpers.datasets.folders import RadiographFolder, read_images
from genailab_helpers.datasets.index import index_images
from genailab_helpers.radiographs import UnreadableRadiographError, read_radiograph

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and file modes of POSIX")


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """List the names of images that are decoded while the test runs."""
    names: list[str] = []

    def read(path: Path, *arguments: int) -> torch.Tensor:
        names.append(Path(path).name)
        return read_radiograph(path, *arguments)

    monkeypatch.setattr(folders, "read_radiograph", read)
    return names


@pytest.fixture
def make_set(tmp_path, put) -> Callable[[int], Path]:
    return lambda n_images: put(tmp_path / "set", *(f"a/{i:03d}.png" for i in range(n_images)), side=40)


def stack(items: Iterable[tuple[torch.Tensor, int]]) -> torch.Tensor:
    return torch.stack([image for image, _ in items])


def assert_right(images: RadiographFolder, **options: int) -> None:
    """Compare each item with its file: eight bits keep it to half a level of 2 / 255."""
    for path, (image, _) in zip(images.images["path"], images, strict=True):
        assert (image - read_radiograph(path, images.img_size, **options)).abs().max() <= 1 / 255 + 1e-6, path


# ---------------------------------------------------------------- the data set

def test_the_conventions_of_torchvision(tmp_path, put):
    root = put(tmp_path / "set", "PNEUMONIA/person2_virus_1.png", "PNEUMONIA/person1_virus_9.png",
               "NORMAL/IM-0115-0001.png", "masks/m.png")
    images = RadiographFolder(root, 32)
    assert images.classes == ["Normal", "Pneumonia"]
    assert images.class_to_idx == {"Normal": 0, "Pneumonia": 1}
    assert images.samples == [(str(root / "NORMAL/IM-0115-0001.png"), 0),
                              (str(root / "PNEUMONIA/person1_virus_9.png"), 1),
                              (str(root / "PNEUMONIA/person2_virus_1.png"), 1)]
    assert images.targets == [0, 1, 1]
    assert images.patients == images.images["patient"].tolist() == ["IM-0115", "person1", "person2"]
    assert len(images) == len(list(images)) == 3
    image, label = images[-1]
    assert (image.shape, image.dtype, label) == ((1, 32, 32), torch.float32, 1)
    assert RadiographFolder(root, 32, transform=lambda image: image.mean() * 0 + 7)[1] == (7, 1)
    batch, labels = next(iter(DataLoader(images, batch_size=3)))
    assert batch.shape == (3, 1, 32, 32)
    assert labels.tolist() == [0, 1, 1]


def test_roots_that_are_no_class_folders(tmp_path, put):
    root = put(tmp_path / "set", "train/NORMAL/1.png", "Test/NORMAL/2.png")
    with pytest.raises(ValueError, match="set: holds the splits test, train; expected classes"):
        RadiographFolder(root, 32)
    root = put(tmp_path / "other", "NORMAL/1.png", "sheet.png")
    with pytest.raises(ValueError, match=r"other: 1 images such as sheet\.png lie beside class folders"):
        RadiographFolder(root, 32)


@pytest.mark.parametrize("start", [way for way in ("fork", "spawn") if way in get_all_start_methods()])
def test_worker_processes_give_the_same_images(make_set, start):
    images = RadiographFolder(make_set(12), 32)
    loader = DataLoader(images, batch_size=5, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat([batch for batch, _ in loader]), stack(images))


# ---------------------------------------------------------------- what cannot be read

def test_a_bad_image_stops_or_is_left_out(tmp_path, put, decoded):
    table = index_images(put(tmp_path / "set", "a.png", "b.png", "c.png", "d.png", side=40))
    bad = tmp_path / "set" / "b.png"
    bad.write_bytes(bad.read_bytes()[:300])
    advice = r"b\.png: damaged .*; move it out \(`genailab data verify` lists all that cannot be read\)$"
    for use in (read_images, RadiographFolder):
        with pytest.raises(UnreadableRadiographError, match=advice) as caught:
            use(table, 32)
        assert caught.value.path == bad
        with pytest.warns(UserWarning, match=r"^1 of 4 images cannot be read .*b\.png: damaged") as warned:
            result = use(table, 32, on_unreadable="skip")
        assert [Path(warning.filename) for warning in warned] == [Path(__file__)]
        kept = result[1] if use is read_images else result.images
        assert kept.index.tolist() == ["a.png", "c.png", "d.png"]
    assert result.targets == [0, 0, 0]
    assert len(result) == len(result.samples) == len(result.patients) == 3
    assert_right(result)
    assert decoded.count("a.png") == 1  # it was kept when b.png stopped it


def test_many_bad_images_are_named_in_one_short_warning(tmp_path, put):
    put(tmp_path / "set", "good.png")
    for number in range(9):
        (tmp_path / "set" / f"bad{number}.png").write_bytes(b"")
    table = index_images(tmp_path / "set")
    with pytest.warns(UserWarning, match="9 of 10 images .*bad0.*bad1.*bad2.*and 6 more$") as warned:
        read_images(table, 32, on_unreadable="skip")
    assert len(warned) == 1
    with pytest.raises(ValueError, match=r"none of 9 images can be read: .*bad0\.png: neither"):
        read_images(table.drop(index="good.png"), 32, on_unreadable="skip")


def test_wrong_arguments(make_set):
    table = index_images(make_set(1))
    for use in (read_images, RadiographFolder):
        for img_size in (0, -1, 15, 3.5, True):
            with pytest.raises(ValueError, match="img_size="):
                use(table, img_size)
        with pytest.raises(ValueError, match="none of 0 images can be read"):
            use(table.iloc[:0], 32)


# ---------------------------------------------------------------- bits a pixel

def make_deep(root: Path, *brightest: int) -> Path:
    """Write 16-bit files that do not say how many bits they use, with these brightest pixels."""
    (root / "a").mkdir(parents=True, exist_ok=True)
    for level in brightest:
        ramp = np.linspace(0, level, 32 * 32).reshape(32, 32).astype(np.uint16)
        Image.fromarray(ramp).save(root / "a" / f"{level:05d}.png")
    return root


def test_images_of_one_set_are_on_one_scale(tmp_path):
    table = index_images(make_deep(tmp_path / "set", 1023, 4095))
    images = RadiographFolder(table, 32)
    assert images.bit_depth == table.attrs["bit_depth"].bits == 12
    assert_right(images, bit_depth=12)
    assert images[0][0].max() == pytest.approx(2 * 1023 / 4095 - 1, abs=1 / 255)
    assert (images[1][0].min(), images[1][0].max()) == (-1, 1)  # black and white are exact
    with pytest.warns(UserWarning, match="10 were guessed"):  # one file alone cannot know
        assert read_radiograph(images.samples[0][0]).max() == 1
    make_deep(tmp_path / "set", 30000)  # the set turns out to be a deeper one
    assert_right(RadiographFolder(tmp_path / "set", 32), bit_depth=15)


def test_parts_read_apart_are_on_the_scale_of_the_whole_set(tmp_path):
    levels = {"train": 1023, "val": 4095}
    for part, level in levels.items():
        make_deep(tmp_path / "set" / part, level)
    table = index_images(tmp_path / "set")
    for part, level in levels.items():
        batch, _ = read_images(table[table["split"] == part], 32)
        assert batch.max() == pytest.approx(2 * level / 4095 - 1, abs=1 / 255), part


# ---------------------------------------------------------------- the cache

def test_a_set_seen_before_is_opened_without_opening_an_image(make_set, monkeypatch):
    root = make_set(500)
    before = stack(RadiographFolder(root, 32))

    def fail(*arguments: object, **options: object) -> None:
        pytest.fail("an image was opened")

    monkeypatch.setattr(folders, "read_radiograph", fail)
    monkeypatch.setattr(Image, "open", fail)
    start = time.process_time()
    images = RadiographFolder(root, 32)
    again = stack(images)
    assert time.process_time() - start < 2  # decoding alone would take a good part of it
    assert torch.equal(again, before)
    batch, _ = read_images(images.images.iloc[100:200], 32)  # any part of it, too
    assert torch.equal(batch, before[100:200])


def test_only_what_is_new_or_changed_is_decoded(tmp_path, put, decoded):
    root = put(tmp_path / "set", "a/0.bmp", "a/1.bmp", "a/2.bmp")  # files of one size
    RadiographFolder(root, 32)
    assert sorted(decoded) == ["0.bmp", "1.bmp", "2.bmp"]
    times = (root / "a" / "1.bmp").stat()

    def change_unseen() -> None:
        put(root, "a/1.bmp", seed=7)
        os.utime(root / "a" / "1.bmp", ns=(times.st_atime_ns, times.st_mtime_ns))

    for change, name in ((lambda: os.utime(root / "a/0.bmp", ns=(0, 0)), "0.bmp"), (change_unseen, "1.bmp"),
                         (lambda: put(root, "a/2.bmp", seed=8, side=50), "2.bmp"),
                         (lambda: put(root, "b/new.bmp", seed=9), "new.bmp")):
        change()
        decoded.clear()
        images = RadiographFolder(root, 32)
        assert decoded == [name]
        assert_right(images)
    decoded.clear()
    (root / "a" / "0.bmp").unlink()
    assert_right(RadiographFolder(root, 32))
    assert decoded == []
    assert_right(RadiographFolder(root, 48))  # another size is kept apart
    assert len(decoded) == 3
    decoded.clear()
    RadiographFolder(root, 32), RadiographFolder(root, 48)
    assert decoded == []


@posix
def test_pixels_of_patients_are_for_their_owner_alone(make_set, own_cache):
    RadiographFolder(make_set(2), 32)
    assert {stat.S_IMODE(file.stat().st_mode) for file in own_cache.rglob("*.u8")} == {0o600}
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (own_cache, own_cache / "images")} == {0o700}


@pytest.mark.parametrize("damage", [
    lambda file: file.write_bytes(file.read_bytes()[:-1]), lambda file: file.write_bytes(b""), Path.unlink,
    lambda file: file.write_bytes(b"\1" + file.read_bytes()[1:]), lambda file: shutil.rmtree(file.parent)],
    ids=["cut short", "empty", "deleted", "another pixel", "folder deleted"])
@pytest.mark.parametrize("opened", [False, True])
def test_damaged_or_deleted_pixels_are_decoded_again_and_mended(make_set, own_cache, decoded, damage, opened):
    root = make_set(4)
    images = RadiographFolder(root, 32)
    for file in sorted(own_cache.rglob("*.u8")):
        if file.exists():
            damage(file)
    assert_right(images if opened else RadiographFolder(root, 32))
    decoded.clear()
    assert_right(RadiographFolder(root, 32))
    assert decoded == []


FILL = """
import os, signal, sys
from genailab_helpers.datasets import folders
from genailab_helpers.radiographs import read_radiograph
def read(path, *arguments):
    if path.endswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_radiograph(path, *arguments)
folders.read_radiograph = read
images = folders.RadiographFolder(sys.argv[1], 16)
print("sum", sum(image.double().sum().item() for image, _ in images))
"""


def fill(root: Path, killed_at: str = "never") -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", FILL, str(root), killed_at], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@posix
def test_a_kill_while_the_cache_is_filled_keeps_what_was_whole(make_set, decoded):
    root = make_set(200)
    assert fill(root, "190.png").wait() == -signal.SIGKILL
    images = RadiographFolder(root, 16)
    assert len(decoded) < 60  # a few that were decoded ahead are lost
    assert_right(images)


def test_two_processes_may_fill_the_cache_at_once(make_set, own_cache, decoded):
    root = make_set(100)
    both = [fill(root), fill(root)]
    said = [process.communicate() for process in both]
    assert [errors for _, errors in said] == ["", ""]
    images = RadiographFolder(root, 16)
    assert decoded == []
    assert [out for out, _ in said] == [f"sum {stack(images).double().sum().item()}\n"] * 2
    assert not list(own_cache.rglob(".*"))
