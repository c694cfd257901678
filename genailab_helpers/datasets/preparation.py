"""Bring a raw folder of images into classes, one size, splits by patient, and labels.

Each step takes the table of `index.index_images` and writes a new folder, whole or not at all.
"""

import hashlib
import json
import os
import posixpath
import re
import shutil
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold
from tqdm import tqdm

from genailab_helpers.checkpoints import holds_files, whole_file, whole_folder
from genailab_helpers.datasets import duplicates, index
from genailab_helpers.datasets.folders import read_images
from genailab_helpers.datasets.names import (
    KNOWN,
    NO_IMAGES,
    SPLITS,
    canonical_class,
    canonical_classes,
    canonical_split,
    folded,
    sort_classes,
)
from genailab_helpers.datasets.privacy import kept_mark
from genailab_helpers.radiographs import UnreadableRadiographError, check_img_size, read_radiograph

RATIOS = (0.7, 0.15, 0.15)
TOLERANCE = 0.015  # a class's share of a split that is further from the ratio is reported
LABELS = "dataset.json"
N_FOLDS = 20  # ratios are kept to a twentieth: 14, 3 and 3 folds are 70, 15 and 15 %

_SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")  # in every folder that was opened on a desktop
_DRAWS = 1000  # of the folds that make a split
_FITS: dict[str, Callable[..., Image.Image]] = {  # an odd bar is wider at the bottom and at the right
    "letterbox": partial(ImageOps.pad, centering=(0.4999, 0.4999)), "crop": ImageOps.fit,
    "squash": Image.Image.resize}


class Summary(NamedTuple):
    """What a step did, or would do; `str()` is a table.

    Attributes
    ----------
    title : str
        What was done, and where the result is.
    counts : dict
        Number of images by (class, split); the split is "" where there are none.
    left_out : dict of str to list of str
        Names of what was not taken, by the reason.
    notes : list of str
        What else is worth knowing, one sentence each.
    """

    title: str
    counts: dict[tuple[str, str], int]
    left_out: dict[str, list[str]]
    notes: list[str]

    def __str__(self) -> str:
        """Return the table that the commands print."""
        counts = pd.Series(self.counts, dtype=int).unstack(fill_value=0)
        counts = counts.reindex(sort_classes(counts.index)).rename_axis("class")
        counts.loc["total"] = counts.sum()
        images = counts.sum(axis=1)
        shown = {split: [f"{n} {n / max(of, 1):6.1%}" for n, of in zip(counts[split], images, strict=True)]
                 for split in SPLITS if split in counts}
        table = pd.DataFrame({**shown, "images": images}).rename_axis(index=None, columns="class").to_string()
        lines = [f"left out, {reason} ({len(names)}): {', '.join(names[:3])}"
                 + f", and {len(names) - 3} more" * (len(names) > 3)
                 for reason, names in self.left_out.items()]
        wrapped = [textwrap.fill(line, 100, subsequent_indent="  ") for line in [*lines, *self.notes]]
        return "\n".join([self.title, table, *wrapped])


def create_structure(output: str | Path, classes: Sequence[str], dry_run: bool = False) -> Summary:
    """Make the empty tree `output/{train,val,test}/<class>`.

    Parameters
    ----------
    output : str or Path
        A new or empty folder.
    classes : sequence of str
        Any spelling that the alias table knows, or own names; `names.PRESETS` has three lists.
    dry_run : bool, default False
        Only say what would be done.

    Returns
    -------
    Summary
        With a count of 0 for each class and split.

    Raises
    ------
    ValueError
        If there are no classes or one cannot be the name of a folder.
    FileExistsError
        If `output` is not empty.
    """
    names = sort_classes(map(canonical_class, classes))
    if not names or not all(map(_is_class_name, names)):
        raise ValueError(f"classes {', '.join(names) or 'missing'}: expected names that a folder can have")
    if not dry_run:
        with whole_folder(output) as new:
            for folder in (new / split / name for split in SPLITS for name in names):
                folder.mkdir(parents=True)
    return _summary("create", output, dry_run, {(name, split): 0 for name in names for split in SPLITS})


