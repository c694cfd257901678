"""Train a denoiser: the loss, the loop, and the state that a training goes on from.

All randomness (weights, order of the images, noise) follows from `seed` and is drawn on the CPU.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, skip_first_batches
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from genailab_helpers.checkpoints import (
    choose_device,
    first_difference,
    join_processes,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from genailab_helpers.diffusion.architectures import UNet2D
from genailab_helpers.diffusion.denoiser import NOISE_MEAN, NOISE_STD, WEIGHTS, Denoiser, add_noise
from genailab_helpers.progress import Progress
from genailab_helpers.radiographs import check_images

EMA_SHARPNESS = 12.0  # the average looks back over about a thirteenth of the training
UNTOLD = 0.1  # share of images whose label is withheld, so that guidance has an estimate without label
FIT_IMAGES = 1024  # at most so many images measure mean and directions: more take memory for little
WARM_UP = 50  # steps


def denoiser_loss(denoiser: Denoiser, images: Tensor, labels: Tensor | None = None,
                  generator: torch.Generator | None = None) -> Tensor:
    """Draw a noise level and noise for each image, and return how far the denoiser misses the images.

    Parameters
    ----------
    denoiser : Denoiser
        D(x, sigma, labels).
    images : Tensor
        (N, 1, H, W) float32 in [-1, 1].
    labels : Tensor, optional
        (N,) integers below the denoiser's num_classes; a tenth of them is withheld.
    generator : torch.Generator, optional
        Source of noise levels, noise and what is withheld, on the CPU; None takes torch's own.

    Returns
    -------
    Tensor
        One number, with its graph; about 1 is what the best linear estimate reaches.

    Notes
    -----
    Mean of ((D(x + sigma n, sigma) - x) / c_out)^2 with log-normal sigma (Karras et al. 2022), one noise
    level from each of N equally likely ranges.
    """
    n = len(images)
    levels = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    sigma = (NOISE_MEAN + NOISE_STD * torch.special.ndtri(levels.clamp(1e-6, 1 - 1e-6))).exp()
    noise = torch.randn(images.shape, generator=generator)
    sigma, noise = sigma.to(images.device), noise.to(images.device)
    if labels is not None:
        withheld = (torch.rand(n, generator=generator) < UNTOLD).to(labels.device)
        labels = labels.masked_fill(withheld, denoiser.num_classes or 0)
    estimate = denoiser(add_noise(images, noise, sigma), sigma, labels)
    return ((estimate - images) / denoiser.scales(sigma)[0]).square().mean()


def train_image_diffusion(dataloader: Iterable[Any], img_size: int, n_epochs: int | None = None,
                          device: str | torch.device | None = None, *, n_steps: int | None = None,
                          minutes: float | None = None, num_classes: int | None = None, seed: int = 0,
                          lr: float = 5e-3, model: Denoiser | None = None,
                          checkpoint: str | Path | None = None, checkpoint_every: int = 100,
                          compile_network: bool = False,
                          progress: bool = True) -> tuple[Denoiser, list[float]]:
    """Train a diffusion model on images, or on images with labels.

    Parameters
    ----------
    dataloader : DataLoader or other iterable
        Batches (N, 1, img_size, img_size) float32 in [-1, 1], or pairs of such a batch and labels (N,). Pairs
        make the model class-conditional. A DataLoader without a generator of its own is read in an order that
        follows from `seed`, whatever its number of workers; any other iterable has to be repeatable.
    img_size : int
        Side of the square images in pixels; a multiple of 8 for the default network, which has a fourth level
        where it is one of 16 and at least 64.
    n_epochs, n_steps : int, optional
        Length of the training, in passes over the images or in batches.
    minutes : float, optional
        Stops after so long, and repeats exactly no more. Give at least one of the three.
    device : str or torch.device, optional
        None takes the best there is.
    num_classes : int, optional
        Number of labels; None asks the data set for its `classes` when there are labels.
    seed : int, default 0
        Same seed, steps, device and threads: same losses and same weights.
    lr : float, default 5e-3
        Step size; rises for 50 steps, then falls to 0 in a straight line over the training.
    model : Denoiser, optional
        Trained instead of a fresh one, from a copy of its weights; its mean and directions are kept.
    checkpoint : str or Path, optional
        A .safetensors file for the whole state, written now and then, at the end, and where Ctrl-C or an
        error ends the training. If it is there, training goes on from it, to the same losses and weights as
        if it had never stopped.
    checkpoint_every : int, default 100
        Steps between two writings of it; so many are lost at most where a training is killed.
    compile_network : bool, default False
        Hand the network to `torch.compile`: up to a minute before the first step, and worth it on a graphics
        card only, for images of 128x128 pixels or more.
    progress : bool, default True
        Show a bar with the loss and the time left.

    Returns
    -------
    model : Denoiser
        With the running average (EMA) of the weights, in evaluation mode.
    losses : list of float
        `denoiser_loss`, one a step.

    Raises
    ------
    ValueError
        If a length is 0 or less, the batches are no such images or labels or do not fit the model, or the
        checkpoint belongs to another training.
    RuntimeError
        If the device is not there.
    FloatingPointError
        If the loss is no number. The checkpoint holds the state before that step.

    Notes
    -----
    Muon for the inner weights, AdamW for the others. The average has the power profile of Karras et al. 2024,
    whose memory grows with the training. Started by `accelerate launch`, each of P processes takes a P-th of
    every batch. On CUDA the network works in bfloat16 where the card has it; weights stay in float32.
    """
    if n_epochs is not None:
        n_steps = min(n_epochs * _n_batches(dataloader), sys.maxsize if n_steps is None else n_steps)
    processes = join_processes()
    where = processes.device if processes.num_processes > 1 else choose_device(device)
    state = TrainingState(_own_model(model, dataloader, img_size, num_classes, seed), lr, where)
    recipe = {**state.model.recipe, "training": {
        "seed": seed, "lr": lr, "n_steps": n_steps, "minutes": minutes,
        "batches": getattr(dataloader, "__len__", lambda: None)()}}
    resumed = checkpoint is not None and Path(checkpoint).exists()
    spent = load_training(checkpoint, state, recipe) if resumed else 0.0  # type: ignore[arg-type]
    half = where.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if compile_network:
        state.model.network.compile()

    kept = checkpoint if processes.is_main_process else None
    shown = progress and processes.is_main_process
    batches = _batches(dataloader, seed, len(state.losses))
    with (Progress(n_steps, minutes, shown, len(state.losses), spent) as done,
          _saved_at_the_end(kept, state, recipe, done)):
        while (share := _mean(torch.tensor(done.share, device=where))) < 1:
            batch = _unpack(next(batches), img_size, state.model.num_classes)
            images, labels = _part(batch, processes, where)
            with torch.autocast(where.type, torch.bfloat16, enabled=half):
                loss = denoiser_loss(state.model, images, labels, _generator(seed, done.steps, processes))
            loss.backward()
            state.step(loss, lr * min(1, (done.steps + 1) / WARM_UP) * (1 - share))
            done.step(state.losses[-1])
            if kept and done.steps % checkpoint_every == 0:
                save_training(kept, state, recipe, done.seconds)
    return state.average, state.losses


@contextmanager
def _saved_at_the_end(path: str | Path | None, state: TrainingState, recipe: dict[str, Any],
                      done: Progress) -> Iterator[None]:
    """Save what a block has trained, also where Ctrl-C or an error ends it between two steps."""
    before = len(state.losses)
    try:
        yield
    finally:
        if path and len(state.losses) > before and not state.moving:
            save_training(path, state, recipe, done.seconds)


class TrainingState:
    """All that a training changes: the model, the average of its weights, the optimisers, the losses.

    Parameters
    ----------
    model : Denoiser
        Trained in place.
    lr : float
        Step size.
    device : torch.device
        Where to train.
    """

    def __init__(self, model: Denoiser, lr: float, device: torch.device) -> None:
        self.model = model.to(device).train()
        if device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        named = dict(model.network.named_parameters())
        inner = {name for name, p in named.items() if p.ndim > 1 and ".emb." not in name
                 and name.split(".")[0] in ("down", "up", "shrink", "grow", "attention")}
        self.optimisers = (Muon([named[name] for name in named if name in inner], lr),
                           torch.optim.AdamW([named[name] for name in named if name not in inner], lr,
                                             betas=(0.9, 0.99), weight_decay=0))
        self.losses: list[float] = []
        self.moving = False  # within a step nothing fits together

    def step(self, loss: Tensor, lr: float) -> None:
        """Move the weights against their gradients, and the average after them."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if PartialState().num_processes > 1:
            for gradient in gradients:
                gradient.copy_(reduce(gradient, "mean"))
        value, slope = _mean(loss.detach()), nn.utils.get_total_norm(gradients).item()
        if not math.isfinite(value + slope):
            raise FloatingPointError(f"step {len(self.losses)}: loss {value}, slope {slope}; look for images "
                                     f"that are not finite, or take a smaller step size than lr={lr:.2g}")
        self.moving = True
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            optimiser.zero_grad()
        self.losses.append(value)
        keep = (1 - 1 / len(self.losses)) ** (EMA_SHARPNESS + 1)
        move = torch.optim.swa_utils.get_ema_multi_avg_fn(keep)  # all weights at once
        move(list(self.average.parameters()), list(self.model.parameters()), len(self.losses))
        self.moving = False


