"""Bring a raw folder of films into classes, one size, splits by patient, and labels.

A tree is built in a hidden folder beside the target, `.NAME.partial`, and renamed when it is complete. A kill
leaves nothing at the target or the whole; the same call goes on where it stopped.
"""

import csv
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import textwrap
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from genailab_helpers.datasets import duplicates
from genailab_helpers.datasets.catalog import (
    FINDINGS,
    GRADES,
    SPLITS,
    canonical_class,
    canonical_split,
    sort_classes,
)
from genailab_helpers.datasets.folders import (
    TABLE,
    Film,
    TableRow,
    cached_radiographs,
    class_names,
    content_key,
    index_films,
    match_rows,
    read_table,
)
from genailab_helpers.radiographs import UnreadableRadiographError, check_img_size, read_radiograph
from genailab_helpers.storage import whole_file

RATIOS = (0.7, 0.15, 0.15)
TOLERANCE = 0.015  # a class's share of a split may be so far from the ratio
LABELS = "dataset.json"

_MAX_KINDS = 400  # kinds of patients that the exact search handles in a few seconds
_Kind = tuple[tuple[str, int], ...]  # how many films of which class a group has
_Cells = Counter[tuple[str, str]]  # number of films by class and split
_NOT_IN_NAMES = frozenset('/\\:*?"<>|')  # some system cannot have these in a folder's name


