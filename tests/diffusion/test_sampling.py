"""The samplers against diffusers step by step, and on a Gaussian whose every step is known."""

import pytest
import torch
from torch import Tensor

from genailab_helpers.diffusion.architectures import UNet2D
from genailab_helpers.diffusion.denoiser import LINEAR_ABOVE, Denoiser, karras_sigmas
from genailab_helpers.diffusion.sampling import (
    ddim_step,
    ddpm_step,
    dpm_step,
    generate,
    heun_step,
    inpaint,
    sample,
    sample_ddim,
    sample_ddpm,
    sample_dpm,
    sample_heun,
    vary,
)

SAMPLERS = [sample_ddpm, sample_ddim, sample_heun, sample_dpm]
STEPS = [ddpm_step, ddim_step, heun_step, dpm_step]


class Known(torch.nn.Module):
    """A denoiser of which more is known than of a network."""

    num_classes = None

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))


class Gaussian(Known):
    """Best denoiser of pixels that are independent and normal: its score is known."""

    image_shape = (1, 4, 4)
    mean, std = 0.1, 0.2

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)


class Crooked(Known):
    """A denoiser that is no Gaussian's and mixes pixels, to tell samplers apart."""

    image_shape = (1, 4, 4)
    num_classes = 3

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = 0 if labels is None else 0.2 * (labels[:, None, None, None] + 1)
        return torch.tanh((x + x.roll(1, -1)) / (1 + sigma)) / 2 + shift


