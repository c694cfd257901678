"""Solids, the rays that pass through them, and the box of the image that each solid fills.

The beam is parallel and runs from the front to the back of the body. A *path length* is the distance that a
ray travels inside a solid. A solid is written once: from its numbers follow its path lengths and the box
outside of which they are 0, so that only the box is computed.

Only arithmetic and functions whose result for a pixel does not depend on where the pixel lies in memory are
used (`exp`, `log`, `sqrt`; no matrix products), so that an image is the same to the byte in any batch and
with any number of threads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from genailab_helpers.radiographs import check_img_size

_TINY = 2.0**-40  # a square root of 0 has no slope, and takes ten times as long
_FINEST = 96  # rays a side at least
_RIM = 0.05  # cm around a box, so that rounding never cuts a pixel off

Number = Tensor | float  # of shape (N,), or one for all bodies
Box = tuple[slice, slice, slice]  # all images, some rows, some columns


class Patch(NamedTuple):
    """Path lengths (N, h, w) in cm inside a box of the images; they are 0 elsewhere."""

    box: Box
    length: Tensor


def summed(canvas: Tensor, patches: Sequence[Patch]) -> Tensor:
    """Return (N, H, W) with the patches added: solids one behind the other."""
    canvas = canvas.clone()
    for patch in patches:
        canvas[patch.box].add_(patch.length)
    return canvas


def joined(canvas: Tensor, patches: Sequence[Patch]) -> Tensor:
    """Return (N, H, W) raised to at least the patches: solids that overlap are not counted twice."""
    canvas = canvas.clone()
    for patch in patches:
        here = canvas[patch.box]
        here.add_(torch.relu(patch.length - here))  # the greater of both, in place and with a slope
    return canvas


def rays_a_side(img_size: int) -> int:
    """Return how many rays a side an image gets: a pixel of a small one several, so that thin things stay."""
    return check_img_size(img_size) * -(-_FINEST // img_size)


def covered(patches: Sequence[Patch], like: Tensor, n_pixels: int) -> Tensor:
    """Return where (N, n_pixels, n_pixels) bool at least half of a pixel's rays (N, H, W) meet a patch."""
    mask = torch.zeros_like(like, dtype=torch.bool)
    for patch in patches:
        mask[patch.box] |= patch.length > 0
    return averaged(mask.float(), n_pixels) >= 0.5


def averaged(values: Tensor, n_pixels: int) -> Tensor:
    """Average (N, kH, kH) over k x k rays, to (N, H, H)."""
    k = values.shape[-1] // n_pixels
    return values if k == 1 else functional.avg_pool2d(values[:, None], k)[:, 0]


def enlarged(field: Tensor, n_pixels: int) -> Tensor:
    """Enlarge a coarse field (N, h, w) smoothly to n_pixels a side."""
    return functional.interpolate(field[:, None], size=(n_pixels, n_pixels), mode="bilinear")[:, 0]


def each(value: Number) -> Tensor:
    """Give one number a body, (N,), the shape (N, 1, 1) that goes with an image."""
    return torch.as_tensor(value)[..., None, None]


@dataclass(frozen=True)
class Rays:
    """Where each ray meets the body, in cm; the body's centre is (0, 0).

    Parameters
    ----------
    x : Tensor
        (N, H, W), towards the viewer's right.
    y : Tensor
        (N, H, 1), towards the feet. A body leans and bends sideways by whole rows, so a row has one height.
    """

    x: Tensor
    y: Tensor

    def within(self, x: Sequence[Number], y: Sequence[Number] = (-math.inf, math.inf),
               margin: Number = 0.0) -> tuple[Box, "Rays"]:
        """Cut out the box, with a margin, of rows and columns that holds these places of all bodies."""
        (left, right), (top, bottom) = _ends(x, margin), _ends(y, margin)
        least, greatest, height = self._reach
        rows = _span(((height >= top) & (height <= bottom)).any(0))
        box = slice(None), rows, _span((greatest >= left) & (least <= right))
        return box, Rays(self.x[box], self.y[:, rows])

    @cached_property
    def _reach(self) -> tuple[Tensor, Tensor, Tensor]:
        """Least and greatest x of each column (W,), and the height of each row (N, H)."""
        x = self.x.detach()
        return x.amin((0, 1)), x.amax((0, 1)), self.y.detach()[..., 0]


