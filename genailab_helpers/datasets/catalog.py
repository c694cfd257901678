"""What the public X-ray sets call their classes and patients, and a card about each, in one place."""

import re
import shutil
import textwrap
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from genailab_helpers.storage import cache_folder, whole_folder

GRADES = ("grade_0", "grade_1", "grade_2", "grade_3", "grade_4")
GRADE_NAMES = ("Healthy", "Doubtful", "Minimal", "Moderate", "Severe")
FINDINGS = ("Normal", "Pneumonia", "COVID", "Lung_Opacity", "Viral Pneumonia")
PRESETS: dict[str, tuple[str, ...]] = {  # the classes of an empty tree
    "spine": GRADES,
    "covid": ("Normal", "COVID", "Lung_Opacity", "Viral Pneumonia"),
    "chest": ("Normal", "Pneumonia"),
}

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
    r"(?P<patient>(?:NORMAL2-)?IM-\d+)-\d+",  # Kermany, normal: two batches, each numbered from 1
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


class DatasetCard(NamedTuple):
    """What a user should know about a data set before using it.

    Attributes
    ----------
    name : str
        Its name here, such as `covid`.
    title, modality, what, origin, licence, url, patients, privacy : str
        Sentences; `patients` says how films of one person can be told.
    faults : list of str
        What is known to be wrong with it.
    access : list of str
        Steps to get it by hand.
    kaggle : str
        Its handle `owner/name` on Kaggle; "" where it is not there.
    counts : dict
        Films by split ("all" where the set is not split), then by canonical class; empty if not known.
    meanings : dict
        What a class means clinically.
    """

    name: str
    title: str
    modality: str
    what: str
    origin: str
    licence: str
    url: str
    patients: str
    privacy: str
    faults: list[str]
    access: list[str]
    kaggle: str = ""
    counts: dict[str, dict[str, int]] = {}  # noqa: RUF012 (never changed)
    meanings: dict[str, str] = {}  # noqa: RUF012

    @property
    def command(self) -> str:
        """The command that fetches it, or "" if that has to be done by hand."""
        if self.name in DOWNLOADS:
            return f"genailab data download {self.name} --output raw_data"
        return f"genailab data download --kaggle {self.kaggle} --output raw_data" if self.kaggle else ""

    def __str__(self) -> str:
        """Return the card as markdown."""
        splits = list(self.counts)
        rows = [[name, *(f"{self.counts[split].get(name, 0):,}" for split in splits),
                 " ".join(self.meanings[name].split())] for name in sort_classes(self.meanings)]
        steps = [f"`{self.command}`"] * bool(self.command) + self.access
        facts = {"Origin": self.origin, "Terms": self.licence, "Patients": self.patients,
                 "Privacy": self.privacy}
        return "\n\n".join([
            f"### `{self.name}`: {self.title}",
            _wrapped(f"*{self.modality}.* {self.what}"),
            *([_table(["class", *splits, "what it means"], rows)] if rows else []),
            "\n".join(_wrapped(f"- **{fact}.** {text}") for fact, text in facts.items())
            + f"\n- **Page.** <{self.url}>",
            "Known faults:\n\n" + "\n".join(_wrapped(f"- {fault}") for fault in self.faults),
            "To get it:\n\n" + "\n".join(_wrapped(f"{i}. {step}") for i, step in enumerate(steps, 1)),
        ])


