"""Train a network on grades or classes, keep it with all that its use needs, and use it.

One engine for both: the loss decides what is learned. All randomness (weights, order of the images,
augmentation, dropout) comes from `seed`, so that a training repeats itself.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from genailab_helpers.checkpoints import choose_device, load_checkpoint, load_weights, save_checkpoint
from genailab_helpers.classification import metrics
from genailab_helpers.classification.losses import LOSSES, CrossEntropy, GradeLoss
from genailab_helpers.classification.networks import FrozenLite0, Network, build_backbone, least_size
from genailab_helpers.datasets.names import GRADES
from genailab_helpers.progress import Progress
from genailab_helpers.radiographs import check_images

WARM_UP = 20  # steps
WEIGHT_DECAY = 0.02
TRUST = 0.3  # pretrained layers move so much more slowly than the new one
MAX_CLASSES, MAX_SIDE = 1000, 4096  # of a model that is read


@dataclass(frozen=True)
class Augmentation:
    """Small changes that leave the grade or class of an image as it is. All ranges go to both sides.

    Parameters
    ----------
    rotation : float, default 8.0
        Degrees.
    shift, zoom : float, default 0.05 and 0.1
        Of the image side, and of the scale.
    brightness, contrast : float, default 0.1 and 0.2
        Added to the grey levels in [-1, 1], and of their scale.
    flip : bool, default False
        Mirror half of the images. Only where left and right mean nothing, as in knees: it moves the heart to
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
    """What a classifier says of N images: `probabilities` (N, K), `decoded` (N,) int64."""

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
        Side of the images in pixels.
    backbone : str
        As `build_backbone` knows it.
    temperature : float
        Fitted on the validation images; the probabilities are those of the logits divided by it.
    logit_shift : sequence of float
        Added to what the network gives, since some classes are rarer than the training showed them:
        `GradeLoss.logit_shift` of the training set, times the temperature. (0.0,) changes nothing.
    """

    network: Network | FrozenLite0
    loss: GradeLoss
    classes: list[str]
    img_size: int
    backbone: str
    temperature: float = 1.0
    logit_shift: Sequence[float] = (0.0,)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return logits (N, n_outputs), on the CPU, for images (N, 1, img_size, img_size) in [-1, 1].

        Raises
        ------
        ValueError
            If the images are no such images.
        """
        check_images(images)
        if images.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"images: this model was trained on images of {self.img_size}x{self.img_size} "
                             f"pixels, got {tuple(images.shape)}; read them in that size")
        return _evaluate(self.network, _as_stored(images).split(32)) + torch.tensor(self.logit_shift)

    def predict(self, images: Tensor) -> Prediction:
        """Return calibrated probabilities and labels; parameters and errors as in `logits`."""
        logits = self.logits(images)
        return Prediction(self.loss.probabilities(logits / self.temperature), self.loss.decode(logits))

    @property
    def recipe(self) -> dict[str, Any]:
        """What `load_classifier` needs beside the weights."""
        loss = next(name for name, kind in LOSSES.items() if kind is type(self.loss))
        return {"kind": "classifier", "loss": loss, "logit_shift": list(self.logit_shift),
                **{name: getattr(self, name) for name in ("backbone", "classes", "img_size", "temperature")}}


def save_classifier(path: str | Path, model: Classifier, **notes: Any) -> None:
    """Write a model and its recipe into one safetensors file, whole or not at all; `notes` go along."""
    save_checkpoint(path, model.network.state_dict(), {**model.recipe, **notes})