def organize(images: pd.DataFrame, output: str | Path, classes: Sequence[str] | None = None,
             dry_run: bool = False, replace: bool = False) -> Summary:
    """Copy the images of a raw tree into class folders with the project's names.

    Parameters
    ----------
    images : pandas.DataFrame
        From `index.index_images`. If a table was named there, the class that it gives goes before the
        folder's, and images that it does not name stay out. Else the class is the first folder on the path,
        from the top, that is a known class.
    output : str or Path
        Gets `<class>/<image>`, or `<split>/<class>/<image>` if every image that is placed has a split, and
        `films.csv`.
    classes : sequence of str, optional
        The classes to take, own names included; by default all that the alias table knows, and any that the
        table names.
    dry_run : bool, default False
        Only say what would be done.
    replace : bool, default False
        Put the result in the place of what an earlier run has written to `output`.

    Returns
    -------
    Summary
        Lists by reason what could not be placed.

    Raises
    ------
    ValueError
        If no image can be placed, or input and `output` lie one in the other.
    FileExistsError
        If `output` is not empty, and `replace` is not set or the folder holds what no run has written.
    """
    _check_output(images, output, replace)
    folders = [name.split("/")[:-1] for name in images.index]
    named = canonical_classes({*(classes or ()), *chain(*folders), *images["class"]})  # one form of each name
    allowed = {named[name] for name in classes} if classes else {*KNOWN}
    deeper = [next(filter(allowed.__contains__, map(named.get, inner)), "") for inner in folders]
    above = [next(filter(None, map(canonical_split, inner)), "") for inner in folders]
    own = images["class"].map(named)
    every = images.assign(**{"class": own.where(own.isin(allowed), deeper),
                             "split": images["split"].where(images["split"] != "", above)})
    left_out: dict[str, list[str]] = {}
    notes: list[str] = []
    if images.attrs["table_named"]:
        rows = index.match_table(images, images.attrs["table"])
        notes = [f"Read from {Path(images.attrs['table']).name}: {rows.attrs['columns']}."]
        every = _follow_table(every, rows, left_out)
    wanted = every["class"].isin(allowed)
    several = every["class"].str.contains("[|;]") & ~wanted
    usable = every["class"].map(_is_class_name).astype(bool) & (wanted | (not classes)) & ~several
    left_out["several classes in one cell"] = every.index[several].tolist()
    left_out["no known class in the path or the table"] = every.index[~usable & ~several].tolist()
    placed, left_out["not an image"] = every[usable].copy(), _other_files(images)
    if placed.empty:
        held = ", ".join(sorted({*chain(*folders)})[:5]) or "no folder"
        raise ValueError(" ".join([
            f"{images.attrs['root']}: none of {len(images)} images has one known class by path ({held}) or "
            "table; name classes with --classes, or give a --table of classes.", *notes]))
    if 0 < (placed["split"] == "").sum() < len(placed):
        notes += ["Some images lie in split folders and some do not: the splits were dropped."]
        placed["split"] = ""
    placed["file"] = _names_apart(_places(placed))
    return _write("organize", placed, output, _copy, dry_run, replace, left_out, notes)


