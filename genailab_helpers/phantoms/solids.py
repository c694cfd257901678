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

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_TINY = 2.0**-40  # a square root of 0 has no slope, and takes ten times as long
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


def covered(patches: Sequence[Patch], like: Tensor, n_pixels: int) -> Tensor:
    """Return where (N, n_pixels, n_pixels) bool at least half of a pixel's rays (N, H, W) meet a patch."""
    mask = torch.zeros_like(like, dtype=torch.bool)
    for patch in patches:
        mask[patch.box] |= patch.length > 0
    rays_a_pixel = like.shape[-1] // n_pixels
    if rays_a_pixel == 1:
        return mask
    return functional.avg_pool2d(mask[:, None].float(), rays_a_pixel)[:, 0] >= 0.5


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

    def within(self, left: Number, right: Number, top: Number = -math.inf, bottom: Number = math.inf,
               sign: float = 1.0) -> tuple[Box, "Rays"]:
        """Cut out the box that holds left <= x <= right and top <= y <= bottom of all N bodies.

        With `sign` -1 the box is mirrored, and so is x: it grows towards the viewer's left.
        """
        ends = _least(left), -_least(-right), _least(top), -_least(-bottom)
        box = self.box(*((-ends[1], -ends[0], *ends[2:]) if sign < 0 else ends))
        x = self.x[box]
        return box, Rays(-x if sign < 0 else x.contiguous(), self.y[:, box[1]])

    def box(self, left: float, right: float, top: float, bottom: float) -> Box:
        """Find the rows and columns of which some ray passes between these ends."""
        low, high, y = self._reach
        columns = np.flatnonzero((high >= left - _RIM) & (low <= right + _RIM))
        rows = np.flatnonzero(((y >= top - _RIM) & (y <= bottom + _RIM)).any(0))
        return (slice(None), _span(rows), _span(columns))

    @cached_property
    def _reach(self) -> tuple[np.ndarray, ...]:
        """Least and greatest x of each column (W,), and the height of each row (N, H)."""
        x = self.x.detach()
        return tuple(v.cpu().numpy() for v in (x.amin((0, 1)), x.amax((0, 1)), self.y.detach()[..., 0]))


def _least(value: Number) -> float:
    return float(value.detach().min()) if isinstance(value, Tensor) else value


def _span(indices: np.ndarray) -> slice:
    return slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) else slice(0, 0)


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


def each(value: Tensor) -> Tensor:
    """Give one number a body, (N,), the shape (N, 1, 1) that goes with an image."""
    return value[:, None, None]


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


class Solid:
    """A solid of N bodies: numbers that follow from its shape and the ends of its box, for all at once."""

    def __init__(self, numbers: Sequence[Number], ends: Sequence[Number]) -> None:
        every = [*numbers, *ends]
        like = next(v for v in every if isinstance(v, Tensor))
        rows = torch.broadcast_tensors(*(torch.as_tensor(v).to(like) for v in every))
        self._numbers = torch.stack(rows[:len(numbers)])[..., None, None]
        self._ends = torch.stack(rows[len(numbers):]).detach().cpu().numpy()

    def seen(self, rays: Rays, bodies: slice) -> Patch:
        """Return the path lengths of rays through some of the bodies."""
        left, right, top, bottom = self._ends[:, bodies]
        box = rays.box(left.min(), right.max(), top.min(), bottom.max())
        return Patch(box, self._length(rays.x[box], rays.y[:, box[1]], self._numbers[:, bodies].unbind(0)))

    def _length(self, x: Tensor, y: Tensor, numbers: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError


class Ellipsoid(Solid):
    """An ellipsoid, path length 2 depth sqrt(1 - (x/width)^2 - (y/height)^2) along its own axes.

    Parameters
    ----------
    x, y : Tensor or float
        Centre in cm; (N,) or one number for all, as all that follows.
    width, height, depth : Tensor or float
        Semi-axes along x, along y and along the beam in cm.
    angle : Tensor or float, default 0
        Turn in the image plane in radians, clockwise for the viewer.
    """

    def __init__(self, x: Number, y: Number, width: Number, height: Number, depth: Number,
                 angle: Number = 0.0) -> None:
        turn = torch.as_tensor(angle)
        cos, sin = torch.cos(turn), torch.sin(turn)
        wide = torch.as_tensor((width * cos) ** 2 + (height * sin) ** 2).sqrt()
        high = torch.as_tensor((width * sin) ** 2 + (height * cos) ** 2).sqrt()
        a, b = 1 / width**2, 1 / height**2
        numbers: list[Number] = [x, y, 2 * depth, -a * cos**2 - b * sin**2, a * sin**2 + b * cos**2]
        if isinstance(angle, Tensor) or angle != 0:
            numbers.append(2 * sin * cos * (b - a))
        super().__init__(numbers, (x - wide, x + wide, y - high, y + high))

    def _length(self, x: Tensor, y: Tensor, numbers: Sequence[Tensor]) -> Tensor:
        centre_x, centre_y, depth, xx, yy, *xy = numbers
        u, v = x - centre_x, y - centre_y
        across = u * xx + xy[0] * v if xy else u * xx
        return _root(across * u + (1 - yy * v * v)) * depth  # under the root, 1 - squared distance


class Tube(Solid):
    """A round tube along a chain of points, with round ends.

    Parameters
    ----------
    points : sequence of (x, y)
        In cm; (N,) or one number each.
    radius : Tensor or float
        In cm.
    is_bone : bool, default False
        Whether it is a bone around marrow, see `bone`.
    """

    def __init__(self, points: Sequence[tuple[Number, Number]], radius: Number,
                 is_bone: bool = False) -> None:
        self._is_bone = is_bone
        numbers: list[Number] = [2 * radius, 1 / radius**2]
        for (x0, y0), (x1, y1) in pairwise(points):
            dx, dy = torch.as_tensor(x1 - x0), torch.as_tensor(y1 - y0)
            length = (dx * dx + dy * dy).clamp(min=_TINY).sqrt()
            dx, dy = dx / length, dy / length
            numbers += [dx, -dy, x0 * dx + y0 * dy, y0 * dx - x0 * dy, length]
        ends: list[Number] = []
        for column in zip(*points, strict=True):
            values = torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, column)))
            ends += [values.amin(0) - radius, values.amax(0) + radius]
        super().__init__(numbers, ends)

    def _length(self, x: Tensor, y: Tensor, numbers: Sequence[Tensor]) -> Tensor:
        thickness, scale = numbers[:2]
        distances = []
        for k in range(2, len(numbers), 5):
            dx, up, start, level, length = numbers[k:k + 5]
            along = x * dx - (y * up + start)
            beyond = along - torch.relu(along).minimum(length)
            across = x * up + (y * dx - level)
            distances.append(across * across + beyond * beyond)
        squared = reduce(torch.minimum, distances) * scale
        return (bone if self._is_bone else half_chord)(squared) * thickness


