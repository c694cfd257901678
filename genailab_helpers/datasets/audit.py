"""Distrust a folder of images: one call looks for what would make a result wrong, or tell who a patient is.

A check is a row of `CHECKS`: how grave it is and what to do. Each function below looks at one side of the
`Evidence` and yields findings: name of the check, images, sentence.
Thresholds were chosen on six public sets of chests, knees and spines and on phantoms, then looked at by eye.
"""

import json
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from genailab_helpers.datasets import names as naming
from genailab_helpers.datasets import shortcuts
from genailab_helpers.datasets.duplicates import SIDE, find_duplicates, resized, unit_rows
from genailab_helpers.datasets.folders import one_class, read_images, refuse_colours
from genailab_helpers.datasets.index import TABLE, match_table, other_files, table_lines, torn_patients
from genailab_helpers.datasets.names import KNOWN, SPLITS, canonical_class, canonical_split, sort_classes
from genailab_helpers.datasets.privacy import find_traces, identifies, person_columns, shows_lateral
from genailab_helpers.features import lite0_features, local_contrast, probe_features
from genailab_helpers.radiographs import UnreadableRadiographError, inspect_radiograph, read_radiograph
from genailab_helpers.statistics import class_mean

SEVERITIES = {"error": "make results wrong, or tell who somebody is", "warning": "look at these",
              "note": "good to know"}
DOUBT = 0.07  # a label less probable than this is named
_ONE_FORM = "bring all images to one form: `genailab data preprocess`"
_SPLIT = "split again: `genailab data split` keeps copies together"
CHECKS = {  # how grave what is found is, and what to do about it
    "missing class": ("error", "add images of it, or train without it and say so"),
    "empty class": ("error", "fill the folder or delete it"),
    "one class": ("warning", "if these folders are classes, name the folder that holds them"),
    "many classes": ("warning", "patients, dates, archives? These are no classes: a table may name them"),
    "in colour": ("error", "these are no radiographs: move them out"),
    "extra class": ("warning", "rename it to one of the expected classes, or move it out"),
    "outside classes": ("error", "move them into a class folder, or out of the data set"),
    "unreadable": ("error", "get these files again, or move them out"),
    "not an image": ("error", "move them out: whatever their names say, they hold no image"),
    "other files": ("warning", "move them out of the class folders"),
    "system files": ("note", "they are left out; they can be deleted"),
    "absent files": ("error", "get the images, or take their rows out of the table"),
    "not in table": ("warning", "add rows for them, or move them out"),
    "merged cells": ("warning", "did a spreadsheet merge cells? Fill the patients' column down"),
    "mixed channels": ("warning", _ONE_FORM),
    "mixed depth": ("warning", f"{_ONE_FORM}; a 1-bit image is a mask, move it out"),
    "odd size": ("warning", "look whether these are radiographs, then bring all to one size"),
    "odd aspect": ("warning", "look whether these are whole images; letterbox rather than squash them"),
    "blank": ("error", "move them out: there is nothing to see"),
    "low contrast": ("warning", "export them again with the right window, or leave them out"),
    "inverted": ("warning", "look at them: if air is white, invert them"),
    "mixed views": ("warning", "look at them: keep one view (frontal or lateral) in one data set"),
    "conflicting labels": ("error", "find out which label is right; leave the image out until you know"),
    "conflicting labels by sight": ("warning", "look at the pairs; if one image, find the right label"),
    "duplicate across splits": ("error", _SPLIT),
    "near duplicate across splits": ("error", f"look at the pairs, then {_SPLIT}"),
    "exact duplicate": ("warning", "keep one copy of each"),
    "near duplicate": ("warning", "look at the pairs; if they are one image, keep the better one"),
    "same name in two splits": ("error", "keep one of them, or split again"),
    "patient in two splits": ("error", "split again by patient: `genailab data split`"),
    "patients": ("note", "name those who are not known: a table or --patient-pattern; one name a patient"),
    "shortcut": ("warning", "a model may learn this instead of the disease: crop, mask, or say so"),
    "no label signal": ("warning", "distrust the labels: no model can learn them from these images"),
    "likely mislabelled": ("warning", "show them to somebody who reads radiographs; change no label unseen"),
    "personal data": ("error", "remove the field, column or name before anybody else gets the files"),
    "free text": ("warning", "read it, and remove it if it tells who somebody is"),
    "patient numbers": ("warning", "hospital numbers? Replace them before anybody else gets the files"),
    "synthetic": ("warning", "keep them apart from images of patients, and call no result on them real"),
    "not checked": ("note", "keep in mind what nobody looked at"),
}
# the check, the images (None: none to name; an empty list: nothing was found), a sentence
Found = tuple[str, Collection[str] | None, str]


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


