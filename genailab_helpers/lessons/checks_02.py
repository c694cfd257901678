"""Self-checks of lesson 2, synthetic X-rays."""

from typing import Any

import numpy as np
import torch

from genailab_helpers.lessons.exercises import NotSolved, expect_close, self_check
from genailab_helpers.phantoms.chest import render_chests, sample_chests


@self_check("2.1")
def layers(transmission: Any) -> None:
    """Beer-Lambert through several layers."""
    generator = np.random.default_rng(21)
    for n_layers in (1, 2, 5):
        thickness, mu = generator.uniform(0.1, 5, n_layers), generator.uniform(0.05, 0.6, n_layers)
        got = transmission(thickness, mu)
        if np.size(got) != 1:
            raise NotSolved(f"{n_layers} layers have one transmission together; {np.size(got)} numbers came")
        expect_close(torch.tensor(float(got)), torch.tensor(float(np.exp(-(thickness * mu).sum()))),
                     f"the transmission through {n_layers} layers")


@self_check("2.2")
def sphere(chord: Any) -> None:
    """Path length through a sphere."""
    distance = torch.linspace(0, 1.5, 16)
    right = 2 * (1 - distance**2).clamp(min=0).sqrt()
    got = torch.as_tensor(chord(distance, 1.0))
    if torch.isnan(got).any():
        raise NotSolved("a ray that misses the sphere gives nan; it travels no distance inside")
    expect_close(got, right, "the chord of a sphere of radius 1")
    expect_close(torch.as_tensor(chord(distance, 2.0)), 2 * (4 - distance**2).sqrt() / 1.0,
                 "the chord of a sphere of radius 2")


@self_check("2.3")
def heart_share(ratio: Any) -> None:
    """Cardiothoracic ratio from masks."""
    chests = sample_chests(4, seed=23).changed(magnification=0.9, lean=0.0, bend=0.0, turn=0.0)
    masks = render_chests(chests, 64, masks=True).masks
    thorax = masks["right_lung"] | masks["left_lung"] | masks["heart"]
    for i in range(len(chests)):
        def width(mask: torch.Tensor) -> int:
            columns = torch.nonzero(mask.any(dim=0))[:, 0]
            return int(columns.max() - columns.min()) + 1
        right = width(masks["heart"][i]) / width(thorax[i])
        got = float(ratio(masks["heart"][i], thorax[i]))
        if got > 1:
            raise NotSolved("the ratio is above 1, but the heart lies inside the chest")
        expect_close(torch.tensor(got), torch.tensor(right), "the cardiothoracic ratio")


@self_check("2.4")
def lesion_contrast(contrast: Any) -> None:
    """Contrast-to-noise ratio of a patch."""
    generator = torch.Generator().manual_seed(24)
    for step in (0.0, 0.3, -0.5):
        image = torch.randn(40, 40, generator=generator) * 0.1
        lesion = torch.zeros(40, 40, dtype=torch.bool)
        lesion[10:20, 5:25] = True
        around = torch.zeros_like(lesion)
        around[22:38, 5:35] = True
        image = image + step * lesion
        right = (image[lesion].mean() - image[around].mean()) / image[around].std()
        expect_close(torch.as_tensor(contrast(image, lesion, around)), right, "the contrast-to-noise ratio")
