"""Lateral radiographs of lumbar spines rendered from known anatomy and a known severity of wear.

The patient faces the viewer's left. Lengths are in cm and angles in radians, clockwise for the viewer; x
grows towards the patient's back, y towards the feet, and (0, 0) is the middle. Fields of shape (N, DISCS) and
(N, DISCS + 1) go from the head downwards. Everything here is generated; nothing is an image of a person.

The severity is this project's own scale, from 0 to 1, cut into five grades of equal width. It is no clinical
scale: that of Kellgren and Lawrence, which also has five grades, is used for knees.
"""

# ruff: noqa: RUF009 - `vary` only wraps `dataclasses.field`

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from genailab_helpers.phantoms import exposure, solids
from genailab_helpers.phantoms.anatomy import Anatomy, Render, draw_batches, draw_fields, vary
from genailab_helpers.phantoms.exposure import BONE_EXCESS, SOFT
from genailab_helpers.phantoms.solids import Patch, Placement, Rays, Solid, each, ellipsoid, half_chord

VERTEBRAE = ("T11", "T12", "L1", "L2", "L3", "L4", "L5", "S1")
DISCS = len(VERTEBRAE) - 1
STRUCTURES = ("vertebrae", "discs")
SIGNS = ("disc_loss", "osteophytes", "sclerosis", "slip", "misalignment")
# from where a sign can be seen: fraction of the height, cm, density, cm, radians (3 degrees)
VISIBLE = {"disc_loss": 0.25, "osteophytes": 0.2, "sclerosis": 0.2, "slip": 0.3, "misalignment": 0.052}
SIDE_CM = 26.0  # of the detector
N_GAS = 9
_OPEN = 2.5  # least line integral: a wedge filter behind the back spares the detector the open beam
_CENTRE = -0.4 - 0.9j  # of L3

# for each vertebra or disc: lordosis, sizes relative to L3, and load (wear comes first where it is greatest)
_TILT = (0.12, 0.18, 0.20, 0.17, 0.08, -0.06, -0.28, -0.62)
_WIDTH = (0.83, 0.87, 0.90, 0.94, 0.98, 1.02, 1.03, 1.0)
_HEIGHT = (0.84, 0.90, 0.96, 0.99, 1.0, 1.0, 0.98, 0.92)
_DISC = (0.50, 0.60, 0.75, 0.86, 0.95, 1.05, 0.95)
_LOAD = (0.50, 0.60, 0.75, 0.85, 0.95, 1.05, 1.0)

# behind a vertebra, as `Chain.at` takes them: 2 places of pedicle, 2 of joints, 3 of the spinous process
_ARCH = (-0.1, -0.45), (0.9, -0.35), (1.0, -1.25), (1.75, 1.35), (2.3, 0.5), (4.5, 0.85), (4.3, 1.3)


