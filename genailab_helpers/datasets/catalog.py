"""What the public X-ray sets call their classes and their patients, in one place."""

import re
from collections.abc import Iterable
from pathlib import PurePath

GRADES = ("grade_0", "grade_1", "grade_2", "grade_3", "grade_4")
GRADE_NAMES = ("Healthy", "Doubtful", "Minimal", "Moderate", "Severe")
FINDINGS = ("Normal", "Pneumonia", "COVID", "Lung_Opacity", "Viral Pneumonia")

_ALIASES = {  # spelled without case, spaces, hyphens and underscores
    **{alias: grade for number, (grade, name) in enumerate(zip(GRADES, GRADE_NAMES, strict=True))
       for alias in (str(number), f"grade{number}", name.lower(), f"{number}{name.lower()}")},
    "normal": "Normal", "nofinding": "Normal", "nofindings": "Normal",
    "pneumonia": "Pneumonia",
    "covid": "COVID", "covid19": "COVID",
    "lungopacity": "Lung_Opacity", "lung": "Lung_Opacity",
    "viralpneumonia": "Viral Pneumonia", "viral": "Viral Pneumonia",
}

SPLITS = ("train", "val", "test")
_SPLIT_ALIASES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                  "test": "test", "testing": "test"}

_PATIENTS = tuple(re.compile(pattern) for pattern in (
    r"(?P<patient>person\d+)_(?:bacteria|virus)_\d+",  # Kermany, pneumonia
    r"(?:NORMAL2-)?(?P<patient>IM-\d+)-\d+",  # Kermany, normal
    r"(?P<patient>\d{8})_\d{3}(?!\d)",  # NIH ChestX-ray8: patient and visit
    r"(?P<patient>\d{7})[LR](?![A-Za-z0-9])",  # OAI knees: patient and side
    r"(?P<patient>case\d+)_\d+",  # AASCE spines: case and view
))


def canonical_class(name: str) -> str:
    """Return the project's name of a class, whatever a data set calls it.

    Parameters
    ----------
    name : str
        A folder name such as `NORMAL`, `No_findings`, `Covid-19`, `Lung`, `Viral`, `grade 0`, `0`, `Healthy`.
        Case, spaces, hyphens and underscores do not matter.

    Returns
    -------
    str
        A member of `GRADES` or `FINDINGS`; a name that the table does not know comes back as it is.
    """
    return _ALIASES.get(re.sub(r"[\s_-]+", "", name).lower(), name)


def canonical_split(name: str) -> str:
    """Return "train", "val" or "test" for whatever a data set calls that part, else an empty string."""
    return _SPLIT_ALIASES.get(name.lower(), "")


def sort_classes(names: Iterable[str]) -> list[str]:
    """Put canonical class names into their order: grades, then findings, then others by alphabet.

    Parameters
    ----------
    names : iterable of str
        Names as `canonical_class` returns them; repeated ones count once.

    Returns
    -------
    list of str
        The names in order.
    """
    known = (*GRADES, *FINDINGS)
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def patient_of(path: str | PurePath) -> str:
    """Return the patient of a film, as far as its file name tells.

    Parameters
    ----------
    path : str or PurePath
        The file, best given relative to the root of its data set.

    Returns
    -------
    str
        The patient's part of the name where it is that of a public set: Kermany (`person12_virus_3`,
        `NORMAL2-IM-0381-0001`), NIH ChestX-ray8 (`00000061_012`), OAI (`9003316L`), AASCE (`case000_0`). Any
        other film counts as a patient of its own, named by its path without the suffix.
    """
    path = PurePath(path)
    for pattern in _PATIENTS:
        if match := pattern.match(path.name):
            return match["patient"]
    return path.with_suffix("").as_posix()
