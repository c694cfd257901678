"""The forward process against diffusers, and the denoiser against what theory says of it."""

import pytest
import torch

from genailab_helpers.diffusion.architectures import UNet2D
from genailab_helpers.diffusion.denoiser import (
    Denoiser,
    add_noise,
    karras_sigmas,
    linear_schedule,
    load_denoiser,
    save_denoiser,
)

TINY = dict(base_channels=8, channel_multipliers=(1, 2), time_emb_dim=16)


def tiny(img_size: int = 8, n_components: int = 8, **more) -> Denoiser:
    return Denoiser(UNet2D(**TINY, **more), img_size, n_components)


@pytest.mark.parametrize("n_times", [10, 1000])
def test_the_schedule_and_noisy_images_equal_those_of_diffusers(n_times):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=n_times)
    torch.testing.assert_close(linear_schedule(n_times), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    images, noise = torch.rand(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    times = torch.tensor([0, n_times // 2, n_times - 1])
    left = linear_schedule(n_times)[times]
    theirs = scheduler.add_noise(images, noise, times) / left.sqrt()[:, None, None, None]
    torch.testing.assert_close(add_noise(images, noise, ((1 - left) / left).sqrt()), theirs,
                               rtol=1e-4, atol=1e-4)


def test_karras_levels_fall_from_80_to_0_as_in_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(18)
    torch.testing.assert_close(karras_sigmas(18, 0.002), scheduler.sigmas.float(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="n_steps=0"):
        karras_sigmas(0)


def test_without_fit_the_denoiser_is_that_of_karras():
    denoiser = tiny()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.05, 0.5, 5.0])
    s, total = sigma[:, None, None, None], sigma[:, None, None, None] ** 2 + 0.25
    network = denoiser.network(x / total.sqrt(), sigma.log() / 4)
    expected = 0.25 / total * x + s * 0.5 / total.sqrt() * network  # table 1, sigma_data = 0.5
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-4, atol=1e-5)


def gaussian_images(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw 8x8 images from a Gaussian with three strong directions; return them, its mean and covariance."""
    generator = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(64, 3, generator=generator))
    power = torch.tensor([2.0, 1.0, 0.5])
    mean = torch.randn(64, generator=generator) * 0.3
    flat = torch.randn(n, 3, generator=generator) * power.sqrt() @ directions.T
    flat += mean + 0.1 * torch.randn(n, 64, generator=generator)
    return flat.reshape(n, 1, 8, 8), mean, directions * power @ directions.T + 0.01 * torch.eye(64)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_a_fitted_denoiser_without_network_is_the_best_linear_estimate(sigma):
    images, mean, covariance = gaussian_images(4_000)
    denoiser = tiny(n_components=3)  # the network returns zeros until it is trained
    denoiser.fit(images)
    x = images[:50] + sigma * torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(64))
    expected = mean + (x.flatten(1) - mean) @ gain.T
    estimate = denoiser(x, torch.tensor(sigma)).detach().flatten(1)
    torch.testing.assert_close(estimate, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_c_out_is_the_error_that_the_linear_estimate_makes(sigma):
    images, _, _ = gaussian_images(4_000)
    denoiser = tiny(n_components=3)
    denoiser.fit(images)
    level = torch.full((len(images),), sigma)
    x = add_noise(images, torch.randn(images.shape, generator=torch.Generator().manual_seed(1)), level)
    c_out, c_in = denoiser.scales(level)
    error = (denoiser.linear_estimate(x, level) - images).square().mean().sqrt()
    assert error.item() == pytest.approx(c_out[0].item(), rel=0.02)
    spread = (x.flatten(1) - denoiser.mean).square().mean().sqrt() * c_in.flatten()[0]
    assert spread.item() == pytest.approx(1, rel=0.02)


def test_fit_works_with_fewer_images_than_directions_and_with_equal_ones():
    few = tiny(n_components=32)
    few.fit(gaussian_images(5)[0])
    equal = tiny()
    equal.fit(torch.full((4, 1, 8, 8), 0.25))
    for denoiser in (few, equal):
        x = torch.randn(2, 1, 8, 8)
        assert denoiser(x, torch.tensor(1.0)).isfinite().all()
    assert torch.allclose(equal(torch.randn(2, 1, 8, 8), torch.tensor(1.0)), torch.tensor(0.25), atol=1e-3)


def test_an_img_size_that_the_network_cannot_halve_is_refused():
    with pytest.raises(ValueError, match=r"img_size=30 cannot be halved.*multiple of 4"):
        tiny(img_size=30)


def test_a_recipe_builds_the_same_denoiser(tmp_path):
    denoiser = tiny(num_classes=3)
    denoiser.fit(gaussian_images(100)[0])
    save_denoiser(tmp_path / "model.safetensors", denoiser, {"steps": 12})
    loaded = load_denoiser(tmp_path / "model.safetensors")
    assert loaded.recipe == denoiser.recipe
    assert all(torch.equal(a, b) for a, b in zip(denoiser.state_dict().values(), loaded.state_dict().values(),
                                                 strict=True))
    assert not loaded.training