@dataclass(frozen=True)
class SpineAnatomy(Anatomy):
    """A batch of N spines, every field a tensor whose first axis is N.

    The distributions stand beside the fields: mean and standard deviation, in cm or radians where nothing
    else is said, cut at 2.2 standard deviations. The signs of wear follow `severity`, each with chance of its
    own, in units of severity (`..._image` for the whole image, `..._local` for the level), so that
    `changed(severity=...)` lets the same person age. Sources: [1] Zhou et al. 2000, Eur Spine J 9:242, lower
    lumbar vertebrae; [2] Been and Kalichman 2014, Spine J 14:87, lordosis; [3] tuned by eye beside
    radiographs; [4] chosen so that no sign tells alone.
    """

    severity: Tensor  # (N,) in [0, 1]
    # how the body lies before the detector [3]
    shift_x: Tensor = vary(0.0, 0.7)
    shift_y: Tensor = vary(0.0, 0.7)
    magnification: Tensor = vary(1.12, 0.06)
    lean: Tensor = vary(0.0, 0.04)  # slope of the long axis
    # spine
    body_width: Tensor = vary(1.75, 0.10)  # half the depth of L3 from front to back [1]
    body_height: Tensor = vary(1.40, 0.065)  # half of it, L3 [1]
    disc_height: Tensor = vary(1.05, 0.13)  # [1]
    disc_local: Tensor = vary(0.0, 0.09, DISCS)  # fraction of the height
    lordosis: Tensor = vary(1.0, 0.22)  # relative to 47 degrees from L1 to S1 [2]
    posture: Tensor = vary(0.0, 0.02, DISCS + 1)  # turn of each vertebra
    bone_density: Tensor = vary(1.0, 0.14)  # relative
    # wear: what chance adds to severity [4]
    disc_loss_image: Tensor = vary(0.0, 0.10)
    disc_loss_local: Tensor = vary(0.0, 0.20, DISCS)
    osteophytes_image: Tensor = vary(0.0, 0.08)
    osteophytes_local: Tensor = vary(0.0, 0.28, DISCS, 2)
    sclerosis_image: Tensor = vary(0.0, 0.06)
    sclerosis_local: Tensor = vary(0.0, 0.14, DISCS)
    slip_image: Tensor = vary(0.0, 0.20)
    slip_local: Tensor = vary(0.0, 1.0, DISCS)
    misalignment_image: Tensor = vary(0.0, 0.07)
    misalignment_local: Tensor = vary(0.0, 1.0, DISCS + 1)
    # what surrounds the spine [3]
    trunk_width: Tensor = vary(27.0, 2.2)  # from side to side
    back_x: Tensor = vary(10.4, 0.9)
    dome_y: Tensor = vary(-10.2, 1.2)  # of the diaphragm
    hip_y: Tensor = vary(4.6, 0.6)  # top of the iliac crests
    rib_drop: Tensor = vary(1.0, 0.12, 2)  # of each side, relative
    gas: Tensor = vary(0.0, 1.0, N_GAS, 4)  # place, size and shape of each bubble
    # X-ray tube, detector, display
    kilovolt: Tensor = vary(0.93, 0.05)  # scales all attenuation; harder than the chest's beam
    photons: Tensor = vary(1.5e6, 4e5)  # per mm2 of the open beam
    scatter: Tensor = vary(0.6, 0.15)  # scattered to primary photons behind the grid
    blur: Tensor = vary(0.6, 0.15)  # mm, standard deviation
    window: Tensor = vary(1.9, 0.2)  # of the logarithmic signal
    contrast: Tensor = vary(1.0, 0.15)
    brightness: Tensor = vary(0.0, 0.07)  # fraction of the window

    @property
    def placement(self) -> Placement:
        """How the bodies lie before the detector."""
        return Placement(SIDE_CM, self.shift_x, self.shift_y, self.magnification, self.lean, self.lean * 0)

    def signs(self) -> dict[str, Tensor]:
        """Return each of SIGNS, (N, DISCS) where nothing else is said.

        The fraction of its height that each disc lost, 0 to 0.8; (N, DISCS, 2) length in cm of the spurs at
        each disc, in front and behind; how much denser the endplates beside each disc are, 0 to about 1.3;
        how far in cm the vertebra below each disc stands off to the back; and (N, DISCS + 1) how far in
        radians each vertebra is turned out of line.
        """
        load = self.severity.new_tensor(_LOAD)
        slipped = (self.severity + self.slip_image - 0.25).clamp(min=0)[:, None]
        turned = (self.severity + self.misalignment_image).clamp(min=0)[:, None]

        def worn(image: Tensor, local: Tensor) -> Tensor:
            return (((self.severity + image)[:, None] + local) * load).clamp(min=0)

        spurs = [worn(self.osteophytes_image, local) for local in self.osteophytes_local.unbind(2)]
        return {"disc_loss": (0.65 * worn(self.disc_loss_image, self.disc_loss_local)).clamp(max=0.8),
                "osteophytes": torch.stack(spurs, 2) * load.new_tensor((1.3, 0.9)),
                "sclerosis": worn(self.sclerosis_image, self.sclerosis_local),
                "slip": 0.20 * slipped * self.slip_local**2 * load**4,  # few levels stand out
                "misalignment": 0.055 * turned * self.misalignment_local}