def _wrapped(text: str) -> str:
    """Fold a paragraph or an item of a list, but no command in it."""
    text = re.sub("`[^`]+`", lambda code: code[0].replace(" ", "\0"), " ".join(text.split()))
    item = re.match(r"- |\d+\. ", text)
    return textwrap.fill(text, 118, subsequent_indent=" " * (item.end() if item else 0),
                         break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


DOWNLOADS = ("chest", "covid", "pneumoniamnist")
CARDS: dict[str, DatasetCard] = {
    name: DatasetCard(name, **card) for name, card in tomllib.loads(
        resources.files(__package__).joinpath("cards.toml").read_text(encoding="utf-8")).items()}


def cards(name: str | None = None) -> str:
    """Return the data cards as markdown.

    Parameters
    ----------
    name : str, optional
        One card; by default a table of all of them, and then each.

    Raises
    ------
    ValueError
        If there is no such card.
    """
    if name is not None:
        return str(_card(name))
    rows = [[f"`{card.name}`", card.title, card.modality,
             f"{sum(sum(split.values()) for split in card.counts.values()):,}" if card.counts else "",
             f"`{card.command}`" if card.command else "by hand"] for card in CARDS.values()]
    overview = _table(["name", "what", "shows", "films", "how to get it"], rows)
    return "\n\n".join([overview, *map(str, CARDS.values())])


def _card(name: str) -> DatasetCard:
    if name not in CARDS:
        raise ValueError(f"{name}: no card of that name; expected one of {', '.join(CARDS)}")
    return CARDS[name]


class Download(NamedTuple):
    """What `download` fetched: folder, films by split and class, and how these differ from the card."""

    folder: Path
    counts: dict[str, dict[str, int]]
    differences: list[str]

    def __str__(self) -> str:
        """Return a table and what to do next."""
        names = sort_classes(name for classes in self.counts.values() for name in classes)
        rows = [[name or "(no class)", *(f"{classes.get(name, 0):,}" for classes in self.counts.values())]
                for name in names]
        warnings = [f"warning: {difference}" for difference in self.differences]
        return "\n".join([_table(["class", *self.counts], rows), *warnings,
                          f"Next: genailab data verify {self.folder}"])


def download(name: str | None = None, output: str | Path = "raw_data", kaggle: str | None = None) -> Download:
    """Fetch a public data set into a folder, whole or not at all, and count its films.

    Parameters
    ----------
    name : {"chest", "covid", "pneumoniamnist"}, optional
        A card that can be fetched without an account.
    output : str or Path, default "raw_data"
        A new or empty folder.
    kaggle : str, optional
        Instead of a name, the handle `owner/name` of any public data set on Kaggle.

    Returns
    -------
    Download
        Counts that differ from the card are named in `differences` and are no error: sets are revised.

    Raises
    ------
    ValueError
        If the set has to be fetched by hand (the message holds the steps), the arguments are not as above,
        the extra `download` is not installed, or what came holds no radiographs.
    OSError
        If the output is not empty or the network fails; nothing is left behind then but the library's own
        cache, from which the next call goes on.

    Notes
    -----
    kagglehub unpacks archives; only plain files below its folder are copied from there, nothing is run.
    """
    from tqdm import tqdm

    from genailab_helpers.datasets.folders import index_films  # folders needs this module first

    if (name is None) == (kaggle is None):
        raise ValueError(f"expected either a name ({', '.join(DOWNLOADS)}) or the handle of a Kaggle set")
    card = _card(name) if name else next((card for card in CARDS.values() if card.kaggle == kaggle), None)
    if name and card and name not in DOWNLOADS:
        steps = "\n".join(f"  {i}. {step}" for i, step in enumerate(card.access, 1))
        raise ValueError(f"{name}: has to be fetched by hand, from {card.url}\n{steps}")
    handle, output = kaggle or CARDS[str(name)].kaggle, Path(output)
    if handle and not re.fullmatch(r"\w[\w-]*/\w[\w.-]*", handle):
        raise ValueError(f"{handle}: expected the handle of a Kaggle set, owner/name, as in its address")
    by_hand = (f"get https://www.kaggle.com/datasets/{handle}, unzip it into {output}, "
               f"then `genailab data verify {output}`")
    npz_folder = cache_folder() / "medmnist"
    if not handle:
        npz_folder.mkdir(exist_ok=True)
        by_hand = f"put pneumoniamnist_128.npz from {CARDS[str(name)].url} into {npz_folder}, run this again"
    with whole_folder(output) as temporary, tqdm(desc="writing", unit="file", disable=None) as bar:
        try:
            if handle:
                from kagglehub import dataset_download
                source = Path(dataset_download(handle))
            else:
                from medmnist import PneumoniaMNIST
                splits = [PneumoniaMNIST(split, download=True, size=128, root=str(npz_folder))
                          for split in SPLITS]
        except ImportError as error:
            raise ValueError(f"{name or handle}: {error.name} is missing, `pip install -e '.[download]'`; "
                             f"or by hand: {by_hand}") from error
        except Exception as error:  # errors of kagglehub, requests and the system have no common base
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise OSError(f"{name or handle}: the download failed ({reason}); try again, "
                          f"or by hand: {by_hand}") from error
        if handle:
            _copy_films(source, temporary, card, bar.update)
        else:
            for films in splits:
                _write_films(films.imgs, films.labels.ravel(), temporary / films.split, bar.update)
    films = index_films(output)
    counts = {split or "all": dict(Counter(film.label for film in films if film.split == split))
              for split in (*SPLITS, "") if any(film.split == split for film in films)}
    return Download(output, counts, _differences(counts, card.counts) if card else [])


def _write_films(images: Iterable[Any], labels: Iterable[int], target: Path,
                 wrote: Callable[[], object]) -> None:
    from PIL import Image

    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = target / PRESETS["chest"][label] / f"{target.name}_{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        wrote()


def _copy_films(source: Path, target: Path, card: DatasetCard | None, wrote: Callable[[], object]) -> None:
    """Copy a downloaded tree; of a set with a card only its splits or classes, once."""
    wanted = set() if card is None else set(card.counts) - {"all"} or {*card.counts["all"]}

    def held(folder: Path) -> set[Path]:
        name = canonical_split if wanted & set(SPLITS) else canonical_class
        return {path for path in folder.iterdir() if path.is_dir() and name(path.name) in wanted}

    def unwanted(folder: str, names: list[str]) -> set[str]:
        paths = [Path(folder, name) for name in names]
        others = {path for path in paths if path.is_dir()} - kept if Path(folder) == root and kept else set()
        return {path.name for path in paths
                if path in others or path.is_symlink() or path.name.startswith((".", "__MACOSX"))}

    def copy(file: str, to: str) -> None:
        shutil.copyfile(file, to)
        wrote()

    folders = [source, *sorted(path for path in source.rglob("*") if path.is_dir())]
    folders.sort(key=lambda path: len(path.parts))
    root = max(folders, key=lambda path: len(held(path)))  # of two copies, the one less deep
    kept = held(root)
    shutil.copytree(root, target, ignore=unwanted, copy_function=copy, dirs_exist_ok=True)


def _differences(found: Mapping[str, dict[str, int]], expected: Mapping[str, dict[str, int]]) -> list[str]:
    places = [(split, name) for split in {**expected, **found}
              for name in sort_classes({**expected.get(split, {}), **found.get(split, {})})]
    numbers = [(f"{split} {name}", found.get(split, {}).get(name, 0), expected.get(split, {}).get(name, 0))
               for split, name in places]
    return [f"{place}: {n} films, the card says {wanted}" for place, n, wanted in numbers if n != wanted]
