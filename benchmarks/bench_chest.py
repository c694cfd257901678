"""Measure time and memory of 1,000 phantoms of 128 px, beside ellipses painted in a Python loop.

Run by `make bench`. Each measurement has its own process; of three the best counts, because other load on the
machine only ever adds. The loop is a simple version of such drawings of our own: flat ellipses, no physics.
"""

import os
import resource
import subprocess
import sys
import time

import numpy as np
import torch

N_FILMS, IMG_SIZE, N_THREADS, REPEATS = 1000, 128, 2, 3
SECONDS_BAR, SECONDS_AIM, BYTES_BAR = 2.5, 1.0, 2**30
NOISE = 1.1  # the best of three still differs by a tenth from run to run


def phantoms() -> None:
    """Draw the films."""
    from genailab_helpers.phantoms.chest import render_chests, sample_chests

    render_chests(sample_chests(N_FILMS), IMG_SIZE)


def ellipses() -> None:
    """Paint flat lungs, a heart, ribs and a spine, film by film."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:IMG_SIZE, 0:IMG_SIZE] / IMG_SIZE
    films = []
    for _ in range(N_FILMS):
        film = np.full((IMG_SIZE, IMG_SIZE), 0.2)
        shapes = [(0.3, 0.5, 0.14, 0.3, -0.7), (0.7, 0.5, 0.14, 0.3, -0.7),
                  (0.55, 0.6, 0.12, 0.14, 0.5), (0.5, 0.5, 0.03, 0.5, 0.6)]
        for cx, cy, width, height, grey in shapes:
            cx, cy, width, height = np.array([cx, cy, width, height]) * generator.normal(1, 0.05, 4)
            film[((x - cx) / width) ** 2 + ((y - cy) / height) ** 2 < 1] = grey
        for rib in range(8):
            film[np.abs(y - 0.2 - 0.08 * rib - 0.3 * (x - 0.5) ** 2) < 0.008] += 0.2
        film = film + generator.normal(0, 0.03, film.shape)
        films.append(torch.from_numpy(film.clip(-1, 1)).float()[None])
    torch.stack(films)


def measure(name: str) -> None:
    """Print wall seconds, processor seconds and the peak of memory of one run in this process."""
    torch.set_num_threads(N_THREADS)
    from genailab_helpers.phantoms.chest import render_chests, sample_chests

    render_chests(sample_chests(2), IMG_SIZE)  # imports and first calls are not what is measured
    wall, processor = time.perf_counter(), time.process_time()
    {"phantoms": phantoms, "ellipses": ellipses}[name]()
    unit = 1 if sys.platform == "darwin" else 1024
    print(time.perf_counter() - wall, time.process_time() - processor,
          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def main() -> int:
    """Run both in turn and compare with the bars."""
    results: dict[str, list[list[float]]] = {"phantoms": [], "ellipses": []}
    for _ in range(REPEATS):
        for name, runs in results.items():
            printed = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True,
                                     check=True)
            runs.append([float(word) for word in printed.stdout.split()])
    best = {name: np.min(runs, axis=0) for name, runs in results.items()}
    print(f"{N_FILMS} films of {IMG_SIZE} px, {N_THREADS} threads, best of {REPEATS}, "
          f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    for name, (wall, processor, memory) in best.items():
        print(f"  {name:9s} {wall:6.2f} s, {processor:6.2f} s of processor time, {memory / 2**20:5.0f} MiB")
    wall, _, memory = best["phantoms"]
    print(f"  bar {SECONDS_BAR} s (aim {SECONDS_AIM} s) and {BYTES_BAR / 2**20:.0f} MiB")
    return int(wall > SECONDS_BAR * NOISE or memory > BYTES_BAR)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        sys.exit(main())
