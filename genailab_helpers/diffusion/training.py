"""Train a denoiser: the loss, the loop, and the state that a training goes on from.

All randomness (weights, order of the images, noise) follows from `seed` and is drawn on the CPU.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.data import DataLoader

from genailab_helpers import checkpoints
from genailab_helpers.diffusion.architectures import UNet2D
from genailab_helpers.diffusion.denoiser import NOISE_MEAN, NOISE_STD, WEIGHTS, Denoiser, add_noise
from genailab_helpers.progress import Progress
from genailab_helpers.radiographs import check_images

Loader = DataLoader[Any] | Sequence[Any]  # something of a known length that can be read again and again

LR, WARM_UP = 5e-3, 50  # the step size rises for so many steps, then falls to 0 in a straight line
MOMENTUM = 0.95
EMA_SHARPNESS = 12.0  # the average looks back over about a thirteenth of the training
UNTOLD = 0.1  # share of images whose label is withheld, so that guidance has an estimate without label
FIT_IMAGES = 1024  # at most so many images measure mean and directions: more take memory for little
SAVE_EVERY = 100  # steps; so many are lost at most where a training is killed


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


def train_image_diffusion(dataloader: Loader, img_size: int, n_epochs: int | None = None,
                          device: str | torch.device | None = None, *, n_steps: int | None = None,
                          minutes: float | None = None, num_classes: int | None = None, seed: int = 0,
                          model: Denoiser | None = None, checkpoint: str | Path | None = None,
                          compile_network: bool = False,
                          progress: bool = True) -> tuple[Denoiser, list[float]]:
    """Train a diffusion model on images, or on images with labels.

    Parameters
    ----------
    dataloader : DataLoader or sequence
        Batches (N, 1, img_size, img_size) float32 in [-1, 1], or pairs of such a batch and labels (N,). A
        DataLoader without a generator of its own is read in an order that follows from `seed`, whatever its
        number of workers.
    img_size : int
        Side of the square images in pixels; a multiple of 8 for the default network, which has a fourth level
        where it is one of 16 and at least 64.
    n_epochs, n_steps : int, optional
        Length of the training, in passes over the images or in batches; of both, the passes count.
    minutes : float, optional
        Stops after so long, and repeats exactly no more. Give at least one of the three.
    device : str or torch.device, optional
        None takes the best there is.
    num_classes : int, optional
        Number of labels, which makes the model class-conditional; None for a loader without labels.
    seed : int, default 0
        Same seed, steps, device and threads: same losses and same weights.
    model : Denoiser, optional
        Trained instead of a fresh one, from a copy of its weights; its mean and directions are kept.
    checkpoint : str or Path, optional
        A .safetensors file for the whole state, written now and then, at the end, and where Ctrl-C or an
        error ends the training. If it is there, training goes on from it, to the same losses and weights as
        if it had never stopped.
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
        If the loss or its gradient is not finite. The checkpoint holds the state before that step.

    Notes
    -----
    Muon for the inner weights, AdamW for the others. The average has the power profile of Karras et al. 2024,
    whose memory grows with the training. Started by `accelerate launch`, each of P processes takes a P-th of
    every batch. On CUDA the network works in bfloat16 where the card has it; weights stay in float32.
    """
    if not len(dataloader):
        raise ValueError("the loader yields no batch: is its folder empty, or too small for drop_last?")
    if n_epochs is not None:
        n_steps = n_epochs * len(dataloader)
    processes = checkpoints.join_processes()
    rank, world = processes.process_index, processes.num_processes
    where = processes.device if world > 1 else checkpoints.choose_device(device)
    model = copy.deepcopy(model) if model else _fresh_model(dataloader, img_size, num_classes, seed)
    state = TrainingState(model, where)
    recipe = {**model.recipe, "training": {"seed": seed, "lr": LR, "n_steps": n_steps, "minutes": minutes,
                                           "batches": len(dataloader)}}
    spent = load_training(checkpoint, state, recipe) if checkpoint and Path(checkpoint).exists() else 0.0
    half = where.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if compile_network:
        model.network.compile()

    checkpoint, progress = (checkpoint, progress) if rank == 0 else (None, False)  # one process tells of all
    batches = _batches(dataloader, seed, len(state.losses))
    with Progress(n_steps, minutes, progress, len(state.losses), spent) as done:
        try:
            while (share := _mean(torch.tensor(done.share, device=where))) < 1:
                images, labels = _unpack(next(batches), model, slice(rank, None, world), where)
                noise = torch.Generator().manual_seed((1_000_003 * (seed + 1) + done.steps) * world + rank)
                with torch.autocast(where.type, torch.bfloat16, enabled=half):
                    loss = denoiser_loss(model, images, labels, noise)
                loss.backward()
                state.step(loss, LR * min(1, (done.steps + 1) / WARM_UP) * (1 - share))
                done.step(state.losses[-1])
                if checkpoint and done.steps % SAVE_EVERY == 0:
                    save_training(checkpoint, state, recipe, done.seconds)
        finally:
            if checkpoint and done.steps == len(state.losses):  # within a step nothing fits together
                save_training(checkpoint, state, recipe, done.seconds)
    return state.average, state.losses


class TrainingState:
    """All that a training changes: the model, the average of its weights, the optimisers, the losses.

    Parameters
    ----------
    model : Denoiser
        Trained in place.
    device : torch.device
        Where to train.
    """

    def __init__(self, model: Denoiser, device: torch.device) -> None:
        self.model = model.to(device).train()
        if device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        inner, others = list[nn.Parameter](), list[nn.Parameter]()
        for name, p in model.network.named_parameters():
            within = name.startswith(("down", "up", "shrink", "grow", "attention")) and ".emb." not in name
            (inner if within and p.ndim > 1 else others).append(p)
        self.optimisers = (Muon(inner, LR), torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0))
        self.losses: list[float] = []

    def step(self, loss: Tensor, lr: float) -> None:
        """Move the weights against their gradients, and the average after them."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if PartialState().num_processes > 1:
            for gradient in gradients:
                gradient.copy_(reduce(gradient, "mean"))
        value = _mean(loss.detach())
        if not nn.utils.get_total_norm(gradients).isfinite():
            raise FloatingPointError(f"step {len(self.losses)}: loss {value}, its gradient is not finite; "
                                     "look for images unlike the others, or take another seed")
        self.losses.append(value)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            optimiser.zero_grad()
        keep = (1 - 1 / len(self.losses)) ** (EMA_SHARPNESS + 1)
        move = torch.optim.swa_utils.get_ema_multi_avg_fn(keep)  # all weights at once
        move(list(self.average.parameters()), list(self.model.parameters()), len(self.losses))


