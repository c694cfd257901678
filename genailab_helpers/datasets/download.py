"""A card about each public X-ray set, and the download of those that need no account."""

import re
import shutil
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from genailab_helpers.checkpoints import cache_folder, whole_folder
from genailab_helpers.datasets.index import index_images
from genailab_helpers.datasets.names import PRESETS, SPLITS, sort_classes

DOWNLOADS = ("chest", "covid", "pneumoniamnist")
CARDS: dict[str, dict[str, Any]] = tomllib.loads(
    resources.files(__package__).joinpath("cards.toml").read_text(encoding="utf-8"))


def command(name: str) -> str:
    """Return the command that fetches a set, or "" if that has to be done by hand."""
    handle = CARDS[name].get("kaggle")
    chosen = name if name in DOWNLOADS else f"--kaggle {handle}" if handle else ""
    return f"genailab data download {chosen} --output raw_data" if chosen else ""


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
    if name is None:
        rows = [[f"`{key}`", card["title"], card["modality"],
                 f"{_counts(card).total():,}" if "counts" in card else "",
                 f"`{command(key)}`" if command(key) else "by hand"] for key, card in CARDS.items()]
        overview = _table(["name", "what", "shows", "images", "how to get it"], rows)
        return "\n\n".join([overview, *map(cards, CARDS)])
    card = _card(name)
    counts, meanings = card.get("counts", {}), card.get("meanings", {})
    classes = _table(["class", *counts, "what it means"], [
        [of, *(f"{held.get(of, 0):,}" for held in counts.values()), meanings[of]]
        for of in sort_classes(meanings)])
    facts = {"Origin": "origin", "Terms": "licence", "Patients": "patients", "Privacy": "privacy"}
    steps = [f"`{command(name)}`"] * bool(command(name)) + card["access"]
    return "\n\n".join([
        f"### `{name}`: {card['title']}",
        _flat(f"*{card['modality']}.* {card['what']}"), *([classes] if meanings else []),
        "\n".join([*(_flat(f"- **{fact}.** {card[key]}") for fact, key in facts.items()),
                   f"- **Page.** <{card['url']}>"]),
        "Known faults:\n\n" + "\n".join(_flat(f"- {fault}") for fault in card["faults"]),
        "To get it:\n\n" + "\n".join(_flat(f"{i}. {step}") for i, step in enumerate(steps, 1))])


def _card(name: str) -> dict[str, Any]:
    if name not in CARDS:
        raise ValueError(f"{name}: no card of that name; expected one of {', '.join(CARDS)}")
    return CARDS[name]


def _counts(card: dict[str, Any]) -> Counter[tuple[str, str]]:
    """Return how many images of each split and class a card says there are."""
    return Counter({(split, label): n for split, held in card.get("counts", {}).items()
                    for label, n in held.items()})


def _flat(text: str) -> str:
    return " ".join(text.split())


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(_flat(f"| {' | '.join(row)} |") for row in [header, ["---"] * len(header), *rows])


