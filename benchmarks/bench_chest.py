"""Measure processor time and memory of chest phantoms of 128 px beside flat ellipses painted in a loop.

Run by `make bench`. Time is compared in turns within one process, on one thread, and the least of the turns
counts, because other load on the machine only ever adds.
"""

import os
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from genailab_helpers.diffusion.datasets import SyntheticXRayDataset
from genailab_helpers.phantoms.chest import render_chests, sample_chests
from genailab_helpers.phantoms.spine import render_spines, sample_spines

N_IMAGES, TURNS = 150, 5
RATIO_BAR, MASKS_BAR, SPINES_BAR, BYTES_BAR = 1.0, 1.5, 1.0, 2**30


def paint(rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """Paint one chest as flat ellipses and stripes, with blur and noise: the yardstick."""
    y, x = np.mgrid[:size, :size] / size
    image = np.full((size, size), 0.7)

    def ellipse(cx: float, cy: float, a: float, b: float, value: float) -> None:
        image[((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1] = value

    for side in (-1, 1):
        ellipse(0.5 + side * rng.uniform(0.17, 0.22), rng.uniform(0.45, 0.52), rng.uniform(0.11, 0.15),
                rng.uniform(0.25, 0.32), rng.uniform(0.2, 0.35))
    ellipse(rng.uniform(0.52, 0.58), rng.uniform(0.55, 0.62), rng.uniform(0.1, 0.14),
            rng.uniform(0.1, 0.14), 0.75)
    for k in range(8):
        for _ in (-1, 1):
            image[np.abs(y - (0.25 + 0.07 * k + 0.3 * (x - 0.5) ** 2)) < 0.008] += 0.05
    image[np.abs(x - 0.5) < 0.03] += 0.1
    for _ in (-1, 1):
        image[np.abs(y - (0.2 + 0.2 * np.abs(x - 0.5))) < 0.01] += 0.05
    spectrum = np.fft.rfft2(image + rng.normal(0, 0.02, image.shape))
    kernel = np.exp(-(np.fft.fftfreq(size)[:, None] ** 2 + np.fft.rfftfreq(size) ** 2) * 20)
    return np.clip(np.fft.irfft2(spectrum * kernel), 0, 1) * 2 - 1


def milliseconds(work: Callable[[], object]) -> float:
    """Return the processor time of some work, an image."""
    begin = time.process_time()
    work()
    return (time.process_time() - begin) * 1000 / N_IMAGES


def main() -> int:
    """Compare with the bars."""
    torch.set_num_threads(1)
    works: dict[str, Callable[[], object]] = {
        "painted": lambda: [paint(np.random.default_rng(i)) for i in range(N_IMAGES)],
        "phantoms": lambda: SyntheticXRayDataset(N_IMAGES, 128, seed=2),
        "with masks": lambda: render_chests(sample_chests(N_IMAGES, 2), 128, masks=True),
        "spines": lambda: render_spines(sample_spines(N_IMAGES, 2), 128)}
    SyntheticXRayDataset(30, 128)  # imports and first calls are not what is measured
    turns = [{name: milliseconds(work) for name, work in works.items()} for _ in range(TURNS)]
    best = {name: min(turn[name] for turn in turns) for name in works}
    render_chests(sample_chests(1000), 128)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{N_IMAGES} images, least of {TURNS} turns, {os.cpu_count()} processors, "
          f"load {os.getloadavg()[0]:.1f}")
    for name, value in best.items():
        print(f"  {name:10s} {value:5.2f} ms an image")
    results = [("phantoms beside painted ellipses", best["phantoms"] / best["painted"], RATIO_BAR),
               ("masks beside no masks", best["with masks"] / best["phantoms"], MASKS_BAR),
               ("spines beside chests", best["spines"] / best["phantoms"], SPINES_BAR),
               ("GiB for 1,000 images", memory / 2**30, BYTES_BAR / 2**30)]
    for name, value, bar in results:
        print(f"  {'met   ' if value <= bar else 'MISSED'}  {name:34s} {value:5.2f}   at most {bar:.2f}")
    return int(any(value > bar for _, value, bar in results))


if __name__ == "__main__":
    sys.exit(main())
