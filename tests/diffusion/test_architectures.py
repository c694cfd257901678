"""The U-Net: shapes, labels, and what it refuses."""

import pytest
import torch

from genailab_helpers.diffusion.architectures import UNet2D


def awake(network: UNet2D) -> UNet2D:
    """Give the weights that start at zero a value, so that the output depends on everything."""
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        if not p.any():
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return network


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("shape", [(16, 16), (32, 16)])
def test_the_output_has_the_shape_of_the_input(patch_size, shape):
    network = UNet2D(2, 3, 8, (1, 2), num_res_blocks=2, time_emb_dim=16, patch_size=patch_size)
    assert network(torch.zeros(5, 2, *shape), torch.zeros(5)).shape == (5, 3, *shape)


def test_an_untrained_network_returns_zeros_and_every_weight_can_learn():
    network = UNet2D(base_channels=8, channel_multipliers=(1, 2), time_emb_dim=16, num_classes=2)
    x, t, labels = torch.randn(3, 1, 16, 16), torch.randn(3), torch.tensor([0, 1, 2])
    assert not network(x, t, labels).any()
    awake(network)(x, t, labels).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_time_and_label_change_the_output_and_none_is_the_untold_label():
    network = awake(UNet2D(base_channels=8, channel_multipliers=(1, 2), time_emb_dim=16, num_classes=2))
    x, t = torch.randn(1, 1, 16, 16), torch.zeros(1)
    out = [network(x, t, torch.tensor([label])) for label in (0, 1, 2)]
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(network(x, t + 0.1, torch.tensor([0])), out[0])
    assert torch.equal(network(x, t), out[2])


def test_images_of_a_batch_do_not_see_each_other():
    network = awake(UNet2D(base_channels=8, channel_multipliers=(1, 2), time_emb_dim=16))
    x, t = torch.randn(4, 1, 16, 16), torch.randn(4)
    assert torch.allclose(network(x, t)[1:2], network(x[1:2], t[1:2]), atol=1e-5)


def test_attention_carries_news_from_one_side_to_the_other():
    network = awake(UNet2D(base_channels=32, channel_multipliers=(1,), time_emb_dim=16, patch_size=1))
    x = torch.randn(1, 1, 32, 32)
    other = x.clone()
    other[..., -1] += 1  # the convolutions reach 6 pixels
    assert not torch.equal(network(x, torch.zeros(1))[..., 0], network(other, torch.zeros(1))[..., 0])


def test_labels_for_a_network_without_classes_are_refused():
    with pytest.raises(ValueError, match="build it with num_classes"):
        UNet2D(base_channels=8)(torch.zeros(1, 1, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))
