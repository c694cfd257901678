"""From solids to a film: path lengths, attenuation, scatter, blur, quantum noise, detector and display.

The beam is parallel and runs along the third axis. What a ray meets is described by *path lengths*, the
distance it travels inside a solid; the sum of path length times attenuation coefficient is the *line
integral*, and the share of photons that gets through is its negative exponential (Beer-Lambert law).

Only operations whose result for a pixel does not depend on where the pixel lies in memory are used here
(`exp`, `log`, `sqrt`, `tanh` and arithmetic; not `sigmoid`, `pow` or matrix products), so that an image comes
out the same to the byte in any batch and with any number of threads.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_TINY = 2.0**-40  # keeps the slope of a square root finite where a ray just touches a solid
_RIM = 1e-3  # added around a window, so that rounding never cuts a pixel off a solid

Window = tuple[slice, slice, slice]  # all films, some rows, some columns


@dataclass(frozen=True)
class Rays:
    """Where each ray meets the plane of the body.

    Parameters
    ----------
    x, y : Tensor
        (N, H, W): to the viewer's right of the midline, and downwards from the top, in image sides of a body
        at its nominal size.
    """

    x: Tensor
    y: Tensor

    @cached_property
    def _reach(self) -> tuple[np.ndarray, ...]:
        """Least and greatest x of every column, and least and greatest y of every row, over all films."""
        x, y = self.x.detach(), self.y.detach()
        ends = x.amin((0, 1)), x.amax((0, 1)), y.amin((0, 2)), y.amax((0, 2))
        return tuple(end.cpu().numpy() for end in ends)

    def zone(self, left: Tensor | float, right: Tensor | float, top: Tensor | float = -math.inf,
             bottom: Tensor | float = math.inf, sign: float = 1.0) -> tuple[Window, "Rays"]:
        """Cut out the part of the films where a solid lies: drawing it elsewhere would only add zeros.

        Parameters
        ----------
        left, right, top, bottom : Tensor or float
            A box around the solid, (N,) or one number; the cut holds the boxes of all N.
        sign : float, default 1.0
            -1 for the patient's right side, seen in a mirror: the box is mirrored, and so is the returned
            `x`, so that x grows outwards on both sides.

        Returns
        -------
        Window, Rays
            Where to put what is drawn, and the rays there.
        """
        if sign < 0:
            left, right = -right, -left
        x_low, x_high, y_low, y_high = self._reach
        columns = np.flatnonzero((x_high >= _least(left) - _RIM) & (x_low <= -_least(-right) + _RIM))
        rows = np.flatnonzero((y_high >= _least(top) - _RIM) & (y_low <= -_least(-bottom) + _RIM))
        window = (slice(None), _span(rows), _span(columns))
        x = self.x[window]
        return window, Rays(-x if sign < 0 else x.contiguous(), self.y[window].contiguous())


def _least(value: Tensor | float) -> float:
    return float(value.detach().min()) if isinstance(value, Tensor) else value


def _span(indices: np.ndarray) -> slice:
    return slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) else slice(0, 0)


def raise_to(canvas: Tensor, window: Window, solid: Tensor) -> None:
    """Let `canvas` be at least `solid` in the window: solids that overlap are not counted twice."""
    canvas[window] = torch.maximum(canvas[window].clone(), solid)


def cast_rays(shift_x: Tensor, shift_y: Tensor, magnification: Tensor, rotation: Tensor,
              img_size: int) -> Rays:
    """Place N bodies before an `img_size` x `img_size` detector.

    Parameters
    ----------
    shift_x, shift_y : Tensor
        (N,) where the body's centre (x = 0, y = 0.5) falls, in image sides from the middle of the film.
    magnification : Tensor
        (N,) size of the body on the film; 1 is nominal.
    rotation : Tensor
        (N,) turn in the plane of the film in radians, clockwise for the viewer.
    img_size : int
        Side of the film in pixels.

    Returns
    -------
    Rays
        (N, H, W) coordinates, at pixel centres.
    """
    across = (torch.arange(img_size, device=shift_x.device, dtype=shift_x.dtype) + 0.5) / img_size - 0.5
    dx = (across[None, :] - shift_x[:, None]) / magnification[:, None]
    dy = (across[None, :] - shift_y[:, None]) / magnification[:, None]
    cos, sin = torch.cos(rotation)[:, None], torch.sin(rotation)[:, None]
    x = (dx * cos)[:, None, :] + (dy * sin)[:, :, None]
    y = (dy * cos + 0.5)[:, :, None] - (dx * sin)[:, None, :]
    return Rays(x.contiguous(), y.contiguous())  # unlike strides would slow all that follows


def each(value: Tensor | float) -> Tensor | float:
    """Give one number a body, (N,), the shape (N, 1, 1) that goes with an image."""
    return value[:, None, None] if isinstance(value, Tensor) and value.ndim == 1 else value


def half_chord(squared: Tensor) -> Tensor:
    """Return sqrt(1 - squared), and exactly 0 where a ray misses the unit solid; the slope stays finite."""
    return (1 - squared).clamp(min=_TINY).sqrt() - math.sqrt(_TINY)


def ellipsoid(rays: Rays, x: Tensor | float, y: Tensor | float, width: Tensor | float, height: Tensor | float,
              depth: Tensor | float, angle: Tensor | float = 0.0) -> Tensor:
    """Path length through an ellipsoid.

    Parameters
    ----------
    rays : Rays
        N x H x W rays.
    x, y : Tensor or float
        Centre, (N,) or one number for all.
    width, height, depth : Tensor or float
        Semi-axes along x, along y and along the beam.
    angle : Tensor or float, default 0
        Turn in the plane of the film in radians, clockwise for the viewer.

    Returns
    -------
    Tensor
        (N, H, W) path lengths, 2 depth sqrt(1 - (x/width)^2 - (y/height)^2).
    """
    dx, dy = rays.x - each(x), rays.y - each(y)
    if isinstance(angle, Tensor) or angle != 0:
        turn = angle if isinstance(angle, Tensor) else torch.tensor(angle, device=dx.device, dtype=dx.dtype)
        cos, sin = each(torch.cos(turn)), each(torch.sin(turn))
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    dx, dy = dx * each(1 / width), dy * each(1 / height)
    return half_chord(dx * dx + dy * dy) * (2 * each(depth))




def blur(images: Tensor, weight: Tensor | float) -> Tensor:
    """Blur (N, H, W) with (w, 1 - 2 w, w) along both axes; w = 0.25 is nearly a Gaussian of 0.7 pixels."""
    weight = each(weight)
    padded = functional.pad(images[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    rows = padded[:, 1:-1] + weight * (padded[:, :-2] + padded[:, 2:] - 2 * padded[:, 1:-1])
    return rows[..., 1:-1] + weight * (rows[..., :-2] + rows[..., 2:] - 2 * rows[..., 1:-1])


def coarse(images: Tensor, n_cells: int = 16) -> Tensor:
    """Average (N, H, W) over a grid of `n_cells` x `n_cells`."""
    return functional.adaptive_avg_pool2d(images[:, None], n_cells)[:, 0]


def scattered(primary: Tensor, n_rounds: int = 6) -> Tensor:
    """Spread the primary beam (N, H, W) widely, as photons that were deflected in the body arrive."""
    spread = coarse(primary)
    for _ in range(n_rounds):
        spread = blur(spread, 0.25)
    return functional.interpolate(spread[:, None], size=primary.shape[-2:], mode="bilinear",
                                  align_corners=False)[:, 0]


def quantum_noise(keys: Tensor, img_size: int) -> Tensor:
    """Draw standard normal noise (N, H, W) that depends on each film's own key alone.

    Parameters
    ----------
    keys : Tensor
        (N, 2) int64, seed and number of the film: the key of a counter-based generator (Salmon et al. 2011).
    img_size : int
        Side in pixels. Films of another size get another noise.
    """
    noise = np.empty((len(keys), img_size, img_size), dtype=np.float32)
    for film, (seed, number) in zip(noise, keys.tolist(), strict=True):
        generator = np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, 1]))
        generator.standard_normal(out=film, dtype=np.float32)
    return torch.from_numpy(noise)


def expose(line_integral: Tensor, noise: Tensor, quanta: Tensor, scatter: Tensor,
           focal_blur: Tensor) -> Tensor:
    """Turn line integrals into the detector's logarithmic signal.

    Parameters
    ----------
    line_integral : Tensor
        (N, H, W) sums of path length times attenuation coefficient.
    noise : Tensor
        (N, H, W) standard normal numbers.
    quanta : Tensor
        (N,) photons a pixel that reach the detector where nothing stands in the way; at least 1.
    scatter : Tensor
        (N,) scattered photons as a share of the primary ones, averaged over the film.
    focal_blur : Tensor
        (N,) weight of the neighbouring pixels, 0 (sharp) to 0.25; the focal spot and the detector blur alike.

    Returns
    -------
    Tensor
        (N, H, W) -log(detected / open field), so that dense is high.

    Notes
    -----
    I = I0 exp(-sum mu_i t_i) (Beer-Lambert law; Bushberg et al., The Essential Physics of Medical Imaging,
    ch. 3). Photon counts are Poisson; a Gaussian of equal variance stands in for it.
    """
    quanta = quanta.clamp(min=1)
    primary = torch.exp(-line_integral)
    detected = blur(primary, focal_blur) + each(scatter) * scattered(primary)
    spread = (detected / each(quanta)).clamp(min=_TINY).sqrt()
    # a quarter of an open-field photon is the electronic floor: the logarithm must not see zero
    counted = torch.maximum(detected + noise * spread, (0.25 / quanta)[:, None, None])
    return -torch.log(counted)


def display(signal: Tensor, black: Tensor, white: Tensor, contrast: Tensor) -> Tensor:
    """Window the logarithmic signal for a viewer.

    Parameters
    ----------
    signal : Tensor
        (N, H, W) from `expose`.
    black, white : Tensor
        (N,) the signals shown at -0.76 and +0.76 when `contrast` is 1, where the curve begins to flatten.
    contrast : Tensor
        (N,) steepness; 1 is nominal.

    Returns
    -------
    Tensor
        (N, H, W) in [-1, 1]: an S-shaped curve, as film and display tables have (Hurter and Driffield 1890).
    """
    middle, half = (black + white) / 2, (white - black).clamp(min=1e-3) / 2
    return torch.tanh((signal - each(middle)) * each(contrast / half))


def quantile(signal: Tensor, share: float) -> Tensor:
    """Return a quantile (N,) of each coarse film; a 16 x 16 grid is sorted, not every pixel."""
    cells = coarse(signal).flatten(1).sort(dim=1).values
    return cells[:, math.ceil(share * (cells.shape[1] - 1))]
