"""Networks for radiographs: one door for grey images, installed weights, one line without network."""

import pytest
import torch

from genailab_helpers.classification.losses import Coral
from genailab_helpers.classification.networks import FrozenLite0, build_backbone
from genailab_helpers.features import lite0_features


def inputs_of(module):
    """Return a list of what the module will be given."""
    seen = []
    module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    return seen


def films(n, img_size, seed=0):
    return torch.rand((n, 1, img_size, img_size), generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", ["small_cnn", "local_cnn", "efficientnet_lite0", "frozen_lite0",
                                  "resnet18", "vgg11", "mobilenet_v3_small", "densenet121"])
def test_every_backbone_gives_logits_of_grey_images(name):
    before = torch.random.get_rng_state()
    network = build_backbone(name, Coral(5).head, pretrained=False).eval()
    assert torch.equal(before, torch.random.get_rng_state())
    assert network(films(2, 64)).shape == (2, 4)
    assert type(network.head).__name__ == "CoralHead"
    assert build_backbone(name, 3, pretrained=False).eval()(films(1, 64)).shape == (1, 3)


def test_each_place_of_the_local_network_sees_eighteen_pixels_around_its_middle():
    network = build_backbone("local_cnn", 2).eval()
    images = films(1, 64).requires_grad_()
    maps = network.body[0](network.mean.new_tensor(0) + images)
    assert maps.shape == (1, 192, 16, 16)
    for row, column in ((7, 7), (4, 10)):
        (slopes,) = torch.autograd.grad(maps[0, :, row, column].sum(), images, retain_graph=True)
        seen = torch.nonzero(slopes[0, 0])
        low, high = seen.min(0).values, seen.max(0).values
        assert (high - low + 1).tolist() == [18, 18]
        middle = (low + high).float() / 2
        assert middle.tolist() == [4 * row + 1.5, 4 * column + 1.5]  # where `interpolate` puts this place


def test_what_is_trained_starts_at_the_frozen_features():
    """Averaged, the maps of the trainable network are those of features.py: same weights and scaling."""
    network = build_backbone("efficientnet_lite0", 5).eval()
    seen = inputs_of(network.head)
    network(films(3, 96))
    expected = torch.from_numpy(lite0_features(films(3, 96), side=96)).float()
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


def test_training_one_network_leaves_the_frozen_one_alone(tmp_path, monkeypatch):
    before = lite0_features(films(1, 64), side=64)
    network = build_backbone("efficientnet_lite0", 2)
    assert all(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path))  # computed again
    after = torch.from_numpy(lite0_features(films(1, 64), side=64))
    torch.testing.assert_close(after, torch.from_numpy(before), rtol=1e-4, atol=1e-4)  # of another batch


def test_random_weights_are_named_by_the_seed():
    one, same, other = (next(build_backbone("small_cnn", 2, seed=seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_black_and_white_reach_the_body_as_the_photographs_did():
    """White is 1 before (x - 0.45) / 0.225, in three equal channels."""
    network = build_backbone("resnet18", 2, pretrained=False).eval()
    seen = inputs_of(network.body.conv1)
    network(torch.cat([torch.ones(1, 1, 40, 40), -torch.ones(1, 1, 40, 40)]))
    assert seen[0].shape == (2, 3, 40, 40)
    torch.testing.assert_close(seen[0][0], torch.full((3, 40, 40), (1 - 0.45) / 0.225))
    torch.testing.assert_close(seen[0][1], torch.full((3, 40, 40), -0.45 / 0.225))


def test_the_frozen_network_standardises():
    network = build_backbone("frozen_lite0", 2).eval()
    assert isinstance(network, FrozenLite0)
    network.fit(network.describe(films(4, 64)))
    inputs = inputs_of(network.head)
    network(films(4, 64))
    torch.testing.assert_close(inputs[0].mean(0), torch.zeros(1280), rtol=0, atol=1e-4)
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(("name", "message"), [
    ("resnet_18", "expected small_cnn, local_cnn, efficientnet_lite0, frozen_lite0, or a classification"),
    ("fcn_resnet50", "expected small_cnn"),  # of torchvision, but no classifier
    ("squeezenet1_1", "do not come from one linear layer"),
    ("inception_v3", "do not come from one linear layer")])
def test_unknown_and_unfit_networks_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, 2, pretrained=False)
