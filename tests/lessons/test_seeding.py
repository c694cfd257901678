"""One start makes a lesson repeatable."""

import os
import random
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from genailab_helpers.lessons import start_lesson

TRAINING = """
import genailab_helpers, torch
from genailab_helpers.lessons import start_lesson
generator = start_lesson(seed=3)
images = torch.randn(16, 1, 32, 32, generator=generator)
network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(),
                              torch.nn.Linear(8 * 30 * 30, 1))
optimiser = torch.optim.SGD(network.parameters(), lr=1e-3)
for _ in range(5):
    optimiser.zero_grad()
    loss = network(images).square().mean()
    loss.backward()
    optimiser.step()
print(torch.get_num_threads(), images.sum().item(), loss.item())
"""


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """Undo the global state that a lesson's start sets on purpose."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with mpl.rc_context(), torch.random.fork_rng(), threadpool_limits():
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def drawn(seed):
    generator = start_lesson(seed)
    return (torch.rand(3, generator=generator).tolist(), torch.rand(3).tolist(), np.random.rand(3).tolist(),
            random.random(), torch.nn.Linear(2, 2).weight.tolist())


def test_the_same_seed_gives_the_same_numbers_everywhere_and_another_seed_others():
    first, again, other = drawn(1), drawn(1), drawn(2)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.slow  # two fresh interpreters import torch
def test_training_is_the_same_with_one_thread_and_with_two():
    runs = {}
    for threads in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, check=True,
                              env=os.environ | {"OMP_NUM_THREADS": threads})
        used, *runs[threads] = map(float, done.stdout.split())
        assert used == float(threads)
        assert done.stderr == ""
    assert runs["1"][0] == runs["2"][0]  # what is drawn is equal to the last bit
    assert runs["1"][1] == pytest.approx(runs["2"][1], rel=1e-5)  # sums may be taken in another order


def test_algorithms_are_deterministic_and_threads_limited():
    threadpool_limits(2)
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 does
    start_lesson()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 1
    assert {pool["num_threads"] for pool in threadpool_info()} == {1}


def test_no_letter_of_the_house_style_is_below_ten_points():
    start_lesson()
    sizes = {name: mpl.font_manager.FontProperties(size=value).get_size_in_points()
             for name, value in mpl.rcParams.items() if name.endswith(("size", "fontsize"))
             and ("label" in name or "title" in name or "font" in name)}
    assert len(sizes) >= 7
    assert min(sizes.values()) >= 10, sizes


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_what_cannot_be_a_seed_is_refused(seed):
    with pytest.raises(ValueError, match="Seed"):
        start_lesson(seed)
