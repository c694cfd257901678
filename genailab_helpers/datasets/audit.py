"""Distrust a folder of films: one call looks for what would make a result wrong, or tell who a patient is.

Each check is one function below; `CHECKS` names what they can find, how grave it is and what to do about it.
Thresholds were chosen on six public sets of chests, knees and spines and on phantoms, then looked at by eye.
"""

import itertools
import json
import os
import re
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageMode
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from genailab_helpers.datasets import shortcuts
from genailab_helpers.datasets.catalog import FINDINGS, GRADES, canonical_class, canonical_split, sort_classes
from genailab_helpers.datasets.duplicates import SIDE, find_duplicates
from genailab_helpers.datasets.folders import (
    TABLE,
    Film,
    TableRow,
    cached_radiographs,
    content_key,
    index_films,
    match_rows,
    read_table,
)
from genailab_helpers.datasets.privacy import dicom_header, find_traces, identifies, person_columns
from genailab_helpers.features import lite0_features, local_contrast, probe_features
from genailab_helpers.radiographs import (
    FileProperties,
    UnreadableRadiographError,
    inspect_radiograph,
    read_radiograph,
)
from genailab_helpers.statistics import grouped_folds

SEVERITIES = ("error", "warning", "note")

CHECKS = {  # name: severity, what to do
    "missing class": ("error", "add films of it, or train without it and say so"),
    "empty class": ("error", "fill the folder or delete it"),
    "extra class": ("warning", "rename it to one of the expected classes, or move it out"),
    "outside classes": ("error", "move them into a class folder, or out of the data set"),
    "unreadable": ("error", "get these files again, or move them out"),
    "not an image": ("error", "move them out: whatever their names say, they hold no picture"),
    "other files": ("warning", "move them out of the class folders"),
    "mixed channels": ("warning", "bring all films to one form: `genailab data preprocess`"),
    "mixed depth": ("warning", "bring all films to one form: `genailab data preprocess`; "
                               "a 1-bit image is a mask, move it out"),
    "odd size": ("warning", "look whether these are films, then bring all to one size"),
    "odd aspect": ("warning", "look whether these are whole films; letterbox rather than squash them"),
    "blank": ("error", "move them out: there is nothing to see"),
    "low contrast": ("warning", "look at them: export them again with the right window, or leave them out"),
    "inverted": ("warning", "look at them: if air is white, invert them"),
    "mixed views": ("warning", "look at them: keep one view (frontal or lateral) in one data set"),
    "exact duplicate": ("warning", "keep one copy of each"),
    "near duplicate": ("warning", "look at the pairs; if they are one picture, keep the better one"),
    "duplicate across splits": ("error", "split again: `genailab data split` keeps copies together"),
    "near duplicate across splits": ("error", "look at the pairs, then split again: `genailab data split` "
                                              "keeps copies together"),
    "same name in two splits": ("error", "keep one of them, or split again"),
    "patient in two splits": ("error", "split again by patient: `genailab data split`"),
    "conflicting labels": ("error", "find out which label is right; leave the picture out until you know"),
    "conflicting labels by sight": ("warning", "look at the pairs; if they are one picture, find out which "
                                               "label is right"),
    "likely mislabelled": ("warning", "show them to somebody who reads films; change no label unseen"),
    "absent files": ("error", "get the films, or take their rows out of the table"),
    "not in table": ("warning", "add rows for them, or move them out"),
    "personal data": ("error", "remove the field, column or name before anybody else gets the files"),
    "patient numbers": ("warning", "make sure that they are pseudonyms and no hospital numbers"),
    "free text": ("warning", "read it, and remove it if it tells who somebody is"),
    "shortcut": ("warning", "a model may learn this instead of the disease: crop, mask, or say so"),
    "no label signal": ("warning", "distrust the labels: no model can learn them from these films"),
    "system files": ("note", "they are left out; they can be deleted"),
    "patients": ("note", "check that one patient has one name"),
    "not checked": ("note", "keep in mind what nobody looked at"),
}


_ENOUGH = 100  # patients; with fewer, or a p this side of 0.05, a faint signal may be there


