"""The samplers against diffusers step by step, and on a Gaussian whose every step is known."""

import pytest
import torch
from torch import Tensor

from genailab_helpers.diffusion.architectures import UNet2D
from genailab_helpers.diffusion.process import Denoiser, cosine_schedule, karras_sigmas, schedule_to_sigma
from genailab_helpers.diffusion.sampling import (
    generate,
    sample_ddim,
    sample_ddpm,
    sample_dpm,
    sample_heun,
)

SAMPLERS = [sample_ddpm, sample_ddim, sample_heun, sample_dpm]


class Gaussian:
    """Best denoiser of pixels that are independent and normal: its score is known."""

    image_shape = (1, 4, 4)
    mean, std = 0.1, 0.2

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)


class Crooked:
    """A denoiser that is no Gaussian's and mixes pixels, to tell samplers apart."""

    image_shape = (1, 4, 4)
    num_classes = 3

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = 0 if labels is None else 0.2 * (labels[:, None, None, None] + 1)
        return torch.tanh((x + x.roll(1, -1)) / (1 + sigma)) / 2 + shift


def vp_levels(n_steps: int) -> tuple[Tensor, Tensor]:
    """Return times of the cosine schedule, the noisiest first, and their sigmas with a last 0."""
    times = torch.arange(n_steps).flip(0) * (1000 // n_steps)
    return times, torch.cat((schedule_to_sigma(cosine_schedule())[times], torch.zeros(1)))


@pytest.mark.parametrize(("sampler", "name"),
                         [(sample_ddpm, "DDPMScheduler"), (sample_ddim, "DDIMScheduler")])
def test_ddpm_and_ddim_equal_diffusers_at_every_step(sampler, name):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(beta_schedule="squaredcos_cap_v2", prediction_type="sample",
                                         clip_sample=False)
    scheduler.set_timesteps(20)
    times, sigmas = vp_levels(20)
    assert torch.equal(times, scheduler.timesteps)
    ours: list[Tensor] = []
    sampler(Crooked(), 3, seed=5, sigmas=sigmas, callback=lambda step, x, estimate: ours.append(x))

    generator = torch.Generator().manual_seed(5)
    schedule = cosine_schedule()
    x = torch.randn(3, 1, 4, 4, generator=generator) * (1 - schedule[times[0]]).sqrt()
    for t, sigma, our in zip(times, sigmas, ours, strict=False):
        # theirs is the form that preserves variance; at low signal the difference is that of float32
        torch.testing.assert_close(our * schedule[t].sqrt(), x, rtol=1e-4, atol=1e-4)
        estimate = Crooked()(x / schedule[t].sqrt(), sigma)
        more = {"generator": generator} if sampler is sample_ddpm else {}
        x = scheduler.step(estimate, t, x, **more).prev_sample


def test_heun_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    sigmas = karras_sigmas(12, 0.01, 10.0)
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type="sample")
    scheduler.set_timesteps(12)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(5)) * sigmas[0]
    denoiser = Gaussian()
    for t in scheduler.timesteps:
        index = scheduler.step_index or 0
        x = scheduler.step(denoiser(x, scheduler.sigmas[index]), t, x).prev_sample
    ours = sample_heun(denoiser, 3, seed=5, sigmas=sigmas)
    torch.testing.assert_close(ours, x.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_dpm_equals_diffusers_at_every_step():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="sample",
        lower_order_final=True, final_sigmas_type="zero")
    scheduler.set_timesteps(12)
    scheduler.sigmas = karras_sigmas(12, 0.01, 10.0)
    ours: list[Tensor] = []
    sample_dpm(Crooked(), 3, seed=5, sigmas=scheduler.sigmas,
               callback=lambda step, x, estimate: ours.append(x))
    scheduler._sigma_to_alpha_sigma_t = lambda sigma: (torch.ones(()), sigma)  # in which noise explodes
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(5)) * scheduler.sigmas[0]
    for t, sigma, our in zip(scheduler.timesteps, scheduler.sigmas, ours, strict=False):
        torch.testing.assert_close(our, x, rtol=1e-5, atol=1e-5)
        x = scheduler.step(Crooked()(x, sigma), t, x).prev_sample
    assert len(ours) == 12


@pytest.mark.parametrize(("sampler", "n_steps"), [
    (sample_ddpm, 400), (sample_ddim, 200), (sample_heun, 30), (sample_dpm, 60)])
