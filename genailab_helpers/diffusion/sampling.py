"""Four samplers over one denoiser, from noise to images, and what else they can begin from.

All of them walk down the same noise levels and ask the same denoiser D(x, sigma) at each; they differ in the
step only. Noise is drawn on the CPU, so that a seed gives the same images on every device up to rounding.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from genailab_helpers.diffusion.process import karras_sigmas

Callback = Callable[[int, Tensor, Tensor], object]


class DenoiserLike(Protocol):
    """What a sampler needs: the shape (C, H, W) of an image, and D(x, sigma, labels)."""

    image_shape: tuple[int, int, int]

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Estimate the images (N, C, H, W) behind noise of standard deviation `sigma`."""


def _guided(denoiser: DenoiserLike, x: Tensor, sigma: Tensor, labels: Tensor | None,
            guidance: float) -> Tensor:
    """Return D, pushed away from the estimate without label (Ho and Salimans 2022)."""
    estimate = denoiser(x, sigma, labels)
    if labels is None or guidance == 1:
        return estimate
    unlabelled = denoiser(x, sigma)
    return unlabelled + guidance * (estimate - unlabelled)


def _start(denoiser: DenoiserLike, n_samples: int, n_steps: int, seed: int | torch.Generator,
           labels: Tensor | None, sigmas: Tensor | None, images: Tensor | None
           ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor | None, torch.Generator]:
    """Return the first x, pairs of noise level and next lower one, the labels, and the generator."""
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: expected at least 1")
    known = getattr(denoiser, "num_classes", None)
    if labels is not None:
        labels = torch.as_tensor(labels)
        if known is None:
            raise ValueError("labels were given, but this model was trained without labels")
        if len(labels) != n_samples:
            raise ValueError(f"{len(labels)} labels for n_samples={n_samples}: expected one label an image")
        if not 0 <= int(labels.min()) <= int(labels.max()) < known:
            raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())}; "
                             f"this model knows 0 to {known - 1}")
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    sigmas = karras_sigmas(n_steps) if sigmas is None else sigmas
    x = torch.randn((n_samples, *denoiser.image_shape), generator=generator) * sigmas[0]
    if images is not None:
        if len(images) != n_samples:
            raise ValueError(f"{len(images)} images for n_samples={n_samples}: expected one for each")
        x = x + _checked(images, denoiser)
    if isinstance(denoiser, torch.nn.Module):
        device = next(denoiser.parameters()).device
        x, sigmas = x.to(device), sigmas.to(device)
        labels = None if labels is None else labels.to(device)
    return x, list(pairwise(sigmas)), labels, generator


def _checked(images: Tensor, denoiser: DenoiserLike) -> Tensor:
    """Return images on the CPU if they are what this denoiser can go on from."""
    if (images.dtype != torch.float32 or images.ndim != 4 or not len(images)
            or tuple(images.shape[1:]) != tuple(denoiser.image_shape)):
        raise ValueError(f"images of shape {tuple(images.shape)} and {images.dtype}; expected (N, "
                         f"{', '.join(map(str, denoiser.image_shape))}) and float32, as this model draws")
    low, high = images.min().item(), images.max().item()
    if not -1.001 <= low <= high <= 1.001:
        raise ValueError(f"images with values from {low:.3g} to {high:.3g}; expected -1 (black) to 1 (white)")
    return images.cpu()


@torch.no_grad()
def sample_ddpm(denoiser: DenoiserLike, n_samples: int, *, n_steps: int = 250,
                seed: int | torch.Generator = 0,
                labels: Tensor | None = None, guidance: float = 1.0, sigmas: Tensor | None = None,
                images: Tensor | None = None, callback: Callback | None = None) -> Tensor:
    """Sample by the ancestral steps of DDPM: estimate the image, go back to it, add fresh noise.

    Parameters
    ----------
    denoiser : Denoiser
        D(x, sigma, labels).
    n_samples : int
        Number of images.
    n_steps : int, default 250
        Noise levels to visit; one call of the denoiser each.
    seed : int or torch.Generator, default 0
        Source of all noise, on the CPU.
    labels : Tensor, optional
        (n_samples,) integers below the model's num_classes; None leaves the label open.
    guidance : float, default 1
        1 samples the label's images; more exaggerates what is typical of it, and costs a second call a step.
    sigmas : Tensor, optional
        (n_steps + 1,) noise levels, falling to 0, instead of those of `karras_sigmas`.
    images : Tensor, optional
        (n_samples, C, H, W) in [-1, 1]: the walk begins at these under noise of the first level, and not at
        noise alone. Meant for a low first level; see `vary`.
    callback : callable, optional
        Called at every step with the step, x (N, C, H, W) and the denoiser's estimate (N, C, H, W).

    Returns
    -------
    Tensor
        (n_samples, C, H, W) float32 in [-1, 1].

    Raises
    ------
    ValueError
        If `n_samples` or `n_steps` is below 1, or labels or images do not fit the model.

    Notes
    -----
    Ho et al. 2020, algorithm 2 with the posterior variance, written for x / sqrt(alpha_bar).
    """
    x, levels, labels, generator = _start(denoiser, n_samples, n_steps, seed, labels, sigmas, images)
    for step, (sigma, lower) in enumerate(levels):
        estimate = _guided(denoiser, x, sigma, labels, guidance)
        if callback:
            callback(step, x, estimate)
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        x = _ancestral_step(x, estimate, sigma, lower, noise)
    return x.clamp(-1, 1)


