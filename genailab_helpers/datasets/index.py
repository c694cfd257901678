"""Which images are there, of which class, split and patient, and how is the patient known: one table of them.

Audit, split, training, evaluation and commands take this table and ask nobody else.
"""

import hashlib
import io
import json
import os
import posixpath
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import PIL
from torch import Tensor

from genailab_helpers import radiographs
from genailab_helpers.checkpoints import cache_folder, whole_file
from genailab_helpers.datasets.names import (
    GRADES,
    KNOWN,
    SPLITS,
    canonical_class,
    canonical_classes,
    canonical_split,
    known_patient,
    sort_classes,
)

FORMULA = r"([=+@\t-])"  # a cell that begins so is computed by a spreadsheet; an apostrophe before it helps
TABLE = "films.csv"  # what `preparation` notes about images: file, class, patient, split, source

_READER = hashlib.sha256(Path(radiographs.__file__).read_bytes()).hexdigest() + PIL.__version__
_COLUMNS = {  # spelled without case and punctuation, as common tools and sets name them
    "file": ("file", "filename", "filepath", "path", "image", "imagename", "imagepath", "imageid",
             "imageindex", "stem"),
    "class": ("class", "label", "classname", "labelname", "grade", "finding", "findinglabels", "category",
              "diagnosis"),
    "patient": ("patient", "patientid", "group", "case", "caseid", "subject", "subjectid"),
    "split": ("split", "subset"),
}


def index_images(root: str | Path, table: str | Path | None = None, patient_pattern: str | None = None,
                 graded: bool = False) -> pd.DataFrame:
    """List the images of a data set with class, split and patient.

    Parameters
    ----------
    root : str or Path
        A folder of class folders, of `train/`, `val/`, `test/` with class folders, one class folder, or
        folders around these that hold nothing else (as `archive/chest_xray/train`). Images may lie at any
        depth below a class folder, as in `COVID/images`; no folder in there is a class. Hidden files and
        folders named `masks` are left out. Or a label file `dataset.json` as `genailab data label` writes
        it.
    table : str or Path, optional
        CSV with a column for the file and others for class, patient and split, see `read_table`. By default
        `films.csv` in the root, or beside it where the root is a split.
    patient_pattern : str, optional
        Regular expression that is searched in each file name; its first group (or whole match) is the
        patient.
    graded : bool, default False
        Whether the classes are known to be grades, see `names.canonical_classes`.

    Returns
    -------
    pandas.DataFrame
        A row an image, sorted and labelled by its path relative to the root, with the columns

        - `path`: the file, to be opened from where the caller is;
        - `class`: canonical name; by the folder, else by the table, else by the root's own name; "" where
          the image
          lies beside class folders;
        - `split`: "train", "val", "test" or "";
        - `patient`: whom it shows;
        - `known`: how that is known: by "pattern", "table", "file name" (rules of public sets), or not at
          all ("own":
          the image counts as a patient of its own, named by its path without suffix).

        `attrs` holds `root`, `table` ("" if none), `table_named` (by the caller), `splits` (those that have
        a folder), `empty` (split and class of each class folder without an image), `depth` (folders around
        splits and classes), `bit_depth` and `classes`, the names in the order in which they are numbered
        everywhere: all five grades where there are grades only, and known findings also where their folder
        is empty.

    Raises
    ------
    ValueError
        If there are no images, a folder may not be read, a link leads from one class or split into another,
        the table is none or a row of it fits several images, or the pattern is none or does not match a
        name.
    """
    root = Path(os.path.expanduser(root))
    if root.suffix == ".json":
        return _index_labels(root)
    names, folders, links = _find(root)
    held = [name.split("/")[:-1] for name in names]
    depth = _depth_of_classes(held)
    divided = any(canonical_split(part[depth]) for part in held if len(part) > depth)

    def place(name: str) -> tuple[str, str]:
        """Return split and class folder of a path."""
        inner = name.split("/")[depth:-1]
        split = canonical_split(inner[0]) if inner else ""
        return split, inner[bool(split)] if len(inner) > bool(split) == divided else ""

    for name, target in links:
        if place(name) != place(target):
            raise ValueError(f"{root / name}: a link to {target}, in another class or split of the same "
                             "folder; remove it")
    splits, tops = zip(*map(place, names), strict=True)
    flat = set(tops) <= {"", "images"} and max(map(len, held)) <= depth + divided + 1
    named = {} if flat else canonical_classes(set(tops) - {""}, graded)
    images = _tabulate(root, names, [named.get(top, "") for top in tops], splits, table, graded)
    if flat:
        home = root.resolve()
        alone = canonical_class((home.parent if home.name == "images" else home).name, graded)
        images["class"] = images["class"].replace("", alone)
    if patient_pattern:
        images["patient"], images["known"] = _patients_by(patient_pattern, names), "pattern"
    full = {"/".join(part[:n]) for part in held for n in range(depth + 3)}
    empty = {folder: (split, named.get(top) or canonical_class(top, graded)) for folder in folders - full
             for split, top in [place(f"{folder}/")] if top and folder.count("/") == depth + bool(split)}
    found = set(images["class"]) - {""}
    if not flat:
        found |= {label for _, label in empty.values()} & {*KNOWN}
    divisions = {canonical_split(folder.split("/")[depth]) for folder in folders
                 if folder.count("/") == depth}
    images.attrs |= {"depth": depth, "splits": sorted(divisions - {""}), "empty": empty, "classes":
                     list(GRADES) if found and found <= set(GRADES) and not flat else sort_classes(found)}
    return images