class Summary(NamedTuple):
    """What a step did, or would do; `str()` is a table.

    Attributes
    ----------
    title : str
        What was done, and where the result is.
    counts : dict
        Number of films by (class, split); the split is "" where there are none.
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
        classes = sort_classes(label for label, _ in self.counts)
        splits = [split for split in SPLITS if any(split == held for _, held in self.counts)]
        lines = [self.title]
        if classes:
            width = max(map(len, [*classes, "class"]))
            lines.append("class".ljust(width) + "".join(f"{split:>15}" for split in splits) + f"{'films':>8}")
            for name in [*classes, "total"]:
                row = [sum(n for (label, held), n in self.counts.items()
                           if name in (label, "total") and held == split) for split in splits]
                films = sum(n for (label, _), n in self.counts.items() if name in (label, "total"))
                cells = (f"{n:>7} {n / max(films, 1):>6.1%}" for n in row)
                lines.append(name.ljust(width) + "".join(f"{cell:>15}" for cell in cells) + f"{films:>8}")
        for reason, names in self.left_out.items():
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left out, {reason} ({len(names)}): {', '.join(names[:3])}{more}")
        wrapped = (textwrap.fill(line, 100, subsequent_indent="  ") for line in [*lines[1:], *self.notes])
        return "\n".join([lines[0], *wrapped])


class _Placed(NamedTuple):
    """A film and its place in the output: one row of `films.csv`, and the file it comes from."""

    file: str
    label: str
    patient: str
    split: str
    source: str
    path: Path


# ----------------------------------------------------------------------------------------------- the steps

def create_structure(output: str | Path, classes: Sequence[str], dry_run: bool = False) -> Summary:
    """Make the empty tree `output/{train,val,test}/<class>`.

    Parameters
    ----------
    output : str or Path
        A new folder, or one that holds no file.
    classes : sequence of str
        Any spelling that the alias table knows, or own names; `catalog.PRESETS` has three lists.
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
        If `output` holds files.
    """
    names = sort_classes(map(canonical_class, classes))
    if not names or not all(map(_is_class_name, names)):
        raise ValueError(f"classes {', '.join(names) or 'missing'}: expected names that a folder can have, "
                         "such as Normal")
    target = _check_places(None, output, replace=False)
    empty = {(name, split): 0 for name in names for split in SPLITS}
    if not dry_run:
        _build(target, {"create": names}, lambda new: _make_folders(new, empty), replace=False)
    return Summary(_title("create", output, dry_run), empty, {}, [])


def organize(root_dir: str | Path, output: str | Path, table: str | Path | None = None,
             classes: Sequence[str] | None = None, dry_run: bool = False, replace: bool = False) -> Summary:
    """Copy the films of a raw tree into class folders with the project's names.

    Parameters
    ----------
    root_dir : str or Path
        The raw tree. A film's class is the deepest folder on its path that is a known class; folders `masks`
        and hidden files stay out.
    output : str or Path
        Gets `<class>/<film>`, or `<split>/<class>/<film>` if every film that is placed has a split, and
        `films.csv`.
    table : str or Path, optional
        CSV as `folders.read_table` reads it; its class and patient go before the folder's. A row's file is
        a path below `root_dir` or beside the table, else a file name or stem that only one film has.
    classes : sequence of str, optional
        The classes to take, own names included; by default all that the alias table knows, and any that the
        table names.
    dry_run : bool, default False
        Only say what would be done.
    replace : bool, default False
        Put the result in the place of what `output` holds.

    Returns
    -------
    Summary
        Lists by reason what could not be placed.

    Raises
    ------
    ValueError
        If no film can be placed, or `root_dir` and `output` lie one in the other.
    FileExistsError
        If `output` holds files and `replace` is not set.
    """
    target = _check_places(root_dir, output, replace)
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    films = index_films(root_dir)
    rows = _match_table(table, root_dir, films, left_out) if table else {}
    allowed = {canonical_class(name) for name in classes} if classes else {*GRADES, *FINDINGS}
    chosen: list[tuple[Film, str, str, str]] = []  # film, class, patient, split
    for film in _existing(films, left_out):
        folders = PurePosixPath(film.name).parts[:-1]
        row = rows.get(film.name)
        if table and row is None:
            left_out["not in the table, or there with two classes"].append(film.name)
            continue
        depth, label = next(((i, name) for i in reversed(range(len(folders)))
                             if (name := canonical_class(folders[i])) in allowed), (len(folders), ""))
        if row and row.label:
            depth, label = len(folders), row.label
        if not _is_class_name(label) or (classes and label not in allowed):
            reason = f"no known class in the {'table' if row and row.label else 'path'}"
            left_out[reason].append(film.name)
            continue
        split = next(filter(None, map(canonical_split, folders[:depth])), "")
        chosen.append((film, label, row.patient if row and row.patient else film.told_patient,
                       row.split if row and row.split else split))
    if not chosen:
        raise ValueError(f"{root_dir}: none of {len(films)} films has a known class; name the folders after "
                         "classes, or give the class names or a table")
    left_out["not a film"] = _other_files(Path(root_dir), films, table)
    keep_splits = all(split for *_, split in chosen)
    names = _names_apart((f"{split}/" * keep_splits + f"{label}/{film.path.name}",
                          "-".join(PurePosixPath(film.name).parts[:-1]), film.name)
                         for film, label, _, split in chosen)
    placed = [_Placed(name, label, patient, split * keep_splits, film.name, film.path)
              for name, (film, label, patient, split) in zip(names, chosen, strict=True)]
    if not dry_run:
        _build(target, _plan("organize", placed), partial(_fill, placed, _copy, []), replace)
    notes = [] if keep_splits or not any(split for *_, split in chosen) else [
        "Some films lie in split folders and some do not: the splits were dropped."]
    return Summary(_title("organize", output, dry_run), _count(placed), _tidy(left_out), notes)


def preprocess(root_dir: str | Path, output: str | Path, img_size: int = 256,
               fit: Literal["letterbox", "squash", "crop"] = "letterbox", dry_run: bool = False,
               replace: bool = False) -> Summary:
    """Write every film as a square grey 8-bit PNG, in the same tree.

    Parameters
    ----------
    root_dir : str or Path
        A folder of films of any size, depth and number of channels.
    output : str or Path
        Gets the tree of `root_dir` with suffixes `.png`, and `films.csv`.
    img_size : int, default 256
        Side in pixels, at least 16.
    fit : {"letterbox", "squash", "crop"}, default "letterbox"
        Whether the film keeps its aspect between black bars, fills the square, or is cut to its middle
        square. Bars and squashing tell a model what shape the file had; cutting does not.
    dry_run : bool, default False
        Only say what would be done; unreadable films are not found then.
    replace : bool, default False
        Put the result in the place of what `output` holds.

    Returns
    -------
    Summary
        Lists the films that cannot be read.

    Raises
    ------
    ValueError
        If no film can be read, an argument is not as above, or one folder lies in the other.
    FileExistsError
        If `output` holds files and `replace` is not set.

    Notes
    -----
    Black and white are the ends of the scale, as `read_radiograph` defines it; reduction is antialiased.
    """
    if fit not in ("letterbox", "squash", "crop"):
        raise ValueError(f'fit={fit!r}: expected "letterbox", "squash" or "crop"')
    check_img_size(img_size)
    target = _check_places(root_dir, output, replace)
    left_out: dict[str, list[str]] = {}
    films = _existing(index_films(root_dir), left_out)
    names = _names_apart((f"{PurePosixPath(film.name).with_suffix('')}.png" if film.path.suffix
                          else f"{film.name}.png", film.path.suffix[1:] or "dicom", film.name)
                         for film in films)
    placed = [_Placed(name, film.label, film.told_patient, film.split, film.name, film.path)
              for name, film in zip(names, films, strict=True)]
    unreadable: list[tuple[str, str]] = []
    if not dry_run:
        make = partial(_resize, img_size=img_size, fit=fit)
        plan = _plan(f"preprocess {img_size} {fit}", placed)
        _build(target, plan, partial(_fill, placed, make, unreadable), replace)
    bad = {name for name, _ in unreadable}
    left_out["cannot be read"] = [reason for _, reason in sorted(unreadable)]
    return Summary(_title(f"preprocess to {img_size}x{img_size}, {fit}", output, dry_run),
                   _count(film for film in placed if film.file not in bad), _tidy(left_out), [])


def split(root_dir: str | Path, output: str | Path, ratios: Sequence[float] = RATIOS, seed: int = 42,
          mode: Literal["copy", "link", "manifest"] = "copy", patient_pattern: str | None = None,
          patients: str | Path | None = None, near_duplicates: bool = True, dry_run: bool = False,
          replace: bool = False) -> Summary:
    """Divide a folder of classes into train, val and test; no patient and no copied film in two of them.

    Parameters
    ----------
    root_dir : str or Path
        Class folders. If there are splits already, they are ignored.
    output : str or Path
        Gets `<split>/<class>/<film>` and `films.csv`.
    ratios : sequence of float, default (0.7, 0.15, 0.15)
        Shares of train, val and test; they sum to 1, and a split of 0 stays empty.
    seed : int, default 42
        Seed of the draw.
    mode : {"copy", "link", "manifest"}, default "copy"
        Copies, hard links, or only the table `films.csv` with the names as they are in `root_dir`.
    patient_pattern : str, optional
        As in `index_films`, whose patients are taken by default.
    patients : str or Path, optional
        CSV with file and patient, matched as in `organize`; films that it does not name keep theirs.
    near_duplicates : bool, default True
        Whether `duplicates.find_duplicates` ties films as well; equal files are tied always.
    dry_run : bool, default False
        Only say what would be done.
    replace : bool, default False
        Put the result in the place of what `output` holds.

    Returns
    -------
    Summary
        Its notes say which class's share is off by more than 1.5 points, by how much and why.

    Raises
    ------
    ValueError
        If no film has a class, an argument is not as above, or one folder lies in the other.
    FileExistsError
        If `output` holds files and `replace` is not set.
    """
    if mode not in ("copy", "link", "manifest"):
        raise ValueError(f'mode={mode!r}: expected "copy", "link" or "manifest"')
    if patients and patient_pattern:
        raise ValueError("patients and a patient pattern: expected one of the two")
    shares = _check_ratios(ratios)
    target = _check_places(root_dir, output, replace)
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    notes = []
    every = index_films(root_dir, patient_pattern)
    if patients:
        rows = _match_table(patients, root_dir, every, left_out)
        every = [film._replace(patient=rows[film.name].patient or film.patient)
                 if film.name in rows else film for film in every]
    every = _existing(every, left_out)
    films = [film for film in every if film.label]
    left_out["not in a class folder"] = [film.name for film in every if not film.label]
    if not films:
        raise ValueError(f"{root_dir}: no film lies in a class folder; organize the folder first")
    if any(film.split for film in films):
        notes.append("The splits that the films lie in were ignored.")
    groups = _tie(films, near_duplicates, notes)
    chosen = assign_splits([film.label for film in films], groups, ratios, seed)
    names = _names_apart((f"{film.label}/{film.path.name}", "-".join(PurePosixPath(film.name).parts[:-1]),
                          film.name) for film in films)  # apart over all splits: a name outlives a new seed
    placed = [_Placed(film.name if mode == "manifest" else f"{to}/{name}", film.label, film.told_patient, to,
                      film.name, film.path) for name, film, to in zip(names, films, chosen, strict=True)]
    counts = {(label, to): 0 for label in {film.label for film in films} for to in shares} | _count(placed)
    notes += _say_what_is_off([film.label for film in films], groups, counts, shares)
    if not dry_run:
        if mode == "manifest":
            def fill(new: Path) -> None:
                _write_table(new, placed)
        else:
            def fill(new: Path) -> None:
                _make_folders(new, counts)
                _fill(placed, _copy if mode == "copy" else _link, [], new)
        _build(target, _plan(f"split {mode}", placed), fill, replace)
    return Summary(_title(f"split with seed {seed}", output, dry_run), counts, _tidy(left_out), notes)


def write_labels(root_dir: str | Path, output: str | Path | None = None, dry_run: bool = False,
                 replace: bool = False) -> Summary:
    """Write the label file of StyleGAN2-ADA, `{"labels": [[path, class], ...]}`.

    Parameters
    ----------
    root_dir : str or Path
        Class folders, or splits with class folders.
    output : str or Path, optional
        A file in `root_dir`, by default `dataset.json`, where `RadiographFolder` reads it back.
    dry_run : bool, default False
        Only say what would be done.
    replace : bool, default False
        Overwrite the file if it is there.

    Returns
    -------
    Summary
        Its note has the number of each class: that of `RadiographFolder.class_to_idx`.

    Raises
    ------
    ValueError
        If no film lies in a class folder.
    FileExistsError
        If the file is there and `replace` is not set.
    """
    root = Path(root_dir)
    file = Path(output) if output else root / LABELS
    if file.resolve().parent != root.resolve():
        raise ValueError(f"{file}: expected a file in {root}, because the paths in it start there")
    if file.exists() and (not replace or file.is_dir()):
        raise FileExistsError(f"{file}: exists; expected a new file, or replace it with --replace")
    every = index_films(root)
    films = [film for film in every if film.label]
    if not films:
        raise ValueError(f"{root}: no film lies in a class folder; organize the folder first")
    classes = class_names(root, every)
    pairs = sorted((film.name, classes.index(film.label)) for film in films)
    if not dry_run:
        listed = ",\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)
        with whole_file(file) as temporary:
            temporary.write_bytes(f'{{"labels": [\n{listed}\n]}}\n'.encode())
    numbers = ", ".join(f"{name} {number}" for number, name in enumerate(classes))
    return Summary(_title("label", file, dry_run), dict(Counter((film.label, film.split) for film in films)),
                   _tidy({"not in a class folder": [film.name for film in every if not film.label]}),
                   [f"Classes: {numbers}."])


# ---------------------------------------------------------------------------------- who goes to which split

def assign_splits(labels: Sequence[str], groups: Sequence[str], ratios: Sequence[float] = RATIOS,
                  seed: int = 42) -> list[str]:
    """Draw a split for every film, so that groups stay whole and each class keeps the ratios.

    Parameters
    ----------
    labels : sequence of str
        Class of each of N films.
    groups : sequence of str
        Patient of each film, or any other name of films that must stay together.
    ratios : sequence of float, default (0.7, 0.15, 0.15)
        Shares of train, val and test; they sum to 1, and a split of 0 stays empty.
    seed : int, default 42
        Seed of the draw. The order of the films does not matter.

    Returns
    -------
    list of str
        "train", "val" or "test" for each film. No class's share is off by more than `TOLERANCE` where that
        is possible for all classes together, else the sum of what exceeds it is small.

    Raises
    ------
    ValueError
        If the lists differ in length or `ratios` are not as above.

    Notes
    -----
    Groups that weigh most in a class come first, equal ones in random order. Each goes where it adds least to
    the sum of n^2 / (ratio N) over classes and splits: with one class this is Sainte-Lague's method of
    dividing seats, so that every kind of group is divided by the ratios too. Only if a class ends outside
    the tolerance, an integer program looks for an assignment near this one that mends it, then anywhere. It
    is exact up to 400 kinds of groups; beyond, it moves some kinds that hold the classes in question.
    """
    if len(labels) != len(groups):
        raise ValueError(f"{len(labels)} labels and {len(groups)} groups: expected one of each for a film")
    shares = _check_ratios(ratios)
    totals = Counter(labels)
    held_by: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for label, group in zip(labels, groups, strict=True):
        held_by[group][label] += 1
    kinds = {group: tuple(sorted(counts.items())) for group, counts in held_by.items()}
    order = sorted(kinds, key=lambda group: (-max(n / totals[label] for label, n in kinds[group]),
                                             _digest(f"{seed} {group}")))
    held: _Cells = Counter()
    chosen = {}
    for group in order:
        def growth(split: str, kind: _Kind = kinds[group]) -> float:
            return sum(n * (2 * held[label, split] + n) / (shares[split] * totals[label])
                       for label, n in kind)

        chosen[group] = min(shares, key=growth)
        for label, n in kinds[group]:
            held[label, chosen[group]] += n
    best = _excess(held, totals, shares)
    possible = sum(_least_excess(n, shares) for n in totals.values())
    for radius in (1, 4, len(order)):
        if best <= possible + 1e-9:
            break
        moved = _rebalance(order, kinds, chosen, totals, shares, radius)
        if (excess := _excess(_tally(kinds, moved), totals, shares)) < best - 1e-9:
            best, chosen = excess, moved
    return [chosen[group] for group in groups]


def _check_ratios(ratios: Sequence[float]) -> dict[str, float]:
    """Return the splits that get films, with their shares."""
    if len(ratios) != len(SPLITS) or min(ratios) < 0 or not math.isclose(sum(ratios), 1, abs_tol=1e-6):
        raise ValueError(f"ratios {', '.join(map(str, ratios))}: expected three shares for "
                         f"{', '.join(SPLITS)} that sum to 1, such as 0.7, 0.15, 0.15")
    return {split: ratio for split, ratio in zip(SPLITS, ratios, strict=True) if ratio > 0}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _tally(kinds: Mapping[str, _Kind], chosen: Mapping[str, str]) -> _Cells:
    held: _Cells = Counter()
    for group, split in chosen.items():
        for label, n in kinds[group]:
            held[label, split] += n
    return held


def _excess(held: _Cells, totals: Mapping[str, int], shares: Mapping[str, float]) -> float:
    """Sum over classes and splits what a share is off beyond the tolerance."""
    return sum(max(0.0, abs(held[label, split] / n - share) - TOLERANCE)
               for label, n in totals.items() for split, share in shares.items())


def _least_excess(n_films: int, shares: Mapping[str, float]) -> float:
    """Return what no division of so many films of one class can undercut: their number is whole."""
    ways = itertools.product(*((math.floor(n_films * share), math.floor(n_films * share) + 1)
                               for share in shares.values()))
    return min((_excess(Counter({("", split): n for split, n in zip(shares, way, strict=True)}),
                        {"": n_films}, shares) for way in ways if sum(way) == n_films), default=0.0)


def _rebalance(order: Sequence[str], kinds: Mapping[str, _Kind], chosen: Mapping[str, str],
               totals: Mapping[str, int], shares: Mapping[str, float], radius: int) -> dict[str, str]:
    """Minimise the excess: how many groups of each kind go to each split, at most `radius` from `chosen`."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, hstack, kron

    held, now = _tally(kinds, chosen), Counter((kinds[group], split) for group, split in chosen.items())
    free = sorted(set(kinds.values()))
    exact = len(free) <= _MAX_KINDS
    if not exact:
        off = {label for label, n in totals.items()
               if _excess(held, {label: n}, shares) > _least_excess(n, shares) + 1e-9}
        free = [kind for kind in free if any(label in off for label, _ in kind)][:_MAX_KINDS // 4]
    classes = sorted({label for kind in free for label, _ in kind})
    cells = [(label, split) for label in classes for split in shares]
    start = np.array([now[kind, split] for kind in free for split in shares], dtype=float)
    films = csr_array([[dict(kind).get(label, 0) for kind in free] for label in classes])
    number = kron(eye_array(len(free)), np.ones((1, len(shares))))  # of each kind, from numbers by split
    inside = kron(films, eye_array(len(shares)))  # films in each cell
    excess, no_excess = eye_array(len(cells)), csr_array((len(free), len(cells)))
    fixed = np.array([held[cell] for cell in cells]) - inside @ start
    wanted = np.array([shares[split] * totals[label] for label, split in cells]) - fixed
    slack = np.array([TOLERANCE * totals[label] + 1e-7 for label, _ in cells])
    cost = [max(totals.values()) / totals[label] for label, _ in cells]
    solution = milp(
        np.concatenate([np.zeros(len(start)), cost]),
        integrality=np.concatenate([np.ones(len(start)), np.zeros(len(cells))]),
        bounds=Bounds(np.concatenate([np.maximum(0, start - radius), np.zeros(len(cells))]),
                      np.concatenate([start + radius, np.full(len(cells), np.inf)])),
        constraints=[LinearConstraint(hstack([number, no_excess]), number @ start, number @ start),
                     LinearConstraint(hstack([inside, -excess]), -np.inf, wanted + slack),
                     LinearConstraint(hstack([inside, excess]), wanted - slack, np.inf)],
        options={"node_limit": 1000 if exact else 20})
    if solution.x is None:
        return dict(chosen)
    seats = {kind: [split for split, n in zip(shares, numbers, strict=True) for _ in range(round(n))]
             for kind, numbers in zip(free, solution.x[:len(start)].reshape(len(free), -1), strict=True)}
    return {group: seats[kinds[group]].pop() if kinds[group] in seats else chosen[group]
            for group in reversed(order)}


def _tie(films: Sequence[Film], near_duplicates: bool, notes: list[str]) -> list[str]:
    """Name the group of each film: all that patients, equal files and near duplicates hold together."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first: dict[object, int] = {}
    reading = tqdm(films, desc="comparing films", unit="film", leave=False, disable=None)
    of_patient = [(first.setdefault(film.patient, i), i) for i, film in enumerate(films)]
    exact = [(first.setdefault(content_key(film.path), i), i) for i, film in enumerate(reading)]
    notes.append(f"{len(films)} films of {sum(a == b for a, b in of_patient)} patients.")
    n_copies = sum(a != b for a, b in exact)
    near: list[tuple[int, int]] = []
    if near_duplicates:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the films left out are counted in a note
            images, kept = cached_radiographs([film.path for film in films], duplicates.SIDE, "skip")
        numbers = {film.path: i for i, film in enumerate(films)}
        near = [(numbers[kept[pair.first]], numbers[kept[pair.second]])
                for pair in duplicates.find_duplicates(images)]
        if len(kept) < len(films):
            notes.append(f"{len(films) - len(kept)} films cannot be read: compared by their bytes only.")
    links = np.array([*of_patient, *exact, *near])
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(len(films), len(films)))
    n_groups, component = connected_components(graph, directed=False)
    looked = f", pairs of near duplicates ({len(near)})" if near_duplicates else "; near ones not looked for"
    notes.append(f"Kept together: films of a patient, exact copies ({n_copies}){looked}; {n_groups} groups, "
                 f"the largest of {np.bincount(component).max()} films.")
    names: dict[int, str] = {}  # films are sorted, so a group bears the name of its first
    return [names.setdefault(number, film.name) for number, film in zip(component, films, strict=True)]


def _say_what_is_off(labels: Sequence[str], groups: Sequence[str], counts: Mapping[tuple[str, str], int],
                     shares: Mapping[str, float]) -> list[str]:
    """Write a sentence on each class whose share is off by more than the tolerance, or that a split lacks."""
    notes = []
    for label in sort_classes(labels):
        n_films = sum(counts[label, split] for split in shares)
        points = {split: 100 * (counts[label, split] / n_films - shares[split]) for split in shares}
        worst = max(points, key=lambda split: abs(points[split]))
        if abs(points[worst]) > 100 * TOLERANCE + 1e-7:
            n_groups = len({group for group, name in zip(groups, labels, strict=True) if name == label})
            own = Counter({("", split): counts[label, split] for split in shares})
            alone = _excess(own, {"": n_films}, shares) <= _least_excess(n_films, shares) + 1e-9
            why = (f"{n_films} films cannot be divided closer" if alone
                   else f"its {n_films} films are in {n_groups} groups that stay whole")
            notes.append(f"{label}: {points[worst]:+.1f} points in {worst} "
                         f"(more than {100 * TOLERANCE:g}): {why}.")
        lacking = [split for split in shares if not counts[label, split]]
        if lacking:
            notes.append(f"{label}: no film in {' and '.join(lacking)}.")
    return notes


# ------------------------------------------------------------------------------------- names, tables, files

def _is_class_name(name: str) -> bool:
    return bool(name) and name.isprintable() and not (
        _NOT_IN_NAMES & set(name) or name.startswith(".") or canonical_split(name)
        or name.lower() in ("masks", "images"))


def _match_table(table: str | Path, root_dir: str | Path, films: Sequence[Film],
                 left_out: dict[str, list[str]]) -> dict[str, TableRow]:
    """Find the row of each film, by its name; list the rows that are nobody's or contradict each other."""
    beside = Path(os.path.relpath(Path(table).resolve().parent, Path(root_dir).resolve())).as_posix()
    rows: dict[str, TableRow] = {}
    twofold = set()
    for row, found in match_rows(read_table(table), films, beside):
        if len(found) != 1:
            what = "table rows that fit several films" if found else "table rows without their film"
            left_out.setdefault(what, []).append(f"line {row.line} ({row.file})")
        elif rows.setdefault(found[0], row)[2:] != row[2:]:
            twofold.add(found[0])
    left_out["in the table twice and differently"] = sorted(twofold)
    return {name: row for name, row in rows.items() if name not in twofold}


def _existing(films: Sequence[Film], left_out: dict[str, list[str]]) -> list[Film]:
    """Return the films whose file is there, and list the links to nothing."""
    left_out["a link to nothing"] = [film.name for film in films if not film.path.exists()]
    return [film for film in films if film.path.exists()]


def _other_files(root: Path, films: Sequence[Film], table: str | Path | None) -> list[str]:
    """List the visible files outside `masks` that are no films."""
    known = {film.path for film in films} | {root / TABLE}
    others = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".") and name.lower() != "masks"]
        others += [path.relative_to(root).as_posix() for path in (Path(folder, name) for name in files)
                   if not path.name.startswith(".") and path not in known
                   and not (table and path.samefile(table))]
    return sorted(others)