class Segments:
    """Short round tubes (vessels) of N bodies, each drawn in a patch of its own.

    Parameters
    ----------
    place : Placement
        Of the N bodies.
    n_pixels : int
        Side of the image.
    x0, y0, x1, y1 : Tensor
        (N, S) ends in cm; tubes of like length, because all get a patch as large as the longest needs. The
        ends are cut straight, so that tubes that follow each other add up to one.
    radius : Tensor
        (N, S) in cm. A tube thinner than a pixel is drawn a pixel wide and paler: what it attenuates in all
        stays right.
    """

    def __init__(self, place: Placement, n_pixels: int, x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor,
                 radius: Tensor) -> None:
        scale, grow = n_pixels / place.side, place.magnification[:, None]
        rows = [y * grow + place.shift_y[:, None] for y in (y0, y1)]
        columns = [x * grow + place.midline(row) for x, row in zip((x0, x1), rows, strict=True)]
        (py0, py1), (px0, px1) = ([v * scale + (n_pixels - 1) / 2 for v in pair] for pair in (rows, columns))
        in_pixels = radius * grow * scale
        drawn = in_pixels.clamp(min=0.7)
        dx, dy = px1 - px0, py1 - py0
        length = (dx * dx + dy * dy).clamp(min=_TINY).sqrt()
        self.side = int((torch.maximum(dx.abs(), dy.abs()) + 2 * drawn).detach().max().ceil()) + 2
        corner = [(torch.minimum(*ends) - drawn).detach().floor().clamp(-self.side, n_pixels)
                  for ends in ((px0, px1), (py0, py1))]
        # pixels first, tubes last: the long axis is the one in memory
        local = torch.arange(self.side)[:, None, None].to(px0)
        u, v = (local + (c - p) for c, p in zip(corner, (px0, py0), strict=True))
        dx, dy, wide = dx / length, dy / length, 1 / drawn
        self._along = v * dy + 0.5, u * dx  # sums of a row's part and a column's part, (side, N, S) each
        self._across = u * (dy * wide), v * (dx * wide)
        self._length = length + 1, (3 * math.pi / 4) * radius * in_pixels / drawn
        self._corner = [c.long() for c in corner]

    def add_to(self, canvas: Tensor, margin: int, bodies: slice) -> None:
        """Add path lengths in cm to (N, H, W), which has `margin` (at least `side`) more pixels around."""
        length, thickness = (v[bodies] for v in self._length)
        (row, column), (right, down) = ([v[:, bodies] for v in pair] for pair in (self._along, self._across))
        along, across = row[:, None] + column, right - down[:, None]
        # a parabola with the area of the chord: at a few pixels' width nobody sees the difference
        ends = torch.minimum(along, length - along).clamp(0, 1)
        chord = torch.relu(1 - across * across) * ends * thickness
        left, top = (c[bodies] + margin for c in self._corner)
        n, high, wide = canvas.shape
        first = torch.arange(n, device=left.device)[:, None] * (high * wide) + top * wide + left
        local = torch.arange(self.side, device=left.device)[:, None, None]
        index = (first + local * wide)[:, None] + local
        canvas.view(-1).scatter_add_(0, index.view(-1), chord.view(-1))
