"""Which images are there, of which class, split and patient, and how is the patient known: one table of them.

Audit, split, training, evaluation and commands take this table and ask nobody else.
"""

import hashlib
import io
import os
import posixpath
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import PIL
from torch import Tensor

from genailab_helpers import radiographs
from genailab_helpers.checkpoints import cache_folder, holds_files, read_cached, write_cached
from genailab_helpers.datasets import names
from genailab_helpers.datasets.privacy import ANONYMOUS, identifies

FORMULA = r"([=+@\t-])"  # a cell that begins so is computed by a spreadsheet; an apostrophe before it helps
TABLE = "films.csv"  # what `preparation` notes about images: file, class, patient, split, source

_NO_DICOM = tuple({*radiographs.RADIOGRAPH_SUFFIXES} - {".dcm", ".dicom", ".ima"})
_READER = hashlib.sha256(Path(radiographs.__file__).read_bytes()).hexdigest() + PIL.__version__
_COLUMNS = {  # spelled without case and punctuation, as common tools and sets name them
    "file": ("file", "filename", "filepath", "path", "image", "imagename", "imagepath", "imageid",
             "imageindex", "stem"),
    "class": ("class", "label", "classname", "labelname", "grade", "finding", "findinglabels", "category",
              "diagnosis"),
    "patient": ("patient", "patientid", "patientno", "patientnumber", "pid", "group", "case", "caseid",
                "subject", "subjectid"),
    "split": ("split", "subset")}


def index_images(root: str | Path, table: str | Path | None = None, patient_pattern: str | None = None,
                 graded: bool = False) -> pd.DataFrame:
    """List the images of a data set with class, split and patient.

    Parameters
    ----------
    root : str or Path
        A folder of class folders, of `train/`, `val/`, `test/` with class folders, one class folder, or
        folders around these that hold nothing else (as `archive/chest_xray/train`). Images may lie at any
        depth below a class folder, as in `COVID/images`; no folder in there is a class, nor is a patient's
        own, as `patient7`. Hidden files and folders of masks (`masks`, `leftMask`) are left out. Links are
        followed.
    table : str or Path, optional
        CSV with a column for the file and others for class, patient and split, see `read_table`. By default
        `films.csv` in the root, or beside it where the root is a split.
    patient_pattern : str, optional
        Regular expression that is searched in each file name, else in its path below the root; its first
        group (or whole match) is the patient.
    graded : bool, default False
        Whether the classes are known to be grades, see `names.canonical_classes`.

    Returns
    -------
    pandas.DataFrame
        A row an image, sorted and labelled by its path relative to the root, with the columns

        - `path`: the file, to be opened from where the caller is;
        - `class`: canonical name; by the folder, else by the table, else by the root's own name; "" where
          the image lies beside class folders. Where a table was named by the caller and no folder is called
          like one of its classes, the folders are no classes and the table's count;
        - `split`: "train", "val", "test" or "";
        - `patient`: whom it shows;
        - `known`: how that is known: by "pattern", "table", "folder name" (as `patient7`), "DICOM header" (a
          hash of PatientID, where the files have several), "file name" (rules of public sets), "subfolder"
          (ten or more within classes, with few images each, whose images stay together), or not at all
          ("own": the image counts as a patient of its own, named by its path without suffix).

        `attrs` holds `root`, `table` ("" if none), `table_named` (by the caller), `splits` (those that have
        a folder), `empty` (split and class of each class folder without an image), `depth` (folders around
        splits and classes), `bit_depth` and `classes`, the names in the order in which they are numbered
        everywhere: all five grades where there are grades only, and known findings also where their folder
        is empty.

    Raises
    ------
    ValueError
        If there are no images, a folder may not be read, a link leads to a file that is found without it,
        the table is none or a row of it fits several images, or the pattern is none or does not match a
        name.
    """
    root = Path(os.path.expanduser(root))
    listed, folders = _find(root)
    held = [_above_patients(name.split("/")[:-1]) for name in listed]
    depth = _depth_of_classes(held)
    divided = any(names.canonical_split(part[depth]) for part in held if len(part) > depth)

    def place(folder: Sequence[str]) -> tuple[str, str]:
        """Return split and class folder of what lies in a folder."""
        inner = folder[depth:]
        split = names.canonical_split(inner[0]) if inner else ""
        top = inner[bool(split)] if len(inner) > bool(split) == divided else ""
        return split, re.sub(r"(?i)^images?[_-]?\d+$", "images", top)  # an archive's number is no class

    splits, tops = zip(*map(place, held), strict=True)
    flat = set(tops) <= {"", "images"} and max(map(len, held)) <= depth + divided + 1
    named = {} if flat else names.canonical_classes(tops, graded)
    images = pd.DataFrame({"path": [str(root / name) for name in listed],
                           "class": [named.get(top, "") for top in tops], "split": splits},
                          pd.Index(listed, name="image", dtype=str))
    beside = [root / TABLE, *[root.parent / TABLE] * bool(names.canonical_split(root.name))]
    found = table if table is not None else next((place for place in beside if place.is_file()), "")
    images.attrs = {"root": str(root), "table": str(found and os.path.expanduser(found)), "depth": depth,
                    "table_named": table is not None, "bit_depth": BitDepth(images["path"].tolist())}
    _tell_patients(images, patient_pattern, graded, depth + divided + 1)
    if flat and not images["class"].any():  # else a table knows the classes, but not of every image
        alone = next(part for part in root.resolve().parts[::-1] if part != "images")
        images["class"] = images["class"].replace("", names.canonical_class(alone, graded))
    empty, full, parts = {}, set(zip(splits, tops, strict=True)), {"", *splits}
    for folder in folders:
        split, top = place(_above_patients(folder))
        parts.add(split)
        if top and (split, top) not in full:
            label, at = named.get(top) or names.canonical_class(top, graded), folder[:depth + bool(split) + 1]
            if label in names.KNOWN or not holds_files(root.joinpath(*at)):  # else annotations, or so
                empty["/".join(at)] = split, label
    classes = set(images["class"]) - {""}
    if not flat:
        classes |= {label for _, label in empty.values()} & {*names.KNOWN}
        classes = {*names.GRADES} if classes and classes <= {*names.GRADES} else classes
    images.attrs |= {"splits": sorted(parts - {""}), "empty": empty, "classes": names.sort_classes(classes)}
    return images


