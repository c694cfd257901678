"""Chest radiographs rendered from known anatomy: sample bodies, project them, keep the truth.

A frontal image as the viewer sees it: the patient's right is on the left. Lengths are in cm and angles in
radians; x grows towards the viewer's right, y towards the feet, and (0, 0) is the middle of the chest. Fields
of shape (N, 2) hold the patient's right side first. Everything here is generated; nothing is an image of a
person.
"""

# ruff: noqa: RUF009 - `vary` only wraps `dataclasses.field`

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from genailab_helpers.phantoms import exposure, solids
from genailab_helpers.phantoms.anatomy import Anatomy, Render, draw_batches, draw_fields, vary
from genailab_helpers.phantoms.exposure import BONE_EXCESS, SOFT
from genailab_helpers.phantoms.solids import Patch, Rays, Solid, each, ellipsoid, half_chord, joined, tube

FINDINGS = ("Normal", "Pneumonia", "COVID", "Lung_Opacity", "Viral Pneumonia")
CONFOUNDERS = ("marker", "text", "border", "collimation", "exposure")
STRUCTURES = ("body", "right_lung", "left_lung", "heart", "mediastinum", "aorta", "trachea", "vessels",
              "ribs_posterior", "ribs_anterior", "clavicles", "scapulae", "spine", "diaphragm",
              "stomach_bubble")

SIDE_CM = 35.0  # of the detector
N_BLOBS = 6
BRANCHES, LEVELS = 4, 4
OVEREXPOSURE = 1.0  # how many times the photons an overexposed image has too many
_Keep = Callable[[Tensor], Tensor] | None  # what is to be made of the path lengths in a structure
_SIDES = torch.tensor([[-1.0], [1.0]])  # the patient's right side is on the viewer's left


@dataclass(frozen=True)
class ChestAnatomy(Anatomy):
    """A batch of N chests, every field a tensor whose first axis is N.

    The distributions stand beside the fields: mean and standard deviation, in cm or radians where nothing
    else is said, cut at 2.2 standard deviations. Sizes are those of adults ([1] Gray's Anatomy, 42nd edition;
    [2] Simon, Principles of Chest X-Ray Diagnosis; [3] tuned by eye beside radiographs).
    """

    # the finding, and what does not belong to the patient
    severity: Tensor  # (N,) in (0, 1]
    finding: Tensor  # (N,) int64, place in FINDINGS
    confounders: Tensor  # (N, 5) bool, in the order of CONFOUNDERS
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
    # where the finding lies, and what does not belong to the patient
    lesion: Tensor = vary(0.0, 1.0, N_BLOBS, 5)

    @property
    def placement(self) -> solids.Placement:
        """How the bodies stand before the detector."""
        return solids.Placement(SIDE_CM, self.shift_x, self.shift_y, self.magnification, self.lean, self.bend)


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
        How often an image carries what does not belong to the patient: for a name in CONFOUNDERS a rate in
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
    weights = np.array([finding[f] if isinstance(finding, Mapping) else 1.0 for f in findings])
    if not (set(findings) <= set(FINDINGS) and (weights >= 0).all() and 0 < weights.sum() < math.inf):
        raise ValueError(f"finding: expected some of {', '.join(FINDINGS)}, or for each a number of at least "
                         f"0, not all 0; got {finding!r}")
    by_name = {name: rate if isinstance(rate, Mapping) else dict.fromkeys(FINDINGS, rate)
               for name, rate in (confounders or {}).items()}
    rates = np.array([[by_name.get(name, {}).get(f, 0.0) for name in CONFOUNDERS] for f in FINDINGS])
    if not (set(by_name) <= set(CONFOUNDERS) and set().union(*by_name.values()) <= set(FINDINGS)
            and ((rates >= 0) & (rates <= 1)).all()):
        raise ValueError(f"confounders: expected some of {', '.join(CONFOUNDERS)}, with a rate from 0 to 1 "
                         f"or one for some of {', '.join(FINDINGS)}; got {confounders!r}")
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
        How often an image carries each confounder, whatever its finding.
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


