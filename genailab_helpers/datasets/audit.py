"""Distrust a folder of images: one call looks for what would make a result wrong, or tell who a patient is.
 A check is one function below: `@check(name, severity, what to do)`. It looks at the `Evidence` and returns
pairs: the images that it found something about, and a sentence in which N stands for their number,
BY_CLASS for that of each class. Without images there is no finding. Thresholds were chosen on six public
sets of chests, knees and spines and on phantoms, then looked at by eye.
"""

import itertools
import json
import os
import re
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import ImageMode
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from genailab_helpers.datasets import shortcuts
from genailab_helpers.datasets.duplicates import SIDE, find_duplicates
from genailab_helpers.datasets.folders import read_images
from genailab_helpers.datasets.index import image_hashes, match_table, torn_patients
from genailab_helpers.datasets.names import (
    FINDINGS,
    GRADES,
    SPLITS,
    canonical_class,
    canonical_split,
    sort_classes,
)
from genailab_helpers.datasets.privacy import dicom_header, find_traces, identifies, person_columns
from genailab_helpers.features import lite0_features, local_contrast, probe_features
from genailab_helpers.radiographs import (
    FileProperties,
    UnreadableRadiographError,
    inspect_radiograph,
    read_radiograph,
)

SEVERITIES = {"error": "make results wrong, or tell who somebody is", "warning": "look at these",
              "note": "good to know"}

N, BY_CLASS = "\0n", "\0c"  # in a sentence; no name can hold them
# names of images (or a mask of those that can be read; None: no list), a sentence, "note" if it is no more
Found = list[tuple[Any, str] | tuple[Any, str, str]]
Look = Callable[["Evidence"], Found]


class Check(NamedTuple):
    """How grave what a check finds is, what to do about it, and the function that looks for it."""

    severity: str
    advice: str
    look: Look


CHECKS: dict[str, Check] = {}


