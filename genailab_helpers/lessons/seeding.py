"""One call at the head of every lesson: the same numbers and the same look on every run."""

import os
import random

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from genailab_helpers.lessons.figures import set_house_style


def start_lesson(seed: int = 0) -> torch.Generator:
    """Make a notebook repeatable and give it the house style of figures.

    This is the one place that sets global state, and it does so openly: the seeds of Python, NumPy and torch
    (a new network draws its weights from torch's global generator), torch's deterministic algorithms, the
    number of threads (two each for torch, NumPy, SciPy and scikit-learn, fewer where the machine or
    `OMP_NUM_THREADS` allows fewer), and the defaults of matplotlib.

    Parameters
    ----------
    seed : int, default 0
        Seed of every generator, from 0 to 2**32 - 1.

    Returns
    -------
    torch.Generator
        A generator on the CPU, seeded with `seed`, to hand to functions that draw random numbers.

    Raises
    ------
    ValueError
        If `seed` is out of range.
    """
    np.random.seed(seed)  # refuses a seed that is out of range
    random.seed(seed)
    torch.manual_seed(seed)
    n_threads = min(2, torch.get_num_threads())
    torch.set_num_threads(n_threads)
    threadpool_limits(n_threads)  # of BLAS and OpenMP: neither numbers nor times should depend on many cores
    # A GPU needs this for deterministic matrix products. Some of its backward passes have no deterministic
    # form: there a warning tells, and the lesson goes on.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    set_house_style()
    return torch.Generator().manual_seed(seed)
