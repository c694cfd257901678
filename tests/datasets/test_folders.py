"""Data sets of images: what an item is, and that the cache is right whatever happens to it."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
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


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """List the names of images that are decoded while the test runs."""
    names: list[str] = []

    def read(path: Path, *arguments: int) -> torch.Tensor:
        names.append(Path(path).name)
        return read_radiograph(path, *arguments)

    monkeypatch.setattr(folders, "read_radiograph", read)
    return names


def make_image(path: Path, seed: int = 0, side: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_tree(root: Path, tree: dict[str, list[str]]) -> Path:
    for number, (folder, names) in enumerate(tree.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for place, name in enumerate(names):
            make_image(root / folder / name, seed=100 * number + place)
    return root


def make_set(root: Path, n_images: int) -> Path:
    return make_tree(root, {"a": [f"{number:03d}.png" for number in range(n_images)]})


def stack(items: Iterable[tuple[torch.Tensor, int]]) -> torch.Tensor:
    return torch.stack([image for image, _ in items])


def assert_right(images: RadiographFolder, **options: int) -> None:
    """Compare each item with its file: eight bits keep it to half a level of 2 / 255."""
    for path, (image, _) in zip(images.images["path"], images, strict=True):
        assert (image - read_radiograph(path, images.img_size, **options)).abs().max() <= 1 / 255 + 1e-6, path


# ---------------------------------------------------------------- the data set

def test_the_conventions_of_torchvision(tmp_path):
    root = make_tree(tmp_path / "set", {"PNEUMONIA": ["person2_virus_1.png", "person1_virus_9.png"],
                                        "NORMAL": ["IM-0115-0001.png"], "masks": ["m.png"]})
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


def test_roots_that_are_no_class_folders(tmp_path):
    root = make_tree(tmp_path / "set", {"train/NORMAL": ["1.png"], "Test/NORMAL": ["2.png"]})
    with pytest.raises(ValueError, match="set: holds the splits test, train; expected classes"):
        RadiographFolder(root, 32)
    root = make_tree(tmp_path / "other", {"NORMAL": ["1.png"], ".": ["sheet.png"]})
    with pytest.raises(ValueError, match=r"other: 1 images such as sheet\.png lie beside class folders"):
        RadiographFolder(root, 32)


@pytest.mark.parametrize("start", [way for way in ("fork", "spawn") if way in get_all_start_methods()])
def test_worker_processes_give_the_same_images(tmp_path, start):
    images = RadiographFolder(make_set(tmp_path / "set", 12), 32)
    loader = DataLoader(images, batch_size=5, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat([batch for batch, _ in loader]), stack(images))


# ---------------------------------------------------------------- what cannot be read

def test_a_bad_image_stops_or_is_left_out(tmp_path, decoded):
    paths = [make_image(tmp_path / "set" / f"{name}.png", seed) for seed, name in enumerate("abcd")]
    paths[1].write_bytes(paths[1].read_bytes()[:300])
    table = index_images(tmp_path / "set")
    advice = r'b\.png: damaged .*; on_unreadable="skip" leaves such images out$'
    for use in (read_images, RadiographFolder):
        with pytest.raises(UnreadableRadiographError, match=advice) as caught:
            use(table, 32)
        assert caught.value.path == paths[1]
        with pytest.warns(UserWarning, match=r"^1 of 4 images cannot be read .*b\.png: damaged") as warned:
            result = use(table, 32, on_unreadable="skip")
        assert [Path(warning.filename) for warning in warned] == [Path(__file__)]
        kept = result[1] if use is read_images else result.images
        assert kept.index.tolist() == ["a.png", "c.png", "d.png"]
    assert result.targets == [0, 0, 0]
    assert len(result) == len(result.samples) == len(result.patients) == 3
    assert_right(result)
    assert decoded.count("a.png") == 1  # it was kept when b.png stopped it


def test_many_bad_images_are_named_in_one_short_warning(tmp_path):
    make_image(tmp_path / "set" / "good.png")
    for number in range(9):
        (tmp_path / "set" / f"bad{number}.png").write_bytes(b"")
    table = index_images(tmp_path / "set")
    with pytest.warns(UserWarning, match="9 of 10 images .*bad0.*bad1.*bad2.*and 6 more$") as warned:
        read_images(table, 32, on_unreadable="skip")
    assert len(warned) == 1
    with pytest.raises(ValueError, match=r"none of 9 images can be read; the first: .*bad0\.png: empty"):
        read_images(table.drop(index="good.png"), 32, on_unreadable="skip")


def test_wrong_arguments(tmp_path):
    table = index_images(make_set(tmp_path / "set", 1))
    for use in (read_images, RadiographFolder):
        with pytest.raises(ValueError, match='on_unreadable=\'ignore\': expected "stop" or "skip"'):
            use(table, 32, on_unreadable="ignore")
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
    assert table.attrs["bit_depth"].bits == 12
    images = RadiographFolder(table, 32)
    assert images.bit_depth == 12
    assert_right(images, bit_depth=12)
    assert images[0][0].max() == pytest.approx(2 * 1023 / 4095 - 1, abs=1 / 255)
    assert (images[1][0].min(), images[1][0].max()) == (-1, 1)  # black and white are exact
    with pytest.warns(UserWarning, match="10 were guessed"):  # one file alone cannot know
        assert read_radiograph(images.samples[0][0]).max() == 1
    make_deep(tmp_path / "set", 30000)  # the set turns out to be a deeper one
    assert_right(RadiographFolder(tmp_path / "set", 32), bit_depth=15)


# ---------------------------------------------------------------- the cache

def test_a_set_seen_before_is_opened_without_opening_an_image(tmp_path, monkeypatch):
    root = make_set(tmp_path / "set", 500)
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


def test_only_what_is_new_or_changed_is_decoded(tmp_path, decoded):
    root = make_tree(tmp_path / "set", {"a": ["0.bmp", "1.bmp", "2.bmp"]})  # files of one size
    RadiographFolder(root, 32)
    assert sorted(decoded) == ["0.bmp", "1.bmp", "2.bmp"]
    times = (root / "a" / "1.bmp").stat()

    def touch() -> None:
        os.utime(root / "a" / "0.bmp", ns=(0, 0))

    def change_unseen() -> None:
        make_image(root / "a" / "1.bmp", seed=7)
        os.utime(root / "a" / "1.bmp", ns=(times.st_atime_ns, times.st_mtime_ns))

    for change, name in ((touch, "0.bmp"), (change_unseen, "1.bmp"),
                         (lambda: make_image(root / "a" / "2.bmp", seed=8, side=50), "2.bmp"),
                         (lambda: make_image(root / "b" / "new.bmp", seed=9), "new.bmp")):
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
def test_pixels_of_patients_are_for_their_owner_alone(tmp_path, own_cache):
    RadiographFolder(make_set(tmp_path / "set", 2), 32)
    assert {stat.S_IMODE(file.stat().st_mode) for file in own_cache.rglob("*.u8")} == {0o600}
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (own_cache, own_cache / "images")} == {0o700}


@pytest.mark.parametrize("damage", [
    lambda file: file.write_bytes(file.read_bytes()[:-1]), lambda file: file.write_bytes(b""), Path.unlink,
    lambda file: file.write_bytes(b"\1" + file.read_bytes()[1:]), lambda file: shutil.rmtree(file.parent)],
    ids=["cut short", "empty", "deleted", "another pixel", "folder deleted"])
@pytest.mark.parametrize("opened", [False, True])
def test_damaged_or_deleted_pixels_are_decoded_again_and_mended(tmp_path, own_cache, decoded, damage, opened):
    images = RadiographFolder(make_set(tmp_path / "set", 4), 32)
    for file in sorted(own_cache.rglob("*.u8")):
        if file.exists():
            damage(file)
    assert_right(images if opened else RadiographFolder(tmp_path / "set", 32))
    decoded.clear()
    assert_right(RadiographFolder(tmp_path / "set", 32))
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
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(FILL), str(root), killed_at], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@posix
def test_a_kill_while_the_cache_is_filled_keeps_what_was_whole(tmp_path, decoded):
    root = make_set(tmp_path / "set", 200)
    assert fill(root, "190.png").wait() == -signal.SIGKILL
    images = RadiographFolder(root, 16)
    assert len(decoded) < 60  # a few that were decoded ahead are lost
    assert_right(images)


def test_two_processes_may_fill_the_cache_at_once(tmp_path, own_cache, decoded):
    root = make_set(tmp_path / "set", 100)
    both = [fill(root), fill(root)]
    said = [process.communicate() for process in both]
    assert [errors for _, errors in said] == ["", ""]
    images = RadiographFolder(root, 16)
    assert decoded == []
    assert [out for out, _ in said] == [f"sum {stack(images).double().sum().item()}\n"] * 2
    assert not list(own_cache.rglob(".*"))


def test_a_large_cache_is_announced_and_refused_before_it_starts(tmp_path, decoded, monkeypatch, capsys):
    root = make_set(tmp_path / "set", 20)
    monkeypatch.setattr(folders, "_LARGE_CACHE", 20 * 32 * 32)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 5000))
        with pytest.raises(OSError, match=r"no room to write 20 decoded images: 0 MB are .*GENAILAB_CACHE"):
            RadiographFolder(root, 32)
    assert decoded == []
    for announced in ("20 images are decoded once, into 0 MB", ""):  # the second time nothing is left to do
        RadiographFolder(root, 32)
        said = capsys.readouterr().err
        assert announced in said
        assert bool(announced) == bool(said)


# ---------------------------------------------------------------- real images
