"""Grad-CAM against captum, and scores of maps against known masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import nn

from genailab_helpers.classification import explanation as xai
from genailab_helpers.classification.networks import build_backbone
from genailab_helpers.classification.training import load_classifier
from genailab_helpers.phantoms.chest import CONFOUNDERS, render_chests, sample_chests
from genailab_helpers.phantoms.spine import SIGNS, render_spines, sample_spines

SAMPLES = Path(__file__).parents[2] / "data/samples"


def films(n, img_size, seed=0):
    return torch.rand((n, 1, img_size, img_size), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def captum(network, layer, images, target):
    coarse = LayerGradCam(network, layer).attribute(images, target=target, relu_attributions=True)
    return LayerAttribution.interpolate(coarse, images.shape[-2:], "bilinear")[:, 0].detach()


@pytest.mark.parametrize(("name", "layer", "img_size"), [
    ("small_cnn", "body.0", 96), ("efficientnet_lite0", "body.0", 96), ("resnet18", "body.layer4", 70)])
def test_grad_cam_equals_captum(name, layer, img_size):
    network = build_backbone(name, 5, pretrained=name == "efficientnet_lite0").eval()
    images, target = films(3, img_size), torch.tensor([0, 3, 4])
    expected = captum(network, network.get_submodule(layer), images, target)
    cams = xai.grad_cam(network, images, lambda z: z.gather(1, target[:, None])[:, 0])
    assert cams.shape == (3, img_size, img_size)
    assert expected.max() > 0
    assert (cams - expected).abs().max() <= 1e-4 * expected.max()


def test_small_maps_are_passed_over_on_demand_and_any_score_equals_captum():
    network = build_backbone("small_cnn", 4).eval()
    wrapped = nn.Sequential(network, nn.Linear(4, 1, bias=False))
    nn.init.ones_(wrapped[1].weight)
    expected = captum(wrapped, network.body[0][11], films(2, 64), 0)  # the last layer whose maps are 8x8
    cams = xai.grad_cam(network, films(2, 64), lambda z: z.sum(1), min_side=8)
    torch.testing.assert_close(cams, expected, rtol=0, atol=1e-4 * expected.max().item())
    assert not torch.equal(cams, xai.grad_cam(network, films(2, 64), lambda z: z.sum(1)))
    with pytest.raises(ValueError, match="network: expected a layer that gives maps of 100 pixels"):
        xai.grad_cam(network, films(1, 64), lambda z: z.sum(1), min_side=100)


def test_grad_cam_leaves_the_network_as_it_was():
    network = build_backbone("small_cnn", 2).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():  # also where the caller wants no gradients
        xai.grad_cam(network, films(2, 64), lambda z: z[:, 0])
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_a_network_without_maps_is_refused():
    network = build_backbone("frozen_lite0", 3)
    with pytest.raises(ValueError, match="network: expected a layer that gives maps"):
        xai.grad_cam(network, films(1, 64), lambda z: z[:, 0])
    with pytest.raises(ValueError, match="images: expected the shape"):
        xai.grad_cam(network, films(1, 64)[0], lambda z: z[:, 0])


def test_pointing_game_and_energy_by_hand():
    cams, masks = torch.zeros(4, 4, 4), torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[:, 1, 2] = masks[:, 1, 3] = True
    cams[0, 1, 2], cams[0, 0, 0] = 3.0, 1.0  # on the lesion, three quarters of it
    cams[1, 1, 3], cams[1, 3, 0] = 1.0, 4.0  # beside it, one fifth of it
    cams[3, 1, 2] = cams[3, 0, 0] = cams[3, 2, 2] = 2.0  # three places alike, one on the lesion
    chance = 2 / 16  # the third map is empty
    torch.testing.assert_close(xai.pointing_game(cams, masks), torch.tensor([1.0, 0.0, chance, 1 / 3]))
    torch.testing.assert_close(xai.energy_in_mask(cams, masks), torch.tensor([0.75, 0.2, chance, 1 / 3]))


def test_widened_masks_hold_all_pixels_within_reach():
    masks = torch.zeros(2, 7, 9, dtype=torch.bool)
    masks[0, 3, 4] = masks[1, 0, 0] = True
    wide = xai.widen(masks, 2)
    assert wide.dtype == torch.bool
    square = [[y, x] for y in range(1, 6) for x in range(2, 7)]
    assert torch.equal(torch.nonzero(wide[0]), torch.tensor(square))
    assert torch.equal(torch.nonzero(wide[1]), torch.tensor([[y, x] for y in range(3) for x in range(3)]))
    assert torch.equal(xai.widen(masks, 0), masks)


@pytest.mark.parametrize("measure", [xai.pointing_game, xai.energy_in_mask])
def test_chance_lies_within_the_control_and_a_network_that_follows_a_marker_above_it(measure):
    chests = sample_chests(24, 5, "COVID")
    carried = torch.zeros_like(chests.confounders)
    carried[:, CONFOUNDERS.index("marker")] = True
    drawn = render_chests(chests.changed(confounders=carried), 64, masks=True)
    images, near = drawn.images, xai.widen(drawn.masks["marker"], 4)
    network = load_classifier(SAMPLES / "marker_classifier.safetensors").network

    def score(z):
        return z[:, 1] - z[:, 0]

    found = xai.control(measure, network, images, score, near, min_side=8)
    assert found.low <= near.float().mean() <= found.high
    assert measure(xai.grad_cam(network, images, score, min_side=8), near).mean() > found.high
    random = (xai.randomise_weights(network, seed) for seed in range(20))
    each = [measure(xai.grad_cam(net, images, score, min_side=8), near).mean().item() for net in random]
    assert found.value == pytest.approx(np.mean(each))
    assert (found.low, found.high, found.n) == (*np.quantile(each, [0.025, 0.975]), 20)


def test_chance_lies_within_the_control_of_the_grader():
    drawn = render_spines(sample_spines(60, 4)[:24].changed(severity=0.9), 96, masks=True)
    near = xai.widen(torch.stack([drawn.masks[name] for name in SIGNS]).any(0), 2)
    model = load_classifier(SAMPLES / "spine_grader.safetensors")

    def score(z):  # the expected grade, as in lesson 4
        return (model.loss.probabilities(z / 10) * torch.arange(5)).sum(1)

    found = xai.control(xai.pointing_game, model.network, drawn.images, score, near, min_side=8)
    assert found.low <= near.float().mean() <= found.high


@pytest.mark.parametrize(("masks", "message"), [
    (torch.zeros(2, 4, 4), "bool"), (torch.ones(2, 4, 5, dtype=torch.bool), r"\(2, 4, 5\)"),
    (torch.zeros(2, 4, 4, dtype=torch.bool), "each with a lesion")])
def test_wrong_masks_are_refused(masks, message):
    for measure in (xai.pointing_game, xai.energy_in_mask):
        with pytest.raises(ValueError, match=message):
            measure(torch.rand(2, 4, 4), masks)


def test_randomised_weights_keep_their_size_and_forget():
    network = build_backbone("efficientnet_lite0", 2).eval()
    state = torch.random.get_rng_state()
    shuffled, again, other = (xai.randomise_weights(network, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [dict(n.named_parameters())["body.0.network._conv_head.weight"] for n in
               (network, shuffled, again, other)]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0].flatten().sort().values, weights[1].flatten().sort().values)
