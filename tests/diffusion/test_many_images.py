"""A folder of 100,000 images trains in the memory of one of 1,000."""

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from genailab_helpers.phantoms.chest import render_chests, sample_chests

TRAIN = """
    import resource, sys
    import torch
    from torch.utils.data import DataLoader
    from genailab_helpers.diffusion.datasets import ChestXRayDataset
    from genailab_helpers.diffusion.training import train_image_diffusion
    torch.set_num_threads(1)
    images = ChestXRayDataset(sys.argv[1], 64, labels=True)
    loader = DataLoader(images, batch_size=16, shuffle=True, drop_last=True)
    train_image_diffusion(loader, 64, n_steps=12, num_classes=2, progress=False)
    print(len(images), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_images(root: Path, n_images: int) -> Path:
    """Write images of two classes and three a patient; 200 of them differ."""
    contents = []
    chests = render_chests(sample_chests(200, 1), 64).images[:, 0]
    for levels in ((chests + 1) * 127.5).round().byte().numpy():
        png = io.BytesIO()
        Image.fromarray(levels).save(png, "PNG")
        contents.append(png.getvalue())
    for i in range(n_images):
        path = root / ("Normal", "COVID")[i % 2] / f"person{i // 3}_virus_{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[i % 200])
    return root


def train(root: Path, cache: Path) -> tuple[int, int]:
    """Train in a new process; return how many images it had, and its peak memory."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(TRAIN), str(root)], capture_output=True,
                          text=True, check=False, env={**os.environ, "GENAILAB_CACHE": str(cache)})
    assert done.returncode == 0, done.stderr
    n_images, peak = map(int, done.stdout.split())
    return n_images, peak


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource exists on POSIX only")
def test_peak_memory_is_that_of_a_thousand_images(tmp_path):
    n_images, peak_of_few = train(write_images(tmp_path / "few", 1000), tmp_path / "cache")
    assert n_images == 1000
    many = write_images(tmp_path / "many", 100_000)
    n_images, peak = train(many, tmp_path / "cache")
    assert n_images == 100_000
    assert peak < 1.1 * peak_of_few
    # all of it was decoded: 4,096 pixels and a checksum of 4 each
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.u8")) == 101_000 * (4096 + 4)
