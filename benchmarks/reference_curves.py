"""Measure the curves that lesson 2 shows where no real films are at hand.

    python benchmarks/reference_curves.py FOLDER_OF_FILMS "where they are from"

Writes data/samples/reference_curves.json: averages over films, from which no film can be told.
"""

import json
import sys
from pathlib import Path

import numpy as np

from genailab_helpers.checkpoints import whole_file
from genailab_helpers.datasets.folders import read_images
from genailab_helpers.datasets.index import index_images
from genailab_helpers.diffusion.evaluation import radial_spectrum

TARGET = Path(__file__).parents[1] / "data" / "samples" / "reference_curves.json"
IMG_SIZE = 128
N_BINS = 40


def main(folder: str, source: str) -> None:
    """Measure all films of a folder."""
    films, _ = read_images(index_images(folder), IMG_SIZE)
    frequencies, log_power = radial_spectrum(films)
    share, edges = np.histogram(films.numpy(), bins=N_BINS, range=(-1, 1))
    curves = {
        "source": source, "n_films": len(films), "img_size": IMG_SIZE,
        "frequencies": frequencies.tolist(), "log_power": np.round(log_power, 4).tolist(),
        "grey_edges": np.round(edges, 4).tolist(), "grey_share": np.round(share / films.numel(), 6).tolist(),
        "mean": round(float(films.mean()), 4), "spread": round(float(films.std()), 4),
        "spread_of_means": round(float(films.mean(dim=(1, 2, 3)).std()), 4),
    }
    with whole_file(TARGET) as temporary:
        temporary.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