def preprocess(images: pd.DataFrame, output: str | Path, img_size: int = 256,
               fit: Literal["letterbox", "squash", "crop"] = "letterbox", dry_run: bool = False,
               replace: bool = False) -> Summary:
    """Write every image as a square grey 8-bit PNG, in the same tree.

    Parameters
    ----------
    images : pandas.DataFrame
        From `index.index_images`; of any size, depth and number of channels.
    output : str or Path
        Gets the tree of the input with suffixes `.png`, and `films.csv`.
    img_size : int, default 256
        Side in pixels, at least 16.
    fit : {"letterbox", "squash", "crop"}, default "letterbox"
        Whether the image keeps its aspect between black bars, fills the square, or is cut to its middle
        square. Bars and squashing tell a model what shape the file had; cutting does not.
    dry_run : bool, default False
        Only say what would be done; unreadable images are not found then.
    replace : bool, default False
        Put the result in the place of what an earlier run has written to `output`.

    Returns
    -------
    Summary
        Lists the images that cannot be read.

    Raises
    ------
    ValueError
        If no image can be read, an argument is not as above, or one folder lies in the other.
    FileExistsError
        As `organize`.

    Notes
    -----
    Black and white are the ends of the scale, as `read_radiograph` defines it; reduction is antialiased.
    """
    if fit not in _FITS:
        raise ValueError(f"fit={fit!r}: expected one of {', '.join(_FITS)}")
    check_img_size(img_size)
    _check_output(images, output, replace)
    wanted = images.index.to_series().map(index.without_suffix) + ".png"
    make = partial(_resize, img_size=img_size, fit=fit, bits=images.attrs["bit_depth"].bits)
    return _write(f"preprocess to {img_size}x{img_size}, {fit}", images.assign(file=_names_apart(wanted)),
                  output, make, dry_run, replace, {"not an image": _other_files(images)})


def split(images: pd.DataFrame, output: str | Path, ratios: Sequence[float] = RATIOS, seed: int = 42,
          mode: Literal["copy", "link", "manifest"] = "copy", near_duplicates: bool = True,
          dry_run: bool = False, replace: bool = False) -> Summary:
    """Divide a folder of classes into train, val and test; no patient and no copied image in two of them.

    Parameters
    ----------
    images : pandas.DataFrame
        From `index.index_images`. If there are splits already, they are ignored.
    output : str or Path
        Gets `<split>/<class>/<image>`, for each class with images in the split, and `films.csv`.
    ratios : sequence of float, default (0.7, 0.15, 0.15)
        Shares of train, val and test; they sum to 1, each is 0 or at least a twentieth, and they are rounded
        to twentieths.
    seed : int, default 42
        Seed of the draw.
    mode : {"copy", "link", "manifest"}, default "copy"
        Copies, hard links, or only the table `films.csv` with the names as they are in the input.
    near_duplicates : bool, default True
        Whether `duplicates.find_duplicates` ties images as well; equal images are tied always.
    dry_run : bool, default False
        Only say what would be done.
    replace : bool, default False
        Put the result in the place of what an earlier run has written to `output`.

    Returns
    -------
    Summary
        Its notes say which class's share is off by more than 1.5 points, by how much and why.

    Raises
    ------
    ValueError
        If no image has a class, an argument is not as above, or one folder lies in the other.
    FileExistsError
        As `organize`.
    """
    makers = {"copy": _copy, "link": _link, "manifest": None}
    if mode not in makers:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(makers)}")
    share = _round_ratios(ratios)
    _check_output(images, output, replace)
    (result, left_out), notes = _placed(images), []
    if not np.allclose(share, ratios):
        rounded = ", ".join(f"{name} {part:.2f}" for name, part in zip(SPLITS, share, strict=True))
        notes = [f"Ratios are kept to twentieths: {rounded}."]
    notes += ["The splits that the images lie in were ignored."] * any(result["split"])
    result["group"], said = _tie(result, near_duplicates)
    places = _names_apart(_places(result.assign(split="")))  # over all splits: outlives a new seed
    result["split"] = assign_splits(result["class"], result["group"], ratios, seed)
    result["file"] = result.index if mode == "manifest" else result["split"] + "/" + places
    return _write(f"split with seed {seed}", result, output, makers[mode], dry_run, replace, left_out,
                  [*notes, *said, *_say_what_is_off(result, share)])


