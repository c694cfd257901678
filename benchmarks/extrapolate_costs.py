"""What larger films and the whole of the Kermany set would cost: `docs/costs.md`, from steps measured here.

python benchmarks/extrapolate_costs.py --card    (where a graphics card is: writes `docs/card.json`)
python benchmarks/extrapolate_costs.py           (a minute or two on 2 quiet cores)

What a model needs is taken from the longest training of `docs/peers.json`: it saw each film so many times.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from compare_peers import machine

from genailab_helpers.checkpoints import whole_file
from genailab_helpers.diffusion.training import train_image_diffusion

DOCS = Path(__file__).parents[1] / "docs"
SIZES = (64, 128, 256)
STEPS, BATCH_SIZE = 8, 16
CARD_STEPS, CARD_BATCH_SIZES = 40, {64: (16, 256), 128: (16, 128), 256: (16, 64)}
FILMS = 5216  # of the training part of the set by Kermany et al. 2018
# Karras et al. 2022, table of the repository NVlabs/edm: 200 million films of 64x64 in about 4 days on 8 V100
# cards, for a network of 62 million weights
PUBLISHED = 200e6 / (4 * 86400 * 8)  # films a second and card


class Watched:
    """Batches of noise, and when each of them was asked for."""

    def __init__(self, img_size: int, batch_size: int, n_steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = torch.rand((batch_size, 1, img_size, img_size), generator=generator) * 2 - 1
        self.n_steps, self.times = n_steps, list[float]()

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(self.n_steps):
            self.times.append(time.monotonic())
            yield self.batch


def seconds_a_step(img_size: int, batch_size: int = BATCH_SIZE, n_steps: int = STEPS,
                   compile_network: bool = False) -> float:
    """Return the median time of a step, without the first quarter, which warms up."""
    watched = Watched(img_size, batch_size, n_steps)
    train_image_diffusion(watched, img_size, n_steps=n_steps,  # type: ignore[arg-type]
                          compile_network=compile_network, progress=False)
    return statistics.median(b - a for a, b in itertools.pairwise(watched.times[-n_steps * 3 // 4:]))


def measure_card() -> dict[str, Any]:
    """Time the steps on the graphics card of this machine."""
    if not torch.cuda.is_available():
        raise SystemExit("--card: torch finds no CUDA card here")
    rows: list[dict[str, Any]] = []
    for size, (few, many) in CARD_BATCH_SIZES.items():
        for batch_size, compiled in ((few, False), (many, False), (many, True)):
            torch.compiler.reset()
            torch.cuda.reset_peak_memory_stats()
            step = seconds_a_step(size, batch_size, CARD_STEPS, compiled)
            rows.append({"size": size, "batch size": batch_size, "compiled": compiled,
                         "seconds a step": round(step, 5), "films a second": round(batch_size / step),
                         "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 2)})
            print(json.dumps(rows[-1]), flush=True)
    return {"card": torch.cuda.get_device_name(), "torch": torch.__version__,
            "date": datetime.now(UTC).date().isoformat(), "rows": rows}


def page(seconds: dict[int, float], passes: float, minutes: float, card: dict[str, Any] | None = None) -> str:
    """Write the page: measured seconds of a step by size, and what follows if that many passes are needed."""
    fastest = {} if card is None else {
        size: max(row["films a second"] for row in card["rows"] if row["size"] == size) for size in seconds}
    films = passes * FILMS
    lines = [
        "# What larger images cost", "",
        f"Made by `python benchmarks/extrapolate_costs.py` on {datetime.now(UTC).date()}; {machine()}. "
        f"**Only the seconds a step are measured; all hours are estimates.** In {minutes:g} minutes the "
        f"engine saw each image of [the comparison with its peers](peers.md) {passes:.0f} times. The table "
        f"asks what as many passes over the {FILMS:,} training images of Kermany et al. 2018 take. "
        "Whether larger images need more passes or a larger network, it does not know.", "",
        f"| image | seconds a step of {BATCH_SIZE} images, measured | hours on 2 cores |"
        + (f" hours on one {card['card']} |" if card else "")
        + " hours on one V100 with a network of 62 M weights |",
        "|---|---|---|" + ("---|" if card else "") + "---|"]
    for size, step in seconds.items():
        own = f" {films / fastest[size] / 3600:,.2f} |" if card else ""
        published = films / (PUBLISHED * 64**2 / size**2) / 3600
        lines.append(f"| {size} x {size} | {step:.2f} | {films / BATCH_SIZE * step / 3600:,.1f} |{own} "
                     f"{published:,.1f} |")
    lines += [
        "", f"The last column takes {PUBLISHED:.0f} images a second, what Karras et al. 2022 report for one "
        "V100 at 64 x 64 (200 million images in about 4 days on 8 cards, "
        "[NVlabs/edm](https://github.com/NVlabs/edm)), and lets time grow with the number of pixels. Their "
        "network has about forty times as many weights as ours, so this is what quality costs there, not how "
        "fast ours would be.", ""]
    if card:
        lines += [
            f"Measured on one {card['card']} on {card['date']}, torch {card['torch']}: our network in "
            "bfloat16 with channels last, the median step of images that lie in memory already "
            "(`docs/card.json`). The hours above take the fastest row of each size; whether as many images "
            "teach as much in larger batches, so in fewer steps, was not measured.", "",
            "| image | images a step | compiled | seconds a step | images a second | memory at most, GB |",
            "|---|---|---|---|---|---|"]
        lines += [f"| {row['size']} x {row['size']} | {row['batch size']} | "
                  f"{'yes' if row['compiled'] else 'no'} | {row['seconds a step']:.4f} | "
                  f"{row['films a second']:,} | {row['peak GB']:.2f} |"
                  for row in card["rows"]] + [""]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="What larger images would cost.")
    parser.add_argument("--card", action="store_true", help="measure the graphics card of this machine only")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the results are read and written")
    chosen = parser.parse_args()
    of_card = chosen.docs / "card.json"
    if chosen.card:
        measured = measure_card()
        with whole_file(of_card) as path:
            path.write_text(json.dumps(measured).replace(' {"size"', '\n{"size"') + "\n", encoding="utf-8")
        return
    rows = json.loads((chosen.docs / "peers.json").read_text(encoding="utf-8"))
    ours = max((row for row in rows["rows"] if row["method"].startswith("GenAI Lab")),
               key=lambda row: row["minutes"])
    passes = ours["steps"] * BATCH_SIZE / rows["head"]["n_train"]
    seconds = {size: seconds_a_step(size) for size in SIZES}
    card = json.loads(of_card.read_text(encoding="utf-8")) if of_card.exists() else None
    with whole_file(chosen.docs / "costs.md") as path:
        path.write_text(page(seconds, passes, ours["minutes"], card), encoding="utf-8")
    print(f"Look at {chosen.docs / 'costs.md'}")


if __name__ == "__main__":
    main()
