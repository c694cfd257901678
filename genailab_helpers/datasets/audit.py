"""Distrust a folder of images: one call looks for what would make a result wrong, or tell who a patient is.

A check is a row of `CHECKS`: how grave it is and what to do. Each function below looks at one side of the
`Evidence` and yields findings: name of the check, images, sentence, and "note" if it is no more than that.
Thresholds were chosen on six public sets of chests, knees and spines and on phantoms, then looked at by eye.
"""

import itertools
import json
import re
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from genailab_helpers.datasets.index import image_hashes, match_table, other_files, torn_patients
from genailab_helpers.datasets.names import (
    GRADES,
    KNOWN,
    SPLITS,
    canonical_class,
    canonical_split,
    sort_classes,
)
from genailab_helpers.datasets.privacy import find_traces, identifies, person_columns, shows_lateral
from genailab_helpers.features import lite0_features, local_contrast, probe_features
from genailab_helpers.radiographs import UnreadableRadiographError, inspect_radiograph, read_radiograph

SEVERITIES = {"error": "make results wrong, or tell who somebody is", "warning": "look at these",
              "note": "good to know"}


class Check(NamedTuple):
    """How grave what a check finds is, and what to do about it."""

    severity: str
    advice: str


_ONE_FORM = "bring all images to one form: `genailab data preprocess`"
_SPLIT = "split again: `genailab data split` keeps copies together"
CHECKS = {
    "missing class": Check("error", "add images of it, or train without it and say so"),
    "empty class": Check("error", "fill the folder or delete it"),
    "extra class": Check("warning", "rename it to one of the expected classes, or move it out"),
    "outside classes": Check("error", "move them into a class folder, or out of the data set"),
    "unreadable": Check("error", "get these files again, or move them out"),
    "not an image": Check("error", "move them out: whatever their names say, they hold no image"),
    "other files": Check("warning", "move them out of the class folders"),
    "system files": Check("note", "they are left out; they can be deleted"),
    "absent files": Check("error", "get the images, or take their rows out of the table"),
    "not in table": Check("warning", "add rows for them, or move them out"),
    "mixed channels": Check("warning", _ONE_FORM),
    "mixed depth": Check("warning", f"{_ONE_FORM}; a 1-bit image is a mask, move it out"),
    "odd size": Check("warning", "look whether these are radiographs, then bring all to one size"),
    "odd aspect": Check("warning", "look whether these are whole images; letterbox rather than squash them"),
    "blank": Check("error", "move them out: there is nothing to see"),
    "low contrast": Check("warning",
                          "look at them: export them again with the right window, or leave them out"),
    "inverted": Check("warning", "look at them: if air is white, invert them"),
    "mixed views": Check("warning", "look at them: keep one view (frontal or lateral) in one data set"),
    "conflicting labels": Check("error",
                                "find out which label is right; leave the image out until you know"),
    "conflicting labels by sight": Check(
        "warning", "look at the pairs; if they are one image, find out which label is right"),
    "duplicate across splits": Check("error", _SPLIT),
    "near duplicate across splits": Check("error", f"look at the pairs, then {_SPLIT}"),
    "exact duplicate": Check("warning", "keep one copy of each"),
    "near duplicate": Check("warning", "look at the pairs; if they are one image, keep the better one"),
    "same name in two splits": Check("error", "keep one of them, or split again"),
    "patient in two splits": Check("error", "split again by patient: `genailab data split`"),
    "patients": Check("note", "check that one patient has one name"),
    "shortcut": Check("warning", "a model may learn this instead of the disease: crop, mask, or say so"),
    "no label signal": Check("warning", "distrust the labels: no model can learn them from these images"),
    "likely mislabelled": Check("warning",
                                "show them to somebody who reads radiographs; change no label unseen"),
    "personal data": Check("error", "remove the field, column or name before anybody else gets the files"),
    "free text": Check("warning", "read it, and remove it if it tells who somebody is"),
    "patient numbers": Check("warning", "make sure that they are pseudonyms and no hospital numbers"),
    "synthetic": Check("warning", "keep them apart from images of patients, and call no result on them real"),
    "not checked": Check("note", "keep in mind what nobody looked at"),
}
# the check, the images (None: none to name; an empty list: nothing was found), a sentence, "note" if no more
Found = Iterator[tuple[str, Sequence[str] | None, str] | tuple[str, Sequence[str] | None, str, str]]


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
    data = Evidence(images)
    findings = []
    for name, files, message, *note in itertools.chain(
            _classes(images, classes), _files(data), _headers(data), _pixels(data), _copies(data),
            _table(data), _patients(data), _labels(data), _people(data)):
        if files is None or len(files):
            severity = note[0] if note else CHECKS[name].severity
            findings.append(Finding(severity, name, message, tuple(map(str, () if files is None else files))))
    findings.sort(key=lambda found: (list(SEVERITIES).index(found.severity), list(CHECKS).index(found.check)))
    counts = {split or "all": images.loc[images["split"] == split, "class"].value_counts().to_dict()
              for split in (*SPLITS, "") if (images["split"] == split).any()}
    return AuditReport(images.attrs["root"], counts, findings)


