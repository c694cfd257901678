"""Near duplicates among radiographs: one exposure cropped, turned, moved, flipped, inverted or made darker.

All chests are much alike, so hashes of the whole picture either miss edits or flag strangers. Here two images
are laid over each other first, and then compared by what is left without their broad brightness: ribs,
vessels, trabeculae. Only the middle of the image counts, so that letters, borders and filled corners do not.
"""

import math
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from genailab_helpers.radiographs import check_images

SIDE = 96  # px of the thumbnails

_SAME = .915  # correlation from which two images are one exposure; strangers and other visits lie below
_PLAINLY_SAME = .993  # of plain grey values: JPEG 30 keeps phantoms above it, two knees reached .991
_PLAUSIBLE = .8  # pairs below it are given up before the finest comparison
_NEIGHBOURS = 5  # images that are compared closely with each image
_MIDDLE = .75  # share of the side that counts
_AT_ONCE = 256  # images or pairs: bounds the memory

_ANGLES, _ZOOMS, _SHIFTS = (-10, -5, 0, 5, 10), (1, .9, .8), (-.1, 0, .1)  # degrees, side, half sides


_LEVELS = (  # pictures of detail, from coarse to fine: what is finer than `broad` and coarser than `fine`
    # broad, fine, side (px), points along the side of the middle, steps of the alignment, least correlation
    (8, 2.4, 32, 24, 5, -1), (4, 1.2, 48, 32, 4, _PLAUSIBLE), (2, .6, 96, 64, 2, _SAME))
_COARSE_POINTS = 16
_STAY = torch.eye(2, 3)  # the motion that moves nothing


class DuplicatePair(NamedTuple):
    """Two images that show one exposure.

    Attributes
    ----------
    first, second : int
        Row numbers, first < second.
    similarity : float
        Correlation of the aligned films' detail, at most 1; exactly 1 if they are equal pixel by pixel.
    flipped, inverted : bool
        Whether one is a mirror image, a negative of the other.
    """

    first: int
    second: int
    similarity: float
    flipped: bool
    inverted: bool


def find_duplicates(images: Tensor) -> list[DuplicatePair]:
    """Find images that are edited copies of each other.

    Parameters
    ----------
    images : Tensor
        (N, 1, H, W) float32 in [-1, 1]; other sizes than `SIDE` are resized to it.

    Returns
    -------
    list of DuplicatePair
        Sorted by row numbers. An image that equals an earlier one pixel by pixel is paired with the first
        such one only, which stands for it in all other pairs. Blank images are paired only if they are
        equal.

    Raises
    ------
    ValueError
        If `images` is not a batch as above.

    Notes
    -----
    At first 270 flips, turns, zooms and shifts of each image are correlated with all others at 16x16
    points, then the five likest images of each are aligned with it by Gauss-Newton steps on an affine map,
    from coarse to fine, to the greatest correlation (Evangelidis and Psarakis 2008, IEEE TPAMI 30:1858).
    What is compared is the image less its local mean, divided by its local spread, which brightness,
    contrast and gamma hardly change. Edits up to about 10 degrees, a crop of 10 % from each edge and a
    shift of 10 % of the side are in reach. Of more than six near-equal images, not every pair need be
    listed.
    """
    check_images(images)
    films = resized(images, SIDE)[:, 0].cpu().numpy()
    seen: dict[bytes, int] = {}
    firsts = [seen.setdefault(film.tobytes(), row) for row, film in enumerate(films)]
    pairs = [DuplicatePair(first, row, 1., False, False) for row, first in enumerate(firsts) if first < row]
    rows = np.array([row for row in seen.values() if np.ptp(films[row]) > .02])  # the others are blank
    if len(rows) > 1:
        pairs += _search(films, rows)
    return sorted(pairs)


def _search(films: np.ndarray, rows: np.ndarray) -> list[DuplicatePair]:
    """Align the likely pairs from coarse to fine, and keep those that stay alike."""
    moving, still, motion, sign = _candidates(_detail(films[rows], *_LEVELS[0][:3]))
    for broad, fine, side, points, steps, least in _LEVELS:
        detail = _detail(films[rows], broad, fine, side)
        parts = zip(*(part.split(_AT_ONCE) for part in (moving, still, motion, sign)), strict=True)
        aligned = [_align(detail[a], detail[b], start, way, points, steps) for a, b, start, way in parts]
        likeness, motion = map(torch.cat, zip(*aligned, strict=True))
        alike = likeness > least
        moving, still, motion, sign, likeness = (
            part[alike] for part in (moving, still, motion, sign, likeness))
    flips = motion[:, :, :2].det() < 0
    best = _compare_plainly(films, rows)
    for k in likeness.argsort().tolist():  # a pair may be met twice: the better alignment counts
        first, second = sorted(rows[[moving[k], still[k]]].tolist())
        score = min(float(likeness[k]), 1.)
        best[first, second] = DuplicatePair(first, second, score, bool(flips[k]), bool(sign[k] < 0))
    return list(best.values())


