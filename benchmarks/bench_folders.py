"""Measure how long images take to arrive: RadiographFolder beside ImageFolder and MONAI's PersistentDataset.

Run by `make bench`. Writes 1,000 JPEGs of 1,500 px into a temporary folder, then times all in one run:
the first epoch (for RadiographFolder with its construction, which fills an empty cache) and a later one. One
thread does all the work, and it is counted in seconds of processor time: other load then matters little.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import genailab_helpers  # noqa: F401  (before torchvision)

N_IMAGES, SIDE, IMG_SIZE, DISTINCT = 1000, 1500, 64, 8
FIRST_BAR, LATER_BAR = 2, 20  # times as fast as ImageFolder
NOISE = 2.5  # levels; a file then has .13 bytes a pixel, as the untouched images of Kermany's set


def write_images(root: Path) -> None:
    """Write smooth, slightly noisy images, of which a few differ."""
    generator = np.random.default_rng(0)
    contents = []
    for _ in range(DISTINCT):
        coarse = Image.fromarray(generator.random((12, 12), dtype=np.float32)).resize((SIDE, SIDE))
        noisy = 200 * np.asarray(coarse) + 25 + generator.normal(0, NOISE, (SIDE, SIDE))
        stream = BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        contents.append(stream.getvalue())
    for number in range(N_IMAGES):
        folder = root / ("NORMAL", "PNEUMONIA")[number % 2]
        folder.mkdir(exist_ok=True, parents=True)
        (folder / f"{number:04d}.jpeg").write_bytes(contents[number % DISTINCT])


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def epoch(dataset: object) -> None:
    from torch.utils.data import DataLoader

    for _ in DataLoader(dataset, batch_size=32):  # type: ignore[arg-type]
        pass


def measure(root: Path) -> dict[str, tuple[float, float]]:
    """Return seconds of the first and of a later epoch, by the name of the data set."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Grayscale, Normalize, Resize, ToTensor

    from genailab_helpers.datasets.folders import RadiographFolder

    usual = Compose([Grayscale(), Resize((IMG_SIZE, IMG_SIZE)), ToTensor(), Normalize(0.5, 0.5)])
    plain = ImageFolder(root, usual)
    times = {"torchvision ImageFolder": (seconds(lambda: epoch(plain)), seconds(lambda: epoch(plain)))}

    made: list[RadiographFolder] = []
    first = seconds(lambda: (made.append(RadiographFolder(root, IMG_SIZE)), epoch(made[0])))
    times["RadiographFolder"] = first, seconds(lambda: epoch(made[0]))
    known = seconds(lambda: epoch(RadiographFolder(root, IMG_SIZE)))
    times["RadiographFolder, cache filled before"] = known, times["RadiographFolder"][1]

    try:
        from monai.data import PersistentDataset
    except ImportError:
        print('MONAI is not installed: its row is left out (pip install "genailab-helpers[bench]" brings it)')
    else:
        def read(path: str) -> object:
            return usual(Image.open(path))

        stored = PersistentDataset([path for path, _ in plain.samples], read, cache_dir=root.parent / "monai")
        times["MONAI PersistentDataset"] = seconds(lambda: epoch(stored)), seconds(lambda: epoch(stored))
    return times


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GENAILAB_CACHE"] = str(Path(folder) / "cache")
        torch.set_num_threads(1)
        write_images(Path(folder) / "images")
        times = measure(Path(folder) / "images")
    print(f"{N_IMAGES} JPEGs of {SIDE} px to {IMG_SIZE} px, no worker processes; processor seconds")
    base = times["torchvision ImageFolder"]
    for name, (first, later) in times.items():
        print(f"{name:40s} first epoch {first:7.2f} ({base[0] / first:6.1f}x)   "
              f"later {later:7.3f} ({base[1] / later:6.1f}x)")
    ours = times["RadiographFolder"]
    met = base[0] / ours[0] >= FIRST_BAR and base[1] / ours[1] >= LATER_BAR
    print(f"bars {FIRST_BAR}x and {LATER_BAR}x: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