def sample_spines(n_samples: int, seed: int = 0) -> SpineAnatomy:
    """Sample the anatomy of spines at random.

    Parameters
    ----------
    n_samples : int
        Number of spines, at least 1. Spine i depends on `seed` and i alone, so 10 spines are the first ten of
        1,000.
    seed : int, default 0
        At least 0.

    Returns
    -------
    SpineAnatomy
        With `severity` uniform in [0, 1].

    Raises
    ------
    ValueError
        For numbers out of range.
    """
    fields, uniform = draw_fields(SpineAnatomy, n_samples, seed, 1)
    return SpineAnatomy(**fields, severity=torch.from_numpy(uniform[:, 0]).float())


class Chain(NamedTuple):
    """The vertebrae from T11 to S1, with the discs and signs of wear between them; places are x + iy."""

    centre: Tensor  # (N, 8) complex
    turn: Tensor  # (N, 8) complex, exp(i tilt)
    width: Tensor  # (N, 8) half sizes
    height: Tensor
    disc: Tensor  # (N, 7) heights
    places: Tensor  # (N, 45) complex: _ARCH behind T12 to L5, heads of the ribs, front of the sacrum

    def at(self, k: int, behind: solids.Number, down: float) -> Tensor:
        """Place a point `behind` cm from the rear wall of vertebra k, `down` half heights from its middle."""
        place = self.width[:, k] + behind + 1j * self.height[:, k] * down
        return self.centre[:, k] + place * self.turn[:, k]


def chain_of(a: SpineAnatomy) -> Chain:
    """String the vertebrae up and down from L3."""
    signs = a.signs()
    bend = a.lordosis * (1 - 0.25 * (a.severity + a.misalignment_image))  # a worn back is flatter
    levels = bend.new_tensor((_TILT, _WIDTH, _HEIGHT))
    tilt = levels[0] * bend[:, None] + a.posture + signs["misalignment"]
    width, height = a.body_width[:, None] * levels[1], a.body_height[:, None] * levels[2]
    disc = a.disc_height[:, None] * bend.new_tensor(_DISC) * (1 + a.disc_local) * (1 - signs["disc_loss"])
    turn = torch.polar(torch.ones_like(tilt), tilt)
    # from a centre to its lower endplate, through the disc, and from the upper endplate to the next centre
    down, between = 1j * height * turn, (turn[:, :-1] + turn[:, 1:]) / 2
    step = down[:, :-1] + (signs["slip"] + 1j * disc) * between + down[:, 1:]
    centre = torch.cat([0 * step[:, :1], step.cumsum(1)], 1)
    centre = centre - centre[:, VERTEBRAE.index("L3"), None] + _CENTRE
    chain = Chain(centre, turn, width, height, disc, centre[:, :0])
    places: list[tuple[int, solids.Number, float]] = [(k, *place) for k in range(1, DISCS) for place in _ARCH]
    places += [(0, -0.3, -0.4), (1, -0.3, -0.4), (DISCS, -width[:, -1], 0.0)]
    # all at once: a product of complex numbers has last digits that depend on where it stands in memory
    return chain._replace(places=torch.stack([chain.at(*place) for place in places], 1))