def _tabulate(root: Path, names: Sequence[str], classes: Sequence[str], splits: Sequence[str],
              table: str | Path | None = None, graded: bool = False) -> pd.DataFrame:
    """Make the table of an index; a CSV table says whose the images are, else file names, else nobody."""
    images = pd.DataFrame({"path": [str(root / name) for name in names], "class": classes, "split": splits,
                           "patient": [known_patient(posixpath.basename(name)) for name in names]},
                          index=pd.Index(names, name="image", dtype=str))
    images["known"] = images["patient"].ne("").map({True: "file name", False: "own"})
    beside = [root / TABLE, *([root.parent / TABLE] if canonical_split(root.name) else [])]
    found = table if table is not None else next((place for place in beside if place.is_file()), "")
    images.attrs = {"root": str(root), "table": str(found and os.path.expanduser(found)),
                    "table_named": table is not None, "bit_depth": BitDepth(images["path"].tolist())}
    if found:
        _apply_table(images, match_table(images, images.attrs["table"], graded))
    own = images["patient"] == ""
    images.loc[own, "patient"] = [str(PurePosixPath(name).with_suffix("")) for name in images.index[own]]
    return images


def _find(root: Path) -> tuple[list[str], set[str], list[tuple[str, str]]]:
    """Return images and folders below a root, and the links among the images with where they lead."""
    if not root.is_dir():
        what = "a file" if root.exists() else "no such folder"
        raise ValueError(f"{root}: {what}; expected a folder of radiographs")

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: this folder may not be read ({error.strerror}); check its "
                         "permissions") from error

    images, folders, links, others = [], {"."}, [], Counter[str]()
    visited, home = set(), os.path.realpath(root)
    for folder, inner, files in os.walk(root, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(folder)) in visited:  # a link back up
            inner.clear()
            continue
        visited.add(real)
        inner[:] = [name for name in inner if not re.fullmatch(r"\..*|masks|__macosx", name.lower())]
        base = os.path.relpath(folder, root).replace(os.sep, "/")
        folders.add(base)
        for name in files:
            path, place = os.path.join(folder, name), posixpath.normpath(posixpath.join(base, name))
            if not _looks_like_radiograph(path):
                others[os.path.splitext(name)[1] or name] += 1
                continue
            if not place.isascii() and place.encode(errors="replace").decode() != place:
                raise ValueError(f"{root}: the name {place!a} is no UTF-8; rename it")
            images.append(place)
            if os.path.islink(path) or real != os.path.normpath(os.path.join(home, base)):
                target = os.path.relpath(os.path.realpath(path), home).replace(os.sep, "/")
                links += [(place, target)] * (target[:3] != "../" and os.path.exists(path))
    if not images:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        held = f"no radiographs among {others.total()} files ({listed})" if others else "empty folder"
        raise ValueError(f"{root}: {held}; expected {', '.join(radiographs.RADIOGRAPH_SUFFIXES)}")
    return sorted(images, key=lambda name: name.replace("/", "\0")), folders - {"."}, links


