"""Lumbar spines drawn from known anatomy and a known severity of wear, and the raters who grade them.

A lateral film shows the patient facing the viewer's left; a frontal one (AP) shows the patient's right on the
left. Lengths are in image sides of a nominal body, angles in radians, clockwise for the viewer. Fields of
shape (N, DISCS) go from the head downwards. Everything here is generated; nothing is a film of a person.

Every solid is drawn only in the zone of the films where it lies and is exactly 0 outside.
"""

# ruff: noqa: RUF009 - `vary` and `given` only wrap `dataclasses.field`

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import ndtr
from torch import Tensor
from torch.nn import functional

from genailab_helpers.phantoms import projection
from genailab_helpers.phantoms.anatomy import Anatomy, draw_batches, draw_fields, given, vary
from genailab_helpers.phantoms.projection import Rays, Window, each, ellipsoid, half_chord
from genailab_helpers.radiographs import check_img_size

VIEWS = ("lateral", "ap")
VERTEBRAE = ("T10", "T11", "T12", "L1", "L2", "L3", "L4", "L5", "S1")
STRUCTURES = ("vertebrae", "discs")
SIGNS = ("disc_loss", "osteophytes", "sclerosis", "slip", "misalignment")
THRESHOLDS = (0.2, 0.4, 0.6, 0.8)  # of severity, between the grades 0 to 4
DISCS = len(VERTEBRAE) - 1

FILM_SIDE_CM = 26.0
SOFT = 0.19 * FILM_SIDE_CM  # attenuation of soft tissue an image side, about 70 keV (NIST XCOM: 0.19 / cm)
BONE_EXCESS = 0.34 * FILM_SIDE_CM  # mixed cortical and spongy bone above soft tissue
N_GAS = 10
N_WAVES = 5
_FINEST = 96  # smaller films are drawn at a multiple of their size and averaged, so that thin things stay
_MIDDLE = VERTEBRAE.index("L3")
_LUMBAR = VERTEBRAE.index("L1")

# wear comes first where the load is greatest
_LOAD = (0.45, 0.50, 0.60, 0.75, 0.85, 0.95, 1.05, 1.0)
_TILT = {"lateral": (0.08, 0.14, 0.20, 0.22, 0.18, 0.08, -0.06, -0.28, -0.62),  # lordosis
         "ap": (-0.8, -1.0, -0.8, -0.3, 0.4, 0.9, 0.8, 0.3, 0.0)}  # of a sideways curve
_WIDTH = (0.80, 0.83, 0.87, 0.90, 0.94, 0.98, 1.02, 1.05, 1.0)
_HEIGHT = (0.80, 0.84, 0.90, 0.96, 0.99, 1.0, 1.0, 0.98, 0.92)
_DISC = (0.45, 0.50, 0.60, 0.75, 0.86, 0.95, 1.05, 0.95)


