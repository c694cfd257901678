"""Train a network on grades or classes, keep it with all that its use needs, and use it.

One engine for both: the loss decides what is learned. All randomness (weights, order of the films,
augmentation, dropout) comes from `seed`, so that a training repeats itself, also when it was interrupted.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from genailab_helpers.checkpoints import (
    choose_device,
    first_difference,
    join_processes,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from genailab_helpers.classification import metrics
from genailab_helpers.classification.backbones import FrozenLite0, Network, build_backbone
from genailab_helpers.classification.ordinal import LOSSES, CrossEntropy, GradeLoss
from genailab_helpers.datasets.names import GRADES
from genailab_helpers.radiographs import check_images

WARM_UP = 20  # steps
WEIGHT_DECAY = 0.02
TRUST = 0.3  # pretrained layers move so much more slowly than the new one


@dataclass(frozen=True)
class Augmentation:
    """Small changes that leave the grade or class of a film as it is. All ranges go to both sides.

    Parameters
    ----------
    rotation : float, default 8.0
        Degrees.
    shift, zoom : float, default 0.05 and 0.1
        Of the image side, and of the scale.
    brightness, contrast : float, default 0.1 and 0.2
        Added to the grey levels in [-1, 1], and of their scale.
    flip : bool, default False
        Mirror half of the films. Only where left and right mean nothing, as in knees: it moves the heart to
        the wrong side and turns the curve of a spine over.
    """

    rotation: float = 8.0
    shift: float = 0.05
    zoom: float = 0.1
    brightness: float = 0.1
    contrast: float = 0.2
    flip: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Change each image (N, 1, H, W) in [-1, 1] in its own way; what moves in from outside is black."""
        n = len(images)
        angle, right, down, zoom, light, contrast = torch.rand((6, n), generator=generator) * 2 - 1
        mirror = 1 - 2 * (torch.rand(n, generator=generator) < 0.5 * self.flip).float()
        angle, scale = angle * math.radians(self.rotation), 1 + zoom * self.zoom
        cos, sin = angle.cos() / scale, angle.sin() / scale
        rows = [torch.stack([cos * mirror, -sin, 2 * self.shift * right], 1),
                torch.stack([sin * mirror, cos, 2 * self.shift * down], 1)]
        grid = F.affine_grid(torch.stack(rows, 1).to(images), list(images.shape), align_corners=False)
        moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside, 0 is black
        gain, offset = ((1 + self.contrast * contrast).to(images), (self.brightness * light).to(images))
        return (moved * gain[:, None, None, None] + offset[:, None, None, None]).clamp(-1, 1)


class Prediction(NamedTuple):
    """What a classifier says of N films: `probabilities` (N, K), `decoded` (N,) int64."""

    probabilities: Tensor
    decoded: Tensor


