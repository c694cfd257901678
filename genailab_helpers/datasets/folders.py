"""Folders of radiographs as torch data sets, each film decoded once.

A film is decoded when the first data set that holds it is made, and kept as 8-bit pixels in a cache under
`storage.cache_folder()`, which can be deleted at any time. Films are found there by a hash of their bytes:
the same film in another folder is not decoded again, and another film under an old name is.
"""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from genailab_helpers.datasets.catalog import FINDINGS, GRADES, canonical_class, patient_of, sort_classes
from genailab_helpers.radiographs import (
    RADIOGRAPH_SUFFIXES,
    UnreadableRadiographError,
    check_img_size,
    is_dicom,
    read_radiograph,
)
from genailab_helpers.storage import cache_folder, whole_file

OnUnreadable = Literal["stop", "skip"]

_READER_VERSION = 1  # raise it when `read_radiograph` returns other numbers for the same bytes
_KEY_BYTES = 16
_SPLITS = frozenset({"train", "val", "valid", "validation", "test"})


def list_radiographs(root_dir: str | Path) -> list[Path]:
    """Find all radiographs below a folder.

    Parameters
    ----------
    root_dir : str or Path
        Any folder. Sub-folders and links are followed; hidden files and folders (`._*`, `.DS_Store`) and
        folders named `masks` are left out.

    Returns
    -------
    list of Path
        Files with a suffix of `RADIOGRAPH_SUFFIXES`, and DICOM files without any, in an order that depends on
        their names alone.

    Raises
    ------
    ValueError
        If the folder is absent, is a file, is empty, or holds other files only.
    """
    root = Path(root_dir)
    if not root.is_dir():
        what = "a file" if root.exists() else "no such folder"
        raise ValueError(f"{root}: {what}; expected a folder of radiographs")
    films, others, visited = [], Counter[str](), set()
    for folder, names, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # a link back up
            names.clear()
            continue
        visited.add(real)
        names[:] = [name for name in names if not name.startswith(".") and name.lower() != "masks"]
        for path in (Path(folder, name) for name in files):
            if _looks_like_radiograph(path):
                films.append(path)
            else:
                others[path.suffix or path.name] += 1
    if not films:
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        held = f"no radiographs among {others.total()} files ({found})" if others else "empty folder"
        raise ValueError(f"{root}: {held}; expected {', '.join(RADIOGRAPH_SUFFIXES)}")
    return sorted(films, key=lambda path: path.relative_to(root).parts)


