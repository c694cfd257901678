"""Samplers: one walk from noise to images, and the steps that it can take.

All walk down the same noise levels and ask the same denoiser D(x, sigma) at each; they differ in the step
only. Noise is drawn on the CPU, so that a seed gives the same images on every device up to rounding.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from genailab_helpers.diffusion.denoiser import Denoiser, karras_sigmas
from genailab_helpers.radiographs import check_images

Callback = Callable[[int, Tensor, Tensor], object]


class Walk(NamedTuple):
    """What a step may use beside x, the estimate, its noise level and the next lower one.

    Attributes
    ----------
    ask : callable
        Gives the denoiser's estimate for x (N, C, H, W) and a noise level.
    noise : callable
        Gives fresh noise (N, C, H, W) of standard deviation 1.
    before : tuple of Tensor, optional
        Estimate and noise level of the step before.
    """

    ask: Callable[[Tensor, Tensor], Tensor]
    noise: Callable[[], Tensor]
    before: tuple[Tensor, Tensor] | None


Step = Callable[[Tensor, Tensor, Tensor, Tensor, Walk], Tensor]


def ddpm_step(x: Tensor, estimate: Tensor, sigma: Tensor, lower: Tensor, walk: Walk) -> Tensor:
    """Draw what x was at the lower noise level, had the estimate been the image.

    Ho et al. 2020, algorithm 2 with the posterior variance, written for x / sqrt(alpha_bar).
    """
    kept = lower**2 / sigma**2
    return estimate + kept * (x - estimate) + (kept * (sigma**2 - lower**2)).sqrt() * walk.noise()


def ddim_step(x: Tensor, estimate: Tensor, sigma: Tensor, lower: Tensor, walk: Walk) -> Tensor:
    """Keep the direction of the noise, and shrink it.

    Song et al. 2021, equation 12 with eta = 0; it is Euler's method on the probability-flow equation.
    """
    return estimate + lower / sigma * (x - estimate)


def heun_step(x: Tensor, estimate: Tensor, sigma: Tensor, lower: Tensor, walk: Walk) -> Tensor:
    """Take DDIM's step, look at the slope there, go back and use the mean of both: two calls a step.

    Karras et al. 2022, algorithm 1.
    """
    slope = (x - estimate) / sigma
    if lower > 0:
        ahead = x + (lower - sigma) * slope
        slope = (slope + (ahead - walk.ask(ahead, lower)) / lower) / 2
    return x + (lower - sigma) * slope


def dpm_step(x: Tensor, estimate: Tensor, sigma: Tensor, lower: Tensor, walk: Walk) -> Tensor:
    """Take DDIM's step towards an estimate that the one before helps to predict.

    Lu et al., DPM-Solver++(2M), 2022, algorithm 2, in lambda = -log sigma. The first step and the last, to
    sigma = 0, are of first order, as in `diffusers`.
    """
    if walk.before is not None and lower > 0:
        before, higher = walk.before
        estimate = estimate + (sigma / lower).log() / (2 * (higher / sigma).log()) * (estimate - before)
    return estimate + lower / sigma * (x - estimate)


class How(TypedDict, total=False):
    """Options that every sampler hands on to `sample`, which explains them."""

    guidance: float
    callback: Callback | None
    linear_above: float


@torch.no_grad()
def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, step: Step = ddim_step,
           labels: Tensor | None = None, guidance: float = 1.0, generator: torch.Generator | None = None,
           callback: Callback | None = None, linear_above: float = math.inf) -> Tensor:
    """Walk from noise to images.

    Parameters
    ----------
    denoiser : Denoiser
        D(x, sigma, labels).
    x : Tensor
        (N, C, H, W) noise of standard deviation `sigmas[0]`, or images under such noise.
    sigmas : Tensor
        (n_steps + 1,) noise levels, falling to 0; see `karras_sigmas`.
    step : callable, default ddim_step
        Goes from one level to the next: `ddpm_step`, `ddim_step`, `heun_step`, `dpm_step`, or your own.
    labels : Tensor, optional
        (N,) integers below the model's num_classes; None leaves the label open.
    guidance : float, default 1
        1 samples the label's images; more exaggerates what is typical of it, and costs a second call a step
        (Ho and Salimans 2022).
    generator : torch.Generator, optional
        Source of fresh noise, on the CPU; None takes torch's own.
    callback : callable, optional
        Called at every step with its number, x (N, C, H, W) and the denoiser's estimate (N, C, H, W).
    linear_above : float, default infinity
        Above this noise level the denoiser's linear estimate stands in for it and its network rests.
        `LINEAR_ABOVE` is where training hardly comes: images drawn so were as good, with 12 calls of the
        network in place of 20. For a fitted `Denoiser` only.

    Returns
    -------
    Tensor
        (N, C, H, W) float32 in [-1, 1].

    Raises
    ------
    ValueError
        If the labels do not fit the model or their number not that of the images.
    """
    x, sigmas = (tensor.to(next(denoiser.parameters()).device) for tensor in (x, sigmas))
    if labels is not None:
        if len(labels) != len(x) or not 0 <= labels.min() <= labels.max() < (denoiser.num_classes or 0):
            raise ValueError(f"labels: got {labels.tolist()} for {len(x)} images and a model of "
                             f"num_classes={denoiser.num_classes}; expected one below that for each image")
        labels = labels.to(x.device)

    def ask(x: Tensor, sigma: Tensor) -> Tensor:
        if sigma > linear_above:
            return denoiser.linear_estimate(x, sigma.expand(len(x)))
        estimate = denoiser(x, sigma, labels)
        if labels is None or guidance == 1:
            return estimate
        unlabelled = denoiser(x, sigma)
        return unlabelled + guidance * (estimate - unlabelled)

    walk = Walk(ask, lambda: torch.randn(x.shape, generator=generator).to(x.device), None)
    for i, (sigma, lower) in enumerate(pairwise(sigmas)):
        estimate = ask(x, sigma)
        if callback:
            callback(i, x, estimate)
        x = step(x, estimate, sigma, lower, walk)
        walk = walk._replace(before=(estimate, sigma))
    return x.clamp(-1, 1)


def _from_noise(step: Step, denoiser: Denoiser, n_samples: int, n_steps: int, seed: int | torch.Generator,
                labels: Tensor | None, **how: Unpack[How]) -> Tensor:
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    sigmas = karras_sigmas(n_steps)
    x = torch.randn((n_samples, *denoiser.image_shape), generator=generator) * sigmas[0]
    return sample(denoiser, x, sigmas, step, labels, generator=generator, **how)


def sample_ddpm(denoiser: Denoiser, n_samples: int, *, n_steps: int = 250, seed: int = 0,
                labels: Tensor | None = None, **how: Unpack[How]) -> Tensor:
    """Sample by `ddpm_step`: estimate the image, go back to it, add fresh noise.

    Parameters
    ----------
    denoiser : Denoiser
        D(x, sigma, labels).
    n_samples : int
        Number of images.
    n_steps : int, default 250
        Noise levels of `karras_sigmas` to visit; one call of the denoiser each.
    seed : int, default 0
        Source of all noise, on the CPU.
    labels, **how
        As for `sample`; `how` are `guidance`, `callback` and `linear_above`.

    Returns
    -------
    Tensor
        (n_samples, C, H, W) float32 in [-1, 1].

    Raises
    ------
    ValueError
        If `n_steps` is below 1, or labels do not fit the model.
    """
    return _from_noise(ddpm_step, denoiser, n_samples, n_steps, seed, labels, **how)


def sample_ddim(denoiser: Denoiser, n_samples: int, *, n_steps: int = 50, seed: int = 0,
                labels: Tensor | None = None, **how: Unpack[How]) -> Tensor:
    """Sample by `ddim_step`: the first noise decides the image. All else is as for `sample_ddpm`."""
    return _from_noise(ddim_step, denoiser, n_samples, n_steps, seed, labels, **how)


def sample_heun(denoiser: Denoiser, n_samples: int, *, n_steps: int = 18, seed: int = 0,
                labels: Tensor | None = None, **how: Unpack[How]) -> Tensor:
    """Sample by `heun_step`: two calls of the denoiser a step, one at the last. See `sample_ddpm`."""
    return _from_noise(heun_step, denoiser, n_samples, n_steps, seed, labels, **how)


def sample_dpm(denoiser: Denoiser, n_samples: int, *, n_steps: int = 20, seed: int = 0,
               labels: Tensor | None = None, **how: Unpack[How]) -> Tensor:
    """Sample by `dpm_step`: where few calls can be paid, take this one. See `sample_ddpm`."""
    return _from_noise(dpm_step, denoiser, n_samples, n_steps, seed, labels, **how)


def vary(denoiser: Denoiser, images: Tensor, strength: float = 0.5, *, n_steps: int = 20,
         seed: int = 0, labels: Tensor | None = None, **how: Unpack[How]) -> Tensor:
    """Draw images that are variations of given ones: drown these in noise half-way, and walk back.

    Parameters
    ----------
    denoiser : Denoiser
        D(x, sigma, labels).
    images : Tensor
        (N, C, H, W) in [-1, 1], of the shape that the model draws.
    strength : float, default 0.5
        Share of the walk from noise to image that is walked again: near 0 the image is handed back, at 1
        nothing of it is left. What survives is what is coarser than the noise.
    n_steps : int, default 20
        Steps of the whole walk; `strength` of them, at least one, are taken.
    seed, labels, **how
        As for `sample_ddpm`; another label than the image's own keeps its coarse form.

    Returns
    -------
    Tensor
        (N, C, H, W) float32 in [-1, 1]. At low strength they still show whom the image showed: varying makes
        nobody anonymous.

    Raises
    ------
    ValueError
        If `strength` is not above 0 and at most 1, the images are no such batch, or labels do not fit.
    RuntimeError
        If the images have another size than the model's.

    Notes
    -----
    SDEdit (Meng et al. 2022), with the deterministic walk of `sample_dpm`.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: expected a number above 0, at most 1")
    check_images(images)
    generator = torch.Generator().manual_seed(seed)
    sigmas = karras_sigmas(n_steps)[n_steps - max(1, round(strength * n_steps)):]
    x = images.cpu() + sigmas[0] * torch.randn(images.shape, generator=generator)
    return sample(denoiser, x, sigmas, dpm_step, labels, generator=generator, **how)


