"""Chest X-rays drawn from known anatomy: sample bodies, project them, keep the truth.

A frontal film as the viewer sees it: the patient's right is on the left. Lengths are in image sides of
a nominal body, angles in radians, clockwise for the viewer. Fields of shape (N, 2) hold the patient's right
side first. Everything here is generated; nothing is a film of a person.

Every solid is drawn only in the zone of the films where it lies. It is exactly 0 outside its zone, so that
the size of the zone, which depends on the other chests of the batch, changes no pixel.
"""

# ruff: noqa: RUF009 - `vary` and `given` only wrap `dataclasses.field`

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from genailab_helpers.phantoms import projection
from genailab_helpers.phantoms.anatomy import Anatomy, draw_batches, draw_fields, given, vary
from genailab_helpers.phantoms.projection import Rays, Window, each, ellipsoid, half_chord
from genailab_helpers.radiographs import check_img_size

FINDINGS = ("Normal", "Pneumonia", "COVID", "Lung_Opacity", "Viral Pneumonia")
CONFOUNDERS = ("marker", "text", "border", "collimation", "exposure")
STRUCTURES = ("body", "right_lung", "left_lung", "heart", "mediastinum", "aorta", "trachea", "vessels",
              "ribs_posterior", "ribs_anterior", "clavicles", "scapulae", "spine", "diaphragm",
              "stomach_bubble")

FILM_SIDE_CM = 38.0
SOFT = 0.19 * FILM_SIDE_CM  # attenuation of soft tissue an image side, about 70 keV (NIST XCOM: 0.19 / cm)
BONE_EXCESS = 0.34 * FILM_SIDE_CM  # mixed cortical and spongy bone above soft tissue
N_BLOBS = 6
N_WAVES = 3
BRANCHES, LEVELS = 5, 4
_FINEST = 96  # smaller films are drawn at a multiple of their size and averaged, so that thin things stay


@dataclass(frozen=True)
class ChestAnatomy(Anatomy):
    """A batch of N chests, every field a tensor whose first axis is N.

    The distributions stand beside the fields: mean and standard deviation in image sides or radians, cut at
    2.2 standard deviations. Use `changed` to move something, and indexing to take some of the chests.
    """

    # how the body stands before the detector
    shift_x: Tensor = vary(0.0, 0.022)
    shift_y: Tensor = vary(0.038, 0.030)
    magnification: Tensor = vary(1.11, 0.16)
    rotation: Tensor = vary(0.0, 0.035)
    bend: Tensor = vary(0.0, 0.05)  # sideways curve of the trunk
    turn: Tensor = vary(0.0, 0.008)  # about the long axis: what lies in front moves sideways
    # trunk, neck, arms
    trunk_width: Tensor = vary(0.545, 0.050)  # half of it
    trunk_depth: Tensor = vary(0.23, 0.04)  # half of it
    shoulder_y: Tensor = vary(0.327, 0.03)
    neck_width: Tensor = vary(0.146, 0.02)
    arm_angle: Tensor = vary(0.05, 0.17, 2)
    arm_width: Tensor = vary(0.088, 0.013)
    breast_y: Tensor = vary(0.560, 0.025)
    breast: Tensor = vary(0.01, 0.035)  # thickness; below 0 means none
    muscle: Tensor = vary(0.029, 0.01)  # thickness over shoulder blade and flank
    tissue: Tensor = vary(0.0, 1.0, N_WAVES, 4)  # waves of fat and muscle
    # lungs and diaphragm
    lung_width: Tensor = vary((0.177, 0.153), 0.011, 2)  # half of it
    lung_depth: Tensor = vary(0.154, 0.011)  # half of it
    apex_y: Tensor = vary(0.103, 0.012, 2)
    lung_density: Tensor = vary(0.25, 0.04)  # share of soft tissue in the lung
    diaphragm_y: Tensor = vary(0.63, 0.03)  # top of the right dome
    dome_drop: Tensor = vary(0.014, 0.006)  # how much lower the left one stands
    dome_height: Tensor = vary(0.205, 0.020, 2)
    # heart and great vessels
    heart_x: Tensor = vary(0.062, 0.010)
    heart_y: Tensor = vary(0.590, 0.015)
    heart_width: Tensor = vary(0.19, 0.013)  # half of its long axis
    heart_height: Tensor = vary(0.113, 0.009)  # half of its short axis
    heart_angle: Tensor = vary(0.88, 0.10)
    mediastinum_width: Tensor = vary(0.055, 0.006)
    arch_x: Tensor = vary(0.043, 0.006)
    arch_radius: Tensor = vary(0.031, 0.005)
    trachea_width: Tensor = vary(0.0165, 0.0015)  # half of it
    trachea_tilt: Tensor = vary(0.02, 0.02)
    vessel_width: Tensor = vary(1.0, 0.12)
    vessel_bend: Tensor = vary(0.0, 1.0, 2, BRANCHES * (2**LEVELS - 1), 2)  # direction and length of each
    # bones
    cage_width: Tensor = vary(0.324, 0.015)
    rib_y: Tensor = vary(0.158, 0.010, 2)
    rib_spacing: Tensor = vary(0.0645, 0.0030)
    rib_drop: Tensor = vary(0.09, 0.018)
    rib_radius: Tensor = vary(0.012, 0.0010)
    rib_wave: Tensor = vary(0.0, 1.0, 2)
    clavicle_y: Tensor = vary(0.19, 0.012, 2)
    clavicle_rise: Tensor = vary(0.075, 0.025, 2)
    clavicles: Tensor = vary(1.3, 0.0)  # 0 leaves them out
    scapula_x: Tensor = vary(0.35, 0.022, 2)
    scapula_angle: Tensor = vary(0.22, 0.08, 2)
    spine: Tensor = vary(0.5, 0.0)  # 0 leaves it out
    spine_width: Tensor = vary(0.041, 0.003)
    vertebra_height: Tensor = vary(0.05, 0.002)
    vertebra_y: Tensor = vary(0.0, 0.02)
    bone_density: Tensor = vary(0.88, 0.28)
    # gas below the diaphragm
    bubble_x: Tensor = vary(0.115, 0.025)
    bubble_y: Tensor = vary(0.055, 0.018)  # below the left dome
    bubble_width: Tensor = vary(0.022, 0.016)
    # X-ray tube, detector, display
    kilovolt: Tensor = vary(1.0, 0.08)  # scales all attenuation; softer beams have more contrast
    quanta: Tensor = vary(90000.0, 30000.0)
    scatter: Tensor = vary(0.45, 0.17)
    focal_blur: Tensor = vary(0.035, 0.015)
    window: Tensor = vary(3.0, 0.52)
    contrast: Tensor = vary(0.92, 0.24)
    brightness: Tensor = vary(0.0, 0.08)
    # the finding, and what does not belong to the patient
    lesion: Tensor = vary(0.0, 1.0, N_BLOBS, 5)
    severity: Tensor = given()  # (N,) in (0, 1]
    finding: Tensor = given()  # (N,) int64, place in FINDINGS
    confounders: Tensor = given()  # (N, 5) bool, in the order of CONFOUNDERS