@dataclass(frozen=True)
class SpineAnatomy(Anatomy):
    """A batch of N spines, every field a tensor whose first axis is N.

    The distributions stand beside the fields: mean and standard deviation, cut at 2.2 of them. The signs of
    wear follow `severity`, each with a share of chance of its own (`..._share` for the film, `..._local` for
    the disc): `changed(severity=...)` lets the same person age.
    """

    # how the body lies before the detector
    shift_x: Tensor = vary(0.0, 0.03)
    shift_y: Tensor = vary(0.0, 0.03)
    magnification: Tensor = vary(1.0, 0.06)
    rotation: Tensor = vary(0.0, 0.04)
    # spine
    body_width: Tensor = vary(0.069, 0.004)  # half of it, L3 from the side
    body_height: Tensor = vary(0.0535, 0.0025)  # half of it, L3
    disc_height: Tensor = vary(0.039, 0.005)
    disc_local: Tensor = vary(0.0, 0.09, DISCS)  # share of the height
    lordosis: Tensor = vary(1.0, 0.22)
    curve: Tensor = vary(0.0, 0.07)  # sideways
    posture: Tensor = vary(0.0, 0.02, DISCS + 1)  # turn of each vertebra
    bone_density: Tensor = vary(1.0, 0.16)
    # wear: what chance adds to severity
    disc_loss_share: Tensor = vary(0.0, 0.22)
    disc_loss_local: Tensor = vary(0.0, 0.20, DISCS)
    osteophytes_share: Tensor = vary(0.0, 0.05)
    osteophytes_local: Tensor = vary(0.0, 0.10, DISCS, 2)
    sclerosis_share: Tensor = vary(0.0, 0.06)
    sclerosis_local: Tensor = vary(0.0, 0.10, DISCS)
    slip_share: Tensor = vary(0.0, 0.20)
    slip_local: Tensor = vary(0.0, 1.0, DISCS)
    misalignment_share: Tensor = vary(0.0, 0.15)
    misalignment_local: Tensor = vary(0.0, 1.0, DISCS + 1)
    # what surrounds the spine
    trunk_depth: Tensor = vary(1.0, 0.09)  # thickness, relative
    trunk_width: Tensor = vary(0.60, 0.06)  # half of it, AP
    back_x: Tensor = vary(0.50, 0.04)
    dome_y: Tensor = vary(0.10, 0.06)  # of the diaphragm
    hip_y: Tensor = vary(0.80, 0.03)
    rib_y: Tensor = vary(0.0, 0.03)
    rib_drop: Tensor = vary(0.30, 0.05)
    tissue: Tensor = vary(0.0, 1.0, N_WAVES, 4)  # waves of fat and muscle
    gas: Tensor = vary(0.0, 1.0, N_GAS, 4)
    # X-ray tube, detector, display
    kilovolt: Tensor = vary(1.0, 0.06)  # scales all attenuation; softer beams have more contrast
    quanta: Tensor = vary(450000.0, 140000.0)
    scatter: Tensor = vary(0.35, 0.10)
    focal_blur: Tensor = vary(0.10, 0.03)
    window: Tensor = vary(2.3, 0.45)
    contrast: Tensor = vary(0.95, 0.15)
    brightness: Tensor = vary(-0.10, 0.13)
    severity: Tensor = given()  # (N,) in [0, 1]
    view: Tensor = given()  # (N,) int64, place in VIEWS; one view a batch

    @property
    def disc_loss(self) -> Tensor:
        """(N, DISCS) share of the height that each disc lost, 0 to 0.8."""
        return (0.60 * self._wear("disc_loss")).clamp(max=0.8)

    @property
    def osteophytes(self) -> Tensor:
        """(N, DISCS, 2) length of the spurs at each disc, in front and behind, or on both sides."""
        return 0.057 * self._wear("osteophytes")

    @property
    def sclerosis(self) -> Tensor:
        """(N, DISCS) how much denser the endplates beside each disc are, 0 to about 1.3."""
        return self._wear("sclerosis")

    @property
    def slip(self) -> Tensor:
        """(N, DISCS) how far the vertebra below each disc stands off to the viewer's right."""
        film = (self.severity + self.slip_share - 0.25).clamp(min=0)
        one_way = self.slip_local.abs() if self._lateral else self.slip_local
        one_way = one_way * self.slip_local.abs()  # few levels stand out
        return 0.007 * film[:, None] * one_way * _row(_LOAD, film) * _row((0,) * 4 + (1,) * 4, film)

    @property
    def misalignment(self) -> Tensor:
        """(N, DISCS + 1) how far each vertebra is turned out of line."""
        film = (self.severity + self.misalignment_share).clamp(min=0)
        return 0.055 * film[:, None] * self.misalignment_local

    @property
    def _lateral(self) -> bool:
        return VIEWS[int(self.view[0])] == "lateral"

    def _wear(self, sign: str) -> Tensor:
        local = getattr(self, f"{sign}_local")
        shape = (-1,) + (1,) * (local.ndim - 1)
        film = (self.severity + getattr(self, f"{sign}_share")).reshape(shape)
        load = _row(_LOAD, film).reshape(1, DISCS, *shape[2:])
        return ((film + local) * load).clamp(min=0)


def _row(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)


@dataclass(frozen=True)
class SpineRender:
    """What `render_spines` returns.

    Parameters
    ----------
    images : Tensor
        (N, 1, H, W) float32 in [-1, 1].
    masks : dict of str to Tensor
        (N, H, W) bool for each of STRUCTURES and SIGNS; empty unless masks were asked for. A sign is marked
        from where it can be seen: discs that lost a quarter of their height, spurs of 1.6 mm, endplates
        denser by 0.15, discs at steps of 3 mm, vertebrae turned by 3 degrees.
    """

    images: Tensor
    masks: dict[str, Tensor]


def sample_spines(n_samples: int, seed: int = 0, view: str = "lateral") -> SpineAnatomy:
    """Draw the anatomy of spines at random.

    Parameters
    ----------
    n_samples : int
        Number of spines, at least 1. Spine i depends on `seed` and i alone, so 10 spines are the first ten of
        1,000.
    seed : int, default 0
        At least 0.
    view : str, default "lateral"
        One of VIEWS.

    Returns
    -------
    SpineAnatomy
        With `severity` uniform in [0, 1].

    Raises
    ------
    ValueError
        For an unknown view, or numbers out of range.
    """
    if view not in VIEWS:
        raise ValueError(f"view: expected one of {', '.join(VIEWS)}; got {view!r}")
    fields, uniform = draw_fields(SpineAnatomy, n_samples, seed, 1)
    return SpineAnatomy(**fields, severity=torch.from_numpy(uniform[:, 0]).float(),
                        view=torch.full((n_samples,), VIEWS.index(view)))


