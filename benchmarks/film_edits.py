"""The edits that a near-duplicate search must see through, each defined once for tests and bench."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

Edit = Callable[[Image.Image], Image.Image]


def _levels(change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Make an edit out of a function of the grey levels in [0, 1]."""
    return lambda image: Image.fromarray(np.round(255 * change(np.asarray(image) / 255)).astype(np.uint8))


def _crop(share: float) -> Edit:
    """Cut a share of the width at the left and right, and of the height at the top and bottom."""
    def crop(image: Image.Image) -> Image.Image:
        left, top = round(share * image.width), round(share * image.height)
        return image.crop((left, top, image.width - left, image.height - top))
    return crop


def _rotation(degrees: float) -> Edit:
    return lambda image: image.rotate(degrees, Image.Resampling.BICUBIC)  # what was outside is black


def _shift(share: float) -> Edit:
    """Move to the right and down, each by a share of the side; repeat the first column and row."""
    def shift(image: Image.Image) -> Image.Image:
        right, down = round(share * image.width), round(share * image.height)
        padded = np.pad(np.asarray(image), ((down, 0), (right, 0)), mode="edge")
        return Image.fromarray(padded[:image.height, :image.width])
    return shift


EDITS: dict[str, tuple[Edit, float]] = {  # the edit, the recall asked for
    "JPEG quality 30": (lambda image: image, .95),
    "resize to half": (lambda image: image.resize((image.width // 2, image.height // 2)), .95),  # bicubic
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


def edit_images(files: Sequence[str | Path], folder: Path, names: Sequence[str] = tuple(EDITS),
                known: dict[str, tuple[Edit, float]] = EDITS) -> list[str]:
    """Edit each image once, at its stored resolution, with the named edits in turn.

    Returns the name of the edit of each; the new files are numbered, in their order.
    """
    edits = [names[k % len(names)] for k in range(len(files))]
    folder.mkdir(parents=True, exist_ok=True)
    for k, (file, name) in enumerate(zip(files, edits, strict=True)):
        with Image.open(file) as image:
            suffix = ".jpg" if name.startswith("JPEG") else ".png"
            known[name][0](image.convert("L")).save(folder / f"{k:05d}{suffix}", quality=30)
    return edits
