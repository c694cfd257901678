"""Near duplicates among radiographs: one exposure cropped, turned, moved, flipped, inverted or made darker.

All chests are much alike, so hashes of the whole picture either miss edits or flag strangers. Here two images
are laid over each other first, and then compared by what is left without their broad brightness: ribs,
vessels, trabeculae. Only the middle of the image counts, so that letters, borders and filled corners do not.
"""

import math
from collections.abc import Iterator
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
_ROWS, _PAIRS, _MOTIONS = 250, 256, 18  # images, pairs, motions at once: bounds the memory

_ANGLES, _ZOOMS, _SHIFTS = (-10, -5, 0, 5, 10), (1, .9, .8), (-.1, 0, .1)  # degrees, side, half sides


class _Level(NamedTuple):
    """A picture of detail: what is finer than `broad` and coarser than `fine`, in px of the thumbnails."""

    broad: float
    fine: float
    side: int  # px in which the picture is kept
    points: int  # sampled along the side of the middle
    steps: int  # of the alignment


_LEVELS = (_Level(8, 2.4, 32, 24, 5), _Level(4, 1.2, 48, 32, 4), _Level(2, .6, 96, 64, 2))
_COARSE_POINTS = 16


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
    if images.shape[2:] != (SIDE, SIDE):
        images = _resize(images, SIDE)
    films = images[:, 0].cpu().numpy()
    seen: dict[bytes, int] = {}
    firsts = [seen.setdefault(film.tobytes(), row) for row, film in enumerate(films)]
    pairs = [DuplicatePair(first, row, 1., False, False) for row, first in enumerate(firsts) if first < row]
    rows = np.array([row for row in seen.values() if np.ptp(films[row]) > .02])  # the others are blank
    if len(rows) > 1:
        plain = _compare_plainly(images[torch.from_numpy(rows)], rows)
        pairs += list(({pair[:2]: pair for pair in plain} | {pair[:2]: pair for pair in _search(films, rows)}
                       ).values())
    return sorted(pairs)


def _compare_plainly(images: Tensor, rows: np.ndarray) -> list[DuplicatePair]:
    """Pair images whose grey values correlate nearly perfectly, mirrored or not.

    A hazy image has little detail, and what JPEG leaves of it may be too little for `_search`.
    """
    still = _unit(images.flatten(1))
    pairs = []
    for flipped in (False, True):
        moving = _unit(images.flip(-1).flatten(1)) if flipped else still
        for start in range(0, len(rows), _ROWS):
            likeness = (moving[start:start + _ROWS] @ still.T).triu(start + 1)
            for a, b in (likeness.abs() > _PLAINLY_SAME).nonzero().tolist():
                score = float(likeness[a, b])
                first, second = sorted((int(rows[start + a]), int(rows[b])))
                pairs.append(DuplicatePair(first, second, min(abs(score), 1.), flipped, score < 0))
    return pairs


