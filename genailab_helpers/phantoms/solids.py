"""Solids, the rays that pass through them, and the window of the image that each solid fills.

The beam is parallel and runs from the front to the back of the body. A *path length* is the distance that a
ray travels inside a solid. A solid is written once: from its numbers follow its path lengths and the window
outside of which they are 0, so that only the window is computed. What follows from the numbers is worked out
for all bodies at once, and the images are drawn some at a time.

Only arithmetic and functions whose result for a pixel does not depend on where the pixel lies in memory are
used (`log`, `sqrt`, with care `exp2` and `sigmoid`; no matrix products), so that an image is the same to the
byte in any batch and with any number of threads. Fields are changed in place where their slopes allow it: new
memory takes most of the time.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from genailab_helpers.radiographs import check_img_size

_TINY = 2.0**-40  # a square root of 0 has no slope, and takes ten times as long
_FINEST = 96  # rays a side at least
_RIMS = torch.tensor([-0.05, 0.05, -0.05, 0.05])  # cm around a window

Number = Tensor | float  # of shape (N,), or one for all bodies


class Patch(NamedTuple):
    """Path lengths in cm inside a window of each image; they are 0 elsewhere."""

    window: Tensor  # (N, h, w), or (S, N, h, w) for S windows, int64: where its pixels lie in the flat images
    length: Tensor  # of the same shape


Solid = Callable[["Rays", slice], Patch]  # given the rays of some of the bodies, passes them through it


def summed(canvas: Tensor, patches: Sequence[Patch]) -> Tensor:
    """Return (N, H, W) with the patches added: solids one behind the other."""
    flat = canvas.clone(memory_format=torch.contiguous_format).view(-1)
    for window, length in patches:
        flat.scatter_add_(0, window.view(-1), length.reshape(-1).to(flat))
    return flat.view(canvas.shape)


def joined(canvas: Tensor, patches: Sequence[Patch]) -> Tensor:
    """Return (N, H, W) raised to at least the patches: solids that overlap are not counted twice."""
    flat = canvas.reshape(-1)
    for window, length in patches:
        flat = flat.scatter_reduce(0, window.view(-1), length.reshape(-1).to(flat), "amax")
    return flat.view(canvas.shape)


def seen(canvas: Tensor, window: Tensor) -> Tensor:
    """Return what the images (N, H, W) show in a window (N, h, w)."""
    return canvas.reshape(-1).index_select(0, window.view(-1)).view(window.shape)


def rays_a_side(img_size: int) -> int:
    """Return how many rays a side an image gets: a pixel of a small one several, so that thin things stay."""
    return check_img_size(img_size) * -(-_FINEST // img_size)


def covered(length: Tensor, n_pixels: int) -> Tensor:
    """Return where (N, n_pixels, n_pixels) bool at least half of a pixel's rays (N, H, W) meet a solid."""
    mask = length.bool()  # comparing would be slower
    return mask if mask.shape[1] == n_pixels else averaged(mask.float(), n_pixels) >= 0.5


def averaged(values: Tensor, n_pixels: int) -> Tensor:
    """Average (N, kH, kH) over k x k rays, to (N, H, H)."""
    k = values.shape[-1] // n_pixels
    return values if k == 1 else functional.avg_pool2d(values[:, None], k)[:, 0]


def enlarged(field: Tensor, n_pixels: int) -> Tensor:
    """Enlarge a coarse field (N, h, h) bilinearly to n_pixels a side, in half the time torch would take."""
    size = field.shape[1]
    place = ((torch.arange(n_pixels) + 0.5) * (size / n_pixels) - 0.5).clamp(0, size - 1)
    above = place.long()
    below, part = (above + 1).clamp(max=size - 1), (place - above)[:, None].to(field)
    for _ in range(2):  # along columns, which lie as rows for the while; then along rows
        field = field.transpose(1, 2).contiguous()
        field = torch.lerp(field.index_select(1, above), field.index_select(1, below), part)
    return field


def each(value: Tensor) -> Tensor:
    """Give one number a body, (N,), the shape (N, 1, 1) that goes with an image."""
    return value[..., None, None]