def _ancestral_step(x: Tensor, estimate: Tensor, sigma: Tensor, lower: Tensor, noise: Tensor) -> Tensor:
    """Return a draw of what x was at the lower noise level, had `estimate` been the image."""
    kept = lower**2 / sigma**2
    return estimate + kept * (x - estimate) + (kept * (sigma**2 - lower**2)).sqrt() * noise


@torch.no_grad()
def sample_ddim(denoiser: DenoiserLike, n_samples: int, *, n_steps: int = 50, seed: int | torch.Generator = 0,
                labels: Tensor | None = None, guidance: float = 1.0, sigmas: Tensor | None = None,
                images: Tensor | None = None, callback: Callback | None = None) -> Tensor:
    """Sample by DDIM: keep the direction of the noise, only shrink it.

    The first noise decides the image. Parameters, result and errors are those of `sample_ddpm`.

    Notes
    -----
    Song et al. 2021, equation 12 with eta = 0; it is Euler's method on the probability-flow equation.
    """
    x, levels, labels, _ = _start(denoiser, n_samples, n_steps, seed, labels, sigmas, images)
    for step, (sigma, lower) in enumerate(levels):
        estimate = _guided(denoiser, x, sigma, labels, guidance)
        if callback:
            callback(step, x, estimate)
        x = estimate + lower / sigma * (x - estimate)
    return x.clamp(-1, 1)


@torch.no_grad()
def sample_heun(denoiser: DenoiserLike, n_samples: int, *, n_steps: int = 18, seed: int | torch.Generator = 0,
                labels: Tensor | None = None, guidance: float = 1.0, sigmas: Tensor | None = None,
                images: Tensor | None = None, callback: Callback | None = None) -> Tensor:
    """Sample by Heun's method: take DDIM's step, look at the slope there, go back and use the mean of both.

    Two calls of the denoiser a step, one at the last. Parameters, result and errors are those of
    `sample_ddpm`.

    Notes
    -----
    Karras et al. 2022, algorithm 1.
    """
    x, levels, labels, _ = _start(denoiser, n_samples, n_steps, seed, labels, sigmas, images)
    for step, (sigma, lower) in enumerate(levels):
        estimate = _guided(denoiser, x, sigma, labels, guidance)
        if callback:
            callback(step, x, estimate)
        slope = (x - estimate) / sigma
        ahead = x + (lower - sigma) * slope
        if lower > 0:
            slope_ahead = (ahead - _guided(denoiser, ahead, lower, labels, guidance)) / lower
            ahead = x + (lower - sigma) * (slope + slope_ahead) / 2
        x = ahead
    return x.clamp(-1, 1)


@torch.no_grad()
def sample_dpm(denoiser: DenoiserLike, n_samples: int, *, n_steps: int = 20, seed: int | torch.Generator = 0,
               labels: Tensor | None = None, guidance: float = 1.0, sigmas: Tensor | None = None,
               images: Tensor | None = None, callback: Callback | None = None) -> Tensor:
    """Sample by DPM-Solver++(2M): DDIM's step towards an estimate that the last one helps to predict.

    One call of the denoiser a step, and the accuracy of two: where few calls can be paid, take this one.
    Parameters, result and errors are those of `sample_ddpm`.

    Notes
    -----
    Lu et al., DPM-Solver++, 2022, algorithm 2, in lambda = -log sigma. The first step and the last, to
    sigma = 0, are of first order, as in `diffusers`.
    """
    x, levels, labels, _ = _start(denoiser, n_samples, n_steps, seed, labels, sigmas, images)
    before: Tensor | None = None
    step_before = torch.ones(())
    for step, (sigma, lower) in enumerate(levels):
        estimate = _guided(denoiser, x, sigma, labels, guidance)
        if callback:
            callback(step, x, estimate)
        h = (sigma / lower).log()  # infinite at the last step
        ahead = estimate if before is None or lower == 0 else (
            estimate + h / (2 * step_before) * (estimate - before))
        x = ahead + lower / sigma * (x - ahead)
        before, step_before = estimate, h
    return x.clamp(-1, 1)


