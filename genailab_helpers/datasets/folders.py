"""Radiographs as torch data sets, each image decoded once; train, val and test of a data set, read together.

The pixels of an image lie in a file of their own under `checkpoints.cache_folder()`, for their owner alone;
all of it can be deleted at any time (`genailab data cache --clear`).
"""

import hashlib
import os
import posixpath
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from genailab_helpers import radiographs
from genailab_helpers.checkpoints import cache_folder, read_cached, write_cached
from genailab_helpers.datasets.index import file_state, index_images, threaded, torn_patients
from genailab_helpers.datasets.names import GRADES, SPLITS
from genailab_helpers.radiographs import UnreadableRadiographError, check_img_size, read_radiograph
from genailab_helpers.statistics import grouped_folds

OnUnreadable = Literal["stop", "skip"]
COLOURED = 8  # of 255 levels between the channels, tints set aside; radiographs of six public sets have 0


class RadiographFolder(Dataset[tuple[Any, int]]):
    """A folder of radiographs by the conventions of `torchvision.datasets.ImageFolder`.

    Parameters
    ----------
    images : str, Path or pandas.DataFrame
        A folder without splits, as `index.index_images` takes it, or (part of) its table.
    img_size : int
        Side in pixels, at least 16.
    transform : callable, optional
        Applied to each image, a float32 tensor `(1, img_size, img_size)` in [-1, 1].
    on_unreadable : {"stop", "skip"}, default "stop"
        Whether an image that cannot be read is an error or is left out with a warning.

    Attributes
    ----------
    images : pandas.DataFrame
        The table of the images, by class and then by path.
    bit_depth : int or None
        That of the data set, as `read_radiograph` takes it.
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
        if len(loose := images.index[images["class"] == ""]):
            raise ValueError(f"{images.attrs['root']}: {len(loose)} images such as {loose[0]} lie beside "
                             "class folders; expected one or the other")
        self.classes: list[str] = images.attrs["classes"]
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.transform = transform
        labels = images["class"].map(self.class_to_idx)
        self._pixels = _Pixels(images.iloc[np.argsort(labels, kind="stable")], img_size, on_unreadable)
        self.images, self.img_size, self.bit_depth = self._pixels.images, img_size, self._pixels.bit_depth
        self.targets: list[int] = self.images["class"].map(self.class_to_idx).tolist()
        self.samples = list(zip(self.images["path"], self.targets, strict=True))
        self.patients: list[str] = self.images["patient"].tolist()

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
    levels = np.stack([pixels[i] for i in range(len(pixels.images))])
    return torch.from_numpy(levels)[:, None].float().div_(127.5).sub_(1), pixels.images


class _Pixels:
    """Decoded images of one size, each in a file of 8-bit pixels and their checksum.

    Such a file is named by reader, path, size and times of change of the image, its folder by data set, image
    size and bit depth: what changed has no file yet and is decoded. A file is written whole or not at all, so
    that two processes may fill one cache and a kill loses nothing; one that was damaged is made again.
    """

    def __init__(self, images: pd.DataFrame, img_size: int, on_unreadable: OnUnreadable) -> None:
        self.img_size, self.bit_depth = check_img_size(img_size), images.attrs["bit_depth"].bits
        place = f"{os.path.realpath(images.attrs['root'])}\0{img_size}\0{self.bit_depth}"
        self.folder = cache_folder("images") / hashlib.sha256(os.fsencode(place)).hexdigest()[:24]
        self.folder.mkdir(exist_ok=True, mode=0o700)
        self.paths = images["path"].array  # a look into the table costs more than a small file's reading
        states = (file_state(*image).encode() for image in zip(images.index, self.paths, strict=True))
        self.keys = np.fromiter(states, "S32", len(images))
        errors = self._decode_missing(on_unreadable)
        if len(errors) == len(images):
            raise ValueError(f"none of {len(images)} images can be read: {_named([*errors.values()], '; ')}")
        if errors:
            warnings.warn(f"{len(errors)} of {len(images)} images cannot be read and are left out: "
                          f"{_named([*errors.values()], '; ')}", stacklevel=3)
        kept = np.delete(np.arange(len(images)), list(errors))
        self.images, self.keys, self.paths = images.iloc[kept], self.keys[kept], self.paths[kept]

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the pixels of one image, uint8 `(img_size, img_size)`."""
        content = read_cached(self._file(index))
        levels = np.frombuffer(bytearray(content), np.uint8) if content else self._decode(index)
        return levels.reshape(self.img_size, self.img_size)

    def _file(self, index: int) -> str:
        return f"{self.folder}/{self.keys[index].decode()}.u8"

    def _decode(self, index: int) -> np.ndarray:
        image = read_radiograph(self.paths[index], self.img_size, self.bit_depth or 16)
        levels = image[0].add(1).div(2).mul(255).round().to(torch.uint8).numpy()
        write_cached(self._file(index), levels.tobytes())
        return levels

    def _decode_missing(self, on_unreadable: OnUnreadable) -> dict[int, UnreadableRadiographError]:
        """Decode what was never written, in several threads; return the errors of those that cannot be."""
        missing = [i for i in range(len(self.keys)) if not os.path.exists(self._file(i))]

        def error_of(index: int) -> UnreadableRadiographError | None:
            try:
                self._decode(index)
            except UnreadableRadiographError as error:
                if on_unreadable == "skip":
                    return error
                error.reason += "; move it out (`genailab data verify` lists all that cannot be read)"
                raise
            return None

        # the reader turns warnings off and on again, which threads do in any order: put all back at the end
        with warnings.catch_warnings(action="ignore"):
            working = zip(missing, threaded(error_of, missing), strict=True)
            bar = tqdm(working, "reading", len(missing), unit="image", delay=5, leave=False, disable=None)
            return {index: error for index, error in bar if error}


