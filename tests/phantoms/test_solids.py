"""Path lengths against numbers worked out by hand or by brute force, and windows that cut nothing off."""

import itertools
import math

import pytest
import torch

from genailab_helpers.phantoms.solids import (
    Patch,
    Placement,
    bone,
    covered,
    edges_of,
    ellipsoid,
    enlarged,
    joined,
    seen,
    segments,
    summed,
    tube,
)

SIDE = 20.0  # cm
EVERY = slice(None)


def upright(n: int = 1, shift_x: float = 0.0, magnification: float = 1.0) -> Placement:
    zero = torch.zeros(n)
    return Placement(SIDE, zero + shift_x, zero, zero + magnification, zero, zero)


@pytest.mark.parametrize("angle", [0.0, 0.4, -1.2])
def test_ellipsoid_is_as_long_as_a_march_along_the_ray(angle: float) -> None:
    rays = upright().rays(32)
    x, y, width, height, depth = 1.0, -1.0, 4.0, 6.0, 3.0
    patch = ellipsoid(torch.tensor([x]), y, width, height, depth, angle)(rays, EVERY)
    length = summed(torch.zeros_like(rays.x), [patch])[0]
    z = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 - 0.5) * SIDE
    dx, dy = rays.x[0].double() - x, rays.y[0].double() - y
    u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
    inside = (u[..., None] / width) ** 2 + (v[..., None] / height) ** 2 + (z / depth) ** 2 < 1
    assert (length - inside.double().mean(-1) * SIDE).abs().max() < 2 * SIDE / 4000
    assert length.max() > 5.8
    assert torch.equal(length > 0, (u / width) ** 2 + (v / height) ** 2 < 1)  # exactly 0 beside it


def test_a_tube_is_a_capsule_around_its_chain() -> None:
    rays = upright().rays(64)
    points = [(-5.0, -3.0), (0.0, 2.0), (6.0, 1.0)]
    zero = torch.zeros(1)
    patch = tube([(zero + x, y) for x, y in points], 1.5)(rays, EVERY)
    length = summed(torch.zeros_like(rays.x), [patch])[0]
    place = torch.stack(torch.broadcast_tensors(rays.x, rays.y), -1)[0]
    distance = torch.full(place.shape[:2], math.inf)
    for t in torch.linspace(0, 1, 2001):
        for start, end in itertools.pairwise(points):
            axis = torch.tensor(start) * (1 - t) + torch.tensor(end) * t
            distance = torch.minimum(distance, (place - axis).norm(dim=-1))
    expected = 2 * (1.5**2 - distance**2).clamp(min=0).sqrt()
    assert (length - expected).abs().max() < 0.02


def test_a_bone_is_a_shell_of_cortex_around_marrow() -> None:
    u = torch.linspace(0, 1, 101)
    inner = 0.65
    shell = (1 - u**2).sqrt() - 0.8 * inner * (1 - (u / inner) ** 2).clamp(min=0).sqrt()
    assert (bone(u**2) - shell).abs().max() < 0.13  # the polynomial is smoother than the inner edge
    assert float(bone(u**2).mean()) == pytest.approx(float(shell.mean()), rel=0.02)
    assert bone(torch.tensor([1.0, 1.5, 400.0])).abs().max() == 0


@pytest.mark.parametrize("move", [{"width": 2.0}, {"x": 3.0}, {"y": -4.0}, {"angle": 0.8}, {"height": 0.3}])
def test_a_solid_knows_its_own_window(move: dict[str, float]) -> None:
    # a changed size or place moves the window with it: nothing is cut off, and little is computed in vain
    numbers = {"x": 0.5, "y": 0.0, "width": 1.0, "height": 3.0, "depth": 2.0, "angle": 0.3} | move
    rays = upright().rays(128)
    patch = ellipsoid(**{name: torch.tensor([v]) for name, v in numbers.items()})(rays, EVERY)
    dx, dy, angle = rays.x - numbers["x"], rays.y - numbers["y"], numbers["angle"]
    u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
    squared = (u / numbers["width"]) ** 2 + (v / numbers["height"]) ** 2
    whole = summed(torch.zeros_like(rays.x), [patch])
    expected = 2 * numbers["depth"] * (1 - squared).clamp(min=0).sqrt()
    torch.testing.assert_close(whole, expected, atol=0.02, rtol=0)
    rows, columns = (torch.nonzero(whole[0].any(axis)).flatten() for axis in (1, 0))
    assert patch.length[0].shape[0] <= len(rows) + 4
    assert patch.length[0].shape[1] <= len(columns) + 4