def inpaint(denoiser: Denoiser, images: Tensor, known: Tensor, *, n_steps: int = 20, n_repeats: int = 10,
            seed: int = 0, labels: Tensor | None = None, **how: Unpack[How]) -> Tensor:
    """Fill in what is missing in images, so that it fits what is there.

    Parameters
    ----------
    denoiser : Denoiser
        D(x, sigma, labels).
    images : Tensor
        (N, C, H, W) in [-1, 1]; values where `known` is False do not matter.
    known : Tensor
        Boolean, of a shape that broadcasts to that of `images`; True where a pixel is kept.
    n_steps : int, default 20
        Noise levels to visit.
    n_repeats : int, default 10
        How often each level is walked. Every time, the known pixels are put in under fresh noise, and the
        others answer to them; with 1 they hardly do. The denoiser is called n_steps * n_repeats times.
    seed, labels, **how
        As for `sample_ddpm`.

    Returns
    -------
    Tensor
        (N, C, H, W) float32 in [-1, 1], equal to `images` where they are known.

    Raises
    ------
    ValueError
        If `n_steps` is below 1, the images are no such batch, or labels do not fit.
    RuntimeError
        If the mask is not boolean, or the images have another size than the model's.

    Notes
    -----
    RePaint (Lugmayr et al. 2022), algorithm 1 with jumps of one step, in the EDM form: one more step of
    `sample`.
    """
    where = next(denoiser.parameters()).device
    images, known = torch.where(known, images, 0.0).to(where), known.to(where)
    check_images(images)
    generator, sigmas = torch.Generator().manual_seed(seed), karras_sigmas(n_steps)

    def put_in(x: Tensor, sigma: Tensor) -> Tensor:
        """Replace the known pixels by what they are under fresh noise."""
        return torch.where(known, images + sigma * torch.randn(x.shape, generator=generator).to(where), x)

    def repaint_step(x: Tensor, estimate: Tensor, sigma: Tensor, lower: Tensor, walk: Walk) -> Tensor:
        for _ in range(n_repeats - 1):
            x = ddpm_step(x, estimate, sigma, lower, walk)
            x = put_in(x + (sigma**2 - lower**2).sqrt() * walk.noise(), sigma)  # back up one level
            estimate = walk.ask(x, sigma)
        return put_in(ddpm_step(x, estimate, sigma, lower, walk), lower)

    x = (torch.randn(images.shape, generator=generator) * sigmas[0]).to(where)
    x = sample(denoiser, put_in(x, sigmas[0]), sigmas, repaint_step, labels, generator=generator, **how)
    return torch.where(known, images, x)


def generate(denoiser: Denoiser, n_samples: int, *, n_steps: int = 20, seed: int = 0,
             labels: Tensor | None = None, batch_size: int = 16, **how: Unpack[How]) -> Iterator[Tensor]:
    """Yield images in batches, by `sample_dpm`, so that any number fits into memory.

    Parameters
    ----------
    denoiser, n_samples, n_steps, seed, labels, **how
        As for `sample_dpm`.
    batch_size : int, default 16
        Images at a time; it does not change the images, up to rounding. 16 of 64x64 pixels fit the caches of
        a processor; a graphics card is quicker with more.

    Yields
    ------
    Tensor
        (at most batch_size, C, H, W) float32 in [-1, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n_samples, batch_size):
        part = labels if labels is None else labels[start:start + batch_size]
        n = min(batch_size, n_samples - start)
        yield _from_noise(dpm_step, denoiser, n, n_steps, generator, part, **how)