def sample_hospital(n_samples: int, hospital: str, seed: int = 0) -> ChestAnatomy:
    """Draw the patients of one of HOSPITALS, others than those of another one; else as `sample_chests`."""
    if hospital not in HOSPITALS:
        raise ValueError(f"hospital={hospital!r}: expected one of {', '.join(HOSPITALS)}")
    finding, confounders, shifts = HOSPITALS[hospital]
    seed += 1_000_000 * list(HOSPITALS).index(hospital)  # nobody is a patient of two hospitals
    chests = sample_chests(n_samples, seed, finding, confounders)
    return chests.changed(**{name: getattr(chests, name) + by for name, by in shifts.items()})


def render_chests(anatomy: ChestAnatomy, img_size: int = 128, masks: bool = False,
                  batch_size: int | None = None) -> Render:
    """Project chests to images.

    Parameters
    ----------
    anatomy : ChestAnatomy
        N chests.
    img_size : int, default 128
        Side of the square images in pixels, at least 16.
    masks : bool, default False
        Whether to return where each of STRUCTURES, the lesion, and each of "marker", "text", "border" and
        "collimation" lies.
    batch_size : int, optional
        Chests rendered at a time by each thread, which bounds the memory and changes no pixel. Default: at
        most 30 of 128 rays a side, and of other sizes as many as have as many rays.

    Returns
    -------
    Render
        Images and masks. Images are differentiable with respect to the fields of `anatomy`.

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
    n_rays = solids.rays_a_side(img_size)
    project = _projection(anatomy, n_rays, partial(solids.covered, n_pixels=img_size) if masks else None)

    def draw(rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        a = anatomy[rows]
        line_integral, where = project(rows)
        noise = exposure.random_fields(a.keys, img_size, stream=0).to(line_integral)
        overexposed = a.confounders[:, CONFOUNDERS.index("exposure")].to(noise.dtype)
        photons = a.photons * (1 + OVEREXPOSURE * overexposed)
        signal = exposure.expose(line_integral, noise, photons, a.scatter, a.blur, SIDE_CM)
        dark, bright = exposure.grey_range(signal)
        window = (bright - dark) * a.window
        # the display follows the signal, but does not know of an overexposure: more photons come out darker
        white = bright - window * a.brightness + overexposed * math.log1p(OVEREXPOSURE)
        images = exposure.display(signal, white - window, white, a.contrast)
        truth = dict.fromkeys(_STAMPS, torch.zeros_like(images, dtype=torch.bool)) if masks else {}
        for name, stamp, grey in _stamps(a, img_size) if a.confounders.any() else ():
            images = torch.where(stamp, grey, images)
            truth |= {name: stamp} if masks else {}
        return images, truth | where

    return draw_batches(anatomy, draw, n_rays, batch_size)


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
    return _projection(anatomy, n_pixels, lambda length: length)(slice(None))


def _projection(anatomy: ChestAnatomy, n_pixels: int,
                keep: _Keep) -> Callable[[slice], tuple[Tensor, dict[str, Tensor]]]:
    """Make a function that projects some of N chests, whose solids are worked out here for all.

    It returns line integrals (N, H, W), and what `keep` makes of the path lengths in each structure.
    """
    flesh, centre, skeleton = _flesh(anatomy), _centre(anatomy), _skeleton(anatomy)

    def drawn(table: Mapping[str, Sequence[Solid]], rays: Rays, rows: slice) -> dict[str, list[Patch]]:
        return {name: [solid(rays, rows) for solid in group] for name, group in table.items()}

    def project(rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        a = anatomy[rows]
        rays, coarse = a.placement.rays(n_pixels), a.placement.rays(-(-n_pixels // 2))
        tissue = exposure.random_fields(a.keys, 64, stream=1).to(a.turn)
        body = solids.enlarged(_body(a, coarse, drawn(flesh, coarse, rows), tissue), n_pixels)
        bones, hard = _bones(a, rays, body, drawn(skeleton, rays, rows), keep)
        soft, found = _soft_tissue(a, rays, body, tissue, drawn(centre, rays, rows), keep)
        line_integral = soft.clamp_(min=0).mul_(each(SOFT * a.kilovolt))
        return line_integral.add_(bones.mul_(each(BONE_EXCESS * a.bone_density * a.kilovolt))), found | hard

    return project


def _soft_tissue(a: ChestAnatomy, rays: Rays, body: Tensor, tissue: Tensor, parts: dict[str, list[Patch]],
                 keep: _Keep) -> tuple[Tensor, dict[str, Tensor]]:
    """Path lengths in soft tissue, of which aerated lung and gas are spared, and in each structure."""
    blank, n_pixels = torch.zeros_like(body), body.shape[-1]
    displaced = joined(blank, parts["heart"] + parts["mediastinum"] + parts["aorta"])
    lung, domes, rise = _lungs(a, rays, body, displaced)
    vessels = torch.minimum(joined(_vessels(a, n_pixels), parts.pop("hila")), lung)
    aerated = solids.enlarged(1 + 0.02 * tissue, n_pixels).mul_(lung)
    aerated -= vessels
    aerated *= each(1 - a.lung_density)
    gas = joined(blank, parts["trachea"] + parts.pop("bronchi") + parts["stomach_bubble"])
    soft = (body - aerated).sub_(torch.minimum(gas, body))
    lesion = blank
    if bool((a.finding != FINDINGS.index("Normal")).any()):
        lesion, density = _lesion(a, rays, lung, vessels, tissue)
        soft += density * aerated
    if keep is None:
        return soft, {}
    left = solids.positive(rays.x)
    return soft, {name: keep(joined(blank, patches)) for name, patches in parts.items()} | {
        "body": keep(body), "right_lung": keep(lung * (1 - left)), "left_lung": keep(lung * left),
        "vessels": keep(vessels), "diaphragm": keep(domes * solids.positive(rise)), "lesion": keep(lesion)}


def _bones(a: ChestAnatomy, rays: Rays, body: Tensor, parts: dict[str, list[Patch]],
           keep: _Keep) -> tuple[Tensor, dict[str, Tensor]]:
    """Path lengths in bone, of all bones together and of each kind."""
    posterior, anterior = _ribs(a, rays)
    clavicles = [Patch(window, length * each(a.clavicles)) for window, length in parts["clavicles"]]
    parts |= {"clavicles": clavicles, "spine": [_spine(a, rays)]}
    bones = solids.summed(posterior + anterior, [patch for patches in parts.values() for patch in patches])
    bones = torch.minimum(bones, body)
    if keep is None:
        return bones, {}
    del parts["humeri"]
    blank = torch.zeros_like(body)
    return bones, {"ribs_posterior": keep(torch.minimum(posterior, body)),
                   "ribs_anterior": keep(torch.minimum(anterior, body))} | {
        name: keep(torch.minimum(joined(blank, patches), body)) for name, patches in parts.items()}


def _flesh(a: ChestAnatomy) -> dict[str, list[Solid]]:
    """Arms and breasts, which half the rays will do for."""
    thickness = 0.5 * (a.breast.clamp(min=0) + 1e-9).sqrt()
    beside = (_SIDES * 8.5).expand(2, len(a))
    return {"arms": [tube(_arm(a), a.arm_width)], "breasts": [ellipsoid(beside, 3.0, 6.3, 5.5, thickness)]}


def _body(a: ChestAnatomy, rays: Rays, parts: Mapping[str, Sequence[Patch]], tissue: Tensor) -> Tensor:
    """Soft tissue from skin to skin, as if the lungs were full; smooth, so half the rays will do."""
    trunk = _trunk(a, rays)
    body = joined(torch.maximum(trunk, _neck(a, rays)), parts["arms"])
    # squared, a layer thins out towards its rim
    breasts = [Patch(window, length * length) for window, length in parts["breasts"]]
    body = body + torch.minimum(solids.summed(torch.zeros_like(trunk), breasts), 0.3 * trunk)
    fat = solids.enlarged(1 + 0.05 * tissue[:, :8, :8], len(rays.y[0]))  # and muscle, unevenly spread
    return body * fat


def _trunk(a: ChestAnatomy, rays: Rays) -> Tensor:
    """Trunk with sloping shoulders."""
    rise = (((each(a.shoulder_y) - rays.y) * (1 / 11)).clamp(min=0)) ** 2
    taper = 1 - (rays.y + 6.3).clamp(0, 25) * (0.2 / 25)
    across = (rays.x * (1 / (taper * each(a.trunk_width)))) ** 2
    # a cross-section is flatter than an ellipse, and the skin over the shoulders turns quickly
    outline = (across * (0.3 + 0.7 * across) + rise * (0.4 + 0.6 * rise)) ** 2
    thinner = (0.82 + (rays.y + 17) * (0.18 / 19)).clamp(0.82, 1)
    return half_chord(outline * (0.4 + 0.6 * outline)) * (thinner * each(2 * a.trunk_depth))


def _neck(a: ChestAnatomy, rays: Rays) -> Tensor:
    """Neck, which widens into the shoulders."""
    slope = (rays.y + 20).clamp(0, 10.5)
    across = (rays.x * (1 / (each(a.neck_width) + 0.07 * slope * slope))) ** 2
    below = (rays.y + 10.5).clamp(min=0) * (1 / 4.2)
    return half_chord(across * across + below * below) * 12.5


def _arm(a: ChestAnatomy) -> list[tuple[Tensor, Tensor]]:
    """Shoulder and elbow of both arms."""
    x, y, angle = a.trunk_width - 3.4, a.shoulder_y - 1.5, a.arm_angle.T
    return [(_SIDES * x, y), (_SIDES * (x + 30 * torch.sin(angle)), y + 30 * torch.cos(angle))]


def _lungs(a: ChestAnatomy, rays: Rays, body: Tensor, displaced: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both lungs, each of which fills its side of the thorax from ribs to centre, and the domes below.

    Also returned is how high a ray passes above the costophrenic angle, in heights of the dome; where it is 0
    the domes still go on, and do not count.
    """
    x, y = rays.x, rays.y
    left, x = solids.positive(x), x.abs_()
    angle = a.diaphragm_y + _SIDES.clamp(min=0) * a.dome_drop + a.dome_height.T  # costophrenic, of each side
    depth = each(2 * a.lung_depth) * (y >= each(a.apex_y))
    middle, half = _cage(a, y)
    u = ((x - middle) * (1 / half)).square_()
    lung = half_chord((0.6 * u).add_(0.4).mul_(u)).mul_(depth)  # out to the pleura
    # a dome as wide as its side of the thorax, and deeper
    u = (x - each(0.515 * a.cage_width)).mul_(each(1 / (0.485 * a.cage_width)))
    right_rise, left_rise = ((each(angle) - y) * each(1 / a.dome_height.T.clamp(min=1e-4))).clamp(min=0)
    rise = ((left_rise - right_rise) * left).add_(right_rise)
    domes = half_chord(u.square_().addcmul_(rise, rise)).mul_(1.6 * depth)
    lung = lung.sub_(displaced).sub_(domes).clamp_(min=0)
    return torch.minimum(lung, body), domes, rise


