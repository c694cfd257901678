"""A card about each public X-ray set, and the download of those that need no account."""

import re
import shutil
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
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
        numbers = {key: sum(sum(split.values()) for split in card.get("counts", {}).values())
                   for key, card in CARDS.items()}
        rows = [[f"`{key}`", card["title"], card["modality"], f"{numbers[key]:,}" if numbers[key] else "",
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


def _flat(text: str) -> str:
    return " ".join(text.split())


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(_flat(f"| {' | '.join(row)} |") for row in [header, ["---"] * len(header), *rows])


def _card(name: str) -> dict[str, Any]:
    if name not in CARDS:
        raise ValueError(f"{name}: no card of that name; expected one of {', '.join(CARDS)}")
    return CARDS[name]


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
        If the set has to be fetched by hand (the message holds the steps), the arguments are not as above,
        the extra `download` is not installed, or what came holds no radiographs.
    OSError
        If the output is not empty or the network fails; nothing is left behind then but the library's own
        cache, from which the next call goes on.

    Notes
    -----
    kagglehub unpacks archives; only plain files below its folder are copied from there, nothing is run.
    """
    if file is not None and name != "pneumoniamnist":
        raise ValueError("a file that was fetched elsewhere is taken for pneumoniamnist only")
    if (name is None) == (kaggle is None):
        raise ValueError(f"expected either a name ({', '.join(DOWNLOADS)}) or the handle of a Kaggle set")
    by_handle = {card.get("kaggle"): card for card in CARDS.values()}
    card = _card(name) if name else by_handle.get(kaggle, {})
    if name and name not in DOWNLOADS:
        steps = "\n".join(f"  {i}. {step}" for i, step in enumerate(card["access"], 1))
        raise ValueError(f"{name}: has to be fetched by hand, from {card['url']}\n{steps}")
    handle, output = kaggle or card.get("kaggle"), Path(output)
    if handle and not re.fullmatch(r"\w[\w-]*/\w[\w.-]*", handle):
        raise ValueError(f"{handle}: expected the handle of a Kaggle set, owner/name, as in its address")
    by_hand = (f"get https://www.kaggle.com/datasets/{handle}, unzip it into {output}, then "
               f"`genailab data verify {output}`" if handle else
               f"get pneumoniamnist_128.npz from {card['url']}, then "
               "`genailab data download pneumoniamnist --from pneumoniamnist_128.npz`")
    fetched: Any = _unpack(Path(file)) if file is not None else None
    with whole_folder(output) as new:
        try:
            source = fetched or _fetch(handle)
        except ImportError as error:
            raise ValueError(f"{name or handle}: {error.name} is missing, `pip install -e '.[download]'`; "
                             f"or by hand: {by_hand}") from error
        except Exception as error:  # errors of kagglehub, requests and the system have no common base
            reason = f"{type(error).__name__}: {_flat(str(error))[:160]}"
            raise OSError(f"{name or handle}: the download failed ({reason}); try again, "
                          f"or by hand: {by_hand}") from error
        if handle:
            _copy(Path(source), new)
        else:
            _write(source, new)
    images = index_images(output)
    table = pd.crosstab(images["class"], images["split"].replace("", "all"))
    found, wanted = ({(split, label): n for split, of in counts.items() for label, n in of.items()}
                     for counts in (table, card.get("counts", {})))
    warnings = [f"warning: {' '.join(at)}: {found.get(at, 0)} images, the card says {wanted.get(at, 0)}"
                for at in {**wanted, **found} if card and found.get(at, 0) != wanted.get(at, 0)]
    return "\n".join([table.to_string(), *warnings, f"Next: genailab data verify {output}"])


def _fetch(handle: str | None) -> Any:
    """Return the folder of a Kaggle set, or else the three splits of PneumoniaMNIST."""
    if handle:
        from kagglehub import dataset_download
        return dataset_download(handle)
    from medmnist import PneumoniaMNIST
    return [PneumoniaMNIST(split, download=True, size=128, root=str(cache_folder("medmnist")))
            for split in SPLITS]


def _unpack(file: Path) -> list[SimpleNamespace]:
    """Read the three splits from a file of MedMNIST; nothing in it is run."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            splits = [SimpleNamespace(split=split, imgs=arrays[f"{split}_images"],
                                      labels=arrays[f"{split}_labels"]) for split in SPLITS]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: expected pneumoniamnist_128.npz, images and labels of train, val and "
                         f"test ({_flat(str(error))[:80]})") from error
    for part in splits:
        if part.imgs.dtype != np.uint8 or part.imgs.ndim != 3 or part.labels.shape != (len(part.imgs), 1) \
                or not np.isin(part.labels, (0, 1)).all():
            raise ValueError(f"{file}: {part.split}: expected grey images (N, H, W) of 8 bits and labels "
                             f"(N, 1) of 0 and 1, got {part.imgs.dtype} {part.imgs.shape} and "
                             f"{part.labels.shape}")
    return splits


def _write(splits: list[Any], target: Path) -> None:
    """Write PneumoniaMNIST as images in class folders."""
    for part in splits:
        for number, (pixels, label) in enumerate(zip(part.imgs, part.labels.ravel(), strict=True)):
            file = target / part.split / PRESETS["chest"][label] / f"{part.split}_{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)


def _copy(source: Path, target: Path) -> None:
    """Copy what stands beside and in the splits or classes; of a double copy, one."""
    images = index_images(source)
    placed = images[images["class"] != ""]
    base = source.joinpath(*placed.index[0].split("/")[:images.attrs["depth"]])
    wanted = {name.split("/")[images.attrs["depth"]] for name in placed.index}

    def unwanted(folder: str, names: list[str]) -> set[str]:
        return {name for name in names
                if name.startswith((".", "__MACOSX")) or Path(folder, name).is_symlink()}

    for path in base.iterdir():
        if path.is_dir() and path.name in wanted:
            shutil.copytree(path, target / path.name, ignore=unwanted)
        elif path.is_file() and not (path.is_symlink() or path.name.startswith(".")):
            shutil.copyfile(path, target / path.name)
