"""Grade spines with every loss, with few labels and with borrowed weights: the table that lesson 4 reads.

    python benchmarks/bench_grading.py             what `make bench` runs
    python benchmarks/bench_grading.py --record    make table and model in data/samples anew

The check trains the shipped arm with all seeds and every other arm with the first seed, and compares with the
bars and with the table. A recording that was interrupted goes on; its rows lie in build/grading_rows.
"""

import json
import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from recording import N_PROCESSES, measure_all, rounded, write_table
from torch import Tensor
from torch.utils.data import TensorDataset

from genailab_helpers.classification import metrics
from genailab_helpers.classification.explanation import control, grad_cam, pointing_game, widen
from genailab_helpers.classification.losses import LOSSES
from genailab_helpers.classification.training import (
    Augmentation,
    Classifier,
    TrainingResult,
    save_classifier,
    train_classifier,
)
from genailab_helpers.datasets.names import GRADES
from genailab_helpers.phantoms.raters import consensus, rater_ceiling, simulate_raters
from genailab_helpers.phantoms.spine import SIGNS, SpineAnatomy, render_spines, sample_spines

ROOT = Path(__file__).resolve().parents[1]
TABLE, ROWS = ROOT / "data/samples/grading_table.json", ROOT / "build/grading_rows"
MODEL = ROOT / "data/samples/spine_grader.safetensors"
IMG_SIZE = 96
FILMS = {"train": (1500, 4), "val": (500, 5), "test": (1000, 6)}  # number and seed
SEEDS = range(3)
BATCH_SIZE, LR = 32, 3e-3
AUGMENTATIONS = {
    "no augmentation": None,
    "heavy augmentation": Augmentation(rotation=20, shift=0.1, zoom=0.25, brightness=0.2, contrast=0.4),
}
GRADE_METRICS = (metrics.qwk, metrics.accuracy, metrics.mae, metrics.off_by_more_than_one)
MINUTES_BAR = 20
# looser than for the spines of 0.1.0, which one sign gave away: 0.95 of the ceiling, 0.40, 0.01, 0.80
QWK_BAR, SHARE_OF_CEILING_BAR, MAE_BAR, OFF_BAR = 0.85, 0.93, 0.48, 0.05
ECE_BAR, ECE_GAIN_BAR, POINTING_BAR = 0.05, 0.40, 0.65
TOLERANCE = 2  # pixels around a sign, a quarter of a pixel of the maps
AGAIN = 0.015  # repeats are exact on one machine; other threads were seen to move kappa by .004


class Arm(NamedTuple):
    """One way to train; `a_grade` films of each grade, or all where it is None."""

    loss: str = "squared_emd"
    backbone: str = "small_cnn"
    a_grade: int | None = None
    remedy: str = ""

    @property
    def name(self) -> str:
        films_used = "all films" if self.a_grade is None else f"{self.a_grade} a grade"
        return ", ".join(filter(None, [self.loss, self.backbone, films_used, self.remedy]))

    @property
    def n_steps(self) -> int:
        """Steps of training, enough for the validation score to stop rising."""
        if self.backbone == "frozen_lite0" or self.remedy == "pseudo-labels":
            return 600
        return {None: 1380, 25: 300, 50: 600, 100: 900}[self.a_grade]


ARMS = [
    *(Arm(loss) for loss in LOSSES),
    *(Arm(a_grade=n) for n in (25, 50, 100)),
    *(Arm(backbone="frozen_lite0", a_grade=n) for n in (25, 50, 100, None)),
    *(Arm(a_grade=25, remedy=remedy) for remedy in (*AUGMENTATIONS, "pseudo-labels")),
]


SHIPPED = Arm("soft_labels")  # no loss of the table beats its QWK beyond chance; lesson 4 has its seed 0


@cache
def spines(part: str) -> tuple[SpineAnatomy, Tensor, Tensor]:
    """Draw films, and the consensus of three raters."""
    n, seed = FILMS[part]
    anatomy = sample_spines(n, seed)
    images = render_spines(anatomy, IMG_SIZE).images
    return anatomy, images, consensus(simulate_raters(anatomy.severity, seed=seed))