def render_spines(anatomy: SpineAnatomy, img_size: int = 128, masks: bool = False,
                  batch_size: int = 16) -> SpineRender:
    """Project spines to films.

    Parameters
    ----------
    anatomy : SpineAnatomy
        N spines, all of one view.
    img_size : int, default 128
        Side of the square films in pixels, at least 16.
    masks : bool, default False
        Whether to return where vertebrae, discs and each sign of wear lie.
    batch_size : int, default 16
        Spines drawn at a time by each thread; bounds the memory and changes no pixel.

    Returns
    -------
    SpineRender
        Images and masks. Images are differentiable with respect to the fields of `anatomy`.

    Raises
    ------
    ValueError
        If `img_size` is not a whole number of at least 16, or if views are mixed.
    """
    check_img_size(img_size)
    if bool((anatomy.view != anatomy.view[0]).any()):
        raise ValueError("anatomy: expected spines of one view, got both; render lateral and AP films apart")
    return SpineRender(*draw_batches(
        anatomy, lambda rows: _render(anatomy[rows], img_size, masks), batch_size))


def _render(a: SpineAnatomy, img_size: int, masks: bool) -> tuple[Tensor, dict[str, Tensor]]:
    finer = -(-_FINEST // img_size)
    line_integral, lengths = trace(a, img_size * finer, masks)
    if finer > 1:
        line_integral = functional.avg_pool2d(line_integral[:, None], finer)[:, 0]
    noise = projection.quantum_noise(a.keys, img_size).to(line_integral)
    signal = projection.expose(line_integral, noise, a.quanta, a.scatter, a.focal_blur)
    high = projection.quantile(signal, 0.95) + 0.15
    shift = a.window * a.brightness
    images = projection.display(signal, high - a.window - shift, high - shift, a.contrast)
    truth = {}
    for name, length in lengths.items():
        share = (length > 0).float()
        truth[name] = (functional.avg_pool2d(share[:, None], finer)[:, 0] if finer > 1 else share) >= 0.5
    return images[:, None], truth


def trace(anatomy: SpineAnatomy, img_size: int,
          with_lengths: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Follow every ray through N spines.

    Parameters
    ----------
    anatomy : SpineAnatomy
        N spines of one view.
    img_size : int
        Side of the films in pixels.
    with_lengths : bool, default True
        Whether to return where the single structures lie.

    Returns
    -------
    line_integral : Tensor
        (N, H, W) sum of path length times attenuation coefficient.
    lengths : dict of str to Tensor
        (N, H, W), above 0 where a ray meets one of STRUCTURES or SIGNS; empty unless asked for.
    """
    a, lateral = anatomy, anatomy._lateral
    scale = a.magnification * 1.12
    rays = projection.cast_rays(a.shift_x, a.shift_y, scale, a.rotation, img_size)
    blank = torch.zeros_like(rays.x)
    lengths = {name: blank.clone() for name in STRUCTURES + SIGNS} if with_lengths else {}
    spine = _chain(a)
    bodies, bone, air = blank.clone(), blank.clone(), blank
    for k in range(len(VERTEBRAE)):
        window, parts = _vertebra(a, spine, rays, k, with_lengths)
        projection.raise_to(bodies, window, parts["bone"])
        for near, solid in (_arch_lateral if lateral else _arch_ap)(spine, rays, k):
            bone[near] += solid
        if with_lengths:
            _keep(a, lengths, window, parts, k)
    if with_lengths:
        for k in range(DISCS):
            _keep_disc(a, spine, rays, lengths, k)
    for window, solid in (_bones_lateral if lateral else _bones_ap)(a, spine, rays):
        bone[window] += solid
    for window, solid in _gas(a, rays):
        projection.raise_to(air, window, solid)
    soft = (_trunk_lateral if lateral else _trunk_ap)(a, rays) * _waves(a, rays)
    soft = soft - torch.minimum(air, 0.6 * soft)
    bone = (bodies + bone) * each(BONE_EXCESS * a.bone_density * a.kilovolt)
    return soft.clamp(min=0) * each(SOFT * a.kilovolt) + bone, lengths


class _Chain(NamedTuple):
    """Centres, turns and half sizes (N, 9) of the vertebrae, and the heights (N, 8) of the discs."""

    x: Tensor
    y: Tensor
    tilt: Tensor
    width: Tensor
    height: Tensor
    disc: Tensor


def _chain(a: SpineAnatomy) -> _Chain:
    """String the vertebrae up and down from L3."""
    lateral = a._lateral
    one = a.severity[:, None]
    bend = a.lordosis * (1 - 0.25 * (a.severity + a.misalignment_share)) if lateral else a.curve
    tilt = _row(_TILT[VIEWS[0 if lateral else 1]], one) * bend[:, None] + a.posture + a.misalignment
    width = a.body_width[:, None] * _row(_WIDTH, one) * (1.0 if lateral else 1.42)
    height = a.body_height[:, None] * _row(_HEIGHT, one)
    disc = a.disc_height[:, None] * _row(_DISC, one) * (1 + a.disc_local) * (1 - a.disc_loss)
    slip = a.slip
    x, y = [torch.full_like(a.severity, -0.045 if lateral else 0.0)], [torch.full_like(a.severity, 0.46)]
    for k in range(_MIDDLE, DISCS):
        dx, dy = _step(tilt, height, disc, slip, k)
        x, y = [*x, x[-1] + dx], [*y, y[-1] + dy]
    for k in range(_MIDDLE - 1, -1, -1):
        dx, dy = _step(tilt, height, disc, slip, k)
        x, y = [x[0] - dx, *x], [y[0] - dy, *y]
    return _Chain(torch.stack(x, 1), torch.stack(y, 1), tilt, width, height, disc)


def _step(tilt: Tensor, height: Tensor, disc: Tensor, slip: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """From the centre of vertebra k to the next one below."""
    upper, lower = tilt[:, k], tilt[:, k + 1]
    middle = (upper + lower) / 2
    dx = slip[:, k] * torch.cos(middle) - disc[:, k] * torch.sin(middle)
    dy = slip[:, k] * torch.sin(middle) + disc[:, k] * torch.cos(middle)
    for turn, half in ((upper, height[:, k]), (lower, height[:, k + 1])):
        dx, dy = dx - half * torch.sin(turn), dy + half * torch.cos(turn)
    return dx, dy


def _local(c: _Chain, rays: Rays, k: int, left: Tensor, right: Tensor, up: Tensor,
           down: Tensor) -> tuple[Window, Tensor, Tensor]:
    """Cut out a box around vertebra k, given in its own frame, and return its coordinates there."""
    x, y, tilt = c.x[:, k], c.y[:, k], c.tilt[:, k]
    wide, high, lean = torch.maximum(left, right), torch.maximum(up, down), torch.sin(tilt).abs()
    window, near = rays.zone(x - left - lean * high, x + right + lean * high,
                             y - up - lean * wide, y + down + lean * wide)
    dx, dy = near.x - each(x), near.y - each(y)
    cos, sin = each(torch.cos(tilt)), each(torch.sin(tilt))
    return window, dx * cos + dy * sin, dy * cos - dx * sin


def _vertebra(a: SpineAnatomy, c: _Chain, rays: Rays, k: int,
              with_lengths: bool) -> tuple[Window, dict[str, Tensor]]:
    """Body of vertebra k with its cortex, endplates and spurs."""
    w, h = c.width[:, k], c.height[:, k]
    spurs, hard = a.osteophytes, a.sclerosis
    none = torch.zeros_like(w)
    # rows of the signs above and below this vertebra
    above = (spurs[:, k - 1], hard[:, k - 1]) if k else (spurs[:, 0] * 0, none)
    below = (spurs[:, k], hard[:, k]) if k < DISCS else (spurs[:, 0] * 0, none)
    room = torch.maximum(above[0].amax(1), below[0].amax(1)) + 0.01
    high = h + 0.4 * room + 0.01
    window, across, along = _local(c, rays, k, w + room, w + room, high, high)
    lower, right = _positive(along), _positive(across)
    u, v = across * each(1 / w), along * each(1 / h)
    u, v, u2 = u.abs(), v.abs(), u * u
    waist = 0.90 + 0.10 * (v * v)
    squared = u2 / (waist * waist)
    squared = squared * (0.15 + 0.85 * squared * squared)  # bodies are flatter than an ellipse
    chord = half_chord(squared)
    hollow = chord - 0.86 * half_chord(squared * (1 / 0.80**2))
    edge = (1 - 0.07 * (1 - u2.clamp(max=1)) - v) * each(h)  # distance to the endplate, which is hollow
    inside = (edge * (1 / 0.008)).clamp(0, 1)
    plate = (1 - edge * (1 / 0.013)).clamp(0, 1) * inside
    hardness = _blend(above[1], below[1], lower)
    band = (1 - edge / (0.010 + 0.028 * hardness)).clamp(0, 1) * inside * chord * hardness
    body = 0.20 * (inside * (0.17 * chord + 0.36 * hollow) + 0.34 * plate * chord + 0.66 * band)
    if k == DISCS:  # fused with the sacrum below
        body = body * (0.5 - 0.6 * along * each(1 / h)).clamp(0, 1)

    size = _blend(_blend(above[0][:, 0], above[0][:, 1], right),
                  _blend(below[0][:, 0], below[0][:, 1], right), lower)
    long, thick = size.clamp(min=0.004), 0.006 + 0.33 * size
    out = (u - 0.93) * each(w)
    beak = (v - 0.93) * each(h) - 0.35 * out.clamp(min=0)  # a spur leans towards the disc
    reach, beak = out / long, beak / thick
    spur = half_chord(reach.clamp(min=0) + beak * beak) * (1 + out * (1 / 0.018)).clamp(0, 1)
    spur = spur * (size * (1 / 0.006)).clamp(max=1)
    return window, {"bone": body + 0.062 * spur} | ({} if not with_lengths else {
        "vertebrae": inside * chord, "sclerosis": band * _positive(hardness - 0.15),
        "osteophytes": spur * _positive(out - 0.05 * each(w)) * _positive(size - 0.006)})


def _positive(value: Tensor) -> Tensor:
    """Return 1 above zero and 0 below; comparing would be slower."""
    return (value.detach() * 1e6).clamp(0, 1)


def _blend(first: Tensor, second: Tensor, where: Tensor) -> Tensor:
    """Take `second` where `where` is 1 and `first` where it is 0; numbers are one a film."""
    return each(first) + each(second - first) * where


def _keep(a: SpineAnatomy, lengths: dict[str, Tensor], window: Window, parts: dict[str, Tensor],
          k: int) -> None:
    for name in ("vertebrae", "osteophytes", "sclerosis"):
        projection.raise_to(lengths[name], window, parts[name])
    turned = (a.misalignment[:, k].abs() >= math.radians(3)).to(a.severity.dtype)
    projection.raise_to(lengths["misalignment"], window, parts["vertebrae"] * each(turned))


def _keep_disc(a: SpineAnatomy, c: _Chain, rays: Rays, lengths: dict[str, Tensor], k: int) -> None:
    """Mark the room between vertebrae k and k + 1, which the film shows as a gap."""
    w, d = torch.minimum(c.width[:, k], c.width[:, k + 1]) * 0.96, c.disc[:, k]
    middle, slip = (c.tilt[:, k] + c.tilt[:, k + 1]) / 2, a.slip[:, k]
    x = c.x[:, k] - c.height[:, k] * torch.sin(c.tilt[:, k]) - d / 2 * torch.sin(middle)
    y = c.y[:, k] + c.height[:, k] * torch.cos(c.tilt[:, k]) + d / 2 * torch.cos(middle)
    x = x + slip / 2 * torch.cos(middle)
    wedge = (c.tilt[:, k] - c.tilt[:, k + 1]).abs() * w + 0.008
    reach = w + slip.abs() + d / 2 + wedge
    window, near = rays.zone(x - reach, x + reach, y - reach, y + reach)
    dx, dy = near.x - each(x), near.y - each(y)
    cos, sin = each(torch.cos(middle)), each(torch.sin(middle))
    u, v = (dx * cos + dy * sin) * each(1 / w), dy * cos - dx * sin
    box = _positive(1 - u.abs()) * _positive(each(d / 2 + wedge) - v.abs())
    gap = box * (1 - _positive(lengths["vertebrae"][window]))
    projection.raise_to(lengths["discs"], window, gap)
    for name, solid, there in (("disc_loss", gap, a.disc_loss[:, k] >= 0.25),
                               ("slip", box, slip.abs() >= 0.3 / FILM_SIDE_CM)):
        projection.raise_to(lengths[name], window, solid * each(there.to(d.dtype)))


_Solids = Iterator[tuple[Window, Tensor]]


def _shell(u: Tensor, v: Tensor, wall: float = 0.72) -> Tensor:
    """Chord through bone around marrow, in units of the half axes."""
    squared = u * u + v * v
    return half_chord(squared) - wall * 0.8 * half_chord(squared * (1 / wall**2))


def _arch_lateral(c: _Chain, rays: Rays, k: int) -> _Solids:
    """Pedicle, joints and spinous process behind the body."""
    w, h = c.width[:, k], c.height[:, k]
    if k == DISCS:
        return  # the sacrum has its own
    window, u, v = _local(c, rays, k, w * 0, w + 0.19, h * 1.0, h * 1.5)
    u, v = u - each(w), v * each(1 / h)
    pedicle = half_chord((v + 0.42) * (v + 0.42) * (1 / 0.33**2)) \
        * (u * (1 / 0.008) + 0.6).clamp(0, 1) * (5.5 - u * (1 / 0.01)).clamp(0, 1)
    lean = u - 0.058 - 0.018 * v
    joint = _shell(lean * (1 / 0.020), (v - 0.20) * (1 / 1.15))
    process = _shell((u - 0.125) * (1 / 0.062), (v - 0.62 - (u - 0.125) * 2.0) * (1 / 0.46), 0.8)
    yield window, 0.040 * pedicle + 0.060 * joint + 0.050 * process


def _arch_ap(c: _Chain, rays: Rays, k: int) -> _Solids:
    """Pedicles end on, spinous process, laminae and transverse processes."""
    w, h = c.width[:, k], c.height[:, k]
    if k == DISCS:
        return
    reach = w * 1.9
    window, u, v = _local(c, rays, k, reach, reach, h * 1.2, h * 2.0)
    side, v = u.abs() * each(1 / w), v * each(1 / h)
    pedicle = _shell((side - 0.66) * (1 / 0.19), (v + 0.25) * (1 / 0.50), 0.66)
    spinous = _shell(side * (1 / 0.11), (v - 0.75) * (1 / 0.55), 0.66)
    lamina = _shell((side - 0.34 - 0.12 * v) * (1 / 0.26), (v - 0.45) * (1 / 0.95), 0.86)
    wing = (side - 1.30) * (1 / 0.52)
    transverse = _shell(wing, (v + 0.18 + 0.16 * wing) * (1 / 0.24), 0.7)
    lumbar = 0.036 if k >= _LUMBAR else 0.0  # higher up ribs take their place
    yield window, 0.105 * pedicle + 0.085 * spinous + 0.030 * lamina + lumbar * transverse


def _bones_lateral(a: SpineAnatomy, c: _Chain, rays: Rays) -> _Solids:
    """Lower sacrum, both ilia over each other, and the last ribs."""
    x, y, turn = c.x[:, -1], c.y[:, -1], c.tilt[:, -1]
    length = c.height[:, -1]
    for size in (0.85, 0.70, 0.58):  # S2 to S4 turn further back
        length, before = 0.058 * torch.full_like(x, size), length
        turn_next = turn + 0.10
        x = x - before * torch.sin(turn) - length * torch.sin(turn_next)
        y = y + before * torch.cos(turn) + length * torch.cos(turn_next)
        turn = turn_next
        window, near = rays.zone(x - 0.12, x + 0.12, y - 0.12, y + 0.12)
        yield window, 0.6 * ellipsoid(near, x, y, 0.058 * size, length * 1.2, 0.03 * size, turn)
    for dx, dy in ((0.0, 0.0), (0.025, 0.018)):  # the sides differ by the divergence of the beam
        ilium_x, ilium_y = c.x[:, -1] + 0.02 + dx, a.hip_y + 0.20 + dy
        window, near = rays.zone(ilium_x - 0.37, ilium_x + 0.37, ilium_y - 0.21)
        u, v = (near.x - each(ilium_x)) * (1 / 0.23), (near.y - each(ilium_y)) * (1 / 0.20)
        yield window, 0.036 * _shell(u + 0.35 * v, v, 0.90)
    for number in range(5):
        start = a.rib_y - 0.20 + 0.125 * (number // 2) + 0.028 * (number % 2)
        window, near = rays.zone(-0.25, 0.34, start - 0.03, start + 0.55)
        run = 0.30 - near.x
        off = near.y - each(start) - run * each(a.rib_drop + 0.35) + 0.35 * run * run
        tip = (8.5 - run * (1 / 0.06) - 1.2 * (number // 2)).clamp(0, 1)
        yield window, 0.020 * _shell(off * (1 / 0.015), run * 0, 0.72) * tip * (run * (1 / 0.03)).clamp(0, 1)


def _bones_ap(a: SpineAnatomy, c: _Chain, rays: Rays) -> _Solids:
    """Sacrum, ilia and the last ribs."""
    x, y = c.x[:, -1], c.y[:, -1]
    window, near = rays.zone(x - 0.26, x + 0.26, y - 0.08)
    u, v = near.x - each(x), (near.y - each(y + 0.10)) * (1 / 0.17)
    taper = 0.215 - 0.05 * v.clamp(-1, 1.5)
    sacrum = _shell(u / taper, v * v * v, 0.9)
    holes = half_chord((u.abs() - 0.085) * (u.abs() - 0.085) * (1 / 0.018**2)
                       + (v - 0.05) * (v - 0.05) * (1 / 0.09**2))
    yield window, 0.085 * (sacrum * (1 - 0.5 * holes))
    for sign in (-1.0, 1.0):
        window, near = rays.zone(0.10, 0.75, a.hip_y - 0.10, np.inf, sign)
        u, v = (near.x - 0.395) * (1 / 0.245), (near.y - each(a.hip_y + 0.22)) * (1 / 0.27)
        u = u + 0.30 * v
        yield window, 0.090 * _shell(u, v, 0.93)
        window, near = rays.zone(0.05, 0.80, -0.30, 0.80, sign)
        out = near.x - 0.06
        row = (near.y - each(a.rib_y + 0.075) - out * each(a.rib_drop) - 0.55 * out * out) * (1 / 0.135)
        nearest = row.detach().round().clamp(-4, 0)
        tip = 9.5 - out * (1 / 0.05) - 6 * nearest.clamp(max=-1) - 10 * (nearest + 1).clamp(min=0)
        ribs = _shell((row - nearest) * (0.135 / 0.017), out * 0, 0.72)
        yield window, 0.018 * ribs * tip.clamp(0, 1) * (out * (1 / 0.02)).clamp(0, 1)


def _trunk_lateral(a: SpineAnatomy, rays: Rays) -> Tensor:
    """Thickness of soft tissue from side to side: thin behind, thick at the hips, less the lungs."""
    u = (rays.x * (1 / 0.62) - each(a.back_x / 0.62 - 1)).clamp(min=0)
    hips = ((rays.y - 0.55) * (1 / 0.5)).clamp(0, 1)
    trunk = half_chord(u * u * u * u * (0.3 + 0.7 * u)) * (0.98 + 0.30 * hips * hips) * each(a.trunk_depth)
    window, near = rays.zone(-np.inf, np.inf, bottom=a.dome_y + 0.18)
    front = ellipsoid(near, -0.10, a.dome_y - 0.36, 0.60, 0.40, 0.10)
    back = ellipsoid(near, 0.24, a.dome_y - 0.26, 0.26, 0.44, 0.08)
    trunk[window] -= torch.minimum(torch.maximum(front, back), 0.5 * trunk[window])
    return trunk


def _trunk_ap(a: SpineAnatomy, rays: Rays) -> Tensor:
    """Thickness of soft tissue from front to back, with liver and psoas, without the lungs' share."""
    u = rays.x * each(1 / a.trunk_width)
    hips = ((rays.y - 0.55) * (1 / 0.5)).clamp(0, 1)
    trunk = half_chord(u * u * (0.35 + 0.65 * u * u)) * (0.80 + 0.12 * hips) * each(a.trunk_depth)
    soft, lung = trunk.clone(), torch.zeros_like(trunk)
    window, near = rays.zone(-0.72, 0.0, a.dome_y - 0.14, a.dome_y + 0.42)
    liver = ellipsoid(near, -0.36, a.dome_y + 0.14, 0.36, 0.28, 0.5)
    soft[window] += 0.07 * liver * liver  # squared, it thins out towards its rim
    for sign, lower in ((-1.0, 0.0), (1.0, 0.02)):
        window, near = rays.zone(0.0, 0.34, 0.18, 1.0, sign)
        psoas = ellipsoid(near, 0.12, 0.62, 0.085, 0.36, 0.5, -0.20)
        soft[window] += 0.05 * psoas * psoas
        window, near = rays.zone(0.0, 0.56, bottom=a.dome_y + lower, sign=sign)
        projection.raise_to(lung, window, ellipsoid(near, 0.28, a.dome_y + lower - 0.40, 0.28, 0.40, 0.09))
    return soft - torch.minimum(lung, 0.6 * soft)


def _gas(a: SpineAnatomy, rays: Rays) -> _Solids:
    """Gas in stomach and bowel: loops of which some are empty."""
    lateral = a._lateral
    for k in range(N_GAS):
        across, down, size, shape = a.gas[:, k].unbind(1)
        if lateral:
            x, y = -0.34 + 0.07 * across, 0.34 + 0.055 * k + 0.05 * down
        else:
            side = 1.0 if k % 2 else -1.0
            x, y = side * (0.36 - 0.02 * (k // 2)) + 0.09 * across, 0.24 + 0.07 * k + 0.08 * down
        width = (0.034 + 0.030 * size).clamp(min=0.004)
        height = width * (1 + 0.3 * shape)
        window, near = rays.zone(x - width, x + width, y - height, y + height)
        u, v = (near.x - each(x)) * each(1 / width), (near.y - each(y)) * each(1 / height)
        mottle = torch.cos(4 * u + each(4 * shape)) * torch.cos(4 * v + each(4 * across))
        gas = half_chord(u * u + v * v)
        yield window, gas * gas * (1 + 0.3 * mottle) * each(1.8 * width)


def _waves(a: SpineAnatomy, rays: Rays) -> Tensor:
    """Waves of fat and muscle: a factor near 1 on the thickness of soft tissue."""
    waves = torch.ones_like(rays.x)
    for number, (fx, fy, px, py) in enumerate(a.tissue.permute(1, 2, 0)):
        across = torch.cos(rays.x[:, :1, :] * each(4 * fx + 9 + 11 * number) + each(3 * px))
        down = torch.cos(rays.y[:, :, :1] * each(4 * fy + 8 + 10 * number) + each(3 * py))
        waves = waves + (0.007 * across) * down
    return waves


def _check_raters(kappa: float, n_raters: int) -> None:
    if isinstance(n_raters, bool) or not isinstance(n_raters, int) or n_raters < 2:
        raise ValueError(f"n_raters: expected a whole number of at least 2, got {n_raters!r}")
    if not 0.6 <= kappa <= 0.9:
        raise ValueError(f"kappa: expected a number from 0.6 to 0.9, got {kappa!r}")


_GRADES = np.arange(len(THRESHOLDS) + 1)
_SEVERITIES = (np.arange(4000) + 0.5) / 4000  # stand for all, as they are drawn: uniform in [0, 1]
_BIAS = 0.15  # of the mildest and of the strictest rater, in units of a rater's noise


def _at_most(noise: float, n_raters: int) -> np.ndarray:
    """Probability (raters, severities, 5) that a rater's grade is at most 0 to 4."""
    bias = np.linspace(-_BIAS, _BIAS, n_raters)[:, None, None]
    below = ndtr((np.array(THRESHOLDS) - _SEVERITIES[:, None]) / noise - bias)
    return np.concatenate([below, np.ones_like(below[..., :1])], axis=2)


def _agreement(joint: np.ndarray) -> float:
    """Quadratic weighted kappa of a joint distribution (5, 5) of two grades."""
    distance = (_GRADES[:, None] - _GRADES) ** 2
    by_chance = joint.sum(1)[:, None] * joint.sum(0)
    return float(1 - (joint * distance).sum() / (by_chance * distance).sum())


def _noise(kappa: float, n_raters: int) -> float:
    """Solve for the noise, in units of severity, that makes raters agree with `kappa` on average."""
    def excess(noise: float) -> float:
        chance = np.diff(_at_most(noise, n_raters), axis=2, prepend=0)
        pairs = [_agreement(chance[i].T @ chance[j] / len(_SEVERITIES))
                 for i in range(n_raters) for j in range(i)]
        return float(np.mean(pairs)) - kappa

    return float(brentq(excess, 0.01, 1.0))


def simulate_raters(severity: Tensor, kappa: float = 0.8, n_raters: int = 3, seed: int = 0) -> Tensor:
    """Let raters grade spines: each sees the severity through noise and leans a little to one side.

    Parameters
    ----------
    severity : Tensor
        (N,) in [0, 1], uniform as `sample_spines` draws it.
    kappa : float, default 0.8
        Quadratic weighted kappa between two raters, averaged over the pairs; from 0.6 to 0.9, which is what
        radiologists reach.
    n_raters : int, default 3
        At least 2.
    seed : int, default 0
        Says who is strict and draws the noise.

    Returns
    -------
    Tensor
        (N, n_raters) int64 grades, 0 to 4. The first rows do not depend on how many follow.

    Raises
    ------
    ValueError
        For a kappa or a number of raters out of range, or a severity outside [0, 1].
    """
    _check_raters(kappa, n_raters)
    seen = severity.detach().cpu().double().numpy()
    if seen.ndim != 1 or not ((seen >= 0) & (seen <= 1)).all():
        raise ValueError(f"severity: expected (N,) numbers from 0 to 1, got the shape {seen.shape}"
                         + (f", {seen.min():.3g} to {seen.max():.3g}" if seen.size else ""))
    generator = np.random.default_rng(seed)
    bias = generator.permutation(np.linspace(-_BIAS, _BIAS, n_raters))
    off = bias + generator.standard_normal((len(seen), n_raters))
    return torch.from_numpy(np.digitize(seen[:, None] + _noise(kappa, n_raters) * off, THRESHOLDS))


def consensus(grades: Tensor) -> Tensor:
    """Median (N,) of the grades (N, n_raters); of an even number the lower middle one."""
    return grades.median(dim=1).values


def rater_ceiling(kappa: float = 0.8) -> float:
    """Quadratic weighted kappa of one who knows the severity, against the consensus of three raters.

    Parameters
    ----------
    kappa : float, default 0.8
        Agreement of two raters, as in `simulate_raters`.

    Returns
    -------
    float
        No grader that sees only the film can be expected to do better.

    Raises
    ------
    ValueError
        For a kappa out of range.

    Notes
    -----
    The distribution of the median of three follows from those of the raters, P(at most g) being
    F1 F2 + F1 F3 + F2 F3 - 2 F1 F2 F3. Kappa is a ratio: where both means are 2, by symmetry, the grades that
    make it greatest are 2 + (E[consensus | severity] - 2) / kappa, rounded, which is solved by repetition
    (Dinkelbach 1967).
    """
    _check_raters(kappa, 3)
    first, second, third = _at_most(_noise(kappa, 3), 3)
    median = first * second + first * third + second * third - 2 * first * second * third
    chance = np.diff(median, axis=1, prepend=0)
    expected = chance @ _GRADES
    ceiling = 1.0
    for _ in range(20):
        best = np.rint(2 + (expected - 2) / ceiling).clip(0, 4).astype(int)
        ceiling = _agreement(np.eye(5)[best].T @ chance / len(_SEVERITIES))
    return ceiling