def other_files(images: pd.DataFrame) -> list[str]:
    """Return the files below an index's root that are no images, outside of hidden folders and `masks`."""
    root, others = images.attrs["root"], []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".") and name.lower() != "masks"]
        others += [Path(folder, name).relative_to(root).as_posix() for name in files]
    return sorted(set(others) - set(images.index))


def _looks_like_radiograph(path: str) -> bool:
    if os.path.basename(path).startswith("."):
        return False
    if not os.path.isfile(path):  # a link to nothing is an image that cannot be read, a pipe is none
        return os.path.islink(path) and path.lower().endswith(radiographs.RADIOGRAPH_SUFFIXES)
    return path.lower().endswith(radiographs.RADIOGRAPH_SUFFIXES) or radiographs.is_dicom(path)


def _depth_of_classes(folders: Sequence[Sequence[str]]) -> int:
    """Return at which depth splits or known classes stand, below folders that hold nothing else; or 0."""
    def known(depth: int) -> set[str]:
        names = {part[depth] for part in folders if len(part) > depth}
        named = {canonical_split(name) or canonical_class(name) for name in names}
        return named & {*SPLITS, *KNOWN}

    for depth in range(min(map(len, folders))):
        if len({part[depth] for part in folders}) > 1 or (known(depth) and len(known(depth + 1)) < 2):
            return depth if known(depth) else 0
    return 0


def _patients_by(pattern: str, names: Sequence[str]) -> list[str]:
    try:
        matches = [re.search(pattern, posixpath.basename(name)) for name in names]
    except re.error as error:
        raise ValueError(f"patient pattern {pattern!r}: no regular expression ({error})") from error
    patients = [match[min(1, match.re.groups)] if match else "" for match in matches]
    if not all(patients):
        name = next(name for name, patient in zip(names, patients, strict=True) if not patient)
        raise ValueError(f"{name}: the patient pattern {pattern!r} finds no patient in the file name; "
                         "expected one in every name")
    return patients


