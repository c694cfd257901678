"""Measure the near-duplicate search beside pHash of imagehash: recall on each edit, false flags, time.

Run by `make bench`. Needs imagehash and the images that GENAILAB_REAL_DATA names: each of 1,124 is edited
once, then copies and originals are compared. A row of the table is an edit, a column a method.
"""

import importlib.util
import os
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from film_edits import EDITS, edit_images
from PIL import Image

from genailab_helpers.datasets.duplicates import SIDE, find_duplicates
from genailab_helpers.datasets.folders import read_images
from genailab_helpers.datasets.index import index_images

HAMMING = (10, 4)  # bits of 64; the first is the usual default
BAR_FALSE, BAR_SECONDS = .01, 60
COPIED = ("00002658_00", "E63574A7", "F4341CE7")  # copies in the set itself, seen by eye


def ours(images: torch.Tensor) -> set[tuple[int, int]]:
    """Pairs of rows that this project calls copies."""
    return {pair[:2] for pair in find_duplicates(images)}


def hashed(files: list[str]) -> np.ndarray:
    """Hamming distances between the pHashes of all files."""
    import imagehash

    bits = np.stack([imagehash.phash(Image.open(file)).hash.ravel() for file in files]).astype(np.int16)
    return (bits[:, None] != bits[None]).sum(-1, dtype=np.int16)


def main() -> int:
    """Print the table; return 1 if a bar is missed."""
    folder = os.environ.get("GENAILAB_REAL_DATA", "")
    if not folder:
        print("skipped: GENAILAB_REAL_DATA names no folder of real images")
        return 0
    if importlib.util.find_spec("imagehash") is None:
        print("skipped: imagehash is not installed; pip install imagehash")
        return 0
    images = index_images(Path(folder) / "covid_1125")
    n_images = len(images)
    with tempfile.TemporaryDirectory() as temporary:
        edits = edit_images(images["path"], Path(temporary))
        edited = index_images(temporary)
        os.environ["GENAILAB_CACHE"] = str(Path(temporary, "cache"))  # all are decoded anew
        start = time.perf_counter()
        batch = read_images(images, SIDE)[0]
        ours(batch)
        seconds = [time.perf_counter() - start]
        methods = [ours(torch.cat([batch, read_images(edited, SIDE)[0]]))]
        start = time.perf_counter()
        hashed(images["path"].tolist())
        seconds += [time.perf_counter() - start] * len(HAMMING)
        distances = hashed([*images["path"], *edited["path"]])
        methods += [set(zip(*np.nonzero(np.triu(distances <= most, 1)), strict=True)) for most in HAMMING]
    copied = [row for row, name in enumerate(images.index) if Path(name).stem.startswith(COPIED)]
    true = set(combinations(copied, 2))

    print(f"{'':22s}{'images':>6s}{'bar':>6s}{'here':>8s}"
          + "".join(f"{f'pHash<={most}':>11s}" for most in HAMMING))
    missed = False
    for name, (_, bar) in EDITS.items():
        rows = [row for row, edit in enumerate(edits) if edit == name]
        recalls = [sum((row, row + n_images) in found for row in rows) / len(rows) for found in methods]
        missed |= recalls[0] < bar
        print(f"{name:22s}{len(rows):6d}{bar:6.2f}{recalls[0]:8.3f}"
              + "".join(f"{recall:11.3f}" for recall in recalls[1:]))
    false = [len({row for pair in found - true if pair[1] < n_images for row in pair}) / n_images
             for found in methods]
    print(f"{'falsely flagged':22s}{n_images:6d}{BAR_FALSE:6.2f}{false[0]:8.3f}"
          + "".join(f"{share:11.3f}" for share in false[1:]))
    print(f"{'seconds, originals':22s}{n_images:6d}{BAR_SECONDS:6d}{seconds[0]:8.1f}"
          + "".join(f"{s:11.1f}" for s in seconds[1:]))
    return int(missed or false[0] > BAR_FALSE or seconds[0] > BAR_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