def _compare_plainly(films: np.ndarray, rows: np.ndarray) -> dict[tuple[int, int], DuplicatePair]:
    """Pair images whose grey values correlate nearly perfectly, mirrored or not.

    A hazy image has little detail, and what JPEG leaves of it may be too little for an alignment.
    """
    images = torch.from_numpy(films[rows])
    still, pairs = unit_rows(images), {}
    for flipped in (False, True):
        moving = unit_rows(images.flip(-1)) if flipped else still
        for start, part in enumerate(moving.split(_AT_ONCE)):
            likeness = (part @ still.T).triu(start * _AT_ONCE + 1)
            for a, b in (likeness.abs() > _PLAINLY_SAME).nonzero().tolist():
                first, second, score = int(rows[start * _AT_ONCE + a]), int(rows[b]), float(likeness[a, b])
                pairs[first, second] = DuplicatePair(first, second, min(abs(score), 1.), flipped, score < 0)
    return pairs


def _detail(films: np.ndarray, broad: float, fine: float, side: int) -> Tensor:
    """Divide each image (N, SIDE, SIDE), less its local mean, by its local spread: (N, 1, side, side)."""
    parts = []
    for part in np.array_split(films, -(-len(films) // _AT_ONCE)):
        detail = part - gaussian_filter(part, (0, broad, broad))
        floor = .06 * part.std((1, 2), keepdims=True)  # keeps the noise of empty regions small
        detail /= np.sqrt(gaussian_filter(detail ** 2, (0, broad, broad)) + floor ** 2)
        smooth = torch.from_numpy(gaussian_filter(detail, (0, fine, fine)))[:, None]
        parts.append(resized(smooth, side))
    return torch.cat(parts)


def resized(images: Tensor, side: int) -> Tensor:
    """Return images (N, 1, H, W) as (N, 1, side, side)."""
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)


def _candidates(details: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return likely pairs: the image that is moved, the one that is not, the motion, the sign.

    A motion only zooms in, which never needs what lies outside the image; as each image is both moved and
    not, crops of either are found.
    """
    motions = torch.tensor([[[flip * zoom * math.cos(angle), -flip * zoom * math.sin(angle), flip * right],
                             [zoom * math.sin(angle), zoom * math.cos(angle), down]]
                            for flip, angle, zoom, right, down
                            in product((1, -1), map(math.radians, _ANGLES), _ZOOMS, _SHIFTS, _SHIFTS)])
    still = _sample(details, _STAY, _COARSE_POINTS)
    likely = []
    for row, detail in enumerate(details):
        signed = _sample(detail.expand(len(motions), 1, -1, -1), motions, _COARSE_POINTS) @ still.T
        likeness, which = signed.abs().max(0)
        likeness[row] = 0
        near = likeness.topk(min(_NEIGHBOURS, len(details) - 1)).indices
        near = near[likeness[near] > _PLAUSIBLE]
        sign = signed[which[near], near].sign()
        likely.append((torch.full_like(near, row), near, motions[which[near]], sign))
    moving, others, motion, sign = map(torch.cat, zip(*likely, strict=True))
    return moving, others, motion, sign


def _align(moving: Tensor, still: Tensor, motion: Tensor, sign: Tensor, points: int,
           steps: int) -> tuple[Tensor, Tensor]:
    """Improve the motions (B, 2, 3) step by step; return the correlations (B,) and the motions reached."""
    target = sign[:, None] * _sample(still, _STAY, points)
    x, y = _grid(points).unbind(-1)
    for _ in range(steps):
        seen = _sample(moving, motion, points)
        picture, spacing = seen.unflatten(1, (points, points)), 2 * _MIDDLE / points
        down, right = (slope.flatten(1) for slope in torch.gradient(picture, spacing=spacing, dim=(1, 2)))
        slopes = torch.stack([right * x, right * y, right, down * x, down * y, down], 1)  # (B, 6, points^2)
        slopes -= slopes.mean(2, keepdim=True)
        slopes -= (slopes @ seen[:, :, None]) * seen[:, None]  # a change of contrast is no likeness
        normal = slopes @ slopes.mT
        ridge = 1e-3 * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-9
        change = torch.linalg.solve(normal + ridge * torch.eye(6), slopes @ (target - seen)[:, :, None])
        motion = motion @ (torch.eye(3) + F.pad(change.view(-1, 2, 3).clamp(-.1, .1), (0, 0, 0, 1)))
    return (_sample(moving, motion, points) * target).sum(1), motion


def _grid(points: int) -> Tensor:
    """Places (points^2, 2), x and y, in the middle of an image whose edges are at -1 and 1."""
    along = _MIDDLE * ((torch.arange(points) + .5) / points * 2 - 1)
    return torch.cartesian_prod(along, along).flip(1)


def _sample(details: Tensor, motion: Tensor, points: int) -> Tensor:
    """Read (B, 1, S, S) at the grid as moved by (B, 2, 3), less the mean and of length 1: (B, points^2)."""
    motion = motion.expand(len(details), 2, 3)
    places = _grid(points) @ motion[:, :, :2].mT + motion[:, None, :, 2]
    seen = F.grid_sample(details, places[:, None], padding_mode="reflection", align_corners=False)[:, 0, 0]
    return unit_rows(seen)


def unit_rows(images: Tensor) -> Tensor:
    """Return each image as a row of mean 0 and length 1, so that products of rows are correlations."""
    rows = images.flatten(1)
    return F.normalize(rows - rows.mean(1, keepdim=True), dim=1, eps=1e-6)
