"""Measure the time and the memory of 1,000 spines of 128 px.

Run by `make bench`. Each measurement has its own process; of three the best counts, because other load on the
machine only ever adds.
"""

import os
import resource
import subprocess
import sys
import time

import numpy as np
import torch

N_IMAGES, IMG_SIZE, N_THREADS, REPEATS = 1000, 128, 2, 3
SECONDS_BAR, BYTES_BAR = 3.0, 2**30
NOISE = 1.1  # the best of three still differs by a tenth from run to run


def measure() -> None:
    """Print wall seconds, processor seconds and the peak of memory of one run in this process."""
    torch.set_num_threads(N_THREADS)
    from genailab_helpers.phantoms.spine import render_spines, sample_spines

    render_spines(sample_spines(2), IMG_SIZE)  # imports and first calls are not what is measured
    wall, processor = time.perf_counter(), time.process_time()
    render_spines(sample_spines(N_IMAGES), IMG_SIZE)
    unit = 1 if sys.platform == "darwin" else 1024
    print(time.perf_counter() - wall, time.process_time() - processor,
          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def main() -> int:
    """Measure, and compare with the bars."""
    runs = []
    for _ in range(REPEATS):
        printed = subprocess.run([sys.executable, __file__, "measure"], capture_output=True, text=True,
                                 check=True)
        runs.append([float(word) for word in printed.stdout.split()])
    wall, processor, memory = np.min(runs, axis=0)
    print(f"{N_IMAGES} spines of {IMG_SIZE} px, {N_THREADS} threads, best of {REPEATS}, "
          f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(f"  {wall:6.2f} s, {processor:6.2f} s of processor time, {memory / 2**20:5.0f} MiB")
    print(f"  bar {SECONDS_BAR} s and {BYTES_BAR / 2**20:.0f} MiB")
    return int(wall > SECONDS_BAR * NOISE or memory > BYTES_BAR)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure()
    else:
        sys.exit(main())