def render_spines(anatomy: SpineAnatomy, img_size: int = 128, masks: bool = False,
                  batch_size: int | None = None) -> Render:
    """Project spines to images.

    Parameters
    ----------
    anatomy : SpineAnatomy
        N spines.
    img_size : int, default 128
        Side of the square images in pixels, at least 16.
    masks : bool, default False
        Whether to return where vertebrae, discs and each sign of wear lie. A sign is marked from where it can
        be seen (VISIBLE): discs that lost a quarter of their height, what stands out of spurs of 2 mm,
        endplates denser by 0.2, discs at steps of 3 mm, vertebrae turned by 3 degrees.
    batch_size : int, optional
        Spines rendered at a time by each thread, as for chests.

    Returns
    -------
    Render
        Images and masks. Images are differentiable with respect to the fields of `anatomy`.

    Raises
    ------
    ValueError
        If `img_size` is not a whole number of at least 16.
    """
    n_rays = solids.rays_a_side(img_size)
    project = projection(anatomy, n_rays, masks)

    def draw(rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        a = anatomy[rows]
        line_integral, parts = project(rows)
        noise = exposure.random_fields(a.keys, img_size, stream=0).to(line_integral)
        signal = exposure.expose(line_integral, noise, a.photons, a.scatter, a.blur, SIDE_CM)
        white = exposure.grey_range(signal)[1] + a.window * (0.06 - a.brightness)
        images = exposure.display(signal, white - a.window, white, a.contrast)
        blank = torch.zeros_like(line_integral)
        return images, {name: solids.covered(solids.joined(blank, patches), img_size)
                        for name, patches in parts.items()}

    return draw_batches(anatomy, draw, n_rays, batch_size)


def projection(anatomy: SpineAnatomy, n_pixels: int,
               with_parts: bool) -> Callable[[slice], tuple[Tensor, dict[str, list[Patch]]]]:
    """Make a function that follows n_pixels x n_pixels rays through each of some of N spines.

    It takes the slice of the spines, and returns

    line_integral : Tensor
        (N, H, W) sum of path length times attenuation coefficient.
    parts : dict of str to list of Patch
        Path lengths in cm in each of STRUCTURES and SIGNS, exactly 0 where it does not show; none unless
        asked for.
    """
    every, all_signs = chain_of(anatomy), anatomy.signs()
    all_signs |= {"spurs": functional.pad(all_signs["osteophytes"], (0, 0, 1, 1)),  # 0 above T11 and below S1
                  "hardness": functional.pad(all_signs["sclerosis"], (1, 1))}
    bones, (lungs, gas) = _arches(every) + _ribs(anatomy, every) + _pelvis(anatomy, every), _air(anatomy)

    def project(rows: slice) -> tuple[Tensor, dict[str, list[Patch]]]:
        a, chain = anatomy[rows], Chain(*(values[rows] for values in every))
        rays, signs = a.placement.rays(n_pixels), {name: values[rows] for name, values in all_signs.items()}
        trunk = solids.enlarged(_trunk(a, a.placement.rays(-(-n_pixels // 2))), n_pixels)
        blank = torch.zeros_like(trunk)
        parts = {name: [patch] for name, patch in _vertebrae(chain, signs, rays, with_parts).items()}
        bone = solids.joined(blank, parts.pop("bone"))
        if with_parts:
            parts |= _discs(chain, signs, rays, solids.joined(blank, parts["vertebrae"]))
        air = solids.summed(solids.joined(blank, [gas(rays, rows)]), [lung(rays, rows) for lung in lungs])
        soft = (trunk - torch.minimum(air, 0.6 * trunk)).mul_(each(SOFT * a.kilovolt))
        bone = solids.summed(bone, [solid(rays, rows) for solid in bones])
        return soft.add_(bone.mul_(each(BONE_EXCESS * a.bone_density * a.kilovolt))).clamp_(min=_OPEN), parts

    return project


def _near(rays: Rays, centre: Tensor, turn: Tensor, w: Tensor, h: Tensor,
          margin: solids.Number) -> tuple[Tensor, Tensor, Tensor]:
    """Cut out the window of a turned rectangle; return places along its sides, which are +-1 at its rim."""
    x, y, cos, sin = centre.real, centre.imag, turn.real, turn.imag
    wide, high = w * cos.abs() + h * sin.abs() + margin, w * sin.abs() + h * cos.abs() + margin
    window, near = rays.within(solids.edges_of(x - wide, x + wide, y - high, y + high))
    u, v = (near.plane(*(number[..., None] for number in (a, b, -x * a - y * b)))
            for a, b in ((cos / w, sin / w), (-sin / h, cos / h)))
    return window, u, v


def _vertebrae(c: Chain, signs: dict[str, Tensor], rays: Rays, with_parts: bool) -> dict[str, Patch]:
    """Bodies with their walls, endplates and spurs; lengths are those of as much cortical bone."""
    w, h, spurs = c.width.T, c.height.T, signs["spurs"].movedim(1, 0)  # vertebrae first, as in what follows
    longest = torch.maximum(spurs[:-1], spurs[1:]).amax(2)
    window, u, v = _near(rays, c.centre.T, c.turn.T, w, h, longest + 0.1)
    behind, below, u, v, u2 = solids.positive(u), solids.positive(v), u.abs_(), v.abs_(), u * u
    squared = (1.29 - 0.29 * (v * v).clamp_(max=1)).mul_(u2)  # hollow walls, flat in front
    square = squared * squared
    edge = (0.08 * u2).add_(0.92).sub_(v).mul_(each(h))  # to the endplate, which is hollow, too
    solid = half_chord((0.85 * square).add_(0.15).mul_(squared)).mul_((edge * 8).clamp_(0, 1))
    upper, lower = signs["hardness"].T[:-1], signs["hardness"].T[1:]
    depth = _blend(1 / (0.2 + 0.7 * upper), 1 / (0.2 + 0.7 * lower), below)
    band = (1 - edge * depth).clamp_(min=0).mul_(solid).mul_(_blend(upper, lower, below))
    body = (1.8 * square).add_(0.9).add_((2 - edge * 7).clamp_(min=0)).mul_(solid)  # walls, endplates
    body.add_(band, alpha=3.2)
    fused = (0.5 - 0.6 * v[-1:] * (2 * below[-1:] - 1)).clamp(0, 1)  # the last one, with the sacrum below
    body[-1:] *= fused
    del u2, squared, square, edge, solid, depth  # memory that the spurs can use
    (front, back), (front_below, back_below) = spurs[:-1].unbind(2), spurs[1:].unbind(2)
    size = _blend(front, back, behind)
    size += _blend(front_below - front, back_below - back, behind).mul_(below)
    out = (u - 0.93).mul_(each(w))
    reach = out.clamp(min=0)
    rise = (v - 0.93).mul_(each(h)).sub_(0.35 * reach).div_(0.14 + 0.33 * size)  # leans towards the disc
    spur = half_chord((rise * rise).add_(reach / (size + 0.02)))
    spur = spur.mul_((1 + out * 2).clamp_(0, 1)).mul_((size * 5).clamp_(max=1))
    found = {"bone": torch.add(body, spur, alpha=1.5)}
    if with_parts:
        turned = signs["misalignment"].T.abs() >= VISIBLE["misalignment"]
        hard = _blend((upper > VISIBLE["sclerosis"]).to(w), (lower > VISIBLE["sclerosis"]).to(w), below)
        found |= {"vertebrae": body, "misalignment": body * each(turned), "sclerosis": band * hard}
        found["osteophytes"] = spur * solids.positive(u - 1) * solids.positive(size - VISIBLE["osteophytes"])
    return {name: Patch(window, length) for name, length in found.items()}


def _blend(first: Tensor, second: Tensor, where: Tensor) -> Tensor:
    """Take `second` where `where` is 1 and `first` where it is 0; numbers are one an image."""
    return (each(second - first) * where).add_(each(first))


def _discs(c: Chain, signs: dict[str, Tensor], rays: Rays, bodies: Tensor) -> dict[str, list[Patch]]:
    """Mark the room between vertebrae, which the image shows as gaps between the bodies."""
    width, height, centre, turn = c.width.T, c.height.T, c.centre.T, c.turn.T
    w, up, low = torch.minimum(width[:-1], width[1:]), turn[:-1], turn[1:]
    middle = (centre[:-1] + centre[1:] + 1j * (height[:-1] * up - height[1:] * low)) / 2
    high = (c.disc.T + (up - low).imag.abs() * w) / 2 + 0.15  # endplates are hollow
    window, u, v = _near(rays, middle, (up + low) / 2, w, high, 0.2)
    room = 4.0 * half_chord(u * u) * solids.positive(1 - v.abs())
    gap = room * (1 - solids.positive(solids.seen(bodies, window)))
    lost, stepped = (each(signs[name].T.abs() >= VISIBLE[name]) for name in ("disc_loss", "slip"))
    return {"discs": [Patch(window, gap)], "disc_loss": [Patch(window, gap * lost)],
            "slip": [Patch(window, room * stepped)]}


def _arches(c: Chain) -> list[Solid]:
    """Pedicle, joints and spinous process behind each body but T11 (behind ribs) and the sacrum."""
    places = c.places[:, :-3].unflatten(1, (-1, len(_ARCH))).movedim(0, -1).unbind(1)
    ends = [(place.real, place.imag) for place in places]
    return [solids.tube(part, radius, is_bone=True)
            for part, radius in ((ends[:2], 0.6), (ends[2:4], 0.45), (ends[4:], 0.65))]


def _ribs(a: SpineAnatomy, c: Chain) -> list[Solid]:
    """The eleventh and twelfth ribs of both sides: backwards from the spine, then forwards and down."""
    ribs: list[Solid] = []
    drop, lower = a.rib_drop.T, torch.tensor([[0.0], [0.6]])
    for k, reach in ((-3, -10.0), (-2, -4.5)):
        head = c.places[:, k]
        points = (0.0, 0.0), (2.6, 1.4), (1.0 + reach / 2, 3.0 - 0.46 * reach), (reach, 3.4 - 0.7 * reach)
        ribs.append(solids.tube([(head.real + u, head.imag + v * drop + lower) for u, v in points], 0.42,
                         is_bone=True))
    return ribs


def _pelvis(a: SpineAnatomy, c: Chain) -> list[Solid]:
    """Sacrum, and the wings of both hip bones, each a crest around thin bone."""
    x, y = c.places[:, -1].real, c.places[:, -1].imag
    pelvis = [ellipsoid(x + 1.1, y + 1.5, 1.5, 2.8, 0.7, -0.65),
              ellipsoid(x + 3.0, y + 3.9, 1.3, 2.4, 0.7, -0.8)]
    for beside in (0.0, 0.8):  # the sides differ by the divergence of the beam
        centre = x - 1.2 + beside, a.hip_y + 6.5 + beside
        pelvis += [ellipsoid(*centre, 6.8, 6.5, 0.9), ellipsoid(*centre, 6.3, 6.0, -0.75)]
    return pelvis


def _air(a: SpineAnatomy) -> tuple[list[Solid], Solid]:
    """The lungs of both sides above and behind the diaphragm, and gas in loops of the bowel."""
    y = a.dome_y + torch.tensor([[0.0], [1.1]])
    lungs = [ellipsoid(-4.0, y - 9.0, 13.0, 9.0, 2.5), ellipsoid(6.0, y - 6.0, 4.5, 9.5, 1.8)]
    bubbles, loop = a.gas.permute(2, 1, 0), torch.arange(N_GAS)[:, None] // 3  # three bubbles to a loop
    across, down, size, shape = 1.3 * bubbles[:, 3 * loop[:, 0]] + 0.8 * bubbles
    width = (0.95 + 0.28 * size).clamp(min=0.1)
    height = width * (1 + 0.15 * shape).clamp(min=0.3)
    gas = ellipsoid(across - 8.0, 4.0 * loop + down - 3.0, width, height, 0.8 * width, shape)
    return lungs, gas


def _trunk(a: SpineAnatomy, rays: Rays) -> Tensor:
    """Thickness from side to side: less in front and behind, more at the hips; fat and muscle vary it."""
    u = (rays.x - each(a.back_x)) * (1 / 12.5) + 1
    u, hips = u * u, ((rays.y - 1.0) * (1 / 10.0)).clamp(0, 1)
    tissue = solids.enlarged(exposure.random_fields(a.keys, 16, stream=1).to(rays.x), rays.x.shape[-1])
    return half_chord(u * u * u) * (1 + 0.1 * hips * hips) * each(a.trunk_width) * (1 + 0.015 * tissue)
