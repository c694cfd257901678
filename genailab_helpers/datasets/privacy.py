"""Who somebody is: fields, file names, table columns that tell; and the mark of images that show nobody."""

import re
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from PIL import ExifTags
from PIL.PngImagePlugin import PngInfo

from genailab_helpers.radiographs import open_image, read_dicom

SYNTHETIC = "Synthetic"  # key of the text in a PNG file
# DICOM PS3.15, table E.1-1: those that name people and places
_PERSON_FIELDS = re.compile("(Other)?Patient(Name|BirthDate|Address|Telephone|Mother)|OperatorsName|"
                            "Institution(Name|Address)|.*Physician|ResponsiblePerson")
_TEXTS = ("imagedescription", "usercomment", "xpcomment", "xpsubject", "xptitle", "author", "description",
          "comment", "title", "subject")
_TELLING = re.compile(r"patient|birth|\bdob\b|surname|(first|last|full)[ _]?name|physician|hospital|"
                      r"^(name|artist|xpauthor|cameraownername|bodyserialnumber|gpsinfo)$", re.I)
_COLUMNS = re.compile(r"^(patient)?(first|last|full|sur|given|family)?name$|birth|^dob$|address|phone|mail$")
_TITLED = re.compile(r"(?<![A-Za-z])(?:Dr|DR|Mr|Mrs|Ms|Prof)[. _-]+([A-Z][a-z]{2,})")
_INVERTED = re.compile(r"(?<![A-Za-z])(?:([A-Z][a-z]+), ?[A-Z][a-z]+(?![A-Za-z])|[A-Za-z]{2,}\^[A-Za-z]+)")
_NO_NAMES = {"chest", "spine", "knee", "lung", "lungs", "thorax", "normal", "film", "image", "lateral",
             "frontal", "pneumonia", "viral", "covid", "grade", "left", "right"}
_DATED = re.compile(r"(?<!\d)(?:19\d|200)\d[-_.](?:0[1-9]|1[0-2])[-_.](?:0[1-9]|[12]\d|3[01])(?!\d)")
_GIVEN_NAMES = frozenset(Path(__file__).with_name("person_names.txt").read_text(encoding="utf-8").split())
ANONYMOUS = re.compile(r"anon|unknown|none|removed|redacted|deidentified|^x+$", re.I)


def names_somebody(text: str) -> bool:
    """Tell whether a text holds a common given name, a title with a name, or `Smith, John`."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)
    return any(len(word) > 3 and word.lower() in _GIVEN_NAMES for word in words) or any(
        (match[1] or "").lower() not in _NO_NAMES for pattern in (_TITLED, _INVERTED)
        for match in pattern.finditer(text))


def identifies(file_name: str) -> bool:
    """Tell whether a file name holds what seems a person's name, or a date that may be of birth."""
    return names_somebody(file_name) or _DATED.search(file_name) is not None


def _dicom_header(path: Path) -> dict[str, str]:
    """Return the elements of a DICOM header that are not empty; nothing for another file."""
    with suppress(Exception), warnings.catch_warnings(action="ignore"):  # "unreadable" is another check
        header = read_dicom(path)
        return {name: str(header[name].value) for name in header.dir() if header.get(name)}
    return {}


def _metadata(path: Path) -> dict[str, str]:
    """Return EXIF tags, text chunks and comments of an image file by their names."""
    with suppress(Exception), open_image(path) as image:
        exif = image.getexif()
        every = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
        tags = {ExifTags.TAGS.get(tag, ""): value for tag, value in every.items()}
        tags |= {str(key): value for key, value in image.info.items()
                 if isinstance(value, str) or key == "comment"}
        return {name: (value.decode("utf-8", "ignore") if isinstance(value, bytes) else str(value))
                .replace("\0", "").strip() for name, value in tags.items()}
    return {}


def shows_lateral(path: Path) -> bool:
    """Tell whether name or DICOM header call an image lateral."""
    return bool(re.search(r"(?<![a-z])lat(eral)?(?![a-z])", path.stem.lower())) or (
        _dicom_header(path).get("ViewPosition", "").upper() in ("LL", "RL", "LLO", "RLO", "LATERAL"))


def mark_synthetic(origin: str) -> PngInfo:
    """Return the text with which a PNG file says that no person was in front of a detector.

    Parameters
    ----------
    origin : str
        What made the image, such as "diffusion model, seed 0".
    """
    mark = PngInfo()
    mark.add_text(SYNTHETIC, f"not for diagnosis; {origin}; genailab {version('genailab-helpers')}")
    return mark


def kept_mark(path: Path) -> PngInfo:
    """Return the mark of a synthetic image, so that a copy of it keeps it; an empty one for any other."""
    mark, tags = PngInfo(), _metadata(path)
    if SYNTHETIC in tags:
        mark.add_text(SYNTHETIC, tags[SYNTHETIC])
    return mark


def find_traces(path: Path) -> tuple[list[str], list[str], bool, bool]:
    """Say what the header of an image says about people: names of fields, never their content.

    Reads DICOM elements, EXIF tags, text chunks and comments; of a damaged file, none. Returns the fields
    that name or identify somebody, those of free text in which nothing telling was recognised, whether there
    is a patient number, which may be a pseudonym, and whether the image is marked as synthetic.
    """
    header, texts = _dicom_header(path), []
    if header.get("PatientIdentityRemoved") == "YES":
        return [], [], False, False
    personal = [f"DICOM {name}" for name, value in header.items()
                if _PERSON_FIELDS.match(name) and not ANONYMOUS.search(value)
                and not (name == "PatientName" and value == header.get("PatientID"))  # a pseudonym
                and (re.search(r"[^\W\d_]{2}", value) or name == "PatientBirthDate")]
    tags = {} if header else _metadata(path)
    for name, text in tags.items():
        free = name.lower() in _TEXTS
        if text and (_TELLING.search(name) or (free and (names_somebody(text) or _TELLING.search(text)))):
            personal.append(name)
        elif text and free:
            texts.append(name)
    return personal, texts, "PatientID" in header, SYNTHETIC in tags


def person_columns(header: str) -> list[str]:
    """Return the columns of a CSV table that name people, by the line of its headings."""
    columns = [name.strip().strip('"') for name in re.split("[,;\t]", header)]
    return [name for name in columns if _COLUMNS.search(re.sub(r"[^a-z]", "", name.lower()))]
