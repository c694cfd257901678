"""Shortcuts, another hospital, and made-up films: the table that lesson 5 reads.

    python benchmarks/bench_covid.py             what `make bench` runs
    python benchmarks/bench_covid.py --record    make table and model in data/samples anew

The check trains every arm with its first seed and compares with the bars and with the table. A recording that
was interrupted goes on; its rows, and the generators, lie in build/covid_rows.
"""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from recording import Row, measure_all, rounded, write_table
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from genailab_helpers.checkpoints import load_checkpoint, whole_file
from genailab_helpers.classification import metrics
from genailab_helpers.classification.explanation import control, grad_cam, pointing_game, widen
from genailab_helpers.classification.training import (
    Augmentation,
    Classifier,
    save_classifier,
    train_classifier,
)
from genailab_helpers.datasets.index import image_hashes
from genailab_helpers.diffusion.denoiser import load_denoiser, save_denoiser
from genailab_helpers.diffusion.evaluation import evaluate
from genailab_helpers.diffusion.sampling import generate
from genailab_helpers.diffusion.training import train_image_diffusion
from genailab_helpers.phantoms.chest import (
    CONFOUNDERS,
    FINDINGS,
    ChestAnatomy,
    Render,
    render_chests,
    sample_chests,
    sample_hospital,
)

ROOT = Path(__file__).resolve().parents[1]
TABLE, ROWS = ROOT / "data/samples/covid_table.json", ROOT / "build/covid_rows"
MARKER_MODEL, MODEL = (ROOT / f"data/samples/{name}_classifier.safetensors" for name in ("marker", "covid"))
IMG_SIZE, BATCH_SIZE, LR = 64, 32, 3e-3
CLASSES = ["Normal", "COVID", "Lung_Opacity", "Viral Pneumonia"]
PAIR = CLASSES[:2]
SEEDS = range(3)
AGAIN = 0.02  # of a repeated AUROC or accuracy; repeats are exact on one machine with as many threads

# shortcuts: films of two classes, lesions that are neither plain nor hidden
SEVERITY = (0.35, 0.70)
SHORTCUT_FILMS = {"train": (800, 11), "val": (267, 12), "test": (400, 13)}  # number and seed
TOLERANCE = 4  # pixels around a mark: one place of the maps of `local_cnn`, each of which sees 18
STRICT = 2  # a tolerance that is reported beside it
N_EPOCHS = {"local_cnn": 45, "small_cnn": 14}
SITE_EPOCHS = 30  # of one hospital's films; of both, with twice the films, half as many: equal steps
SITE_FILMS = {"train": (1200, 21), "val": (400, 22), "test": (500, 23)}
# synthetic images: the same two classes, lesions that a generator of this size can learn
AUGMENT_SEVERITY = (0.5, 0.9)
AUGMENT_FILMS = {"train": (100, 31), "val": (50, 32)}  # of each class; the seed of replicate r is 100 r more
N_AUGMENT_TEST, AUGMENT_TEST_SEED, N_GENERATED = 1000, 33, 400
GENERATOR_STEPS, CLASSIFIER_STEPS = 1500, 450

SWAPPED_BAR, POINTING_BAR, MASKED_BAR = 0.60, 0.70, 0.03  # pointing: 0.80 until the phantoms of 0.2.0


class Shortcut(NamedTuple):
    """A training on films of COVID that carry a confounder at a rate, films of Normal at 1 - rate."""

    backbone: str = "local_cnn"
    confounder: str = ""
    rate: float = 1.0
    remedy: str = ""

    @property
    def name(self) -> str:
        planted = f"{self.confounder} {self.rate}" if self.confounder else "clean"
        return ", ".join(filter(None, ["shortcut", self.backbone, planted, self.remedy]))


class Site(NamedTuple):
    """A training on films of one hospital, or of both."""

    hospital: str

    @property
    def name(self) -> str:
        return f"hospital, trained at {self.hospital}"


class Augment(NamedTuple):
    """A training with made-up films."""

    remedy: str

    @property
    def name(self) -> str:
        return f"augment, {self.remedy}"


SHORTCUTS = [
    Shortcut(), Shortcut(confounder="marker"), Shortcut(confounder="marker", remedy="masked"),
    Shortcut("small_cnn"), Shortcut("small_cnn", "marker", 0.9),
    Shortcut("small_cnn", "marker", 0.9, "balanced"),
    *(Shortcut("small_cnn", confounder) for confounder in ("marker", "text", "border", "exposure")),
]
SITES = [Site("A"), Site("A and B")]
AUGMENTS = [Augment(remedy) for remedy in (
    "original", "original, classical augmentation", "original plus generated", "generated then original",
    "generated only", "original plus copies of it")]