def _above_patients(folders: list[str]) -> list[str]:
    """Cut a path off where a folder of a patient or DICOM UID begins; of `train_data/train` one stays."""
    above = list(takewhile(lambda name: not (names.PATIENT_FOLDER.fullmatch(name)
                                             or re.match(r"\d+(\.\d+){3}", name)), folders))
    return [name for number, name in enumerate(above) if not number or not names.canonical_split(name)
            or names.canonical_split(name) != names.canonical_split(above[number - 1])]


def _find(root: Path) -> tuple[list[str], list[list[str]]]:
    """Return the images below a root, and the parts of the path of each folder."""
    if not root.is_dir():
        what = "a file" if root.exists() else "no such folder"
        raise ValueError(f"{root}: {what}; expected a folder of radiographs")

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: this folder may not be read ({error.strerror})") from error

    images, folders, others, first = [], [], Counter[str](), dict[str, str]()
    for folder, inner, files in os.walk(root, followlinks=True, onerror=refuse):
        inner[:] = [name for name in inner if not names.NO_IMAGES.fullmatch(name)]
        base = Path(folder).relative_to(root)
        folders.append(list(base.parts))
        for name in files:
            path = os.path.join(folder, name)
            if not _looks_like_radiograph(path):
                others[os.path.splitext(name)[1] or name] += 1
                continue
            if (other := first.setdefault(os.path.realpath(path), path)) != path:
                raise ValueError(f"{path}: the same file as {other}; remove the link to it")
            images.append((base / name).as_posix())
    if not images:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        held = f"no radiographs among {others.total()} files ({listed})" if others else "empty folder"
        raise ValueError(f"{root}: {held}; expected {', '.join(radiographs.RADIOGRAPH_SUFFIXES)}")
    if strange := next((name for name in images if re.search("[\ud800-\udfff]", name)), ""):
        raise ValueError(f"{root}: the name {strange!a} is no UTF-8; rename it")
    return sorted(images, key=lambda name: name.replace("/", "\0")), folders


