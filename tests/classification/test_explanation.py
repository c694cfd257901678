"""Grad-CAM against captum, and scores of maps against known masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn

from genailab_helpers.classification.explanation import (
    control,
    energy_in_mask,
    grad_cam,
    pointing_game,
    randomise_weights,
    widen,
)
from genailab_helpers.classification.networks import build_backbone
from genailab_helpers.classification.training import load_classifier
from genailab_helpers.phantoms.chest import CONFOUNDERS, render_chests, sample_chests
from genailab_helpers.phantoms.spine import SIGNS, render_spines, sample_spines

SAMPLES = Path(__file__).parents[2] / "data/samples"


def films(n: int, img_size: int, seed: int = 0) -> Tensor:
    return torch.rand((n, 1, img_size, img_size), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def last_maps(name: str, network: nn.Module) -> nn.Module:
    return network.body.layer4 if name == "resnet18" else network.body[0]


@pytest.mark.parametrize(("name", "img_size"),
                         [("small_cnn", 96), ("efficientnet_lite0", 96), ("resnet18", 70)])
def test_grad_cam_equals_captum(name: str, img_size: int) -> None:
    network = build_backbone(name, 5, pretrained=name == "efficientnet_lite0").eval()
    images, target = films(3, img_size), torch.tensor([0, 3, 4])
    layer = last_maps(name, network)
    coarse = LayerGradCam(network, layer).attribute(images, target=target, relu_attributions=True)
    expected = LayerAttribution.interpolate(coarse, images.shape[-2:], "bilinear")[:, 0]
    cams = grad_cam(network, images, lambda z: z.gather(1, target[:, None])[:, 0])
    assert cams.shape == (3, img_size, img_size)
    assert expected.max() > 0
    assert (cams - expected).abs().max() <= 1e-4 * expected.max()


def test_small_maps_are_passed_over_on_demand_and_any_score_equals_captum() -> None:
    network = build_backbone("small_cnn", 4).eval()
    wrapped = nn.Sequential(network, nn.Linear(4, 1, bias=False))
    nn.init.ones_(wrapped[1].weight)
    layer = network.body[0][11]  # the last layer whose maps are 8x8
    coarse = LayerGradCam(wrapped, layer).attribute(films(2, 64), target=0, relu_attributions=True)
    expected = LayerAttribution.interpolate(coarse, (64, 64), "bilinear")[:, 0]
    cams = grad_cam(network, films(2, 64), lambda z: z.sum(1), min_side=8)
    torch.testing.assert_close(cams, expected.detach(), rtol=0, atol=1e-4 * expected.max().item())
    assert not torch.equal(cams, grad_cam(network, films(2, 64), lambda z: z.sum(1)))
    with pytest.raises(ValueError, match="network: expected a layer that gives maps of 100 pixels"):
        grad_cam(network, films(1, 64), lambda z: z.sum(1), min_side=100)


def test_grad_cam_leaves_the_network_as_it_was() -> None:
    network = build_backbone("small_cnn", 2).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():  # also where the caller wants no gradients
        grad_cam(network, films(2, 64), lambda z: z[:, 0])
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_grad_cam_finds_the_only_thing_that_counts() -> None:
    """A network that sums the bright pixels of the right half looks there and nowhere else."""
    class RightHalf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Conv2d(1, 1, 1, bias=False)
            nn.init.ones_(self.maps.weight)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.maps(images + 1)
            return maps[..., maps.shape[-1] // 2:].mean((2, 3))

    image = torch.full((1, 1, 16, 16), -1.0)
    image[0, 0, 4, 12] = 1.0
    cam = grad_cam(RightHalf(), image, lambda z: z[:, 0])
    assert cam[0].flatten().argmax() == 4 * 16 + 12
    assert (cam > 0).sum() == 1


def test_a_network_without_maps_is_refused() -> None:
    network = build_backbone("frozen_lite0", 3)
    with pytest.raises(ValueError, match="network: expected a layer that gives maps"):
        grad_cam(network, films(1, 64), lambda z: z[:, 0])
    with pytest.raises(ValueError, match="images: expected the shape"):
        grad_cam(network, films(1, 64)[0], lambda z: z[:, 0])


def test_pointing_game_and_energy_by_hand() -> None:
    cams, masks = torch.zeros(4, 4, 4), torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[:, 1, 2] = masks[:, 1, 3] = True
    cams[0, 1, 2], cams[0, 0, 0] = 3.0, 1.0  # on the lesion, three quarters of it
    cams[1, 1, 3], cams[1, 3, 0] = 1.0, 4.0  # beside it, one fifth of it
    cams[3, 1, 2] = cams[3, 0, 0] = cams[3, 2, 2] = 2.0  # three places alike, one on the lesion
    chance = 2 / 16  # the third map is empty
    torch.testing.assert_close(pointing_game(cams, masks), torch.tensor([1.0, 0.0, chance, 1 / 3]))
    torch.testing.assert_close(energy_in_mask(cams, masks), torch.tensor([0.75, 0.2, chance, 1 / 3]))


def test_widened_masks_hold_all_pixels_within_reach() -> None:
    masks = torch.zeros(2, 7, 9, dtype=torch.bool)
    masks[0, 3, 4] = masks[1, 0, 0] = True
    wide = widen(masks, 2)
    assert wide.dtype == torch.bool
    square = [[y, x] for y in range(1, 6) for x in range(2, 7)]
    assert torch.equal(torch.nonzero(wide[0]), torch.tensor(square))
    assert torch.equal(torch.nonzero(wide[1]), torch.tensor([[y, x] for y in range(3) for x in range(3)]))
    assert torch.equal(widen(masks, 0), masks)


@pytest.fixture
def marked() -> tuple[Tensor, Tensor]:
    """Chests with a marker, and where it is."""
    chests = sample_chests(24, 5, "COVID")
    carried = torch.zeros_like(chests.confounders)
    carried[:, CONFOUNDERS.index("marker")] = True
    drawn = render_chests(chests.changed(confounders=carried), 64, masks=True)
    return drawn.images, widen(drawn.masks["marker"], 4)


@pytest.mark.parametrize("measure", [pointing_game, energy_in_mask])
def test_chance_lies_within_the_control_and_a_network_that_follows_a_marker_above_it(
        measure: Any, marked: tuple[Tensor, Tensor]) -> None:
    images, near = marked
    network = load_classifier(SAMPLES / "marker_classifier.safetensors").network

    def score(z: Tensor) -> Tensor:
        return z[:, 1] - z[:, 0]

    found = control(measure, network, images, score, near, min_side=8)
    assert found.low <= near.float().mean() <= found.high
    assert measure(grad_cam(network, images, score, min_side=8), near).mean() > found.high
    each = [measure(grad_cam(randomise_weights(network, seed), images, score, min_side=8), near).mean().item()
            for seed in range(20)]
    assert found.value == pytest.approx(np.mean(each))
    assert (found.low, found.high, found.n) == (*np.quantile(each, [0.025, 0.975]), 20)


def test_chance_lies_within_the_control_of_the_grader() -> None:
    drawn = render_spines(sample_spines(60, 4)[:24].changed(severity=0.9), 96, masks=True)
    near = widen(torch.stack([drawn.masks[name] for name in SIGNS]).any(0), 2)
    model = load_classifier(SAMPLES / "spine_grader.safetensors")

    def score(z: Tensor) -> Tensor:  # the expected grade, as in lesson 4
        return (model.loss.probabilities(z / 10) * torch.arange(5)).sum(1)

    found = control(pointing_game, model.network, drawn.images, score, near, min_side=8)
    assert found.low <= near.float().mean() <= found.high


def test_random_maps_score_at_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    cams, masks = torch.rand((4000, 10, 10), generator=generator), torch.zeros(4000, 10, 10, dtype=torch.bool)
    masks[:, :2, :] = True  # a fifth; four standard errors of a share of 4000 are 0.025
    assert abs(pointing_game(cams, masks).float().mean() - 0.2) < 0.025
    assert abs(energy_in_mask(cams, masks).mean() - 0.2) < 0.005


@pytest.mark.parametrize(("masks", "message"), [
    (torch.zeros(2, 4, 4), "bool"), (torch.ones(2, 4, 5, dtype=torch.bool), r"\(2, 4, 5\)"),
    (torch.zeros(2, 4, 4, dtype=torch.bool), "without lesion")])
def test_wrong_masks_are_refused(masks: Tensor, message: str) -> None:
    for measure in (pointing_game, energy_in_mask):
        with pytest.raises(ValueError, match=message):
            measure(torch.rand(2, 4, 4), masks)


def test_randomised_weights_keep_their_size_and_forget() -> None:
    network = build_backbone("efficientnet_lite0", 2).eval()
    state = torch.random.get_rng_state()
    shuffled, again, other = (randomise_weights(network, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [dict(n.named_parameters())["body.0.network._conv_head.weight"] for n in
               (network, shuffled, again, other)]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0].flatten().sort().values, weights[1].flatten().sort().values)