def save_training(path: str | Path, state: TrainingState, recipe: dict[str, Any], seconds: float) -> None:
    """Write a training into one safetensors file, whole or not at all.

    Parameters
    ----------
    path : str or Path
        The file to make or to replace; `load_denoiser` reads the average of the weights from it.
    state : TrainingState
        What to keep.
    recipe : dict
        Describes model and training, ready for JSON.
    seconds : float
        How long it has taken.
    """
    tensors = {f"{WEIGHTS}{name}": tensor for name, tensor in state.average.state_dict().items()}
    tensors |= {f"weights.{name}": tensor for name, tensor in state.model.state_dict().items()}
    for i, optimiser in enumerate(state.optimisers):
        for p, values in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{p}.{name}": value for name, value in values.items()}
    tensors["losses"] = torch.tensor(state.losses, dtype=torch.float64)
    done = {"steps": len(state.losses), "seconds": round(seconds, 1)}
    save_checkpoint(path, tensors, {**recipe, "progress": done})


def load_training(path: str | Path, state: TrainingState, recipe: dict[str, Any]) -> float:
    """Read what `save_training` wrote into a state of the same training.

    Parameters
    ----------
    path : str or Path
        The safetensors file.
    state : TrainingState
        Is changed.
    recipe : dict
        Describes the training that is to go on.

    Returns
    -------
    float
        Seconds that it has taken.

    Raises
    ------
    ValueError
        If the file is damaged, or belongs to another training.
    """
    tensors, found = load_checkpoint(path)
    difference = first_difference(found, recipe)
    if difference or "progress" not in found:
        raise ValueError(f"{path}: belongs to another training ({difference or 'it holds weights only'}): "
                         f"train with the same arguments, or name another checkpoint")
    load_weights(state.average, tensors, path, WEIGHTS)
    load_weights(state.model, tensors, path, "weights.")
    for i, optimiser in enumerate(state.optimisers):
        values: dict[int, dict[str, Tensor]] = {}
        for name in tensors:
            if name.startswith(f"optimiser.{i}."):
                _, _, p, key = name.split(".")
                values.setdefault(int(p), {})[key] = tensors[name]
        optimiser.load_state_dict({**optimiser.state_dict(), "state": values})
    state.losses = tensors["losses"].tolist()
    return found["progress"]["seconds"]


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal: every direction of a weight matrix moves equally far.

    torch.optim.Muon takes matrices only and works in bfloat16, which is slow on a CPU; this one takes
    convolutions too (as matrices with one row an output channel) and works on all matrices of one shape at
    once.

    Parameters
    ----------
    params : iterable of Parameter
        Weights with two or more axes.
    lr : float
        Step size; scaled so that AdamW's values serve.
    momentum : float, default 0.95
        Weight of the past.

    Notes
    -----
    Jordan et al. 2024 (Muon), Newton-Schulz iteration of degree 5; scale 0.2 sqrt(longer side):
    Liu et al. 2025.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    if "average" not in self.state[p]:
                        self.state[p]["average"] = torch.zeros_like(p)
                    average = self.state[p]["average"]
                    average.lerp_(p.grad, 1 - group["momentum"])
                    ahead = p.grad.lerp(average, group["momentum"]).flatten(1)  # Nesterov
                    alike.setdefault(ahead.shape, []).append((p, ahead))
            for shape, members in alike.items():
                steps = _orthogonal(torch.stack([ahead for _, ahead in members]))
                for (p, _), step in zip(members, steps, strict=True):
                    p.add_(step.reshape(p.shape), alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


def _orthogonal(matrices: Tensor) -> Tensor:
    """Bring all singular values of (N, rows, columns) near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315) @ x
    return x.mT if tall else x


def _own_model(model: Denoiser | None, loader: Any, img_size: int, num_classes: int | None,
               seed: int) -> Denoiser:
    """Return a copy of the model, or a fresh one that knows mean and directions of the images."""
    batch = next(_epoch(loader, seed, 0))
    if model is not None:
        if num_classes not in (None, model.num_classes) or img_size != model.image_shape[-1]:
            raise ValueError(f"this model was made for img_size={model.image_shape[-1]} and num_classes="
                             f"{model.num_classes}, not for {img_size} and {num_classes}")
        _unpack(batch, img_size, model.num_classes)
        return copy.deepcopy(model)
    if num_classes is None and isinstance(batch, list | tuple) and len(batch) == 2:
        num_classes = _count_classes(loader)
    images: list[Tensor] = []
    for batch in _epoch(loader, seed, 0):
        images.append(_unpack(batch, img_size, num_classes)[0])
        if sum(map(len, images)) >= FIT_IMAGES:
            break
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deep = img_size >= 64 and img_size % 16 == 0  # a fourth level sees the whole chest at once
        network = UNet2D(channel_multipliers=(1, 2, 3, 4) if deep else (1, 2, 4), num_classes=num_classes)
        model = Denoiser(network, img_size)
    model.fit(torch.cat(images))
    return model


def _count_classes(loader: Any) -> int:
    dataset: Any = getattr(loader, "dataset", None)
    dataset = dataset.dataset if isinstance(dataset, Subset) else dataset
    if not hasattr(dataset, "classes"):
        raise ValueError("the loader yields labels, and its data set has no `classes`: give num_classes")
    return len(dataset.classes)


def _n_batches(loader: Any) -> int:
    if not hasattr(loader, "__len__"):
        raise ValueError("this loader does not know its length: give n_steps instead of n_epochs")
    return len(loader)


def _epoch(loader: Iterable[Any], seed: int, epoch: int, skipped: int = 0) -> Iterator[Any]:
    """Read a loader once. Its sampler draws the order from torch's own generator when it is first asked."""
    if isinstance(loader, DataLoader):
        loader, skipped = skip_first_batches(loader, skipped), 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1_000_003 * (epoch + 1))
        batches = islice(loader, skipped, None)
        first = list(islice(batches, 1))
    if not first:
        raise ValueError("the loader yields no batch: is its folder empty, has it too few images for "
                         "drop_last, or can it be read only once?")
    return chain(first, batches)