def _names_apart(wanted: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return a path for each film that no other has, on any file system.

    Of each film: its path in the output, what tells it from namesakes, and its source. All namesakes get the
    tag, and where that is not enough a hash of the source, so that the result does not depend on an order.
    """
    films = list(wanted)
    levels = [0] * len(films)

    def named(path: str, tag: str, source: str, level: int) -> str:
        if level == 0:
            return path
        place = PurePosixPath(path)
        tag = tag[:80] if level == 1 else f"{tag[:80]}-{_digest(source)}"
        return str(place.with_name(f"{place.stem}__{tag}{place.suffix}"))

    while True:
        names = [named(*film, level) for film, level in zip(films, levels, strict=True)]
        keys = [unicodedata.normalize("NFC", name).casefold() for name in names]
        often = Counter(keys)
        if len(often) == len(keys):
            return names
        levels = [level + (often[key] > 1) for level, key in zip(levels, keys, strict=True)]


def _count(placed: Iterable[_Placed]) -> dict[tuple[str, str], int]:
    return dict(Counter((film.label, film.split) for film in placed))


def _tidy(left_out: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {reason: names for reason, names in left_out.items() if names}


def _title(what: str, output: str | Path, dry_run: bool) -> str:
    return f"{what} -> {output}" + (" (dry run: nothing was written)" if dry_run else "")


def _copy(source: Path, target: Path) -> None:
    with whole_file(target) as temporary:
        shutil.copyfile(source, temporary)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise OSError(f"{target.name}: no hard link to {source} is possible ({error.strerror}); "
                      "choose the mode copy") from error


def _resize(source: Path, target: Path, img_size: int, fit: str) -> None:
    film = read_radiograph(source, img_size if fit == "squash" else None)
    unit = ((film[0] + 1) / 2).numpy()
    if fit == "crop":
        side = min(unit.shape)
        top, left = ((length - side) // 2 for length in unit.shape)
        unit = unit[top:top + side, left:left + side]
    if fit != "squash":
        scale = img_size / max(unit.shape)
        height, width = (max(1, round(side * scale)) for side in unit.shape)
        unit = np.asarray(Image.fromarray(unit).resize((width, height), Image.Resampling.BILINEAR))
        top, left = (img_size - height) // 2, (img_size - width) // 2
        unit = np.pad(unit, ((top, img_size - height - top), (left, img_size - width - left)))
    with whole_file(target) as temporary:
        Image.fromarray((unit * 255).round().astype(np.uint8)).save(temporary, "PNG")


# ------------------------------------------------------------------------ whole or not at all, and resumable

_PLAN, _NEW, _OLD = "plan.json", "new", "old"  # what `.NAME.partial` holds


def _check_places(root_dir: str | Path | None, output: str | Path, replace: bool) -> Path:
    """Refuse what cannot be written, before any work; return the resolved target."""
    target = Path(output).expanduser().resolve()
    if root_dir is not None:
        source = Path(root_dir).resolve()
        if source == target or source in target.parents or target in source.parents:
            raise ValueError(f"{output}: lies in the input {root_dir}, or the input in it; "
                             "expected a folder apart, so that the input stays as it is")
    if not _staging(target).exists():  # else `_build` sees how far it came
        _check_target(target, replace)
    return target


def _staging(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _check_target(target: Path, replace: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: a file; expected a folder to make")
    if not replace and any(files for _, _, files in os.walk(target)):
        raise FileExistsError(f"{target}: holds files; expected a new or empty folder: choose another, "
                              "or replace this one with --replace")


def _plan(command: str, placed: Sequence[_Placed]) -> dict[str, object]:
    """Describe the result so fully that equal plans give equal bytes."""
    rows = []
    for film in placed:
        state = film.path.stat()
        rows.append([*film[:5], str(film.path.resolve()), state.st_size, state.st_mtime_ns])
    return {"command": command, "films": sorted(rows)}


def _build(target: Path, plan: Mapping[str, object], fill: Callable[[Path], object], replace: bool) -> None:
    """Fill a folder beside the target by a plan, or go on filling it, and put it in place."""
    staging, text = _staging(target), json.dumps(plan)
    new, old = staging / _NEW, staging / _OLD
    if staging.is_dir() and not any(staging.iterdir()):  # killed before its first or after its last file
        staging.rmdir()
    noted = (staging / _PLAN).read_text(encoding="utf-8") if (staging / _PLAN).is_file() else None
    if noted == text and not new.exists() and target.exists():  # killed after the last rename
        return _discard(staging)
    if old.exists() and not target.exists():  # killed between the two last renames
        os.replace(old, target)
    _check_target(target, replace)
    if staging.exists() and noted != text:
        foreign = [path.name for path in staging.iterdir() if path.name != _NEW or any(path.iterdir())]
        if noted is None and not all(name.startswith(".plan-") for name in foreign):
            raise FileExistsError(f"{staging}: in the way, and not made by this command; remove or rename it")
        _write_text(staging / _PLAN, "{}")  # so that nobody takes what is left for a finished run
        _discard(staging)
    new.mkdir(parents=True, exist_ok=True)
    _write_text(staging / _PLAN, text)  # after `new`: a plan without it means that it has been renamed
    try:
        fill(new)
    except ValueError:
        _discard(staging)
        raise
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    _discard(staging)


def _write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(text.encode())


def _discard(staging: Path) -> None:
    """Remove the folder, the plan last: without it nobody knows whose it is."""
    for path in staging.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _PLAN:
            path.unlink()
    shutil.rmtree(staging)


def _make_folders(new: Path, counts: Iterable[tuple[str, str]]) -> None:
    for label, split in counts:
        (new / split / label).mkdir(parents=True, exist_ok=True)


def _fill(placed: Sequence[_Placed], make: Callable[[Path, Path], None], unreadable: list[tuple[str, str]],
          new: Path) -> None:
    """Make what is missing of the films and their table; collect those that cannot be read."""
    wanted = {film.file: film for film in placed}
    for folder, _, files in os.walk(new):  # a kill leaves temporary files
        for path in (Path(folder, name) for name in files):
            if path.relative_to(new).as_posix() not in wanted:
                path.unlink()
    for parent in {(new / name).parent for name in wanted}:
        parent.mkdir(parents=True, exist_ok=True)

    def made(film: _Placed) -> UnreadableRadiographError | None:
        try:
            if not (new / film.file).exists():
                make(film.path, new / film.file)
        except UnreadableRadiographError as error:
            return error
        return None

    pool = ThreadPoolExecutor()
    try:
        with warnings.catch_warnings():  # reading in threads would leave the filters of warnings changed
            working = tqdm(pool.map(made, placed), "writing films", len(placed), unit="film", disable=None)
            for film, error in zip(placed, working, strict=True):
                if error:
                    unreadable.append((film.file, f"{film.source}: {error.reason}"))
    finally:
        pool.shutdown(cancel_futures=True)
    bad = {name for name, _ in unreadable}
    if len(bad) == len(placed):
        raise ValueError(f"none of {len(placed)} films can be read; the first: {unreadable[0][1]}")
    _write_table(new, [film for film in placed if film.file not in bad])


def _write_table(new: Path, placed: Sequence[_Placed]) -> None:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["file", "class", "patient", "split", "source"])
    writer.writerows(sorted(film[:5] for film in placed))
    _write_text(new / TABLE, lines.getvalue())
