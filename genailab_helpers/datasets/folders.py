"""Folders of radiographs as torch data sets, each film decoded once.

A film is decoded when the first data set that holds it is made, and kept as 8-bit pixels in a cache under
`storage.cache_folder()`, which can be deleted at any time. Films are found there by a hash of their bytes:
the same film in another folder is not decoded again, and another film under an old name is.
"""

import csv
import errno
import hashlib
import json
import os
import posixpath
import re
import shutil
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from genailab_helpers.datasets.catalog import (
    FINDINGS,
    GRADES,
    canonical_class,
    canonical_split,
    patient_of,
    sort_classes,
)
from genailab_helpers.radiographs import (
    RADIOGRAPH_SUFFIXES,
    UnreadableRadiographError,
    check_img_size,
    is_dicom,
    read_radiograph,
)
from genailab_helpers.storage import cache_folder, whole_file

OnUnreadable = Literal["stop", "skip"]

_Result = TypeVar("_Result")
_AHEAD = 64  # films that are read or decoded before they are asked for
_LARGE_CACHE = 5e7  # bytes that are announced

_READER_VERSION = 1  # raise it when `read_radiograph` returns other numbers for the same bytes
_KEY_BYTES = 16

TABLE = "films.csv"  # what `preparation` notes about films: file, class, patient, split, source
_COLUMNS = {  # spelled without case and punctuation, as common tools and sets name them
    "file": ("file", "filename", "filepath", "path", "image", "imagename", "imagepath", "imageid",
             "imageindex", "stem"),
    "label": ("class", "label", "classname", "labelname", "grade", "finding", "findinglabels", "category",
              "diagnosis"),
    "patient": ("patient", "patientid", "group", "case", "caseid", "subject", "subjectid"),
    "split": ("split", "subset"),
}


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
    if path.name.startswith(".") or (path.exists() and not path.is_file()):
        return False  # a pipe, for example; a link to nothing counts as a film that cannot be read
    return path.suffix.lower() in RADIOGRAPH_SUFFIXES or (not path.suffix and is_dicom(path))


class Film(NamedTuple):
    """One film of a data set.

    Attributes
    ----------
    path : Path
        The file.
    name : str
        The same relative to the root of the data set, with forward slashes.
    label : str
        Canonical class; "" where the film lies beside class folders.
    split : str
        "train", "val" or "test"; "" where the data set is not split.
    patient : str
        Who it shows, as far as table, pattern or file name tell.
    """

    path: Path
    name: str
    label: str
    split: str
    patient: str

    @property
    def told_patient(self) -> str:
        """The patient where anything but the film's own path tells it, else an empty string."""
        return "" if self.patient == PurePosixPath(self.name).with_suffix("").as_posix() else self.patient


def index_films(root_dir: str | Path, patient_pattern: str | None = None) -> list[Film]:
    """List the films of a data set with class, split and patient.

    Parameters
    ----------
    root_dir : str or Path
        A folder of class folders, of `train/`, `val/`, `test/` with class folders, or one class folder. Films
        may lie at any depth below a class folder (as in `COVID/images`).
    patient_pattern : str, optional
        Regular expression that is searched in the file name and whose first group (or whole match) is the
        patient. By default the patient is what the table `films.csv` in the root (or beside the split) says,
        else `catalog.patient_of`.

    Returns
    -------
    list of Film
        Sorted by name.

    Raises
    ------
    ValueError
        If the folder holds no radiographs, or the pattern is none or does not match a film.
    """
    root = Path(root_dir)
    places = [(path, path.relative_to(root).parts) for path in list_radiographs(root)]
    splits = [canonical_split(parts[0]) if len(parts) > 1 else "" for _, parts in places]
    inner = [parts[1:] if split else parts for (_, parts), split in zip(places, splits, strict=True)]
    if all(parts[:-1] in ((), ("images",)) for parts in inner):  # no class folders
        named = root.resolve()
        alone = canonical_class(named.parent.name if named.name == "images" else named.name)
    else:
        alone = ""
    patients = _noted_patients(root)
    films = []
    for (path, parts), split, rest in zip(places, splits, inner, strict=True):
        name = "/".join(parts)
        label = alone or (canonical_class(rest[0]) if len(rest) > 1 else "")
        patient = (_patient_by(patient_pattern, path) if patient_pattern
                   else patients.get(name) or patient_of(name))
        films.append(Film(path, name, label, split, patient))
    return films