N_REPLICATES = 2  # sets of original films with a generator each; seed s uses number s % 2
AUGMENT_SEEDS = range(4)
ARMS = [*SHORTCUTS, *SITES, *AUGMENTS]


def jobs() -> list[tuple[Any, int]]:
    """List every training of the table."""
    return ([(arm, seed) for arm in AUGMENTS for seed in AUGMENT_SEEDS]
            + [(arm, seed) for arm in (*SHORTCUTS, *SITES) for seed in SEEDS])


# ------------------------------------------------------------------------------------------------ shortcuts

def confounded(chests: ChestAnatomy, confounder: str, ill: float, healthy: float) -> ChestAnatomy:
    """Put a confounder on as many of the ill and of the healthy, the first of each in order."""
    carried = torch.zeros_like(chests.confounders)
    if confounder:
        for label, share in ((PAIR[1], ill), (PAIR[0], healthy)):
            rows = torch.nonzero(chests.finding == FINDINGS.index(label))[:, 0]
            carried[rows[:round(share * len(rows))], CONFOUNDERS.index(confounder)] = True
    return chests.changed(confounders=carried)


def graded(chests: ChestAnatomy, severity: tuple[float, float]) -> ChestAnatomy:
    """Bring severities from (0, 1) into a range."""
    low, high = severity
    return chests.changed(severity=low + (high - low) * chests.severity)


@cache
def pair(part: str, confounder: str = "", ill: float = 0, healthy: float = 0) -> tuple[Render, Tensor]:
    """Draw films of Normal and COVID; return them with labels 0 and 1."""
    n, seed = SHORTCUT_FILMS[part]
    chests = graded(sample_chests(n, seed, PAIR), SEVERITY)
    chests = confounded(chests, confounder, ill, healthy)
    return render_chests(chests, IMG_SIZE, masks=part == "test"), (chests.finding > 0).long()


def corner_masked(images: Tensor) -> Tensor:
    """Black the corner where markers are, whether there is one or not."""
    side, masked = round(0.17 * IMG_SIZE), images.clone()
    masked[..., :side, -side:] = -1
    return masked


def views(confounder: str) -> dict[str, tuple[Render, Tensor]]:
    """Draw the test films with the confounder as in training, without it, and on the other class."""
    return {"with": pair("test", confounder, 1, 0), "without": pair("test"),
            "swapped": pair("test", confounder, 0, 1)}


def log_odds(logits: Tensor) -> Tensor:
    """Return how much the logits (N, 2) speak for the second class."""
    return logits[:, 1] - logits[:, 0]