class Finding(NamedTuple):
    """What one check has to say.

    Attributes
    ----------
    severity : str
        "error" (makes results wrong, or tells who somebody is), "warning" (look at it) or "note".
    check : str
        A name in `CHECKS`.
    message : str
        One sentence.
    files : tuple of str
        The films it is about, relative to the root of the data set.
    """

    severity: str
    check: str
    message: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditReport:
    """What `audit_folder` found.

    Attributes
    ----------
    root_dir : str
        The data set as it was named by the caller.
    counts : dict of dict
        Films by split ("all" where there are no splits) and class.
    findings : list of Finding
        Errors first, then warnings, then notes.
    """

    root_dir: str
    counts: dict[str, dict[str, int]]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_json(self) -> str:
        """Return the whole report as JSON, files included."""
        findings = [{**finding._asdict(), "what_to_do": CHECKS[finding.check][1]}
                    for finding in self.findings]
        return json.dumps({"root_dir": self.root_dir, "ok": self.ok, "counts": self.counts,
                           "findings": findings}, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        """Return the report as text: counts, then errors, warnings and notes with up to 5 files each."""
        classes = sort_classes(chain.from_iterable(self.counts.values()))
        rows = [["", *(name or "(no class)" for name in classes), "films"]]
        for split, by_class in self.counts.items():
            rows.append([split, *(str(by_class.get(name, 0)) for name in classes),
                         str(sum(by_class.values()))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"Audit of {self.root_dir}", ""]
        lines += ["  ".join(map(str.rjust, row, widths)) for row in rows]
        for severity, heading in zip(SEVERITIES, (
                "make results wrong, or tell who somebody is", "look at these", "good to know"), strict=True):
            found = [finding for finding in self.findings if finding.severity == severity]
            lines += ["", f"{len(found)} {severity}{'s' * (len(found) != 1)}" + f" ({heading})" * bool(found)]
            for finding in found:
                lines.append(textwrap.fill(f"{finding.check}: {finding.message}", 100, initial_indent="  ",
                                           subsequent_indent="    "))
                lines += [f"      {name}" for name in finding.files[:5]]
                if len(finding.files) > 5:
                    lines.append(f"      ... and {len(finding.files) - 5} more")
                lines.append(textwrap.fill(f"What to do: {CHECKS[finding.check][1]}.", 100,
                                           initial_indent="    ", subsequent_indent="    "))
        return "\n".join(lines)


def audit_folder(root_dir: str | Path, table: str | Path | None = None, classes: Sequence[str] | None = None,
                 patient_pattern: str | None = None) -> AuditReport:
    """Look for everything in a data set that would make a result wrong, or tell who a patient is.

    Parameters
    ----------
    root_dir : str or Path
        A folder of class folders, or of `train/`, `val/`, `test/` with class folders, or one class folder.
        Nothing in it is changed.
    table : str or Path, optional
        CSV that names the films, with their class, patient and split where it has such columns. By default
        `films.csv` in the root, if there is one.
    classes : sequence of str, optional
        Classes expected. By default those that the folder shows, and all five grades once three are there.
    patient_pattern : str, optional
        Tells the patient from a file name, as in `folders.index_films`.

    Returns
    -------
    AuditReport
        Print it, or ask for `ok`, `findings`, `to_json()`.

    Raises
    ------
    ValueError
        If the folder holds no radiographs, the table cannot be read, or the pattern does not match.
    """
    data = _DataSet(Path(root_dir), table, classes, patient_pattern)
    findings = list(chain.from_iterable(check(data) for check in _ALL_CHECKS))
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for film in data.films:
        counts[film.split or "all"][film.label] += 1
    return AuditReport(str(root_dir), {split: dict(counts[split]) for split in ("train", "val", "test", "all")
                                       if split in counts}, findings)


class _DataSet:
    """What the checks look at; each thing is worked out once, when the first check asks for it."""

    def __init__(self, root: Path, table: str | Path | None, classes: Sequence[str] | None,
                 patient_pattern: str | None) -> None:
        films = index_films(root, patient_pattern)
        self.root = root
        self.classes = None if classes is None else [canonical_class(name) for name in classes]
        self.table = Path(table) if table else root / TABLE if (root / TABLE).is_file() else None
        self.rows = read_table(self.table) if self.table else []
        beside = Path(os.path.relpath(self.table.parent, root)).as_posix() if self.table else ""
        self.matches = match_rows(self.rows, films, beside)
        self.row_of: dict[str, TableRow] = {}
        for row, names in self.matches:
            for name in names:
                self.row_of.setdefault(name, row)
        self.patients_told = "by the pattern" if patient_pattern else ""
        if not patient_pattern and any(row.patient for row in self.row_of.values()):
            self.patients_told = "by the table"
        self.films = []
        for film in films:
            row = self.row_of.get(film.name, TableRow(0, "", "", "", ""))
            patient = film.patient if patient_pattern else row.patient or film.patient
            self.films.append(film._replace(patient=patient, split=film.split or row.split))

    @cached_property
    def headers(self) -> dict[Film, FileProperties]:
        """Properties of the files whose header can be read."""
        found = {}
        for film in self.films:
            try:
                found[film] = inspect_radiograph(film.path)
            except UnreadableRadiographError:
                continue
        return found

    @cached_property
    def seen(self) -> tuple[list[Film], Tensor]:
        """The films that can be read, and their thumbnails."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the check "unreadable" names what is left out
                images, kept = cached_radiographs([film.path for film in self.films], SIDE, "skip")
        except ValueError:
            return [], torch.empty(0, 1, SIDE, SIDE)
        readable = set(kept)
        return [film for film in self.films if film.path in readable], images

    @cached_property
    def shapes(self) -> Tensor:
        """Thumbnails of 16 x 16 pixels without brightness and contrast: (N, 256), rows of length 1 or 0."""
        return _standardised(F.interpolate(self.seen[1], (16, 16), mode="bilinear", antialias=True))

    @cached_property
    def likeness(self) -> Tensor:
        """(N,) correlation of each film with what most films have in common, in [-1, 1].

        The first principal component, which inverted films do not weaken, unlike the mean.
        """
        left, scale, _ = torch.linalg.svd(self.shapes, full_matrices=False)
        first = left[:, 0] * scale[0]
        return first * (1 if first.median() >= 0 else -1)


def _standardised(images: Tensor) -> Tensor:
    rows = images.flatten(1)
    return F.normalize(rows - rows.mean(1, keepdim=True), dim=1)


def _find(check: str, message: str, found: Iterable[Film | str] = ()) -> Finding:
    names = tuple(film if isinstance(film, str) else film.name for film in found)
    return Finding(CHECKS[check][0], check, message, names)


def _chosen(films: list[Film], chosen: Iterable[bool]) -> list[Film]:
    return [film for film, this in zip(films, chosen, strict=True) if this]


def _by_class(films: list[Film], chosen: Iterable[bool]) -> str:
    """Return "12 in COVID, 1 in Normal": what befalls one class only is a shortcut."""
    counts = Counter(film.label or "no class" for film in _chosen(films, chosen))
    return ", ".join(f"{counts[label]} in {label}" for label in sort_classes(counts))


def _count(number: int, thing: str = "film") -> str:
    """Return "1 film", "2 films"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------- folders, files and tables

def _class_folders(data: _DataSet) -> Iterator[Finding]:
    held = {(film.split, film.label) for film in data.films}
    tops = {path: canonical_split(path.name) for path in sorted(data.root.iterdir()) if path.is_dir()}
    bases = [(path, split) for path, split in tops.items() if split] or [(data.root, "")]
    empty = []
    for base, split in bases:
        for folder in sorted(path for path in base.iterdir() if path.is_dir()):
            name = folder.relative_to(data.root).as_posix()
            if (not folder.name.startswith(".") and folder.name.lower() not in ("masks", "images")
                    and not any(film.name.startswith(f"{name}/") for film in data.films)):
                if folder.resolve() in (data.root.resolve(), *data.root.resolve().parents):
                    continue  # a link back up
                empty.append((split, canonical_class(folder.name), name))
    if empty:
        yield _find("empty class", f"{_count(len(empty), 'class folder')} without a film.",
                    [name for _, _, name in empty])
    labels = {label for _, label in held if label}
    known = set(data.classes or {*GRADES, *FINDINGS})
    strange = labels - known if labels & known else set()
    if strange:
        yield _find("extra class", f"Among the expected classes stand others: "
                                   f"{', '.join(sort_classes(strange))}.",
                    [film for film in data.films if film.label in strange])
    expected = set(data.classes or labels - strange | {label for _, label, _ in empty})
    if data.classes is None and expected <= set(GRADES) and (
            len(expected) > 2 or len(expected) <= max(map(GRADES.index, expected), default=-1)):
        expected = set(GRADES)  # a binary task may be called 0 and 1
    absent = [(split, label) for split in sorted({split for _, split in bases} | {split for split, _ in held})
              for label in sort_classes(expected)
              if (split, label) not in held and not any(gap[:2] == (split, label) for gap in empty)]
    if absent:
        named = ", ".join(f"{split}/{label}".lstrip("/") for split, label in absent)
        yield _find("missing class", f"No film of {named}.")
    if loose := [film for film in data.films if not film.label]:
        yield _find("outside classes", f"{_count(len(loose))} beside the class folders.", loose)


def _files(data: _DataSet) -> Iterator[Finding]:
    read = set(data.seen[0])
    broken: list[tuple[Film, str]] = []
    strange: list[tuple[Film, str]] = []
    for film in data.films:
        if film not in read:
            try:
                read_radiograph(film.path, SIDE)
            except UnreadableRadiographError as error:
                (strange if error.reason.startswith("neither") else broken).append((film, error.reason))
    if broken:
        kinds = Counter(re.split("[(;:]", reason)[0].strip() for _, reason in broken)
        yield _find("unreadable", f"{_count(len(broken), 'file')} cannot be read: "
                    f"{', '.join(f'{kind} ({number})' for kind, number in kinds.most_common(4))}.",
                    [film for film, _ in broken])
    films, hidden = {film.path for film in data.films}, []
    others = []
    if strange:
        yield _find("not an image", f"{_count(len(strange), 'file')} named like a picture, with none inside.",
                    [film for film, _ in strange])
    for folder, folders, names in os.walk(data.root):
        folders[:] = sorted(name for name in folders if name.lower() != "masks" and not name.startswith("."))
        for path in (Path(folder, name) for name in sorted(names)):
            name = path.relative_to(data.root).as_posix()
            if path.name.startswith(".") or path.name.lower() in ("thumbs.db", "desktop.ini"):
                hidden.append(name)
            elif path not in films and path.parent != data.root and not canonical_split(path.parent.name):
                others.append(name)
    if others:
        yield _find("other files", f"{_count(len(others), 'file')} of another kind among the films.", others)
    if hidden:
        yield _find("system files", f"{_count(len(hidden), 'file')} of the operating system.", hidden)


def _table(data: _DataSet) -> Iterator[Finding]:
    if not data.table:
        return
    if absent := [row.file for row, names in data.matches if not names]:
        yield _find("absent files", f"{data.table.name} names {_count(len(absent))} that the folder does not "
                                    f"hold, in {len(data.rows):,} rows.", absent)
    if unnamed := [film for film in data.films if film.name not in data.row_of]:
        yield _find("not in table", f"{_count(len(unnamed))} have no row in {data.table.name}.", unnamed)
    other = [film for film in data.films if (row := data.row_of.get(film.name))
             and row.label and film.label and row.label != film.label]
    if other:
        yield _find("conflicting labels", f"{_count(len(other))} lie in another class folder than "
                                          f"{data.table.name} says.", other)
    said: dict[str, set[str]] = defaultdict(set)
    for row in data.rows:
        said[row.file].add(row.label)
    if twice := sorted(name for name, labels in said.items() if len(labels) > 1):
        yield _find("conflicting labels", f"{data.table.name} gives {_count(len(twice))} two classes.", twice)
    moved = [film for film in data.films if (row := data.row_of.get(film.name))
             and row.split and film.split != row.split]
    if moved:
        yield _find("duplicate across splits", f"{_count(len(moved))} lie in another split than "
                                               f"{data.table.name} says.", moved)


# ---------------------------------------------------------------- headers

def _channels(header: FileProperties) -> int:
    return 1 if header.format == "DICOM" else len(ImageMode.getmode(header.mode).bands)


def _bits(header: FileProperties) -> int:
    if header.format == "DICOM":
        return int(header.mode.split()[-1])
    return {"1": 1, "I": 16, "F": 16}.get(header.mode.split(";")[0], 8)


def _mixed_forms(data: _DataSet) -> Iterator[Finding]:
    for check, measure, unit in (("mixed channels", _channels, "channel"), ("mixed depth", _bits, "bit")):
        rare, told = [], []
        for label in sort_classes({film.label for film in data.headers}):
            values = {film: measure(header) for film, header in data.headers.items() if film.label == label}
            kinds = Counter(values.values()).most_common()
            if len(kinds) > 1:
                rare += [film for film, value in values.items() if value != kinds[0][0]]
                told.append(f"{label or 'no class'} "
                            + " and ".join(f"{n} of {_count(kind, unit)}" for kind, n in kinds))
        if rare:
            yield _find(check, f"Films of one class differ in {unit}s: {'; '.join(told)}.", rare)


def _far(values: np.ndarray, least: float) -> np.ndarray:
    """Tell which logarithms lie far from the rest: robustly, and never for less than `least`.

    Where nine of ten films agree within 2 %, a tenth more is odd.
    """
    distance = np.abs(values - np.median(values))
    if (distance < 0.02).mean() >= 0.9:
        return distance > np.log(1.1)
    return distance > max(6 * 1.4826 * float(np.median(distance)), least)


def _odd_shapes(data: _DataSet) -> Iterator[Finding]:
    films = data.seen[0]
    if not films:
        return
    size = np.array([(data.headers[film].width, data.headers[film].height) for film in films], dtype=float)
    width, height = np.median(size, axis=0)
    big = _far(np.log(size.prod(1)) / 2, np.log(3)) | (size.min(1) < 48)
    if big.any():
        yield _find("odd size", f"{_count(big.sum())} far larger or smaller than the rest "
                    f"(median {width:.0f} x {height:.0f} px), or below 48 px; {_by_class(films, big)}.",
                    _chosen(films, big))
    ratio = size[:, 0] / size[:, 1]
    if (odd := _far(np.log(ratio), np.log(1.8))).any():
        yield _find("odd aspect", f"{_count(odd.sum())} far wider or taller than the rest "
                    f"(width / height {ratio[odd].min():.2g} to {ratio[odd].max():.2g}, "
                    f"usual {np.median(ratio):.2g}); {_by_class(films, odd)}.", _chosen(films, odd))


# ---------------------------------------------------------------- pixels

def _exposure(data: _DataSet) -> Iterator[Finding]:
    films, images = data.seen
    if not films:
        return
    low, high = torch.quantile(images.flatten(1), torch.tensor([0.02, 0.98]), dim=1)
    width = (high - low).double().numpy() / 2
    blank = (width < 0.01) & (images.flatten(1).std(1) < 0.02).numpy()
    if blank.any():
        yield _find("blank", f"{_count(blank.sum())} of one single grey.",
                    _chosen(films, blank))
    if blank.all():
        return
    logs = np.log(width.clip(1e-3))
    centre = np.median(logs[~blank])
    spread = 1.4826 * np.median(np.abs(logs[~blank] - centre))
    least = max(0.12, min(np.exp(centre - 6 * spread), 0.4 * np.exp(centre)))  # share of the grey scale
    if (flat := (width < least) & ~blank).any():
        yield _find("low contrast", f"{_count(flat.sum())} with less than {least:.0%} of the grey scale "
                    f"(usual: {np.exp(centre):.0%}).",
                    _chosen(films, flat))


def _inverted(data: _DataSet) -> Iterator[Finding]:
    if data.seen[0] and (films := _chosen(data.seen[0], data.likeness < -0.4)):
        yield _find("inverted", f"{_count(len(films))} more like the negative of the others than like them.",
                    films)


def _symmetry(images: Tensor) -> Tensor:
    """(N,) best correlation of each film with its mirror image, over shifts of up to a fifth of its width."""
    small = F.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    strips = [small[..., max(0, d):32 + min(0, d)] for d in range(-6, 7)]
    return torch.stack([(_standardised(s) * _standardised(s.flip(-1))).sum(1) for s in strips]).amax(0)


def _mixed_views(data: _DataSet) -> Iterator[Finding]:
    films, images = data.seen
    if not films:
        return
    lone = (_symmetry(images) < 0.4) & (data.likeness.abs() < 0.4) & (data.shapes.norm(dim=1) > 0)
    if odd := _chosen(films, lone):
        yield _find("mixed views", f"{_count(len(odd))} neither symmetric nor like the others: lateral, "
                                   "turned or badly framed?", odd)
    if group := _chosen(films, _second_group(lite0_features(local_contrast(images), side=SIDE))):
        yield _find("mixed views", f"{_count(len(group))} form a group clearly apart: lateral films, or "
                                   "another part of the body?", group)
    lateral = [film for film in data.films if _says_lateral(film.path)]
    if lateral and len(lateral) < len(data.films):
        yield _find("mixed views", f"{_count(len(lateral))} called lateral by name or header, beside "
                                   f"{len(data.films) - len(lateral):,} others.", lateral)


def _second_group(features: np.ndarray) -> np.ndarray:
    """Tell which films form a second group far from the first: (N,) bool, all False where there is none.

    k-means in the 8 main axes, from starts that find small groups too; far is 5 spreads within the groups.
    Fourteen sets of one view, drawn and real, reached 3.9; mixed views of drawn spines 6.1 and more.
    """
    found, apart = np.zeros(len(features), dtype=bool), 5.0
    if len(features) < 40 or not np.ptp(features, axis=0).any():
        return found
    axes = PCA(8, random_state=0).fit_transform(np.sqrt(features))
    for axis, share, sign in itertools.product(range(6), (0.5, 0.8, 0.95, 0.99), (-1, 1)):
        ahead = sign * axes[:, axis] > np.quantile(sign * axes[:, axis], share)
        if not ahead.any():  # the films furthest out are equal
            continue
        start = np.stack([axes[~ahead].mean(0), axes[ahead].mean(0)])
        group = KMeans(2, init=start, n_init=1).fit_predict(axes) == 1
        if min(group.sum(), (~group).sum()) < 3:
            continue
        line = axes[group].mean(0) - axes[~group].mean(0)
        length = np.linalg.norm(line)
        place = axes @ line / length
        spread = np.sqrt(group.mean() * place[group].var() + (~group).mean() * place[~group].var())
        if length / spread > apart:
            found, apart = group if group.mean() <= 0.5 else ~group, length / spread
    return found


def _says_lateral(path: Path) -> bool:
    if re.search(r"(?<![a-z])lat(eral)?(?![a-z])", path.stem.lower()):
        return True
    return str(dicom_header(path).get("ViewPosition", "")).upper() in ("LL", "RL", "LLO", "RLO", "LATERAL")


# ---------------------------------------------------------------- copies, patients, labels

def _duplicates(data: _DataSet) -> Iterator[Finding]:
    films, images = data.seen
    key = {film: content_key(film.path) for film in films}
    same: dict[bytes, list[Film]] = defaultdict(list)
    for film, content in key.items():
        same[content].append(film)
    pairs = [(films[pair.first], films[pair.second]) for pair in find_duplicates(images)] if films else []
    near = [pair for pair in pairs if key[pair[0]] != key[pair[1]]]
    copies = [group for group in same.values() if len(group) > 1]

    def split(group: Iterable[Film]) -> bool:
        return len({film.split for film in group}) > 1

    def clash(group: Iterable[Film]) -> bool:
        return len({film.label for film in group if film.label}) > 1

    for check, groups, what in (
            ("conflicting labels", [g for g in copies if clash(g)], "in two classes, byte for byte the same"),
            ("conflicting labels by sight", [p for p in near if clash(p)],
             "in two classes, the same by sight"),
            ("duplicate across splits", [g for g in copies if split(g)],
             "in two splits, byte for byte the same"),
            ("near duplicate across splits", [p for p in near if split(p)],
             "in two splits, the same by sight"),
            ("exact duplicate", [g for g in copies if not split(g) and not clash(g)],
             "several times, byte for byte the same"),
            ("near duplicate", [p for p in near if not split(p) and not clash(p)],
             "of one class, the same by sight")):
        if groups:
            thing = "pair" if "sight" in what else "picture"
            yield _find(check, f"{_count(len(groups), thing)} {what}.",
                        dict.fromkeys(film for group in groups for film in group))


def _same_names(data: _DataSet) -> Iterator[Finding]:
    films, images = data.seen
    if not films:
        return
    small = _standardised(F.interpolate(images, (32, 32), mode="bilinear", antialias=True))
    named: dict[str, list[int]] = defaultdict(list)
    for row, film in enumerate(films):
        named[film.path.stem].append(row)
    found = [film for rows in named.values() if len({films[row].split for row in rows}) > 1
             and float((small[rows] @ small[rows].T).fill_diagonal_(-1).max()) > 0.99
             for film in (films[row] for row in rows)]
    if found:
        number = _count(len({film.path.stem for film in found}), "picture")
        yield _find("same name in two splits", f"{number} under one name in several splits.", found)


def _patients(data: _DataSet) -> Iterator[Finding]:
    told = [film for film in data.films if film.told_patient]
    splits: dict[str, set[str]] = defaultdict(set)
    for film in told:
        splits[film.patient].add(film.split)
    if torn := {patient for patient, held in splits.items() if len(held) > 1}:
        yield _find("patient in two splits", f"{_count(len(torn), 'patient')} of {len(splits):,} with films "
                    "in several splits.", [film for film in told if film.patient in torn])
    if told:
        how = data.patients_told or "by the table or by known file names"
        alone = len(data.films) - len(told)
        rest = f"; {_count(alone)} count as a patient each" if alone else ""
        yield _find("patients", f"{_count(len(splits), 'patient')} told {how}{rest}.")
    else:
        yield _find("patients", "Nothing tells the patients, so each film counts as one.")


def _labels(data: _DataSet) -> Iterator[Finding]:
    """Whether labels can be learned at all, from what they should not be, and which ones look wrong."""
    if len({film.label for film in data.films} - {""}) < 2:
        yield _find("not checked", "Shortcuts, label signal and wrong labels: there is only one class.")
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = shortcuts.audit_shortcuts(data.root)
            signal = shortcuts.label_signal(data.root)
    except ValueError as error:
        yield _find("not checked", f"Shortcuts and label signal ({error}).")
        return
    if report.flagged:
        yield _find("shortcut", f"The class can be told without looking at the anatomy, from: "
                                f"{', '.join(report.flagged)}.")
    if not signal.signal:
        silent = _find("no label signal", "The labels cannot be told from the films better than by chance "
                                          f"(p = {signal.p:.2g}).")
        patients = len({film.patient for film in data.films if film.label})
        doubtful = f"{silent.message} With {_count(patients, 'patient')} a faint signal may be missed."
        clear = patients >= _ENOUGH and signal.p > 0.05
        yield silent if clear else silent._replace(severity="note", message=doubtful)


def _mislabelled(data: _DataSet) -> Iterator[Finding]:
    films, images = data.seen
    counts = Counter(film.label for film in films if film.label)
    rows = [row for row, film in enumerate(films) if counts[film.label] >= 15]
    films, images = [films[row] for row in rows], images[rows]
    names, label = np.unique([film.label for film in films], return_inverse=True)
    if len(names) < 2 or len({film.patient for film in films}) < 15:
        yield _find("not checked", "Wrong labels: fewer than two classes have 15 films.")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer patients than folds
        margin, skill = _margins(lite0_features(images, side=64), images, label,
                                 np.array([film.patient for film in films]))
    if skill < 0.85:
        yield _find("not checked", f"Wrong labels: a simple classifier reaches only {skill:.0%} (balanced), "
                                   "too little to doubt a label.")
    elif wrong := [films[row] for row in np.argsort(margin) if margin[row] < -0.6]:
        yield _find("likely mislabelled", f"{_count(len(wrong))} of another class to a simple classifier, "
                    f"which is right on {skill:.0%} of all (balanced); the clearest first.", wrong)


def _margins(features: np.ndarray, images: Tensor, label: np.ndarray,
             patient: np.ndarray) -> tuple[np.ndarray, float]:
    """Score of a film's own class above the best other one, for films never trained on, and the accuracy.

    Kernel ridge on Lite0 features and the probe, classes weighted equally, mean of three times five folds.
    """
    probe = probe_features(images)
    probe = (probe - probe.mean(1, keepdims=True)) / (probe.std(1, keepdims=True) + 1e-6)
    kinds = [(x - x.mean(0)) / (x.std(0) + 1e-6) / np.sqrt(x.shape[1])
             for x in (features, probe)]
    both = np.hstack(kinds)
    squares = (both**2).sum(1)
    distance = (squares[:, None] + squares - 2 * both @ both.T).clip(0)
    kernel = np.exp(-distance / np.median(distance))
    truth = np.eye(label.max() + 1)[label]
    weight = len(label) / (truth.shape[1] * truth.sum(0)[label])
    score = np.zeros_like(truth)
    for seed in range(3):
        for train, test in grouped_folds(patient, 5, seed, label):
            centre = np.average(truth[train], axis=0, weights=weight[train])
            ridge = np.diag(0.001 * len(train) / weight[train])
            weights = np.linalg.solve(kernel[np.ix_(train, train)] + ridge, truth[train] - centre)
            score[test] += (kernel[np.ix_(test, train)] @ weights + centre) / 3
    own = (score * truth).sum(1)
    right = score.argmax(1) == label
    skill = float(np.mean([right[label == number].mean() for number in range(truth.shape[1])]))
    return own - np.where(truth > 0, -np.inf, score).max(1), skill


def _personal_data(data: _DataSet) -> Iterator[Finding]:
    fields: dict[str, list[Film]] = defaultdict(list)
    texts: dict[str, list[Film]] = defaultdict(list)
    numbers = []
    for film in data.films:
        traces = find_traces(film.path)
        for name in traces.personal:
            fields[name].append(film)
        for name in traces.texts:
            texts[name].append(film)
        if traces.numbered:
            numbers.append(film)
    if fields:
        named = dict.fromkeys(chain.from_iterable(fields.values()))
        told = ", ".join(f"{name} ({len(films)})" for name, films in sorted(fields.items()))
        yield _find("personal data", f"{_count(len(named), 'file')} with fields on persons: {told}.", named)
    for name, films in texts.items():
        yield _find("free text", f"{_count(len(films), 'file')} with text in the field {name}.", films)
    if numbers:
        yield _find("patient numbers", f"{_count(len(numbers), 'file')} with the field DICOM PatientID.",
                    numbers)
    if called := [film for film in data.films if identifies(film.name)]:
        yield _find("personal data", f"{_count(len(called), 'file name')} with what seems a person's name, "
                                     "or a date that may be of birth.", called)
    for table in sorted({*data.root.glob("*.csv"), *([data.table] if data.table else [])}):
        if private := person_columns(table):
            yield _find("personal data", f"The table {table.name} has columns about persons: "
                                         f"{', '.join(private)}.")
    yield _find("not checked", "Names burnt into the pixels are not read: look at the films.")


_ALL_CHECKS: tuple[Callable[[_DataSet], Iterator[Finding]], ...] = (
    _class_folders, _files, _table, _duplicates, _same_names, _patients, _personal_data, _mixed_forms,
    _odd_shapes, _exposure, _inverted, _mixed_views, _mislabelled, _labels)
