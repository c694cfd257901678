"""Train, val and test of a data set, read together, and refused where a score would mean nothing."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Subset

from genailab_helpers.datasets.catalog import GRADES, SPLITS, canonical_split
from genailab_helpers.datasets.folders import RadiographFolder, index_films
from genailab_helpers.radiographs import inspect_radiograph
from genailab_helpers.statistics import grouped_folds

COLOURED = 8  # of 255 levels between the channels, tints set aside; radiographs of six public sets have 0


def read_parts(data: Path, img_size: int, seed: int = 0, graded: bool = False,
               test: bool = False) -> tuple[dict[str, Any], str]:
    """Read train, val and test of a data set, and refuse one that cannot be trained on.

    Parameters
    ----------
    data : Path
        Folder of `train`, `val` and `test` with class folders in each, or of class folders alone.
    img_size : int
        Side of the films in pixels.
    seed : int, default 0
        Of the patients that are drawn for a part that is missing.
    graded : bool, default False
        Whether the classes must be the five grades; otherwise they must not be.
    test : bool, default False
        Whether a fifth of the patients of train become test where there is none.

    Returns
    -------
    parts : dict of str to Subset
        Of a `RadiographFolder` each, train first. Without val, a fifth of the patients of train becomes it.
    how : str
        A sentence: how the parts came about.

    Raises
    ------
    ValueError
        If patients are in two parts, a part lacks films of a class or has one that train lacks, a label file
        numbers the classes otherwise, or the pictures are photographs in colour.

    Notes
    -----
    Films that cannot be read are left out and named on stdout.
    """
    splits: dict[str, set[str]] = {}
    for film in index_films(data):
        if film.told_patient:
            splits.setdefault(film.patient, set()).add(film.split)
    if torn := sorted(patient for patient, held in splits.items() if len(held) > 1):
        raise ValueError(f"{data}: the films of {len(torn)} patients ({', '.join(torn[:5])}"
                         f"{', ...' * (len(torn) > 5)}) lie in several of its parts; divide it again by "
                         "patient: `genailab data split`")
    folders = {canonical_split(path.name): path for path in sorted(data.iterdir()) if path.is_dir()}
    folders = {name: folders[name] for name in SPLITS if name in folders}
    if folders and "train" not in folders:
        raise ValueError(f"{data}: holds {', '.join(folders)} alone; expected a folder train, too")
    parts: dict[str, Any] = {}
    for name, folder in (folders or {"train": data}).items():
        films = _read_folder(folder, img_size)
        _refuse_colours(folder, [path for path, _ in films.samples])
        _check_classes(folder, films, parts["train"].dataset.classes if parts else None, graded)
        parts[name] = Subset(films, range(len(films)))
    train = parts["train"].dataset
    for file in (folder / "dataset.json" for folder in (data, *folders.values())):
        if file.is_file() and (numbered := _read_folder(file, img_size).classes) != train.classes:
            raise ValueError(f"{file}: numbers the classes {', '.join(numbered)}; the folders give "
                             f"{', '.join(train.classes)}: delete the file, or write it again with "
                             "`genailab data label --replace`")
    drawn = [name for name in ("test", "val") if name not in parts and (name == "val" or test)]
    if not drawn:
        return parts, f"The folders {', '.join(parts)} are as they were found."
    for label, name in enumerate(train.classes):
        patients = {of for of, target in zip(train.patients, train.targets, strict=True) if target == label}
        if len(patients) < 5 and not graded:
            raise ValueError(f"{folders.get('train', data)}: films of {len(patients)} patients of {name}; "
                             f"expected 5 or more, of whom a fifth becomes {drawn[0]}, or a folder "
                             f"{drawn[0]}")
    rows = np.arange(len(train))
    for name in drawn:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a class with fewer patients than folds
            kept, held_out = grouped_folds(np.array(train.patients)[rows], 5, seed,
                                           np.array(train.targets)[rows])[0]
        parts[name], rows = Subset(train, rows[held_out].tolist()), rows[kept]
    parts["train"] = Subset(train, rows.tolist())
    return ({name: parts[name] for name in SPLITS if name in parts},
            " ".join(f"{name} is a fifth of the patients of train, drawn with seed {seed}."
                     for name in drawn))


def _read_folder(place: Path, img_size: int) -> RadiographFolder:
    """Read the films of a folder or label file that can be read, and name the others on stdout."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        films = RadiographFolder(place, img_size, on_unreadable="skip")
    for warning in caught:
        print(f"{place}: {warning.message}")
    return films


def _check_classes(folder: Path, films: RadiographFolder, of_train: list[str] | None, graded: bool) -> None:
    """Refuse a part with other classes than it should have, or with too few films of one."""
    found = films.classes
    if graded and found != list(GRADES):
        raise ValueError(f"{folder}: holds the classes {', '.join(found)}; expected folders {GRADES[0]} to "
                         f"{GRADES[-1]}; for classes there is `genailab train classifier`")
    if not graded and found == list(GRADES):
        raise ValueError(f"{folder}: holds grades; expected classes without an order; for grades there is "
                         "`genailab train grader`")
    if len(found) < 2:
        raise ValueError(f"{folder}: holds one class, {found[0]}; expected two or more class folders")
    if of_train and (strange := [name for name in found if name not in of_train]):
        raise ValueError(f"{folder}: holds {', '.join(strange)}, which train lacks; expected the classes of "
                         f"train, {', '.join(of_train)}")
    least = 0 if graded and of_train else 1 if of_train else 2
    for name in of_train or found:
        count = films.targets.count(found.index(name)) if name in found else 0
        if count < least:
            raise ValueError(f"{folder}: {count} readable films of {name}; expected at least {least} of each "
                             f"{'grade' if graded else 'class'}, {', '.join(of_train or found)}")


def _refuse_colours(folder: Path, paths: Sequence[str]) -> None:
    """Refuse a folder most of whose pictures are in colour; a film with a tint is not."""
    looked_at = paths[::-(-len(paths) // 100)]  # up to 100
    colours = []
    for path in looked_at:
        if inspect_radiograph(path).format == "DICOM":
            continue  # no photograph
        with Image.open(path) as image:
            image.draft(None, (64, 64))
            pixels = np.asarray(image.convert("RGB").resize((32, 32)), dtype=float).reshape(-1, 3)
        # the first axis is light and dark, in any tint; what is left is change of colour
        axes = np.linalg.svd(pixels - pixels.mean(0), compute_uv=False)
        colours.append(float(np.sqrt((axes[1:]**2).sum() / len(pixels))))
    n_coloured = sum(colour > COLOURED for colour in colours)
    if n_coloured > len(looked_at) / 2:
        raise ValueError(f"{folder}: {n_coloured} of {len(looked_at)} pictures looked at are in colour "
                         f"(channels differ by {np.median(colours):.0f} of 255 levels); expected "
                         "radiographs, which are grey")