def _looks_like_radiograph(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return path.suffix.lower() in RADIOGRAPH_SUFFIXES or (not path.suffix and is_dicom(path))


def read_radiographs(paths: Sequence[str | Path], img_size: int,
                     on_unreadable: OnUnreadable = "stop") -> tuple[Tensor, list[Path]]:
    """Read films into one batch.

    Parameters
    ----------
    paths : sequence of str or Path
        The films, at least one.
    img_size : int
        Side in pixels, at least 16.
    on_unreadable : {"stop", "skip"}, default "stop"
        Whether a film that cannot be read ends the reading or is left out with a warning.

    Returns
    -------
    images : Tensor
        float32 `(N, 1, img_size, img_size)` in [-1, 1].
    kept : list of Path
        The N films that were read, in the order given.

    Raises
    ------
    UnreadableRadiographError
        With "stop": names the first film that cannot be read.
    ValueError
        If there are no films, none can be read, or an argument is not as above.
    """
    check_img_size(img_size)
    read = list(_readable(paths, lambda path: read_radiograph(path, img_size), on_unreadable))
    return torch.stack([image for _, image in read]), [path for path, _ in read]


def _readable(paths: Sequence[str | Path], read: Callable[[Path], Any],
              on_unreadable: OnUnreadable) -> Iterator[tuple[Path, Any]]:
    """Yield each film with what `read` makes of it; deal with those that cannot be read."""
    if on_unreadable not in ("stop", "skip"):
        raise ValueError(f'on_unreadable={on_unreadable!r}: expected "stop" or "skip"')
    if not paths:
        raise ValueError("no films given; expected at least one path")
    left_out: list[UnreadableRadiographError] = []
    for path in map(Path, paths):
        try:
            result = read(path)
        except UnreadableRadiographError as error:
            if on_unreadable == "stop":
                reason = f'{error.reason}; on_unreadable="skip" leaves such films out'
                raise UnreadableRadiographError(path, reason) from error
            left_out.append(error)
        else:
            yield path, result
    if len(left_out) == len(paths):
        raise ValueError(f"none of {len(paths)} films can be read; the first: {left_out[0]}")
    if left_out:
        named = [str(error) for error in left_out[:3]]
        if len(left_out) > 3:
            named.append(f"and {len(left_out) - 3} more")
        summary = f"{len(left_out)} of {len(paths)} films cannot be read and are left out"
        warnings.warn(f"{summary}: {'; '.join(named)}", stacklevel=3)


class RadiographFolder(Dataset[tuple[Any, int]]):
    """A folder of radiographs by the conventions of `torchvision.datasets.ImageFolder`.

    Parameters
    ----------
    root_dir : str or Path
        Either a folder of class folders, with films at any depth below them (as in `COVID/images`), or one
        class folder with the films themselves. Folders that `catalog.canonical_class` gives one name are one
        class.
    img_size : int
        Side in pixels, at least 16.
    transform : callable, optional
        Applied to each image, a float32 tensor `(1, img_size, img_size)` in [-1, 1].
    on_unreadable : {"stop", "skip"}, default "stop"
        Whether a film that cannot be read is an error or is left out with a warning.

    Attributes
    ----------
    classes : list of str
        Canonical names in the order of `catalog.sort_classes`. Where class folders are grades, all five are
        listed, so that a label is the grade; a known finding counts even if its folder is empty.
    class_to_idx : dict
        Label of each class.
    samples : list of (str, int)
        Path and label of each film, by class and then by path.
    targets : list of int
        The labels alone.
    patients : list of str
        The patient of each film (`catalog.patient_of`).

    Raises
    ------
    UnreadableRadiographError
        With "stop": names the first film that cannot be read.
    ValueError
        If there are no radiographs, if the folder holds splits (`train`, `test`) or films beside class
        folders, or if an argument is not as above.

    Notes
    -----
    Pixels are kept in 8 bits: an item differs from `read_radiograph` by at most half a level, 1/255 in the
    range [-1, 1]. The cache is memory-mapped, so that worker processes share it, and it takes in whole packs
    of films under names made from their content, so that processes may fill it at the same time or be killed
    meanwhile.

    Examples
    --------
    >>> films = RadiographFolder("chest_xray/train", img_size=64)  # doctest: +SKIP
    >>> image, label = films[0]  # doctest: +SKIP
    """

    def __init__(self, root_dir: str | Path, img_size: int, transform: Callable[[Tensor], Any] | None = None,
                 on_unreadable: OnUnreadable = "stop") -> None:
        self.root_dir = Path(root_dir)
        self.img_size = check_img_size(img_size)
        self.transform = transform
        classes, names = _classes_of(self.root_dir)
        self.classes = classes
        self.class_to_idx = {name: label for label, name in enumerate(classes)}
        self._cache = _FilmCache(self.img_size)
        paths = sorted(names, key=lambda path: self.class_to_idx[names[path]])  # stable: then by path
        kept = self._cache.fill(paths, on_unreadable)
        self.samples = [(str(path), self.class_to_idx[names[path]]) for path, _ in kept]
        self.targets = [label for _, label in self.samples]
        self.patients = [patient_of(path.relative_to(self.root_dir)) for path, _ in kept]
        self._keys = [key for _, key in kept]

    def __len__(self) -> int:
        """Return the number of films."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return image and label of one film."""
        levels = torch.from_numpy(self._cache.levels(self._keys[index]))
        image = levels.float().div_(127.5).sub_(1)[None]
        return self.transform(image) if self.transform else image, self.targets[index]


def _classes_of(root: Path) -> tuple[list[str], dict[Path, str]]:
    """Return the classes in order, and for each film, by path, the name of its class."""
    films = list_radiographs(root)
    tops = {path: path.relative_to(root).parts[0] for path in films if path.parent != root}
    loose = [path for path in films if path.parent == root]
    if not tops or (not loose and set(tops.values()) == {"images"}):
        named = root.resolve()
        name = canonical_class(named.parent.name if named.name == "images" else named.name)
        return [name], dict.fromkeys(films, name)
    if loose:
        raise ValueError(f"{root}: {len(loose)} films such as {loose[0].name} lie beside class folders; "
                         "expected one or the other")
    if splits := sorted(top for top in set(tops.values()) if top.lower() in _SPLITS):
        raise ValueError(f"{root}: holds the splits {', '.join(splits)}; expected classes: choose a split")
    names = {path: canonical_class(top) for path, top in tops.items()}
    folders = {canonical_class(folder.name) for folder in root.iterdir() if folder.is_dir()}
    found = set(names.values()) | folders & {*GRADES, *FINDINGS}
    return (list(GRADES) if found <= set(GRADES) else sort_classes(found)), names


class _FilmCache:
    """Decoded films of one size: rows of memory-mapped packs, found by the hash of the film's bytes.

    A pack is one immutable file: n keys of 16 bytes, then n squares of 8-bit pixels. It is written whole
    under a name made from its keys, so nothing needs a lock, and two processes at worst do the same work
    twice.
    """

    def __init__(self, img_size: int) -> None:
        self.img_size = img_size
        self.folder = cache_folder() / "films" / f"v{_READER_VERSION}-{img_size}px"
        self.places: dict[bytes, tuple[Path, int]] = {}  # pack and offset of the pixels in it
        self._open: dict[Path, np.ndarray] = {}
        for pack in sorted(self.folder.glob("pack-*.u8")):
            self._index(pack)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a memory map would travel to a worker as a copy

    def _index(self, pack: Path) -> None:
        area = self.img_size**2
        count, rest = divmod(pack.stat().st_size, _KEY_BYTES + area)
        if rest:
            return  # damaged: its films are decoded anew
        with pack.open("rb") as file:
            for row in range(count):
                self.places[file.read(_KEY_BYTES)] = pack, count * _KEY_BYTES + row * area

    def levels(self, key: bytes) -> np.ndarray:
        """Return a copy of the pixels of one film, uint8 `(img_size, img_size)`."""
        pack, start = self.places[key]
        if pack not in self._open:
            self._open[pack] = np.memmap(pack, dtype=np.uint8, mode="r")
        levels = self._open[pack][start:start + self.img_size**2]
        return np.array(levels).reshape(self.img_size, self.img_size)

    def fill(self, paths: Sequence[Path], on_unreadable: OnUnreadable) -> list[tuple[Path, bytes]]:
        """Decode what is not there yet; return the readable films and their keys."""
        waiting: dict[bytes, np.ndarray] = {}
        rows_in_pack = max(1, min(256, 2**24 // self.img_size**2))

        def decode(path: Path) -> bytes:
            key = _key_of(path)
            if key not in self.places and key not in waiting:
                unit = (read_radiograph(path, self.img_size)[0] + 1) / 2
                waiting[key] = (unit * 255).round().to(torch.uint8).numpy()
                if len(waiting) == rows_in_pack:
                    self._write(waiting)
            return key

        kept: list[tuple[Path, bytes]] = []
        reading = tqdm(_readable(paths, decode, on_unreadable), desc="reading films", unit="film",
                       total=len(paths), delay=5, leave=False, disable=None)  # on a terminal, if slow
        try:
            kept.extend(reading)
        finally:
            self._write(waiting)  # what was decoded before an error is not lost
        return kept

    def _write(self, films: dict[bytes, np.ndarray]) -> None:
        """Write films as one pack, and empty the dictionary."""
        if not films:
            return
        keys = b"".join(films)
        pack = self.folder / f"pack-{hashlib.blake2b(keys, digest_size=_KEY_BYTES).hexdigest()}.u8"
        with whole_file(pack) as temporary:
            temporary.write_bytes(keys + b"".join(levels.tobytes() for levels in films.values()))
        films.clear()
        self._index(pack)


def _key_of(path: Path) -> bytes:
    """Hash the bytes of a film."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_KEY_BYTES)).digest()
    except OSError as error:
        raise UnreadableRadiographError(path, error.strerror or str(error)) from error