def _search(films: np.ndarray, rows: np.ndarray) -> list[DuplicatePair]:
    kept = [torch.cat([_detail(films[part], level) for part in np.array_split(rows, -(-len(rows) // _ROWS))])
            for level in _LEVELS[:-1]]
    best: dict[tuple[int, int], DuplicatePair] = {}
    for moving, still, motion, sign in _candidates(kept[0]):
        for level, details in zip(_LEVELS[:-1], kept, strict=True):
            likeness, motion = _align(details[moving], details[still], motion, sign, level)
        alike = likeness > _PLAUSIBLE
        if not alike.any():
            continue
        motion, sign = motion[alike], sign[alike]
        moved, unmoved = rows[moving[alike].numpy()], rows[still[alike].numpy()]
        likeness, motion = _align(_detail(films[moved], _LEVELS[-1]), _detail(films[unmoved], _LEVELS[-1]),
                                  motion, sign, _LEVELS[-1])
        flips = (motion[:, 0, 0] * motion[:, 1, 1] - motion[:, 0, 1] * motion[:, 1, 0] < 0).tolist()
        for a, b, score, flip, way in zip(moved.tolist(), unmoved.tolist(), likeness.tolist(), flips,
                                          sign.tolist(), strict=True):
            ends = (min(a, b), max(a, b))
            if score > max(_SAME, best[ends].similarity if ends in best else 0):
                best[ends] = DuplicatePair(*ends, min(score, 1.), flip, way < 0)
    return list(best.values())


def _detail(films: np.ndarray, level: _Level) -> Tensor:
    """Divide each image (N, SIDE, SIDE), less its local mean, by its local spread."""
    detail = films - gaussian_filter(films, (0, level.broad, level.broad))
    floor = .06 * films.std((1, 2), keepdims=True)  # keeps the noise of empty regions small
    detail /= np.sqrt(gaussian_filter(detail ** 2, (0, level.broad, level.broad)) + floor ** 2)
    smooth = torch.from_numpy(gaussian_filter(detail, (0, level.fine, level.fine)))[:, None]
    return _resize(smooth, level.side)


def _resize(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)


def _candidates(details: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield batches of likely pairs: the image that is moved, the one that is not, the motion, the sign.

    A motion only zooms in, which never needs what lies outside the image; as each image is both moved and
    not, crops of either are found.
    """
    motions = torch.tensor([[[flip * zoom * math.cos(angle), -flip * zoom * math.sin(angle), flip * right],
                             [zoom * math.sin(angle), zoom * math.cos(angle), down]]
                            for flip, angle, zoom, right, down
                            in product((1, -1), map(math.radians, _ANGLES), _ZOOMS, _SHIFTS, _SHIFTS)])
    still = _unit(_sample(details, torch.eye(2, 3).expand(len(details), 2, 3), _COARSE_POINTS))
    for start in range(0, len(details), _ROWS):
        part = details[start:start + _ROWS]
        best = torch.zeros(len(part), len(details))
        which = torch.zeros(best.shape, dtype=torch.int16)
        for first in range(0, len(motions), _MOTIONS):
            shapes = [_unit(_sample(part, motion.expand(len(part), 2, 3), _COARSE_POINTS))
                      for motion in motions[first:first + _MOTIONS]]
            likeness, number = (torch.stack(shapes) @ still.T).abs_().max(0)
            which = torch.where(likeness > best, (number + first).to(torch.int16), which)
            torch.maximum(best, likeness, out=best)
        own = torch.arange(len(part))
        best[own, start + own] = 0
        likest = best.topk(min(_NEIGHBOURS, len(details) - 1)).indices
        row, column = own[:, None].expand_as(likest).flatten(), likest.flatten()
        likely = best[row, column] > _PLAUSIBLE
        for a, b in zip(row[likely].split(_PAIRS), column[likely].split(_PAIRS), strict=True):
            if len(a):
                motion = motions[which[a, b].long()]
                moved = _unit(_sample(part[a], motion, _COARSE_POINTS))
                yield start + a, b, motion, (moved * still[b]).sum(1).sign()


def _align(moving: Tensor, still: Tensor, motion: Tensor, sign: Tensor,
           level: _Level) -> tuple[Tensor, Tensor]:
    """Improve the motions (B, 2, 3) step by step; return the best correlations (B,) and their motions."""
    target = sign[:, None] * _unit(_sample(still, torch.eye(2, 3).expand_as(motion), level.points))
    x, y = _grid(level.points).unbind(-1)
    best, best_motion = torch.full((len(motion),), -1.), motion
    for step in range(level.steps + 1):
        seen = _sample(moving, motion, level.points)
        unit = _unit(seen)
        likeness = (unit * target).sum(1)
        better = likeness > best
        best = torch.where(better, likeness, best)
        best_motion = torch.where(better[:, None, None], motion, best_motion)
        if step == level.steps:
            break
        spread = (seen - seen.mean(1, keepdim=True)).norm(dim=1).clamp_min(1e-6)[:, None]
        picture = (seen / spread).unflatten(1, (level.points, level.points))
        down, right = (slope.flatten(1) for slope
                       in torch.gradient(picture, spacing=2 * _MIDDLE / level.points, dim=(1, 2)))
        slopes = torch.stack([right * x, right * y, right, down * x, down * y, down], 1)  # (B, 6, points^2)
        slopes -= slopes.mean(2, keepdim=True)
        slopes -= (slopes @ unit[:, :, None]) * unit[:, None]  # a change of contrast is no likeness
        normal = slopes @ slopes.mT
        ridge = 1e-3 * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-9
        change = torch.linalg.solve(normal + ridge * torch.eye(6), slopes @ (target - unit)[:, :, None])
        bottom = torch.zeros(len(motion), 1, 3)
        motion = motion @ (torch.eye(3) + torch.cat([change.view(-1, 2, 3).clamp(-.1, .1), bottom], 1))
    return best, best_motion


def _grid(points: int) -> Tensor:
    """Places (points^2, 2), x and y, in the middle of an image whose edges are at -1 and 1."""
    along = _MIDDLE * ((torch.arange(points) + .5) / points * 2 - 1)
    return torch.cartesian_prod(along, along).flip(1)


def _sample(details: Tensor, motion: Tensor, points: int) -> Tensor:
    """Read (B, 1, S, S) at the grid as moved by (B, 2, 3): (B, points^2)."""
    places = _grid(points) @ motion[:, :, :2].mT + motion[:, None, :, 2]
    return F.grid_sample(details, places[:, None], padding_mode="reflection", align_corners=False)[:, 0, 0]


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors - vectors.mean(1, keepdim=True)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-6)
