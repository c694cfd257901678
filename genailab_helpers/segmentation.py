"""Find the lungs in a chest radiograph with a small U-Net that has seen phantoms alone.

A phantom knows where its lungs are, so nobody has to draw outlines. What a phantom lacks is the variety of
real images. Training therefore changes every phantom at random, far beyond what looks natural (*domain
randomisation*: Tobin et al. 2017): a real image is then one more variation.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from genailab_helpers.checkpoints import choose_device, load_checkpoint, load_weights, save_checkpoint
from genailab_helpers.diffusion.architectures import UNet2D
from genailab_helpers.phantoms import chest
from genailab_helpers.progress import Progress
from genailab_helpers.radiographs import check_images

SHIPPED = Path(__file__).resolve().parents[1] / "data" / "samples" / "lung_segmenter.safetensors"
STEP, BATCH_SIZE, KIND = 16, 16, "lung_segmenter"  # sides are multiples of STEP; what a recipe says


@dataclass
class Segmenter:
    """A trained network that finds lungs.

    Attributes
    ----------
    network : nn.Module
        From images of mean 0 and deviation 1 to logits.
    img_size : int
        Side in pixels at which the network was trained, a multiple of 16.
    """

    network: torch.nn.Module
    img_size: int = 96

    def logits(self, images: Tensor) -> Tensor:
        """Return what the network says (N, 1, S, S) of images (N, 1, S, S) of any contrast; S: see STEP."""
        deviation, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
        return self.network((images - mean) / (deviation + 0.02), images.new_zeros(len(images)))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Return the lungs (N, H, W) bool, on the CPU, of images (N, 1, H, W) in [-1, 1] of any size.

        The mask means what a person outlines: both lungs above the domes of the diaphragm, with the part
        behind the heart. Logits are averaged over two sizes of the image and their mirror images; then the
        largest two components are kept and their holes are filled.

        Raises
        ------
        ValueError
            If the images are no such images.
        """
        check_images(images)
        if len(images) > BATCH_SIZE:
            return torch.cat([self.predict(batch) for batch in images.split(BATCH_SIZE)])
        where, total = next(self.network.parameters()).device, torch.zeros(1)
        for side in (self.img_size, STEP * round(1.5 * self.img_size / STEP)):
            seen = _resize(images, side).to(where)
            found = self.logits(seen) + self.logits(seen.flip(3)).flip(3)
            total = total + _resize(found, self.img_size).cpu() / 4
        lungs = torch.from_numpy(np.stack([[_two_lungs(mask[0])] for mask in (total > 0).numpy()]))
        total = torch.where(lungs, total.clamp(min=0.1), total.clamp(max=-0.1))
        return F.interpolate(total, images.shape[-2:], mode="bilinear")[:, 0] > 0