def _apply_table(images: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Take over what a table says: patients always, class and split where the folders do not tell them."""
    rows = rows[rows["image"] != ""]
    for column in ("patient", "class", "split"):
        said = rows[rows[column] != ""].drop_duplicates(["image", column])
        twice = said[said["image"].duplicated(keep=False)]
        if column == "patient" and len(twice):
            raise ValueError(f"{images.attrs['table']}: gives {twice['image'].iloc[0]} the patients "
                             f"{' and '.join(twice['patient'].iloc[:2])}; expected one patient an image")
        said = said[~said["image"].isin(twice["image"])].set_index("image")[column].reindex(images.index)
        taken = said.notna() & ((column == "patient") | (images[column] == ""))
        images.loc[taken, column] = said[taken]
        if column == "patient":
            images.loc[taken, "known"] = "table"


def read_table(path: str | Path, graded: bool = False) -> pd.DataFrame:
    """Read a CSV table that names images and, where it has such columns, their class, patient and split.

    Parameters
    ----------
    path : str or Path
        UTF-8, with a header; commas, semicolons or tabs. The columns may be called as labelling tools and
        public sets call them (`filename`, `Image Index`, `label`, `grade`, `Patient ID`, `group`, ...).
    graded : bool, default False
        As in `names.canonical_classes`.

    Returns
    -------
    pandas.DataFrame
        Strings `file`, `class`, `patient`, `split`, "" where the table says nothing (also by `NA` or
        `nan`), labelled by their line in the file. Classes and splits have their canonical names, whole
        numbers no decimals (`2.0` is `2`), file names slashes.

    Raises
    ------
    ValueError
        If the file is absent, is no such table, or has no column for the file.
    """
    try:
        if not os.path.isfile(path):
            raise ValueError("no such file")  # or a pipe, which nobody may ever fill
        text = Path(path).read_text(encoding="utf-8-sig")
        header = next((line for line in text.split("\n") if line.strip(",;\t ") and "sep=" not in line), "")
        before = text.index(header)  # Excel writes sep=; and blank lines
        read = pd.read_csv(io.StringIO(text[before:]), sep=max(",;\t", key=header.count), dtype=str,
                           keep_default_na=False, skip_blank_lines=False)
    except (OSError, ValueError) as error:  # no UTF-8, or what pandas says of no table
        raise ValueError(f"{path}: expected a CSV table in UTF-8 ({' '.join(str(error).split())})") from error
    columns = {re.sub(r"[^a-z]", "", str(name).lower()): name for name in reversed(read.columns)}
    chosen = {kind: next((columns[name] for name in names if name in columns), None)
              for kind, names in _COLUMNS.items()}
    if chosen["file"] is None:
        raise ValueError(f"{path}: no column for the image among {header.strip()!r}; expected one of "
                         f"{', '.join(_COLUMNS['file'])}")

    rows = pd.DataFrame({kind: "" if name is None else read[name] for kind, name in chosen.items()},
                        read.index)
    rows = rows.fillna("").apply(lambda cells: cells.str.strip()).replace("(?i)^(na|nan)$", "", regex=True)
    rows = rows.replace(f"^'{FORMULA}", r"\1", regex=True)
    others = rows.columns.drop("file")
    rows[others] = rows[others].replace(r"^(\d+)\.0+$", r"\1", regex=True)
    rows.index = pd.Index(range(first := text.count("\n", 0, before) + 2, first + len(rows)), name="line")
    rows = rows[rows["file"] != ""]
    rows["file"] = rows["file"].str.replace("\\", "/").str.removeprefix("./")
    rows["split"] = rows["split"].map(canonical_split)
    names = canonical_classes(set(rows["class"]) - {""}, graded)
    rows["class"] = rows["class"].map({"": "", **names})
    return rows


def match_table(images: pd.DataFrame, table: str | Path, graded: bool = False) -> pd.DataFrame:
    """Find the image that each row of a table means.

    Parameters
    ----------
    images : pandas.DataFrame
        From `index_images`.
    table, graded
        As for `read_table`.

    Returns
    -------
    pandas.DataFrame
        The rows of `read_table` with one more column, `image`: the label of the image in `images`, "" where
        there is none. It is the image at the row's very path, relative to the root or to the table; else
        the one whose path ends like the row's, or the other way round, as far as both name folders (of a
        class under any alias; a folder `images` does not count). A suffix may be missing or differ.

    Raises
    ------
    ValueError
        If the table cannot be read, or a row fits several images.
    """
    labels = set(images["class"]) - {""}
    rows = read_table(table, graded or (bool(labels) and labels <= set(GRADES)))
    beside = os.path.relpath(os.path.realpath(Path(table).parent), os.path.realpath(images.attrs["root"]))
    by_stem: defaultdict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for name in images.index:
        by_stem[PurePosixPath(name).stem].append((name, _folders(name)))
    known, found = set(images.index), []
    for line, file in rows["file"].items():
        path = posixpath.normpath(file)
        places = (path, posixpath.normpath(posixpath.join(beside.replace(os.sep, "/"), path)))
        exact = [place for place in places if place in known]
        folders, last = _folders(path), posixpath.basename(path)
        alike = [name for stem in dict.fromkeys((last, PurePosixPath(last).stem))
                 for name, own in by_stem.get(stem, ())
                 if all(a == b for a, b in zip(reversed(folders), reversed(own), strict=False))]
        fits = exact[:1] or [name for name in alike if posixpath.basename(name) == last] or alike
        if len(fits) > 1:
            raise ValueError(f"{table}, line {line}: {file} fits {len(fits)} images: {', '.join(fits[:3])}"
                             f"{', ...' * (len(fits) > 3)}; expected its path below {images.attrs['root']}")
        found.append(fits[0] if fits else "")
    return rows.assign(image=found)


def _folders(path: str) -> list[str]:
    return [canonical_class(part, graded=True) for part in path.split("/")[:-1] if part not in ("", "images")]


def _index_labels(file: Path) -> pd.DataFrame:
    """List the images of a label file as StyleGAN2-ADA reads it, whose numbers the classes have."""
    try:
        labels = dict(json.loads(file.read_text(encoding="utf-8"))["labels"])
        images = index_images(file.parent)
        images = images.loc[sorted(labels)]
        images["number"] = [range(1000).index(labels[name]) for name in images.index]
        n_classes = max(images["number"]) + 1
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{file}: expected {{"labels": [["folder/image.png", 0], ...]}} of images in its '
                         f"folder ({error}); make it with `genailab data label`") from error
    named = images[images["class"] != ""].groupby("number")["class"].unique()
    alone = {number: names[0] for number, names in named.items() if len(names) == 1}
    if set(alone) < set(images["number"]):
        alone = {}
    classes = [alone.get(number, f"class {number}") for number in range(n_classes)]
    if all(GRADES[number:number + 1] == (name,) for number, name in alone.items()) and alone:
        classes = list(GRADES)
    images["class"] = [classes[number] for number in images.pop("number")]
    images["split"] = ""  # the file numbers classes and knows no parts
    images.attrs |= {"classes": classes, "splits": [], "empty": {}}
    return images


class BitDepth:
    """The bits a pixel of a data set whose files do not say it; asked for, it reads the files, once.

    One image alone may be a dark one of a deeper set, so all parts of a table share the answer of the
    whole: the smallest number of bits that holds its brightest pixel, or None where every file says it or
    has 8 bits.
    """

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __deepcopy__(self, memo: object) -> "BitDepth":
        """Return itself: pandas copies `attrs` with every part of a table."""
        return self

    @cached_property
    def bits(self) -> int | None:
        """The number of bits; a set seen before is not read again."""
        states = "".join(file_state(path, path) for path in self.paths)
        file = cache_folder("images") / f"{hashlib.sha256(states.encode()).hexdigest()[:32]}.bits"
        known = file.read_text(errors="replace") if file.is_file() else ""
        if known not in {str(bits) for bits in (0, *radiographs.BIT_DEPTHS)}:
            with warnings.catch_warnings(action="ignore"):
                brightest = max(threaded(radiographs.brightest_undeclared, self.paths), default=0.0)
            known = str(radiographs.smallest_bit_depth(brightest) if brightest else 0)
            with whole_file(file, sync=False) as path:
                path.write_text(known)
        return int(known) or None


def threaded(action: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yield `action(item)` in order, from several threads, few ahead: 100,000 waiting tasks take 100 MB."""
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as pool:  # each may decode a large image
        for start in range(0, len(items), 256):
            yield from pool.map(action, items[start:start + 256])


