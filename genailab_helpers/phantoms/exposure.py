"""From line integrals to an image: photons, scatter, blur, noise, detector and display.

A *line integral* is the sum of path length times attenuation coefficient along a ray. One energy stands for
the spectrum: 70 keV, near the mean of a chest radiograph's beam. Attenuation per cm (NIST XCOM, compositions
of ICRU-44): soft tissue .205, cortical bone .50, spongy bone .26, inflated lung .05, air 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from genailab_helpers.phantoms.solids import averaged, each, enlarged

SOFT = 0.205  # attenuation of soft tissue per cm
BONE_EXCESS = 0.30  # cortical bone above soft tissue, per cm
MOST_BLUR = 2.0  # mm, the standard deviation of the widest blur that `expose` takes
_FLOOR = 1e-4  # electronic noise, as a fraction of the open beam: the logarithm must not see zero


def expose(line_integral: Tensor, noise: Tensor, photons: Tensor, scatter: Tensor, blur_mm: Tensor,
           side_cm: float) -> Tensor:
    """Turn line integrals into the detector's logarithmic signal.

    Parameters
    ----------
    line_integral : Tensor
        (N, kH, kH), k rays a side of each detector point.
    noise : Tensor
        (N, H, H) standard normal numbers.
    photons : Tensor
        (N,) photons per mm2 of the open beam; more make less noise.
    scatter : Tensor
        (N,) scattered photons behind the grid, as a fraction of the primary ones, averaged over the image.
    blur_mm : Tensor
        (N,) standard deviation of the blur of focal spot and detector, at most MOST_BLUR.
    side_cm : float
        Side of the detector.

    Returns
    -------
    Tensor
        (N, H, H) -log(detected / open beam), so that dense is high.

    Notes
    -----
    I = I0 exp(-sum mu_i t_i) (Beer-Lambert law; Bushberg et al., The Essential Physics of Medical Imaging,
    ch. 3). Photon counts are Poisson; a Gaussian of equal variance stands in for it.
    """
    pixel_mm = 10 * side_cm / noise.shape[-1]
    beam = _alike(torch.exp2_, line_integral * (-1 / math.log(2)))  # Beer-Lambert, for each ray
    beam = averaged(beam, noise.shape[-1])  # a detector point adds photons up
    beam = blurred(beam, blur_mm / pixel_mm, MOST_BLUR / pixel_mm)
    beam = scattered(beam).mul_(each(scatter)).add_(beam).clamp_(min=_FLOOR)
    counted = photons.clamp(min=1) * pixel_mm**2
    beam = (noise * (beam / each(counted)).sqrt_()).add_(beam)  # quantum noise
    return beam.clamp_(min=_FLOOR).log().neg_()


def _alike(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Apply exp2 or sigmoid, which are faster than exp, with the same last digits wherever a value lies.

    They take 32 numbers at a time, and those that are left over in another way; so none are left over.
    """
    flat = values.reshape(-1)
    if len(flat) % 32:
        flat = functional.pad(flat, (0, -len(flat) % 32))
    return function(flat)[:values.numel()].view(values.shape)


def blurred(images: Tensor, sigma: Tensor, most: float) -> Tensor:
    """Convolve (N, H, W) with a Gaussian of `sigma` (N,) pixels, at most `most`, along both axes."""
    reach = max(1, round(2 * most))
    taps = torch.exp(-torch.arange(reach + 1).to(sigma) ** 2 / (2 * sigma.clamp(0.1, most)[:, None] ** 2))
    taps = taps / (2 * taps.sum(1, keepdim=True) - 1)
    padded = functional.pad(images[:, None], [reach] * 4, mode="replicate")[:, 0]
    for axis in (1, 2):
        n = padded.shape[axis] - 2 * reach
        images = padded.narrow(axis, reach, n) * each(taps[:, 0])
        for k in range(1, reach + 1):
            either = padded.narrow(axis, reach - k, n) + padded.narrow(axis, reach + k, n)
            images += either.mul_(each(taps[:, k]))
        padded = images
    return images


def scattered(primary: Tensor) -> Tensor:
    """Spread the primary beam (N, H, W) over about a quarter of the image, as deflected photons arrive."""
    coarse = functional.adaptive_avg_pool2d(primary, 16)
    coarse = blurred(coarse, torch.full_like(primary[:, 0, 0], 2.0), 2.0)
    return enlarged(coarse, primary.shape[-1])


def grey_range(signal: Tensor) -> tuple[Tensor, Tensor]:
    """Return a dark and a bright signal (N,) of each image, as a viewer looks for them to set the window.

    Dark is the 8th percentile in the middle, bright the 90th of the whole, of the cells of a 16 x 16 grid.
    """
    cells = functional.adaptive_avg_pool2d(signal, 16)
    middle, whole = cells[:, 3:-3, 2:-2].flatten(1), cells.flatten(1)
    return (middle.kthvalue(1 + int(0.08 * middle.shape[1])).values,
            whole.kthvalue(1 + int(0.90 * whole.shape[1])).values)


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
    steps = (signal - each(middle)).mul_(each(2 * contrast / half))
    return (2 * _alike(torch.sigmoid_, steps)).sub_(1)  # tanh(steps / 2)


def random_fields(keys: Tensor, n_cells: int, stream: int) -> Tensor:
    """Draw standard normal numbers (N, n_cells, n_cells) that depend on each image's own key alone.

    Parameters
    ----------
    keys : Tensor
        (N, 2) int64, seed and number of the image.
    stream : int
        0 or 1; the streams of one image are independent.
    """
    fields, generator = torch.empty(len(keys), n_cells, n_cells), torch.Generator()
    for field, (seed, number) in zip(fields, keys.tolist(), strict=True):
        generator.manual_seed((seed * 1_000_003 + number) * 2 + stream)
        field.normal_(generator=generator)
    return fields

