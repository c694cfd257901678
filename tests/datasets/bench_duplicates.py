"""Measure the near-duplicate search beside pHash of imagehash: recall on each edit, false flags, time.

Run by `make bench`. Needs imagehash and the films that GENAILAB_REAL_DATA names: each of 1,124 is edited
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
from PIL import Image

from genailab_helpers.datasets.duplicates import SIDE, find_duplicates
from genailab_helpers.datasets.folders import list_radiographs, read_radiographs

_spec = importlib.util.spec_from_file_location("film_edits", Path(__file__).with_name("film_edits.py"))
assert _spec is not None
assert _spec.loader is not None
film_edits = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(film_edits)

HAMMING = (10, 4)  # bits of 64; the first is the usual default
BAR_FALSE, BAR_SECONDS = .01, 60
COPIED = ("00002658_00", "E63574A7", "F4341CE7")  # copies in the set itself, seen by eye


def ours(files: list[Path]) -> set[tuple[int, int]]:
    """Pairs of rows that this project calls copies."""
    return {pair[:2] for pair in find_duplicates(read_radiographs(files, SIDE)[0])}


def hashed(files: list[Path]) -> np.ndarray:
    """Hamming distances between the pHashes of all files."""
    import imagehash

    bits = np.stack([imagehash.phash(Image.open(file)).hash.ravel() for file in files]).astype(np.int16)
    return (bits[:, None] != bits[None]).sum(-1, dtype=np.int16)


def main() -> int:
    """Print the table; return 1 if a bar is missed."""
    folder = os.environ.get("GENAILAB_REAL_DATA", "")
    if not folder:
        print("skipped: GENAILAB_REAL_DATA names no folder of real films")
        return 0
    if importlib.util.find_spec("imagehash") is None:
        print("skipped: imagehash is not installed; pip install imagehash")
        return 0
    films = list_radiographs(Path(folder) / "covid_1125")
    n_films = len(films)
    with tempfile.TemporaryDirectory() as temporary:
        edited = film_edits.edit_films(films, Path(temporary))
        files = films + [file for _, file in edited]
        start = time.perf_counter()
        ours(films)
        seconds = [time.perf_counter() - start]
        methods = [ours(files)]
        start = time.perf_counter()
        hashed(films)
        seconds += [time.perf_counter() - start] * len(HAMMING)
        distances = hashed(files)
        methods += [set(zip(*np.nonzero(np.triu(distances <= most, 1)), strict=True)) for most in HAMMING]
    true = set(combinations([row for row, film in enumerate(films) if film.stem.startswith(COPIED)], 2))

    print(f"{'':22s}{'films':>6s}{'bar':>6s}{'here':>8s}"
          + "".join(f"{f'pHash<={most}':>11s}" for most in HAMMING))
    missed = False
    for name, (_, bar) in film_edits.EDITS.items():
        rows = [row for row, (edit, _) in enumerate(edited) if edit == name]
        recalls = [sum((row, row + n_films) in found for row in rows) / len(rows) for found in methods]
        missed |= recalls[0] < bar
        print(f"{name:22s}{len(rows):6d}{bar:6.2f}{recalls[0]:8.3f}"
              + "".join(f"{recall:11.3f}" for recall in recalls[1:]))
    false = [len({row for pair in found - true if pair[1] < n_films for row in pair}) / n_films
             for found in methods]
    print(f"{'falsely flagged':22s}{n_films:6d}{BAR_FALSE:6.2f}{false[0]:8.3f}"
          + "".join(f"{share:11.3f}" for share in false[1:]))
    print(f"{'seconds, originals':22s}{n_films:6d}{BAR_SECONDS:6d}{seconds[0]:8.1f}"
          + "".join(f"{s:11.1f}" for s in seconds[1:]))
    return int(missed or false[0] > BAR_FALSE or seconds[0] > BAR_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