@pytest.mark.parametrize("radius", [0.01, 0.04, 0.4])  # of 64 pixels: 0.03, 0.13 and 1.3 pixels
def test_thin_tubes_attenuate_what_they_should_in_all(radius: float) -> None:
    ends = (torch.tensor([[place]]) for place in (-5.0, -1.5, 5.0, 1.0))
    image = segments(64, upright(), torch.tensor([[radius]]), *ends)
    volume = math.pi * radius**2 * math.hypot(10, 2.5)
    assert float(image.sum()) * (SIDE / 64) ** 2 == pytest.approx(volume, rel=0.05)


def test_tubes_that_follow_each_other_make_one_without_a_bead() -> None:
    ends = torch.tensor([[-6.0, -2.0, 1.0]]), torch.tensor([[-2.0, 1.0, 6.0]])
    zero = torch.zeros(1, 3)
    image = segments(64, upright(), zero + 1.0, ends[0], zero, ends[1], zero)
    axis = image[0, 31, 16:48]
    assert axis.max() / axis.min() < 1.02


def test_segments_lie_where_rays_see_them_and_leave_no_trace_beside_the_image() -> None:
    place = Placement(SIDE, *(torch.tensor([v]) for v in (1.0, -1.0, 1.2, 0.1, 0.004)))
    rays = place.rays(96)
    one = torch.ones(1, 1)
    image = segments(96, place, one * 0.6, one * 2, one * -4, one * 2, one * 4)
    y = rays.y.expand_as(rays.x)
    assert image[((rays.x - 2).abs() < 0.3) & (y.abs() < 3.5)].min() > 0.3
    assert image[((rays.x - 2).abs() > 1.1) | (y.abs() > 4.8)].max() == 0
    assert segments(96, place, one * 0.6, one * 30, one * 4, one * 32, one * 4).abs().max() == 0


def test_a_window_holds_its_rays_and_little_more() -> None:
    # bodies that stand apart, lean and bend: each has a window of its own, all of one size
    numbers = [3.0, -2.0], [0.0, 4.0], [1.0, 0.8], [0.2, 0.0], [0.01, 0.0]
    place = Placement(SIDE, *(torch.tensor(values) for values in numbers))
    rays = place.rays(64)
    for ends in ((2.1, 5.8, -6.1, 2.2), (-3.0, -2.2, 4.0, 4.8)):
        window, near = rays.within(edges_of(*(torch.full((2,), end) for end in ends)))
        left, right, top, bottom = ends
        inside = (rays.x >= left) & (rays.x <= right) & (rays.y >= top) & (rays.y <= bottom)
        kept = torch.zeros_like(inside)
        kept.view(-1)[window] = True
        assert inside.flatten(1).any(1).all()
        assert kept[inside].all()
        assert kept.sum() < 2 * inside.sum() + 20
        assert torch.equal(near.x, seen(rays.x, window))
        assert torch.equal(near.y.expand_as(near.x), seen(rays.y.expand_as(rays.x), window))


@pytest.mark.parametrize(("coarse", "fine"), [(8, 64), (64, 100), (64, 64), (16, 500)])
def test_a_field_is_enlarged_as_by_torch(coarse: int, fine: int) -> None:
    field = torch.randn(3, coarse, coarse, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(field[:, None], size=(fine, fine), mode="bilinear")[:, 0]
    torch.testing.assert_close(enlarged(field, fine), expected, atol=1e-5, rtol=0)


def test_solids_behind_each_other_add_and_solids_in_each_other_do_not() -> None:
    window = torch.tensor([[[0, 1], [4, 5]]])
    patches = [Patch(window, torch.full((1, 2, 2), v)) for v in (2.0, 3.0)]
    blank = torch.zeros(1, 4, 4)
    assert summed(blank, patches)[0, 0, 0] == 5
    assert joined(blank, patches)[0, 0, 0] == joined(blank, patches[::-1])[0, 0, 0] == 3
    assert blank.abs().max() == 0  # the canvas that is given stays
    assert torch.equal(covered(summed(blank, patches), 4)[0], summed(blank, patches)[0] > 0)
    assert covered(summed(blank, patches), 2)[0].tolist() == [[True, False], [False, False]]