@torch.no_grad()
def _ends(places: Sequence[Number], margin: Number) -> tuple[float, float]:
    low = min(float((torch.as_tensor(place) - margin).min()) for place in places)
    return low - _RIM, max(float((torch.as_tensor(place) + margin).max()) for place in places) + _RIM


def _span(chosen: Tensor) -> slice:
    places = torch.nonzero(chosen)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0)


class Placement(NamedTuple):
    """How N bodies stand before a square detector.

    Attributes
    ----------
    side : float
        Of the detector, in cm.
    shift_x, shift_y : Tensor
        (N,) where the body's centre falls, in cm from the detector's.
    magnification : Tensor
        (N,) size of the body on the detector; 1 is nominal.
    lean, bend : Tensor
        (N,) slope of the midline, and its curvature per cm.
    """

    side: float
    shift_x: Tensor
    shift_y: Tensor
    magnification: Tensor
    lean: Tensor
    bend: Tensor

    def midline(self, down: Tensor) -> Tensor:
        """Place (N, M) in cm of the midline on the detector, `down` (N, M) cm below the detector's centre."""
        return self.shift_x[:, None] + down * (self.lean[:, None] + down * self.bend[:, None])

    def rays(self, n_pixels: int) -> Rays:
        """Cast a ray to the centre of each pixel."""
        down = ((torch.arange(n_pixels) + 0.5) / n_pixels - 0.5).to(self.shift_x) * self.side
        down = down.expand(len(self.shift_x), -1)
        scale = 1 / self.magnification[:, None]
        x = (down * scale)[:, None, :] - (self.midline(down) * scale)[:, :, None]
        return Rays(x, ((down - self.shift_y[:, None]) * scale)[:, :, None])


def half_chord(squared: Tensor) -> Tensor:
    """Return sqrt(1 - squared), and exactly 0 where a ray misses the unit solid."""
    return _root(1 - squared)


def _root(value: Tensor) -> Tensor:
    return value.clamp(min=_TINY).sqrt() - math.sqrt(_TINY)


def bone(squared: Tensor) -> Tensor:
    """Half chord through cortical bone around spongy bone, which counts a fifth: brightest near the rim.

    A polynomial in the squared distance from the axis, in units of the radius, fitted to a tube whose cortex
    is 0.35 of its radius; square roots would take most of the time.
    """
    return torch.relu(1 - squared) * (0.41 + 1.78 * squared)


def ellipsoid(rays: Rays, x: Number, y: Number, width: Number, height: Number, depth: Number,
              angle: Number = 0.0) -> Patch:
    """Pass rays through an ellipsoid.

    The path length is 2 depth sqrt(1 - (x/width)^2 - (y/height)^2) along its own axes.

    Parameters
    ----------
    rays : Rays
        Through N bodies.
    x, y : Tensor or float
        Centre in cm; (N,) or one number for all, as all that follows.
    width, height, depth : Tensor or float
        Semi-axes along x, along y and along the beam in cm.
    angle : Tensor or float, default 0
        Turn in the image plane in radians, clockwise for the viewer.
    """
    turn = torch.as_tensor(angle)
    cos, sin = torch.cos(turn), torch.sin(turn)
    wide = ((width * cos) ** 2 + (height * sin) ** 2).sqrt()
    high = ((width * sin) ** 2 + (height * cos) ** 2).sqrt()
    box, near = rays.within((x - wide, x + wide), (y - high, y + high))
    u, v, a, b = near.x - each(x), near.y - each(y), 1 / width**2, 1 / height**2
    # 1 - squared distance = 1 + xx u^2 + xy u v - yy v^2
    xx, yy, xy = -a * cos**2 - b * sin**2, a * sin**2 + b * cos**2, 2 * sin * cos * (b - a)
    across = u * each(xx) + each(xy) * v
    return Patch(box, _root(across * u + (1 - each(yy) * v * v)) * each(2 * depth))