def _mean(value: Tensor) -> float:
    """Return the mean over all processes, so that they agree."""
    return reduce(value, "mean").item()


def _fresh_model(loader: Loader, img_size: int, num_classes: int | None, seed: int) -> Denoiser:
    """Return a model that knows mean and directions of the images, and nothing more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deep = img_size >= 64 and img_size % 16 == 0  # a fourth level sees the whole chest at once
        network = UNet2D(channel_multipliers=(1, 2, 3, 4) if deep else (1, 2, 4), num_classes=num_classes)
        model = Denoiser(network, img_size)
    images: list[Tensor] = []
    for batch in islice(_batches(loader, seed, 0), len(loader)):
        images.append(_unpack(batch, model)[0])
        if sum(map(len, images)) >= FIT_IMAGES:
            break
    model.fit(torch.cat(images))
    return model


def _batches(loader: Loader, seed: int, start: int) -> Iterator[Any]:
    """Give batches without end, from number `start` on."""
    epoch, skipped = divmod(start, len(loader))
    while True:
        with torch.random.fork_rng(devices=[]):  # a sampler draws its order when it is first asked
            torch.manual_seed(seed + 1_000_003 * (epoch + 1))
            batches = islice(loader, skipped, None)
            first = next(batches)
        yield first
        yield from batches
        epoch, skipped = epoch + 1, 0


def _unpack(batch: Any, model: Denoiser, part: slice = slice(None),
            where: str | torch.device = "cpu") -> tuple[Tensor, Tensor | None]:
    """Return part of a batch's images, and its labels if there are any, or say what is wrong with them."""
    images, labels = (*batch, None)[:2] if isinstance(batch, list | tuple) else (batch, None)
    check_images(images)
    if images.shape[1:] != torch.Size(model.image_shape):
        raise ValueError(f"images: this model takes the shape (N, {str(model.image_shape)[1:]}, got "
                         f"{tuple(images.shape)}; give data set, training and model the same img_size")
    if len(images) % (part.step or 1):
        raise ValueError(f"a batch of {len(images)} images cannot be shared equally by {part.step} "
                         "processes: take a multiple as batch_size, and drop_last=True")
    n, got = model.num_classes, None if labels is None else labels.unique().tolist()
    if (got is None) != (n is None) or not set(got or []) <= set(range(n or 0)):
        raise ValueError(f"labels: got {got}, which does not fit num_classes={n}")
    return images[part].to(where), None if labels is None else labels[part].to(where)


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
    checkpoints.save_checkpoint(path, tensors, {**recipe, "progress": done})


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
    tensors, found = checkpoints.load_checkpoint(path)
    if difference := checkpoints.first_difference(found, recipe):
        raise ValueError(f"{path}: belongs to another training ({difference}): train with the same "
                         "arguments, or name another checkpoint")
    checkpoints.load_weights(state.average, tensors, path, WEIGHTS)
    checkpoints.load_weights(state.model, tensors, path, "weights.")
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
        Weights with two or more axes; each needs a gradient.
    lr : float
        Step size; scaled so that AdamW's values serve.

    Notes
    -----
    Jordan et al. 2024 (Muon), Newton-Schulz iteration of degree 5; scale 0.2 sqrt(longer side):
    Liu et al. 2025.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight."""
        for group in self.param_groups:
            alike: defaultdict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - MOMENTUM)
                ahead = p.grad.lerp(average, MOMENTUM).flatten(1)  # Nesterov
                alike[ahead.shape].append((p, ahead))
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
