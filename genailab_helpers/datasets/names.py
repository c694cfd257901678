"""What the public X-ray sets call their classes, splits and patients: one table of each."""

import re
import unicodedata
from collections.abc import Iterable

GRADES = ("grade_0", "grade_1", "grade_2", "grade_3", "grade_4")
GRADE_NAMES = ("Healthy", "Doubtful", "Minimal", "Moderate", "Severe")
FINDINGS = ("Normal", "Pneumonia", "COVID", "Lung_Opacity", "Viral Pneumonia")
KNOWN = (*GRADES, *FINDINGS)  # in their order everywhere
PRESETS: dict[str, tuple[str, ...]] = {  # the classes of an empty tree
    "spine": GRADES,
    "covid": ("Normal", "COVID", "Lung_Opacity", "Viral Pneumonia"),
    "chest": ("Normal", "Pneumonia")}
SPLITS = ("train", "val", "test")

_ALIASES = {  # spelled without case, spaces, hyphens and underscores
    **{re.sub("[ _]", "", name).lower(): name for name in KNOWN}, "nofinding": "Normal",
    "nofindings": "Normal", "covid19": "COVID", "lung": "Lung_Opacity", "viral": "Viral Pneumonia"}
_GRADE_ALIASES = {  # names that mean a grade only beside others of their kind
    alias: grade for number, (grade, name) in enumerate(zip(GRADES, GRADE_NAMES, strict=True))
    for alias in (str(number), name.lower(), f"{number}{name.lower()}")
    } | {"0normal": "grade_0", "2mild": "grade_2"}
_SPLIT_ALIASES = {alias + end: split for split, aliases in (
    ("train", ("train", "training")), ("val", ("val", "valid", "validation", "validate")),
    ("test", ("test", "testing"))) for alias in aliases for end in ("", "set", "data")}
_PATIENTS = tuple(re.compile(pattern) for pattern in (
    r"(?P<patient>person\d+)_(?:bacteria|virus)_\d+",  # Kermany, pneumonia
    r"(?P<patient>(?:NORMAL2-)?IM-\d+)-\d+",  # Kermany, normal: two batches, each numbered from 1
    r"(?P<patient>000\d{5})_\d{3}(?!\d)",  # NIH ChestX-ray8: patient (up to 30,805) and visit
    r"(?P<patient>sub-[A-Za-z0-9]+)_",  # BIDS, as BIMCV-COVID19 is named
    r"(?P<patient>MIDRC-RICORD-1C-(?:SITE2-)?\d+-\d+)",  # in COVIDx
    r"(?P<patient>\d{4}-[FM]-\d{3}Y)[01]",  # BUU-LSPINE: patient and view
    r"(?P<patient>\d{7})[LR](?![A-Za-z0-9])",  # OAI knees: patient and side
    r"(?P<patient>case\d+)_\d+",))  # AASCE spines: case and view
NO_IMAGES = re.compile(r"\..*|.*masks?|__macosx", re.IGNORECASE)  # folders that are left out
PATIENT_FOLDER = re.compile(  # the last: a PACS names it as DICOM does
    r"(patient|pat|pt|subject|subj|sub|person|case)[ _-]?\d+|sub-[a-z]?\d+|p\d{4,}|.+\^.+", re.IGNORECASE)


def canonical_class(name: str, graded: bool = False) -> str:
    """Return the project's name of a class, whatever a data set calls it.

    Parameters
    ----------
    name : str
        A folder name such as `NORMAL`, `No_findings`, `Covid-19`, `Lung`, `Viral`, `grade 0`. Case, spaces,
        hyphens and underscores do not matter.
    graded : bool, default False
        Whether `0`, `Healthy`, `0Healthy` and their like are grades, too.

    Returns
    -------
    str
        A member of `GRADES` or `FINDINGS`; a name that the table does not know comes back as it is.

    Examples
    --------
    >>> canonical_class("No_findings"), canonical_class("3"), canonical_class("3", graded=True)
    ('Normal', '3', 'grade_3')
    """
    key = re.sub(r"[\s_-]+", "", name).lower()
    return _ALIASES.get(key) or (graded and _GRADE_ALIASES.get(key)) or name


def canonical_classes(names: Iterable[str], graded: bool = False) -> dict[str, str]:
    """Name all classes of a data set at once: only together do they tell what a number means.

    Parameters
    ----------
    names : iterable of str
        Folder names that stand side by side.
    graded : bool, default False
        Whether the data set is known to be one of grades.

    Returns
    -------
    dict of str to str
        The class of each name. Numbers and `Healthy` to `Severe` are grades if `graded`, or if the names
        are those of all five grades and of nothing else. Names that differ in case or in their Unicode form
        are one class.
    """
    names = sorted(set(names))
    graded = graded or {canonical_class(name, graded=True) for name in names if name} == set(GRADES)
    first: dict[str, str] = {}
    return {name: first.setdefault(folded(found), found)
            for name in names for found in [canonical_class(name, graded)]}


def folded(name: str) -> str:
    """Return the one form of names that differ in case or Unicode form only."""
    return unicodedata.normalize("NFC", name).casefold()


def canonical_split(name: str) -> str:
    """Return "train", "val" or "test" for whatever a data set calls that part, else an empty string.

    Examples
    --------
    >>> [canonical_split(name) for name in ("stage_2_train_images", "Test-Set", "valid", "stage 1")]
    ['train', 'test', 'val', '']
    """
    return _SPLIT_ALIASES.get(re.sub(r"images?|dicom|stage|[\W\d_]+", "", name.lower()), "")


def sort_classes(names: Iterable[str]) -> list[str]:
    """Put class names into their order, each once: grades, then findings, then others by alphabet."""
    return sorted(set(names), key=lambda name: (KNOWN.index(name) if name in KNOWN else len(KNOWN), name))


def known_patient(file_name: str) -> str:
    """Return the patient that a file name tells by the rules of the public sets, else an empty string.

    Kermany (`person12_virus_3`, `NORMAL2-IM-0381-0001`), NIH ChestX-ray8 (`00000061_012`), BIDS
    (`sub-S03045_run-1`), RICORD, BUU-LSPINE (`0001-F-037Y0`), OAI knees (`9003316L`) and AASCE spines
    (`case000_0`) have such names.

    Examples
    --------
    >>> known_patient("person12_virus_3.jpeg"), known_patient("scan.png")
    ('person12', '')
    """
    return next((match["patient"] for pattern in _PATIENTS if (match := pattern.match(file_name))), "")


def patient_folder(path: str) -> str:
    """Return the path to the first folder that is called like one patient, with no split; else "".

    Such are `patient00123`, `sub-01`, `Case 7`, `p10000032`, `MEYER^ANNA`. Classes above it have their
    canonical names. A name with five digits, of BIDS (`sub-`) or a person's is the same in every class.

    Examples
    --------
    >>> patient_folder("train/COVID/patient7/1/2.png"), patient_folder("XR_HAND/patient00012/1.png")
    ('COVID/patient7', 'patient00012')
    """
    parts = path.split("/")[:-1]
    own = next((number for number, name in enumerate(parts, 1) if PATIENT_FOLDER.fullmatch(name)), 0)
    if own and re.search(r"^sub-|\d{5}|\^", parts[own - 1]):
        return parts[own - 1]
    return "/".join(canonical_class(name, graded=True) for name in parts[:own] if not canonical_split(name))
