"""Train a network on grades or classes, keep it with all that its use needs, and use it.

One engine for both: the loss decides what is learned. All randomness (weights, order of the images,
augmentation, dropout) comes from `seed`, so that a training repeats itself.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from genailab_helpers.checkpoints import choose_device, load_checkpoint, load_weights, save_checkpoint
from genailab_helpers.classification import metrics
from genailab_helpers.classification.losses import LOSSES, CrossEntropy, GradeLoss
from genailab_helpers.classification.networks import CNNS, FrozenLite0, Network, build_backbone, least_size
from genailab_helpers.datasets.names import GRADES
from genailab_helpers.progress import Progress
from genailab_helpers.radiographs import check_images

WARM_UP = 20  # steps
WEIGHT_DECAY = 0.02
TRUST = 0.3  # pretrained layers move so much more slowly than the new one
RECIPE = ("classes", "img_size", "backbone", "temperature", "logit_shift")  # of a model, beside its loss


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
        matrix = [cos * mirror, -sin, 2 * self.shift * right, sin * mirror, cos, 2 * self.shift * down]
        grid = F.affine_grid(torch.stack(matrix, 1).view(n, 2, 3), list(images.shape), align_corners=False)
        moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside, 0 is black
        gain, offset = 1 + self.contrast * contrast, self.brightness * light
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
        return _evaluate(self.network, TensorDataset(images)) + torch.tensor(self.logit_shift)

    def predict(self, images: Tensor) -> Prediction:
        """Return calibrated probabilities and labels; parameters and errors as in `logits`."""
        logits = self.logits(images)
        return Prediction(self.loss.probabilities(logits / self.temperature), self.loss.decode(logits))


def save_classifier(path: str | Path, model: Classifier, **notes: Any) -> None:
    """Write a model and its recipe into one safetensors file, whole or not at all; `notes` go along."""
    loss = next(name for name, kind in LOSSES.items() if kind is type(model.loss))
    recipe = {name: getattr(model, name) for name in RECIPE}
    save_checkpoint(path, model.network.state_dict(), {"kind": "classifier", "loss": loss, **recipe, **notes})


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
    recipe = {"logit_shift": [0.0], **recipe}  # older models have none
    if not _is_sound(recipe):
        raise ValueError(f"{path}: holds no classifier, or its recipe makes no sense; expected a model of "
                         "`genailab train grader` or `genailab train classifier`")
    if least_size(recipe["backbone"]) > sum(tensor.numel() for tensor in tensors.values()):
        raise ValueError(f"{path}: holds fewer weights than {recipe['backbone']} has; train again")
    loss = LOSSES[recipe["loss"]](len(recipe["classes"]))
    network = build_backbone(recipe["backbone"], loss.head, pretrained=False).eval()
    load_weights(network, tensors, path)
    return Classifier(network, loss, **{name: recipe[name] for name in RECIPE})


def _is_sound(recipe: dict[str, Any]) -> bool:
    """Tell whether every field is there, of the right type and within sense."""
    loss, classes, img_size, backbone, temperature, shift = (recipe.get(name) for name in ("loss", *RECIPE))
    return (recipe.get("kind") == "classifier"
            and type(loss) is type(backbone) is str and loss in LOSSES
            and type(classes) is list and 2 <= len(classes) <= 1000 and {*map(type, classes)} == {str}
            and type(img_size) is int and 1 <= img_size <= 4096
            and type(temperature) is float and 1e-6 < temperature < 1e6  # else logits overflow
            and type(shift) is list and len(shift) in (1, len(classes)) and {*map(type, shift)} == {float}
            and all(abs(number) < 1e6 for number in shift))


class Epoch(NamedTuple):
    """One pass: mean loss in training, and score (see `train_classifier`) on the validation images."""

    train_loss: float
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
                     classes: Sequence[str] | None = None, model: Classifier | None = None,
                     seed: int = 0, device: str | torch.device | None = None,
                     progress: bool = True) -> TrainingResult:
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
    names, img_size = list(classes if classes is not None else train.classes), train[0][0].shape[-1]
    labels, val_labels = (torch.LongTensor([int(label) for _, label in part]) for part in (train, val))
    _check_parts(train, val, labels, val_labels, names, model)
    if model is None:
        criterion = LOSSES[loss](len(names))
        network = build_backbone(backbone, criterion.head, seed=seed)
        model = Classifier(network, criterion, names, img_size, backbone)
    model, where = replace(copy.deepcopy(model), img_size=img_size), choose_device(device)
    network, optimiser = model.network.to(where), _optimiser(model)
    ordered = not isinstance(model.loss, CrossEntropy) or set(names) <= set(GRADES)
    metric = metrics.qwk if ordered else metrics.balanced_accuracy
    batch_size, best, history = min(batch_size, len(labels)), 0, list[Epoch]()
    n_steps = n_epochs and n_epochs * (len(labels) // batch_size)
    cards = [where] if where.type == "cuda" else []
    with Progress(n_steps, minutes, progress) as clock, torch.random.fork_rng(devices=cards):
        if isinstance(network, FrozenLite0):
            augmentation = None  # then every image is described once, and comes from the cache
            network.fit(torch.cat([network.describe(images) for images, _ in _batches(train)]))
        while clock.share < 1 and len(history) - best <= patience:
            batches = _batches(train, batch_size, _draw_equally(labels, seed, len(history)))
            mean_loss = _run_epoch(model, batches, augmentation, optimiser, lr, clock, seed)
            decided = model.loss.decode(_evaluate(network, val))
            history.append(Epoch(mean_loss, metric(val_labels.numpy(), decided.numpy())))
            if len(history) == 1 or history[-1].score > history[best].score:
                best, best_weights = len(history) - 1, copy.deepcopy(network.state_dict())
    if not history:
        raise ValueError(f"minutes={minutes}: over before the first step, since preparing the images took "
                         f"{clock.seconds:.1f} s; give more, or n_epochs")
    network.load_state_dict(best_weights)
    _calibrate(model, labels, val, val_labels)
    return TrainingResult(model, history, best, clock.steps, clock.seconds)


def _run_epoch(model: Classifier, batches: Iterable[list[Tensor]], augmentation: Augmentation | None,
               optimiser: torch.optim.Optimizer, lr: float, clock: Progress, seed: int) -> float:
    """Train on batches of images and labels until the time is over, and return the mean loss."""
    where, losses = next(model.network.parameters()).device, []
    model.network.train()
    for images, labels in batches:
        number = 1_000_003 * (seed + 1) + clock.steps
        torch.manual_seed(number)  # of dropout
        if augmentation is not None:
            images = augmentation(images, torch.Generator().manual_seed(number))
        loss = model.loss(model.network(images.to(where)), labels.to(where))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"step {clock.steps}: loss {losses[-1]}; lower lr={lr}")
        loss.backward()
        for group in optimiser.param_groups:  # rises, then falls along a cosine
            group["lr"] = (lr * group["trust"] * min(1, (clock.steps + 1) / WARM_UP)
                           * (1 + math.cos(math.pi * clock.share)) / 2)
        optimiser.step()
        optimiser.zero_grad()
        clock.step(losses[-1])
        if clock.share >= 1:
            break
    return float(np.mean(losses))


def _check_parts(train: Any, val: Any, labels: Tensor, val_labels: Tensor, names: list[str],
                 model: Classifier | None) -> None:
    """Refuse what no training can use."""
    for other in (val, model):
        if (theirs := list(getattr(other, "classes", names))) != names:
            raise ValueError(f"{type(other).__name__}: its classes are {', '.join(theirs)}; expected those "
                             f"of train, {', '.join(names)}, in this order")
    for part, of_part, least in (("train", labels, 2), ("val", val_labels, 1)):
        if (counts := of_part.bincount(minlength=len(names))).min() < least:
            raise ValueError(f"{part}: {counts.tolist()} images of {', '.join(names)}; expected {least} or "
                             "more of each")
    check_images(torch.stack([train[0][0], val[0][0]]))


def _optimiser(model: Classifier) -> torch.optim.Optimizer:
    """Return AdamW with two groups: the new layer, and the rest with its own trust."""
    new = list(model.network.head.parameters())
    known = [p for p in model.network.parameters() if not any(p is other for other in new)]
    trust = 1.0 if model.backbone in CNNS else TRUST
    return torch.optim.AdamW([{"params": new, "trust": 1.0}, {"params": known, "trust": trust}],
                             weight_decay=WEIGHT_DECAY)


def _draw_equally(labels: Tensor, seed: int, epoch: int) -> list[int]:
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
    return mixed[torch.randperm(len(mixed), generator=generator)][:len(labels)].tolist()


def _calibrate(model: Classifier, labels: Tensor, val: Any, val_labels: Tensor) -> None:
    """Fit the temperature on val, to logits that are shifted to the proportions of the training labels.

    z / T + shift, not (z + shift) / T: how common a class is does not depend on how confident the network is.
    """
    shift = torch.tensor(model.loss.logit_shift(labels.bincount()))
    model.temperature = metrics.fit_temperature(_evaluate(model.network, val), val_labels,
                                                lambda z: model.loss.probabilities(z + shift))
    model.logit_shift = (model.temperature * shift).tolist()


def _batches(images: Any, size: int = 32, rows: list[int] | None = None) -> Iterator[list[Tensor]]:
    """Give batches of images and labels, by default all in their order.

    Images are rounded to the 8 bits in which `RadiographFolder` keeps them: training and use see the same.
    """
    own = torch.Generator()  # the global one stays as it is
    for batch, *labels in DataLoader(images, size, sampler=rows, drop_last=rows is not None, generator=own):
        yield [((batch + 1) * 127.5).round() / 127.5 - 1, *labels]


@torch.no_grad()
def _evaluate(network: nn.Module, images: Any) -> Tensor:
    """Return the logits of a network for images, on the CPU."""
    where = next(network.parameters()).device
    network.eval()
    return torch.cat([network(batch.to(where)).cpu() for batch, *_ in _batches(images)])