def load_classifier(path: str | Path) -> Classifier:
    """Read what `save_classifier` wrote, on the CPU. Nothing is downloaded and nothing in the file is run.

    The recipe is checked before anything is built from it: a few bytes could ask for gigabytes.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, it is damaged, it holds another kind of model, a field of its recipe is
        missing or makes no sense, or a weight is no number.
    """
    tensors, recipe = load_checkpoint(path)
    if not isinstance(recipe, dict) or recipe.get("kind") != "classifier":
        raise ValueError(f"{path}: holds no classifier; expected a model of `genailab train grader` or "
                         "`genailab train classifier`")
    recipe = {"logit_shift": [0.0], **recipe}  # older models have none
    _check_recipe(path, recipe)
    if least_size(recipe["backbone"]) > sum(tensor.numel() for tensor in tensors.values()):
        raise ValueError(f"{path}: holds fewer weights than {recipe['backbone']} has; train again")
    loss = LOSSES[recipe["loss"]](len(recipe["classes"]))
    network = build_backbone(recipe["backbone"], loss.head, pretrained=False).eval()
    load_weights(network, tensors, path)
    return Classifier(network, loss, *(recipe[field.name] for field in dataclasses.fields(Classifier)[2:]))


def _check_recipe(path: str | Path, recipe: dict[str, Any]) -> None:
    """Say which field is missing, of another type or without sense."""
    kinds = {"backbone": str, "loss": str, "classes": list, "img_size": int, "temperature": float,
             "logit_shift": list}
    wrong = [name for name, kind in kinds.items() if type(recipe.get(name)) is not kind]
    if not wrong:
        classes, shift = recipe["classes"], recipe["logit_shift"]
        n_outputs = len(classes) - LOSSES.get(recipe["loss"], GradeLoss).per_threshold
        fits = {"loss": recipe["loss"] in LOSSES,
                "classes": 2 <= len(classes) <= MAX_CLASSES and all(type(name) is str for name in classes),
                "img_size": 1 <= recipe["img_size"] <= MAX_SIDE,
                "temperature": 1e-6 < recipe["temperature"] < 1e6,  # else logits overflow
                "logit_shift": len(shift) in (1, n_outputs) and all(
                    type(number) is float and abs(number) < 1e6 for number in shift)}
        wrong = [name for name, fine in fits.items() if not fine]
    for name in wrong[:1]:
        raise ValueError(f"{path}: {name} in its recipe is {recipe.get(name)!s:.50}, of which no model can "
                         "be built; train again")