@dataclass(frozen=True)
class ChestRender:
    """What `render_chests` returns.

    Parameters
    ----------
    images : Tensor
        (N, 1, H, W) float32 in [-1, 1].
    labels : Tensor
        (N,) int64, place in FINDINGS.
    masks : dict of str to Tensor
        (N, H, W) bool for each of STRUCTURES, for "lesion" and for each of "marker", "text", "border" and
        "collimation"; empty unless masks were asked for.
    """

    images: Tensor
    labels: Tensor
    masks: dict[str, Tensor]


def sample_chests(n_samples: int, seed: int = 0,
                  finding: str | Sequence[str] | Mapping[str, float] = "Normal",
                  confounders: Mapping[str, float | Mapping[str, float]] | None = None) -> ChestAnatomy:
    """Draw the anatomy of chests at random.

    Parameters
    ----------
    n_samples : int
        Number of chests, at least 1. Chest i depends on `seed` and i alone, so 10 chests are the first ten of
        1,000.
    seed : int, default 0
        At least 0.
    finding : str, sequence of str or mapping of str to float, default "Normal"
        One of FINDINGS, or several, of which each chest gets one with equal chance, or with a chance in
        proportion to the numbers of a mapping.
    confounders : mapping, optional
        How often a film carries what does not belong to the patient: for a name in CONFOUNDERS a rate in
        [0, 1], or a mapping from finding to rate (0 for findings that are not named). Default: never.

    Returns
    -------
    ChestAnatomy
        With `severity` uniform in [0.05, 1]: the lowest are barely visible.

    Raises
    ------
    ValueError
        For an unknown finding or confounder, a rate outside [0, 1], or numbers out of range.
    """
    findings = [finding] if isinstance(finding, str) else list(finding)
    if not findings or any(f not in FINDINGS for f in findings):
        raise ValueError(f"finding: expected one or several of {', '.join(FINDINGS)}; got {finding!r}")
    weights = np.array([finding[f] if isinstance(finding, Mapping) else 1.0 for f in findings])
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(f"finding: expected numbers of at least 0, not all 0; got {finding!r}")
    rates = _confounder_rates(confounders or {})
    fields, uniform = draw_fields(ChestAnatomy, n_samples, seed, 2 + len(CONFOUNDERS))
    ends = (weights / weights.sum()).cumsum()[:-1]
    classes = np.array([FINDINGS.index(f) for f in findings])[np.searchsorted(ends, uniform[:, 0], "right")]
    return ChestAnatomy(
        **fields, severity=torch.from_numpy(0.05 + 0.95 * uniform[:, 1]).float(),
        finding=torch.from_numpy(classes),
        confounders=torch.from_numpy(uniform[:, 2:] < rates[classes]))


class Hospital(NamedTuple):
    """Where films come from: whom it sees, and how it takes and marks its films.

    Attributes
    ----------
    finding : mapping of str to float
        How common each finding is, as `sample_chests` takes it.
    confounders : mapping of str to float
        How often a film carries each confounder, whatever its finding.
    shifts : mapping of str to float
        Added to fields of `ChestAnatomy`: another machine, another taste.
    """

    finding: Mapping[str, float]
    confounders: Mapping[str, float]
    shifts: Mapping[str, float]


HOSPITALS = {
    "A": Hospital({"Normal": 40, "COVID": 20, "Lung_Opacity": 20, "Viral Pneumonia": 20},
                  {"text": 0.5, "exposure": 0.1}, {}),
    "B": Hospital({"Normal": 70, "COVID": 10, "Lung_Opacity": 10, "Viral Pneumonia": 10},
                  {"border": 0.8, "exposure": 0.8, "collimation": 0.3},
                  {"window": 0.5, "contrast": -0.15, "scatter": 0.1, "focal_blur": 0.3}),
}


