"""Shared by the tests of data sets: a cache of each test's own, and small images written in one call."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder for the cache that does not exist yet, outside of the test's own."""
    folder = tmp_path_factory.mktemp("own") / "cache"
    monkeypatch.setenv("GENAILAB_CACHE", str(folder))
    return folder


def write_image(path: Path, image: np.ndarray | torch.Tensor) -> Path:
    """Write levels of 0 to 255, or a radiograph `(1, H, W)` in [-1, 1], as its suffix says or as PNG."""
    levels = ((image[0] + 1) * 127.5).round().numpy() if isinstance(image, torch.Tensor) else image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels.astype(np.uint8)).save(
        path, Image.registered_extensions().get(path.suffix.lower(), "PNG"))
    return path


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    """Give the function that writes one image."""
    return write_image


@pytest.fixture(scope="session")
def put() -> Callable[..., Path]:
    """Give the function that writes images of random pixels, each another, below a folder."""
    def put(root: Path, *names: str, seed: int = 0, side: int = 32) -> Path:
        for number, name in enumerate(names):
            write_image(root / name, np.random.default_rng([seed, number]).integers(0, 256, (side, side)))
        return root

    return put