def file_state(name: str, path: str) -> str:
    """Return a name for a file in its present state: another one once it, or what reads it, has changed."""
    state = os.stat(path) if os.path.exists(path) else None
    seen = f"{_READER}\0{name}\0{state and (state.st_size, state.st_mtime_ns, state.st_ctime_ns)}"
    return hashlib.blake2b(os.fsencode(seen), digest_size=16).hexdigest()


def torn_patients(images: pd.DataFrame) -> list[str]:
    """Return the patients that are known and lie in several splits, sorted."""
    told = images[images["known"] != "own"]
    n_splits = told.groupby("patient")["split"].nunique()
    return sorted(n_splits.index[n_splits > 1])


def image_hashes(images: Tensor) -> list[str]:
    """Name each image by what it shows.

    Parameters
    ----------
    images : torch.Tensor
        (N, 1, H, W) float32 in [-1, 1]. They are rounded to 256 levels first, as the caches and PNG files of
        this project keep them, so that an image has the same name before and after it is stored.

    Returns
    -------
    list of str
        N SHA-256 sums of side lengths and pixels. The same image in another size has another one.

    Raises
    ------
    ValueError
        If `images` is no such batch.
    """
    radiographs.check_images(images)
    levels = ((images.detach().cpu() + 1) * 127.5).round().byte().numpy()
    return [hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest() for image in levels]


def check_manifest(manifest: Collection[str], train: Tensor, **held_out: Tensor) -> None:
    """Demand that a generator has seen images of the training and nothing else.

    Parameters
    ----------
    manifest : collection of str
        `image_hashes` of what the generator was trained on.
    train : torch.Tensor
        (N, 1, H, W) the training images.
    **held_out : torch.Tensor
        Images of the other parts, by the name of the part, such as `test=images`.

    Raises
    ------
    ValueError
        If the manifest holds an image of another part, or one that is not of the training.
    """
    seen = set(manifest)
    for part, images in held_out.items():
        if leaked := len(seen.intersection(image_hashes(images))):
            raise ValueError(f"{part}: the generator has seen {leaked} of its {len(images)} images; whatever "
                             "is trained on what it makes knows them, too: train it on the training images")
    if unknown := len(seen.difference(image_hashes(train))):
        raise ValueError(f"manifest: {unknown} of {len(seen)} images are none of the training; expected "
                         "those of the training alone, in the size in which they are used")