class Epoch(NamedTuple):
    """One pass: mean loss in training; loss and score (see `train_classifier`) on the validation images."""

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
        How long that took.
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
                     device: str | torch.device | None = None, progress: bool = True) -> TrainingResult:
    """Train a network to tell grades or classes.

    Parameters
    ----------
    train, val : Dataset
        Pairs of an image (1, S, S) float32 in [-1, 1] and an integer label, as `RadiographFolder` gives them.
        No patient may be in both.
    loss : str, default "cross_entropy"
        One of `losses.LOSSES`; all but cross-entropy take the classes as ordered.
    backbone : str, default "small_cnn"
        One of `build_backbone`. With `frozen_lite0` every image is described once, without augmentation.
    n_epochs : int, optional
        Passes over as many images as `train` has, at most.
    minutes : float, optional
        Stops after so long, and repeats exactly no more. Give at least one of the two.
    batch_size : int, default 32
        Images a step.
    lr : float, default 1e-3
        Step size of AdamW for the new layers; pretrained ones get 0.3 of it. Rises for 20 steps, then
        falls to 0 along a cosine.
    patience : int, default 10
        Epochs without a better score after which training stops.
    augmentation : Augmentation, optional
        Of the training images alone; None leaves them as they are.
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
        If the images are no such images, a class has fewer than two in `train` or none in `val`, the classes
        of `val` are others, or `minutes` were over before the first step.
    FloatingPointError
        If the loss is no number.

    Notes
    -----
    Every class is seen equally often: images of rare classes come several times an epoch, those of common
    ones not every time. Epochs are scored as they come, so the score is that of equally common classes. Then
    the logits are shifted to the proportions of `train` (`GradeLoss.logit_shift`; those of `val` are not
    looked at), and the temperature is fitted on `val` with that shift. From then on the most probable class
    is the one of these proportions: accuracy rises by it, balanced accuracy may fall.
    """
    names = list(classes if classes is not None else train.classes)
    labels, val_labels, img_size = _check_parts(train, val, names, loss, model)
    model = _start(names, img_size, loss, backbone, pretrained, seed, model)
    network, criterion, where = model.network, model.loss, choose_device(device)
    optimiser = _optimiser(network.to(where))
    batch_size, history = min(batch_size, len(labels)), list[Epoch]()
    n_batches = len(labels) // batch_size
    with Progress(n_epochs and n_epochs * n_batches, minutes, progress) as clock:
        if isinstance(network, FrozenLite0):
            train, val, augmentation = _described(train, network), _described(val, network), None
            network.fit(train.tensors[0])
        while clock.share < 1 and len(history) <= _best(history) + patience:
            losses = []
            network.train()
            for rows in _draw_equally(labels, seed, len(history)).split(batch_size)[:n_batches]:
                with _own_seed(1_000_003 * (seed + 1) + clock.steps, where) as generator:
                    images = _inputs(train, rows)
                    if augmentation is not None:
                        images = augmentation(images, generator)
                    batch_loss = criterion(network(images.to(where)), labels[rows].to(where))
                batch_loss.backward()
                losses.append(batch_loss.item())
                _step(optimiser, lr, clock, losses[-1])
                if clock.share >= 1:
                    break
            history.append(_judge(model, val, val_labels, float(np.mean(losses))))
            if _best(history) == len(history) - 1:
                best_weights = copy.deepcopy(network.state_dict())
    if not history:
        raise ValueError(f"minutes={minutes}: over before the first step, since preparing the images took "
                         f"{clock.seconds:.1f} s; give more, or n_epochs")
    network.load_state_dict(best_weights)
    _calibrate(model, labels, val, val_labels)
    return TrainingResult(model, history, _best(history), clock.steps, clock.seconds)


def _start(names: list[str], img_size: int, loss: str, backbone: str, pretrained: bool, seed: int,
           model: Classifier | None) -> Classifier:
    """Return a fresh network, or a copy of one to train on."""
    if model is not None:
        return dataclasses.replace(model, network=copy.deepcopy(model.network), img_size=img_size)
    criterion = LOSSES[loss](len(names))
    network = build_backbone(backbone, criterion.head, pretrained, seed)
    return Classifier(network, criterion, names, img_size, backbone)


def _calibrate(model: Classifier, labels: Tensor, val: Any, val_labels: Tensor) -> None:
    """Fit the temperature on val, to logits that are shifted to the proportions of the training labels.

    z / T + shift, not (z + shift) / T: how common a class is does not depend on how confident the network is.
    """
    shift = torch.tensor(model.loss.logit_shift(labels.bincount()))
    logits = _evaluate(model.network, _chunks(val))
    model.temperature = metrics.fit_temperature(logits, val_labels,
                                                lambda z: model.loss.probabilities(z + shift))
    model.logit_shift = (model.temperature * shift).tolist()


def _check_parts(train: Any, val: Any, names: list[str], loss: str,
                 model: Classifier | None) -> tuple[Tensor, Tensor, int]:
    """Return the labels of train and val and the side of the images, or say what is wrong with them."""
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: expected one of {', '.join(LOSSES)}")
    for what, other in (("model", getattr(model, "classes", names)), ("val", getattr(val, "classes", names))):
        if list(other) != names:
            raise ValueError(f"{what}: its classes are {', '.join(other)}; expected those of train, "
                             f"{', '.join(names)}, in this order")
    labels, shape = _labels(train, names, "train", 2)
    val_labels, val_shape = _labels(val, names, "val", 1)
    if not shape == val_shape == (1, shape[-1], shape[-1]):
        raise ValueError(f"train holds images of shape {shape} and val of {val_shape}; expected one square "
                         "shape (1, S, S)")
    return labels, val_labels, shape[-1]