@dataclass
class Classifier:
    """A trained network with all that its use needs.

    Attributes
    ----------
    network : nn.Module
        From images to logits, in evaluation mode.
    loss : GradeLoss
        Reads the logits.
    classes : list of str
        Names of the labels, in order.
    img_size : int
        Side of the films in pixels.
    backbone : str
        As `build_backbone` knows it.
    temperature : float
        Fitted on the validation films; the probabilities are those of the logits divided by it.
    """

    network: Network | FrozenLite0
    loss: GradeLoss
    classes: list[str]
    img_size: int
    backbone: str
    temperature: float = 1.0

    @torch.no_grad()
    def logits(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Return logits (N, n_outputs), on the CPU, for films (N, 1, img_size, img_size) in [-1, 1].

        Raises
        ------
        ValueError
            If the images are no such films.
        """
        check_images(images)
        if images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"images: this model was trained on films of {self.img_size}x{self.img_size} "
                             f"pixels, got {tuple(images.shape)}; read them in that size")
        where = next(self.network.parameters()).device
        batches = _as_stored(images).split(batch_size)
        return torch.cat([self.network(batch.to(where)).cpu() for batch in batches])

    def predict(self, images: Tensor) -> Prediction:
        """Return calibrated probabilities and labels; parameters and errors as in `logits`."""
        logits = self.logits(images)
        return Prediction(self.loss.probabilities(logits / self.temperature), self.loss.decode(logits))

    @property
    def recipe(self) -> dict[str, Any]:
        """What `load_classifier` needs beside the weights."""
        loss = next(name for name, kind in LOSSES.items() if kind is type(self.loss))
        return {"kind": "classifier", "backbone": self.backbone, "loss": loss, "classes": self.classes,
                "img_size": self.img_size, "temperature": self.temperature}


def _as_stored(images: Tensor) -> Tensor:
    """Round to the 8 bits in which `RadiographFolder` keeps films, so that training and use see the same."""
    return ((images + 1) * 127.5).round() / 127.5 - 1


def save_classifier(path: str | Path, model: Classifier, **notes: Any) -> None:
    """Write a model and its recipe into one safetensors file, whole or not at all; `notes` go along."""
    save_checkpoint(path, model.network.state_dict(), {**model.recipe, **notes})


def load_classifier(path: str | Path) -> Classifier:
    """Read what `save_classifier` wrote, on the CPU. Nothing is downloaded and nothing in the file is run.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, it is damaged, or it holds another kind of model.
    """
    tensors, recipe = load_checkpoint(path)
    if recipe.get("kind") != "classifier":
        raise ValueError(f"{path}: holds no classifier; expected a model of `genailab train grader` or "
                         "`genailab train classifier`")
    loss = LOSSES[recipe["loss"]](len(recipe["classes"]))
    network = build_backbone(recipe["backbone"], loss.head, pretrained=False).eval()
    load_weights(network, tensors, path)
    return Classifier(network, loss, recipe["classes"], recipe["img_size"], recipe["backbone"],
                      recipe["temperature"])


class Epoch(NamedTuple):
    """One pass: mean loss in training; loss and score (see `train_classifier`) on the validation films."""

    train_loss: float
    val_loss: float
    score: float


class TrainingResult(NamedTuple):
    """The trained model with the weights of its best epoch.

    Attributes
    ----------
    model : Classifier
        In evaluation mode.
    history : list of Epoch
        One an epoch.
    best_epoch : int
        Number, from 0, of the epoch whose weights the model has.
    steps : int
        Batches that were trained on.
    seconds : float
        How long that took, interruptions not counted.
    """

    model: Classifier
    history: list[Epoch]
    best_epoch: int
    steps: int
    seconds: float


def train_classifier(train: Any, val: Any, loss: str = "cross_entropy", backbone: str = "small_cnn", *,
                     n_epochs: int | None = None, minutes: float | None = None, batch_size: int = 32,
                     lr: float = 1e-3, patience: int = 10, augmentation: Augmentation | None = Augmentation(),
                     classes: Sequence[str] | None = None, pretrained: bool = True,
                     model: Classifier | None = None, seed: int = 0,
                     device: str | torch.device | None = None, checkpoint: str | Path | None = None,
                     progress: bool = True) -> TrainingResult:
    """Train a network to tell grades or classes.

    Parameters
    ----------
    train, val : Dataset
        Pairs of an image (1, S, S) float32 in [-1, 1] and an integer label, as `RadiographFolder` gives them.
        No patient may be in both.
    loss : str, default "cross_entropy"
        One of `ordinal.LOSSES`; all but cross-entropy take the classes as ordered.
    backbone : str, default "small_cnn"
        One of `build_backbone`. With `frozen_lite0` every film is described once, without augmentation.
    n_epochs : int, optional
        Passes over as many films as `train` has, at most.
    minutes : float, optional
        Stops after so long, and repeats exactly no more. Give at least one of the two.
    batch_size : int, default 32
        Films a step.
    lr : float, default 1e-3
        Step size of AdamW for the new layers; pretrained ones get 0.3 of it. Rises for 20 steps, then
        falls to 0 along a cosine.
    patience : int, default 10
        Epochs without a better score after which training stops.
    augmentation : Augmentation, optional
        Of the training films alone; None leaves them as they are.
    classes : sequence of str, optional
        Names of the labels; by default those of `train`.
    pretrained : bool, default True
        Start from known weights where the backbone has any.
    model : Classifier, optional
        Trained on, from a copy of its weights, instead of a fresh network; its loss and backbone are kept.
    seed : int, default 0
        Same seed, arguments and threads: same model; on a graphics card only where
        `torch.use_deterministic_algorithms` is on, as in a lesson.
    device : str or torch.device, optional
        None takes the best there is.
    checkpoint : str or Path, optional
        A .safetensors file for the whole state, written after each epoch. If it is there, training goes on
        from it, to the same model as if it had never stopped.
    progress : bool, default True
        Show a bar.

    Returns
    -------
    TrainingResult
        With the weights of the epoch that has the best score on `val`: quadratic weighted kappa for grades
        and ordered classes, balanced accuracy for others. That score is therefore a little too good.

    Raises
    ------
    ValueError
        If the films are no such films, a class has fewer than two in `train`, the classes of `val` are
        others, or the checkpoint belongs to another training.
    FloatingPointError
        If the loss is no number.

    Notes
    -----
    Every class is seen equally often: rare films come several times an epoch, common ones not every time.
    """
    if n_epochs is None and minutes is None:
        raise ValueError("how long to train? Give n_epochs or minutes")
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: expected one of {', '.join(LOSSES)}")
    names = list(classes if classes is not None else train.classes)
    if model is not None and model.classes != names:
        raise ValueError(f"model: knows the classes {', '.join(model.classes)}; expected those of train, "
                         f"{', '.join(names)}, in this order")
    if list(getattr(val, "classes", names)) != names:
        raise ValueError(f"val: its classes are {', '.join(val.classes)}; expected those of train, "
                         f"{', '.join(names)}, in this order")
    labels, img_size = _labels(train, names, "train", at_least=2)
    val_labels, _ = _labels(val, names, "val", img_size=img_size)
    continued = model is not None
    if model is None:
        criterion = LOSSES[loss](len(names))
        model = Classifier(build_backbone(backbone, criterion.head, pretrained, seed), criterion, names,
                           img_size, backbone)
    else:
        model = dataclasses.replace(model, network=copy.deepcopy(model.network), img_size=img_size)
    network, criterion = model.network, model.loss
    join_processes()
    accelerator = Accelerator(device_placement=False)
    rank, world = accelerator.process_index, accelerator.num_processes
    where = accelerator.device if world > 1 else choose_device(device)
    network.to(where)
    batch_size = min(batch_size, len(labels))
    recipe = {**model.recipe, "training": {
        "n_epochs": n_epochs, "minutes": minutes, "batch_size": batch_size, "lr": lr, "patience": patience,
        "augmentation": augmentation and dataclasses.asdict(augmentation), "pretrained": pretrained,
        "continued": continued, "seed": seed,
        "films": [labels.bincount().tolist(), val_labels.bincount().tolist()]}}
    state = _State(network, lr, patience, n_epochs, minutes, len(labels) // batch_size)
    if checkpoint is not None and Path(checkpoint).exists():
        state.restore(checkpoint, recipe)
    if isinstance(network, FrozenLite0):
        augmentation = None
        train, val = _described(train, network), _described(val, network)
        network.fit(train.tensors[0])

    wrapped = accelerator.prepare(network)
    ordered = not isinstance(criterion, CrossEntropy) or set(names) <= set(GRADES)
    metric = metrics.qwk if ordered else metrics.balanced_accuracy
    bar = tqdm(total=n_epochs and n_epochs * state.steps_an_epoch, initial=state.step, desc="training",
               unit="step", disable=not (progress and accelerator.is_main_process))
    with bar:
        share = state.share_done(accelerator)
        while share < 1 and not state.stopped():
            losses = []
            network.train()
            for rows in _balanced(labels, seed, len(state.history)).split(batch_size)[:state.steps_an_epoch]:
                rows, number = rows[rank::world], (1_000_003 * (seed + 1) + state.step) * world + rank
                images = _inputs(train, rows)
                if augmentation is not None:
                    images = augmentation(images, torch.Generator().manual_seed(number))
                with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
                    torch.manual_seed(number)  # of dropout; so a training that resumes needs no generator
                    batch_loss = criterion(wrapped(images.to(where)), labels[rows].to(where))
                accelerator.backward(batch_loss)
                losses.append(accelerator.reduce(batch_loss.detach(), "mean").item())
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(f"step {state.step}: loss {losses[-1]}; lower lr={lr}")
                state.move(share)
                bar.set_postfix(loss=f"{np.mean(losses):.3f}", refresh=False)
                bar.update()
                share = state.share_done(accelerator)
                if share >= 1:
                    break
            logits = _evaluate(network, val, where)
            found = metric(val_labels.numpy(), criterion.decode(logits).numpy())
            numbers = torch.tensor([np.mean(losses), criterion(logits, val_labels), found])
            state.keep(Epoch(*accelerator.reduce(numbers.to(where), "mean").tolist()))
            bar.set_description(f"training, best score {state.history[state.best_epoch].score:.3f}")
            if checkpoint is not None and accelerator.is_main_process:
                state.save(checkpoint, recipe)
    network.load_state_dict(state.best_weights)
    logits = _evaluate(network, val, where)
    model.temperature = metrics.fit_temperature(logits, val_labels, criterion.probabilities)
    return TrainingResult(model, state.history, state.best_epoch, state.step, state.seconds())


class _State:
    """Everything that goes on from where it was when a training resumes."""

    def __init__(self, network: Network | FrozenLite0, lr: float, patience: int, n_epochs: int | None,
                 minutes: float | None, steps_an_epoch: int) -> None:
        self.network, self.lr, self.patience = network, lr, patience
        self.n_epochs, self.minutes, self.steps_an_epoch = n_epochs, minutes, steps_an_epoch
        new = list(network.head.parameters())
        known = [p for p in network.parameters() if not any(p is other for other in new)]
        trust = TRUST if getattr(network, "pretrained", False) else 1.0
        self.optimiser = torch.optim.AdamW([{"params": new, "trust": 1.0}, {"params": known, "trust": trust}],
                                           weight_decay=WEIGHT_DECAY)
        self.history: list[Epoch] = []
        self.best_weights: dict[str, Tensor] = {}
        self.step, self.seconds_before, self.started = 0, 0.0, time.monotonic()

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def share_done(self, accelerator: Accelerator) -> float:
        """Return how much of the training is done; all processes have to stop at one step."""
        share = self.step / (self.n_epochs * self.steps_an_epoch) if self.n_epochs else 0.0
        if self.minutes:
            seconds = torch.tensor(self.seconds(), device=accelerator.device)
            share = max(share, accelerator.reduce(seconds, "mean").item() / (60 * self.minutes))
        return share

    @property
    def best_epoch(self) -> int:
        """The number of the epoch with the highest score; one that does not exist is the lowest."""
        return int(np.argmax(np.nan_to_num([epoch.score for epoch in self.history], nan=-math.inf)))

    def stopped(self) -> bool:
        return bool(self.history) and len(self.history) > self.best_epoch + self.patience

    def move(self, share: float) -> None:
        """Move the weights by their gradients."""
        for group in self.optimiser.param_groups:
            group["lr"] = (self.lr * group["trust"] * min(1, (self.step + 1) / WARM_UP)
                           * (1 + math.cos(math.pi * share)) / 2)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1

    def keep(self, epoch: Epoch) -> None:
        """Note an epoch, and its weights if none was better."""
        self.history.append(epoch)
        if self.best_epoch == len(self.history) - 1:
            self.best_weights = copy.deepcopy(self.network.state_dict())

    def save(self, path: str | Path, recipe: dict[str, Any]) -> None:
        tensors = {f"weights.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for p, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{p}.{name}": value for name, value in values.items()}
        save_checkpoint(path, tensors, {**recipe, "kind": "training", "history": self.history,
                                        "step": self.step, "seconds": self.seconds()})

    def restore(self, path: str | Path, recipe: dict[str, Any]) -> None:
        """Read what `save` wrote, if it belongs to the training that `recipe` describes."""
        tensors, found = load_checkpoint(path)
        if difference := first_difference(found, {**recipe, "kind": "training"}):
            raise ValueError(f"{path}: belongs to another training ({difference}): "
                             "train with the same arguments, or name another checkpoint")
        load_weights(self.network, tensors, path, "best.")
        self.best_weights = copy.deepcopy(self.network.state_dict())
        load_weights(self.network, tensors, path, "weights.")
        values: dict[int, dict[str, Tensor]] = {}
        for name in tensors:
            if name.startswith("optimiser."):
                _, p, key = name.split(".")
                values.setdefault(int(p), {})[key] = tensors[name]
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": values})
        self.history = [Epoch(*epoch) for epoch in found["history"]]
        self.step, self.seconds_before = found["step"], found["seconds"]


def _labels(films: Any, classes: list[str], part: str, at_least: int = 0,
            img_size: int | None = None) -> tuple[Tensor, int]:
    """Return the labels (N,) and the size of films, or say what is wrong with them."""
    part = str(getattr(getattr(films, "dataset", films), "root_dir", part))
    if len(films) == 0:
        raise ValueError(f"{part}: holds no films; expected some of every class")
    image = films[0][0]
    check_images(image[None])
    img_size = img_size or image.shape[-1]
    if image.shape != (1, img_size, img_size):
        raise ValueError(f"{part}: films of shape {tuple(image.shape)}; expected {(1, img_size, img_size)}, "
                         "as all films of train and val")
    labels = torch.tensor([int(label) for _, label in films])
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"{part}: labels from {labels.min()} to {labels.max()}; expected 0 to "
                         f"{len(classes) - 1} for the classes {', '.join(classes)}")
    for name, count in zip(classes, labels.bincount(minlength=len(classes)).tolist(), strict=True):
        if count < at_least:
            raise ValueError(f"{part}: {count} films of {name}; expected at least {at_least} of every class")
    return labels, img_size


def _inputs(films: Any, rows: Tensor) -> Tensor:
    inputs = torch.stack([films[int(i)][0] for i in rows])
    return _as_stored(inputs) if inputs.ndim == 4 else inputs


def _chunks(films: Any) -> Iterator[Tensor]:
    return (_inputs(films, rows) for rows in torch.arange(len(films)).split(32))


def _described(films: Any, network: FrozenLite0) -> TensorDataset:
    return TensorDataset(torch.cat([network.describe(images) for images in _chunks(films)]))


@torch.no_grad()
def _evaluate(network: nn.Module, films: Any, where: torch.device) -> Tensor:
    network.eval()
    return torch.cat([network(inputs.to(where)).cpu() for inputs in _chunks(films)])


def _balanced(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Draw as many rows as there are films, every class equally often, no film again before all others."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
    share = -(-len(labels) // len(labels.unique()))
    rows = []
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        turns = -(-share // len(of_class))
        order = [torch.randperm(len(of_class), generator=generator) for _ in range(turns)]
        rows.append(of_class[torch.cat(order)[:share]])
    mixed = torch.cat(rows)
    return mixed[torch.randperm(len(mixed), generator=generator)][:len(labels)]
