"""Radiographs as torch data sets, each image decoded once; train, val and test of a data set, read together.
 The pixels of a data set lie in one file a size under `checkpoints.cache_folder()`, for their owner alone;
it can be deleted at any time (`genailab data cache --clear`).
"""

import errno
import hashlib
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pandas as pd
import PIL
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from genailab_helpers import radiographs
from genailab_helpers.checkpoints import cache_folder, whole_file
from genailab_helpers.datasets.index import index_images, torn_patients
from genailab_helpers.datasets.names import GRADES, SPLITS
from genailab_helpers.radiographs import (
    UnreadableRadiographError,
    check_img_size,
    read_radiograph,
)
from genailab_helpers.statistics import grouped_folds

OnUnreadable = Literal["stop", "skip"]
COLOURED = 8  # of 255 levels between the channels, tints set aside; radiographs of six public sets have 0

_AT_ONCE = 64  # images that are decoded by several threads before they are written
_LARGE_CACHE = 5e7  # bytes that are announced
_READER = hashlib.sha256(Path(radiographs.__file__).read_bytes()).hexdigest() + PIL.__version__


class RadiographFolder(Dataset[tuple[Any, int]]):
    """A folder of radiographs by the conventions of `torchvision.datasets.ImageFolder`.

    Parameters
    ----------
    images : str, Path or pandas.DataFrame
        A folder without splits or a label file, as `index.index_images` takes it, or (part of) its table.
    img_size : int
        Side in pixels, at least 16.
    transform : callable, optional
        Applied to each image, a float32 tensor `(1, img_size, img_size)` in [-1, 1].
    on_unreadable : {"stop", "skip"}, default "stop"
        Whether an image that cannot be read is an error or is left out with a warning.

    Attributes
    ----------
    images : pandas.DataFrame
        The table of the images, by class and then by path; `attrs["bit_depth"]` as `read_radiograph` takes
        it.
    classes : list of str
        `images.attrs["classes"]`.
    class_to_idx : dict
        Label of each class.
    samples : list of (str, int)
        Path and label of each image.
    targets, patients : list
        Label and patient of each image.

    Raises
    ------
    UnreadableRadiographError
        With "stop": names the first image that cannot be read.
    ValueError
        If there are no radiographs, if the folder holds splits (`train`, `test`) or images beside class
        folders, or if an argument is not as above.

    Notes
    -----
    Pixels are kept in 8 bits: an item differs from `read_radiograph` by at most half a level, 1/255
    in the range [-1, 1]. An item is read from the cache when it is asked for, so memory does not grow with
    the number of images but for their table.
    """

    def __init__(self, images: str | Path | pd.DataFrame, img_size: int,
                 transform: Callable[[Tensor], Any] | None = None,
                 on_unreadable: OnUnreadable = "stop") -> None:
        if not isinstance(images, pd.DataFrame):
            images = index_images(images)
            if len(splits := sorted(set(images["split"]) - {""})) > 1:
                raise ValueError(f"{images.attrs['root']}: holds the splits {', '.join(splits)}; expected "
                                 "classes: choose a split")
        self.root_dir = Path(images.attrs["root"])
        if len(loose := images.index[images["class"] == ""]):
            raise ValueError(f"{self.root_dir}: {len(loose)} images such as {loose[0]} lie beside class "
                             "folders; expected one or the other")
        self.classes: list[str] = images.attrs["classes"]
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.transform = transform
        labels = images["class"].map(self.class_to_idx)
        self._pixels = _Pixels(images.iloc[np.argsort(labels, kind="stable")], img_size, on_unreadable)
        self.images, self.img_size = self._pixels.images, img_size
        self.bit_depth = self._pixels.bit_depth
        self.targets: list[int] = self.images["class"].map(self.class_to_idx).tolist()

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Path and label of each image."""
        return list(zip(self.images["path"], self.targets, strict=True))

    @property
    def patients(self) -> list[str]:
        """The patient of each image."""
        return self.images["patient"].tolist()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return image and label."""
        image = torch.from_numpy(self._pixels[index]).float().div_(127.5).sub_(1)[None]
        return self.transform(image) if self.transform else image, self.targets[index]


def read_images(images: pd.DataFrame, img_size: int,
                on_unreadable: OnUnreadable = "stop") -> tuple[Tensor, pd.DataFrame]:
    """Read images into one batch, decoding each of them once in a lifetime.

    Parameters
    ----------
    images : pandas.DataFrame
        (Part of) a table of `index.index_images`.
    img_size, on_unreadable
        As for `RadiographFolder`.

    Returns
    -------
    batch : Tensor
        float32 `(N, 1, img_size, img_size)` in [-1, 1], of 256 levels.
    images : pandas.DataFrame
        The rows of the N images, in the order given.

    Raises
    ------
    UnreadableRadiographError, ValueError
        As for `RadiographFolder`.
    """
    pixels = _Pixels(images, img_size, on_unreadable)
    batch = torch.empty(len(pixels.images), 1, img_size, img_size)
    for i in range(len(batch)):
        batch[i, 0] = torch.from_numpy(pixels[i])
    return batch.div_(127.5).sub_(1), pixels.images