def download(name: str | None = None, output: str | Path = "raw_data", kaggle: str | None = None,
             file: str | Path | None = None) -> str:
    """Fetch a public data set into a folder, whole or not at all, and count its images.

    Parameters
    ----------
    name : {"chest", "covid", "pneumoniamnist"}, optional
        A card that can be fetched without an account.
    output : str or Path, default "raw_data"
        A new or empty folder.
    kaggle : str, optional
        Instead of a name, the handle `owner/name` of any public data set on Kaggle.
    file : str or Path, optional
        For "pneumoniamnist", where there is no network: `pneumoniamnist_128.npz`, or that of another size,
        fetched elsewhere.

    Returns
    -------
    str
        A table of what came, by split and class. Where it differs from the card, that is said and is no
        error: sets are revised.

    Raises
    ------
    ValueError
        If the set has to be fetched by hand, the arguments are not as above, or what came holds no
        radiographs.
    OSError
        If the output is not empty, the network fails or the extra `download` is not installed; nothing is
        left behind then but the library's own cache, from which the next call goes on.

    Notes
    -----
    kagglehub unpacks archives; only plain files below its folder are copied from there, nothing is run.
    """
    if (name is None) == (kaggle is None) or (file is not None and name != "pneumoniamnist"):
        raise ValueError(f"expected a name ({', '.join(DOWNLOADS)}) or the handle of a Kaggle set, and a "
                         "file that was fetched elsewhere for pneumoniamnist only")
    card = _card(name) if name else next((of for of in CARDS.values() if of.get("kaggle") == kaggle), {})
    if name and name not in DOWNLOADS:
        raise ValueError(f"{name}: has to be fetched by hand: `genailab data cards {name}` says how")
    handle = kaggle or card.get("kaggle")
    if handle and not re.fullmatch(r"\w[\w-]*/\w[\w.-]*", handle):
        raise ValueError(f"{handle}: expected the handle of a Kaggle set, owner/name, as in its address")
    with whole_folder(output) as new:
        try:
            source = Path(file if file is not None else _fetch(handle))
        except Exception as error:  # errors of kagglehub, requests and the system have no common base
            reason = f"{type(error).__name__}: {_flat(str(error))[:160]}"
            page = f"https://www.kaggle.com/datasets/{handle}" if handle else card["url"]
            raise OSError(f"{name or handle}: the download failed ({reason}). It needs a network and `pip "
                          f"install -e '.[download]'`; try again, or by hand: {page}") from error
        if handle:
            _copy(source, new)
        else:
            _unpack(source, new)
    images = index_images(output)
    splits, wanted = images["split"].replace("", "all"), _counts(card)
    found = Counter(zip(splits, images["class"], strict=True))
    warnings = [f"warning: {' '.join(at)}: {found[at]} images, the card says {wanted[at]}"
                for at in wanted | found if wanted and found[at] != wanted[at]]
    table = pd.crosstab(images["class"], splits).to_string()
    return "\n".join([table, *warnings, f"Next: genailab data verify {output}"])


def _fetch(handle: str | None) -> str | Path:
    """Return the folder of a Kaggle set, or else the file of PneumoniaMNIST."""
    if handle:
        from kagglehub import dataset_download
        return dataset_download(handle)
    from medmnist import PneumoniaMNIST
    PneumoniaMNIST("train", download=True, size=128, root=str(cache_folder("medmnist")))
    return cache_folder("medmnist") / "pneumoniamnist_128.npz"


def _unpack(file: Path, target: Path) -> None:
    """Write a file of MedMNIST as images in class folders; nothing in it is run."""
    classes = dict(enumerate(PRESETS["chest"]))
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images = [(f"{split}/{classes[label]}/{split}_{number:04d}.png", pixels) for split in SPLITS
                      for number, (pixels, label) in enumerate(zip(
                          arrays[f"{split}_images"], arrays[f"{split}_labels"].ravel(), strict=True))]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: expected pneumoniamnist_128.npz, images (N, H, W) of 8 bits and labels "
                         f"(N, 1) of 0 and 1 of train, val and test ({_flat(str(error))[:80]})") from error
    for name, pixels in images:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target / name)


def _copy(source: Path, target: Path) -> None:
    """Copy what stands beside and in the splits or classes; of a double copy, one."""
    images = index_images(source)
    depth, placed = images.attrs["depth"], images.index[images["class"] != ""]
    base, wanted = source.joinpath(*placed[0].split("/")[:depth]), {name.split("/")[depth] for name in placed}

    def unwanted(folder: str, names: list[str]) -> list[str]:
        beside = [name for name in names if Path(folder) == base and Path(folder, name).is_dir()
                  and name not in wanted]
        return beside + [name for name in names
                         if name.startswith((".", "__MACOSX")) or Path(folder, name).is_symlink()]

    shutil.copytree(base, target, ignore=unwanted, dirs_exist_ok=True)
