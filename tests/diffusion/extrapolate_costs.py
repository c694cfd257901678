"""What larger films and the whole of the Kermany set would cost: `docs/costs.md`, from steps measured here.

python tests/diffusion/extrapolate_costs.py        (a minute or two on 2 quiet cores)

What a model needs is taken from the longest training of `docs/peers.json`: it saw each film so many times.
"""

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from compare_peers import machine

from genailab_helpers.diffusion.training import train_image_diffusion
from genailab_helpers.storage import whole_file

DOCS = Path(__file__).parents[2] / "docs"
SIZES = (64, 128, 256)
STEPS, BATCH_SIZE = 8, 16
FILMS = 5216  # of the training part of the set by Kermany et al. 2018
# Karras et al. 2022, table of the repository NVlabs/edm: 200 million films of 64x64 in about 4 days on 8 V100
# cards, for a network of 62 million weights
PUBLISHED = 200e6 / (4 * 86400 * 8)  # films a second and card


class Watched:
    """Batches of noise, and when each of them was asked for."""

    def __init__(self, img_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = torch.rand((BATCH_SIZE, 1, img_size, img_size), generator=generator) * 2 - 1
        self.times: list[float] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(STEPS):
            self.times.append(time.monotonic())
            yield self.batch


def seconds_a_step(img_size: int) -> float:
    """Return the median time of a step, without the first two, which warm up."""
    watched = Watched(img_size)
    train_image_diffusion(watched, img_size, n_steps=STEPS, progress=False)
    return statistics.median(b - a for a, b in itertools.pairwise(watched.times[-STEPS + 2:]))


def page(seconds: dict[int, float], passes: float, minutes: float) -> str:
    """Write the page: measured seconds of a step by size, and what follows if that many passes are needed."""
    lines = [
        "# What larger films cost", "",
        f"Made by `python tests/diffusion/extrapolate_costs.py` on {datetime.now(UTC).date()}; {machine()}. "
        f"**Only the seconds a step are measured; all else is an estimate.** In {minutes:g} minutes the "
        f"engine saw each film of [the comparison with its peers](peers.md) {passes:.0f} times. The table "
        f"asks what as many passes over the {FILMS:,} training films of Kermany et al. 2018 take. "
        "Whether larger films need more passes or a larger network, it does not know.", "",
        f"| film | seconds a step of {BATCH_SIZE} films, measured | hours on 2 cores, estimated | hours on "
        "one graphics card with a network of 62 M weights, estimated |",
        "|---|---|---|---|"]
    for size, step in seconds.items():
        cores = passes * FILMS / BATCH_SIZE * step / 3600
        card = passes * FILMS / (PUBLISHED * 64**2 / size**2) / 3600
        lines.append(f"| {size} x {size} | {step:.2f} | {cores:,.1f} | {card:,.1f} |")
    lines += [
        "", f"The last column takes {PUBLISHED:.0f} films a second, what Karras et al. 2022 report for one "
        "V100 at 64 x 64 (200 million films in about 4 days on 8 cards, "
        "[NVlabs/edm](https://github.com/NVlabs/edm)), and lets time grow with the number of pixels. Their "
        "network has about sixty times as many weights as ours, so this is what quality costs there, not how "
        "fast ours would be. We ran no graphics card.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    rows = json.loads((DOCS / "peers.json").read_text(encoding="utf-8"))
    ours = max((row for row in rows["rows"] if row["method"].startswith("GenAI Lab")),
               key=lambda row: row["minutes"])
    passes = ours["steps"] * BATCH_SIZE / rows["head"]["n_train"]
    seconds = {size: seconds_a_step(size) for size in SIZES}
    with whole_file(DOCS / "costs.md") as path:
        path.write_text(page(seconds, passes, ours["minutes"]), encoding="utf-8")
    print(f"Look at {DOCS / 'costs.md'}")


if __name__ == "__main__":
    main()