def vary(denoiser: DenoiserLike, images: Tensor, strength: float = 0.5, *, n_steps: int = 20,
         seed: int | torch.Generator = 0, labels: Tensor | None = None, guidance: float = 1.0) -> Tensor:
    """Draw films that are variations of given ones: drown these in noise half-way, and walk back.

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
    seed, labels, guidance
        As for `sample_ddpm`; another label than the image's own keeps its coarse form.

    Returns
    -------
    Tensor
        (N, C, H, W) float32 in [-1, 1]. At low strength they still show whom the film showed: varying makes
        nobody anonymous.

    Raises
    ------
    ValueError
        If `strength` is not above 0 and at most 1, or images or labels do not fit the model.

    Notes
    -----
    SDEdit (Meng et al. 2022), with the deterministic walk of `sample_dpm`.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: expected a number above 0, at most 1")
    sigmas = karras_sigmas(n_steps)[n_steps - max(1, round(strength * n_steps)):]
    return sample_dpm(denoiser, len(images), seed=seed, labels=labels, guidance=guidance, sigmas=sigmas,
                      images=images)


@torch.no_grad()
def inpaint(denoiser: DenoiserLike, images: Tensor, known: Tensor, *, n_steps: int = 20, n_repeats: int = 10,
            seed: int | torch.Generator = 0, labels: Tensor | None = None, guidance: float = 1.0) -> Tensor:
    """Fill in what is missing in films, so that it fits what is there.

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
    seed, labels, guidance
        As for `sample_ddpm`.

    Returns
    -------
    Tensor
        (N, C, H, W) float32 in [-1, 1], equal to `images` where they are known.

    Raises
    ------
    ValueError
        If a number is below 1, or images, mask or labels do not fit the model or each other.

    Notes
    -----
    RePaint (Lugmayr et al. 2022), algorithm 1 with jumps of one step, in the EDM form.
    """
    if n_repeats < 1:
        raise ValueError(f"n_repeats={n_repeats}: expected at least 1")
    fits = known.ndim <= images.ndim and all(
        ours in (1, theirs) for ours, theirs in zip(known.shape[::-1], images.shape[::-1], strict=False))
    if known.dtype != torch.bool or not fits:
        raise ValueError(f"known: expected booleans that broadcast to {tuple(images.shape)}")
    x, levels, labels, generator = _start(denoiser, len(images), n_steps, seed, labels, None, None)
    kept = _checked(torch.where(known.cpu(), images.cpu(), torch.zeros(())), denoiser).to(x.device)
    known = known.to(x.device)

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x.device)

    for sigma, lower in levels:
        for repeat in range(n_repeats):
            if repeat:
                x = x + (sigma**2 - lower**2).sqrt() * noise()  # back up one level
            x = torch.where(known, kept + sigma * noise(), x)
            estimate = _guided(denoiser, x, sigma, labels, guidance)
            x = _ancestral_step(x, estimate, sigma, lower, noise())
    return torch.where(known, kept, x.clamp(-1, 1))


def generate(denoiser: DenoiserLike, n_samples: int, *, n_steps: int = 20, seed: int = 0,
             labels: Tensor | None = None, guidance: float = 1.0, batch_size: int = 16,
             first: int = 0) -> Iterator[Tensor]:
    """Yield images in batches, by `sample_dpm`, so that any number fits into memory.

    Parameters
    ----------
    denoiser, n_samples, n_steps, seed, labels, guidance
        As for `sample_dpm`.
    batch_size : int, default 16
        Images at a time; it does not change the images, up to rounding. 16 of 64x64 pixels fit the caches of
        a processor; a graphics card is quicker with more.
    first : int, default 0
        So many images are left out at the beginning: a run that was stopped has them already.

    Yields
    ------
    Tensor
        (at most batch_size, C, H, W) float32 in [-1, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, first, batch_size):  # draw the noise of those left out, and drop it
        torch.randn((min(batch_size, first - start), *denoiser.image_shape), generator=generator)
    for start in range(first, n_samples, batch_size):
        part = labels if labels is None else labels[start:start + batch_size]
        yield sample_dpm(denoiser, min(batch_size, n_samples - start), n_steps=n_steps, seed=generator,
                         labels=part, guidance=guidance)