def vp_levels(n_steps: int, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Return times of a schedule, the noisiest first, and their sigmas with a last 0."""
    times = torch.arange(n_steps).flip(0) * (len(alphas_cumprod) // n_steps)
    left = alphas_cumprod[times]
    return times, torch.cat((((1 - left) / left).sqrt(), torch.zeros(1)))


@pytest.fixture(scope="module")
def network() -> Denoiser:
    """A small denoiser with random weights, so that its estimates are crooked."""
    generator = torch.Generator().manual_seed(0)
    denoiser = Denoiser(UNet2D(base_channels=8, channel_multipliers=(1, 2), time_emb_dim=16), 16)
    for p in denoiser.network.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15, generator=generator)
    denoiser.fit(torch.rand((64, 1, 16, 16), generator=generator) * 2 - 1)
    return denoiser.eval().requires_grad_(False)


def walk(step, denoiser, sigmas: Tensor, n_samples: int = 3, seed: int = 5) -> tuple[Tensor, list[Tensor]]:
    """Return what our sampler hands back, and what it holds before each step."""
    held: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((n_samples, *denoiser.image_shape), generator=generator) * sigmas[0]
    end = sample(denoiser, x, sigmas, step, generator=generator, callback=lambda i, x, guess: held.append(x))
    return end, held


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("step", "scheduler"), [(ddpm_step, "DDPMScheduler"), (ddim_step, "DDIMScheduler")])
def test_ddpm_and_ddim_equal_diffusers_at_every_step(step, scheduler, name, network):
    theirs = getattr(pytest.importorskip("diffusers"), scheduler)(
        beta_schedule=name, prediction_type="sample", clip_sample=False)
    theirs.set_timesteps(20)
    times, sigmas = vp_levels(20, theirs.alphas_cumprod)
    assert torch.equal(times, theirs.timesteps)
    _, ours = walk(step, network, sigmas)
    generator = torch.Generator().manual_seed(5)
    signals = theirs.alphas_cumprod[times].sqrt()  # theirs is the form that preserves variance
    x = torch.randn((3, 1, 16, 16), generator=generator) * (1 - signals[0] ** 2).sqrt()
    for t, sigma, signal, our in zip(times, sigmas, signals, ours, strict=False):
        torch.testing.assert_close(our * signal, x, rtol=0, atol=1e-5)
        more = {"generator": generator} if step is ddpm_step else {}
        x = theirs.step(network(x / signal, sigma), t, x, **more).prev_sample
    assert len(ours) == 20


def test_heun_equals_diffusers_at_every_step(network):
    diffusers = pytest.importorskip("diffusers")
    sigmas = karras_sigmas(12, 0.01, 10.0)
    theirs = diffusers.HeunDiscreteScheduler(prediction_type="sample")
    theirs.set_timesteps(12)
    theirs.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    end, ours = walk(heun_step, network, sigmas)
    x = torch.randn((3, 1, 16, 16), generator=torch.Generator().manual_seed(5)) * sigmas[0]
    for call, t in enumerate(theirs.timesteps):  # two calls a step, one at the last
        if call % 2 == 0:
            torch.testing.assert_close(ours[call // 2], x, rtol=0, atol=1e-5)
        x = theirs.step(network(x, theirs.sigmas[call]), t, x).prev_sample
    torch.testing.assert_close(end, x.clamp(-1, 1), rtol=0, atol=1e-5)


def test_dpm_equals_diffusers_at_every_step(network):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="sample",
        lower_order_final=True, final_sigmas_type="zero")
    theirs.set_timesteps(12)
    theirs.sigmas = karras_sigmas(12, 0.01, 10.0)
    _, ours = walk(dpm_step, network, theirs.sigmas)
    theirs._sigma_to_alpha_sigma_t = lambda sigma: (torch.ones(()), sigma)  # in which noise explodes
    x = torch.randn((3, 1, 16, 16), generator=torch.Generator().manual_seed(5)) * theirs.sigmas[0]
    for t, sigma, our in zip(theirs.timesteps, theirs.sigmas, ours, strict=False):
        torch.testing.assert_close(our, x, rtol=0, atol=1e-5)
        x = theirs.step(network(x, sigma), t, x).prev_sample
    assert len(ours) == 12


@pytest.mark.parametrize(("sampler", "n_steps"), [
    (sample_ddpm, 400), (sample_ddim, 200), (sample_heun, 30), (sample_dpm, 60)])
def test_samples_of_a_gaussian_have_its_mean_and_spread(sampler, n_steps):
    samples = sampler(Gaussian(), 4000, n_steps=n_steps)
    # 64,000 pixels: the standard error of the mean is 0.0008, and of the spread 0.0006
    assert samples.mean().item() == pytest.approx(Gaussian.mean, abs=0.004)
    assert samples.std().item() == pytest.approx(Gaussian.std, rel=0.03)


def test_heun_and_dpm_err_with_the_second_power_of_the_step_and_ddim_with_the_first():
    def error(step, n_steps: int) -> float:
        sigmas = karras_sigmas(n_steps, 0.05, 5.0)
        _, held = walk(step, Gaussian(), sigmas, 64, seed=0)
        # the exact flow of a Gaussian scales the distance to the mean; the last step to 0 is left out
        scale = ((Gaussian.std**2 + sigmas[-2] ** 2) / (Gaussian.std**2 + sigmas[0] ** 2)).sqrt()
        exact = Gaussian.mean + (held[0] - Gaussian.mean) * scale
        return (held[-1] - exact).abs().mean().item()

    assert 1.7 < error(ddim_step, 40) / error(ddim_step, 80) < 2.4
    for step in (heun_step, dpm_step):
        assert 3.3 < error(step, 40) / error(step, 80) < 5.0
    assert error(dpm_step, 20) < error(ddim_step, 20) / 5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_repeats_images_stay_in_range_and_the_callback_sees_every_step(sampler):
    state, seen = torch.random.get_rng_state(), []
    first, again, other = (
        sampler(Crooked(), 5, n_steps=6, seed=seed, callback=lambda *step: seen.append(step))
        for seed in (1, 1, 2))
    assert [step for step, _, _ in seen] == 3 * list(range(6))
    assert all(x.shape == estimate.shape == (5, 1, 4, 4) for _, x, estimate in seen)
    assert seen[0][1].std() > 50 > 1 > seen[5][1].std()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (5, 1, 4, 4)
    assert first.dtype == torch.float32
    assert first.abs().max() <= 1
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("step", STEPS)
def test_guidance_pushes_away_from_the_estimate_without_label(step):
    def drawn(**more) -> Tensor:  # one step: the sample is the guided estimate
        x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        return sample(Crooked(), x, torch.tensor([1.0, 0.0]), step, **more)

    plain, guided, unguided = (drawn(labels=torch.tensor([0, 1, 2]), guidance=g) for g in (1, 2, 0))
    expected = unguided + 2 * (plain - unguided)
    inside = expected.abs() < 1
    assert inside.any()
    torch.testing.assert_close(guided[inside], expected[inside])
    torch.testing.assert_close(unguided, drawn())


def test_above_a_noise_level_the_linear_estimate_stands_in(network):
    asked = []
    hook = network.network.register_forward_hook(lambda *_: asked.append(True))
    levels = karras_sigmas(20)
    quick, = generate(network, 4, linear_above=LINEAR_ABOVE)
    assert len(asked) == int((levels[:-1] <= LINEAR_ABOVE).sum()) == 12
    whole, = generate(network, 4)
    assert len(asked) == 12 + 20
    hook.remove()
    assert not torch.equal(quick, whole)
    linear = network.linear_estimate

    class Linear(Known):
        image_shape = network.image_shape

        def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            return linear(x, sigma.expand(len(x))) if sigma > LINEAR_ABOVE else network(x, sigma)

    torch.testing.assert_close(quick, next(generate(Linear(), 4)), rtol=0, atol=1e-6)


def test_the_size_of_a_batch_does_not_change_the_images():
    labels = torch.arange(7) % 3
    whole = torch.cat(list(generate(Crooked(), 7, n_steps=4, labels=labels, batch_size=7)))
    parts = list(generate(Crooked(), 7, n_steps=4, labels=labels, batch_size=3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat(parts), whole)


class Pair(Known):
    """Best denoiser of two normal pixels with correlation 0.8: what one says of the other is known."""

    image_shape = (1, 1, 2)
    std, correlation = 0.3, 0.8
    covariance = std**2 * torch.tensor([[1, correlation], [correlation, 1]])

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        gain = self.covariance @ torch.linalg.inv(self.covariance + sigma**2 * torch.eye(2))
        return (x.flatten(1) @ gain.T).reshape(x.shape)


def fill_in(n_repeats: int) -> tuple[float, float]:
    """Fill in the right pixel of many pairs; return its slope on the left one, and its spread about that."""
    left = (torch.randn((8000, 1, 1, 1), generator=torch.Generator().manual_seed(1)) * Pair.std).clamp(-1, 1)
    images = torch.cat([left, torch.full_like(left, torch.nan)], dim=-1)
    filled = inpaint(Pair(), images, torch.tensor([True, False]), n_steps=40, n_repeats=n_repeats)
    assert torch.equal(filled[..., :1], left)
    left, right = filled[..., 0].flatten(), filled[..., 1].flatten()
    slope = (left @ right / (left @ left)).item()
    return slope, (right - slope * left).std().item()


def test_inpainting_answers_to_the_known_pixels_the_more_it_repeats():
    slope, spread = fill_in(20)
    assert slope == pytest.approx(Pair.correlation, abs=0.04)
    assert spread == pytest.approx(Pair.std * (1 - Pair.correlation**2) ** 0.5, rel=0.2)
    assert fill_in(1)[0] < 0.6  # what replacing pixels alone reaches


def test_known_pixels_are_held_under_the_noise_of_each_level():
    held, known = [], torch.ones(4, dtype=torch.bool)
    inpaint(Crooked(), torch.zeros(500, 1, 4, 4), known, n_steps=3, n_repeats=2,
            callback=lambda i, x, guess: held.append(x.std().item()))
    assert held == pytest.approx(karras_sigmas(3)[:-1].tolist(), rel=0.05)


def test_a_level_that_is_repeated_has_its_noise_again():
    asked = []

    class Blank(Known):
        image_shape = (1, 4, 4)

        def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            asked.append((x.std().item(), sigma.max().item()))
            return torch.zeros_like(x)  # so that x is noise and nothing else

    inpaint(Blank(), torch.zeros(2000, 1, 4, 4), torch.zeros(4, dtype=torch.bool), n_steps=4, n_repeats=3)
    spreads, levels = zip(*asked, strict=True)
    assert len(levels) == 12
    assert spreads == pytest.approx(levels, rel=0.02)


@pytest.mark.parametrize("grey", [-3.0, 3.0])
def test_what_is_beyond_black_and_white_is_cut_off(grey):
    class Certain(Known):
        image_shape = (1, 2, 2)

        def forward(self, x, sigma, labels=None):
            return torch.full_like(x, grey)

    known = torch.tensor([True, False]).expand(2, 2)
    filled = inpaint(Certain(), torch.zeros(1, 1, 2, 2), known, n_steps=3, n_repeats=1)
    assert filled[..., 1].unique().tolist() == [grey / 3]
    assert sample_ddim(Certain(), 1, n_steps=3).unique().tolist() == [grey / 3]


def test_a_variation_keeps_what_the_noise_leaves(network):
    images = torch.rand((40, 1, 16, 16), generator=torch.Generator().manual_seed(2)) * 2 - 1
    moved = [(vary(network, images, strength, seed=3) - images).square().mean().item()
             for strength in (0.05, 0.3, 1.0)]
    assert moved[0] < 0.01 < 2 * moved[1] < moved[2]
    assert torch.equal(vary(network, images, seed=3), vary(network, images, seed=3))
    # all of the walk: nothing is left but the noise that it began from
    of_image, of_negative = (vary(network, begin, 1.0, seed=3) for begin in (images, -images))
    assert (of_image - of_negative).abs().mean() < 0.01


@pytest.mark.parametrize(("call", "message"), [
    (lambda: vary(Crooked(), torch.zeros(2, 1, 4, 4), 0), "strength=0: expected a number above 0"),
    (lambda: vary(Crooked(), torch.zeros(2, 1, 4, 4), 1.5), "strength=1.5"),
    (lambda: vary(Crooked(), torch.zeros(2, 1, 4, 4).double()), "float32 .* got .*torch.float64"),
    (lambda: vary(Crooked(), torch.full((2, 1, 4, 4), 200.0)), "got 200 to 200"),
    (lambda: vary(Crooked(), torch.full((2, 1, 4, 4), torch.nan)), "got nan to nan"),
    (lambda: inpaint(Crooked(), torch.full((2, 1, 4, 4), 200.0), torch.ones(4, dtype=torch.bool)), "got 200"),
])
def test_images_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_real_denoiser_samples_what_it_was_fitted_to():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2000, 1, 8, 8, generator=generator) * 0.05 + torch.linspace(-0.5, 0.5, 8)
    denoiser = Denoiser(UNet2D(base_channels=8, channel_multipliers=(1, 2), time_emb_dim=16), 8)
    denoiser.fit(images)
    samples = sample_heun(denoiser, 2000, n_steps=40)
    torch.testing.assert_close(samples.mean((0, 1, 2)), torch.linspace(-0.5, 0.5, 8), atol=0.01, rtol=0)
    assert samples.std(0).mean().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 3], [-1, 1, 2]])
@pytest.mark.parametrize("denoiser", [Crooked(), Gaussian()])
def test_labels_that_do_not_fit_are_refused(denoiser, labels):
    with pytest.raises(ValueError, match=rf"got \{labels} for 3 images .*num_classes={denoiser.num_classes}"):
        sample_heun(denoiser, 3, labels=torch.tensor(labels))


def test_a_model_without_classes_takes_no_label():
    with pytest.raises(ValueError, match="num_classes=None"):
        sample_heun(Gaussian(), 3, labels=torch.zeros(3, dtype=torch.long))
