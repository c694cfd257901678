"""The physics of projection against numbers worked out by hand or by brute force."""

import math

import pytest
import torch
from torch import Tensor

from genailab_helpers.phantoms import projection


def upright(img_size: int = 64, n: int = 1) -> projection.Rays:
    zero = torch.zeros(n)
    return projection.cast_rays(zero, zero, zero + 1, zero, img_size)


def exposed(line: Tensor, quanta: float = 1e9, scatter: float = 0.0, noise: Tensor | None = None) -> Tensor:
    one = torch.ones(len(line))
    noise = torch.zeros_like(line) if noise is None else noise
    return projection.expose(line, noise, one * quanta, one * scatter, one * 0)


def test_beer_lambert_against_tenth_value_layers() -> None:
    # a line integral of k ln 10 lets through 10^-k, and the logarithmic signal gives the line integral back
    line = torch.arange(4.0)[:, None, None].expand(4, 16, 16) * math.log(10)
    passed = torch.exp(-exposed(line))
    torch.testing.assert_close(passed[:, 8, 8], torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_ellipsoid_is_as_long_as_a_march_along_the_ray() -> None:
    rays = upright(32)
    x, y, width, height, depth, angle = 0.05, 0.45, 0.2, 0.3, 0.15, 0.4
    drawn = projection.ellipsoid(rays, x, y, width, height, depth, angle)[0]
    z = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 - 0.5
    dx, dy = rays.x[0].double() - x, rays.y[0].double() - y
    u = dx * math.cos(angle) + dy * math.sin(angle)
    v = dy * math.cos(angle) - dx * math.sin(angle)
    inside = (u[..., None] / width) ** 2 + (v[..., None] / height) ** 2 + (z / depth) ** 2 < 1
    marched = inside.double().mean(-1)  # the march is one image side long
    assert (drawn - marched).abs().max() < 2 / 4000 + 1e-5
    assert drawn.max() > 0.29


def test_a_ray_that_misses_travels_nothing() -> None:
    missed = projection.ellipsoid(upright(32), 0.0, 0.5, 0.1, 0.1, 0.1)[0, 0]
    assert torch.equal(missed, torch.zeros(32))


def test_tube_chord_is_pythagoras() -> None:
    distance = torch.tensor([[[0.0, 0.3, 0.4, 0.5, 0.9]]])
    lengths = projection.tube(distance, 0.5, obliquity=2.0)[0, 0]
    torch.testing.assert_close(lengths, torch.tensor([2.0, 1.6, 1.2, 0.0, 0.0]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("radius", [0.0005, 0.002, 0.02])  # of 64 pixels: 0.03, 0.13 and 1.3 pixels
def test_thin_tubes_attenuate_what_they_should_in_all(radius: float) -> None:
    zero = torch.zeros(1)
    segment = torch.tensor([[[-0.25, 0.42, 0.25, 0.55, radius]]])
    film = projection.draw_segments(segment, 64, zero + 1, zero, zero, zero)
    length = math.hypot(0.5, 0.13)
    drawn = max(radius, 0.7 / 64)
    # a tube with half balls at its ends; balls of a widened tube are wider and paler by the same rule
    volume = math.pi * radius**2 * length + 4 / 3 * math.pi * radius**2 * drawn
    assert film.sum().item() / 64**2 == pytest.approx(volume, rel=0.05)


def test_segments_beside_the_film_leave_no_trace() -> None:
    zero = torch.zeros(1)
    segments = torch.tensor([[[0.7, 0.5, 0.8, 0.5, 0.02], [0.0, -0.4, 0.1, -0.3, 0.02],
                              [5.0, 9.0, 5.1, 9.0, 0.02]]])
    assert projection.draw_segments(segments, 64, zero + 1, zero, zero, zero).abs().max() == 0


def test_segments_lie_where_rays_see_them() -> None:
    shift, turn = torch.tensor([0.05]), torch.tensor([0.3])
    rays = projection.cast_rays(shift, -shift, shift * 0 + 1.2, turn, 96)
    segment = torch.tensor([[[0.1, 0.3, 0.1, 0.7, 0.03]]])
    film = projection.draw_segments(segment, 96, shift * 0 + 1.2, shift, -shift, turn)
    axis = ((rays.x - 0.1).abs() < 0.02) & (rays.y > 0.3) & (rays.y < 0.7)
    far = ((rays.x - 0.1).abs() > 0.04) | (rays.y < 0.26) | (rays.y > 0.74)
    assert film[axis].min() > 0.03
    assert film[far].max() == 0


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_zone_holds_its_box_and_little_more(sign: float) -> None:
    rays = upright(64)
    window, near = rays.zone(0.1, 0.3, 0.2, 0.6, sign)
    inside = (sign * rays.x >= 0.1) & (sign * rays.x <= 0.3) & (rays.y >= 0.2) & (rays.y <= 0.6)
    kept = torch.zeros_like(inside)
    kept[window] = True
    assert kept[inside].all()
    assert kept.sum() == inside.sum()
    assert torch.equal(near.x, sign * rays.x[window])
    assert rays.zone(3.0, 4.0)[1].x.numel() == 0


def test_scatter_lowers_contrast() -> None:
    line = torch.full((1, 64, 64), 3.0)
    line[:, :, 32:] = 2.0
    clean, veiled = exposed(line), exposed(line, scatter=0.5)
    step = [float(s[0, 32, 31] - s[0, 32, 32]) for s in (clean, veiled)]
    assert step[0] == pytest.approx(1.0, abs=1e-3)
    # at the edge half of the mean of both primaries is added to each
    veil = 0.5 * (math.exp(-3) + math.exp(-2)) / 2
    assert step[1] == pytest.approx(math.log((math.exp(-2) + veil) / (math.exp(-3) + veil)), abs=0.1)


def test_noise_variance_is_that_of_counting_photons() -> None:
    quanta, thickness = 5000.0, 1.0
    noise = projection.quantum_noise(torch.tensor([[3, 0], [3, 1]]), 128)
    signal = exposed(torch.full((2, 128, 128), thickness), quanta, noise=noise)
    expected = 1 / (quanta * math.exp(-thickness))  # variance of the log of a Poisson count is 1 / count
    # 32,768 pixels: the standard error of a variance is sqrt(2 / n) = 0.8 %; five of them
    assert signal.var().item() == pytest.approx(expected, rel=0.04)


def test_noise_belongs_to_the_film() -> None:
    keys = torch.tensor([[3, 0], [3, 1], [4, 0]])
    noise = projection.quantum_noise(keys, 32)
    assert torch.equal(noise[1:2], projection.quantum_noise(keys[1:2], 32))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


@pytest.mark.parametrize("quanta", [-5.0, 0.0, 3.0, 1e9])
def test_expose_is_finite_whatever_arrives(quanta: float) -> None:
    line = torch.linspace(-5, 200, 32 * 32).reshape(1, 32, 32)
    noise = projection.quantum_noise(torch.tensor([[0, 0]]), 32) * 10
    assert exposed(line, quanta, scatter=-0.5, noise=noise).isfinite().all()


def test_display_keeps_order_and_range() -> None:
    one = torch.ones(1)
    shown = projection.display(torch.linspace(-1, 5, 50).reshape(1, 1, 50), one * 1, one * 3, one)[0, 0]
    assert (shown.diff() > 0).all()
    assert shown.abs().max() <= 1
    middle = projection.display(torch.tensor([[[1.0, 2.0, 3.0]]]), one * 1, one * 3, one)[0, 0]
    torch.testing.assert_close(middle, torch.tanh(torch.tensor([-1.0, 0.0, 1.0])))


def test_blur_keeps_the_mean_of_a_spot() -> None:
    spot = torch.zeros(1, 9, 9)
    spot[0, 4, 4] = 1
    blurred = projection.blur(spot, 0.25)[0]
    weights = torch.tensor([0.25, 0.5, 0.25])
    torch.testing.assert_close(blurred[3:6, 3:6], weights[:, None] * weights)
    assert blurred.sum().item() == pytest.approx(1)


def test_quantile_is_that_of_the_coarse_film() -> None:
    ramp = torch.arange(256.0).reshape(1, 16, 16)
    fine = ramp.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert projection.quantile(fine, 0.9).item() == math.ceil(0.9 * 255)
