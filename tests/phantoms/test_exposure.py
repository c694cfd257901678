"""From line integrals to grey values, against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from genailab_helpers.phantoms import exposure

SIDE = 12.8  # cm: 1 mm a pixel at 128 pixels


def exposed(line: Tensor, photons: float = 1e9, scatter: float = 0.0, noise: Tensor | None = None,
            blur_mm: float = 0.0) -> Tensor:
    one = torch.ones(len(line))
    noise = torch.zeros_like(line) if noise is None else noise
    return exposure.expose(line, noise, one * photons, one * scatter, one * blur_mm, SIDE)


def test_beer_lambert_against_tenth_value_layers() -> None:
    # a line integral of k ln 10 lets through 10^-k, and the logarithmic signal gives the line integral back
    line = torch.arange(4.0)[:, None, None].expand(4, 16, 16) * math.log(10)
    torch.testing.assert_close(torch.exp(-exposed(line))[:, 8, 8], torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_attenuation_is_that_of_the_tables() -> None:
    # NIST XCOM at 60 and 80 keV, per cm: soft tissue (ICRU-44, 1.06 g/cm3) .217 and .193, cortical bone
    # (1.92 g/cm3) .604 and .428; halfway between their logarithms is 70 keV within 3 %
    assert pytest.approx(math.sqrt(0.217 * 0.193), rel=0.03) == exposure.SOFT
    assert pytest.approx(math.sqrt(0.604 * 0.428) - exposure.SOFT, rel=0.03) == exposure.BONE_EXCESS


def test_scatter_lowers_contrast() -> None:
    line = torch.full((1, 64, 64), 3.0)
    line[:, :, 32:] = 2.0
    clean, veiled = exposed(line), exposed(line, scatter=0.5)
    step = [float(s[0, 32, 31] - s[0, 32, 32]) for s in (clean, veiled)]
    assert step[0] == pytest.approx(1.0, abs=1e-3)
    veil = 0.5 * (math.exp(-3) + math.exp(-2)) / 2  # at the edge half of the mean of both is added to each
    assert step[1] == pytest.approx(math.log((math.exp(-2) + veil) / (math.exp(-3) + veil)), abs=0.1)


def test_noise_variance_is_that_of_counting_photons() -> None:
    photons, thickness = 5000.0, 1.0  # per mm2, and a pixel is 1 mm2
    noise = exposure.random_fields(torch.tensor([[3, 0], [3, 1]]), 128, 0)
    signal = exposed(torch.full((2, 128, 128), thickness), photons, noise=noise)
    expected = 1 / (photons * math.exp(-thickness))  # variance of the log of a Poisson count is 1 / count
    # 32,768 pixels: the standard error of a variance is sqrt(2 / n) = 0.8 %; five of them
    assert signal.var().item() == pytest.approx(expected, rel=0.04)


def test_noise_belongs_to_the_image() -> None:
    keys = torch.tensor([[3, 0], [3, 1], [4, 0]])
    noise = exposure.random_fields(keys, 32, 0)
    assert torch.equal(noise[1:2], exposure.random_fields(keys[1:2], 32, 0))
    for other in (noise[1], noise[2], exposure.random_fields(keys, 32, 1)[0]):
        assert abs(float(torch.corrcoef(torch.stack([noise[0].flatten(), other.flatten()]))[0, 1])) < 0.15


@pytest.mark.parametrize("sigma", [0.8, 1.2, 1.9])
def test_blur_is_a_gaussian_of_its_size_at_any_pixel(sigma: float) -> None:
    for n_pixels in (128, 256):  # pixels of 1 and of 0.5 mm
        spot = torch.zeros(1, n_pixels, n_pixels)
        middle = n_pixels // 2
        spot[0, middle, middle] = 1
        scale = n_pixels / 128
        image = exposure.blurred(spot, torch.tensor([sigma * scale]), exposure.MOST_BLUR * scale)[0]
        place = (torch.arange(n_pixels) - middle) / scale
        assert image.sum().item() == pytest.approx(1, abs=1e-4)
        spread = float((image.sum(0) * place**2).sum()) ** 0.5
        assert spread == pytest.approx(sigma, rel=0.15)  # the tails are cut at four of the widest


def test_blur_spares_edges_and_constants() -> None:
    flat = torch.full((2, 16, 16), 0.3)
    torch.testing.assert_close(exposure.blurred(flat, torch.tensor([0.2, 1.5]), 2.0), flat)


@pytest.mark.parametrize("photons", [-5.0, 0.0, 3.0, 1e9])
def test_expose_is_finite_whatever_arrives(photons: float) -> None:
    line = torch.linspace(-5, 200, 32 * 32).reshape(1, 32, 32)
    noise = exposure.random_fields(torch.tensor([[0, 0]]), 32, 0) * 10
    assert exposed(line, photons, scatter=-0.5, noise=noise).isfinite().all()


def test_display_keeps_order_and_range() -> None:
    one = torch.ones(1)
    shown = exposure.display(torch.linspace(-1, 5, 50).reshape(1, 1, 50), one * 1, one * 3, one)[0, 0]
    assert (shown.diff() > 0).all()
    assert shown.abs().max() <= 1
    middle = exposure.display(torch.tensor([[[1.0, 2.0, 3.0]]]), one * 1, one * 3, one)[0, 0]
    torch.testing.assert_close(middle, torch.tanh(torch.tensor([-1.0, 0.0, 1.0])))
    far = exposure.display(torch.tensor([[[-1e6, 1e6]]]), one, one * 3, one)[0, 0]
    assert far.tolist() == [-1.0, 1.0]


def test_grey_range_is_that_of_lung_and_abdomen() -> None:
    signal = torch.zeros(1, 64, 64)  # air
    signal[:, 8:, 4:60] = 3.0  # body
    signal[:, 14:40, 12:52] = 1.0  # lungs
    dark, bright = exposure.grey_range(signal)
    assert (float(dark), float(bright)) == (1.0, 3.0)
