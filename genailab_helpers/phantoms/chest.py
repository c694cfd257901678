"""Chest radiographs rendered from known anatomy: sample bodies, project them, keep the truth.

A frontal image as the viewer sees it: the patient's right is on the left. Lengths are in cm and angles in
radians; x grows towards the viewer's right, y towards the feet, and (0, 0) is the middle of the chest. Fields
of shape (N, 2) hold the patient's right side first. Everything here is generated; nothing is an image of a
person.
"""

# ruff: noqa: RUF009 - `vary` and `given` only wrap `dataclasses.field`

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from genailab_helpers.phantoms import exposure
from genailab_helpers.phantoms.anatomy import Anatomy, draw_batches, draw_fields, given, vary
from genailab_helpers.phantoms.exposure import BONE_EXCESS, SOFT
from genailab_helpers.phantoms.solids import (
    Ellipsoid,
    Patch,
    Placement,
    Rays,
    Segments,
    Solid,
    Tube,
    bone,
    covered,
    each,
    half_chord,
    joined,
    summed,
)
from genailab_helpers.radiographs import check_img_size

FINDINGS = ("Normal", "Pneumonia", "COVID", "Lung_Opacity", "Viral Pneumonia")
CONFOUNDERS = ("marker", "text", "border", "collimation", "exposure")
STRUCTURES = ("body", "right_lung", "left_lung", "heart", "mediastinum", "aorta", "trachea", "vessels",
              "ribs_posterior", "ribs_anterior", "clavicles", "scapulae", "spine", "diaphragm",
              "stomach_bubble")

BONES = ("ribs_posterior", "ribs_anterior", "clavicles", "scapulae", "humeri", "spine")

SIDE_CM = 35.0  # of the detector
N_BLOBS = 6
BRANCHES, LEVELS = 4, 4
_FINEST = 96  # smaller images get several rays a pixel, so that thin things stay
OVEREXPOSURE = 1.0  # how many times the photons an overexposed image has too many
_SIGN = (-1.0, 1.0)  # the patient's right side is on the viewer's left


