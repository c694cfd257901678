"""Self-checks of lesson 3, chest diffusion."""

from typing import Any

import torch
from torch import Tensor

from genailab_helpers.diffusion.denoiser import linear_schedule
from genailab_helpers.lessons.exercises import NotSolved, expect_close, self_check


@self_check("3.1")
def time_of_noise_level(ddpm_time: Any) -> None:
    """Nearest noise level, beside an image of full strength."""
    left = linear_schedule(1000)
    squared = (1 - left) / left
    wrong = {"the noise alone, sqrt(1 - alpha_bar); the image has been shrunk, too": (1 - left).sqrt(),
             "the ratio of powers; a noise level is a standard deviation, so take the root": squared,
             "image to noise; it is noise to image": squared.rsqrt()}
    for sigma in (0.1, 0.5, 3.0):
        got, want = int(ddpm_time(sigma, left)), _nearest(squared.sqrt(), sigma)
        for mistake, values in wrong.items():
            if got != want and got == _nearest(values, sigma):
                raise NotSolved(f"noise level {sigma}: expected the index {want}, got {got}: you compared "
                                + mistake)
        expect_close(got, want, f"the index of noise level {sigma}")


def _nearest(values: Tensor, sigma: float) -> int:
    return int((values / sigma).log().abs().argmin())


@self_check("3.2")
def fraction(best_fraction: Any) -> None:
    """Wiener filter of one pixel."""
    for sigma, s in ((0.4, 0.25), (0.1, 0.3), (2.0, 1.0)):
        got, want = float(best_fraction(sigma, s)), s**2 / (s**2 + sigma**2)
        for mistake, value in (
                ("deviations add up as squares: variances are what is compared", s / (s + sigma)),
                ("this is the fraction of the noise; much noise means: stay at the mean image", 1 - want),
                ("the deviation of the images is not 1", 1 / (1 + sigma**2)),
                ("this c makes the variance right, not the error small", want**0.5)):
            if abs(got - value) < 1e-6 and abs(value - want) > 1e-6:
                raise NotSolved(f"sigma {sigma}, deviation {s}: expected {want:.4g}, got {got:.4g}: "
                                + mistake)
        expect_close(got, want, f"the fraction at sigma {sigma} and deviation {s}")


@self_check("3.3")
def heun(step: Any) -> None:
    """One step of Heun, on a denoiser whose answer is known."""
    x = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.3 + (x - 0.3) / (1 + sigma**2)

    for high, low in ((2.0, 0.5), (0.3, 0.1), (0.4, 0.0)):
        sigma, lower = torch.tensor(high), torch.tensor(low)
        got = torch.as_tensor(step(denoiser, x, sigma, lower))
        slope = (x - denoiser(x, sigma)) / sigma
        euler = x + (lower - sigma) * slope
        if low == 0:
            if not got.isfinite().all():
                raise NotSolved("at lower = 0 your step is not finite: there is no second slope there")
            expect_close(got, euler, "the step to noise level 0 (Euler's)")
            continue
        ahead = (euler - denoiser(euler, lower)) / lower
        for mistake, value in (
                ("this is Euler's step: the slope at the other end is not used", euler),
                ("only the slope at the other end is used: take the mean of both",
                 x + (lower - sigma) * ahead),
                ("the second half began where the trial landed: go back to x first",
                 euler + (lower - sigma) * (slope + ahead) / 2),
                ("the second slope was divided by sigma: where it is taken, the noise level is lower",
                 x + (lower - sigma) * (slope + ahead * lower / sigma) / 2)):
            if got.shape == value.shape and torch.allclose(got, value, atol=1e-5):
                raise NotSolved(f"the step from {high} to {low}: {mistake}")
        expect_close(got, x + (lower - sigma) * (slope + ahead) / 2, f"the step from {high} to {low}")


@self_check("3.4")
def new_or_copied(novelty: Any) -> None:
    """A ratio of distances to the nearest training image, judged by what it does."""
    generator = torch.Generator().manual_seed(34)
    train, held_out, new = (torch.randn(n, 16, generator=generator) for n in (60, 41, 31))
    copies = train[:31] + 0.01 * torch.randn(31, 16, generator=generator)
    of_new, of_copies = (float(novelty(some, train, held_out)) for some in (new, copies))
    doubled = float(novelty(2 * new, 2 * train, 2 * held_out))
    if abs(doubled - of_new) > 1e-3 * abs(of_new):
        raise NotSolved(f"twice the contrast: expected the same number, got {of_new:.3g} and then "
                        f"{doubled:.3g}; divide by what held-out images have")
    if not of_copies < 0.1:
        raise NotSolved(f"copies with faint noise: expected nearly 0, got {of_copies:.3g}; only the "
                        "*nearest* training image counts, not the mean of all")
    if not 0.8 < of_new < 1.25:
        raise NotSolved(f"new images: expected about 1, got {of_new:.3g}; compare generated with train, and "
                        "held-out with train")
    mixed = float(novelty(torch.cat([copies[:8], new[:23]]), train, held_out))
    if not 0.8 < mixed < 1.25:
        raise NotSolved(f"8 copies among 31 images: expected about 1 by a median, got {mixed:.3g}; the least "
                        "distance is that of one image")