def _cage(a: ChestAnatomy, y: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half width (N, H, 1) of one side of the thorax: a tower with a round apex."""
    up = ((5.0 - y) * each(1 / (5.0 - a.apex_y))).clamp(0, 1) ** 2
    half = half_chord(up * (0.45 + 0.55 * up)).clamp(min=1e-3)
    return each(a.cage_width) * (0.53 - 0.15 * up), each(a.cage_width) * 0.47 * half


def _centre(a: ChestAnatomy) -> dict[str, list[Solid]]:
    """Heart, great vessels, hila, airways, and the gas in the stomach under the left dome."""
    turn, scale, dome = a.turn, a.cage_width / 13.6, a.diaphragm_y + a.dome_drop  # a heart fits its thorax
    y, bubble = dome - a.heart_rise, a.bubble_width.clamp(min=0.15)
    hilum, arch, carina = a.hilum.T, a.arch_radius, (turn + 0.15, -6.3)
    return {
        "heart": [ellipsoid(a.heart_x * scale + turn, y, a.heart_width * scale, a.heart_height * scale,
                            5.2, a.heart_angle),
                  ellipsoid(turn - 1.6 * scale, y - 1.4, 0.36 * a.heart_width * scale, 4.8, 4.8)],
        "mediastinum": [ellipsoid(turn, -9.0, a.mediastinum_width, 10.0, 4.3),
                        ellipsoid(turn + 2.0, -2.9, 1.9, 4.6, 4.3)],  # the second: the pulmonary trunk
        "aorta": [ellipsoid(turn + 1.75, -8.8, arch, 1.15 * arch, 2.2 * arch),
                  tube([(1.8 - turn, turn - 8.5), (0.9 - turn, turn + 8.0)], 1.0)],
        "hila": [ellipsoid(turn + 3.4 * _SIDES, -2.7 - 0.5 * _SIDES, 0.9 * hilum, 1.9 * hilum, 1.1,
                           -0.25 * _SIDES)],
        "trachea": [tube([(turn - 0.1, -22.0), carina], a.trachea_width)],
        "bronchi": [tube([carina, (turn + 0.5 + 3.1 * _SIDES, -3.25 - 0.05 * _SIDES)],
                         0.6 - 0.05 * _SIDES)],
        "stomach_bubble": [ellipsoid(a.bubble_x, dome + a.bubble_depth + 0.6 * bubble, bubble,
                                     0.6 * bubble, 1.2 * bubble)],
    }


def _vessels(a: ChestAnatomy, n_pixels: int) -> Tensor:
    """Trees of vessels that grow from both hila and split at each level."""
    bend, n = a.vessel_bend, len(a)
    sign = _SIDES.to(bend)
    angle = bend.new_tensor((-1.1, -0.25, 0.55, 1.2))  # 0 is outwards
    x = (a.turn[:, None, None] + 3.0 * sign).expand(n, 2, BRANCHES)
    y = bend.new_tensor(((-2.4,), (-3.4,))).expand(n, 2, BRANCHES)
    levels = []
    for level, jitter in enumerate(bend.split([BRANCHES * 2**level for level in range(LEVELS)], 2)):
        angle = angle + (0.16 if level == 0 else 0.22) * jitter[..., 0]
        reach = 3.6 * 0.8**level * (1 + 0.18 * jitter[..., 1])
        end_x, end_y = x + sign * reach * torch.cos(angle), y + reach * torch.sin(angle)
        radius = (0.70 * 0.64**level * a.vessel_width)[:, None, None].expand_as(x)
        levels.append(torch.stack((radius, x, y, end_x, end_y)).flatten(2))
        angle = (angle[..., None] + bend.new_tensor((-0.42, 0.36))).flatten(2)
        x, y = end_x.repeat_interleave(2, dim=2), end_y.repeat_interleave(2, dim=2)
    return solids.segments(n_pixels, a.placement, *torch.cat(levels, 2))


def _skeleton(a: ChestAnatomy) -> dict[str, list[Solid]]:
    """Clavicles, shoulder blades and upper arms of both sides."""
    y, rise, x, blade_x = a.clavicle_y.T, a.clavicle_rise.T, a.turn + _SIDES * 1.4, 10.5 + a.scapula_x.T
    ends = (x, y), (x + _SIDES * 5.5, y - 0.6 * rise + 0.2), (x + _SIDES * 14.0, y - rise)
    blade = (_SIDES * blade_x, -10.5), (_SIDES * (blade_x + 0.8), 1.5), (_SIDES * (blade_x + 5.2), -9.0)
    ridge = (_SIDES * (blade_x + 0.2), -9.5), (_SIDES * (blade_x + 6.5), -12.4)
    return {"clavicles": [tube(ends, 0.91, is_bone=True)],
            "scapulae": [tube(blade, 0.42, is_bone=True), tube(ridge, 0.5, is_bone=True)],
            "humeri": [tube(_arm(a), 1.15, is_bone=True)]}


def _ribs(a: ChestAnatomy, rays: Rays) -> tuple[Tensor, Tensor]:
    """Posterior and anterior arcs of all ribs at once.

    A pair of ribs is a ring in a tilted plane around the thorax: x = w sin(psi), y = y_k + h (1 - cos(psi)),
    z = d cos(psi), with psi = 0 at the spine. Seen from the front, x tells psi up to front or back, and y
    then tells how far the nearest ring is.
    """
    start = a.apex_y + a.rib_y
    x, y = rays.x.abs_(), rays.y
    middle, half = _cage(a, y)
    squared_sine = (x * (1 / (middle + half + 0.25))).square_()  # the inner border touches the pleura
    cosine, flank = half_chord(squared_sine), squared_sine * squared_sine
    # in the flank a rib falls steeply, and runs along the beam
    scale = each(a.rib_spacing / a.rib_radius)  # from heights to distances
    across = (flank * flank).mul_(-0.55 * scale).add_(scale)
    thick = each(2 * a.rib_radius) * (y >= each(a.apex_y - 0.6))
    chord = (flank * (0.7 * thick)).add_(thick)
    chord *= solids.positive(cosine)
    chord *= (2 * x).sub_(2.4).clamp_(0, 1)
    height = (y - each(start + a.rib_drop)) * each(1 / a.rib_spacing)
    cosine *= each(a.rib_drop / a.rib_spacing)

    def arcs(number: Tensor) -> Tensor:
        number -= number.detach().round().clamp_(0, 9)
        number *= across
        return solids.bone(number.square_()).mul_(chord)

    # cartilage hardly shows: in front the bone ends further out the lower the rib
    down = y - each(a.apex_y)
    anterior = arcs(height - cosine)
    anterior *= (1.6 * x).sub_(down * 0.35 + 5.0).clamp_(0, 1)
    anterior *= (2.6 - 0.1 * down).clamp(0, 0.6)
    return arcs(height + cosine), anterior


def _spine(a: ChestAnatomy, rays: Rays) -> Patch:
    """Vertebral bodies with discs between, pedicles and spinous processes."""
    edge = 1.9 + a.turn.abs()
    window, near = rays.within(solids.edges_of(-edge, edge, -math.inf, math.inf))
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
    return Patch(window, solid * each(a.spine))


# How a finding shows: blobs of changed lung, and what fills them; a row for each of FINDINGS, lengths in cm.
# After Hansell et al. (2008), Fleischner Society: glossary of terms for thoracic imaging.
#   sides: 1 has all blobs on one side, 2 on both; out: their distance from the midline, mean and deviation;
#   down: their height, mean, deviation of all together and of each; size: their half-axes;
#   gain, cut: how sharply a blob begins; top: fraction of the air that is replaced at most;
#   mottle: how irregular the borders are; net: fraction of the lesion that is a net of fine lines;
#   fissure: height at which a lobe ends
_PATTERNS = (
    (1, 7.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 0.0, 1.00, 0.00, 0.35, 0.00, math.nan),
    (1, 7.0, 1.6, 0.0, 2.2, 1.5, 3.8, 3.2, 1.8, 0.35, 0.95, 0.25, 0.00, -1.0),
    (2, 9.8, 1.0, 1.6, 0.8, 2.6, 2.4, 2.9, 1.2, 0.14, 0.70, 0.50, 0.00, math.nan),
    (1, 6.0, 1.3, -3.5, 2.5, 1.2, 2.8, 2.6, 1.2, 0.20, 0.75, 0.35, 0.00, math.nan),
    (2, 5.0, 1.2, -1.8, 1.0, 2.4, 3.3, 3.6, 1.0, 0.10, 0.65, 0.30, 0.35, math.nan),
)


def _lesion(a: ChestAnatomy, rays: Rays, lung: Tensor, vessels: Tensor,
            tissue: Tensor) -> tuple[Tensor, Tensor]:
    """Extent of the lesion (path length of lung in it), and the fraction of air that it replaces."""
    n_pixels = rays.x.shape[1]
    (sides, out, out_sd, down, down_sd, each_sd, width, height, gain, cut, top, mottle, net, fissure) = (
        lung.new_tensor(_PATTERNS)[a.finding, :, None, None].unbind(1))  # (N, 1, 1) each
    aside, along, growth, drift, chance = a.lesion[..., None].unbind(2)  # (N, N_BLOBS, 1) each
    one_side = torch.where(chance[:, :1] > 0, 1.0, -1.0)
    in_turn = lung.new_tensor([[1.0], [-1.0]] * (N_BLOBS // 2))
    x = torch.where(sides == 1, one_side, one_side * in_turn) * (out + out_sd * aside)
    y = down + down_sd * drift[:, :1] + each_sd * along
    size = 1 + 0.2 * growth
    distances = []
    for blob_x, blob_y, scale in zip(x.split(1, 1), y.split(1, 1), size.split(1, 1), strict=True):
        dx = rays.x.sub_(blob_x).mul_(1 / (width * scale))
        dy = (rays.y - blob_y) * (1 / (height * scale))
        distances.append((dx * dx).add_(dy * dy))
    shape = torch.exp(-reduce(torch.minimum, distances))
    shape = shape * (1 + mottle * solids.enlarged(tissue[:, :24, :24], n_pixels))
    lines = (1 - 2.5 * solids.enlarged(tissue, n_pixels).abs()).clamp(min=0)  # thickened septa
    shape = shape * (1 - net * (1 - lines))
    # a lobe ends at its fissure, above or below which the first blob lies
    beyond = (rays.y - fissure) * torch.where(y[:, :1] > fissure, 1.0, -1.0)
    shape = shape * torch.where(fissure.isnan(), 1.0, (beyond * 1.5 + 0.5).clamp(0, 1))
    density = ((shape - cut) * gain).clamp(0, 1).minimum(top)
    # the bronchi beside the vessels keep their air: black branches in a consolidation
    bronchi = torch.roll(vessels, (n_pixels // 90, n_pixels // 60), (1, 2))
    airy = (bronchi * 1.5).clamp(max=0.35) * (gain > 1.5)
    return lung * solids.positive(density - 0.05), density * (1 - airy) * each(a.severity)


# letters in dots, their height, and row and column where they begin, as fractions of the image
_L = "100000 100000 100000 100000 100000 100000 111110"
_AP = "011100111100 100010100010 100010100010 111110111100 100010100000 100010100000 100010100000"
_STAMPS = ("marker", "text", "border", "collimation")
_LETTERS = {"marker": (_L, 0.065, (0.05, 0.88)), "text": (_AP, 0.045, (0.93, 0.05))}


def _stamps(a: ChestAnatomy, img_size: int) -> Iterator[tuple[str, Tensor, float]]:
    """Yield where (N, H, W) and in which grey each thing that is not the patient's covers the image."""
    wanted = dict(zip(CONFOUNDERS, a.confounders.unbind(1), strict=True))
    jitter, columns = a.lesion[:, :, 4], torch.arange(img_size)
    rows = columns[:, None]
    margins = (jitter[:, :4].abs() * 0.05 + 0.03) * img_size * jitter.new_tensor((1.0, 1.0, 0.7, 0.7))
    left, right, top, bottom = (each(margin) for margin in margins.unbind(1))
    inside = (columns >= left) & (columns < img_size - right) & (rows >= top) & (rows < img_size - bottom)
    width = max(1, round(img_size / 64))
    edge = (columns < width) | (columns >= img_size - width)
    yield "collimation", ~inside & each(wanted["collimation"]), -1.0
    yield "border", (edge | edge[:, None]) & each(wanted["border"]), 0.9
    for name, (letters, size, corner) in _LETTERS.items():
        dots = torch.tensor([[[[float(dot) for dot in row] for row in letters.split()]]])
        scale = max(7, round(size * img_size)) / 7
        bitmap = functional.pad(functional.interpolate(dots, scale_factor=scale)[0, 0] > 0.5, (1, 1, 1, 1))
        last = torch.tensor(bitmap.shape) - 1
        place = (torch.tensor(corner, dtype=torch.float64) + 0.03 * jitter[:, 4:].double()) * img_size
        y, x = place.round().long().clamp(min=0).minimum(img_size + 1 - last).unbind(1)
        down, right = (rows - each(y) + 1).clamp(min=0), (columns - each(x) + 1).clamp(min=0)
        dots = bitmap[down.minimum(last[0]), right.minimum(last[1])]
        yield name, dots & each(wanted[name]), 0.9