def write_labels(images: pd.DataFrame, output: str | Path | None = None, dry_run: bool = False,
                 replace: bool = False) -> Summary:
    """Write the label file of StyleGAN2-ADA, `{"labels": [[path, class], ...]}`.

    Parameters
    ----------
    images : pandas.DataFrame
        From `index.index_images`.
    output : str or Path, optional
        A file in the root, by default `dataset.json`.
    dry_run : bool, default False
        Only say what would be done.
    replace : bool, default False
        Overwrite the file if it is a label file.

    Returns
    -------
    Summary
        Its note has the number of each class: that of `RadiographFolder.class_to_idx`.

    Raises
    ------
    ValueError
        If no image lies in a class folder.
    FileExistsError
        If the file is there, and `replace` is not set or it is no label file.
    """
    root, (placed, left_out), classes = Path(images.attrs["root"]), _placed(images), images.attrs["classes"]
    file = Path(os.path.expanduser(output)) if output else root / LABELS
    if file.resolve().parent != root.resolve():
        raise ValueError(f"{file}: expected a file in {root}, because the paths in it start there")
    if file.exists() and not (replace and file.is_file() and file.read_bytes().startswith(b'{"labels"')):
        raise FileExistsError(f"{file}: exists; expected a new file, or a label file and --replace")
    if not dry_run:
        listed = ",\n".join(json.dumps([name, classes.index(label)], ensure_ascii=False)
                            for name, label in sorted(placed["class"].items()))
        with whole_file(file) as temporary:
            temporary.write_bytes(f'{{"labels": [\n{listed}\n]}}\n'.encode())
    numbers = ", ".join(f"{name} {number}" for number, name in enumerate(classes))
    return _summary("label", file, dry_run, _count(placed), left_out, [f"Classes: {numbers}."])


# ---------------------------------------------------------------------------------- who goes to which split

def assign_splits(labels: Iterable[str], groups: Iterable[str], ratios: Sequence[float] = RATIOS,
                  seed: int = 42) -> list[str]:
    """Draw a split for every image, so that groups stay whole and each class keeps the ratios.

    Parameters
    ----------
    labels : iterable of str
        Class of each of N images.
    groups : iterable of str
        Patient of each image, or any other name of images that must stay together.
    ratios : sequence of float, default (0.7, 0.15, 0.15)
        Shares of train, val and test, rounded to twentieths.
    seed : int, default 42
        Seed of the draw. The order of the images does not matter.

    Returns
    -------
    list of str
        "train", "val" or "test" for each image.

    Raises
    ------
    ValueError
        If the lists differ in length or `ratios` are not as above.

    Notes
    -----
    Twenty folds by scikit-learn's StratifiedGroupKFold; of 1,000 ways to give them to the splits, the one
    that keeps the classes best. Fewer than twenty groups, or images of each class, start in one split
    instead. Groups are then moved singly while a class is off by more than 1.5 points and a move helps.
    """
    share = _round_ratios(ratios)
    _, code = np.unique(list(labels), return_inverse=True)
    names, member = np.unique(list(groups), return_inverse=True)
    counts = pd.crosstab(member, code).to_numpy()  # images by group and class
    of_group, order = np.full(len(names), share.argmax()), np.random.default_rng(seed).permutation(len(names))
    if min(len(names), counts.sum(0).max()) >= N_FOLDS:
        of_group, order = _draw_folds(member, code, share, seed), np.arange(len(names))
    of_group[order] = _move_groups(of_group[order], counts[order], share)
    return [SPLITS[number] for number in of_group[member]]


def _draw_folds(member: np.ndarray, code: np.ndarray, share: np.ndarray, seed: int) -> np.ndarray:
    """Make folds of groups, and give them to the splits in the way that keeps the classes best."""
    order, fold = np.lexsort((code, member)), np.empty(len(code), dtype=int)
    with warnings.catch_warnings(action="ignore"):  # of a class with fewer images than folds
        splitter = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=seed)
        for number, (_, test) in enumerate(splitter.split(order, code[order], member[order])):
            fold[order[test]] = number
    held = pd.crosstab(fold, code).reindex(range(N_FOLDS), fill_value=0).to_numpy()
    seats = np.repeat(np.arange(len(SPLITS)), np.rint(share * N_FOLDS).astype(int))
    ways = np.random.default_rng(seed).permuted(np.tile(seats, (_DRAWS, 1)), axis=1)  # the split of each fold
    reached = np.stack([(ways == number) @ held for number in range(len(SPLITS))], 1) / held.sum(0)
    off = np.abs(reached - share[:, None])
    best = ((off - TOLERANCE).clip(0).sum((1, 2)) + off.max((1, 2))).argmin()
    return pd.Series(ways[best][fold]).groupby(member).first().to_numpy(copy=True)