def tube(rays: Rays, points: Sequence[tuple[Number, Number]], radius: Number, is_bone: bool = False) -> Patch:
    """Pass rays through a round tube along a chain of points, with round ends.

    Parameters
    ----------
    rays : Rays
        Through N bodies.
    points : sequence of (x, y)
        In cm; (N,) or one number each.
    radius : Tensor or float
        In cm.
    is_bone : bool, default False
        Whether it is a bone around marrow, see `bone`.
    """
    box, near = rays.within([x for x, _ in points], [y for _, y in points], radius)
    squared = []
    for (x0, y0), (x1, y1) in pairwise(points):
        dx, dy = torch.as_tensor(x1 - x0), torch.as_tensor(y1 - y0)
        length = (dx * dx + dy * dy).clamp(min=_TINY).sqrt()
        dx, dy = dx / length, dy / length
        along = near.x * each(dx) - (near.y * each(-dy) + each(x0 * dx + y0 * dy))
        beyond = along - torch.relu(along).minimum(each(length))
        across = near.x * each(-dy) + (near.y * each(dx) - each(y0 * dx - x0 * dy))
        squared.append(across * across + beyond * beyond)
    nearest = reduce(torch.minimum, squared) * each(1 / radius**2)
    return Patch(box, (bone if is_bone else half_chord)(nearest) * each(2 * radius))


def with_segments(canvas: Tensor, place: Placement, radius: Tensor,
                  x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor) -> Tensor:
    """Add short round tubes (vessels), each drawn in a patch of its own, to path lengths in cm.

    Parameters
    ----------
    canvas : Tensor
        (N, H, H) path lengths so far; it stays as it is.
    place : Placement
        Of the N bodies.
    radius : Tensor
        (N, S), or (N, 1) for all tubes of a body, in cm. A tube thinner than a pixel is drawn a pixel wide
        and paler: what it attenuates in all stays right.
    x0, y0, x1, y1 : Tensor
        (N, S) ends in cm; tubes of like length, because all get a patch as large as the longest needs. The
        ends are cut straight, so that tubes that follow each other add up to one.
    """
    n_pixels, grow = canvas.shape[-1], place.magnification[:, None]
    scale = n_pixels / place.side

    def seen_at(x: Tensor, y: Tensor) -> Tensor:
        down = y * grow + place.shift_y[:, None]
        return torch.stack((x * grow + place.midline(down), down)) * scale + (n_pixels - 1) / 2

    start, end = seen_at(x0, y0), seen_at(x1, y1)  # (2, N, S) column and row in pixels, as what follows
    in_pixels = radius * grow * scale
    drawn, along = in_pixels.clamp(min=0.7), end - start
    length = (along * along).sum(0).clamp(min=_TINY).sqrt()
    side = int((along.abs().amax(0) + 2 * drawn).detach().max().ceil()) + 2
    corner = (torch.minimum(start, end) - drawn).detach().floor().clamp(-side, n_pixels)
    # pixels first, tubes last: the long axis is the one in memory
    local = torch.arange(side)[:, None, None]
    (u, v), (dx, dy), thinner = local + (corner - start)[:, None], along / length, 1 / drawn
    along = (v * dy + 0.5)[:, None] + u * dx
    across = u * (dy * thinner) - (v * (dx * thinner))[:, None]
    # a parabola with the area of the chord: at a few pixels' width nobody sees the difference
    chord = torch.relu(1 - across * across) * torch.minimum(along, length + 1 - along).clamp(0, 1)
    chord = chord * ((3 * math.pi / 4) * radius * in_pixels / drawn)
    canvas = functional.pad(canvas, [side] * 4)  # a patch may reach beyond the image
    wide, (left, top) = canvas.shape[-1], corner.long() + side
    index = (torch.arange(len(canvas))[:, None] * wide + top) * wide + left
    index = (index + local * wide)[:, None] + local
    canvas.view(-1).scatter_add_(0, index.view(-1), chord.view(-1))
    return canvas[:, side:-side, side:-side]
