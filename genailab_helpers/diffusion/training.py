"""Train a denoiser: `train_image_diffusion`, repeatable to the bit and safe to kill.

All randomness (weights, order of the images, noise) comes from `seed` and is drawn on the CPU.
"""

import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset
from tqdm.auto import tqdm

from genailab_helpers.checkpoints import (
    choose_device,
    first_difference,
    join_processes,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from genailab_helpers.diffusion.architectures import UNet2D
from genailab_helpers.diffusion.process import NOISE_MEAN, NOISE_STD, WEIGHTS, Denoiser, add_noise

EMA_SHARPNESS = 12.0  # the average looks back over about a thirteenth of the training
UNTOLD = 0.1  # share of images whose label is withheld, so that guidance has an estimate without label
FIT_IMAGES = 1024  # at most so many images measure mean and directions: more take memory for little
WARM_UP = 50  # steps


class TrainingStopped(FloatingPointError):
    """Training met a loss that is no number; `model` and `losses` are the last good state."""

    def __init__(self, message: str, model: Denoiser, losses: list[float]) -> None:
        super().__init__(message)
        self.model, self.losses = model, losses


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
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
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
        Batches (N, C, img_size, img_size) float32 in [-1, 1], or pairs of such a batch and labels (N,). Pairs
        make the model class-conditional. A plain DataLoader, shuffled or not, is read in an order drawn from
        `seed`, whatever its number of workers; any other iterable in its own order, which then has to be
        repeatable.
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
        A .safetensors file for the whole state, written now and then, at the end, and when Ctrl-C stops the
        training. If it is there, training goes on from it, to the same losses and weights as if it had never
        stopped.
    checkpoint_every : int, default 100
        Steps between two writings of it.
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
        One a step; about 1 is what the best linear estimate reaches, see Notes.

    Raises
    ------
    ValueError
        If a length is 0 or less, the batches are no such images or labels or do not fit the model, or the
        checkpoint belongs to another training.
    RuntimeError
        If the device is not there.
    TrainingStopped
        If the loss is no number. The last good state is in the checkpoint and in the error.

    Notes
    -----
    Loss ((D(x + sigma n, sigma) - x) / c_out)^2 with log-normal sigma (Karras et al. 2022), one
    noise level from each of N equally likely ranges for a batch of N. Muon for the inner weights, AdamW for
    the others. The average has the power profile of Karras et al. 2024, whose memory grows with the training.

    Started by `accelerate launch --multi_gpu --num_processes P`, P processes take a P-th of each batch, and
    the losses are those of one process with whole batches, up to rounding. On CUDA the network works with
    channels last and, where the card has it, in bfloat16; image, loss and weights stay in float32.
    """
    started = time.monotonic()
    if n_epochs is None and n_steps is None and minutes is None:
        raise ValueError("how long to train? Give n_epochs, n_steps or minutes")
    for name, number in (("n_epochs", n_epochs), ("n_steps", n_steps), ("minutes", minutes),
                         ("checkpoint_every", checkpoint_every)):
        if number is not None and number <= 0:
            raise ValueError(f"{name}={number}: expected more than 0")
    if model is not None and model.image_shape[-1] != img_size:
        raise ValueError(f"img_size={img_size}: this model was made for {model.image_shape[-1]}")
    if n_epochs is not None:
        n_steps = min(n_epochs * _steps_per_epoch(dataloader), n_steps or sys.maxsize)
    join_processes()
    accelerator = Accelerator(device_placement=False)
    processes = accelerator.num_processes
    where = accelerator.device if processes > 1 else choose_device(device)

    first = next(_batches(dataloader, seed), None)
    if first is None:
        raise ValueError("the loader yields no batch: is its folder empty, or drop_last with too few images?")
    images, labels = _check(first, img_size, None if model is None else model.image_shape[0])
    num_classes = _count_classes(dataloader, num_classes, model, labels)
    if model is None:
        model = _fresh_model(images.shape[1], img_size, num_classes, seed)
        if checkpoint is None or not Path(checkpoint).exists():
            model.fit(_some_images(dataloader, img_size, seed))
    state = _State(model, lr, seed, where, started)
    recipe = {**model.recipe, "training": {"seed": seed, "lr": lr, "n_steps": n_steps, "minutes": minutes,
                                           "batch_size": len(images),
                                           "batches": getattr(dataloader, "__len__", lambda: None)()}}
    if checkpoint is not None and Path(checkpoint).exists():
        state.restore(checkpoint, recipe)
    half = where.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if where.type == "cuda":
        state.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile_network:
        state.model.network.compile()
    wrapped = accelerator.prepare(state.model)
    bar = tqdm(total=n_steps, initial=len(state.losses), desc="training", unit="step",
               disable=not (progress and accelerator.is_main_process))

    def save() -> None:
        if checkpoint is not None and accelerator.is_main_process:
            state.save(checkpoint, recipe)

    def share_done() -> float:
        share = len(state.losses) / n_steps if n_steps else 0.0
        if minutes:
            seconds = torch.tensor(state.seconds(), device=where)  # all processes have to stop at one step
            share = max(share, accelerator.reduce(seconds, "mean").item() / (60 * minutes))
        return share

    share, steps_before = share_done(), len(state.losses)
    batches = _endless(dataloader, seed, state, accelerator.process_index, processes)
    with bar, state.kept_on_interrupt(save):
        while share < 1:
            images, labels = _check(next(batches), img_size, images.shape[1], num_classes)
            sigma, noise, labels = _draw(state.generator, images, labels, num_classes,
                                         accelerator.process_index, processes)
            images, sigma, noise = images.to(where), sigma.to(where), noise.to(where)
            labels = None if labels is None else labels.to(where)
            with torch.autocast(where.type, torch.bfloat16, enabled=half):
                estimate = wrapped(add_noise(images, noise, sigma), sigma, labels)
            loss = ((estimate - images) / state.model.scales(sigma)[0]).square().mean()
            accelerator.backward(loss)
            value = accelerator.reduce(loss.detach(), "mean").item()
            slope = nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
            if not math.isfinite(value + slope.item()):
                save()
                kept = "this error's `model`" + (f" and in {checkpoint}" if checkpoint is not None else "")
                raise TrainingStopped(f"step {len(state.losses)}: loss {value}, slope {slope.item()}; "
                                      f"look for images that are not finite, or lower lr={lr}. "
                                      f"The last good state is in {kept}", state.average, state.losses)
            state.step(value, lr * min(1, (len(state.losses) + 1) / WARM_UP) * (1 - share))
            share = share_done()
            if len(state.losses) % checkpoint_every == 0 and share < 1:
                save()
            bar.set_postfix({"loss": f"{sum(state.losses[-50:]) / len(state.losses[-50:]):.3f}"}
                            | ({"minutes left": f"{minutes - state.seconds() / 60:.1f}"} if minutes else {}),
                            refresh=False)
            bar.update()
    if len(state.losses) > steps_before:
        save()
    return state.average, state.losses


class _State:
    """Everything that goes on from where it was when a training resumes."""

    def __init__(self, model: Denoiser, lr: float, seed: int, device: torch.device, started: float) -> None:
        self.model = copy.deepcopy(model).to(device).train()
        self.average = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        named = dict(self.model.network.named_parameters())
        inner = {name for name, p in named.items() if p.ndim > 1 and ".emb." not in name
                 and name.split(".")[0] in ("down", "up", "shrink", "grow", "attention")}
        self.optimisers = (Muon([named[name] for name in named if name in inner], lr),
                           torch.optim.AdamW([named[name] for name in named if name not in inner], lr,
                                             betas=(0.9, 0.99), weight_decay=0))
        self.generator = torch.Generator().manual_seed(seed)
        self.losses: list[float] = []
        self.epoch, self.position = 0, 0
        self.seconds_before, self.started = 0.0, started
        self.moving = False  # between two steps everything fits together, and can be written
        self.drawn = self.generator.get_state()  # as of the last whole step

    @contextmanager
    def kept_on_interrupt(self, save: Callable[[], None]) -> Iterator[None]:
        """Save before Ctrl-C ends the training, unless a step is half done."""
        try:
            yield
        except KeyboardInterrupt:
            if not self.moving:
                save()
            raise

    def seconds(self) -> float:
        """Return how long the training has taken, interruptions not counted."""
        return self.seconds_before + time.monotonic() - self.started

    def step(self, loss: float, lr: float) -> None:
        """Move the weights by their gradients, and the average after them."""
        self.moving = True
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            optimiser.zero_grad()
        self.losses.append(loss)
        self.position += 1
        keep = (1 - 1 / len(self.losses)) ** (EMA_SHARPNESS + 1)
        move = torch.optim.swa_utils.get_ema_multi_avg_fn(keep)  # all weights at once
        move(list(self.average.parameters()), list(self.model.parameters()), len(self.losses))
        self.drawn = self.generator.get_state()
        self.moving = False

    def save(self, path: str | Path, recipe: dict[str, Any]) -> None:
        """Write the state and its recipe."""
        tensors = {f"{WEIGHTS}{name}": tensor for name, tensor in self.average.state_dict().items()}
        tensors |= {f"weights.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for i, optimiser in enumerate(self.optimisers):
            for p, values in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{i}.{p}.{name}": value for name, value in values.items()}
        tensors["generator"] = self.drawn
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        progress = {"steps": len(self.losses), "epoch": self.epoch, "position": self.position,
                    "seconds": round(self.seconds(), 1)}
        save_checkpoint(path, tensors, {**recipe, "progress": progress})

    def restore(self, path: str | Path, recipe: dict[str, Any]) -> None:
        """Read what `save` wrote, if it belongs to the training that `recipe` describes."""
        tensors, found = load_checkpoint(path)
        difference = first_difference(found, recipe)
        if difference or "progress" not in found:
            why = difference or "it holds weights only"
            raise ValueError(f"{path}: belongs to another training ({why}): "
                             f"train with the same arguments, or name another checkpoint")
        load_weights(self.average, tensors, path, WEIGHTS)
        load_weights(self.model, tensors, path, "weights.")
        for i, optimiser in enumerate(self.optimisers):
            values: dict[int, dict[str, Tensor]] = {}
            for name in tensors:
                if name.startswith(f"optimiser.{i}."):
                    _, _, p, key = name.split(".")
                    values.setdefault(int(p), {})[key] = tensors[name]
            optimiser.load_state_dict({**optimiser.state_dict(), "state": values})
        self.drawn = tensors["generator"]
        self.generator.set_state(self.drawn)
        self.losses = tensors["losses"].tolist()
        self.epoch, self.position = found["progress"]["epoch"], found["progress"]["position"]
        self.seconds_before = found["progress"]["seconds"]


def _fresh_model(channels: int, img_size: int, num_classes: int | None, seed: int) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deep = img_size >= 64 and img_size % 16 == 0  # a fourth level sees the whole chest at once
        return Denoiser(UNet2D(channels, channels, channel_multipliers=(1, 2, 3, 4) if deep else (1, 2, 4),
                               num_classes=num_classes), img_size)


def _is_plain(loader: Any) -> bool:
    """Tell whether a loader is a DataLoader whose order we can draw ourselves."""
    return (isinstance(loader, DataLoader) and type(loader.batch_sampler) is BatchSampler
            and (type(loader.sampler) is SequentialSampler
                 or (type(loader.sampler) is RandomSampler and not loader.sampler.replacement
                     and loader.sampler.num_samples == len(loader.dataset))))  # type: ignore[arg-type]


def _batches(loader: Any, seed: int, epoch: int = 0, skip: int = 0, rank: int = 0,
             world: int = 1) -> Iterator[Any]:
    """Give the batches of an epoch from number `skip` on, of each the part of process `rank`."""
    if not _is_plain(loader):
        if world > 1:
            raise ValueError("more than one process needs a DataLoader with its standard samplers")
        return islice(loader, skip, None)
    generator = torch.Generator().manual_seed(seed + 1_000_003 * (epoch + 1))
    n, shuffled = len(loader.dataset), isinstance(loader.sampler, RandomSampler)
    order = torch.randperm(n, generator=generator) if shuffled else torch.arange(n)
    parts = [part[rank::world].tolist() for part in order.split(loader.batch_size)
             if len(part) == loader.batch_size or not loader.drop_last]
    if world > 1 and loader.batch_size % world:
        raise ValueError(f"batch_size={loader.batch_size} cannot be shared equally by {world} processes")
    if world > 1 and not loader.drop_last and n % loader.batch_size:
        raise ValueError(f"{world} processes cannot share the last batch, {n % loader.batch_size} of "
                         f"{loader.batch_size} images: give the DataLoader drop_last=True")
    return iter(DataLoader(loader.dataset, batch_sampler=parts[skip:], num_workers=loader.num_workers,
                           collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, timeout=loader.timeout,
                           worker_init_fn=loader.worker_init_fn, generator=generator,
                           multiprocessing_context=loader.multiprocessing_context))


def _endless(loader: Any, seed: int, state: _State, rank: int, world: int) -> Iterator[Any]:
    """Give batches without end, from where the state is; whoever takes one moves `state.position` on."""
    while True:
        yield from _batches(loader, seed, state.epoch, state.position, rank, world)
        if state.position == 0:
            raise ValueError("the loader yields no batch when it is read again: give a DataLoader or a list")
        state.epoch, state.position = state.epoch + 1, 0


def _steps_per_epoch(loader: Any) -> int:
    if not hasattr(loader, "__len__"):
        raise ValueError("this loader does not know its length: give n_steps instead of n_epochs")
    return len(loader)


def _check(batch: Any, img_size: int, channels: int | None = None,
           num_classes: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Take a batch apart, or say what is wrong with it."""
    pair = batch if isinstance(batch, (list, tuple)) and len(batch) in (1, 2) else [batch]
    images, labels = (*pair, None)[:2]
    if not isinstance(images, Tensor) or images.ndim != 4 or images.dtype != torch.float32:
        got = type(images).__name__
        if isinstance(images, Tensor):
            got = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"the loader yields {got}; "
                         f"expected float32 tensors (N, C, H, W), or pairs of them and labels")
    wanted = (channels or images.shape[1], img_size, img_size)
    if tuple(images.shape[1:]) != wanted:
        raise ValueError(f"the loader yields images of shape {tuple(images.shape[1:])}; expected {wanted}: "
                         f"give both the data set and the training the same img_size and channels")
    low, high = images.min().item(), images.max().item()
    if low < -1.001 or high > 1.001:
        likely = ": they look like 0 to 255, so divide by 127.5 and subtract 1" if low >= 0 else ""
        raise ValueError(f"the loader yields values from {low:.3g} to {high:.3g}; "
                         f"expected -1 (black) to 1 (white){likely}")
    if labels is not None:
        labels = torch.as_tensor(labels)
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ValueError(f"labels of shape {tuple(labels.shape)} and {labels.dtype}; "
                             f"expected one integer an image")
        if num_classes is not None and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())}; "
                             f"num_classes={num_classes} allows 0 to {num_classes - 1}")
    elif num_classes is not None:
        raise ValueError(f"num_classes={num_classes}, but the loader yields images without labels")
    return images, labels