def _patient_by(pattern: str, path: Path) -> str:
    try:
        match = re.search(pattern, path.name)
    except re.error as error:
        raise ValueError(f"patient pattern {pattern!r}: no regular expression ({error})") from error
    if not match or not (patient := match[1] if match.re.groups else match[0]):
        raise ValueError(f"{path}: the patient pattern {pattern!r} finds no patient in the file name; "
                         "expected one in every name")
    return patient


def _noted_patients(root: Path) -> dict[str, str]:
    """Read who is who from the table in a root, or beside it if the root is a split of a data set."""
    if (root / TABLE).is_file():
        return {row.file: row.patient for row in read_table(root / TABLE) if row.patient}
    if canonical_split(root.name) and (root.parent / TABLE).is_file():
        start = f"{root.name}/"
        return {row.file.removeprefix(start): row.patient for row in read_table(root.parent / TABLE)
                if row.patient and row.file.startswith(start)}
    return {}


class TableRow(NamedTuple):
    """One row of a table of films: its line in the file, and what it says; "" where it says nothing."""

    line: int
    file: str
    label: str
    patient: str
    split: str


def read_table(path: str | Path) -> list[TableRow]:
    """Read a CSV table that names films and, where it has such columns, their class, patient and split.

    Parameters
    ----------
    path : str or Path
        UTF-8, with a header; commas, semicolons or tabs. The columns may be called as labelling tools and
        public sets call them (`filename`, `Image Index`, `label`, `grade`, `Patient ID`, `group`, ...).

    Returns
    -------
    list of TableRow
        In the order of the file. Classes and splits have their canonical names; backslashes in file names
        become slashes.

    Raises
    ------
    ValueError
        If the file is absent, is no such table, or has no column for the file.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=header.count))
            columns = [re.sub(r"[^a-z]", "", name.lower()) for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(row)]
    except OSError as error:
        raise ValueError(f"{path}: expected a CSV table ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a CSV table in UTF-8 ({error})") from error
    place = {kind: next((columns.index(name) for name in names if name in columns), None)
             for kind, names in _COLUMNS.items()}
    if place["file"] is None:
        raise ValueError(f"{path}: no column for the film among {header.strip()!r}; expected one of "
                         f"{', '.join(_COLUMNS['file'])}")

    def cell(row: list[str], kind: str) -> str:
        column = place[kind]
        return row[column].strip() if column is not None and column < len(row) else ""

    return [TableRow(line, cell(row, "file").replace("\\", "/").removeprefix("./"),
                     canonical_class(cell(row, "label")), cell(row, "patient"),
                     canonical_split(cell(row, "split"))) for line, row in rows]


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


def cached_radiographs(paths: Sequence[str | Path], img_size: int,
                       on_unreadable: OnUnreadable = "stop") -> tuple[Tensor, list[Path]]:
    """Read films into one batch like `read_radiographs`, but decode each of them once in a lifetime.

    Parameters, results and errors are those of `read_radiographs`. Pixels went through 8 bits, as in
    `RadiographFolder`, with which this shares its cache.
    """
    films = [Path(path) for path in paths]
    kept, rows = _FilmCache(check_img_size(img_size)).fill(films, on_unreadable)
    levels = np.stack([rows.levels(i) for i in range(len(kept))])
    return torch.from_numpy(levels)[:, None].float().div_(127.5).sub_(1), [films[i] for i in kept]


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


def match_rows(rows: Iterable[TableRow], films: Iterable[Film],
               beside: str = "") -> list[tuple[TableRow, list[str]]]:
    """Find the films that each row of a table means.

    Parameters
    ----------
    rows : iterable of TableRow
        From `read_table`.
    films : iterable of Film
        From `index_films`.
    beside : str, default ""
        Folder of the table relative to the root of the films, to which its paths may be relative as well.

    Returns
    -------
    list of (TableRow, list of str)
        Every row with the names of the films that it fits: the one at its very path, else those whose path
        ends like its own, or the other way round, as far as both name folders (of a class under any alias; a
        folder `images` does not count). A suffix may be missing or differ.
    """
    by_stem: dict[str, list[tuple[str, list[str]]]] = {}
    for film in films:
        by_stem.setdefault(film.path.stem, []).append((film.name, _class_parts(film.name)))
    names = {name for found in by_stem.values() for name, _ in found}
    matches = []
    for row in rows:
        path = posixpath.normpath(row.file)
        places = (path, posixpath.normpath(posixpath.join(beside, path)))
        exact = [place for place in places if place in names]
        folders, last = _class_parts(path), posixpath.basename(path)
        alike = [name for stem in dict.fromkeys((last, PurePosixPath(last).stem))
                 for name, own in by_stem.get(stem, ())
                 if all(a == b for a, b in zip(reversed(folders), reversed(own), strict=False))]
        same = [name for name in alike if posixpath.basename(name) == last]
        matches.append((row, exact[:1] or same or alike))
    return matches


def _class_parts(path: str) -> list[str]:
    return [canonical_class(part) for part in path.split("/")[:-1] if part not in ("", "images")]


class RadiographFolder(Dataset[tuple[Any, int]]):
    """A folder of radiographs by the conventions of `torchvision.datasets.ImageFolder`.

    Parameters
    ----------
    root_dir : str or Path
        Either a folder of class folders, with films at any depth below them (as in `COVID/images`), or one
        class folder with the films themselves; or a label file `dataset.json` as `genailab data label` writes
        it. Folders that `catalog.canonical_class` gives one name are one class.
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
        Path and label of each film, by class and then by path; put together whenever it is asked for.
    targets : list of int
        The labels alone.
    patients : list of str
        The patient of each film, as `index_films` knows it; put together whenever it is asked for.

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
    range [-1, 1]. An item is read from the cache when it is asked for, so memory does not grow with the
    number of films but for their names. The cache is filled by several threads at a time, and takes in whole
    packs of films under names made from their content, so that processes may fill it at the same time or be
    killed meanwhile; what was whole is found again. If it is deleted later, films are decoded anew.

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
        if self.root_dir.suffix == ".json":
            self.classes, films = _labelled_films(self.root_dir)
        else:
            self.classes, films = _films_by_class(self.root_dir)
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        films.sort(key=lambda film: self.class_to_idx[film.label])  # stable: then by path
        kept, self._rows = _FilmCache(self.img_size).fill([film.path for film in films], on_unreadable)
        films = [films[i] for i in kept]
        self._folder = self.root_dir.parent if self.root_dir.suffix == ".json" else self.root_dir
        self._names = _Strings(film.name for film in films)
        self._patients = _Strings(film.patient for film in films)
        self.targets = [self.class_to_idx[film.label] for film in films]

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Path and label of each film."""
        return [(str(self._folder / name), label)
                for name, label in zip(self._names, self.targets, strict=True)]

    @property
    def patients(self) -> list[str]:
        """The patient of each film."""
        return list(self._patients)

    def __len__(self) -> int:
        """Return the number of films."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return image and label of one film."""
        try:
            levels = self._rows.levels(index)
        except OSError:  # somebody emptied the cache
            levels = _decode(self._folder / self._names[index], self.img_size)
        image = torch.from_numpy(levels).float().div_(127.5).sub_(1)[None]
        return self.transform(image) if self.transform else image, self.targets[index]