@dataclass(frozen=True)
class ChestAnatomy(Anatomy):
    """A batch of N chests, every field a tensor whose first axis is N.

    The distributions stand beside the fields: mean and standard deviation, in cm or radians where nothing
    else is said, cut at 2.2 standard deviations. Sizes are those of adults ([1] Gray's Anatomy, 42nd edition;
    [2] Simon, Principles of Chest X-Ray Diagnosis; [3] tuned by eye beside radiographs).
    """

    # how the body stands before the detector [3]
    shift_x: Tensor = vary(0.0, 1.2)
    shift_y: Tensor = vary(1.2, 1.6)
    magnification: Tensor = vary(1.0, 0.15)
    lean: Tensor = vary(0.0, 0.04)  # slope of the midline
    bend: Tensor = vary(0.0, 0.0018)  # its curvature per cm
    turn: Tensor = vary(0.0, 0.3)  # about the long axis: what lies in front moves sideways
    # trunk, neck, arms [3]
    trunk_width: Tensor = vary(20.5, 1.7)  # half of it, at the shoulders
    trunk_depth: Tensor = vary(10.4, 1.2)  # half of it
    shoulder_y: Tensor = vary(-8.3, 1.0)
    neck_width: Tensor = vary(5.8, 0.7)  # half of it
    arm_angle: Tensor = vary(0.28, 0.14, 2)
    arm_width: Tensor = vary(4.0, 0.5)  # half of it
    breast: Tensor = vary(0.4, 1.4)  # thickness; below 0 means none
    # thorax [1]: inner width 27 cm, apex to right dome 22 cm; the left dome is the higher one in 1 of 10 [2]
    cage_width: Tensor = vary(13.6, 0.5)  # half of it, between the ribs
    lung_depth: Tensor = vary(6.1, 0.4)  # half of it
    apex_y: Tensor = vary(-16.4, 0.5)
    lung_density: Tensor = vary(0.27, 0.045)  # of soft tissue
    diaphragm_y: Tensor = vary(5.6, 1.1)  # top of the right dome
    dome_drop: Tensor = vary(0.40, 0.31)  # how much lower the left one stands
    dome_height: Tensor = vary(4.8, 0.5, 2)  # above the costophrenic angle
    # heart and great vessels; the cardiothoracic ratio is .45 +- .02 [2]
    heart_width: Tensor = vary(7.2, 0.3)  # half of its long axis, in a thorax of mean width
    heart_height: Tensor = vary(4.5, 0.15)  # half of its short axis
    heart_x: Tensor = vary(2.3, 0.15)
    heart_rise: Tensor = vary(3.7, 0.35)  # of its centre above the left dome, on which it rests
    heart_angle: Tensor = vary(0.85, 0.08)
    mediastinum_width: Tensor = vary(2.4, 0.25)  # half of it
    arch_radius: Tensor = vary(1.3, 0.2)
    trachea_width: Tensor = vary(0.8, 0.08)  # half of it
    hilum: Tensor = vary(1.0, 0.2, 2)  # relative size
    vessel_width: Tensor = vary(1.4, 0.2)  # relative
    vessel_bend: Tensor = vary(0.0, 1.0, 2, BRANCHES * (2**LEVELS - 1), 2)  # direction and length of each
    # bones
    rib_y: Tensor = vary(0.3, 0.25)  # of the first rib at the spine, below the apex
    rib_spacing: Tensor = vary(2.5, 0.10)
    rib_drop: Tensor = vary(3.0, 0.6)  # from spine to flank
    rib_radius: Tensor = vary(0.5, 0.05)
    clavicle_y: Tensor = vary(-11.6, 0.6, 2)  # at the breastbone
    clavicle_rise: Tensor = vary(3.0, 1.0, 2)
    clavicles: Tensor = vary(1.0, 0.0)  # 0 leaves them out
    scapula_x: Tensor = vary(0.0, 0.8, 2)  # how far it is moved outwards
    spine: Tensor = vary(1.0, 0.0)  # 0 leaves it out
    vertebra_height: Tensor = vary(2.35, 0.08)  # with its disc
    bone_density: Tensor = vary(1.3, 0.26)  # relative
    # gas below the left dome [2]
    bubble_x: Tensor = vary(5.2, 0.9)
    bubble_depth: Tensor = vary(0.9, 0.3)  # of its upper rim below the dome
    bubble_width: Tensor = vary(1.6, 0.9)  # half of it; small ones cannot be seen
    # X-ray tube, detector, display
    kilovolt: Tensor = vary(1.0, 0.06)  # scales all attenuation; softer beams have more contrast
    photons: Tensor = vary(100000.0, 30000.0)  # per mm2 of the open beam
    scatter: Tensor = vary(1.0, 0.25)  # scattered to primary photons behind the grid
    blur: Tensor = vary(0.8, 0.2)  # mm, standard deviation
    window: Tensor = vary(1.55, 0.28)  # relative to the range from lung to abdomen
    contrast: Tensor = vary(0.92, 0.17)
    brightness: Tensor = vary(0.0, 0.09)  # fraction of the window
    # the finding, and what does not belong to the patient
    lesion: Tensor = vary(0.0, 1.0, N_BLOBS, 5)
    severity: Tensor = given()  # (N,) in (0, 1]
    finding: Tensor = given()  # (N,) int64, place in FINDINGS
    confounders: Tensor = given()  # (N, 5) bool, in the order of CONFOUNDERS

    @property
    def placement(self) -> Placement:
        """How the bodies stand before the detector."""
        return Placement(SIDE_CM, self.shift_x, self.shift_y, self.magnification, self.lean, self.bend)


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
        How often a image carries what does not belong to the patient: for a name in CONFOUNDERS a rate in
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
    """Where images come from: whom it sees, and how it takes and marks its images.

    Attributes
    ----------
    finding : mapping of str to float
        How common each finding is, as `sample_chests` takes it.
    confounders : mapping of str to float
        How often a image carries each confounder, whatever its finding.
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
                  {"window": 0.3, "contrast": -0.15, "scatter": 0.3, "blur": 0.8, "photons": -30000.0}),
}


def sample_hospital(n_samples: int, hospital: str | Hospital, seed: int = 0) -> ChestAnatomy:
    """Draw the patients of a hospital, others than those of another hospital; else as `sample_chests`.

    Parameters
    ----------
    hospital : str or Hospital
        One of HOSPITALS, whose patients differ in nothing but how often they are ill and how the image is
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
                  batch_size: int = 24) -> ChestRender:
    """Project chests to images.

    Parameters
    ----------
    anatomy : ChestAnatomy
        N chests.
    img_size : int, default 128
        Side of the square images in pixels, at least 16.
    masks : bool, default False
        Whether to return where each structure and lesion lies.
    batch_size : int, default 24
        Chests rendered at a time by each thread; bounds the memory and keeps the work in the processor's
        cache, and changes no pixel.

    Returns
    -------
    ChestRender
        Images, labels and masks. Images are differentiable with respect to the fields of `anatomy`.

    Raises
    ------
    ValueError
        If `img_size` is not a whole number of at least 16.

    Examples
    --------
    >>> render = render_chests(sample_chests(2, seed=7, finding="COVID"), img_size=64, masks=True)
    >>> render.images.shape, sorted(render.masks)[:4]
    (torch.Size([2, 1, 64, 64]), ['aorta', 'body', 'border', 'clavicles'])
    """
    check_img_size(img_size)
    torch.empty(7_500_000)  # teaches the C library to keep freed memory, which saves a fifth of the time
    body = Body(anatomy, img_size * -(-_FINEST // img_size))
    images, truth = draw_batches(anatomy, lambda rows: _render(body, rows, img_size, masks), batch_size)
    return ChestRender(images, anatomy.finding, truth)


def _render(body: "Body", rows: slice, img_size: int, masks: bool) -> tuple[Tensor, dict[str, Tensor]]:
    a = body.anatomy[rows]
    line_integral, parts = body.trace(rows)
    overexposed = a.confounders[:, CONFOUNDERS.index("exposure")].to(a.window.dtype)
    noise = exposure.random_fields(a.keys, img_size, stream=0).to(line_integral)
    photons = a.photons * (1 + OVEREXPOSURE * overexposed)
    signal = exposure.expose(line_integral, noise, photons, a.scatter, a.blur, SIDE_CM)
    dark, bright = exposure.grey_range(signal)
    window = (bright - dark) * a.window
    # the display follows the signal, but does not know of an overexposure: more photons come out darker
    white = bright - window * a.brightness + overexposed * math.log1p(OVEREXPOSURE)
    images = exposure.display(signal, white - window, white, a.contrast)
    stamps = _stamps(a, img_size) if masks or bool(a.confounders.any()) else {}
    for where, grey in stamps.values():
        images = torch.where(where, grey, images)
    truth = {name: covered(parts[name], line_integral, img_size) for name in (*STRUCTURES, "lesion") if masks}
    return images[:, None], truth | {name: where for name, (where, _) in stamps.items() if masks}


def trace(anatomy: ChestAnatomy, n_pixels: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Follow n_pixels x n_pixels rays through each of N chests.

    Returns
    -------
    line_integral : Tensor
        (N, H, W) sum of path length times attenuation coefficient.
    lengths : dict of str to Tensor
        (N, H, W) path length in cm in each of STRUCTURES, exactly 0 where the ray misses it, and in "lesion",
        whose extent does not depend on its severity.
    """
    line_integral, parts = Body(anatomy, n_pixels).trace(slice(None))
    blank = torch.zeros_like(line_integral)
    return line_integral, {name: joined(blank, parts[name]) for name in (*STRUCTURES, "lesion")}


class Body:
    """The solids of N chests, made once for all of them; rays are followed through some of them at a time."""

    def __init__(self, anatomy: ChestAnatomy, n_pixels: int) -> None:
        self.anatomy, self.n_pixels = anatomy, n_pixels
        self.solids = _centre(anatomy) | _skeleton(anatomy)
        self.flesh = _flesh(anatomy)
        self.vessels = _vessels(anatomy, n_pixels)

    def trace(self, rows: slice) -> tuple[Tensor, dict[str, list[Patch]]]:
        """Return line integrals (N, H, W) of some of the chests, and the path lengths in each structure."""
        a, whole = self.anatomy[rows], (slice(None),) * 3
        rays = a.placement.rays(self.n_pixels)
        tissue = exposure.random_fields(a.keys, 64, stream=1).to(a.shift_x)
        blank = torch.zeros_like(rays.x)
        parts = {name: [solid.seen(rays, rows) for solid in solids] for name, solids in self.solids.items()}
        parts |= _ribs(a, rays) | {"spine": [_spine(a, rays)]}
        body = self._body(a, rows, tissue)
        parts["clavicles"] = [Patch(box, length * each(a.clavicles)) for box, length in parts["clavicles"]]
        for name in ("clavicles", "scapulae", "humeri"):
            parts[name] = [Patch(box, torch.minimum(length, body[box])) for box, length in parts[name]]
        parts |= _lungs(a, rays, body, joined(blank, parts["heart"] + parts["mediastinum"] + parts["aorta"]))
        lung = summed(blank, parts["right_lung"] + parts["left_lung"])
        vessels = torch.minimum(joined(self._vessels(rows), parts["hila"]), lung)
        gas = joined(blank, parts["trachea"] + parts["bronchi"] + parts["stomach_bubble"])
        texture = 1 + 0.02 * exposure.enlarged(tissue, self.n_pixels)
        aerated = (lung * texture - vessels) * each(1 - a.lung_density)
        soft = body - aerated - torch.minimum(gas, body)
        parts |= {"body": [Patch(whole, body)], "vessels": [Patch(whole, vessels)], "lesion": []}
        if bool((a.finding != FINDINGS.index("Normal")).any()):
            extent, density = _lesion(a, rays, lung, vessels, tissue)
            soft = soft + density * aerated
            parts["lesion"] = [Patch(whole, extent)]
        bones = summed(blank, [patch for name in BONES for patch in parts[name]])
        line_integral = soft.clamp(min=0) * each(SOFT * a.kilovolt) \
            + bones * each(BONE_EXCESS * a.bone_density * a.kilovolt)
        return line_integral, parts

    def _vessels(self, rows: slice) -> Tensor:
        margin, a = max(tree.side for tree in self.vessels), self.anatomy
        wide = self.n_pixels + 2 * margin
        canvas = a.shift_x.new_zeros(len(a.shift_x[rows]), wide, wide)
        for tree in self.vessels:
            tree.add_to(canvas, margin, rows)
        return canvas[:, margin:-margin, margin:-margin]

    def _body(self, a: ChestAnatomy, rows: slice, tissue: Tensor) -> Tensor:
        """Soft tissue from skin to skin, as if the lungs were full; smooth, so half the rays will do."""
        n_half = -(-self.n_pixels // 2)
        rays = a.placement.rays(n_half)
        trunk = _trunk(a, rays)
        body = joined(trunk, [_neck(a, rays), *(arm.seen(rays, rows) for arm in self.flesh["arms"])])
        layers = [solid.seen(rays, rows) for solid in self.flesh["layers"]]
        # squared, a layer thins out towards its rim
        layers = [Patch(layer.box, layer.length * layer.length) for layer in layers]
        body = body + torch.minimum(summed(torch.zeros_like(trunk), layers), 0.3 * trunk)
        fat = 1 + 0.05 * exposure.enlarged(tissue[:, :8, :8], n_half)  # and muscle, unevenly spread
        return exposure.enlarged(body * fat, self.n_pixels)


def _trunk(a: ChestAnatomy, rays: Rays) -> Tensor:
    """Trunk with sloping shoulders."""
    rise = ((each(a.shoulder_y) - rays.y) * (1 / 11)).clamp(min=0)
    rise = rise * rise
    taper = 1 - (rays.y + 6.3).clamp(0, 25) * (0.2 / 25)
    across = rays.x * (1 / (taper * each(a.trunk_width)))
    across = across * across
    # a cross-section is flatter than an ellipse, and the skin over the shoulders turns quickly
    outline = across * (0.3 + 0.7 * across) + rise * (0.4 + 0.6 * rise)
    outline = outline * outline
    thinner = (0.82 + (rays.y + 17) * (0.18 / 19)).clamp(0.82, 1)
    return half_chord(outline * (0.4 + 0.6 * outline)) * (thinner * each(2 * a.trunk_depth))


def _neck(a: ChestAnatomy, rays: Rays) -> Patch:
    """Neck, which widens into the shoulders."""
    box, near = rays.within(-14.0, 14.0, bottom=-6.0)
    slope = (near.y + 20).clamp(0, 10.5)
    across = near.x * (1 / (each(a.neck_width) + 0.07 * slope * slope))
    below = (near.y + 10.5).clamp(min=0) * (1 / 4.2)
    across = across * across
    return Patch(box, half_chord(across * across + below * below) * 12.5)


def _flesh(a: ChestAnatomy) -> dict[str, list[Solid]]:
    """Upper arms, and layers over the trunk: breasts."""
    arms: list[Solid] = [Tube(_arm(a, side), a.arm_width) for side in (0, 1)]
    layers: list[Solid] = []
    for sign in _SIGN:
        layers += [Ellipsoid(sign * 8.5, 3.0, 6.3, 5.5, 0.5 * (a.breast.clamp(min=0) + 1e-9).sqrt())]
    return {"arms": arms, "layers": layers}


def _arm(a: ChestAnatomy, side: int) -> list[tuple[Tensor, Tensor]]:
    """Shoulder and elbow."""
    x, y, angle = a.trunk_width - 3.4, a.shoulder_y - 1.5, a.arm_angle[:, side]
    return [(_SIGN[side] * x, y), (_SIGN[side] * (x + 30 * torch.sin(angle)), y + 30 * torch.cos(angle))]


def _lungs(a: ChestAnatomy, rays: Rays, body: Tensor, displaced: Tensor) -> dict[str, list[Patch]]:
    """Each lung fills its side of the thorax between ribs, centre and diaphragm."""
    parts: dict[str, list[Patch]] = {"diaphragm": []}
    for side, name in enumerate(("right_lung", "left_lung")):
        base = a.diaphragm_y + a.dome_drop * side + a.dome_height[:, side]  # the costophrenic angle
        box, near = rays.within(0.0, a.cage_width, a.apex_y, base, _SIGN[side])
        above = ((near.y <= each(base)) & (near.y >= each(a.apex_y))).to(near.x.dtype)
        middle, half = _cage(a, near.y)
        u = (near.x - middle) * (1 / half)
        u = u * u
        pleura = half_chord(u * (0.4 + 0.6 * u)) * (above * each(2 * a.lung_depth))
        # a dome as wide as its side of the thorax, and deeper
        u = (near.x - each(0.515 * a.cage_width)) * each(1 / (0.485 * a.cage_width))
        v = (near.y - each(base)) * each(1 / a.dome_height[:, side])
        dome = half_chord(u * u + v * v) * (above * each(3.2 * a.lung_depth))
        parts[name] = [Patch(box, torch.minimum((pleura - displaced[box] - dome).clamp(min=0), body[box]))]
        parts["diaphragm"].append(Patch(box, dome))
    return parts


def _cage(a: ChestAnatomy, y: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half width (N, H, 1) of one side of the thorax: a tower with a round apex."""
    up = ((5.0 - y) * each(1 / (5.0 - a.apex_y))).clamp(0, 1)
    up = up * up
    half = half_chord(up * (0.45 + 0.55 * up)).clamp(min=1e-3)
    return each(a.cage_width) * (0.53 - 0.15 * up), each(a.cage_width) * 0.47 * half


def _centre(a: ChestAnatomy) -> dict[str, list[Solid]]:
    """Heart, great vessels, hila, airways, and the gas in the stomach under the left dome."""
    turn, scale, dome = a.turn, a.cage_width / 13.6, a.diaphragm_y + a.dome_drop  # a heart fits its thorax
    y, bubble = dome - a.heart_rise, a.bubble_width.clamp(min=0.15)
    return {
        "heart": [Ellipsoid(a.heart_x * scale + turn, y, a.heart_width * scale, a.heart_height * scale, 5.2,
                            a.heart_angle),
                  Ellipsoid(turn - 1.6 * scale, y - 1.4, 0.36 * a.heart_width * scale, 4.8, 4.8)],
        "mediastinum": [Ellipsoid(turn, -9.0, a.mediastinum_width, 10.0, 4.3),
                        Ellipsoid(turn + 2.0, -2.9, 1.9, 4.6, 4.3)],  # the second: the pulmonary trunk
        "aorta": [Ellipsoid(turn + 1.75, -8.8, a.arch_radius, 1.15 * a.arch_radius, 2.2 * a.arch_radius),
                  Tube([(1.8 - turn, turn - 8.5), (0.9 - turn, turn + 8.0)], 1.0)],
        "hila": [Ellipsoid(turn - 3.4, -2.2, 0.9 * a.hilum[:, 0], 1.9 * a.hilum[:, 0], 1.1, 0.25),
                 Ellipsoid(turn + 3.4, -3.2, 0.9 * a.hilum[:, 1], 1.9 * a.hilum[:, 1], 1.1, -0.25)],
        "trachea": [Tube([(turn - 0.1, -22.0), (turn + 0.15, -6.3)], a.trachea_width)],
        "bronchi": [Tube([(turn + 0.15, -6.3), (turn - 2.6, -3.2)], 0.65),
                    Tube([(turn + 0.15, -6.3), (turn + 3.6, -3.3)], 0.55)],
        "stomach_bubble": [Ellipsoid(a.bubble_x, dome + a.bubble_depth + 0.6 * bubble, bubble, 0.6 * bubble,
                                     1.2 * bubble)],
    }


def _vessels(a: ChestAnatomy, n_pixels: int) -> list[Segments]:
    """Trees of vessels that grow from both hila and split at each level."""
    bend, n = a.vessel_bend, len(a)
    sign = bend.new_tensor(_SIGN)[:, None]
    angle = bend.new_tensor((-1.1, -0.25, 0.55, 1.2)).expand(n, 2, BRANCHES)  # 0 is outwards
    x = a.turn[:, None, None] + (3.0 * sign).expand(n, 2, BRANCHES)
    y = bend.new_tensor(((-2.4,), (-3.4,))).expand(n, 2, BRANCHES)
    trees, used, length, radius = [], 0, 3.6, 0.70
    for level in range(LEVELS):
        jitter = bend[:, :, used:used + angle.shape[2]]
        used += angle.shape[2]
        angle = angle + (0.16 if level == 0 else 0.22) * jitter[..., 0]
        reach = length * (1 + 0.18 * jitter[..., 1])
        end_x, end_y = x + sign * reach * torch.cos(angle), y + reach * torch.sin(angle)
        width = (radius * a.vessel_width)[:, None].expand(n, x[0].numel())
        x0, y0, x1, y1 = (v.flatten(1) for v in (x, y, end_x, end_y))
        trees.append(Segments(a.placement, n_pixels, x0, y0, x1, y1, width))
        angle = (angle[..., None] + bend.new_tensor((-0.42, 0.36))).flatten(2)
        x, y = end_x.repeat_interleave(2, dim=2), end_y.repeat_interleave(2, dim=2)
        length, radius = length * 0.8, radius * 0.64
    return trees


def _skeleton(a: ChestAnatomy) -> dict[str, list[Solid]]:
    """Clavicles, shoulder blades and upper arms of both sides."""
    parts: dict[str, list[Solid]] = {"clavicles": [], "scapulae": [], "humeri": []}
    for side, sign in enumerate(_SIGN):
        y, rise, x = a.clavicle_y[:, side], a.clavicle_rise[:, side], a.turn + sign * 1.4
        parts["clavicles"].append(Tube(
            [(x, y), (x + sign * 5.5, y - 0.6 * rise + 0.2), (x + sign * 14.0, y - rise)], 0.91,
            is_bone=True))
        x = 10.5 + a.scapula_x[:, side]
        parts["scapulae"] += [
            Tube([(sign * x, -10.5), (sign * (x + 0.8), 1.5), (sign * (x + 5.2), -9.0)], 0.42, is_bone=True),
            Tube([(sign * (x + 0.2), -9.5), (sign * (x + 6.5), -12.4)], 0.5, is_bone=True)]
        parts["humeri"].append(Tube(_arm(a, side), 1.15, is_bone=True))
    return parts


def _ribs(a: ChestAnatomy, rays: Rays) -> dict[str, list[Patch]]:
    """Posterior and anterior arcs of all ribs at once.

    A pair of ribs is a ring in a tilted plane around the thorax: x = w sin(psi), y = y_k + h (1 - cos(psi)),
    z = d cos(psi), with psi = 0 at the spine. Seen from the front, x tells psi up to front or back, and y
    then tells how far the nearest ring is.
    """
    start = a.apex_y + a.rib_y
    lowest = start + 9 * a.rib_spacing + 2 * a.rib_drop.clamp(min=0) + 2.0
    box, near = rays.within(-a.cage_width - 1.0, a.cage_width + 1.0, a.apex_y - 0.6, lowest)
    x, (middle, half) = near.x.abs(), _cage(a, near.y)
    sine = x * (1 / (middle + half + 0.25))  # the inner border touches the pleura
    sine = sine * sine  # only the squares are needed
    cosine, flank = half_chord(sine), sine * sine
    # in the flank a rib falls steeply, and runs along the beam
    across = (1 - 0.55 * flank * flank) * each(a.rib_spacing / a.rib_radius)  # from heights to distances
    chord = (1 + 0.7 * flank) * (each(2 * a.rib_radius) * (near.y >= each(a.apex_y - 0.6)))
    chord = chord * (cosine * 1e6).detach().clamp(max=1) * (x * 2 - 2.4).clamp(0, 1)
    height = (near.y - each(start + a.rib_drop)) * each(1 / a.rib_spacing)
    cosine, parts = cosine * each(a.rib_drop / a.rib_spacing), {}
    for name, number in (("ribs_posterior", height + cosine), ("ribs_anterior", height - cosine)):
        nearest = number.detach().round().clamp(0, 9)
        distance = (number - nearest) * across
        arc = bone(distance * distance) * chord
        if name == "ribs_anterior":  # cartilage hardly shows: the bone ends further out the lower the rib
            down = near.y - each(a.apex_y)
            arc = arc * (x * 1.6 - (down * 0.35 + 5.0)).clamp(0, 1) * (2.6 - 0.1 * down).clamp(0, 0.6)
        parts[name] = [Patch(box, arc)]
    return parts


def _spine(a: ChestAnatomy, rays: Rays) -> Patch:
    """Vertebral bodies with discs between, pedicles and spinous processes."""
    box, near = rays.within(-1.9 - a.turn.abs(), 1.9 + a.turn.abs())
    height = each(a.vertebra_height)
    number = near.y * (1 / height)
    place = number - number.floor().detach()
    from_middle = (place - 0.5).abs()
    endplate = (1 - (from_middle - 0.40).abs() * 20).clamp(min=0)
    strength = 0.5 + 0.4 * (5 - 10 * from_middle).clamp(0, 1) + 0.5 * endplate
    side = (near.x + each(a.turn)).abs()
    across = side * (1 / 1.75)
    solid = half_chord(across * across * (1.25 - 0.5 * from_middle)) * strength  # narrower at mid-height
    for x, y, wide, high, thick in ((1.0, 0.38, 0.36, 0.5, 0.3), (0.0, 0.80, 0.28, 0.6, 0.5)):
        dx, dy = (side - x) * (1 / wide), (place - y) * height * (1 / high)  # pedicles, spinous process
        solid = solid + thick * half_chord(dx * dx + dy * dy)
    return Patch(box, solid * each(a.spine))


class _Pattern(NamedTuple):
    """How a finding shows: blobs of changed lung, and what fills them. Lengths in cm."""

    sides: int  # 1: all blobs on one side, 2: on both
    out: tuple[float, float]  # distance of the blobs from the midline, mean and standard deviation
    down: tuple[float, float, float]  # their height: mean, standard deviations of all together and of each
    size: tuple[float, float]  # their half-axes
    gain: float  # how sharply a blob begins
    cut: float
    top: float  # fraction of the air that is replaced at most
    mottle: float = 0.35  # how irregular the borders are
    net: float = 0.0  # fraction of the lesion that is a net of fine lines
    fissure: float | None = None  # height at which a lobe ends


# after Hansell et al. (2008), Fleischner Society: glossary of terms for thoracic imaging
_PATTERNS = {
    "Normal": _Pattern(1, (7.0, 0.0), (0.0, 0.0, 0.0), (2.0, 2.0), 0.0, 1.0, 0.0),
    "Pneumonia": _Pattern(1, (7.0, 1.6), (0.0, 2.2, 1.5), (3.8, 3.2), 1.8, 0.35, 0.95, 0.25, fissure=-1.0),
    "COVID": _Pattern(2, (9.8, 1.0), (1.6, 0.8, 2.6), (2.4, 2.9), 1.2, 0.14, 0.70, 0.5),
    "Lung_Opacity": _Pattern(1, (6.0, 1.3), (-3.5, 2.5, 1.2), (2.8, 2.6), 1.2, 0.20, 0.75),
    "Viral Pneumonia": _Pattern(2, (5.0, 1.2), (-1.8, 1.0, 2.4), (3.3, 3.6), 1.0, 0.10, 0.65, 0.30, 0.35),
}


def _lesion(a: ChestAnatomy, rays: Rays, lung: Tensor, vessels: Tensor,
            tissue: Tensor) -> tuple[Tensor, Tensor]:
    """Extent of the lesion (path length of lung in it), and the fraction of air that it replaces."""
    u, dtype = a.lesion, lung.dtype
    rows = [[float("nan") if v is None else v for v in (p.sides, *p.out, *p.down, *p.size, *p[4:])]
            for p in _PATTERNS.values()]
    (sides, out, out_sd, down, down_sd, each_sd, width, height, gain, cut, top, mottle, net, fissure) = (
        u.new_tensor(rows)[a.finding].unbind(1))
    one_side = torch.where(u[:, :1, 4] > 0, 1.0, -1.0)
    in_turn = u.new_tensor([1.0, -1.0] * (N_BLOBS // 2))
    sign = torch.where(sides[:, None] == 1, one_side, one_side * in_turn)
    x = sign * (out[:, None] + out_sd[:, None] * u[..., 0])
    y = down[:, None] + down_sd[:, None] * u[:, :1, 3] + each_sd[:, None] * u[..., 1]
    size = 1 + 0.2 * u[..., 2]
    shape = torch.zeros_like(lung)
    for k in range(N_BLOBS):
        dx = (rays.x - each(x[:, k])) * each(1 / (width * size[:, k]))
        dy = (rays.y - each(y[:, k])) * each(1 / (height * size[:, k]))
        shape = torch.maximum(shape, torch.exp(-dx * dx - dy * dy))
    n_pixels = rays.x.shape[1]
    shape = shape * (1 + each(mottle) * exposure.enlarged(tissue[:, :24, :24], n_pixels))
    lines = (1 - 2.5 * exposure.enlarged(tissue, n_pixels).abs()).clamp(min=0)  # thickened septa
    shape = shape * (1 - each(net) * (1 - lines))
    # a lobe ends at its fissure, above or below which the first blob lies
    beyond = (rays.y - each(fissure)) * each(torch.where(y[:, 0] > fissure, 1.0, -1.0))
    shape = shape * torch.where(each(fissure.isnan()), 1.0, (beyond * 1.5 + 0.5).clamp(0, 1))
    density = ((shape - each(cut)) * each(gain)).clamp(0, 1).minimum(each(top))
    extent = lung * (density > 0.05).to(dtype)
    # the bronchi beside the vessels keep their air: black branches in a consolidation
    bronchi = torch.roll(vessels, (n_pixels // 90, n_pixels // 60), (1, 2))
    airy = (bronchi * 1.5).clamp(max=0.35) * each((gain > 1.5).to(dtype))
    return extent, density * (1 - airy) * each(a.severity)


_GLYPHS = {"L": "10000 10000 10000 10000 10000 10000 11111", "A": "01110 10001 10001 11111 10001 10001 10001",
           "P": "11110 10001 10001 11110 10000 10000 10000"}


def _text(letters: str, height: int) -> Tensor:
    """Bitmap (height, width) bool of a few capital letters, from 5 x 7 dots."""
    rows = [[[int(dot) for dot in row] for row in _GLYPHS[letter].split()] for letter in letters]
    bitmap = functional.pad(torch.tensor(rows, dtype=torch.float32), (0, 1))  # a gap after each letter
    bitmap = bitmap.permute(1, 0, 2).reshape(7, -1)[None, None]
    return functional.interpolate(bitmap, scale_factor=height / 7, mode="nearest")[0, 0] > 0.5


def _stamps(a: ChestAnatomy, img_size: int) -> dict[str, tuple[Tensor, float]]:
    """Where (N, H, W) and in which grey the things that are not the patient's cover the image."""
    wanted = dict(zip(CONFOUNDERS, a.confounders.unbind(1), strict=True))
    jitter = a.lesion[:, :, 4]
    place = torch.arange(img_size, device=jitter.device)
    columns, rows = place[None, None, :], place[None, :, None]
    near, far = ([each((jitter[:, k].abs() * 0.05 + 0.03) * img_size * shorter) for k, shorter in pair]
                 for pair in (((0, 1), (2, 0.7)), ((1, 1), (3, 0.7))))
    inside = ((columns >= near[0]) & (columns < img_size - far[0])
              & (rows >= near[1]) & (rows < img_size - far[1]))
    width = max(1, round(img_size / 64))
    edge = (place < width) | (place >= img_size - width)
    stamps = {"collimation": (~inside & each(wanted["collimation"]), -1.0),
              "border": ((edge[:, None] | edge[None, :]) & each(wanted["border"]), 0.9)}
    for name, letters, size, left, top in (("marker", "L", 0.065, 0.88, 0.05),
                                           ("text", "AP", 0.045, 0.05, 0.93)):
        bitmap = _text(letters, max(7, round(size * img_size))).to(jitter.device)[:img_size, :img_size]
        mask = torch.zeros(len(a), img_size, img_size, dtype=torch.bool, device=jitter.device)
        for i in torch.nonzero(wanted[name])[:, 0].tolist():
            y, x = (min(max(round((start + 0.03 * float(off)) * img_size), 0), img_size - length)
                    for start, off, length in zip((top, left), jitter[i, 4:6], bitmap.shape, strict=True))
            mask[i, y:y + bitmap.shape[0], x:x + bitmap.shape[1]] = bitmap
        stamps[name] = (mask, 0.9)
    return stamps