def chosen(grades: Tensor, a_grade: int | None) -> Tensor:
    """Return the rows of the first films of each grade, in order."""
    if a_grade is None:
        return torch.arange(len(grades))
    return torch.cat([torch.nonzero(grades == k)[:a_grade, 0] for k in range(len(GRADES))]).sort().values


def train(arm: Arm, seed: int) -> TrainingResult:
    """Train one arm. Its validation films are a third as many as its training films."""
    (_, images, grades), (_, val_images, val_grades) = spines("train"), spines("val")
    rows = chosen(grades, arm.a_grade)
    val_rows = chosen(val_grades, arm.a_grade and -(-arm.a_grade // 3))
    shown, labels = images[rows], grades[rows]
    if arm.remedy == "pseudo-labels":
        others = torch.ones(len(grades), dtype=torch.bool)
        others[rows] = False
        said = train(arm._replace(remedy=""), seed).model.predict(images[others])
        sure = said.probabilities.amax(1)
        kept = sure >= sure.median()
        shown, labels = torch.cat([shown, images[others][kept]]), torch.cat([labels, said.decoded[kept]])
    n_epochs = -(-arm.n_steps // (len(shown) // BATCH_SIZE))
    return train_classifier(
        TensorDataset(shown, labels), TensorDataset(val_images[val_rows], val_grades[val_rows]), arm.loss,
        arm.backbone, n_epochs=n_epochs, batch_size=BATCH_SIZE, lr=LR, patience=n_epochs,
        augmentation=AUGMENTATIONS.get(arm.remedy, Augmentation()), classes=GRADES, seed=seed, progress=False)


def measure(arm: Arm, seed: int) -> dict[str, Any]:
    """Train one arm and return its row: numbers, and the grade of each test film as a digit."""
    torch.set_num_threads(1)
    started = time.process_time()
    result = train(arm, seed)
    model, (_, images, grades) = result.model, spines("test")
    truth, logits = grades.numpy(), model.logits(images)
    predicted = model.loss.decode(logits).numpy()
    before, after = (model.loss.probabilities(z).numpy() for z in (logits, logits / model.temperature))
    row = {"arm": arm.name, "seed": seed, "steps": result.steps,
           "processor_seconds": round(time.process_time() - started), "temperature": model.temperature,
           "val_qwk": result.history[result.best_epoch].score}
    row |= {m.__name__: m(truth, predicted) for m in GRADE_METRICS}
    row |= {"ece_before": metrics.ece(truth, before), "ece_after": metrics.ece(truth, after),
            "same_argmax": bool((before.argmax(1) == after.argmax(1)).all())}
    if arm.backbone == "small_cnn" and arm.a_grade is None:
        row |= pointing(model)
    return {**rounded(row), "grades": "".join(map(str, predicted))}


def pointing(model: Classifier) -> dict[str, float]:
    """Score where the model looks on severe test films, beside shuffled weights and chance."""
    anatomy, _, grades = spines("test")
    drawn = render_spines(anatomy[grades >= 3][:200], IMG_SIZE, masks=True)
    lesion = widen(torch.stack([drawn.masks[name] for name in SIGNS]).any(0), TOLERANCE)
    worn = lesion.flatten(1).any(1)

    def expected_grade(logits: Tensor) -> Tensor:  # softened, since a sure answer hardly changes
        return (model.loss.probabilities(logits / 10) * torch.arange(len(GRADES))).sum(1)

    images, masks = drawn.images[worn], lesion[worn]
    hits = pointing_game(grad_cam(model.network, images, expected_grade, min_side=8), masks)
    shuffled = control(pointing_game, model.network, images, expected_grade, masks, min_side=8)
    return {"pointing": float(hits.mean()), "pointing_shuffled": shuffled.value,
            "pointing_shuffled_low": shuffled.low, "pointing_shuffled_high": shuffled.high,
            "pointing_chance": float(masks.float().mean())}


def record() -> None:
    """Measure every arm with every seed, write the table, and ship one model."""
    rows = measure_all(measure, [(arm, seed) for seed in SEEDS for arm in ARMS], ROWS)
    recipe = {"img_size": IMG_SIZE, "batch_size": BATCH_SIZE, "lr": LR,
              "films": {part: {"n": n, "seed": seed} for part, (n, seed) in FILMS.items()}}
    write_table(TABLE, {"recipe": recipe, "label": "".join(map(str, spines("test")[2].tolist()))}, rows)
    torch.set_num_threads(1)
    save_classifier(MODEL, train(SHIPPED, SEEDS[0]).model, arm=SHIPPED.name, seed=SEEDS[0], **recipe)
    print(f"{len(rows)} rows in {TABLE.relative_to(ROOT)}, a model in {MODEL.relative_to(ROOT)}")


def main() -> int:
    """Train again, and compare with the bars and with the table."""
    recorded = {(row["arm"], row["seed"]): row
                for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]}
    started = time.monotonic()
    shipped = measure_all(measure, [(SHIPPED, seed) for seed in SEEDS])
    minutes = (time.monotonic() - started) / 60
    mean = {name: float(np.mean([row[name] for row in shipped])) for name in shipped[0]
            if isinstance(shipped[0][name], float)}
    ceiling = rater_ceiling()
    gain = 1 - mean["ece_after"] / mean["ece_before"]
    print(f"{SHIPPED.name}, mean over {len(shipped)} seeds; {minutes:.1f} minutes in {N_PROCESSES} "
          f"processes, load {os.getloadavg()[0]:.1f}")
    results = [
        ("QWK", mean["qwk"], mean["qwk"] >= QWK_BAR, f"at least {QWK_BAR}"),
        ("share of the ceiling", mean["qwk"] / ceiling, mean["qwk"] >= SHARE_OF_CEILING_BAR * ceiling,
         f"at least {SHARE_OF_CEILING_BAR} of {ceiling:.3f}"),
        ("MAE", mean["mae"], mean["mae"] <= MAE_BAR, f"at most {MAE_BAR}"),
        ("off by more than one", mean["off_by_more_than_one"], mean["off_by_more_than_one"] <= OFF_BAR,
         f"at most {OFF_BAR}"),
        ("ECE with temperature", mean["ece_after"], mean["ece_after"] <= ECE_BAR or gain >= ECE_GAIN_BAR,
         f"at most {ECE_BAR}, or {ECE_GAIN_BAR:.0%} below {mean['ece_before']:.3f}"),
        ("same argmax", float(all(row["same_argmax"] for row in shipped)),
         all(row["same_argmax"] for row in shipped), "always"),
        ("pointing game", mean["pointing"], mean["pointing"] >= POINTING_BAR, f"at least {POINTING_BAR}"),
        ("pointing, shuffled weights", mean["pointing_shuffled"],
         mean["pointing_shuffled"] <= mean["pointing_chance"] + 0.05,
         f"not above chance, {mean['pointing_chance']:.3f}"),
        ("minutes", minutes, minutes <= MINUTES_BAR, f"at most {MINUTES_BAR}"),
    ]
    for name, value, met, bar in results:
        print(f"  {'met   ' if met else 'MISSED'}  {name:27s} {value:7.4f}   {bar}")
    again = shipped + measure_all(measure, [(arm, SEEDS[0]) for arm in ARMS if arm != SHIPPED])
    print(f"seed {SEEDS[0]} of every arm, beside the table; more than {AGAIN} apart is a fault")
    apart = []
    for row in again:
        before = recorded[row["arm"], row["seed"]]["qwk"]
        apart.append(abs(row["qwk"] - before))
        print(f"  {row['arm']:50s} seed {row['seed']}  QWK {row['qwk']:.3f}, recorded {before:.3f}")
    return int(not all(met for _, _, met, _ in results) or max(apart) > AGAIN)


if __name__ == "__main__":
    if "--record" in sys.argv[1:]:
        record()
    else:
        sys.exit(main())