class Rays(NamedTuple):
    """Where the rays of N images meet the body, in cm; the body's centre is (0, 0).

    Attributes
    ----------
    columns : Tensor
        (N, W) of each column from the detector's middle, towards the viewer's right. Those of a window, and
        all that follows, may be (S, N, W), for S windows of each image.
    midline : Tensor
        (N, H) of the body's middle in each row: it leans and bends sideways by whole rows.
    heights : Tensor
        (N, H) of each row, towards the feet.
    """

    columns: Tensor
    midline: Tensor
    heights: Tensor

    @property
    def x(self) -> Tensor:
        """Place (N, H, W) to the right of the body's middle."""
        return self.columns[..., None, :] - self.midline[..., None]

    @property
    def y(self) -> Tensor:
        """Place (N, H, 1) below the body's middle."""
        return self.heights[..., None]

    def plane(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Return a x + b y + c (..., N, H, W) in one pass over the field, for numbers (..., N, 1)."""
        return (self.columns * a)[..., None, :] + (self.heights * b - self.midline * a + c)[..., None]

    def within(self, edges: Tensor) -> tuple[Tensor, "Rays"]:
        """Cut out of each image a window, all of one size, that holds some places of its body.

        Parameters
        ----------
        edges : Tensor
            (N, 4), or (S, N, 4) for S windows of each image: left, right, top and bottom in cm, as `edges_of`
            puts them together.

        Returns
        -------
        window : Tensor
            (N, h, w) or (S, N, h, w) int64, where its pixels lie in the flattened images.
        rays : Rays
            Those of the windows.
        """
        columns, midline, heights = (values.expand(*edges.shape[:-1], -1) for values in self)
        rows = _span(heights, edges[..., 2:])
        midline = midline.gather(-1, rows)
        across = _span(columns, edges[..., :2] + torch.stack(midline.aminmax(dim=-1), -1))
        first_row = torch.arange(len(self.heights))[:, None] * self.heights.shape[1]
        window = ((first_row + rows) * self.columns.shape[1])[..., None] + across[..., None, :]
        return window, Rays(columns.gather(-1, across), midline, heights.gather(-1, rows))


def edges_of(left: Number, right: Number, top: Number, bottom: Number) -> Tensor:
    """Put together the edges of windows (..., 4), a little wider, so that rounding cuts no pixel off."""
    return _stacked(left, right, top, bottom, dim=-1) + _RIMS


def _span(places: Tensor, edges: Tensor) -> Tensor:
    """Find in each row of `places`, which rise, the neighbours between its edges: in all rows as many."""
    first, last = torch.searchsorted(places.contiguous(), edges.contiguous()).unbind(-1)
    size = max(1, int((last - first).max()))
    return first[..., None].clamp(max=places.shape[-1] - size) + torch.arange(size)


def positive(value: Tensor) -> Tensor:
    """Return 1 above zero and 0 below; comparing would be slower."""
    return (value.detach() * 1e6).clamp_(0, 1)


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
        return Rays(down * scale, self.midline(down) * scale, (down - self.shift_y[:, None]) * scale)


def half_chord(squared: Tensor) -> Tensor:
    """Return sqrt(1 - squared), and exactly 0 where a ray misses the unit solid."""
    return _root(1 - squared)


def _root(value: Tensor) -> Tensor:
    return value.clamp_(min=_TINY).sqrt_() - math.sqrt(_TINY)


def bone(squared: Tensor) -> Tensor:
    """Half chord through cortical bone around spongy bone, which counts a fifth: brightest near the rim.

    A polynomial in the squared distance from the axis, in units of the radius, fitted to a tube whose cortex
    is 0.35 of its radius; square roots would take most of the time.
    """
    inside = (1 - squared).relu_()
    return (2.19 * inside).addcmul_(inside, inside, value=-1.78)


def _stacked(*numbers: Number, dim: int = 0) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, numbers)), dim)


def ellipsoid(x: Number, y: Number, width: Number, height: Number, depth: Number,
              angle: Number = 0.0) -> Solid:
    """Make ellipsoids, one in each of N bodies.

    The path length is 2 depth sqrt(1 - (x/width)^2 - (y/height)^2) along its own axes.

    Parameters
    ----------
    x, y : Tensor or float
        Centre in cm; (N,), or (S, N) for S in each body, or one number for all, as all that follows.
    width, height, depth : Tensor or float
        Semi-axes along x, along y and along the beam in cm.
    angle : Tensor or float, default 0
        Turn in the image plane in radians, clockwise for the viewer.
    """
    turn = torch.as_tensor(angle)
    cos, sin = turn.cos(), turn.sin()
    wide = ((width * cos) ** 2 + (height * sin) ** 2).sqrt()
    high = ((width * sin) ** 2 + (height * cos) ** 2).sqrt()
    edges = edges_of(x - wide, x + wide, y - high, y + high)
    # 1 - squared distance = 1 + xx u^2 + xy u v - yy v^2
    a, b = 1 / width**2, 1 / height**2
    xx, yy, xy = -a * cos**2 - b * sin**2, a * sin**2 + b * cos**2, 2 * sin * cos * (b - a)
    numbers = _stacked(x, y, xx, xy, yy, 2 * depth)[..., None]

    def draw(rays: Rays, rows: slice) -> Patch:
        window, near = rays.within(edges[..., rows, :])
        x, y, xx, xy, yy, thick = numbers[..., rows, :]
        v = near.heights - y
        u = near.columns[..., None, :] - (near.midline + x)[..., None]
        across = near.plane(xx, xy, -x * xx - y * xy)
        return Patch(window, _root((across * u).add_((1 - yy * v * v)[..., None])).mul_(thick[..., None]))

    return draw


def tube(points: Sequence[tuple[Number, Number]], radius: Number, is_bone: bool = False) -> Solid:
    """Make round tubes along a chain of points, with round ends, one in each of N bodies.

    Parameters
    ----------
    points : sequence of (x, y)
        In cm; (N,), or (S, N) for S tubes in each body, or one number for all.
    radius : Tensor or float
        In cm.
    is_bone : bool, default False
        Whether it is a bone around marrow, see `bone`.
    """
    radius = torch.as_tensor(radius).clamp(min=1e-6)
    xs, ys = (_stacked(*places) for places in zip(*points, strict=True))
    edges = edges_of(xs.amin(0) - radius, xs.amax(0) + radius, ys.amin(0) - radius, ys.amax(0) + radius)
    numbers = []
    for (x0, y0), (x1, y1) in pairwise(points):
        dx, dy = x1 - x0, y1 - y0
        length = torch.as_tensor(dx * dx + dy * dy).clamp(min=_TINY).sqrt()
        dx, dy, x, y = dx / (length * radius), dy / (length * radius), (x0 + x1) / 2, (y0 + y1) / 2
        number = dx, dy, x * dx + y * dy, y * dx - x * dy, length / (2 * radius), 2 * radius
        numbers.append(_stacked(*number)[..., None])

    def draw(rays: Rays, rows: slice) -> Patch:
        window, near = rays.within(edges[..., rows, :])
        squared = []
        for table in numbers:
            dx, dy, along, aside, half, thick = table[..., rows, :]
            # how far beyond an end and how far aside, in radii
            beyond = near.plane(dx, dy, -along).abs_().sub_(half[..., None]).relu_()
            across = near.plane(-dy, dx, -aside)
            squared.append(across.square_().addcmul_(beyond, beyond))
        nearest = reduce(torch.minimum, squared)
        return Patch(window, (bone if is_bone else half_chord)(nearest).mul_(thick[..., None]))

    return draw


def segments(n_pixels: int, place: Placement, radius: Tensor,
             x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor) -> Tensor:
    """Return path lengths (N, n_pixels, n_pixels) in short round tubes, each drawn in a patch of its own.

    Parameters
    ----------
    n_pixels : int
        A side of the images.
    place : Placement
        Of the N bodies.
    radius : Tensor
        (N, S) of S tubes a body, in cm. A tube thinner than a pixel is drawn a pixel wide and paler: what it
        attenuates in all stays right.
    x0, y0, x1, y1 : Tensor
        (N, S) ends in cm. They are cut straight, so that tubes that follow each other add up to one.
    """
    grow, scale = place.magnification[:, None], n_pixels / place.side

    def seen_at(x: Tensor, y: Tensor) -> Tensor:
        down = y * grow + place.shift_y[:, None]
        return torch.stack((x * grow + place.midline(down), down)) * scale + (n_pixels - 1) / 2

    start, end = seen_at(x0, y0), seen_at(x1, y1)  # (2, N, S) column and row in pixels, as what follows
    in_pixels = radius * grow * scale
    drawn, along = in_pixels.clamp(min=0.7), end - start
    length = (along * along).sum(0).clamp(min=_TINY).sqrt()
    ahead, middle = along / length, (start + end) / 2
    reach = (along.abs() / 2 + ahead.abs() / 2 + ahead.flip(0).abs() * drawn).detach()  # half a patch
    corner, sides = (middle - reach).ceil().detach(), (2 * reach).amax(0).floor() + 1
    thick = (3 * math.pi / 4) * radius * in_pixels / drawn
    thin = ahead * (thick.clamp(min=_TINY).sqrt() / drawn)
    numbers = torch.stack((*(corner - middle), *ahead, *thin, (length + 1) / 2, thick))
    margin = int(sides.max())  # a patch may reach beyond the image
    wide = n_pixels + 2 * margin
    left, top = torch.maximum(corner, -sides).clamp(max=n_pixels).long() + margin
    canvas = radius.new_zeros(len(radius), wide, wide)
    first = (torch.arange(len(canvas))[:, None] * wide + top) * wide + left
    # patches of like size are drawn together; as sizes have fixed steps, a body's tubes add up in one order
    steps = torch.bucketize(sides, sides.new_tensor([4 * 1.2**k for k in range(40)]))
    for step in steps.unique():
        here = steps == step
        local = torch.arange(int(sides[here].max()))[:, None]
        u, v, dx, dy, dx_thin, dy_thin, half, thick = numbers[:, here]
        # pixels first, tubes last: the long axis is the one in memory
        u, v = local + u, (local + v)[:, None]
        along, across = v * dy + u * dx, u * dy_thin - v * dx_thin
        # a parabola with the area of the chord: at a few pixels' width nobody sees the difference
        chord = (thick - across * across).relu_() * (half - along.abs_()).clamp_(0, 1)
        index = (first[here] + local * wide)[:, None] + local
        canvas.view(-1).scatter_add_(0, index.view(-1), chord.view(-1).to(canvas))
    return canvas[:, margin:-margin, margin:-margin]
