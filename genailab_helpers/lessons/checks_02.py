"""Self-checks of lesson 2, synthetic X-rays."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from genailab_helpers.lessons.exercises import NotSolved, expect_close, self_check


def _is(got: Any, mistake: Any) -> bool:
    """Tell whether an answer is what a known mistake gives."""
    got, mistake = (torch.as_tensor(value, dtype=torch.float64) for value in (got, mistake))
    same_shape = got.shape == mistake.shape
    return bool(same_shape and torch.allclose(got, mistake, rtol=1e-3, atol=1e-6, equal_nan=True))


def _name(got: Any, mistakes: dict[str, Any]) -> None:
    """Refuse an answer that a known mistake explains."""
    for words, mistake in mistakes.items():
        if _is(got, mistake):
            raise NotSolved(words)


@self_check("2.1")
def cortex_of_a_rib(cortex: Any) -> None:
    """Path length in the wall of a tube."""
    distance, outer, inner = torch.tensor([0.0, 0.2, 0.45, 0.8]), 0.6, 0.4

    def chord(radius: float) -> Tensor:
        return 2 * (radius**2 - distance**2).clamp(min=0).sqrt()

    right, got = chord(outer) - chord(inner), torch.as_tensor(cortex(distance, outer, inner))
    if torch.isnan(got).any():
        raise NotSolved("expected 0 where a ray misses a cylinder, got nan (negative number under a root)")
    _name(got, {
        "got the path through a solid cylinder; expected the wall alone, without the marrow": chord(outer),
        "got half of the path; a ray crosses the wall on both sides, expected twice as much": right / 2,
        "got the path through a cylinder of radius outer - inner; expected the difference of two paths, "
        "not the path of a difference": chord(outer - inner),
        "got the wall's thickness everywhere; away from the axis a ray cuts the wall at a slant":
            torch.full_like(distance, 2 * (outer - inner))})
    expect_close(got, right, "the path length in the wall at distances 0, 0.2, 0.45 and 0.8 cm")


@self_check("2.2")
def bone_by_two_energies(bone_thickness: Any) -> None:
    """Thickness of bone from two transmitted fractions."""
    mu, soft, bone = np.array([[0.24, 0.80], [0.18, 0.36]]), np.array([10.0, 15.0]), np.array([0.0, 1.5])
    low, high = (np.exp(-(row[0] * soft + row[1] * bone)) for row in mu)
    got = np.asarray(bone_thickness(low, high, mu), dtype=float)

    def solve(first: Any, second: Any, matrix: Any) -> Any:
        return np.linalg.solve(matrix, np.stack([first, second]))

    lines = -np.log(low), -np.log(high)
    _name(got, {
        "got the soft tissue (10 and 15 cm); expected the bone (0 and 1.5 cm)": soft,
        "got negative thicknesses: the line integral is minus the logarithm": -bone,
        "you solved for the fractions themselves; only their logarithms add up": solve(low, high, mu)[1],
        "the rows of mu are energies and its columns tissues; you used mu transposed": solve(*lines, mu.T)[1],
        "you exchanged the low and the high energy": solve(*lines[::-1], mu)[1],
        "you took log10; the Beer-Lambert law needs the natural logarithm": bone / np.log(10)})
    expect_close(got, bone, "the thickness of bone behind 10 cm and 15 cm of soft tissue")


@self_check("2.3")
def heart_share(ratio: Any) -> None:
    """Cardiothoracic ratio from masks."""
    heart, right_lung, left_lung = torch.zeros(3, 12, 20, dtype=torch.bool)
    heart[6:8, 7:11] = heart[8:10, 8:14] = True  # 7 columns in all, 6 in its widest row
    right_lung[2:7, 3:8] = right_lung[7:11, 1:7] = True
    left_lung[2:7, 12:17] = left_lung[7:11, 13:19] = True  # both: columns 1 to 18
    got = float(ratio(heart, right_lung, left_lung))
    lungs = right_lung | left_lung
    _name(got, {
        "got a ratio of areas; expected a ratio of widths": float(heart.sum()) / float((lungs | heart).sum()),
        "got a ratio of areas, without the heart in the chest": float(heart.sum()) / float(lungs.sum()),
        "you counted pixels of the lungs in a row; what lies between the lungs is chest too": 7 / 12,
        "you took the heart's widest row; its two borders may be in another row each": 6 / 18,
        "the last column minus the first is one too few; both ends count": 6 / 17,
        "got a ratio of heights; columns run across the chest, rows run down": 4 / 9,
        "one lung is not the width of the chest; expected from the outer border of one to that of the other":
            7 / 7,
        "got the chest over the heart; expected the heart over the chest": 18 / 7})
    expect_close(got, 7 / 18, "the ratio for a heart 7 columns wide in a chest 18 columns wide")


@self_check("2.4")
def noise_without_anatomy(noise_of: Any) -> None:
    """Standard deviation of the noise from two exposures."""
    generator = torch.Generator().manual_seed(24)
    region = torch.zeros(40, 40, dtype=torch.bool)
    region[5:30, 8:36] = True
    anatomy = torch.linspace(-1, 1, 40).expand(40, 40)
    for level in (0.02, 0.2):
        first, second = (anatomy + level * torch.randn(40, 40, generator=generator) for _ in range(2))
        difference, got = (first - second)[region], torch.as_tensor(noise_of(first, second, region))
        _name(got, {
            "got the standard deviation of one exposure, which holds the anatomy too": first[region].std(),
            "got the standard deviation of the difference, which carries the noise of two exposures; "
            "expected that of one": difference.std(),
            "you divided by 2; variances add up, standard deviations do not": difference.std() / 2,
            "got the variance; expected its square root": difference.var() / 2,
            "got the standard deviation of the average of both, which holds the anatomy too":
                ((first + second) / 2)[region].std(),
            "you left out the region": (first - second).std() / 2**0.5})
        if abs(float(got) - level) > 0.15 * level:
            raise NotSolved(f"the noise of two exposures: expected about {level}, got {float(got):.3g}")