def other_files(images: pd.DataFrame) -> list[str]:
    """Return the files below an index's root that are no images, outside of folders that are left out."""
    root = Path(images.attrs["root"])
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
    return sorted(name for name in files - set(images.index)
                  if not any(map(names.NO_IMAGES.fullmatch, name.split("/")[:-1])))


def _looks_like_radiograph(path: str) -> bool:
    """Tell by the name or by the mark of DICOM; a link to nothing may be one, a pipe is none."""
    name = os.path.basename(path)
    if name.startswith(".") or name == "DICOMDIR" or not (os.path.isfile(path) or os.path.islink(path)):
        return False
    return path.lower().endswith(radiographs.RADIOGRAPH_SUFFIXES) or radiographs.is_dicom(path)


def _depth_of_classes(folders: Sequence[Sequence[str]]) -> int:
    """Return at which depth splits or known classes stand, below folders that hold nothing else; or 0."""
    def known(depth: int) -> set[str]:
        found = {part[depth] for part in folders if len(part) > depth}
        named = names.canonical_classes(found).items()
        return {names.canonical_split(name) or label for name, label in named} & {*names.SPLITS, *names.KNOWN}

    for depth in range(min(map(len, folders))):
        if len({part[depth] for part in folders}) > 1 or (known(depth) and len(known(depth + 1)) < 2):
            return depth if known(depth) else 0
    return 0


def _tell_patients(images: pd.DataFrame, pattern: str | None, graded: bool, below: int) -> None:
    """Say whose each image is: by the pattern, else the table, its folder, its header, its name, its own."""
    files = images.index.to_series().map(posixpath.basename)
    images["patient"], images["known"] = "", "own"
    if images.attrs["table"]:
        _apply_table(images, match_table(images, images.attrs["table"], graded))
    if pattern:
        try:
            found = [re.search(pattern, file) or re.search(pattern, path) for path, file in files.items()]
        except re.error as error:
            raise ValueError(f"patient pattern {pattern!r}: no regular expression ({error})") from error
        images["patient"] = [match[min(1, match.re.groups)] or "" if match else "" for match in found]
        images["known"] = "pattern"
        if len(nobody := images.index[images["patient"] == ""]):
            raise ValueError(f"{nobody[0]}: the patient pattern {pattern!r} finds no patient in this "
                             "path; expected one in every path")

    def tell(how: str, rule: Callable[[str], str], asked: pd.Series) -> None:
        said = asked[images["patient"] == ""].map(rule)
        said = said[said != ""]
        if how != "DICOM header" or said.nunique() > 1:  # else an anonymiser has given one number to all
            images.loc[said.index, "patient"], images.loc[said.index, "known"] = said, how

    def by_folder(path: str) -> str:
        """Take a patient's folder; of a person's name, as a PACS has it, the hash."""
        found = names.patient_folder(path)
        return _hashed(found) if "^" in found else found

    def by_name(path: str) -> str:
        """Apply the rules for file names; in a folder within a class, IM-0001-0001 is OsiriX's name."""
        own = [part for part in path.split("/")[below:-1] if part != "images"]
        found = names.known_patient(posixpath.basename(path))
        return own[0] if own and found.startswith(("IM-", "NORMAL2-")) else found

    tell("folder name", by_folder, images.index.to_series())
    tell("DICOM header", _hash_of_patient, images["path"])
    tell("file name", by_name, images.index.to_series())
    deep = images.index[(images["patient"] == "") & (images.index.str.count("/") > below)].to_series()
    inside = deep.map(lambda path: "/".join(path.split("/")[:below + 1]))
    inside = inside[~inside.str.endswith("/images")]
    if inside.nunique() >= 10 and inside.value_counts().median() <= 20:  # of patients or studies, perhaps
        named = inside.map(posixpath.basename)  # a person's name is that person's in every class and split
        tell("subfolder", _hashed, inside.where(~named.map(identifies), named))
    nobody = images.index[images["patient"] == ""]
    images.loc[nobody, "patient"] = nobody.map(without_suffix)