def _move_groups(of_group: np.ndarray, counts: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Move single groups between splits, always the one that helps most, until no class is off or none helps.

    Folds of a class in which one patient has a tenth of the images may be several points off.
    """
    splits, total = np.eye(len(share)), counts.sum(0)

    def excess(held: np.ndarray) -> np.ndarray:
        return (np.abs(held / total - share[:, None]) - TOLERANCE).clip(0)

    while True:
        held = splits[of_group].T @ counts
        rows = np.flatnonzero(counts @ excess(held).sum(0))  # groups with images of a class that is off
        change = splits[:, None] - splits[of_group[rows]]  # (to, group, split)
        after = excess(held + change[..., None] * counts[rows][:, None]).sum((-2, -1))
        after[share == 0] = np.inf
        if not after.min(initial=np.inf) < excess(held).sum() - 1e-9:
            return of_group
        to, row = np.unravel_index(after.argmin(), after.shape)
        of_group[rows[row]] = to


def _round_ratios(ratios: Sequence[float]) -> np.ndarray:
    """Round the shares of the splits to whole folds, so that they still sum to 1."""
    share = np.array(ratios, dtype=float)
    if share.shape != (3,) or not np.isclose(share.sum(), 1) or ((share != 0) & (share < 1 / N_FOLDS)).any():
        raise ValueError(f"ratios {', '.join(map(str, ratios))}: expected three shares that sum to 1, such "
                         "as 0.7, 0.15, 0.15; each of them 0, or at least a twentieth")
    return np.diff(np.floor(share.cumsum() * N_FOLDS + 0.5 + 1e-6), prepend=0) / N_FOLDS


def _tie(images: pd.DataFrame, near_duplicates: bool) -> tuple[list[str], list[str]]:
    """Name the group of each image: all that patients, equal images and near duplicates hold together."""
    with warnings.catch_warnings(action="ignore"):  # the images left out are counted in a note
        batch, kept = read_images(images, duplicates.SIDE, "skip")
    rows = images.index.get_indexer(kept.index)
    sights = index.image_hashes(batch)
    of_patient = enumerate(pd.Series(range(len(images))).groupby(images["patient"].array).transform("first"))
    exact = zip(rows, pd.Series(rows).groupby(sights).transform("first"), strict=True)
    pairs = duplicates.find_duplicates(batch) if near_duplicates else []
    near = [(rows[pair.first], rows[pair.second]) for pair in pairs]
    a, b = np.array([*of_patient, *exact, *near]).T
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(len(images), len(images)))
    n_groups, component = connected_components(graph, directed=False)
    looked = f", pairs of near duplicates ({len(near)})" if near_duplicates else "; near ones not looked for"
    unread, n_own = len(images) - len(kept), (images["known"] == "own").sum()
    notes = [*[f"{unread} images cannot be read: kept together by patient only."] * (unread > 0),
             f"{len(images)} images of {images['patient'].nunique()} patients"
             + f"; of {n_own} images the patient is not known, each counts as one: give --patient-pattern or "
               "--table" * bool(n_own) + ".",
             f"Kept together: images of a patient, equal images ({len(sights) - len(set(sights))}){looked}; "
             f"{n_groups} groups, the largest of {np.bincount(component).max()} images."]
    return images.index.to_series().groupby(component).transform("first").tolist(), notes


def _say_what_is_off(placed: pd.DataFrame, share: np.ndarray) -> list[str]:
    """Write a sentence on each class whose share is off by more than the tolerance, or that a split lacks."""
    notes, asked = [], pd.Series(share, SPLITS)[share > 0]
    for label in sort_classes(placed["class"]):
        of_class = placed[placed["class"] == label]
        reached = of_class["split"].value_counts(normalize=True).reindex(asked.index, fill_value=0)
        off = reached - asked
        worst = off.abs().idxmax()
        if abs(off[worst]) > TOLERANCE + 1e-9:
            notes.append(f"{label}: {100 * off[worst]:+.1f} points in {worst}; its {len(of_class)} images "
                         f"are in {of_class['group'].nunique()} groups that stay whole.")
        if lacking := reached.index[reached == 0].tolist():
            notes.append(f"{label}: no image in {' and '.join(lacking)}.")
    return notes


# ------------------------------------------------------------------------------------- names, tables, files

def _is_class_name(name: str) -> bool:
    fit = name.isprintable() and not canonical_split(name) and not NO_IMAGES.fullmatch(name)
    return fit and not re.search(  # some system refuses these
        r'[/\\:*?"<>|]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)|^(images)?$', name.lower())


def _follow_table(images: pd.DataFrame, rows: pd.DataFrame, left_out: dict[str, list[str]]) -> pd.DataFrame:
    """Keep the images that a table names, with the class that it gives; list the rows of no use."""
    absent = rows["file"][rows["image"] == ""]
    said = rows[rows["image"] != ""].drop_duplicates(["image", "class"])
    said = said[~said["image"].duplicated(keep=False)].set_index("image")["class"].reindex(images.index)
    left_out["table rows without their image"] = [f"line {line} ({file})" for line, file in absent.items()]
    left_out["not in the table, or there with two classes"] = images.index[said.isna()].tolist()
    return images.assign(**{"class": said.where(said != "", images["class"])})[said.notna()]


def _placed(images: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """Return the images in class folders, and the names of the others."""
    loose = images["class"] == ""
    if loose.all():
        raise ValueError(f"{images.attrs['root']}: no image lies in a class folder; organize it first")
    left_out = {"not in a class folder": images.index[loose].tolist(), "not an image": _other_files(images)}
    return images[~loose].copy(), left_out


def _other_files(images: pd.DataFrame) -> list[str]:
    """Return the files that are no images, but for this project's own tables and hidden ones."""
    ours = {index.TABLE, LABELS, Path(images.attrs["table"]).name}
    return [name for name in index.other_files(images) if posixpath.basename(name) not in ours
            and "/." not in f"/{name}"]


def _places(images: pd.DataFrame) -> pd.Series:
    """Return split/class/name of each image."""
    names = images.index.map(posixpath.basename)
    return pd.Series(list(map(posixpath.join, images["split"], images["class"], names)), images.index)


def _names_apart(wanted: pd.Series) -> pd.Series:
    """Return a path for each image that no other has, on any file system.

    All namesakes, and names that are too long, get a hash of their source, so that the result does not depend
    on an order; `films.csv` names the source.
    """
    alike = wanted.map(folded).duplicated(keep=False)
    too_long = wanted.map(lambda name: len(os.fsencode(posixpath.basename(name))) > 255)
    names = wanted.copy()
    for source in names.index[alike | too_long]:
        place, tag = PurePosixPath(wanted[source]), hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
        names[source] = str(place.with_name(f"{place.stem[:40]}__{tag}{place.suffix[-20:]}"))
    return names


def _count(placed: pd.DataFrame) -> dict[tuple[str, str], int]:
    return dict(Counter(zip(placed["class"], placed["split"], strict=True)))


def _summary(what: str, output: str | Path, dry_run: bool, counts: dict[tuple[str, str], int],
             left_out: Mapping[str, list[str]] | None = None, notes: Sequence[str] = ()) -> Summary:
    left = {reason: names for reason, names in (left_out or {}).items() if names}
    title = f"{what} -> {output}" + " (dry run: nothing was written)" * dry_run
    return Summary(title, counts, left, list(notes))


def _check_output(images: pd.DataFrame, output: str | Path, replace: bool) -> None:
    """Refuse what cannot be written, before any work."""
    source, target = Path(images.attrs["root"]).resolve(), Path(os.path.expanduser(output)).resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise ValueError(f"{output}: lies in the input {source}, or the input in it; expected a folder apart")
    if replace:
        _refuse_foreign(target)
    elif holds_files(target):
        raise FileExistsError(f"{target}: expected a new or empty folder; choose another, or replace "
                              "this one with --replace")


def _refuse_foreign(target: Path) -> None:
    """Refuse to replace a folder that holds what no run of this project has written."""
    ours = {index.TABLE, LABELS}
    with suppress(ValueError):  # no table, or one of somebody else that lists nothing of ours
        ours |= set(index.read_table(target / index.TABLE)["file"])
    files = {path.relative_to(target).as_posix() for path in target.rglob("*")
             if not path.is_dir() and path.name not in _SYSTEM_FILES}
    if strange := sorted(files - ours):
        raise FileExistsError(f"{target}: holds {len(strange)} files such as {strange[0]} that {index.TABLE} "
                              "does not list, so it is not replaced; move them out or choose another folder")


def _keep_private(target: Path, *sources: str) -> None:
    """Let nobody read what is made of images who may not read all of them."""
    target.chmod(np.bitwise_and.reduce([os.stat(path).st_mode for path in (str(target), *sources)]))


def _copy(source: str, target: Path) -> None:
    shutil.copyfile(source, target)
    _keep_private(target, source)


def _link(source: str, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:  # another disk, or one that knows no links
        raise ValueError(f"{source}: cannot be linked ({error.strerror}); use --mode copy") from error


def _resize(source: str, target: Path, img_size: int, fit: str, bits: int | None) -> None:
    unit = (read_radiograph(source, img_size if fit == "squash" else None, bits)[0] + 1) / 2
    image = _FITS[fit](Image.fromarray(unit.numpy()), (img_size, img_size), Image.Resampling.BILINEAR)
    Image.fromarray((np.asarray(image) * 255).round().astype(np.uint8)).save(
        target, "PNG", pnginfo=kept_mark(Path(source)))
    _keep_private(target, source)


def _write(what: str, placed: pd.DataFrame, output: str | Path, make: Callable[[str, Path], object] | None,
           dry_run: bool, replace: bool, left_out: dict[str, list[str]],
           notes: Sequence[str] = ()) -> Summary:
    """Make a folder of images, by `make(source, target)`, and its table; whole or not at all."""
    if not dry_run:
        with whole_folder(output, _refuse_foreign if replace else None) as new:
            placed, left_out["cannot be read"] = _fill(new, placed, make)
    return _summary(what, output, dry_run, _count(placed), left_out, notes)


def _fill(new: Path, placed: pd.DataFrame,
          make: Callable[[str, Path], object] | None) -> tuple[pd.DataFrame, list[str]]:
    """Make the images of a folder and their table; return those that were made, and why others were not."""
    def reason(row: tuple[str, str]) -> str:
        source, target = row[0], new / row[1]
        try:
            if make:
                target.parent.mkdir(parents=True, exist_ok=True)
                make(source, target)
        except UnreadableRadiographError as error:
            return error.reason
        except FileNotFoundError:
            return "a link to nothing"
        return ""

    with warnings.catch_warnings():  # reading in threads would leave the filters of warnings changed
        working = index.threaded(reason, list(zip(placed["path"], placed["file"], strict=True)))
        reasons = np.array(list(tqdm(working, "writing images", len(placed), unit="image", disable=None)))
    bad = [f"{source}: {said}" for source, said in zip(placed.index, reasons, strict=True) if said]
    if len(bad) == len(placed):
        raise ValueError(f"none of {len(placed)} images can be read; the first: {bad[0]}")
    placed = placed[reasons == ""]
    noted = placed.assign(source=placed.index, patient=placed["patient"].where(placed["known"] != "own", ""))
    noted = noted.sort_values("file")[["file", "class", "patient", "split", "source"]]
    noted.replace(f"^{index.FORMULA}", r"'\1", regex=True).to_csv(
        new / index.TABLE, index=False, lineterminator="\n")
    _keep_private(new / index.TABLE, *placed["path"])
    return placed, bad