def _batches(loader: Iterable[Any], seed: int, start: int) -> Iterator[Any]:
    """Give batches without end, from number `start` on."""
    epoch, skipped = divmod(start, max(1, getattr(loader, "__len__", lambda: sys.maxsize)()))
    while True:
        yield from _epoch(loader, seed, epoch, skipped)
        epoch, skipped = epoch + 1, 0


def _unpack(batch: Any, img_size: int, num_classes: int | None) -> tuple[Tensor, Tensor | None]:
    """Take a batch apart, or say what is wrong with it."""
    images, *rest = batch if isinstance(batch, list | tuple) else [batch]
    check_images(images)
    if images.shape[-2:] != (img_size, img_size):
        raise ValueError(f"images: expected {img_size}x{img_size} pixels, got {tuple(images.shape)}; "
                         "give data set and training the same img_size")
    if bool(rest) != (num_classes is not None):
        raise ValueError(f"num_classes={num_classes} does not fit a loader that yields images "
                         f"{'with' if rest else 'without'} labels")
    if num_classes is None:
        return images, None
    labels = torch.as_tensor(rest[0])
    if (labels.shape != images.shape[:1] or labels.is_floating_point()
            or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes):
        raise ValueError(f"labels: expected one whole number from 0 to {num_classes - 1} an image, got "
                         f"{labels.dtype} of shape {tuple(labels.shape)} from {labels.min():.4g} to "
                         f"{labels.max():.4g}")
    return images, labels


def _part(batch: tuple[Tensor, Tensor | None], processes: PartialState,
          device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return this process's part of a batch, on its device."""
    rank, world = processes.process_index, processes.num_processes
    if len(batch[0]) % world:
        raise ValueError(f"a batch of {len(batch[0])} images cannot be shared equally by {world} processes: "
                         f"take a multiple as batch_size, and drop_last=True")
    images, labels = batch
    return images[rank::world].to(device), None if labels is None else labels[rank::world].to(device)


def _generator(seed: int, step: int, processes: PartialState) -> torch.Generator:
    """Return the source of a step's noise, another one on every process; so none has to be kept."""
    number = (1_000_003 * (seed + 1) + step) * processes.num_processes + processes.process_index
    return torch.Generator().manual_seed(number)


def _mean(value: Tensor) -> float:
    """Return the mean over all processes, so that they agree."""
    return reduce(value, "mean").item()