def _hash_of_patient(path: str) -> str:
    """Return a hash of a DICOM file's PatientID, which may be a hospital number; "" where there is none."""
    if path.lower().endswith(_NO_DICOM):
        return ""
    with suppress(Exception), warnings.catch_warnings(action="ignore"):  # "unreadable" is for who reads it
        number = str(radiographs.read_dicom(path).get("PatientID") or "").strip().lstrip("0")
        return "" if not number or ANONYMOUS.search(number) else _hashed(number)
    return ""


def _hashed(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]


def without_suffix(path: str) -> str:
    """Return a path without the suffix of its name; the end of a DICOM UID, a number, is none."""
    return re.sub(r"\.[A-Za-z][^./]*$", "", path)


def _apply_table(images: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Take over what a table says: patients always, class and split where the folders do not tell them."""
    named, n_rows, rows = images.attrs["table_named"], len(rows), rows[rows["image"] != ""]
    if named and n_rows and rows.empty:
        raise ValueError(f"{images.attrs['table']}: none of its {n_rows} rows names an image below "
                         f"{images.attrs['root']}, such as {images.index[0]}; is the first column that fits, "
                         f"{rows.attrs['columns'].split(', ')[0]}, that of the files?")
    if named and any(rows["class"]) and not {*images["class"]} & {*rows["class"]}:
        images["class"] = ""  # no folder is called like a class of the table: these folders are none
    for column in ("patient", "class", "split"):
        said = rows[rows[column] != ""].groupby("image")[column].agg(["first", "nunique"])
        twice = said.index[said["nunique"] > 1]
        said = said["first"].drop(twice).reindex(images.index)
        taken = said.notna() & ((column == "patient") | (images[column] == ""))
        images.loc[taken, column] = said[taken]
        if column == "patient":
            images.loc[taken, "known"] = "table"
            if len(twice):
                raise ValueError(f"{images.attrs['table']}: gives {twice[0]} several patients; expected one")


def read_table(path: str | Path, graded: bool = False) -> pd.DataFrame:
    """Read a CSV table that names images and, where it has such columns, their class, patient and split.

    Parameters
    ----------
    path : str or Path
        With a header; commas, semicolons or tabs; UTF-8, or as Excel writes it (UTF-16, Windows-1252). The
        columns may be called as labelling tools and public sets call them (`filename`, `Image Index`,
        `label`, `grade`, `Patient ID`, `group`, ...).
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
        If the file is absent, is no such table, or has no column for the file; if a spreadsheet has rounded
        the patients' numbers.
    """
    try:
        first, lines = table_lines(path)
        read = pd.read_csv(io.StringIO("\n".join(lines)), sep=max(",;\t", key=lines[0].count),
                           dtype=str, keep_default_na=False, skip_blank_lines=False)
    except (OSError, ValueError) as error:  # no text, or what pandas says of no table
        raise ValueError(f"{path}: expected a CSV table in UTF-8, UTF-16 or Windows-1252 "
                         f"({' '.join(str(error).split())})") from error
    called = defaultdict[str, list[str]](list)
    for column in read.columns:
        called[re.sub(r"[^a-z]", "", str(column).lower())].append(column)
    chosen = {kind: next((called[name] for name in aliases if name in called), [])
              for kind, aliases in _COLUMNS.items()}
    for kind, found in chosen.items():
        if len(found) > 1:
            raise ValueError(f"{path}: the columns {', '.join(found)} may all be the {kind}; keep one")
    if not chosen["file"]:
        raise ValueError(f"{path}: no column for the image among {lines[0].strip()!r}; expected one of "
                         f"{', '.join(_COLUMNS['file'])}")
    rows = pd.DataFrame({kind: read[found[0]] if found else "" for kind, found in chosen.items()}, read.index)
    rows = rows.fillna("").apply(lambda cells: cells.str.strip())
    rows = rows.replace({"(?i)^(na|nan)$": "", f"^'{FORMULA}": r"\1", r"^(\d+)\.0+$": r"\1"}, regex=True)
    rows.index = pd.RangeIndex(first + 2, first + 2 + len(rows), name="line")
    rows = rows[rows["file"] != ""]
    doubtful = [name for name in chosen["patient"] if name.lower() in ("group", "case")]
    if doubtful and len(rows) > 20 and rows["patient"].nunique() < 5:  # arms of a study, or yes and no
        chosen["patient"], rows["patient"] = [], ""
    rounded = rows["patient"].str.fullmatch(r"\d([.,]\d+)?E\+\d+")
    if rounded.any():
        raise ValueError(f"{path}, line {rounded.idxmax()}: the patient {rows['patient'][rounded.idxmax()]} "
                         "was rounded by a spreadsheet; format that column as text before it is saved")
    rows["file"] = rows["file"].str.replace("\\", "/").str.removeprefix("./")
    rows["class"] = rows["class"].map(names.canonical_classes(rows["class"], graded))
    rows["split"] = rows["split"].map(names.canonical_split)
    rows.attrs["columns"] = ", ".join(f"{kind}: {[*found, 'no column'][0]}" for kind, found in chosen.items())
    return rows


def table_lines(path: str | Path, n_bytes: int = -1, errors: str = "strict") -> tuple[int, list[str]]:
    """Return how many lines stand before the header of a CSV table, and the lines from the header on.

    UTF-8, UTF-16 with its mark, else Windows-1252, as Excel writes it, of the first bytes or of all. Raises
    ValueError for no file, or no text unless `errors` is "replace".
    """
    if not os.path.isfile(path):
        raise ValueError("no such file")  # or a pipe, which nobody may ever fill
    with open(path, "rb") as file:
        raw = file.read(n_bytes)
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors)
    except UnicodeDecodeError:
        if re.search(rb"[\xc2-\xdf][\x80-\xbf]|[\x80-\xff]{3}", raw):
            raise  # damaged UTF-8, or another alphabet
        text = raw.decode("cp1252")
    if "\0" in text and errors == "strict":
        raise ValueError("no text")
    lines = io.StringIO(text, newline=None).read().split("\n")
    first = next((number for number, line in enumerate(lines)  # Excel writes sep=; and blank lines
                  if line.strip(",;\t ") and "sep=" not in line), 0)
    return first, lines[first:]


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
        there is none. It is the image at the row's very path, relative to the root; else the one whose path
        ends like the row's, or the other way round, as far as both name folders (of a class under any alias;
        a folder `images` does not count). A suffix may be missing or differ.

    Raises
    ------
    ValueError
        If the table cannot be read, or a row fits several images.
    """
    labels = set(images["class"]) - {""}
    rows = read_table(table, graded or (bool(labels) and labels <= set(names.GRADES)))
    called = defaultdict[str, list[str]](list)  # images by their name with and without suffix
    for image in images.index:
        last = unicodedata.normalize("NFC", posixpath.basename(image))
        for name in {last, without_suffix(last)}:
            called[name].append(image)
    found = []
    for line, file in rows["file"].items():
        last = unicodedata.normalize("NFC", posixpath.basename(file))
        alike = ([image for image in called[name] if _folders_agree(image, file)]
                 for name in (last, without_suffix(last)))
        fits = [file] if file in images.index else next(filter(None, alike), [])
        if len(fits) > 1:
            raise ValueError(f"{table}, line {line}: {file} fits {len(fits)} images: {', '.join(fits[:3])}"
                             f"{', ...' * (len(fits) > 3)}; expected its path below {images.attrs['root']}")
        found.append(fits[0] if fits else "")
    return rows.assign(image=found)


def _folders_agree(first: str, second: str) -> bool:
    """Tell whether two paths end alike, as far as both name folders."""
    folders = ([names.canonical_class(part, graded=True) for part in path.split("/")[-2::-1]
                if part not in ("", "images")] for path in (first, second))
    return all(a == b for a, b in zip(*folders, strict=False))


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
        note = cache_folder("images") / f"{hashlib.sha256(states.encode()).hexdigest()[:32]}.bits"
        known = read_cached(note)
        if not known:  # not seen before, or damaged
            with warnings.catch_warnings(action="ignore"):
                brightest = max(threaded(radiographs.brightest_undeclared, self.paths), default=0.0)
            known = b"%d" % (radiographs.smallest_bit_depth(brightest) if brightest else 0)
            write_cached(note, known)
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
    return sorted(name for name, splits in told.groupby("patient")["split"] if splits.nunique() > 1)


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