def train_shortcut(arm: Shortcut, seed: int) -> Classifier:
    """Train on confounded films, or on cleaned ones."""
    sets = []
    for part in ("train", "val"):
        drawn, labels = pair(part, arm.confounder, arm.rate, 1 - arm.rate)
        images = corner_masked(drawn.images) if arm.remedy == "masked" else drawn.images
        rows = torch.arange(len(labels))
        if arm.remedy == "balanced" and part == "train":
            carries = confounded_rows(part, arm)
            groups = [torch.nonzero((labels == label) & (carries == mark))[:, 0]
                      for label in (0, 1) for mark in (False, True)]
            size = max(map(len, groups))
            rows = torch.cat([group.repeat(-(-size // len(group)))[:size] for group in groups])
        sets.append(TensorDataset(images[rows], labels[rows]))
    n_epochs = -(-N_EPOCHS[arm.backbone] * SHORTCUT_FILMS["train"][0] // len(sets[0]))  # as many steps
    return train_classifier(*sets, backbone=arm.backbone, n_epochs=n_epochs, patience=n_epochs, lr=LR,
                            batch_size=BATCH_SIZE, classes=PAIR, seed=seed, progress=False).model


def confounded_rows(part: str, arm: Shortcut) -> Tensor:
    """Tell which films of a part carry the confounder of an arm."""
    n, seed = SHORTCUT_FILMS[part]
    chests = confounded(sample_chests(n, seed, PAIR), arm.confounder, arm.rate, 1 - arm.rate)
    return chests.confounders[:, CONFOUNDERS.index(arm.confounder)]


def measure_shortcut(arm: Shortcut, seed: int) -> Row:
    """Judge a model with the confounder, without it and with it swapped; see where it looks."""
    model = train_shortcut(arm, seed)
    clean: Callable[[Tensor], Tensor] = corner_masked if arm.remedy == "masked" else lambda images: images
    row: Row = {}
    for name, (drawn, labels) in views(arm.confounder).items():
        z = log_odds(model.logits(clean(drawn.images))).double()
        row[f"auroc_{name}"] = metrics.auroc(labels.numpy() == 1, z.numpy())
        levels = (999 * torch.sigmoid(z / 3)).round().int().tolist()  # softened, so that sure ones stay apart
        row[f"levels_{name}"] = "".join(f"{level:03d}" for level in levels)
    for name, of in (("marker", "with"), ("lesion", "without")):
        if name == "marker" and arm.confounder != "marker":
            continue
        drawn, labels = views(arm.confounder)[of]
        masks = widen(drawn.masks[name], TOLERANCE)
        shown = (labels == 1) & masks.flatten(1).any(1)
        seen = clean(drawn.images[shown])
        cams = grad_cam(model.network, seen, log_odds, min_side=8)
        shuffled = control(pointing_game, model.network, seen, log_odds, masks[shown], min_side=8)
        row[f"pointing_{name}"] = float(pointing_game(cams, masks[shown]).mean())
        for end, value in zip(("", "_low", "_high"), shuffled[:3], strict=True):
            row[f"pointing_{name}_shuffled{end}"] = value
        if name == "marker":
            strict = widen(drawn.masks[name], STRICT)[shown]
            row["pointing_marker_strict"] = float(pointing_game(cams, strict).mean())
        row[f"pointing_{name}_chance"] = float(masks[shown].float().mean())
    return row


# -------------------------------------------------------------------------------------------- other hospitals

@cache
def hospital_films(hospital: str, part: str) -> TensorDataset:
    """Draw films of a hospital."""
    n, seed = SITE_FILMS[part]
    chests = sample_hospital(n, hospital, seed)
    return TensorDataset(render_chests(chests, IMG_SIZE).images, labels_of(chests.finding))


def labels_of(finding: Tensor) -> Tensor:
    """Number findings as CLASSES does."""
    places = [CLASSES.index(name) if name in CLASSES else -1 for name in FINDINGS]
    return torch.tensor(places)[finding]


def train_site(arm: Site, seed: int) -> Classifier:
    """Train at one hospital, or at both."""
    places = arm.hospital.split(" and ")
    parts = []
    for part in ("train", "val"):
        parts.append(joined(*(hospital_films(place, part) for place in places)))
    n_epochs = SITE_EPOCHS // len(places)
    return train_classifier(*parts, n_epochs=n_epochs, patience=n_epochs, lr=LR, batch_size=BATCH_SIZE,
                            classes=CLASSES, seed=seed, progress=False).model


def measure_site(arm: Site, seed: int) -> Row:
    """Train at one hospital and judge at both."""
    model = train_site(arm, seed)
    row: Row = {}
    for hospital in "AB":
        images, labels = hospital_films(hospital, "test").tensors
        percent = (100 * model.predict(images).probabilities).round().int()
        row[f"percent_{hospital}"] = "".join(f"{p:03d}" for p in percent.flatten().tolist())
        row[f"macro_auroc_{hospital}"] = metrics.macro_auroc(labels.numpy(), percent.numpy())
        row[f"balanced_accuracy_{hospital}"] = metrics.balanced_accuracy(labels.numpy(),
                                                                         percent.argmax(1).numpy())
    return row


# --------------------------------------------------------------------------------------------- made-up films

@cache
def originals(part: str, replicate: int = 0) -> TensorDataset:
    """Draw the films of a replicate, equally many of each class; the test films are those of all."""
    n, seed = (N_AUGMENT_TEST, AUGMENT_TEST_SEED) if part == "test" else AUGMENT_FILMS[part]
    chests = sample_chests(n if part == "test" else 4 * n, seed + 100 * replicate * (part != "test"), PAIR)
    chests, labels = graded(chests, AUGMENT_SEVERITY), (chests.finding > 0).long()
    rows = torch.arange(len(labels)) if part == "test" else torch.cat(
        [torch.nonzero(labels == k)[:n, 0] for k in range(len(PAIR))])
    return TensorDataset(render_chests(chests[rows], IMG_SIZE).images, labels[rows])


def generator_file(replicate: int) -> Path:
    """Name the generator of a replicate."""
    return ROWS / f"generator_{replicate}.safetensors"


def train_generator(replicate: int) -> None:
    """Train a class-conditional diffusion model on the training films alone, and note which those were."""
    films = originals("train", replicate)
    denoiser, _ = train_image_diffusion(
        DataLoader(films, batch_size=16, shuffle=True, drop_last=True), IMG_SIZE, n_steps=GENERATOR_STEPS,
        num_classes=len(PAIR), seed=replicate, progress=False,
        checkpoint=ROWS / f"generator_{replicate}_training.safetensors")
    save_denoiser(generator_file(replicate), denoiser, {"manifest": image_hashes(films.tensors[0])})


def make_films(replicate: int) -> None:
    """Train a generator and draw its films, unless that was done."""
    if not generator_file(replicate).exists():
        train_generator(replicate)
    generated(replicate)


@cache
def generated(replicate: int) -> TensorDataset:
    """Return the films of a generator, drawn once, after a look at what it has seen."""
    train, val, test = (originals(part, replicate).tensors[0] for part in ("train", "val", "test"))
    manifest = set(load_checkpoint(generator_file(replicate)).recipe["manifest"])
    if not manifest <= set(image_hashes(train)) or manifest & set(image_hashes(torch.cat([val, test]))):
        raise ValueError(f"{generator_file(replicate)}: was not trained on these training images alone")
    labels = torch.arange(len(PAIR)).repeat_interleave(N_GENERATED // len(PAIR))
    drawn = generator_file(replicate).with_suffix(".npy")
    if not drawn.exists():
        films = generate(load_denoiser(generator_file(replicate)), N_GENERATED, seed=replicate, labels=labels)
        with whole_file(drawn) as path, path.open("wb") as file:
            np.save(file, torch.cat(list(films)).numpy())
    return TensorDataset(torch.from_numpy(np.load(drawn)), labels)


def joined(*parts: TensorDataset) -> TensorDataset:
    """Put films together."""
    images, labels = zip(*(part.tensors for part in parts), strict=True)
    return TensorDataset(torch.cat(images), torch.cat(labels))


def measure_augment(arm: Augment, seed: int) -> Row:
    """Train with made-up films, as many steps in every arm, and judge on original films."""
    replicate = seed % N_REPLICATES
    original, val = originals("train", replicate), originals("val", replicate)

    def fit(films: TensorDataset, n_steps: int, model: Classifier | None = None) -> Classifier:
        n_epochs = -(-n_steps // (len(films) // BATCH_SIZE))
        augmentation = Augmentation() if "classical" in arm.remedy else None
        return train_classifier(films, val, backbone="local_cnn", n_epochs=n_epochs, patience=n_epochs,
                                lr=LR, batch_size=BATCH_SIZE, augmentation=augmentation, classes=PAIR,
                                model=model, seed=seed, progress=False).model

    if arm.remedy == "generated then original":
        model = fit(original, CLASSIFIER_STEPS // 3, fit(generated(replicate), CLASSIFIER_STEPS * 2 // 3))
    else:
        copies = joined(*[original] * (N_GENERATED // len(original)))
        films: dict[str, Callable[[], TensorDataset]] = {
            "original plus generated": lambda: joined(original, generated(replicate)),
            "generated only": lambda: generated(replicate),
            "original plus copies of it": lambda: joined(original, copies)}
        model = fit(films.get(arm.remedy, lambda: original)(), CLASSIFIER_STEPS)
    images, labels = originals("test").tensors
    said = model.predict(images)
    return {"accuracy": metrics.accuracy(labels.numpy(), said.decoded.numpy()),
            "auroc": metrics.auroc(labels.numpy() == 1, said.probabilities.numpy()[:, 1].astype(float)),
            "classes": "".join(map(str, said.decoded.tolist()))}


def fidelity(replicate: int, reader: Classifier) -> Row:
    """Judge the films of a generator beside copies, and its training films against others.

    `reader`, a classifier that has seen neither, says whether the class can be read off a film.
    """
    table = evaluate(generated(replicate).tensors[0], originals("train", replicate).tensors[0],
                     originals("test").tensors[0], reference_name="phantoms")
    keep = ("name", "frechet", "precision", "recall", "nn_ratio", "copied")
    rows = [{name: row.name if name == "name" else [round(number, 3) for number in getattr(row, name)[:3]]
             for name in keep} for row in table.rows]
    sets = {"generated": generated(replicate), "original": originals("train", replicate)}
    read = {name: round(metrics.auroc(films.tensors[1].numpy() == 1, log_odds(
        reader.logits(films.tensors[0])).double().numpy()), 4) for name, films in sets.items()}
    return {"replicate": replicate, "verdict": table.verdict, "n": table.n, "rows": rows, "read": read}


# ----------------------------------------------------------------------------------------------- all of them

def measure(arm: Any, seed: int) -> Row:
    """Train one arm and return its row."""
    torch.set_num_threads(1)
    kinds: dict[type, Callable[[Any, int], Row]] = {
        Shortcut: measure_shortcut, Site: measure_site, Augment: measure_augment}
    return {"arm": arm.name, "seed": seed, **rounded(kinds[type(arm)](arm, seed))}


def measure_generators(n_replicates: int) -> None:
    """Make the films that are not there yet, two generators at a time."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads,
                             initargs=(1,)) as pool:
        list(pool.map(make_films, range(n_replicates)))


def recipe() -> Row:
    """Say how the films were drawn and the models trained."""
    return {"img_size": IMG_SIZE, "batch_size": BATCH_SIZE, "lr": LR, "classes": CLASSES,
            "severity": SEVERITY, "augment_severity": AUGMENT_SEVERITY,
            "shortcut_films": SHORTCUT_FILMS, "site_films": SITE_FILMS, "augment_films": AUGMENT_FILMS,
            "augment_test": [N_AUGMENT_TEST, AUGMENT_TEST_SEED], "n_generated": N_GENERATED,
            "n_replicates": N_REPLICATES, "generator_steps": GENERATOR_STEPS,
            "classifier_steps": CLASSIFIER_STEPS, "n_epochs": N_EPOCHS, "site_epochs": SITE_EPOCHS}


def record() -> None:
    """Measure every arm with every seed, write the table, and ship one model."""
    measure_generators(N_REPLICATES)
    rows = measure_all(measure, jobs(), ROWS)
    labels = {"shortcut": pair("test")[1], "augment": originals("test").tensors[1],
              **{f"hospital {h}": hospital_films(h, "test").tensors[1] for h in "AB"}}
    told = {name: "".join(map(str, label.tolist())) for name, label in labels.items()}
    torch.set_num_threads(1)
    reader = train_shortcut(SHORTCUTS[0], SEEDS[0])
    write_table(TABLE, {"recipe": recipe(), "labels": told,
                        "fidelity": [fidelity(r, reader) for r in range(N_REPLICATES)]}, rows)
    models: list[tuple[Path, Any, Callable[[Any, int], Classifier]]] = [
        (MARKER_MODEL, SHORTCUTS[1], train_shortcut), (MODEL, SITES[0], train_site)]
    for path, arm, train in models:
        save_classifier(path, train(arm, SEEDS[0]), arm=arm.name, seed=SEEDS[0])
    print(f"{len(rows)} rows in {TABLE.relative_to(ROOT)}, two models beside it")


def main() -> int:
    """Train the first seed of every arm again, and compare with the bars and with the table."""
    recorded = {(row["arm"], row["seed"]): row
                for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]}
    measure_generators(1)
    first = [(arm, 0) for arm in ARMS]
    again = {row["arm"]: row for row in measure_all(measure, first)}
    clean, marker, masked = (again[arm.name] for arm in SHORTCUTS[:3])
    lost = clean["auroc_without"] - masked["auroc_without"]
    results = [
        ("AUROC with the marker swapped", marker["auroc_swapped"], marker["auroc_swapped"] < SWAPPED_BAR,
         f"below {SWAPPED_BAR}"),
        ("Grad-CAM on the marker", marker["pointing_marker"], marker["pointing_marker"] >= POINTING_BAR,
         f"at least {POINTING_BAR}; chance {marker['pointing_marker_chance']:.3f}"),
        ("AUROC lost by masking", lost, lost <= MASKED_BAR, f"at most {MASKED_BAR}"),
    ]
    for name, value, met, bar in results:
        print(f"  {'met   ' if met else 'MISSED'}  {name:30s} {value:7.4f}   {bar}")
    print(f"seed 0 of every arm, beside the table; more than {AGAIN} apart is a fault")
    apart = []
    for arm, _ in first:
        for name, value in again[arm.name].items():
            if name.startswith(("auroc", "macro", "accuracy")):
                apart.append(abs(value - recorded[arm.name, 0][name]))
                print(f"  {arm.name:45s} {name:15s} {value:.3f}, recorded {recorded[arm.name, 0][name]:.3f}")
    return int(not all(met for _, _, met, _ in results) or max(apart) > AGAIN)


if __name__ == "__main__":
    if "--record" in sys.argv[1:]:
        record()
    else:
        sys.exit(main())