class Evidence:
    """What several checks look at: the index, its table, the pixels of what can be read, and the headers."""

    def __init__(self, images: pd.DataFrame) -> None:
        self.images, self.root, self.table = images, Path(images.attrs["root"]), images.attrs["table"]
        try:
            with warnings.catch_warnings(action="ignore"):  # the check "unreadable" names what is left out
                self.batch, self.kept = read_images(images, SIDE, "skip")
        except ValueError:
            self.batch, self.kept = torch.empty(0, 1, SIDE, SIDE), images[:0]
        self.headers, self.reasons = {}, {}  # properties of the files; why images cannot be read
        for name, path in images["path"].items():
            try:
                self.headers[name] = inspect_radiograph(path)
                if name not in self.kept.index:
                    read_radiograph(path, SIDE, 16)
            except UnreadableRadiographError as error:
                self.reasons[name] = error.reason


def _count(number: int, thing: str = "image") -> str:
    """Return "1 image", "2 images"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _of(check: str, files: Any, text: str, thing: str = "image") -> tuple[str, Sequence[str], str]:
    """Make a finding whose sentence starts with the number of its files."""
    return check, list(files), f"{_count(len(files), thing)} {text}"


# ---------------------------------------------------------------- folders, files and headers

def _classes(images: pd.DataFrame, classes: Sequence[str] | None) -> Found:
    empty, labels = images.attrs["empty"], set(images["class"]) - {""}
    gaps, known = set(empty.values()), {*map(canonical_class, classes or KNOWN)}
    held = set(zip(images["split"], images["class"], strict=True))
    expected = known if classes else (labels & known or labels) | {label for _, label in gaps}
    if not classes and expected <= set(GRADES) and (
            len(expected) > 2 or len(expected) <= max(map(GRADES.index, expected), default=-1)):
        expected = set(GRADES)  # a binary task may be called grade_0 and grade_1
    splits = sorted({*images.attrs["splits"], *(split for split, _ in held if split)}) or [""]
    absent = [f"{split}/{label}".lstrip("/") for split in splits for label in sort_classes(expected)
              if (split, label) not in held | gaps]
    yield "missing class", None if absent else [], f"No image of {', '.join(absent)}."
    yield _of("empty class", sorted(empty), "without an image.", "class folder")
    strange = labels - known if labels & known else set()
    yield ("extra class", images.index[images["class"].isin(strange)],
           f"Among the expected classes stand others: {', '.join(sort_classes(strange))}.")
    yield _of("outside classes", images.index[images["class"] == ""], "beside the class folders.")


def _files(data: Evidence) -> Found:
    broken = {name: reason for name, reason in data.reasons.items() if not reason.startswith("neither")}
    kinds = Counter(re.split("[(;:]", reason)[0].strip() for reason in broken.values()).most_common(4)
    listed = ", ".join(f"{kind} ({number})" for kind, number in kinds)
    yield _of("unreadable", broken, f"cannot be read: {listed}.", "file")
    yield _of("not an image", [name for name in data.reasons if name not in broken],
              "named like an image, with none inside.", "file")
    others = [Path(name) for name in other_files(data.images)]
    hidden = [path for path in others if re.match(r"\.|(thumbs\.db|desktop\.ini)$", path.name.lower())]
    strange = [path for path in others if path not in hidden and len(path.parts) > 1
               and not canonical_split(path.parent.name)]  # beside the class folders a note is welcome
    yield _of("other files", [path.as_posix() for path in strange],
              "of another kind among the images.", "file")
    yield _of("system files", [path.as_posix() for path in hidden], "of the operating system.", "file")


def _headers(data: Evidence) -> Found:
    bits = {"1": 1, "I": 16, "F": 16}  # by Pillow's mode; others have 8 a channel
    kinds = {name: (1, int(header.mode.split()[-1])) if header.format == "DICOM" else
             (len(ImageMode.getmode(header.mode).bands), bits.get(header.mode.split(";")[0], 8))
             for name, header in data.headers.items()}
    for column, (check, unit) in enumerate((("mixed channels", "channel"), ("mixed depth", "bit"))):
        values = pd.Series({name: kind[column] for name, kind in kinds.items()}, dtype=object)
        labels = data.images["class"].reindex(values.index)
        usual = values.groupby(labels).transform(lambda of_class: Counter(of_class).most_common(1)[0][0])
        told = [f"{label or 'no class'} " + " and ".join(
            f"{n} of {_count(kind, unit)}" for kind, n in Counter(values[labels == label]).most_common())
            for label in sort_classes(labels[values != usual])]
        yield (check, values.index[values != usual],
               f"Images of one class differ in {unit}s: {'; '.join(told)}.")
    if data.kept.empty:
        return
    size = np.array([data.headers[name][2:] for name in data.kept.index], dtype=float)
    (width, height), ratio = np.median(size, axis=0), size[:, 0] / size[:, 1]
    odd = data.kept[_far(np.log(size.prod(1)) / 2, np.log(3)) | (size < 48).any(1)]
    yield _of("odd size", odd.index, f"far larger or smaller than the rest (median {width:.0f} x "
              f"{height:.0f} px), or below 48 px; {_by_class(odd)}.")
    if (far := _far(np.log(ratio), np.log(1.8))).any():
        odd, extremes = data.kept[far], f"{ratio[far].min():.2g} to {ratio[far].max():.2g}"
        yield _of("odd aspect", odd.index, f"far wider or taller than the rest (width / height {extremes}, "
                  f"usual {np.median(ratio):.2g}); {_by_class(odd)}.")


def _far(values: np.ndarray, least: float) -> np.ndarray:
    """Tell which logarithms lie far from the rest: robustly, and never for less than `least`.

    Where nine of ten images agree within 2 %, a tenth more is odd.
    """
    distance = np.abs(values - np.median(values))
    if (distance < 0.02).mean() >= 0.9:
        return distance > np.log(1.1)
    return distance > max(6 * 1.4826 * float(np.median(distance)), least)


def _by_class(images: pd.DataFrame) -> str:
    labels = Counter(images["class"].replace("", "no class"))
    return ", ".join(f"{labels[label]} in {label}" for label in sort_classes(labels))


# ---------------------------------------------------------------- pixels

def _pixels(data: Evidence) -> Found:
    if data.kept.empty:
        return
    names, flat = data.kept.index, data.batch.flatten(1).numpy()
    low, high = np.quantile(flat, [0.02, 0.98], axis=1)
    width = (high - low) / 2  # of the grey scale in use, from 0 to 1
    blank = (width < 0.01) & (flat.std(1) < 0.02)
    yield _of("blank", names[blank], "of one single grey.")
    if not blank.all():
        logs = np.log(width[~blank].clip(1e-3))
        centre, spread = np.median(logs), 1.4826 * np.median(np.abs(logs - np.median(logs)))
        least = max(0.12, min(np.exp(centre - 6 * spread), 0.4 * np.exp(centre)))
        yield _of("low contrast", names[(width < least) & ~blank],
                  f"with less than {least:.0%} of the grey scale (usual: {np.exp(centre):.0%}).")
    # the first principal component is what most have in common; inverted images weaken a mean, but not it
    left, scale, _ = torch.linalg.svd(_standardised(_resized(data.batch, 16)), full_matrices=False)
    likeness = (left[:, 0] * scale[0]).numpy()
    likeness = likeness if np.median(likeness) >= 0 else -likeness
    yield _of("inverted", names[likeness < -0.4], "more like the negative of the others than like them.")
    lone = (_symmetry(data.batch) < 0.4) & (np.abs(likeness) < 0.4) & ~blank
    yield _of("mixed views", names[lone],
              "neither symmetric nor like the others: lateral, turned or badly framed?")
    apart = _second_group(lite0_features(local_contrast(data.batch), side=SIDE))
    yield _of("mixed views", names[apart],
              "form a group clearly apart: lateral images, or another part of the body?")
    lateral = [name for name, path in data.images["path"].items() if shows_lateral(Path(path))]
    others = len(data.images) - len(lateral)
    yield _of("mixed views", lateral if others else [],
              f"called lateral by name or header, beside {others:,} others.")


def _resized(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def _standardised(images: Tensor) -> Tensor:
    rows = images.flatten(1)
    return F.normalize(rows - rows.mean(1, keepdim=True), dim=1)


def _symmetry(images: Tensor) -> np.ndarray:
    """(N,) best correlation of each image with its mirror image, shifted by up to a fifth of its width."""
    small = _resized(images, 32)
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


# ---------------------------------------------------------------- copies, tables, patients

def _copies(data: Evidence) -> Found:
    kept, batch = data.kept, data.batch
    if kept.empty:
        return
    sums = np.array(image_hashes(batch))
    exact = [group for _, group in kept.groupby(sums, sort=False) if len(group) > 1]
    near = [kept.iloc[[a, b]] for a, b, *_ in find_duplicates(batch) if sums[a] != sums[b]]
    for check, groups, of_class, of_split, where in (  # None: either way
            ("conflicting labels", exact, True, None, "in two classes"),
            ("conflicting labels by sight", near, True, None, "in two classes"),
            ("duplicate across splits", exact, None, True, "in two splits"),
            ("near duplicate across splits", near, None, True, "in two splits"),
            ("exact duplicate", exact, False, False, "several times"),
            ("near duplicate", near, False, False, "of one class")):
        chosen = [group for group in groups
                  if of_class in (None, len(set(group["class"]) - {""}) > 1)
                  and of_split in (None, group["split"].nunique() > 1)]
        number = _count(len(chosen), "pair" if groups is near else "image")
        how = "the same by sight" if groups is near else "pixel by pixel the same"
        yield (check, list(dict.fromkeys(name for group in chosen for name in group.index)),
               f"{number} {where}, {how}.")
    stems, found = kept.index.map(lambda name: Path(name).stem), []
    for rows in kept.groupby(stems).indices.values():
        if kept["split"].iloc[rows].nunique() > 1:
            small = _standardised(_resized(batch[rows], 32))
            if float((small @ small.T).fill_diagonal_(-1).max()) > 0.99:
                found += kept.index[rows].tolist()
    number = _count(len({Path(name).stem for name in found}))
    yield "same name in two splits", found, f"{number} under one name in several splits."


def _table(data: Evidence) -> Found:
    if not data.table:
        return
    table, rows, folders = Path(data.table).name, match_table(data.images, data.table), data.images
    absent = rows["file"][rows["image"] == ""]
    yield ("absent files", absent, f"{table} names {_count(len(absent))} that the folder does not hold, "
           f"in {len(rows):,} rows.")
    said = rows[rows["image"] != ""].drop_duplicates("image").set_index("image")
    yield _of("not in table", folders.index.difference(said.index), f"have no row in {table}.")
    folders = folders.reindex(said.index)
    for check, column, where in (("conflicting labels", "class", "class folder"),
                                 ("duplicate across splits", "split", "split")):
        other = (said[column] != "") & (folders[column] != "") & (said[column] != folders[column])
        yield _of(check, said.index[other], f"lie in another {where} than {table} says.")
    n_classes = rows[rows["class"] != ""].groupby("file")["class"].nunique()
    twice = n_classes.index[n_classes > 1]
    yield "conflicting labels", twice, f"{table} gives {_count(len(twice))} two classes."


def _patients(data: Evidence) -> Found:
    torn, told = torn_patients(data.images), data.images[data.images["known"] != "own"]
    n_patients, alone = told["patient"].nunique(), len(data.images) - len(told)
    yield ("patient in two splits", told.index[told["patient"].isin(torn)],
           f"{_count(len(torn), 'patient')} of {n_patients:,} with images in several splits.")
    how = " and ".join(f"by the {known}" for known in sorted(set(told["known"]), reverse=True))
    rest = f"; {_count(alone)} count as a patient each" if alone else ""
    yield ("patients", None, f"{_count(n_patients, 'patient')} known {how}{rest}." if n_patients else
           "Nothing tells the patients, so each image counts as one.")


# ---------------------------------------------------------------- labels

def _labels(data: Evidence) -> Found:
    if data.images["class"].replace("", np.nan).nunique() < 2:
        yield "not checked", None, "Shortcuts, label signal and wrong labels: there is only one class."
        return
    try:
        flagged = shortcuts.audit_shortcuts(data.images).flagged
        signal = shortcuts.label_signal(data.images)
    except ValueError as error:
        yield "not checked", None, f"Shortcuts and label signal ({error})."
    else:
        yield ("shortcut", None if flagged else [],
               f"The class can be predicted without looking at the anatomy, from: {', '.join(flagged)}.")
        if not signal.signal:
            said = " ".join(str(signal).split())
            yield "no label signal", None, said, "warning" if signal.absent else "note"
    wrong, skill, reason = _doubted(data)
    yield "not checked", None if reason else [], reason
    yield _of("likely mislabelled", wrong, "of another class to a simple classifier, which is right on "
              f"{skill:.0%} of all (balanced); the clearest first.")


def _doubted(data: Evidence) -> tuple[list[str], float, str]:
    """Return images whose label a classifier doubts, its balanced accuracy, and why it was not asked."""
    large = (data.kept.groupby("class")["class"].transform("size") >= 15) & (data.kept["class"] != "")
    kept, batch = data.kept[large], data.batch[torch.from_numpy(large.to_numpy(copy=True))]
    if kept["class"].nunique() < 2 or kept["patient"].nunique() < 15:
        return [], 0.0, "Wrong labels: fewer than two classes have 15 images."
    label = np.unique(kept["class"], return_inverse=True)[1]
    margin = label_margins(doubt_features(batch), label, kept["patient"].to_numpy(str))
    skill = float(pd.Series(margin > 0).groupby(label).mean().mean())
    if skill < 0.85:
        return [], skill, (f"Wrong labels: a simple classifier reaches only {skill:.0%} (balanced), too "
                           "little to doubt a label.")
    return [kept.index[row] for row in np.argsort(margin) if margin[row] < -0.6], skill, ""


def doubt_features(images: Tensor) -> np.ndarray:
    """Describe images (N, 1, H, W) for `label_margins`: Lite0 features beside the probe, (N, 2304)."""
    probe = probe_features(images)
    probe = (probe - probe.mean(1, keepdims=True)) / (probe.std(1, keepdims=True) + 1e-6)
    return np.hstack([(x - x.mean(0)) / (x.std(0) + 1e-6) / np.sqrt(x.shape[1])
                      for x in (lite0_features(images, side=SIDE), probe)])


def label_margins(features: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Return how clearly a simple classifier agrees with each label: (N,), from -1 (surely not) to 1.

    Kernel ridge on features (N, D), never fitted to images of the same patient: half the difference between
    the vote for the label (N,), a whole number from 0, and the highest other one.
    """
    folds = shortcuts.folds_by_patient(patients)
    found = shortcuts.votes(shortcuts.gaussian_kernel(features), labels, folds, ridge=0.001).mean(0)
    own = found[np.arange(len(labels)), labels]
    found[np.arange(len(labels)), labels] = -np.inf
    return (own - found.max(1)) / 2