class _Pixels:
    """Decoded images of one size in a file: n keys of 16 bytes, n checksums of 4, n squares of 8-bit pixels.

    A key is a hash of the image's path, size and times of change: what changed is decoded again. The file
    is named by folder, image size, reader and keys, and no row of it ever moves, so two processes that fill
    it write the same. A row whose checksum is not that of its pixels was never written, or was damaged
    since.
    """

    def __init__(self, images: pd.DataFrame, img_size: int, on_unreadable: OnUnreadable) -> None:
        if on_unreadable not in ("stop", "skip"):
            raise ValueError(f'on_unreadable={on_unreadable!r}: expected "stop" or "skip"')
        self.images, self.img_size, self.area = images, check_img_size(img_size), img_size**2
        self.rows: np.ndarray
        self.bit_depth: int | None
        self._open()
        errors = self._decode_missing(on_unreadable == "stop")
        if errors and on_unreadable == "stop":
            error = errors[min(errors)]
            reason = f'{error.reason}; on_unreadable="skip" leaves such images out'
            raise UnreadableRadiographError(error.path, reason) from error
        if len(errors) == len(images):
            first = f"; the first: {errors[0]}" if errors else ""
            raise ValueError(f"none of {len(images)} images can be read{first}")
        if errors:
            named = "; ".join(map(str, list(errors.values())[:3]))
            more = f"; and {len(errors) - 3} more" * (len(errors) > 3)
            warnings.warn(f"{len(errors)} of {len(images)} images cannot be read and are left out: "
                          f"{named}{more}", stacklevel=3)
            kept = [place for place in range(len(images)) if place not in errors]
            self.images, self.rows = images.iloc[kept], self.rows[kept]

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the pixels of one image, uint8 `(img_size, img_size)`."""
        try:  # no memory map: the pages that it has read count as memory of the process
            levels = self._read(index)
        except OSError:  # another part of the data set moved on to a larger file, or the cache was emptied
            self._open()
            levels = self._read(index)
        if not self.checked[index] or levels.size < self.area:
            if levels.size < self.area or _checksum(levels) != self.sums[self.rows[index]]:
                levels = self._decode(self.images["path"].iat[index])
                with self.file.open("r+b") as file:
                    self._write(file, index, levels)
            self.checked[index] = True
        return levels.reshape(self.img_size, self.img_size)

    def _read(self, index: int) -> np.ndarray:
        start = 20 * self.n_rows + int(self.rows[index]) * self.area
        return np.fromfile(self.file, np.uint8, self.area, offset=start)

    def _write(self, file: BinaryIO, index: int, levels: np.ndarray) -> None:
        row = int(self.rows[index])
        self.sums[row] = _checksum(levels)
        file.seek(20 * self.n_rows + row * self.area)
        file.write(levels.tobytes())
        file.seek(16 * self.n_rows + 4 * row)  # last: it says that the pixels are there
        file.write(self.sums[row].tobytes())

    def _open(self) -> None:
        """Find the file, and the rows of the images in it."""
        keys = [_key(name, path) for name, path in self.images["path"].items()]
        for _ in range(3):
            with suppress(FileNotFoundError):  # another process has just moved on to a larger file
                self.file, known = self._find(keys)
                self.n_rows = len(known)
                self.sums = np.fromfile(self.file, np.uint32, self.n_rows, offset=16 * self.n_rows)
                break
        self.rows = np.array([known[key] for key in keys], dtype=int)
        self.checked = np.zeros(len(keys), dtype=bool)
        self.bit_depth = int(self.file.stem.split("-")[2]) or None

    def _find(self, keys: list[bytes]) -> tuple[Path, dict[bytes, int]]:
        """Return a file with rows for all keys, made from an older one if need be, and its rows by key."""
        folder = cache_folder() / "images"
        folder.mkdir(exist_ok=True, mode=0o700)
        place = f"{os.path.realpath(self.images.attrs['root'])}\0{self.img_size}\0{_READER}"
        prefix = hashlib.sha256(os.fsencode(place)).hexdigest()[:24]
        for file in folder.glob(f"{prefix}-*.u8"):
            if set(keys) <= (known := self._known(file)).keys():
                return file, known
        bits = self.images.attrs["bit_depth"].bits or 0
        with FileLock(folder / f"{prefix}.lock"):
            old = next(folder.glob(f"{prefix}-*-{bits}.u8"), None)
            known = self._known(old) if old else {}
            if old and set(keys) <= known.keys():  # another process has just made it
                return old, known
            if len(known) > 3 * len(self.images.attrs["bit_depth"].paths) + 1000:  # most are gone or changed
                known = {}
            every = {key: row for row, key in enumerate({**known, **dict.fromkeys(keys, 0)})}
            self._announce(folder, len(every) - len(known))
            file = folder / f"{prefix}-{hashlib.sha256(b''.join(every)).hexdigest()[:16]}-{bits}.u8"
            with whole_file(file, sync=False) as path, path.open("wb") as new:
                path.chmod(0o600)
                new.write(b"".join(every))
                if old and known:
                    with old.open("rb") as held:
                        held.seek(16 * len(known))
                        new.write(held.read(4 * len(known)).ljust(4 * len(every), b"\0"))
                        shutil.copyfileobj(held, new)
                new.truncate(len(every) * (20 + self.area))
            for other in folder.glob(f"{prefix}-*.u8"):
                if other != file:
                    other.unlink(missing_ok=True)
        return file, every

    def _known(self, file: Path) -> dict[bytes, int]:
        n_rows, rest = divmod(file.stat().st_size, 20 + self.area)
        with file.open("rb") as opened:  # a file that was cut short is of no use
            return {} if rest else {opened.read(16): row for row in range(n_rows)}

    def _announce(self, folder: Path, n_new: int) -> None:
        """Say before it starts what a large cache takes, or that there is no room for it."""
        needed, free = n_new * (20 + self.area), shutil.disk_usage(folder).free
        if needed > free:
            reason = (f"no room to write {n_new:,} decoded images: {needed / 1e6:,.0f} MB are needed, "
                      f"{free / 1e6:,.0f} MB are free. Free some, or set GENAILAB_CACHE to a folder on "
                      "another disk")
            raise OSError(errno.ENOSPC, reason, str(folder))
        if needed > _LARGE_CACHE:
            print(f"{n_new:,} images are decoded once, into {needed / 1e6:,.0f} MB under {folder} (if "
                  "stopped, it goes on where it was)", file=sys.stderr)

    def _decode_missing(self, stop: bool) -> dict[int, UnreadableRadiographError]:
        """Decode what was never written; return the errors of those that cannot be, by place."""
        errors: dict[int, UnreadableRadiographError] = {}
        missing = np.flatnonzero(self.sums[self.rows] == 0).tolist()

        def decode(place: int) -> np.ndarray | UnreadableRadiographError:
            try:
                return self._decode(self.images["path"].iat[place])
            except UnreadableRadiographError as error:
                return error

        # the reader turns warnings off and on again, which threads do in any order: put all back at the end
        chunks = [missing[start:start + _AT_ONCE] for start in range(0, len(missing), _AT_ONCE)]
        bar = tqdm(chunks, "reading", unit=f"{_AT_ONCE} images", delay=5, leave=False, disable=None)
        with (warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool,
              self.file.open("r+b") as file, bar):
            for places in bar:
                for place, levels in zip(places, pool.map(decode, places), strict=True):
                    if isinstance(levels, UnreadableRadiographError):
                        errors[place] = levels
                        continue
                    self._write(file, place, levels)
                if stop and errors:
                    break
        return errors

    def _decode(self, path: str) -> np.ndarray:
        unit = read_radiograph(path, self.img_size, self.bit_depth or 16)[0].add(1).div(2)
        return (unit * 255).round().to(torch.uint8).numpy()


def _key(name: str, path: str) -> bytes:
    state = os.stat(path) if os.path.exists(path) else None
    seen = f"{name}\0{state and (state.st_size, state.st_mtime_ns, state.st_ctime_ns)}"
    return hashlib.blake2b(os.fsencode(seen), digest_size=16).digest()


def _checksum(levels: np.ndarray) -> int:
    return zlib.crc32(levels.data) or 1  # 0 means never written


def read_parts(images: pd.DataFrame, img_size: int, seed: int = 0, graded: bool = False,
               test: bool = False) -> tuple[dict[str, Any], str]:
    """Read train, val and test of a data set, and refuse one that cannot be trained on.

    Parameters
    ----------
    images : pandas.DataFrame
        From `index.index_images`, of a folder of `train`, `val` and `test`, or of class folders alone.
    img_size : int
        Side of the images in pixels.
    seed : int, default 0
        Of the patients that are drawn for a part that is missing.
    graded : bool, default False
        Whether the classes must be the five grades; otherwise they must not be.
    test : bool, default False
        Whether a fifth of the patients of train become test where there is none.

    Returns
    -------
    parts : dict of str to Subset
        Of one `RadiographFolder`, train first. Without val, a fifth of the patients of train becomes it.
    how : str
        A sentence: how the parts came about.

    Raises
    ------
    ValueError
        If patients are in two parts, a part lacks images of a class or has one that train lacks, or the
        images are photographs in colour.

    Notes
    -----
    Images that cannot be read, and those in no class folder or in none of the parts, are named on stdout.
    """
    root, classes = images.attrs["root"], images.attrs["classes"]
    if torn := torn_patients(images):
        named = ", ".join([*torn[:5], *["..."] * (len(torn) > 5)])
        raise ValueError(f"{root}: the images of {len(torn)} patients ({named}) lie in several of its parts; "
                         "divide it again by patient: `genailab data split`")
    divided = bool(images["split"].ne("").any())
    placed = images["class"].ne("") & (images["split"].ne("") | (not divided))
    if len(loose := images.index[~placed]):
        named = ", ".join([*loose[:3], *["..."] * (len(loose) > 3)])
        where = "in no class folder" + " of train, val or test" * divided
        print(f"{root}: {len(loose)} images are left out, {where}: {named}")
    if graded != (classes == list(GRADES)):
        wanted = (f"folders {GRADES[0]} to {GRADES[-1]}; for classes there is `genailab train classifier`"
                  if graded else "classes without an order; for grades there is `genailab train grader`")
        raise ValueError(f"{root}: holds the classes {', '.join(classes)}; expected {wanted}")
    if len(classes) < 2:
        raise ValueError(f"{root}: holds one class, {classes[0]}; expected two or more class folders")
    images = images[placed]
    _refuse_colours(images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whole = RadiographFolder(images, img_size, on_unreadable="skip")
    for warning in caught:
        print(f"{root}: {warning.message}")
    splits = whole.images["split"].replace("", "train").to_numpy()
    patients, targets = np.array(whole.patients), np.array(whole.targets)
    rows = {name: np.flatnonzero(splits == name) for name in SPLITS if (splits == name).any()}
    if "train" not in rows:
        raise ValueError(f"{root}: found only {', '.join(f'{name}/' for name in rows)}; expected train/, "
                         "val/ and test/ with class folders")
    if gone := [name for name in images.attrs["splits"] if name not in rows]:
        raise ValueError(f"{root}: {gone[0]}/ holds no readable images in class folders; fill or remove it")
    for name, held in rows.items():
        least = 2 if name == "train" else 0 if graded else 1
        for of_class, count in zip(classes, np.bincount(targets[held], minlength=len(classes)), strict=True):
            if count < least:
                raise ValueError(f"{root}: {count} readable images of {of_class} in {name}; expected at "
                                 f"least {least} of each of {', '.join(classes)}")
    drawn = [name for name in ("test", "val") if name not in rows and (name == "val" or test)]
    for of_class, label in whole.class_to_idx.items() if drawn and not graded else ():
        if (n_patients := len(set(patients[rows["train"]][targets[rows["train"]] == label]))) < 5:
            raise ValueError(f"{root}: images of {n_patients} patients of {of_class}; expected 5 or more, of "
                             f"whom a fifth becomes {drawn[0]}, or a folder {drawn[0]}")
    for name in drawn:
        train = rows["train"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a class with fewer patients than folds
            kept, held_out = grouped_folds(patients[train], 5, seed, targets[train])[0]
        rows[name], rows["train"] = train[held_out], train[kept]
    how = [f"{name} is a fifth of the patients of train, drawn with seed {seed}." for name in drawn]
    return ({name: Subset(whole, rows[name].tolist()) for name in SPLITS if name in rows},
            " ".join(how) or f"The folders {', '.join(rows)} are as they were found.")


def part_images(part: Any) -> pd.DataFrame:
    """Return the table of a part, a Subset of a `RadiographFolder`, and the column `label`: class numbers."""
    whole = part.dataset
    return whole.images.assign(label=whole.targets).iloc[list(part.indices)]


def _refuse_colours(images: pd.DataFrame) -> None:
    """Refuse a folder most of whose images are in colour; one with a tint is not."""
    looked_at, colours = images["path"].iloc[::-(-len(images) // 100)], []  # up to 100
    for path in looked_at:
        try:
            with Image.open(path) as image:  # a DICOM file is no photograph
                image.draft(None, (64, 64))
                pixels = np.asarray(image.convert("RGB").resize((32, 32)), dtype=float).reshape(-1, 3)
        except (OSError, ValueError):
            continue  # whoever reads it says so
        # the first axis is light and dark, in any tint; what is left is change of colour
        axes = np.linalg.svd(pixels - pixels.mean(0), compute_uv=False)
        colours.append(float(np.sqrt((axes[1:]**2).sum() / len(pixels))))
    if (n_coloured := sum(colour > COLOURED for colour in colours)) > len(looked_at) / 2:
        raise ValueError(f"{images.attrs['root']}: {n_coloured} of {len(looked_at)} images looked at are in "
                         f"colour (channels differ by {np.median(colours):.0f} of 255 levels); expected "
                         "radiographs, which are grey")