def _named(things: Sequence[object], between: str = ", ") -> str:
    """Return the first three of many things."""
    return between.join([*map(str, things[:3]), *[f"and {len(things) - 3} more"] * (len(things) > 3)])


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
    with warnings.catch_warnings(record=True, action="always") as caught:
        whole = RadiographFolder(_trainable(images, graded), img_size, on_unreadable="skip")
    for warning in caught:
        print(f"{root}: {warning.message}")
    split = whole.images["split"].replace("", "train").to_numpy(str)
    counts = pd.crosstab(whole.images["class"], split).reindex(
        index=classes, columns=[name for name in SPLITS if name in split], fill_value=0)
    if "train" not in counts:
        raise ValueError(f"{root}: found only {', '.join(f'{name}/' for name in counts)}; "
                         "expected train/, val/ and test/ with class folders")
    for (name, of_class), count in counts.unstack().items():
        least = 2 if name == "train" else 0 if graded else 1
        if count < least:
            raise ValueError(f"{root}: {count} readable images of {of_class} in {name}; expected at "
                             f"least {least} of each of {', '.join(classes)}")
    drawn = [name for name in ("test", "val") if name not in counts and (name == "val" or test)]
    n_patients = whole.images[split == "train"].groupby("class")["patient"].nunique()
    if drawn and not graded and n_patients.min() < 5:
        raise ValueError(f"{root}: images of {n_patients.min()} patients of {n_patients.idxmin()}; "
                         f"expected 5 or more, of whom a fifth becomes {drawn[0]}, or a folder {drawn[0]}")
    patients, labels = np.array(whole.patients), np.array(whole.targets)
    for name in drawn:
        train = np.flatnonzero(split == "train")
        with warnings.catch_warnings(action="ignore"):  # of a class with fewer patients than folds
            split[train[grouped_folds(patients[train], 5, seed, labels[train])[0][1]]] = name
    how = [f"{name} is a fifth of the patients of train, chosen with seed {seed}." for name in drawn]
    parts = {name: Subset(whole, np.flatnonzero(split == name).tolist()) for name in SPLITS if name in split}
    return parts, " ".join(how) or f"The folders {', '.join(parts)} are as they were found."


def _trainable(images: pd.DataFrame, graded: bool) -> pd.DataFrame:
    """Return the images in classes and parts, name the others, and refuse what no training can use."""
    root, classes = images.attrs["root"], images.attrs["classes"]
    if torn := torn_patients(images):
        raise ValueError(f"{root}: the images of {len(torn)} patients ({_named(torn)}) lie in several of "
                         "its parts; divide it again by patient: `genailab data split`")
    divided = any(images["split"])
    placed = images["class"].ne("") & (images["split"].ne("") | (not divided))
    if images.attrs["empty"]:
        print(f"{root}: no image in the class folders {_named(sorted(images.attrs['empty']))}")
    if len(loose := images.index[~placed]):
        where = "in no class folder" + " of train, val or test" * divided
        print(f"{root}: {len(loose)} images are left out, {where}: {_named(loose)}")
    if graded != (classes == list(GRADES)):
        wanted = (f"folders {GRADES[0]} to {GRADES[-1]}; for classes there is `genailab train classifier`"
                  if graded else "classes without an order; for grades there is `genailab train grader`")
        raise ValueError(f"{root}: holds the classes {', '.join(classes)}; expected {wanted}")
    if len(classes) < 2:
        raise ValueError(f"{root}: {one_class(images)} Expected two or more class folders")
    refuse_colours(images[placed])
    return images[placed]


def one_class(images: pd.DataFrame) -> str:
    """Say of images of one class in which folders they lie, and which table lies beside: either may tell."""
    folders = sorted({posixpath.dirname(name) or "." for name in images.index})
    tables = sorted({*map(str, Path(images.attrs["root"]).glob("[!.]*.csv"))} - {images.attrs["table"]})
    return (f"The images are of one class, {images.attrs['classes'][0]}, in {_named(folders)}."
            + " Folders called like patients are no classes." * ("folder name" in {*images["known"]})
            + (f" A table may know the classes (--table): {_named(tables)}." if tables else ""))


def part_images(part: Any) -> pd.DataFrame:
    """Return the table of a part, a Subset of a `RadiographFolder`, and the column `label`: class numbers."""
    return part.dataset.images.assign(label=part.dataset.targets).iloc[list(part.indices)]


def refuse_colours(images: pd.DataFrame) -> None:
    """Refuse a folder most of whose images are in colour; one with a tint is not."""
    looked_at, colours = images["path"].iloc[::-(-len(images) // 100)], []  # up to 100
    for path in looked_at:
        with suppress(UnreadableRadiographError), radiographs.open_image(path) as image:  # no DICOM
            image.draft(None, (64, 64))
            pixels = np.asarray(image.convert("RGB").resize((32, 32)), dtype=float).reshape(-1, 3)
            # the first axis is light and dark, in any tint; what is left is change of colour
            axes = np.linalg.svd(pixels - pixels.mean(0), compute_uv=False)
            colours.append(np.sqrt((axes[1:]**2).sum() / len(pixels)))
    if (n_coloured := sum(colour > COLOURED for colour in colours)) > len(looked_at) / 2:
        raise ValueError(f"{images.attrs['root']}: {n_coloured} of {len(looked_at)} images looked at are in "
                         f"colour (channels differ by {np.median(colours):.0f} levels); expected "
                         "radiographs, which are grey")