# ---------------------------------------------------------------- people

def _people(data: Evidence) -> Found:
    personal: dict[str, list[str]] = defaultdict(list)
    texts: dict[str, list[str]] = defaultdict(list)
    numbered: list[str] = []
    synthetic: list[str] = []
    for name, path in data.images["path"].items():
        of_persons, free, has_number, is_synthetic = find_traces(Path(path))
        for field in of_persons:
            personal[field].append(name)
        for field in free:
            texts[field].append(name)
        numbered += [name] * has_number
        synthetic += [name] * is_synthetic
    told = ", ".join(f"{field} ({len(names)})" for field, names in sorted(personal.items()))
    yield _of("personal data", dict.fromkeys(name for _, names in sorted(personal.items()) for name in names),
              f"with fields on persons: {told}.", "file")
    yield _of("personal data", list(filter(identifies, data.images.index)),
              "with what seems a person's name, or a date that may be of birth.", "file name")
    for table in sorted({*data.root.glob("*.csv"), *([Path(data.table)] if data.table else [])}):
        if table.is_file() and (private := person_columns(table)):  # no folder or pipe of that name
            yield ("personal data", None,
                   f"The table {table.name} has columns about persons: {', '.join(private)}.")
    for field, names in sorted(texts.items()):
        yield _of("free text", names, f"with text in the field {field}.", "file")
    yield _of("patient numbers", numbered, "with the field DICOM PatientID.", "file")
    yield _of("synthetic", synthetic, f"of {len(data.images)} marked as synthetic: they show nobody.", "file")
    yield "not checked", None, "Names burnt into the pixels are not read: look at the images."