def _count_classes(loader: Any, num_classes: int | None, model: Denoiser | None,
                   labels: Tensor | None) -> int | None:
    """Return the number of labels: as said, as the model has it, or as the data set counts its classes."""
    if model is not None:
        if num_classes not in (None, model.num_classes) or (labels is None) != (model.num_classes is None):
            raise ValueError(f"the model has num_classes={model.num_classes}, "
                             f"which does not fit num_classes={num_classes} or the loader's labels")
        return model.num_classes
    if num_classes is None and labels is not None:
        dataset: Any = getattr(loader, "dataset", None)
        dataset = dataset.dataset if isinstance(dataset, Subset) else dataset
        if not hasattr(dataset, "classes"):
            raise ValueError("the loader yields labels, and its data set has no `classes`: give num_classes")
        return len(dataset.classes)
    return num_classes


def _some_images(loader: Any, img_size: int, seed: int) -> Tensor:
    images: list[Tensor] = []
    for batch in _batches(loader, seed):
        images.append(_check(batch, img_size)[0])
        if not images[-1].isfinite().all():
            raise ValueError("the loader yields images that are not finite")
        if sum(map(len, images)) >= FIT_IMAGES:
            break
    return torch.cat(images)


def _draw(generator: torch.Generator, images: Tensor, labels: Tensor | None, num_classes: int | None,
          rank: int, world: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw noise levels and noise for the batch of all processes, and return this one's share."""
    n = len(images) * world
    levels = ((torch.arange(n) + torch.rand(n, generator=generator)) / n).clamp(1e-6, 1 - 1e-6)
    sigma = (NOISE_MEAN + NOISE_STD * torch.special.ndtri(levels)).exp()[rank::world]
    noise = torch.randn((n, *images.shape[1:]), generator=generator)[rank::world]
    if labels is not None and num_classes is not None:
        untold = (torch.rand(n, generator=generator) < UNTOLD)[rank::world]
        labels = labels.masked_fill(untold, num_classes)
    return sigma, noise, labels
