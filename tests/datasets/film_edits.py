"""The edits that a near-duplicate search must see through, each defined once for tests and bench."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIX = {"JPEG quality 30": ".jpg"}  # the other edits are stored without loss


def _levels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Image.Image], Image.Image]:
    """Make an edit out of a function of the grey levels in [0, 1]."""
    return lambda film: Image.fromarray(np.round(255 * change(np.asarray(film) / 255)).astype(np.uint8))


def _crop(share: float) -> Callable[[Image.Image], Image.Image]:
    """Cut a share of the width at the left and right, and of the height at the top and bottom."""
    def crop(film: Image.Image) -> Image.Image:
        left, top = round(share * film.width), round(share * film.height)
        return film.crop((left, top, film.width - left, film.height - top))
    return crop


def _half(film: Image.Image) -> Image.Image:
    return film.resize((film.width // 2, film.height // 2), Image.Resampling.BICUBIC)


def _rotation(degrees: float) -> Callable[[Image.Image], Image.Image]:
    return lambda film: film.rotate(degrees, Image.Resampling.BICUBIC)  # what was outside is black


def _shift(share: float) -> Callable[[Image.Image], Image.Image]:
    """Move to the right and down, each by a share of the side; repeat the first column and row."""
    def shift(film: Image.Image) -> Image.Image:
        right, down = round(share * film.width), round(share * film.height)
        padded = np.pad(np.asarray(film), ((down, 0), (right, 0)), mode="edge")
        return Image.fromarray(padded[:film.height, :film.width])
    return shift


EDITS: dict[str, tuple[Callable[[Image.Image], Image.Image], float]] = {  # the edit, the recall asked for
    "JPEG quality 30": (lambda film: film, .95),
    "resize to half": (_half, .95),
    "gamma 0.7": (_levels(lambda level: level ** .7), .95),
    "gamma 1.5": (_levels(lambda level: level ** 1.5), .95),
    "contrast 0.6": (_levels(lambda level: level.mean() + .6 * (level - level.mean())), .95),
    "crop 4 %": (_crop(.04), .95),
    "rotation 3 degrees": (_rotation(3), .95),
    "shift 5 %": (_shift(.05), .95),
    "flip": (ImageOps.mirror, .95),
    "inversion": (ImageOps.invert, .95),
    "equalisation": (ImageOps.equalize, .80),
    "crop 10 %": (_crop(.10), .80),
    "rotation 10 degrees": (_rotation(10), .80),
}


def edit_films(films: Sequence[Path], folder: Path, first_edit: int = 0) -> list[tuple[str, Path]]:
    """Edit each film once, at its stored resolution, with the edits of the table in turn.

    Returns the name of the edit and the new file for each film; the k-th film gets edit `first_edit + k`,
    counted round the table.
    """
    names, edited = list(EDITS), []
    for k, film in enumerate(films):
        name = names[(first_edit + k) % len(names)]
        file = folder / f"{k:05d}{SUFFIX.get(name, '.png')}"
        with Image.open(film) as image:
            EDITS[name][0](image.convert("L")).save(file, quality=30)
        edited.append((name, file))
    return edited