def check(name: str, severity: str, advice: str) -> Callable[[Look], Look]:
    """Declare a check; `audit_images` runs all of them."""
    def declare(look: Look) -> Look:
        CHECKS[name] = Check(severity, advice, look)
        return look
    return declare


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
        The images it is about, relative to the root of the data set.
    """

    severity: str
    check: str
    message: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditReport:
    """What `audit_images` found.

    Attributes
    ----------
    root_dir : str
        The data set as it was named by the caller.
    counts : dict of dict
        Images by split ("all" where there are no splits) and class.
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
        findings = [{**finding._asdict(), "what_to_do": CHECKS[finding.check].advice}
                    for finding in self.findings]
        return json.dumps({"root_dir": self.root_dir, "ok": self.ok, "counts": self.counts,
                           "findings": findings}, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        """Return the report as text: counts, then errors, warnings and notes with up to 5 files each."""
        counts = pd.DataFrame(self.counts).T.fillna(0).astype(int)
        counts = counts[sort_classes(counts.columns)].rename(columns={"": "(no class)"})
        lines = [f"Audit of {self.root_dir}", "", counts.assign(images=counts.sum(axis=1)).to_string()]
        for severity, heading in SEVERITIES.items():
            found = [finding for finding in self.findings if finding.severity == severity]
            lines += ["", f"{len(found)} {severity}{'s' * (len(found) != 1)}" + f" ({heading})" * bool(found)]
            for finding in found:
                lines.append(textwrap.fill(f"{finding.check}: {finding.message}", 100, initial_indent="  ",
                                           subsequent_indent="    "))
                lines += [f"      {name}" for name in finding.files[:5]]
                lines += [f"      ... and {len(finding.files) - 5} more"] * (len(finding.files) > 5)
                lines.append(textwrap.fill(f"What to do: {CHECKS[finding.check].advice}.", 100,
                                           initial_indent="    ", subsequent_indent="    "))
        return "\n".join(lines)


def audit_images(images: pd.DataFrame, classes: Sequence[str] | None = None) -> AuditReport:
    """Look for everything in a data set that would make a result wrong, or tell who a patient is.

    Parameters
    ----------
    images : pandas.DataFrame
        From `index.index_images`, whose table (by default `films.csv` in the root) is compared with the
        folder. Nothing in the folder is changed.
    classes : sequence of str, optional
        Classes expected. By default those that the folder shows, and all five grades once three are there.

    Returns
    -------
    AuditReport
        Print it, or ask for `ok`, `findings`, `to_json()`.

    Raises
    ------
    ValueError
        If the table cannot be read.
    """
    data = Evidence(images, None if classes is None else [canonical_class(name) for name in classes])
    findings = []
    for name, (severity, _, look) in CHECKS.items():
        for found, message, *doubt in look(data):
            mask = isinstance(found, np.ndarray) and found.dtype == bool
            names = [str(one) for one in (data.names[found] if mask else () if found is None else found)]
            if names or found is None:
                labels = Counter(data.seen[0]["class"][found].replace("", "no class")) if mask else {}
                by_class = ", ".join(f"{labels[label]} in {label}" for label in sort_classes(labels))
                findings.append(Finding("note" if doubt else severity, name, message.replace(
                    N, _count(len(names))).replace(BY_CLASS, by_class), tuple(names)))
    findings.sort(key=lambda finding: list(SEVERITIES).index(finding.severity))
    counts = {split or "all": images.loc[images["split"] == split, "class"].value_counts().to_dict()
              for split in (*SPLITS, "") if (images["split"] == split).any()}
    return AuditReport(images.attrs["root"], counts, findings)


class Evidence:
    """What the checks look at; each thing is worked out once, when the first check asks for it."""

    def __init__(self, images: pd.DataFrame, classes: list[str] | None) -> None:
        self.images, self.classes, self.root = images, classes, Path(images.attrs["root"])
        self.table = Path(images.attrs["table"]) if images.attrs["table"] else None
        self.rows = match_table(images, self.table) if self.table else pd.DataFrame()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the check "unreadable" names what is left out
                batch, kept = read_images(images, SIDE, "skip")
        except ValueError:
            batch, kept = torch.empty(0, 1, SIDE, SIDE), images[:0]
        self.seen = kept, batch  # the images that can be read, and their thumbnails
        self.names = kept.index.to_numpy(object)
        small = F.interpolate(batch, (16, 16), mode="bilinear", antialias=True) if len(kept) else batch
        self.shapes = _standardised(small)  # of 16 x 16 pixels, without brightness and contrast
        self.dicom = {name: dicom_header(Path(path)) for name, path in images["path"].items()}
        self.traces = {name: find_traces(Path(path), self.dicom[name])
                       for name, path in images["path"].items()}
        self.headers, self.reasons = {}, {}  # properties of the files; why images cannot be read
        for name, path in images["path"].items():
            try:
                self.headers[name] = inspect_radiograph(path)
                if name not in kept.index:
                    read_radiograph(path, SIDE, 16)
            except UnreadableRadiographError as error:
                self.reasons[name] = error.reason

    @cached_property
    def said(self) -> pd.DataFrame:
        """What the table says of each image, beside what the folder says."""
        first = self.rows[self.rows["image"] != ""].drop_duplicates("image").set_index("image")
        return first.join(self.images[["class", "split"]].add_suffix(" of folder"))

    @cached_property
    def likeness(self) -> np.ndarray:
        """(N,) correlation of each image with what most images have in common, in [-1, 1].

        The first principal component, which inverted images do not weaken, unlike the mean.
        """
        left, scale, _ = torch.linalg.svd(self.shapes.flatten(1), full_matrices=False)
        first = (left[:, :1] * scale[:1]).sum(1).numpy()  # of no image, nothing
        return first if not len(first) or np.median(first) >= 0 else -first

    @cached_property
    def exposure(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) width of the grey scale in use, from 0 to 1, and whether the image is of one single grey."""
        flat = self.seen[1].flatten(1).numpy()
        low, high = np.quantile(flat, [0.02, 0.98], axis=1) if len(flat) else np.empty((2, 0))
        width = (high - low) / 2
        return width, (width < 0.01) & (flat.std(1) < 0.02)

    @cached_property
    def copies(self) -> tuple[list[pd.DataFrame], list[pd.DataFrame]]:
        """Groups of images with the same pixels, and pairs of others that are the same by sight."""
        kept, batch = self.seen
        if kept.empty:
            return [], []
        sums = np.array(image_hashes(batch))
        groups = [group for _, group in kept.groupby(sums, sort=False) if len(group) > 1]
        pairs = find_duplicates(batch)
        return groups, [kept.iloc[[a, b]] for a, b, *_ in pairs if sums[a] != sums[b]]

    @cached_property
    def class_folders(self) -> pd.DataFrame:
        """The folders where classes stand: split, class, name, and whether they are empty."""
        def inner(folder: Path) -> list[Path]:
            return [path for path in sorted(folder.iterdir()) if path.is_dir()
                    and not re.fullmatch(r"\..*|masks|images|__macosx", path.name.lower())
                    and path.resolve() not in (home, *home.parents)]  # a link back up

        home, depth = self.root.resolve(), self.images.attrs.get("depth", 0)
        top = self.root.joinpath(*self.images.index[0].split("/")[:depth])  # below folders that hold only it
        bases = [path for path in inner(top) if canonical_split(path.name)] or [top]
        rows = [(canonical_split(base.name) if base != top else "", canonical_class(path.name),
                 path.relative_to(self.root).as_posix()) for base in bases for path in inner(base)]
        held = {"/".join(name.split("/")[:depth + i]) for name in self.images.index for i in (1, 2)}
        return pd.DataFrame([(*row, row[2] not in held) for row in rows],
                            columns=["split", "class", "name", "empty"]).astype({"empty": bool})

    @cached_property
    def labels(self) -> tuple[Any, Any, str]:
        """Audit of shortcuts, label signal, and why there is neither."""
        if self.images["class"].replace("", np.nan).nunique() < 2:
            return None, None, "Shortcuts, label signal and wrong labels: there is only one class."
        try:
            return shortcuts.audit_shortcuts(self.images), shortcuts.label_signal(self.images), ""
        except ValueError as error:
            return None, None, f"Shortcuts and label signal ({error})."

    @cached_property
    def mislabelled(self) -> tuple[list[str], float, str]:
        """Images whose label a simple classifier doubts, how good that is, and why nobody asked it."""
        kept, batch = self.seen
        large = (kept.groupby("class")["class"].transform("size") >= 15) & (kept["class"] != "")
        kept, batch = kept[large], batch[torch.from_numpy(large.to_numpy(copy=True))]
        if kept["class"].nunique() < 2 or kept["patient"].nunique() < 15:
            return [], 0.0, "Wrong labels: fewer than two classes have 15 images."
        label = np.unique(kept["class"], return_inverse=True)[1]
        patients = kept["patient"].to_numpy(str)
        margin, skill = _margins(lite0_features(batch, side=SIDE), batch, label, patients)
        if skill < 0.85:
            return [], skill, (f"Wrong labels: a simple classifier reaches only {skill:.0%} (balanced), too "
                               "little to doubt a label.")
        return [kept.index[row] for row in np.argsort(margin) if margin[row] < -0.6], skill, ""


def _standardised(images: Tensor) -> Tensor:
    rows = images.flatten(1)
    return F.normalize(rows - rows.mean(1, keepdim=True), dim=1)


def _count(number: int, thing: str = "image") -> str:
    """Return "1 image", "2 images"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------- folders, files and tables

@check("missing class", "error", "add images of it, or train without it and say so")
def _missing_class(data: Evidence) -> Found:
    folders = data.class_folders
    held = set(zip(data.images["split"], data.images["class"], strict=True))
    gaps = set(zip(*(folders[folders["empty"]][column] for column in ("split", "class")), strict=True))
    labels = set(data.images["class"]) - {""}
    expected = set(data.classes or (labels & {*GRADES, *FINDINGS} or labels) | {label for _, label in gaps})
    if data.classes is None and expected <= set(GRADES) and (
            len(expected) > 2 or len(expected) <= max(map(GRADES.index, expected), default=-1)):
        expected = set(GRADES)  # a binary task may be called grade_0 and grade_1
    splits = sorted({*folders["split"], *(split for split, _ in held if split)}) or [""]
    absent = [f"{split}/{label}".lstrip("/") for split in splits for label in sort_classes(expected)
              if (split, label) not in held | gaps]
    return [(None, f"No image of {', '.join(absent)}.")] if absent else []


@check("empty class", "error", "fill the folder or delete it")
def _empty_class(data: Evidence) -> Found:
    empty = data.class_folders[data.class_folders["empty"]]
    return [(empty["name"], f"{_count(len(empty), 'class folder')} without an image.")]


@check("extra class", "warning", "rename it to one of the expected classes, or move it out")
def _extra_class(data: Evidence) -> Found:
    labels, known = set(data.images["class"]) - {""}, set(data.classes or {*GRADES, *FINDINGS})
    strange = labels - known if labels & known else set()
    return [(data.images.index[data.images["class"].isin(strange)],
             f"Among the expected classes stand others: {', '.join(sort_classes(strange))}.")]


@check("outside classes", "error", "move them into a class folder, or out of the data set")
def _outside_classes(data: Evidence) -> Found:
    return [(data.images.index[data.images["class"] == ""], f"{N} beside the class folders.")]


@check("unreadable", "error", "get these files again, or move them out")
def _unreadable(data: Evidence) -> Found:
    broken = {name: reason for name, reason in data.reasons.items() if not reason.startswith("neither")}
    kinds = Counter(re.split("[(;:]", reason)[0].strip() for reason in broken.values()).most_common(4)
    return [(broken, f"{_count(len(broken), 'file')} cannot be read: "
                     f"{', '.join(f'{kind} ({number})' for kind, number in kinds)}.")]


@check("not an image", "error", "move them out: whatever their names say, they hold no picture")
def _not_an_image(data: Evidence) -> Found:
    strange = [name for name, reason in data.reasons.items() if reason.startswith("neither")]
    return [(strange, f"{_count(len(strange), 'file')} named like a picture, with none inside.")]


def _other_files(data: Evidence, of_system: bool) -> list[str]:
    """List the files that are no images, outside of hidden folders and of masks."""
    others = []
    for folder, folders, names in os.walk(data.root):
        folders[:] = sorted(name for name in folders if name.lower() != "masks" and not name.startswith("."))
        for path in (Path(folder, name) for name in sorted(names)):
            hidden = path.name.startswith(".") or path.name.lower() in ("thumbs.db", "desktop.ini")
            beside_classes = path.parent == data.root or canonical_split(path.parent.name)
            name = path.relative_to(data.root).as_posix()
            if name not in data.images.index and hidden == of_system and (of_system or not beside_classes):
                others.append(name)
    return others


@check("other files", "warning", "move them out of the class folders")
def _files_of_another_kind(data: Evidence) -> Found:
    others = _other_files(data, of_system=False)
    return [(others, f"{_count(len(others), 'file')} of another kind among the images.")]


@check("system files", "note", "they are left out; they can be deleted")
def _system_files(data: Evidence) -> Found:
    hidden = _other_files(data, of_system=True)
    return [(hidden, f"{_count(len(hidden), 'file')} of the operating system.")]


@check("absent files", "error", "get the images, or take their rows out of the table")
def _absent_files(data: Evidence) -> Found:
    return [(data.rows["file"][data.rows["image"] == ""], f"{data.table.name} names {N} that the folder "
             f"does not hold, in {len(data.rows):,} rows.")] if data.table else []


@check("not in table", "warning", "add rows for them, or move them out")
def _not_in_table(data: Evidence) -> Found:
    return [(data.images.index.difference(data.said.index),
             f"{N} have no row in {data.table.name}.")] if data.table else []


# ---------------------------------------------------------------- headers

def _mixed(data: Evidence, measure: Callable[[FileProperties], int], unit: str) -> Found:
    """Compare a property of the headers within each class."""
    values = pd.Series({name: measure(header) for name, header in data.headers.items()}, dtype=object)
    labels = data.images["class"].reindex(values.index)
    usual = values.groupby(labels).transform(lambda of_class: Counter(of_class).most_common(1)[0][0])
    told = [f"{label or 'no class'} " + " and ".join(
        f"{n} of {_count(kind, unit)}" for kind, n in Counter(values[labels == label]).most_common())
        for label in sort_classes(labels[values != usual])]
    return [(values.index[values != usual], f"Images of one class differ in {unit}s: {'; '.join(told)}.")]


@check("mixed channels", "warning", "bring all images to one form: `genailab data preprocess`")
def _mixed_channels(data: Evidence) -> Found:
    return _mixed(data, lambda header: 1 if header.format == "DICOM" else
                  len(ImageMode.getmode(header.mode).bands), "channel")


@check("mixed depth", "warning",
       "bring all images to one form: `genailab data preprocess`; a 1-bit image is a mask, move it out")
def _mixed_depth(data: Evidence) -> Found:
    return _mixed(data, lambda header: int(header.mode.split()[-1]) if header.format == "DICOM" else
                  {"1": 1, "I": 16, "F": 16}.get(header.mode.split(";")[0], 8), "bit")


def _far(values: np.ndarray, least: float) -> np.ndarray:
    """Tell which logarithms lie far from the rest: robustly, and never for less than `least`.

    Where nine of ten images agree within 2 %, a tenth more is odd.
    """
    distance = np.abs(values - np.median(values))
    if (distance < 0.02).mean() >= 0.9:
        return distance > np.log(1.1)
    return distance > max(6 * 1.4826 * float(np.median(distance)), least)


def _sizes(data: Evidence) -> np.ndarray:
    """Return width and height of the images that can be read, (N, 2)."""
    return np.array([data.headers[name][2:] for name in data.names], dtype=float).reshape(-1, 2)


@check("odd size", "warning", "look whether these are radiographs, then bring all to one size")
def _odd_size(data: Evidence) -> Found:
    size = _sizes(data)
    if not len(size):
        return []
    width, height = np.median(size, axis=0)
    return [(_far(np.log(size.prod(1)) / 2, np.log(3)) | (size < 48).any(1),
             f"{N} far larger or smaller than the rest (median {width:.0f} x {height:.0f} px), or below 48 "
             f"px; {BY_CLASS}.")]


@check("odd aspect", "warning", "look whether these are whole images; letterbox rather than squash them")
def _odd_aspect(data: Evidence) -> Found:
    ratio = np.divide(*_sizes(data).T)
    if not len(ratio) or not (odd := _far(np.log(ratio), np.log(1.8))).any():
        return []
    return [(odd, f"{N} far wider or taller than the rest (width / height {ratio[odd].min():.2g} to "
                  f"{ratio[odd].max():.2g}, usual {np.median(ratio):.2g}); {BY_CLASS}.")]


# ---------------------------------------------------------------- pixels

@check("blank", "error", "move them out: there is nothing to see")
def _blank(data: Evidence) -> Found:
    return [(data.exposure[1], f"{N} of one single grey.")]


@check("low contrast", "warning", "look at them: export them again with the right window, or leave them out")
def _low_contrast(data: Evidence) -> Found:
    width, blank = data.exposure
    if blank.all():
        return []
    logs = np.log(width[~blank].clip(1e-3))
    centre, spread = np.median(logs), 1.4826 * np.median(np.abs(logs - np.median(logs)))
    least = max(0.12, min(np.exp(centre - 6 * spread), 0.4 * np.exp(centre)))  # fraction of the grey scale
    return [((width < least) & ~blank,
             f"{N} with less than {least:.0%} of the grey scale (usual: {np.exp(centre):.0%}).")]


@check("inverted", "warning", "look at them: if air is white, invert them")
def _inverted(data: Evidence) -> Found:
    return [(data.likeness < -0.4, f"{N} more like the negative of the others than like them.")]


@check("mixed views", "warning", "look at them: keep one view (frontal or lateral) in one data set")
def _mixed_views(data: Evidence) -> Found:
    if not len(data.names):
        return []
    lateral = [name for name in data.images.index
               if re.search(r"(?<![a-z])lat(eral)?(?![a-z])", Path(name).stem.lower())
               or data.dicom[name].get("ViewPosition", "").upper() in ("LL", "RL", "LLO", "RLO", "LATERAL")]
    lone = (_symmetry(data.seen[1]) < 0.4) & (np.abs(data.likeness) < 0.4) & ~data.exposure[1]
    return [
        (lone, f"{N} neither symmetric nor like the others: lateral, turned or badly framed?"),
        (_second_group(lite0_features(local_contrast(data.seen[1]), side=SIDE)),
         f"{N} form a group clearly apart: lateral images, or another part of the body?"),
        (lateral if len(lateral) < len(data.images) else [],
         f"{N} called lateral by name or header, beside {len(data.images) - len(lateral):,} others."),
    ]


def _symmetry(images: Tensor) -> np.ndarray:
    """(N,) best correlation of each image with its mirror image, shifted by up to a fifth of its width."""
    small = F.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    strips = [small[..., max(0, d):32 + min(0, d)] for d in range(-6, 7)]
    likeness = [(_standardised(strip) * _standardised(strip.flip(-1))).sum(1) for strip in strips]
    return torch.stack(likeness).amax(0).numpy()


def _second_group(features: np.ndarray) -> np.ndarray:
    """Tell which images form a second group far from the first: (N,) bool, all False where there is none.

    k-means in the 8 main axes, from starts that find small groups too; far is 5 standard deviations within
    the groups. Fourteen sets of one view, generated and real, reached 3.9; mixed views of generated spines
    6.1 and more.
    """
    found, apart = np.zeros(len(features), dtype=bool), 5.0
    if len(features) < 40 or not np.ptp(features, axis=0).any():
        return found
    axes = PCA(8, random_state=0).fit_transform(np.sqrt(features))
    for axis, share, sign in itertools.product(range(6), (0.5, 0.8, 0.95, 0.99), (-1, 1)):
        ahead = sign * axes[:, axis] > np.quantile(sign * axes[:, axis], share)
        if not ahead.any():  # the images furthest out are equal
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


# ---------------------------------------------------------------- copies, patients, labels

_SAME, _ALIKE = "pixel by pixel the same", "the same by sight"


def _torn(group: pd.DataFrame) -> bool:
    return group["split"].nunique() > 1


def _clash(group: pd.DataFrame) -> bool:
    return len(set(group["class"]) - {""}) > 1


def _plain(group: pd.DataFrame) -> bool:
    return not _torn(group) and not _clash(group)


def _groups(groups: list[pd.DataFrame], which: Callable[[pd.DataFrame], bool], what: str) -> Found:
    chosen = [group for group in groups if which(group)]
    return [(dict.fromkeys(name for group in chosen for name in group.index),
             f"{_count(len(chosen), 'pair' if what.endswith(_ALIKE) else 'picture')} {what}.")]


@check("conflicting labels", "error", "find out which label is right; leave the picture out until you know")
def _conflicting_labels(data: Evidence) -> Found:
    found = _groups(data.copies[0], _clash, f"in two classes, {_SAME}")
    if data.table:
        said, n_classes = data.said, data.rows.groupby("file")["class"].nunique()
        both = (said["class"] != "") & (said["class of folder"] != "")
        found += [(said.index[both & (said["class"] != said["class of folder"])],
                   f"{N} lie in another class folder than {data.table.name} says."),
                  (n_classes.index[n_classes > 1], f"{data.table.name} gives {N} two classes.")]
    return found


@check("conflicting labels by sight", "warning",
       "look at the pairs; if they are one picture, find out which label is right")
def _conflicting_labels_by_sight(data: Evidence) -> Found:
    return _groups(data.copies[1], _clash, f"in two classes, {_ALIKE}")


@check("duplicate across splits", "error", "split again: `genailab data split` keeps copies together")
def _duplicate_across_splits(data: Evidence) -> Found:
    found = _groups(data.copies[0], _torn, f"in two splits, {_SAME}")
    if data.table:
        said = data.said
        found.append((said.index[(said["split"] != "") & (said["split"] != said["split of folder"])],
                      f"{N} lie in another split than {data.table.name} says."))
    return found


@check("near duplicate across splits", "error",
       "look at the pairs, then split again: `genailab data split` keeps copies together")
def _near_duplicate_across_splits(data: Evidence) -> Found:
    return _groups(data.copies[1], _torn, f"in two splits, {_ALIKE}")


@check("exact duplicate", "warning", "keep one copy of each")
def _exact_duplicate(data: Evidence) -> Found:
    return _groups(data.copies[0], _plain, f"several times, {_SAME}")


@check("near duplicate", "warning", "look at the pairs; if they are one picture, keep the better one")
def _near_duplicate(data: Evidence) -> Found:
    return _groups(data.copies[1], _plain, f"of one class, {_ALIKE}")


@check("same name in two splits", "error", "keep one of them, or split again")
def _same_names(data: Evidence) -> Found:
    kept, batch = data.seen
    stems, found = pd.Series([Path(name).stem for name in data.names], dtype=object), []
    for rows in stems.groupby(stems).indices.values():
        if kept["split"].iloc[rows].nunique() > 1:
            small = _standardised(F.interpolate(batch[rows], (32, 32), mode="bilinear", antialias=True))
            if float((small @ small.T).fill_diagonal_(-1).max()) > 0.99:
                found += data.names[rows].tolist()
    number = _count(len({Path(name).stem for name in found}), "picture")
    return [(found, f"{number} under one name in several splits.")]


@check("patient in two splits", "error", "split again by patient: `genailab data split`")
def _patient_in_two_splits(data: Evidence) -> Found:
    torn, told = torn_patients(data.images), data.images[data.images["known"] != "own"]
    return [(told.index[told["patient"].isin(torn)],
             f"{_count(len(torn), 'patient')} of {told['patient'].nunique():,} with images in several "
             "splits.")]


@check("patients", "note", "check that one patient has one name")
def _patients(data: Evidence) -> Found:
    told = data.images[data.images["known"] != "own"]
    if told.empty:
        return [(None, "Nothing tells the patients, so each image counts as one.")]
    how = " and ".join(f"by the {known}" for known in sorted(set(told["known"]), reverse=True))
    alone = len(data.images) - len(told)
    rest = f"; {_count(alone)} count as a patient each" if alone else ""
    return [(None, f"{_count(told['patient'].nunique(), 'patient')} told {how}{rest}.")]


@check("shortcut", "warning", "a model may learn this instead of the disease: crop, mask, or say so")
def _shortcut(data: Evidence) -> Found:
    flagged = data.labels[0].flagged if data.labels[0] else []
    message = f"The class can be told without looking at the anatomy, from: {', '.join(flagged)}."
    return [(None, message)] if flagged else []


@check("no label signal", "warning", "distrust the labels: no model can learn them from these images")
def _no_label_signal(data: Evidence) -> Found:
    signal = data.labels[1]
    if not signal or signal.signal:
        return []
    message = " ".join(str(signal).split())
    return [(None, message)] if signal.absent else [(None, message, "note")]


@check("likely mislabelled", "warning", "show them to somebody who reads radiographs; change no label unseen")
def _likely_mislabelled(data: Evidence) -> Found:
    wrong, skill, _ = data.mislabelled
    return [(wrong, f"{N} of another class to a simple classifier, which is right on {skill:.0%} of all "
                    "(balanced); the clearest first.")]


def _margins(features: np.ndarray, images: Tensor, label: np.ndarray,
             patient: np.ndarray) -> tuple[np.ndarray, float]:
    """Votes for an image's own class above those for the best other one, and the balanced accuracy.

    Kernel ridge on Lite0 features and the probe, never fitted to images of the same patient.
    """
    probe = probe_features(images)
    probe = (probe - probe.mean(1, keepdims=True)) / (probe.std(1, keepdims=True) + 1e-6)
    kinds = [(x - x.mean(0)) / (x.std(0) + 1e-6) / np.sqrt(x.shape[1]) for x in (features, probe)]
    folds = shortcuts.folds_by_patient(patient)
    found = shortcuts.votes(shortcuts.gaussian_kernel(np.hstack(kinds)), label, folds, ridge=0.001).mean(0)
    own = found[np.arange(len(label)), label]
    found[np.arange(len(label)), label] = -np.inf
    margin = (own - found.max(1)) / 2
    return margin, float(pd.Series(margin > 0).groupby(label).mean().mean())


# ---------------------------------------------------------------- people

def _by_field(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    names: defaultdict[str, list[str]] = defaultdict(list)
    for field, name in pairs:
        names[field].append(name)
    return dict(sorted(names.items()))


@check("personal data", "error", "remove the field, column or name before anybody else gets the files")
def _personal_data(data: Evidence) -> Found:
    fields = _by_field([(field, name) for name, traces in data.traces.items() for field in traces.personal])
    named = dict.fromkeys(name for names in fields.values() for name in names)
    told = ", ".join(f"{field} ({len(names)})" for field, names in fields.items())
    called = [name for name in data.images.index if identifies(name)]
    tables = {*data.root.glob("*.csv"), *([data.table] if data.table else [])}
    return [(named, f"{_count(len(named), 'file')} with fields on persons: {told}."),
            (called, f"{_count(len(called), 'file name')} with what seems a person's name, or a date that "
                     "may be of birth."),
            *((None, f"The table {table.name} has columns about persons: {', '.join(private)}.")
              for table in sorted(tables) if (private := person_columns(table)))]


@check("free text", "warning", "read it, and remove it if it tells who somebody is")
def _free_text(data: Evidence) -> Found:
    fields = _by_field([(field, name) for name, traces in data.traces.items() for field in traces.texts])
    return [(names, f"{_count(len(names), 'file')} with text in the field {field}.")
            for field, names in fields.items()]


@check("patient numbers", "warning", "make sure that they are pseudonyms and no hospital numbers")
def _patient_numbers(data: Evidence) -> Found:
    numbered = [name for name, traces in data.traces.items() if traces.numbered]
    return [(numbered, f"{_count(len(numbered), 'file')} with the field DICOM PatientID.")]


@check("not checked", "note", "keep in mind what nobody looked at")
def _not_checked(data: Evidence) -> Found:
    one_class = data.labels[2].endswith("only one class.")
    reasons = [data.labels[2], "" if one_class else data.mislabelled[2],
               "Names burnt into the pixels are not read: look at the images."]
    return [(None, reason) for reason in reasons if reason]