def test_samples_of_a_gaussian_have_its_mean_and_spread(sampler, n_steps):
    samples = sampler(Gaussian(), 4000, n_steps=n_steps)
    # 64,000 pixels: the standard error of the mean is 0.0008, and of the spread 0.0006
    assert samples.mean().item() == pytest.approx(Gaussian.mean, abs=0.004)
    assert samples.std().item() == pytest.approx(Gaussian.std, rel=0.03)


def test_heun_and_dpm_err_with_the_second_power_of_the_step_and_ddim_with_the_first():
    def error(sampler, n_steps: int) -> float:
        sigmas = karras_sigmas(n_steps, 0.05, 5.0)
        start = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * sigmas[0]
        # the exact flow of a Gaussian scales the distance to the mean; the last step to 0 is left out
        scale = ((Gaussian.std**2 + sigmas[-2] ** 2) / (Gaussian.std**2 + sigmas[0] ** 2)).sqrt()
        exact = Gaussian.mean + (start - Gaussian.mean) * scale
        seen: list[Tensor] = []
        sampler(Gaussian(), 64, sigmas=sigmas, callback=lambda step, x, estimate: seen.append(x))
        return (seen[-1] - exact).abs().mean().item()

    assert 1.7 < error(sample_ddim, 40) / error(sample_ddim, 80) < 2.4
    for sampler in (sample_heun, sample_dpm):
        assert 3.3 < error(sampler, 40) / error(sampler, 80) < 5.0
    assert error(sample_dpm, 20) < error(sample_ddim, 20) / 5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_repeats_and_images_stay_in_range(sampler):
    state = torch.random.get_rng_state()
    first, again, other = (sampler(Crooked(), 5, n_steps=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (5, 1, 4, 4)
    assert first.dtype == torch.float32
    assert first.abs().max() <= 1
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_pushes_away_from_the_estimate_without_label(sampler):
    labels = torch.tensor([0, 1, 2])
    sigmas = torch.tensor([1.0, 0.0])  # one step: the sample is the guided estimate
    plain, guided, unguided = (sampler(Crooked(), 3, sigmas=sigmas, labels=labels, guidance=g)
                               for g in (1, 2, 0))
    expected = unguided + 2 * (plain - unguided)
    inside = expected.abs() < 1
    assert inside.any()
    torch.testing.assert_close(guided[inside], expected[inside])
    torch.testing.assert_close(unguided, sampler(Crooked(), 3, sigmas=sigmas))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_callback_sees_every_step(sampler):
    seen: list[tuple[int, Tensor, Tensor]] = []
    sampler(Gaussian(), 2, n_steps=6, callback=lambda *step: seen.append(step))
    assert [step for step, _, _ in seen] == list(range(6))
    assert all(x.shape == estimate.shape == (2, 1, 4, 4) for _, x, estimate in seen)
    assert seen[0][1].std() > 50 > 1 > seen[-1][1].std()


def test_the_size_of_a_batch_does_not_change_the_images():
    labels = torch.arange(7) % 3
    whole = torch.cat(list(generate(Crooked(), 7, n_steps=4, labels=labels, batch_size=7)))
    parts = list(generate(Crooked(), 7, n_steps=4, labels=labels, batch_size=3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat(parts), whole)


def test_a_real_denoiser_samples_what_it_was_fitted_to():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2000, 1, 8, 8, generator=generator) * 0.05 + torch.linspace(-0.5, 0.5, 8)
    denoiser = Denoiser(UNet2D(base_channels=8, channel_multipliers=(1, 2), time_emb_dim=16), 8)
    denoiser.fit(images)
    samples = sample_heun(denoiser, 2000, n_steps=40)
    torch.testing.assert_close(samples.mean((0, 1, 2)), torch.linspace(-0.5, 0.5, 8), atol=0.01, rtol=0)
    assert samples.std(0).mean().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(("labels", "message"), [
    ([0, 1], "2 labels for n_samples=3"),
    ([0, 1, 3], "labels from 0 to 3; this model knows 0 to 2"),
    ([-1, 1, 2], "labels from -1 to 2"),
])
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        sample_heun(Crooked(), 3, labels=torch.tensor(labels))


def test_labels_for_a_model_without_labels_and_no_samples_are_refused():
    with pytest.raises(ValueError, match="trained without labels"):
        sample_heun(Gaussian(), 1, labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="n_samples=0"):
        sample_heun(Gaussian(), 0)