class _Strings(Sequence[str]):
    """Many strings in one block of memory: a list of them takes several times as much, and scatters it."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._block = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        return os.fsdecode(self._block[self._ends[place]:self._ends[place + 1]])


def _films_by_class(root: Path) -> tuple[list[str], list[Film]]:
    """Return the classes of a folder without splits, in order, and its films by path."""
    films = index_films(root)
    if splits := sorted({PurePosixPath(film.name).parts[0] for film in films if film.split}):
        raise ValueError(f"{root}: holds the splits {', '.join(splits)}; expected classes: choose a split")
    if loose := [film for film in films if not film.label]:
        raise ValueError(f"{root}: {len(loose)} films such as {loose[0].name} lie beside class folders; "
                         "expected one or the other")
    return class_names(root, films), films


def class_names(root_dir: str | Path, films: Sequence[Film]) -> list[str]:
    """Return the classes of a data set in the order in which they are numbered everywhere.

    Parameters
    ----------
    root_dir : str or Path
        The data set; empty folders of grades and findings in it count as classes.
    films : sequence of Film
        From `index_films`.

    Returns
    -------
    list of str
        All five grades where there are grades only; else what there is, as `catalog.sort_classes` orders it.
    """
    found = {film.label for film in films if film.label}
    if all(film.name.count("/") == film.name.startswith("images/") for film in films):
        return sort_classes(found)  # one class folder
    bases = {Path(root_dir, PurePosixPath(film.name).parts[0] if film.split else "") for film in films}
    folders = {canonical_class(folder.name) for base in bases for folder in base.iterdir() if folder.is_dir()}
    found |= folders & {*GRADES, *FINDINGS}
    return list(GRADES) if found <= set(GRADES) else sort_classes(found)


def _labelled_films(file: Path) -> tuple[list[str], list[Film]]:
    """Return classes and films of a label file as StyleGAN2-ADA reads it."""
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["labels"]
        pairs = [(PurePosixPath(name), int(label)) for name, label in listed]
        largest = max(label for _, label in pairs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file}: expected {{"labels": [["folder/film.png", 0], ...]}} ({error}); '
                         "make it with `genailab data label`") from error
    folders: dict[int, set[str]] = {label: set() for _, label in pairs}
    for place, label in pairs:
        if place.is_absolute() or ".." in place.parts or label < 0:
            raise ValueError(f"{file}: expected films below its folder and classes from 0, "
                             f"got {place}, {label}")
        inner = place.parts[1:] if canonical_split(place.parts[0]) else place.parts
        folders[label].add(canonical_class(inner[0]) if len(inner) > 1 else f"class {label}")
    classes = [f"class {label}" for label in range(largest + 1)]
    if all(len(names) == 1 for names in folders.values()):
        for label, (name,) in folders.items():
            classes[label] = name
        if set(folders) <= set(range(len(GRADES))) and all(classes[i] == GRADES[i] for i in folders):
            classes = list(GRADES)
    patients = _noted_patients(file.parent)
    return classes, [Film(file.parent / place, str(place), classes[label], "",
                          patients.get(str(place)) or patient_of(place)) for place, label in pairs]


class _Rows:
    """Where in the packs of the cache the pixels of films lie, in twelve bytes a film."""

    def __init__(self, img_size: int, places: Sequence[tuple[Path, int]]) -> None:
        self.img_size = img_size
        self.packs = list(dict.fromkeys(pack for pack, _ in places))
        number = {pack: i for i, pack in enumerate(self.packs)}
        self.pack = np.array([number[pack] for pack, _ in places], np.int32)
        self.start = np.array([start for _, start in places], np.int64)

    def levels(self, index: int) -> np.ndarray:
        """Read the pixels of one film, uint8 `(img_size, img_size)`."""
        # not a memory map: the pages that it has read count as memory of the process
        pack, area = self.packs[self.pack[index]], self.img_size**2
        levels = np.fromfile(pack, np.uint8, area, offset=self.start[index])
        if levels.size < area:
            raise OSError(f"{pack}: damaged")
        return levels.reshape(self.img_size, self.img_size)


class _FilmCache:
    """Decoded films of one size: rows of packs, found by the hash of the film's bytes.

    A pack is one immutable file: n keys of 16 bytes, then n squares of 8-bit pixels. It is written whole
    under a name made from its keys, so nothing needs a lock, and two processes at worst do the same work
    twice.
    """

    def __init__(self, img_size: int) -> None:
        self.img_size = img_size
        self.folder = cache_folder() / "films" / f"v{_READER_VERSION}-{img_size}px"
        self.places: dict[bytes, tuple[Path, int]] = {}  # pack and offset of the pixels in it
        for pack in sorted(self.folder.glob("pack-*.u8")):
            self._index(pack)

    def _index(self, pack: Path) -> None:
        area = self.img_size**2
        count, rest = divmod(pack.stat().st_size, _KEY_BYTES + area)
        if rest:
            return  # damaged: its films are decoded anew
        with pack.open("rb") as file:
            for row in range(count):
                self.places[file.read(_KEY_BYTES)] = pack, count * _KEY_BYTES + row * area

    def fill(self, paths: Sequence[Path], on_unreadable: OnUnreadable) -> tuple[list[int], _Rows]:
        """Decode what is not there yet; return which films are readable, and where their pixels lie."""
        # the reader turns warnings off and on again, which threads do in any order: put all back at the end
        with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(os.cpu_count()) as pool:
            hashing = _bar(_ordered(pool, content_key, paths), len(paths), "looking films up")
            keys = list(hashing)
            missing: dict[bytes, Path] = {}  # one film of each content
            for path, key in zip(paths, keys, strict=True):
                if isinstance(key, bytes) and key not in self.places:
                    missing.setdefault(key, path)
            self._announce(len(missing))
            unreadable = self._decode_all(pool, missing, stop=on_unreadable == "stop")
        numbered = enumerate(keys)

        def place(path: Path) -> tuple[int, tuple[Path, int]]:
            i, key = next(numbered)
            if isinstance(key, UnreadableRadiographError):
                raise key
            if key in unreadable:
                raise UnreadableRadiographError(path, unreadable[key].reason) from unreadable[key]
            return i, self.places[key]

        kept = [found for _, found in _readable(paths, place, on_unreadable)]
        return [i for i, _ in kept], _Rows(self.img_size, [where for _, where in kept])

    def _announce(self, n_films: int) -> None:
        """Say before it starts what a large cache takes, or that there is no room for it."""
        needed = n_films * (_KEY_BYTES + self.img_size**2)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"no room to write {n_films:,} decoded films: "
                          f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free. Free some, or "
                          "set GENAILAB_CACHE to a folder on another disk", str(self.folder))
        if needed > _LARGE_CACHE:
            print(f"{n_films:,} films are decoded once, into {needed / 1e6:,.0f} MB under {self.folder} (if "
                  f"stopped, it goes on where it was)", file=sys.stderr)

    def _decode_all(self, pool: Executor, missing: dict[bytes, Path],
                    stop: bool) -> dict[bytes, UnreadableRadiographError]:
        """Decode films pack by pack; return those that could not be, the first pack with such if `stop`."""
        unreadable: dict[bytes, UnreadableRadiographError] = {}
        rows_in_pack = max(1, min(256, 2**24 // self.img_size**2))
        films: dict[bytes, np.ndarray] = {}
        decoded = _ordered(pool, lambda path: _decode(path, self.img_size), list(missing.values()))
        try:
            for key, levels in zip(missing, _bar(decoded, len(missing), "reading films"), strict=True):
                if isinstance(levels, np.ndarray):
                    films[key] = levels
                    if len(films) == rows_in_pack:
                        self._write(films)
                    continue
                unreadable[key] = levels
                if stop:
                    break
        finally:
            self._write(films)  # what was decoded before an error is not lost
        return unreadable

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


def _ordered(pool: Executor, work: Callable[[Path], _Result],
             paths: Sequence[Path]) -> Iterator[_Result | UnreadableRadiographError]:
    """Yield what `work` makes of each path, or why it cannot, in order; some paths are worked on ahead."""
    def attempt(path: Path) -> _Result | UnreadableRadiographError:
        try:
            return work(path)
        except UnreadableRadiographError as error:
            return error

    ahead: deque[Future[_Result | UnreadableRadiographError]] = deque()
    try:
        for path in paths:
            ahead.append(pool.submit(attempt, path))
            if len(ahead) == _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for waiting in ahead:
            waiting.cancel()


def _bar(results: Iterator[_Result], total: int, what: str) -> Iterator[_Result]:
    """Show progress on a terminal, if it is slow."""
    with tqdm(results, desc=what, unit="film", total=total, delay=5, leave=False, disable=None) as bar:
        yield from bar


def _decode(path: Path, img_size: int) -> np.ndarray:
    """Return a film in 8 bits, `(img_size, img_size)`."""
    return (read_radiograph(path, img_size)[0].add(1).div(2) * 255).round().to(torch.uint8).numpy()


def content_key(path: Path) -> bytes:
    """Hash the bytes of a film: 16 bytes, equal for equal files whatever they are called.

    Raises
    ------
    UnreadableRadiographError
        If the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_KEY_BYTES)).digest()
    except OSError as error:
        raise UnreadableRadiographError(path, error.strerror or str(error)) from error