class AuditReport(NamedTuple):
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
        findings = [{**found._asdict(), "what_to_do": CHECKS[found.check][1]} for found in self.findings]
        report = {**self._asdict(), "ok": self.ok, "findings": findings}
        return json.dumps(report, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        """Return the report as text: counts, then errors, warnings and notes with up to 5 files each."""
        counts = pd.DataFrame(self.counts).T.fillna(0).astype(int)
        counts = counts[sort_classes(counts.columns)].rename(columns={"": "(no class)"})
        lines = [f"Audit of {self.root_dir}", "", counts.assign(images=counts.sum(axis=1)).to_string()]
        wrap = textwrap.TextWrapper(100, initial_indent="  ", subsequent_indent="    ")
        for severity, meaning in SEVERITIES.items():
            found = [finding for finding in self.findings if finding.severity == severity]
            lines += ["", f"{severity}s: {len(found)} ({meaning})"]
            for _, check, message, files in found:
                named = [*files[:5], *[f"... and {len(files) - 5} more"] * (len(files) > 5)]
                lines += [wrap.fill(f"{check}: {message}"), *(f"      {name}" for name in named),
                          wrap.fill(f"  What to do: {CHECKS[check][1]}.")]
        return "\n".join(lines)


def audit_images(images: pd.DataFrame, classes: Sequence[str] | None = None) -> AuditReport:
    """Look for everything in a data set that would make a result wrong, or tell who a patient is.

    Parameters
    ----------
    images : pandas.DataFrame
        From `index.index_images`, whose table (by default `films.csv` in the root) is compared with the
        folder. Nothing in the folder is changed.
    classes : sequence of str, optional
        Classes expected. By default those that the folder shows, all five grades where there are only grades.

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
    of_pixels = [_pixels(data), _copies(data)] if len(data.kept) else []
    found = chain(_classes(images, classes), _files(data), _headers(data), *of_pixels, _table(images),
                  _patients(images), _labels(images), _doubts(data), _people(images))
    findings = [Finding(CHECKS[check][0], check, message, tuple(() if files is None else files))
                for check, files, message in found if files is None or len(files)]
    findings.sort(key=lambda found: (list(SEVERITIES).index(found.severity), list(CHECKS).index(found.check)))
    counts = {split or "all": images.loc[images["split"] == split, "class"].value_counts().to_dict()
              for split in (*SPLITS, "") if (images["split"] == split).any()}
    return AuditReport(images.attrs["root"], counts, findings)


class Evidence:
    """What several checks look at: the index, the pixels of what can be read, and the headers."""

    def __init__(self, images: pd.DataFrame) -> None:
        self.images, self.batch, self.kept = images, torch.empty(0, 1, SIDE, SIDE), images[:0]
        with warnings.catch_warnings(action="ignore"), suppress(ValueError):  # "unreadable" names the others
            self.batch, self.kept = read_images(images, SIDE, "skip")
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


def _of(check: str, files: Collection[str], text: str, thing: str = "image") -> Found:
    """Make a finding whose sentence starts with the number of its files."""
    return check, files, f"{_count(len(files), thing)} {text}"


# ---------------------------------------------------------------- folders, files and headers

def _classes(images: pd.DataFrame, classes: Sequence[str] | None) -> Iterator[Found]:
    empty, labels = images.attrs["empty"], set(images["class"]) - {""}
    forms = {naming.folded(label): label for label in labels | {label for _, label in empty.values()}}
    known = {forms.get(naming.folded(name), name) for name in map(canonical_class, classes or KNOWN)}
    expected = known if classes else known.intersection(images.attrs["classes"]) or labels
    held = {*zip(images["split"], images["class"], strict=True), *empty.values()}
    splits = sorted({*images.attrs["splits"], *images["split"]} - {""}) or [""]
    absent = [f"{split}/{label}".lstrip("/") for split in splits for label in sort_classes(expected)
              if (split, label) not in held]
    yield "missing class", None if absent else [], f"No image of {', '.join(absent)}."
    yield _of("empty class", sorted(empty), "without an image.", "class folder")
    strange = labels - known if labels & known else set()
    yield ("extra class", images.index[images["class"].isin(strange)],
           f"Among the expected classes stand others: {', '.join(sort_classes(strange))}.")
    yield _of("outside classes", images.index[images["class"] == ""], "beside the class folders.")
    usual = images.loc[images["class"] != "", "class"].value_counts().median()
    if len(labels) > 10 and usual < 10:
        yield "many classes", None, f"{len(labels)} classes, most of {usual:.0f} images or fewer."
    if len(labels) == 1:
        yield "one class", None, one_class(images)


def _files(data: Evidence) -> Iterator[Found]:
    none = [name for name, reason in data.reasons.items() if reason.startswith("neither")]
    broken = [name for name in data.reasons if name not in none]
    first = data.reasons[broken[0]] if broken else ""
    yield _of("unreadable", broken, f"that cannot be read, the first because: {first}.", "file")
    yield _of("not an image", none, "named like an image, with none inside.", "file")
    others = other_files(data.images)
    hidden = [name for name in others if re.match(r"\.|(thumbs\.db|desktop\.ini)$", Path(name).name.lower())]
    strange = [name for name in others if name not in hidden  # beside the class folders a note is welcome
               and (Path(name).suffix.lower() in (".zip", ".rar", ".7z", ".tar", ".gz")
                    or ("/" in name and not canonical_split(Path(name).parent.name)))]
    yield _of("other files", strange, "of another kind among the images.", "file")
    yield _of("system files", hidden, "of the operating system.", "file")
    try:
        refuse_colours(data.images)
    except ValueError as error:
        yield "in colour", None, str(error).removeprefix(f"{data.images.attrs['root']}: ") + "."


def _headers(data: Evidence) -> Iterator[Found]:
    headers = pd.DataFrame.from_dict(data.headers, "index", str, ["format", "mode", "width", "height"])
    modes, dicom = headers["mode"], headers["format"] == "DICOM"
    channels = modes.mask(dicom, "L").map(Image.getmodebands)
    bits = modes.str.split(";").str[0].map({"1": 1, "I": 16, "F": 16}).fillna(8)  # by Pillow's mode
    bits[dicom] = modes[dicom].str.split().str[-1].astype(int)
    for check, values, unit in (("mixed channels", channels, "channels"), ("mixed depth", bits, "bits")):
        of_class = values.groupby(data.images["class"].reindex(values.index))
        usual = of_class.transform(lambda held: held.mode()[0])
        yield _of(check, values.index[values != usual], f"with more or fewer {unit} than most of the class.")


# ---------------------------------------------------------------- pixels

def _pixels(data: Evidence) -> Iterator[Found]:
    names, flat = data.kept.index, data.batch.flatten(1).numpy()
    width, height = np.log([data.headers[name][2:] for name in names]).T
    small = np.minimum(width, height) < np.log(48)
    yield _of("odd size", names[_far((width + height) / 2, np.log(3)) | small],
              "far larger or smaller than the rest, or below 48 px.")
    yield _of("odd aspect", names[_far(width - height, np.log(1.8))], "far wider or taller than the rest.")
    low, high = np.quantile(flat, [0.02, 0.98], axis=1)
    width = (high - low) / 2  # of the grey scale in use, from 0 to 1
    blank = (width < 0.01) & (flat.std(1) < 0.02)
    yield _of("blank", names[blank], "of one single grey.")
    logs = np.log(width.clip(1e-3))
    spread = 1.4826 * np.median(np.abs(logs - np.median(logs)))
    least = max(0.12, min(np.exp(-6 * spread), 0.4) * np.median(width))
    yield _of("low contrast", names[(width < least) & ~blank],
              f"with less than {least:.0%} of the grey scale (usual: {np.median(width):.0%}).")
    # the first principal component is what most have in common; inverted images weaken a mean, but not it
    left, scale, _ = torch.linalg.svd(unit_rows(resized(data.batch, 16)), full_matrices=False)
    likeness = (left[:, 0] * scale[0]).numpy()
    likeness *= np.sign(np.median(likeness))
    yield _of("inverted", names[likeness < -0.4], "more like the negative of the others than like them.")
    yield _of("mixed views", names[(_symmetry(data.batch) < 0.4) & (np.abs(likeness) < 0.4) & ~blank],
              "neither symmetric nor like the others: lateral, turned or badly framed?")
    yield _of("mixed views", names[_second_group(lite0_features(local_contrast(data.batch), side=SIDE))],
              "form a group clearly apart: lateral images, or another part of the body?")
    lateral = [name for name, path in data.images["path"].items() if shows_lateral(Path(path))]
    others = len(data.images) - len(lateral)
    yield _of("mixed views", lateral if others else [],
              f"called lateral by name or header, beside {others:,} others.")


def _far(values: np.ndarray, least: float) -> np.ndarray:
    """Tell which logarithms lie far from the rest: robustly, and never for less than `least`.

    Where nine of ten images agree within 2 %, a tenth more is odd.
    """
    distance = np.abs(values - np.median(values))
    if (distance < 0.02).mean() >= 0.9:
        return distance > np.log(1.1)
    return distance > max(6 * 1.4826 * float(np.median(distance)), least)


def _symmetry(images: Tensor) -> np.ndarray:
    """(N,) best correlation of each image with its mirror image, shifted by up to a fifth of its width."""
    small = resized(images, 32)
    strips = [small[..., max(0, d):32 + min(0, d)] for d in range(-6, 7)]
    likeness = [(unit_rows(strip) * unit_rows(strip.flip(-1))).sum(1) for strip in strips]
    return torch.stack(likeness).amax(0).numpy()


def _second_group(features: np.ndarray) -> np.ndarray:
    """Tell which images form a second group far from the first: (N,) bool, all False where there is none.

    k-means in the 8 main axes, from the middle and the three images furthest out on each, which finds small
    groups too; far is 5 standard deviations within the groups. Fourteen sets of one view, generated and real,
    reached 3.9, mixed views of generated spines 6.1 and more. A white frame around one class, as in the
    folder of lesson 1, reaches 5.7: a false alarm.
    """
    found, apart = np.zeros(len(features), dtype=bool), 5.0
    if len(features) < 40 or not np.ptp(features, axis=0).any():
        return found
    axes = PCA(8, random_state=0).fit_transform(np.sqrt(features))
    for axis in axes.T:
        for furthest in (axis.argsort()[:3], axis.argsort()[-3:]):
            start = np.stack([axes.mean(0), axes[furthest].mean(0)])
            model = KMeans(2, init=start, n_init=1).fit(axes)
            line, sizes = np.diff(model.cluster_centers_, axis=0)[0], np.bincount(model.labels_)
            place, centres = axes @ line, model.cluster_centers_ @ line
            distance = (centres[1] - centres[0]) / (place - centres[model.labels_]).std()
            if distance > apart and sizes.min() >= 3:
                found, apart = model.labels_ == sizes.argmin(), distance
    return found


# ---------------------------------------------------------------- copies, tables, patients

def _copies(data: Evidence) -> Iterator[Found]:
    pairs = np.array([pair[:2] for pair in find_duplicates(data.batch)], dtype=int).reshape(-1, 2)
    exact = np.array([torch.equal(*data.batch[pair]) for pair in pairs], dtype=bool)
    label, split = (data.kept[column].to_numpy(str)[pairs] for column in ("class", "split"))
    stem = np.array([Path(name).stem for name in data.kept.index])[pairs]
    classes, splits = (label[:, 0] != label[:, 1]) & (label != "").all(1), split[:, 0] != split[:, 1]
    for check, chosen, what in (
            ("conflicting labels", exact & classes, "in two classes, the same pixel by pixel"),
            ("conflicting labels by sight", ~exact & classes, "in two classes, the same by sight"),
            ("duplicate across splits", exact & splits, "in two splits, the same pixel by pixel"),
            ("near duplicate across splits", ~exact & splits, "in two splits, the same by sight"),
            ("exact duplicate", exact & ~classes & ~splits, "that are the same pixel by pixel"),
            ("near duplicate", ~exact & ~classes & ~splits, "of one class, the same by sight"),
            ("same name in two splits", splits & (stem[:, 0] == stem[:, 1]), "under one name in two splits")):
        yield (check, data.kept.index[pd.unique(pairs[chosen].ravel())],
               f"{_count(chosen.sum(), 'pair')} of images {what}.")


def _table(images: pd.DataFrame) -> Iterator[Found]:
    if not images.attrs["table"]:
        return
    table, rows = Path(images.attrs["table"]).name, match_table(images, images.attrs["table"])
    absent = rows["file"][rows["image"] == ""]
    yield "absent files", absent, f"{table} names {_count(len(absent))} that the folder does not hold."
    cells = rows.groupby("file", sort=False)["patient"].max()
    rows = rows[rows["image"] != ""].set_index("image")
    yield _of("not in table", images.index.difference(rows.index), f"without a row in {table}.")
    blank = cells == ""  # so films.csv, which is ours, writes who is not known
    begun = (~blank & blank.shift(-1, fill_value=False)).sum()  # patients with blank rows below
    if (table != TABLE and blank.mean() > 0.3 and begun > max(1, 0.25 * (~blank).sum())
            and not blank.iloc[0] and cells[~blank].is_unique):
        nobody = images.index[images["known"] == "own"].intersection(rows.index[rows["patient"] == ""])
        yield _of("merged cells", nobody, f"without a patient in {table}, where no patient has two images.")
    for check, column, where in (("conflicting labels", "class", "class folder"),
                                 ("duplicate across splits", "split", "split")):
        said, own = rows[column], images[column].reindex(rows.index)
        yield _of(check, rows.index[(said != "") & (own != "") & (said != own)].unique(),
                  f"in another {where} than {table} says.")


def _patients(images: pd.DataFrame) -> Iterator[Found]:
    torn, told = torn_patients(images), images[images["known"] != "own"]
    number = _count(told["patient"].nunique(), "patient")
    yield _of("patient in two splits", told.index[told["patient"].isin(torn)],
              f"of {_count(len(torn), 'patient')} with images in several splits.")
    how = " and".join(f" by the {known}" for known in sorted(set(told["known"]), reverse=True))
    yield ("patients", None,
           f"{number} known{how}; {_count(len(images) - len(told))} of nobody known count as a patient each.")


# ---------------------------------------------------------------- labels

def _labels(images: pd.DataFrame) -> Iterator[Found]:
    try:
        flagged, signal = shortcuts.audit_shortcuts(images).flagged, shortcuts.label_signal(images)
    except ValueError as error:
        yield "not checked", None, f"Shortcuts and label signal ({error})."
        return
    yield ("shortcut", None if flagged else [],
           f"The class can be predicted from what cannot show a disease: {', '.join(flagged)}.")
    if not signal.signal:
        yield "no label signal" if signal.absent else "not checked", None, " ".join(str(signal).split())


def _doubts(data: Evidence) -> Iterator[Found]:
    of_class = data.kept.groupby(data.kept["class"].replace("", None))["patient"]
    large = (of_class.transform("size") >= 15) & (of_class.transform("nunique") >= 5)
    kept, batch = data.kept[large], data.batch[torch.from_numpy(large.to_numpy(copy=True))]
    if kept["class"].nunique() < 2:
        yield "not checked", None, "Wrong labels: fewer than two classes have 15 images of 5 patients."
        return
    label = np.unique(kept["class"], return_inverse=True)[1]
    found = label_probabilities(doubt_features(batch), label, kept["patient"].to_numpy(str))
    skill = class_mean(label, (found / np.bincount(label)).argmax(1) == label)
    if skill < 0.7:
        yield ("not checked", None, f"Wrong labels: a simple classifier reaches only {skill:.0%} (balanced), "
                                    "too little to doubt a label.")
        return
    own = found[np.arange(len(label)), label]
    yield _of("likely mislabelled", kept.index[np.argsort(own)[:(own < DOUBT).sum()]],
              f"whose label has a probability below {DOUBT} by a simple classifier, right on {skill:.0%} "
              "(balanced); clearest first.")


def doubt_features(images: Tensor) -> np.ndarray:
    """Describe images (N, 1, H, W) for `label_probabilities`: Lite0 features beside the probe, (N, 2304)."""
    probe = probe_features(images)
    probe = (probe - probe.mean(1, keepdims=True)) / (probe.std(1, keepdims=True) + 1e-6)
    return np.hstack([(x - x.mean(0)) / (x.std(0) + 1e-6) / np.sqrt(x.shape[1])
                      for x in (lite0_features(images, side=SIDE), probe)])


def label_probabilities(features: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Return the probability of each class (N, classes) by a model that knows no image of the same patient.

    Logistic regression on features (N, D), mean of three times five folds, with one temperature for all.
    Where a label (N,), from 0, is wrong, its probability is low: confident learning (Northcutt, Jiang and
    Chuang, JAIR 70, 2021). The penalty is so strong that the model does not bend to single wrong labels.
    """
    found = np.zeros((len(labels), labels.max() + 1))
    for train, test in shortcuts.folds_by_patient(patients, labels=labels):
        model = LogisticRegression(max_iter=1000).fit(features[train], labels[train])
        found[np.ix_(test, model.classes_)] += model.predict_proba(features[test]) / 3
    logs, own = np.log(found.clip(1e-12)), (np.arange(len(labels)), labels)
    scale = minimize_scalar(lambda scale: -log_softmax(scale * logs, axis=1)[own].mean(), bounds=(0.1, 10))
    return softmax(scale.x * logs, axis=1)


# ---------------------------------------------------------------- people

def _people(images: pd.DataFrame) -> Iterator[Found]:
    traces = pd.DataFrame(map(find_traces, map(Path, images["path"])), images.index,
                          ["personal", "texts", "numbered", "synthetic"])
    for check, column, what in (("personal data", "personal", "with fields on persons"),
                                ("free text", "texts", "with text in the fields")):
        fields = traces[column].explode().dropna()
        yield _of(check, fields.index.unique(), f"{what}: {', '.join(sorted(set(fields)))}.", "file")
    yield _of("personal data", list(filter(identifies, images.index)),
              "with what seems a person's name, or a date that may be of birth.", "file name")
    for table in sorted({*Path(images.attrs["root"]).glob("*.csv"), Path(images.attrs["table"])}):
        with suppress(OSError, ValueError):  # a folder, a pipe
            if private := person_columns(table_lines(table, 1 << 16, "replace")[1][0]):
                yield ("personal data", None,
                       f"The table {table.name} has columns about persons: {', '.join(private)}.")
    yield _of("patient numbers", images.index[traces["numbered"]], "with the field DICOM PatientID.", "file")
    yield _of("synthetic", images.index[traces["synthetic"]],
              f"of {len(images)} marked as synthetic: they show nobody.", "file")
    yield "not checked", None, "Names burnt into the pixels are not read: look at the images."