def sample_hospital(n_samples: int, hospital: str | Hospital, seed: int = 0) -> ChestAnatomy:
    """Draw the patients of a hospital, others than those of another hospital; else as `sample_chests`.

    Parameters
    ----------
    hospital : str or Hospital
        One of HOSPITALS, whose patients differ in nothing but how often they are ill and how the film is
        taken; or another one.

    Returns
    -------
    ChestAnatomy
        N chests.
    """
    if isinstance(hospital, str):
        if hospital not in HOSPITALS:
            raise ValueError(f"hospital={hospital!r}: expected one of {', '.join(HOSPITALS)}, or a Hospital")
        seed += 1_000_000 * list(HOSPITALS).index(hospital)  # nobody is a patient of two hospitals
        hospital = HOSPITALS[hospital]
    chests = sample_chests(n_samples, seed, hospital.finding, hospital.confounders)
    return chests.changed(**{name: getattr(chests, name) + by for name, by in hospital.shifts.items()})


def _confounder_rates(confounders: Mapping[str, float | Mapping[str, float]]) -> np.ndarray:
    """Return the (findings, confounders) table of rates."""
    table = np.zeros((len(FINDINGS), len(CONFOUNDERS)))
    for name, rate in confounders.items():
        if name not in CONFOUNDERS:
            raise ValueError(f"confounders: expected names among {', '.join(CONFOUNDERS)}; got {name!r}")
        by_finding = rate if isinstance(rate, Mapping) else dict.fromkeys(FINDINGS, rate)
        for finding, share in by_finding.items():
            if finding not in FINDINGS:
                raise ValueError(f"confounders[{name!r}]: expected findings among {', '.join(FINDINGS)}; "
                                 f"got {finding!r}")
            if not 0 <= share <= 1:
                raise ValueError(f"confounders[{name!r}]: expected a rate from 0 to 1, got {share!r}")
            table[FINDINGS.index(finding), CONFOUNDERS.index(name)] = share
    return table


def render_chests(anatomy: ChestAnatomy, img_size: int = 128, masks: bool = False,
                  batch_size: int = 16) -> ChestRender:
    """Project chests to films.

    Parameters
    ----------
    anatomy : ChestAnatomy
        N chests.
    img_size : int, default 128
        Side of the square films in pixels, at least 16.
    masks : bool, default False
        Whether to return where each structure and lesion lies.
    batch_size : int, default 16
        Chests drawn at a time by each thread; bounds the memory and keeps the work in the processor's cache,
        and changes no pixel.

    Returns
    -------
    ChestRender
        Images, labels and masks. Images are differentiable with respect to the fields of `anatomy`.

    Raises
    ------
    ValueError
        If `img_size` is not a whole number of at least 16.
    """
    check_img_size(img_size)
    images, truth = draw_batches(anatomy, lambda batch: _render(batch, img_size, masks), batch_size)
    return ChestRender(images, anatomy.finding, truth)