def _labels(images: Any, names: list[str], part: str, at_least: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return the labels (N,) and the shape of images, or say which class is too rare to train or to judge."""
    where = f"{getattr(getattr(images, 'dataset', images), 'root_dir', '')} {part}".strip()
    labels = torch.tensor([int(label) for _, label in images], dtype=torch.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise ValueError(f"{where}: labels from {labels.min()} to {labels.max()}; expected 0 to "
                         f"{len(names) - 1} for the classes {', '.join(names)}")
    for name, count in zip(names, labels.bincount(minlength=len(names)).tolist(), strict=True):
        if count < at_least:
            raise ValueError(f"{where}: {count} images of {name}; expected {at_least} or more of every class")
    check_images(images[0][0][None])
    return labels, tuple(images[0][0].shape)


def _optimiser(network: Network | FrozenLite0) -> torch.optim.Optimizer:
    """Return AdamW with two groups: the new layer, and the rest with its own trust."""
    new = list(network.head.parameters())
    known = [p for p in network.parameters() if not any(p is other for other in new)]
    trust = TRUST if getattr(network, "pretrained", False) else 1.0
    return torch.optim.AdamW([{"params": new, "trust": 1.0}, {"params": known, "trust": trust}],
                             weight_decay=WEIGHT_DECAY)


def _step(optimiser: torch.optim.Optimizer, lr: float, clock: Progress, loss: float) -> None:
    """Move the weights by their gradients, with a step size that rises, then falls along a cosine."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"step {clock.steps}: loss {loss}; lower lr={lr}")
    for group in optimiser.param_groups:
        group["lr"] = (lr * group["trust"] * min(1, (clock.steps + 1) / WARM_UP)
                       * (1 + math.cos(math.pi * clock.share)) / 2)
    optimiser.step()
    optimiser.zero_grad()
    clock.step(loss)


@contextmanager
def _own_seed(number: int, device: torch.device) -> Iterator[torch.Generator]:
    """Give a generator to augment with, and dropout the same seed; the global generator stays as it is."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(number)
        yield torch.Generator().manual_seed(number)


def _draw_equally(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Draw as many rows as there are images, every class equally often, no image again before all others."""
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


def _judge(model: Classifier, val: Any, labels: Tensor, train_loss: float) -> Epoch:
    """Return an epoch with its loss and score on the validation images."""
    ordered = not isinstance(model.loss, CrossEntropy) or set(model.classes) <= set(GRADES)
    metric = metrics.qwk if ordered else metrics.balanced_accuracy
    logits = _evaluate(model.network, _chunks(val))
    score = metric(labels.numpy(), model.loss.decode(logits).numpy())
    return Epoch(train_loss, model.loss(logits, labels).item(), score)


def _best(history: list[Epoch]) -> int:
    """Return the number of the epoch with the highest score; one that does not exist is the lowest."""
    return int(np.argmax(np.nan_to_num([epoch.score for epoch in history] or [0.0], nan=-math.inf)))


def _as_stored(images: Tensor) -> Tensor:
    """Round to the 8 bits in which `RadiographFolder` keeps images, so that training and use see the same."""
    return ((images + 1) * 127.5).round() / 127.5 - 1


def _inputs(images: Any, rows: Tensor) -> Tensor:
    inputs = torch.stack([images[int(i)][0] for i in rows])
    return _as_stored(inputs) if inputs.ndim == 4 else inputs


def _chunks(images: Any) -> Iterator[Tensor]:
    return (_inputs(images, rows) for rows in torch.arange(len(images)).split(32))


def _described(images: Any, network: FrozenLite0) -> TensorDataset:
    return TensorDataset(torch.cat([network.describe(batch) for batch in _chunks(images)]))


@torch.no_grad()
def _evaluate(network: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return the logits of a network for batches, on the CPU."""
    where = next(network.parameters()).device
    network.eval()
    return torch.cat([network(batch.to(where)).cpu() for batch in batches])