def dice(first: Tensor, second: Tensor) -> float:
    """Return the overlap `2 |A and B| / (|A| + |B|)` of two bool masks of one shape."""
    if first.shape != second.shape:
        raise ValueError(f"masks: expected one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    return 2 * int((first & second).sum()) / max(1, int(first.sum() + second.sum()))


def lungs_of(masks: dict[str, Tensor]) -> Tensor:
    """Return the lungs (N, H, W) bool of rendered chests as a person outlines them.

    The lung behind the heart belongs to them, that behind the domes of the diaphragm or the collimator does
    not: nobody sees it.
    """
    return (masks["right_lung"] | masks["left_lung"]) & ~masks["diaphragm"] & ~masks["collimation"]


def train_segmenter(n_steps: int = 1800, img_size: int = 96, n_samples: int = 1500, seed: int = 0,
                    progress: bool = True) -> tuple[Segmenter, list[float]]:
    """Train a U-Net to find the lungs of phantoms of all findings, with all confounders.

    Parameters
    ----------
    n_steps : int, default 1800
        Batches to train on.
    img_size : int, default 96
        Side of the images in pixels, a multiple of 16.
    n_samples : int, default 1500
        Phantoms to render; each comes back many times, changed at random every time.
    seed : int, default 0
        Same seed, arguments and threads: same model.
    progress : bool, default True
        Show a bar.

    Returns
    -------
    model : Segmenter
        With a running average of the weights.
    losses : list of float
        One a step.

    Raises
    ------
    ValueError
        If a number does not fit.

    Notes
    -----
    AdamW; its step size rises for a tenth of the steps, then falls along a cosine. The images of the first
    steps have two thirds of the side, which is quicker and teaches shapes first.
    """
    generator, where, losses = torch.Generator().manual_seed(seed), choose_device(), list[float]()
    with Progress(n_steps, None, progress) as clock:
        chests = chest.sample_chests(n_samples, seed, chest.FINDINGS, dict.fromkeys(chest.CONFOUNDERS, 0.25))
        films = chest.render_chests(chests, 4 * img_size // 3, masks=True)  # finer, since some are zoomed
        truth = torch.stack((lungs_of(films.masks), films.masks["heart"]), 1).float()
        model = Segmenter(_new_network(seed).to(where), img_size)
        average = AveragedModel(model.network, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        optimiser = torch.optim.AdamW(model.network.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, n_steps, pct_start=0.1)
        while clock.share < 1:
            rows = torch.randint(n_samples, (BATCH_SIZE,), generator=generator)
            side = STEP * round(img_size / STEP / 1.5) if clock.share < 0.6 else img_size
            images, lungs = randomise(films.images[rows], truth[rows], side, generator)
            loss = lung_loss(model.logits(images.to(where)), lungs.to(where))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            average.update_parameters(model.network)
            losses.append(loss.item())
            clock.step(losses[-1])
    return Segmenter(average.module.eval(), img_size), losses


def lung_loss(logits: Tensor, lungs: Tensor) -> Tensor:
    """Return cross-entropy plus 1 - Dice (Milletari et al. 2016), each image counted alike."""
    found = logits.sigmoid()
    overlap = 2 * (found * lungs).sum((1, 2, 3)) / ((found + lungs).sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, lungs) + 1 - overlap.mean()


class _Random:
    """Random numbers, one an image, and smooth fields."""

    def __init__(self, n: int, side: int, generator: torch.Generator) -> None:
        self.n, self.side, self.generator = n, side, generator

    def between(self, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(self.n, 1, 1, 1, generator=self.generator)

    def some(self, fraction: float) -> Tensor:
        return (self.between(0, 1) < fraction).float()

    def field(self, cells: int) -> Tensor:
        noise = torch.randn(self.n, 1, cells + 3, cells + 3, generator=self.generator)
        return 1.25 * F.interpolate(noise, self.side, mode="bicubic", align_corners=True)


def randomise(images: Tensor, truth: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Change each image in its own way: place, findings, gas, a wire, exposure, sharpness and noise.

    Parameters
    ----------
    images : Tensor
        (N, 1, H, W) in [-1, 1].
    truth : Tensor
        (N, 2, H, W) of 0 and 1: lungs and heart.
    side : int
        Of what is returned, in pixels.
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    images, lungs : Tensor
        (N, 1, side, side) in [-1, 1], and in [0, 1].
    """
    random = _Random(len(images), side, generator)
    x, lungs, heart = _place(torch.cat((images / 2 + 0.5, truth), 1), random).split(1, 1)
    return _film(_fill(x, F.avg_pool2d(lungs, 5, 1, 2), heart, random), random), lungs


def _place(layers: Tensor, random: _Random) -> Tensor:
    """Turn, zoom, stretch, shift, mirror and bend; outside is black."""
    angle, zoom, stretch = random.between(-0.25, 0.25), *(random.between(-w, w) for w in (0.42, 0.25))
    across, down = (1 - 2 * random.some(0.3)) * (-zoom - stretch).exp(), (stretch - zoom).exp()
    rows = torch.cat((angle.cos() * across, -angle.sin() * down, random.between(-0.2, 0.2),
                      angle.sin() * across, angle.cos() * down, random.between(-0.2, 0.2)), 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), [random.n, 1, random.side, random.side], align_corners=False)
    bend = torch.cat((random.field(3), random.field(3)), 1) * random.between(0, 0.03)
    return F.grid_sample(layers, grid + bend.permute(0, 2, 3, 1), align_corners=False)


def _fill(x: Tensor, lungs: Tensor, heart: Tensor, random: _Random) -> Tensor:
    """Fill lungs with opacities, dense bases and texture, what is beside them with gas; vary the heart."""
    bright = x.flatten(1).quantile(0.85, 1)[:, None, None, None]
    below = torch.linspace(-1, 1, random.side)[:, None] * random.between(-1, 3)
    patches = (random.field(4) * random.between(0, 1.5) + below + random.between(-2, 0.5)).clamp(0, 1)
    dense = torch.maximum(patches * lungs * random.between(0, 0.9), heart * random.between(-0.3, 0.9))
    x = x + (bright - x) * dense.clamp(min=0)
    x = x + lungs * random.between(0, 0.04) * (random.field(12) + random.field(24))
    gas = ((random.field(6) - random.between(0, 2)) * random.between(0.7, 5)).clamp(0, 1)
    return x * (1 - (1 - lungs) * gas * random.between(0, 0.8) * random.some(0.6))


def _film(x: Tensor, random: _Random) -> Tensor:
    """Vary brightness, lay a wire across, change gamma, contrast and sharpness; add noise."""
    x = x + random.between(0, 0.18) * random.field(2) + random.between(0, 0.05) * random.field(8)
    wire = random.field(2) / random.between(0.01, 0.06)  # where a smooth field is 0
    x = x + (-wire.square()).exp() * random.between(0.1, 0.5) * random.some(0.4)
    x = x.clamp(0, 1.6) ** random.between(-0.7, 0.7).exp()
    x = (x - 0.5) * random.between(-0.7, 0.4).exp() + 0.5 + random.between(-0.15, 0.15)
    x = x + (F.avg_pool2d(x, 3, 1, 1) - x) * random.between(-1, 1)  # below 0 sharpens
    return (x + 0.05 * random.between(0, 1) ** 2 * random.field(random.side - 3)).clamp(0, 1) * 2 - 1


def _resize(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def _two_lungs(mask: np.ndarray) -> np.ndarray:
    """Keep the largest two components of a mask and fill their holes."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())[1:]
    return ndimage.binary_fill_holes(np.isin(parts, 1 + np.argsort(-sizes)[:2]))


def _new_network(seed: int = 0) -> UNet2D:
    """Return an untrained network; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2D(base_channels=16, channel_multipliers=(1, 2, 4, 8), time_emb_dim=2)


def save_segmenter(path: str | Path, model: Segmenter, **notes: Any) -> None:
    """Write a model into one safetensors file, matrices in 16 bits, whole or not at all; `notes` go along."""
    recipe = {**notes, "kind": KIND, "img_size": model.img_size}
    save_checkpoint(path, model.network.state_dict(), recipe, half=True)


def load_segmenter(path: str | Path = SHIPPED) -> Segmenter:
    """Read what `save_segmenter` wrote, on the CPU; by default the weights that come with the lessons.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, it is damaged, it holds another kind of model, or its recipe makes no sense.
    """
    tensors, recipe = load_checkpoint(path)
    if recipe.get("kind") != KIND or recipe.get("img_size") not in range(STEP, 1025, STEP):
        raise ValueError(f"{path}: holds no lung segmenter; expected a model of `genailab train segmenter`")
    network = _new_network().eval()
    load_weights(network, tensors, path)
    return Segmenter(network, int(recipe["img_size"]))