def _render(anatomy: ChestAnatomy, img_size: int, masks: bool) -> tuple[Tensor, dict[str, Tensor]]:
    finer = -(-_FINEST // img_size)
    line_integral, lengths = trace(anatomy, img_size * finer, masks)
    a = anatomy
    if finer > 1:
        line_integral = functional.avg_pool2d(line_integral[:, None], finer)[:, 0]
    noise = projection.quantum_noise(a.keys, img_size).to(line_integral)
    overexposed = a.confounders[:, CONFOUNDERS.index("exposure")].float()
    quanta = a.quanta * (1 - 0.6 * overexposed)
    signal = projection.expose(line_integral, noise, quanta, a.scatter, a.focal_blur)
    high = projection.quantile(signal, 0.90)
    low = high - a.window
    shift = (high - low) * (a.brightness + 0.25 * overexposed)
    images = projection.display(signal, low - shift, high - shift, a.contrast)
    stamps = _stamps(a, img_size) if masks or bool(a.confounders.any()) else {}
    for name, (where, value) in stamps.items():
        # a stamp went through the same detector: its edges are as soft as a pixel
        cover = projection.blur(where.float(), 0.15) if name in ("marker", "text") else where.float()
        images = images + cover * (value - images)
    truth = {}
    if masks:
        for name, length in lengths.items():
            share = (length > 0).float()
            truth[name] = (functional.avg_pool2d(share[:, None], finer)[:, 0] if finer > 1 else share) >= 0.5
        truth |= {name: where for name, (where, _) in stamps.items()}
    return images[:, None], truth


def trace(anatomy: ChestAnatomy, img_size: int,
          with_lengths: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Follow every ray through N chests.

    Parameters
    ----------
    anatomy : ChestAnatomy
        N chests.
    img_size : int
        Side of the films in pixels.
    with_lengths : bool, default True
        Whether to return the path lengths of the single structures.

    Returns
    -------
    line_integral : Tensor
        (N, H, W) sum of path length times attenuation coefficient.
    lengths : dict of str to Tensor
        (N, H, W) path length in each of STRUCTURES, exactly 0 where the ray misses it, and in "lesion", whose
        extent does not depend on its severity; empty unless asked for.
    """
    a = anatomy
    rays = projection.cast_rays(a.shift_x, a.shift_y, a.magnification, a.rotation, img_size)
    curve = rays.y - 0.5
    rays = rays.moved(curve * curve * each(a.bend))
    blank = torch.zeros_like(rays.x)
    lengths: dict[str, Tensor] = {}

    def keep(name: str, window: Window, solid: Tensor) -> None:
        if with_lengths:
            projection.raise_to(lengths.setdefault(name, blank.clone()), window, solid)

    # what takes the lungs' room, and the bones and soft tissue on each side of the body
    trunk = _trunk(a, rays)
    outline = trunk.clone()
    flesh, displaced, lung, bone = (blank.clone() for _ in range(4))
    projection.raise_to(outline, *_neck(a, rays))
    for name, (window, solid) in _centre(a, rays).items():
        keep(name, window, solid)
        projection.raise_to(displaced, window, solid)
    for side in (0, 1):
        for window, solid in _flesh(a, rays, side):
            flesh[window] += solid
        window, arm, humerus = _arm(a, rays, side)
        projection.raise_to(outline, window, arm)
        bone[window] += humerus
        window, above, dome = _lung(a, rays, side)
        aerated = (above - displaced[window] - dome).clamp(min=0)
        lung[window] += aerated
        keep(("right_lung", "left_lung")[side], window, aerated)
        keep("diaphragm", window, dome)
        window, posterior, anterior = _ribs(a, rays, side)
        bone[window] += 0.85 * posterior + 0.45 * anterior
        keep("ribs_posterior", window, posterior)
        keep("ribs_anterior", window, anterior)
        for name, draw in (("clavicles", _clavicle), ("scapulae", _scapula)):
            window, solid = draw(a, rays, side)
            bone[window] += solid
            keep(name, window, solid)
    window, spine = _spine(a, rays)
    bone[window] += spine
    keep("spine", window, spine)

    body = (outline + flesh * _inside(trunk)) * _waves(a, rays)
    vessels = blank
    for level in _vessel_segments(a):
        vessels = vessels + _draw(a, level, img_size)  # `sum` would add in another order for other batches
    vessels = torch.minimum(vessels, lung)
    air = 1 - each(a.lung_density)
    soft = body - (lung - vessels) * air - _bronchi(a, img_size)
    for name, (window, gas) in (("trachea", _trachea(a, rays)), ("stomach_bubble", _bubble(a, rays))):
        solid = torch.minimum(gas, body[window])
        soft[window] -= solid
        keep(name, window, solid)
    everywhere = (slice(None),) * 3
    keep("body", everywhere, body)
    keep("vessels", everywhere, vessels)
    keep("lesion", everywhere, blank)
    if bool((a.finding != FINDINGS.index("Normal")).any()):
        window, extent, density = _lesion(a, rays, lung)
        soft[window] += density * lung[window] * air
        keep("lesion", window, extent)
    bone = bone * each(BONE_EXCESS * a.bone_density * a.kilovolt)
    return soft.clamp(min=0) * each(SOFT * a.kilovolt) + bone, lengths


_SIGN = (-1.0, 1.0)  # the patient's right side is on the viewer's left


def _inside(solid: Tensor) -> Tensor:
    """Return 1 inside a solid and 0 outside; comparing would be three times slower."""
    return (solid.detach() * 1e6).clamp(max=1)


def _trunk(a: ChestAnatomy, rays: Rays) -> Tensor:
    """Trunk with sloping shoulders: thickness of soft tissue."""
    rise = (each(a.shoulder_y / 0.26) - rays.y * (1 / 0.26)).clamp(min=0)
    rise = rise * rise
    taper = 1 - (rays.y - 0.35).clamp(0, 0.6) * (0.20 / 0.6)
    across = rays.x / (taper * each(a.trunk_width))
    across = across * across
    # a cross-section is flatter than an ellipse, and the skin over the shoulders turns quickly
    outline = across * (0.30 + 0.70 * across) + rise * (0.4 + 0.6 * rise)
    thinner = (0.70 + 0.30 / 0.45 * (rays.y - 0.10)).clamp(0.70, 1)  # shoulders are flatter than the chest
    return half_chord(outline * outline) * thinner * each(2 * a.trunk_depth)


def _neck(a: ChestAnatomy, rays: Rays) -> tuple[Window, Tensor]:
    """Neck, which widens into the shoulders."""
    reach = a.neck_width + 2.6 * 0.25**2
    window, rays = rays.zone(-reach, reach, bottom=0.35)
    slope = (rays.y - 0.02).clamp(0, 0.25)
    across = rays.x / (each(a.neck_width) + 2.6 * slope * slope)
    below = (rays.y - 0.25).clamp(min=0) * (1 / 0.10)
    return window, half_chord(across * across + below * below) * 0.30


def _flesh(a: ChestAnatomy, rays: Rays, side: int) -> list[tuple[Window, Tensor]]:
    """Breast, and muscle over shoulder blade and flank."""
    window, near = rays.zone(0.05, 0.35, a.breast_y - 0.13, a.breast_y + 0.13, _SIGN[side])
    breast = ellipsoid(near, 0.20, a.breast_y, 0.15, 0.13, 0.5)
    flesh = [(window, breast * breast * each(a.breast.clamp(min=0)))]  # squared, it thins out towards its rim
    window, near = rays.zone(0.17, 0.49, 0.12, 0.68, _SIGN[side])
    muscle = ellipsoid(near, 0.33, 0.40, 0.15, 0.28, 0.5, 0.15)
    return [*flesh, (window, muscle * muscle * each(a.muscle))]


def _arm(a: ChestAnatomy, rays: Rays, side: int) -> tuple[Window, Tensor, Tensor]:
    """Upper arm, a tube with a round upper end, and the bone in it."""
    x, y, angle = a.trunk_width - 0.045, a.shoulder_y - 0.07, a.arm_angle[:, side]
    inner = x - a.arm_width + 2 * angle.clamp(max=0)
    window, rays = rays.zone(inner, np.inf, y - a.arm_width, np.inf, _SIGN[side])
    out, down = rays.x - each(x), rays.y - each(y)
    cos, sin = each(torch.cos(angle)), each(torch.sin(angle))
    off, along = out * cos - down * sin, (out * sin + down * cos).clamp(max=0)
    squared = off * off + along * along
    arm = half_chord(squared * each(1 / a.arm_width**2)) * each(2 * a.arm_width)
    bone = half_chord(squared * (1 / 0.022**2)) * 0.044 - half_chord(squared * (1 / 0.013**2)) * 0.026
    return window, arm, bone


def _waves(a: ChestAnatomy, rays: Rays) -> Tensor:
    """Waves of fat and muscle: a factor near 1 on the thickness of soft tissue."""
    waves = torch.ones_like(rays.x)
    for fx, fy, px, py in a.tissue.permute(1, 2, 0):
        across = torch.cos(rays.x[:, :1, :] * each(5 * fx + 12) + each(3 * px))
        down = torch.cos(rays.y[:, :, :1] * each(5 * fy + 9) + each(3 * py))
        waves = waves + (0.018 * across) * down
    return waves


def _lung(a: ChestAnatomy, rays: Rays, side: int) -> tuple[Window, Tensor, Tensor]:
    """Path length through one lung before heart and diaphragm take their room, and below its dome.

    The dome is half an ellipsoid on an upright column.
    """
    width, centre_y = a.lung_width[:, side], 0.62
    outer = torch.maximum(2 * width + 0.012, torch.full_like(width, 0.35))
    window, rays = rays.zone(0.0, outer, a.apex_y[:, side], np.inf, _SIGN[side])
    dx = rays.x * each(1 / width) - each(1 + 0.012 / width)
    dy = (rays.y - centre_y) * each(1 / (centre_y - a.apex_y[:, side]))
    dy = dy * dy
    lung = half_chord(dx * dx + dy * (0.85 + 0.15 * dy)) * each(2 * a.lung_depth)
    height = a.dome_height[:, side]
    dx = rays.x * (1 / 0.205) - 0.145 / 0.205
    dy = (rays.y * each(1 / height) - each((a.diaphragm_y + a.dome_drop * side) / height + 1)).clamp(max=0)
    own_side = _inside(rays.x.clamp(min=0))
    return window, lung, half_chord(dx * dx + dy * dy) * own_side * 0.60


def _centre(a: ChestAnatomy, rays: Rays) -> dict[str, tuple[Window, Tensor]]:
    """Heart, mediastinum and aorta."""
    long, turn = torch.maximum(a.heart_width, a.heart_height), a.turn
    window, near = rays.zone(torch.minimum(a.heart_x - long, -0.030 - 0.42 * a.heart_width) + turn,
                             a.heart_x + long + turn, a.heart_y - torch.maximum(long, long * 0 + 0.105),
                             a.heart_y + torch.maximum(long, long * 0 + 0.065))
    ventricles = ellipsoid(near, a.heart_x + turn, a.heart_y, a.heart_width, a.heart_height, 0.135,
                           a.heart_angle)
    right_atrium = ellipsoid(near, turn - 0.030, a.heart_y - 0.020, a.heart_width * 0.42, 0.085, 0.12)
    centre = {"heart": (window, torch.maximum(ventricles, right_atrium))}

    reach = torch.maximum(a.mediastinum_width * 1.1, turn * 0 + 0.095) + turn.abs()
    window, near = rays.zone(-reach, reach, 0.02, 0.55)
    near = near.moved(each(turn))
    upper = ellipsoid(near, 0.0, 0.26, a.mediastinum_width * 1.1, 0.24, 0.10)
    hila = ellipsoid(Rays(near.x.abs(), near.y), 0.045, 0.415, 0.035, 0.055, 0.05)
    outflow = ellipsoid(near, 0.048, 0.43, 0.046, 0.115, 0.10)
    centre["mediastinum"] = (window, torch.maximum(torch.maximum(upper, outflow), hila))

    reach = a.arch_radius.clamp(min=0.035) + turn.abs()
    window, near = rays.zone(a.arch_x - reach, a.arch_x + reach, 0.285 - 1.15 * reach, 0.85)
    arch = ellipsoid(near, a.arch_x + turn, 0.285, a.arch_radius, a.arch_radius * 1.15, a.arch_radius * 2.2)
    descending = ellipsoid(near, a.arch_x - 0.006 - turn, 0.55, 0.022, 0.30, 0.022)
    return centre | {"aorta": (window, torch.maximum(arch, descending))}


_CARINA = 0.345


def _trachea(a: ChestAnatomy, rays: Rays) -> tuple[Window, Tensor]:
    """Trachea down to the carina."""
    reach = 0.01 + a.trachea_width + a.turn.abs() + a.trachea_tilt.abs()
    window, rays = rays.zone(-reach, reach, bottom=_CARINA + 0.012)
    dx = rays.x + (_CARINA - rays.y) * each(a.trachea_tilt) + each(a.turn - 0.004)
    dx = dx * each(1 / a.trachea_width)
    dy = (rays.y - _CARINA).clamp(min=0) / 0.012
    return window, half_chord(dx * dx + dy * dy) * each(2 * a.trachea_width)


def _bronchi(a: ChestAnatomy, img_size: int) -> Tensor:
    """Return the two main bronchi."""
    ends = torch.tensor([[0.0, _CARINA, -0.050, 0.405, 0.013], [0.0, _CARINA, 0.062, 0.400, 0.012]],
                        device=a.turn.device, dtype=a.turn.dtype)
    return 0.8 * _draw(a, ends.expand(len(a), 2, 5), img_size)


def _bubble(a: ChestAnatomy, rays: Rays) -> tuple[Window, Tensor]:
    """Gas in the stomach."""
    y, width = a.diaphragm_y + a.dome_drop + a.bubble_y, a.bubble_width.clamp(min=0.004)
    window, rays = rays.zone(a.bubble_x - width, a.bubble_x + width, y - width, y + width)
    return window, ellipsoid(rays, a.bubble_x, y, width, width * 0.65, width * 1.2)


def _draw(a: ChestAnatomy, segments: Tensor, img_size: int) -> Tensor:
    return projection.draw_segments(segments, img_size, a.magnification, a.shift_x, a.shift_y, a.rotation)


def _vessel_segments(a: ChestAnatomy) -> list[Tensor]:
    """Grow both lungs' vessels from the hila: five stems each, every one splitting in two at each level."""
    n = len(a)
    bend = a.vessel_bend
    segments, used = [], 0
    stem_angle = torch.tensor([-1.15, -0.45, 0.25, 0.85, 1.35], device=bend.device)  # 0 is outwards
    angle = stem_angle.expand(n, 2, BRANCHES)
    sign = torch.tensor([-1.0, 1.0], device=bend.device)[:, None]
    x = (0.052 * sign).expand(n, 2, BRANCHES)
    y = torch.tensor([0.425, 0.405], device=bend.device)[:, None].expand(n, 2, BRANCHES)
    length, radius = 0.085, 0.0160
    for level in range(LEVELS):
        count = angle.shape[2]
        jitter = bend[:, :, used:used + count]
        used += count
        angle = angle + (0.16 if level == 0 else 0.22) * jitter[..., 0]
        reach = length * (1 + 0.18 * jitter[..., 1])
        end_x, end_y = x + sign * reach * torch.cos(angle), y + reach * torch.sin(angle)
        width = (radius * a.vessel_width)[:, None, None].expand(n, 2, count)
        segments.append(torch.stack([x, y, end_x, end_y, width], dim=-1).flatten(1, 2))
        fork = torch.tensor([-0.42, 0.36], device=bend.device)
        angle = (angle[..., None] + fork).flatten(2)
        x, y = end_x.repeat_interleave(2, dim=2), end_y.repeat_interleave(2, dim=2)
        length, radius = length * 0.80, radius * 0.66
    return segments


def _ribs(a: ChestAnatomy, rays: Rays, side: int) -> tuple[Window, Tensor, Tensor]:
    """Posterior and anterior arcs of one side.

    A pair of ribs is a ring in a tilted plane: x = w sin(psi), y = y_k + h (1 - cos(psi)), z = d cos(psi),
    with psi = 0 at the spine. Seen from the front, the pixel's x tells psi up to front or back, and its y
    then tells how far the nearest ring is; so all ribs are drawn at once.
    """
    start, drop, depth = a.rib_y[:, side], a.rib_drop[:, None, None], 0.19
    lowest = start + 9 * a.rib_spacing + 2 * a.rib_drop.clamp(min=0) + 0.15
    window, rays = rays.zone(0.028, a.cage_width, bottom=lowest, sign=_SIGN[side])
    upward = ((0.62 - rays.y) * (1 / 0.56)).clamp(min=0)
    upward = upward * upward
    taper = half_chord(upward * (0.45 + 0.55 * upward)).clamp(min=0.2)  # the cage narrows towards the apex
    width = taper * each(a.cage_width)
    sine = rays.x / width
    sine = sine * sine  # only the squares are needed
    cosine = half_chord(sine)
    run = width * cosine
    in_film = run * run + drop * drop * sine + 1e-9
    obliquity = (1 + (depth * depth) * sine / in_film).clamp(max=1.7**2).sqrt()
    across = width * cosine.clamp(min=0.12) / in_film.sqrt()  # from heights to distances
    beside_spine = (rays.x * (1 / 0.012) - 0.028 / 0.012).clamp(0, 1)
    chord = obliquity * beside_spine * _inside((0.999 - sine).clamp(min=0)) * each(2 * a.rib_radius)
    height = (rays.y - each(start)) * each(1 / a.rib_spacing)
    drop = drop / a.rib_spacing[:, None, None]
    arcs = []
    for sign, thicker in ((-1.0, 1.0), (1.0, 1.12)):
        number = height - drop * (1 + sign * cosine)
        number = number + 0.10 * torch.cos(number * 1.9 + each(a.rib_wave[:, 0]))
        nearest = number.detach().round().clamp(0, 9)
        distance = (number - nearest) * across * each(a.rib_spacing / (a.rib_radius * thicker))
        distance = distance * distance
        # bone around marrow
        hollow = half_chord(distance) - (0.7 * 0.62) * half_chord(distance * (1 / 0.62**2))
        arcs.append(hollow * chord * thicker)
    # cartilage hardly shows: the bone ends further out the lower the rib
    arcs[1] = arcs[1] * ((rays.x - 0.105 - 0.012 * nearest) * (1 / 0.015)).clamp(0, 1)
    return window, arcs[0], arcs[1]


def _clavicle(a: ChestAnatomy, rays: Rays, side: int) -> tuple[Window, Tensor]:
    """S-shaped bone from the breastbone to the shoulder."""
    y, rise, turn = a.clavicle_y[:, side], a.clavicle_rise[:, side], _SIGN[side] * a.turn
    top, bottom = y - rise.clamp(min=0) - 0.03, y - rise.clamp(max=0) + 0.03
    window, rays = rays.zone(turn, turn + 0.35, top, bottom, _SIGN[side])
    along = (rays.x - each(turn + 0.025)) * (1 / 0.30)
    inner = along.clamp(0, 1)
    off = rays.y - each(y) + inner * each(rise) - 0.11 * inner * (1 - inner) * (inner - 0.45)
    past = (along - inner) * 0.30
    radius = 0.0125 + 0.016 * (inner - 0.5) * (inner - 0.5)
    squared = (off * off + past * past) / (radius * radius)
    hollow = half_chord(squared) - (0.75 * 0.6) * half_chord(squared * (1 / 0.6**2))
    return window, hollow * radius * each(2 * 1.1 * a.clavicles)


def _scapula(a: ChestAnatomy, rays: Rays, side: int) -> tuple[Window, Tensor]:
    """Shoulder blade: a hollow plate with a ridge."""
    x, angle = a.scapula_x[:, side], -a.scapula_angle[:, side]
    window, rays = rays.zone(x - 0.145, x + 0.145, 0.13, 0.48, _SIGN[side])
    plate = ellipsoid(rays, x, 0.325, 0.055, 0.145, 0.012, angle)
    hollow = ellipsoid(rays, x, 0.325, 0.047, 0.135, 0.009, angle)
    ridge = ellipsoid(rays, x, 0.225, 0.085, 0.012, 0.012, angle - 0.25)
    return window, plate - hollow + ridge


def _spine(a: ChestAnatomy, rays: Rays) -> tuple[Window, Tensor]:
    """Vertebral bodies with discs between, pedicles and spinous processes."""
    reach = a.spine_width.clamp(min=0.033) + a.turn.abs()
    window, rays = rays.zone(-reach, reach)
    height = each(a.vertebra_height)
    number = (rays.y - each(a.vertebra_y)) / height
    place = number - number.floor().detach()
    side = (rays.x + each(a.turn)).abs()
    across = side * each(1 / a.spine_width)
    across = across * across
    from_middle = (place - 0.5).abs()
    waist = 1.25 - 0.5 * from_middle  # bodies are narrower at mid-height
    solid = half_chord(across * across * waist) * 0.022
    disc = (5 - 10 * from_middle).clamp(0, 1)
    endplate = (1 - (from_middle - 0.40).abs() * 20).clamp(min=0)
    dx, dy = (side - 0.024) * (1 / 0.0085), (place - 0.38) * height * (1 / 0.012)
    pedicle = half_chord(dx * dx + dy * dy) * 0.006
    dx, dy = side * (1 / 0.0065), (place - 0.80) * height * (1 / 0.014)
    spinous = half_chord(dx * dx + dy * dy) * 0.012
    edge = endplate * _inside((1 - across).clamp(min=0))
    return window, (solid * (0.25 + 0.35 * disc + 0.25 * edge) + pedicle + spinous) * each(a.spine)


def _lesion(a: ChestAnatomy, rays: Rays, lung: Tensor) -> tuple[Window, Tensor, Tensor]:
    """Extent of the lesion (path length of lung in it) and the share of air that it fills."""
    outer = 2 * a.lung_width.amax(1) + 0.012
    window, rays = rays.zone(-outer, outer, a.apex_y.amin(1))
    lung = lung[window]
    x, y, width, height, weight = _blobs(a)
    shape, mottle = torch.zeros_like(lung), torch.zeros_like(lung)
    for k in range(N_BLOBS):
        dx = (rays.x - each(x[:, k])) * each(1 / width[:, k])
        dy = (rays.y - each(y[:, k])) * each(1 / height[:, k])
        shape = shape + each(weight[:, k]) * torch.exp(-dx * dx - dy * dy)
    for fx, fy, px, py in a.tissue.permute(1, 2, 0):
        mottle = mottle + torch.cos((rays.x * each(40 + 12 * fx) + rays.y * each(50 * fy)) + each(4 * px)) \
            * torch.cos(rays.y * each(45 + 12 * fy) + each(4 * py))
    dense = each((a.finding == FINDINGS.index("Pneumonia")).float())
    patchy = shape * (1 + (0.22 - 0.10 * dense) * mottle)
    # a consolidation fills its lobe and ends sharply; ground glass is thin and fades
    density = (patchy * (1 + 1.2 * dense) - 0.45 * dense).clamp(0, 1) * (0.55 + 0.40 * dense)
    extent = lung * ((density > 0.16) & (lung > 0.01)).to(lung.dtype)
    return window, extent, density * each(a.severity)


def _blobs(a: ChestAnatomy) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Centres, half-axes and weights (N, 6) of the blobs that make up each finding's pattern."""
    u = a.lesion
    one = torch.ones_like(u[..., 0])
    k = torch.arange(N_BLOBS, device=u.device)
    alternating = torch.where(k % 2 == 0, 1.0, -1.0) * one
    chosen = torch.where(u[:, :1, 4] > 0, 1.0, -1.0) * one  # one side, the same for all blobs
    lobe = u[:, :1, 3] * one
    first = (k < 1).float()
    patterns = {
        "Normal": (0 * one, 0.5 * one, one, one, 0 * one),
        "Pneumonia": (chosen * (0.165 + 0.02 * u[..., 0]),
                      0.48 + 0.085 * lobe + 0.03 * u[..., 1] * (1 - first), 0.085 + 0.015 * u[..., 2],
                      0.065 + 0.010 * u[..., 0], first + 0.35 * (1 - first) * (k < 3)),
        "COVID": (alternating * (0.225 + 0.022 * u[..., 0]), 0.545 + 0.060 * u[..., 1],
                  0.042 + 0.008 * u[..., 2], 0.050 + 0.009 * u[..., 3], 0.95 * one),
        "Lung_Opacity": (chosen * (0.13 + 0.030 * u[..., 0]), 0.36 + 0.07 * lobe + 0.05 * u[..., 1],
                         0.050 + 0.012 * u[..., 2], 0.045 + 0.010 * u[..., 0], 0.9 * (k < 3) * one),
        "Viral Pneumonia": (alternating * (0.105 + 0.02 * u[..., 0]), 0.44 + 0.055 * u[..., 1],
                            0.070 + 0.010 * u[..., 2], 0.085 + 0.012 * u[..., 3], 0.36 * one),
    }
    # (finding, 5, N, 6)
    stacked = torch.stack([torch.stack([part * one for part in patterns[name]]) for name in FINDINGS])
    picked = stacked[a.finding, :, torch.arange(len(a), device=u.device)]  # (N, 5, 6)
    x, y, width, height, weight = picked.unbind(1)
    return x, y, width, height, weight


_GLYPHS = {"L": "10000 10000 10000 10000 10000 10000 11111", "R": "11110 10001 10001 11110 10100 10010 10001",
           "A": "01110 10001 10001 11111 10001 10001 10001", "P": "11110 10001 10001 11110 10000 10000 10000",
           "E": "11111 10000 10000 11110 10000 10000 11111", "T": "11111 00100 00100 00100 00100 00100 00100"}


def _text(letters: str, height: int) -> Tensor:
    """Bitmap (height, width) bool of a few capital letters, from 5 x 7 dots."""
    rows = [[[int(dot) for dot in row] for row in _GLYPHS[letter].split()] for letter in letters]
    bitmap = functional.pad(torch.tensor(rows, dtype=torch.float32), (0, 1))  # a gap after each letter
    bitmap = bitmap.permute(1, 0, 2).reshape(7, -1)[None, None]
    return functional.interpolate(bitmap, scale_factor=height / 7, mode="nearest")[0, 0] > 0.5


def _stamps(a: ChestAnatomy, img_size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Where (N, H, W) and in which grey (N, 1, 1) the things that are not the patient's overlay the film."""
    wanted = dict(zip(CONFOUNDERS, a.confounders.unbind(1), strict=True))
    device = a.keys.device
    place = torch.arange(img_size, device=device)
    jitter = a.lesion[:, :, 4]
    stamps: dict[str, tuple[Tensor, Tensor]] = {}
    empty = torch.zeros(len(a), img_size, img_size, dtype=torch.bool, device=device)
    grey = torch.full((len(a), 1, 1), 0.9, device=device)

    sides = [(jitter[:, k].abs() * 0.05 + 0.03) * img_size for k in range(4)]
    columns, rows = place[None, None, :], place[None, :, None]
    inner = ((columns >= each(sides[0])) & (columns < img_size - each(sides[1]))
             & (rows >= each(sides[2] * 0.7)) & (rows < img_size - each(sides[3] * 0.7)))
    stamps["collimation"] = (~inner & each(wanted["collimation"]), torch.full_like(grey, -1.0))

    width = max(1, round(img_size / 64))
    edge = (place < width) | (place >= img_size - width)
    stamps["border"] = ((edge[:, None] | edge[None, :]) & each(wanted["border"]), grey)

    for name, letters, share, left, top in (("marker", "L", 0.065, 0.88, 0.05),
                                            ("text", "AP", 0.045, 0.05, 0.93)):
        bitmap = _text(letters, max(7, round(share * img_size))).to(device)
        mask = empty.clone()
        for i in torch.nonzero(wanted[name])[:, 0].tolist():
            y = min(round((top + 0.03 * float(jitter[i, 4])) * img_size), img_size - bitmap.shape[0])
            x = min(round((left + 0.03 * float(jitter[i, 5])) * img_size), img_size - bitmap.shape[1])
            y, x = max(y, 0), max(x, 0)
            mask[i, y:y + bitmap.shape[0], x:x + bitmap.shape[1]] = bitmap[:img_size, :img_size]
        stamps[name] = (mask, grey)
    return stamps
