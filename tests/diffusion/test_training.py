"""The promised training call: it learns, repeats to the bit, survives a kill, and refuses bad input."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from genailab_helpers.checkpoints import load_checkpoint
from genailab_helpers.diffusion.architectures import UNet2D
from genailab_helpers.diffusion.denoiser import Denoiser, load_denoiser
from genailab_helpers.diffusion.sampling import sample_heun
from genailab_helpers.diffusion.training import Muon, denoiser_loss, train_image_diffusion


class Bars(Dataset):
    """Images with one bright bar, upright (label 0) or lying (label 1)."""

    classes = ("upright", "lying")

    def __init__(self, n: int = 32, labels: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = labels
        self.images = torch.full((n, 1, 8, 8), -0.8)
        for i, place in enumerate(torch.randint(8, (n,), generator=generator).tolist()):
            (self.images[i, 0, :, place] if i % 2 == 0 else self.images[i, 0, place]).fill_(0.8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor | tuple[Tensor, int]:
        return (self.images[i], i % 2) if self.labels else self.images[i]


def tiny(num_classes: int | None = None, seed: int = 0) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Denoiser(UNet2D(base_channels=8, channel_multipliers=(1, 2), time_emb_dim=16,
                               num_classes=num_classes), 8, n_components=4)


def train(dataset: Dataset | None = None, model: Denoiser | None = None, workers: int = 0, **more):
    loader = DataLoader(dataset or Bars(), batch_size=8, shuffle=True, num_workers=workers)
    more = {"n_steps": 6, "device": "cpu", "progress": False, **more}
    return train_image_diffusion(loader, 8, model=model or tiny(), **more)


def same_weights(a: Denoiser, b: Denoiser) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_the_promised_call_runs_as_written():
    dataset = [image.repeat_interleave(4, -1).repeat_interleave(4, -2) for image in Bars(20).images]
    dataloader = DataLoader(dataset, batch_size=8, shuffle=True)
    model, losses = train_image_diffusion(dataloader=dataloader, img_size=32, n_epochs=1, device="cpu")
    assert len(losses) == 3
    assert all(isinstance(loss, float) for loss in losses)
    assert sample_heun(model, 2, n_steps=2).shape == (2, 1, 32, 32)
    assert not model.training
    assert model.mean.any()  # the mean image was measured


@pytest.fixture(scope="module")
def conditional():
    """A model of both kinds of bars, before and after training, and its losses."""
    model = tiny(num_classes=2)
    model.fit(Bars(64).images)
    trained, losses = train(Bars(64, labels=True), model, n_steps=400, lr=5e-3)
    return model, trained, losses


def test_the_loss_starts_at_that_of_the_linear_estimate_and_falls(conditional):
    model, trained, losses = conditional
    assert sum(losses[:20]) / 20 == pytest.approx(1, abs=0.25)
    assert sum(losses[-50:]) / 50 < 0.8
    assert not same_weights(model, trained)
    assert not any(p.any() for p in model.network.last[2].parameters())  # the model given is not changed


def test_same_seed_same_losses_and_weights_whatever_the_workers_and_the_global_state():
    state = torch.random.get_rng_state()
    one, losses = train()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    two, again = train(workers=2)
    assert losses == again
    assert same_weights(one, two)
    assert train(seed=1)[1] != losses


def test_an_epoch_takes_every_image_once_in_an_order_that_changes():
    class Counted(Bars):
        seen: list[int]

        def __getitem__(self, i):
            self.seen.append(i)
            return super().__getitem__(i)

    dataset = Counted(20)
    dataset.seen = []
    train(dataset, n_steps=None, n_epochs=2)  # 8 + 8 + 4 images an epoch
    first, *epochs = dataset.seen[:8], dataset.seen[8:28], dataset.seen[28:]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 2
    assert epochs[0] != epochs[1]
    assert first == epochs[0][:8]  # the look at the first batch before training


def test_labels_make_the_model_conditional(conditional):
    _, trained, _ = conditional
    upright, lying = (sample_heun(trained, 50, n_steps=8, labels=torch.full((50,), label))
                      for label in (0, 1))

    def uprightness(x: Tensor) -> float:  # an upright bar changes along a row, a lying one down a column
        return (x.diff(dim=-1).square().mean() - x.diff(dim=-2).square().mean()).item()

    assert uprightness(upright) > 0.1
    assert uprightness(lying) < -0.1


@pytest.mark.parametrize("loader", [
    DataLoader(Bars(16, labels=True), batch_size=8),
    DataLoader(Subset(Bars(16, labels=True), range(8)), batch_size=8),
])
def test_the_number_of_classes_comes_from_the_data_set(loader):
    model, _ = train_image_diffusion(loader, 8, n_steps=1, device="cpu", progress=False)
    assert model.num_classes == 2


def test_a_list_of_batches_and_lists_of_one_are_loaders_too():
    images = Bars(16).images
    for loader in ([images[:8], images[8:]], DataLoader(TensorDataset(images), batch_size=8)):
        _, losses = train_image_diffusion(loader, 8, n_epochs=2, device="cpu", model=tiny(), progress=False)
        assert len(losses) == 4


def test_minutes_stop_the_training():
    started = time.monotonic()
    _, losses = train(n_steps=None, minutes=0.02)
    assert losses
    assert time.monotonic() - started < 10


def test_the_loss_is_the_squared_error_over_that_of_the_linear_estimate():
    model = tiny(num_classes=2)
    model.fit(Bars(64).images)
    torch.nn.init.normal_(model.network.last[2].weight, std=0.1, generator=torch.Generator().manual_seed(1))
    images, labels = Bars(32).images, torch.arange(32) % 2
    asked = []
    model.register_forward_hook(lambda model, given, estimate: asked.append((*given, estimate)))
    state = torch.random.get_rng_state()
    loss = denoiser_loss(model, images, labels, torch.Generator().manual_seed(5))
    assert torch.equal(state, torch.random.get_rng_state())
    (x, sigma, told, estimate), = asked
    by_hand = sum((((estimate[i] - images[i]) / model.scales(sigma[i:i + 1])[0]) ** 2).mean()
                  for i in range(32)) / 32
    torch.testing.assert_close(loss, by_hand)
    noise = (x - images) / sigma.reshape(-1, 1, 1, 1)
    assert noise.mean().item() == pytest.approx(0, abs=0.1)  # 2,048 pixels: a standard error of 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    places = torch.distributions.Normal(-1.6, 1.2).cdf(sigma.log()) * 32
    assert torch.equal(places.sort().values.floor(), torch.arange(32.0))  # one level a range
    assert set(told.tolist()) <= {0, 1, 2}
    assert torch.equal(told[told < 2], labels[told < 2])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch below 2.9 has no Muon to compare with")
def test_muon_equals_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 10), (10, 6)):
        start, slopes = torch.randn(shape, generator=generator), torch.randn(3, *shape, generator=generator)
        ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
        optimisers = (Muon([ours], lr=0.1),
                      torch.optim.Muon([theirs], lr=0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw"))
        for slope in slopes:
            for p, optimiser in zip((ours, theirs), optimisers, strict=True):
                p.grad = slope.clone()
                optimiser.step()
        # theirs works in bfloat16, with three digits
        torch.testing.assert_close(ours - start, theirs - start, atol=0.02, rtol=0.05)


def test_muon_treats_a_convolution_as_a_matrix():
    start, slope = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    kernel, matrix = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.flatten(1).clone())
    kernel.grad, matrix.grad = slope, slope.flatten(1)
    for p in (kernel, matrix):
        Muon([p], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


# Going on after an interruption

class Interrupted(Exception):
    pass


class Breaking(Bars):
    """Stops the training after so many images, and takes down what a kill at this moment would leave."""

    left = 10**9
    path: Path | None = None

    def __init__(self, n: int = 32, error: type[BaseException] = Interrupted) -> None:
        super().__init__(n)
        self.error = error

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            if self.path is not None:
                self.there = self.path.read_bytes() if self.path.exists() else None
            raise self.error
        return super().__getitem__(i)


@pytest.mark.parametrize(("images_left", "steps"), [(8 + 3, 0), (8 + 8 * 4, 4), (8 + 36 + 36 + 1, 10)])
@pytest.mark.parametrize("kind", ["killed", "an error", "Ctrl-C"])
def test_an_interrupted_training_goes_on_to_the_same_losses_and_weights(tmp_path, images_left, steps, kind):
    whole, losses = train(Bars(36), n_steps=13)  # 5 batches an epoch, the last one smaller
    dataset = Breaking(36, KeyboardInterrupt if kind == "Ctrl-C" else Interrupted)
    dataset.left, dataset.path = images_left, tmp_path / "run" / "model.safetensors"
    with pytest.raises(dataset.error):
        train(dataset, n_steps=13, checkpoint=dataset.path, checkpoint_every=2)
    if kind == "killed":
        dataset.path.unlink(missing_ok=True)
        if dataset.there is not None:
            dataset.path.write_bytes(dataset.there)
    elif steps:  # nothing is lost
        assert load_checkpoint(dataset.path).tensors["losses"].tolist() == losses[:steps]
    dataset.left = 10**9
    resumed, all_losses = train(dataset, n_steps=13, checkpoint=dataset.path, checkpoint_every=2)
    assert all_losses == losses
    assert same_weights(resumed, whole)


def test_ctrl_c_within_a_step_keeps_the_last_whole_state_written(tmp_path, monkeypatch):
    whole, losses = train(Bars(36), n_steps=9)
    path = tmp_path / "model.safetensors"
    step, taken = torch.optim.AdamW.step, iter(range(9))

    def interrupted(optimiser: torch.optim.AdamW) -> None:
        if next(taken) == 5:  # Muon has moved its weights already
            raise KeyboardInterrupt
        step(optimiser)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(Bars(36), n_steps=9, checkpoint=path, checkpoint_every=2)
    assert load_checkpoint(path).tensors["losses"].tolist() == losses[:4]
    resumed, all_losses = train(Bars(36), n_steps=9, checkpoint=path, checkpoint_every=2)
    assert all_losses == losses
    assert same_weights(resumed, whole)


def test_the_average_weighs_recent_steps_most(tmp_path):
    weights = []
    for stop in range(1, 5):
        dataset, path = Breaking(), tmp_path / f"{stop}.safetensors"
        dataset.left = 8 + 8 * stop  # the first look, and so many batches
        with pytest.raises(Interrupted):
            train(dataset, n_steps=20, checkpoint=path, checkpoint_every=1)
        saved = load_checkpoint(path).tensors
        weights.append(saved["weights.network.first.1.weight"].double())
    # a power profile of exponent 12: step t of n has the share (t^13 - (t-1)^13) / n^13
    expected = sum(w * (t**13 - (t - 1) ** 13) / 4**13 for t, w in enumerate(weights, start=1))
    average = saved["denoiser.network.first.1.weight"].double()
    torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(average, weights[-1], rtol=1e-5, atol=1e-7)


def test_a_finished_training_returns_at_once_and_its_checkpoint_is_a_model(tmp_path):
    path = tmp_path / "model.safetensors"
    model, losses = train(checkpoint=path)
    written = path.stat().st_mtime_ns
    again, same = train(checkpoint=path)
    assert (same, same_weights(again, model)) == (losses, True)
    assert path.stat().st_mtime_ns == written
    assert same_weights(load_denoiser(path), model)


@pytest.mark.parametrize(("change", "message"), [
    ({"seed": 3}, r"training is .*'seed': 0.* in the file and .*'seed': 3.* here"),
    ({"n_steps": 9}, r"training is .*'n_steps': 6.* in the file and .*'n_steps': 9.* here"),
    ({"lr": 1e-3}, r"training is .*'lr': 0.001.* here"),
])
def test_a_checkpoint_of_another_training_is_refused(tmp_path, change, message):
    train(checkpoint=tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        train(checkpoint=tmp_path / "model.safetensors", **change)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    train(checkpoint=path)
    other = Denoiser(UNet2D(base_channels=16, channel_multipliers=(1, 2), time_emb_dim=16), 8, 4)
    message = r"model.safetensors: .*'base_channels': 8.* in the file and .*'base_channels': 16.* here"
    with pytest.raises(ValueError, match=message):
        train(model=other, checkpoint=path)


# What goes wrong

@pytest.mark.parametrize(("bad", "lr"), [(float("nan"), 5e-3), (0.5, 1e30)])
def test_a_loss_that_is_no_number_stops_and_leaves_the_last_good_state(tmp_path, bad, lr):
    class Losing(Denoiser):
        """A denoiser that is lost from the fifth step on."""

        asked = 0

        def forward(self, x, sigma, labels=None):
            self.asked += 1
            return super().forward(x, sigma, labels) * (bad if self.asked > 4 else 1)

    path = tmp_path / "model.safetensors"
    with pytest.raises(FloatingPointError, match=r"step \d+: loss .*a smaller step size than lr"):
        train(model=Losing(tiny().network, 8, 4), n_steps=20, checkpoint=path, lr=lr)
    assert all(p.isfinite().all() for p in load_denoiser(path).parameters())
    if lr < 1:  # with a sound model it goes on from there, as if nothing had been
        whole, losses = train(n_steps=20)
        resumed, all_losses = train(n_steps=20, checkpoint=path)
        assert (all_losses, same_weights(resumed, whole)) == (losses, True)


def batches(**change):
    images = change.get("images", Bars(8).images)
    return [(images, change["labels"])] if "labels" in change else [images]


@pytest.mark.parametrize(("loader", "more", "message"), [
    ([["a.png", "b.png"]], {}, r"float32 in .* in a str"),
    (batches(images=torch.zeros(8, 8, 8)), {}, r"expected the shape \(N, 1, H, W\).* got \(8, 8, 8\)"),
    (batches(images=torch.zeros(8, 1, 8, 8, dtype=torch.uint8)), {}, r"got .*torch.uint8"),
    (batches(images=torch.zeros(8, 1, 16, 16)), {}, r"expected 8x8 pixels, got \(8, 1, 16, 16\).*img_size"),
    (batches(images=torch.zeros(8, 3, 8, 8)), {}, r"got \(8, 3, 8, 8\) .*one channel of colours"),
    (batches(images=torch.full((8, 1, 8, 8), 255.0)), {}, r"255 to 255; .*x / 127.5 - 1"),
    (batches(images=torch.full((8, 1, 8, 8), torch.nan)), {}, r"got nan to nan"),
    (batches(labels=torch.tensor([0, 1] * 4)), {}, r"num_classes=None does not fit .* with labels"),
    ([], {}, r"yields no batch"),
    (iter(batches()), {"n_steps": 2}, r"yields no batch: .*read only once"),
    (iter(batches()), {"n_steps": None, "n_epochs": 1}, r"does not know its length: give n_steps"),
    (batches(), {"n_steps": None}, r"how long to train"),
    (batches(), {"n_steps": 0}, r"n_steps=0: expected more than 0"),
    (batches(), {"n_epochs": 1, "n_steps": 0}, r"n_steps=0: expected more than 0"),
    (batches(), {"n_epochs": 0, "n_steps": None}, r"n_steps=0: expected more than 0"),
    (batches(), {"minutes": -1.0}, r"minutes=-1.0: expected more than 0"),
    (batches(), {"num_classes": 3}, r"made for img_size=8 and num_classes=None, not for 8 and 3"),
])
def test_bad_batches_give_one_clear_error(loader, more, message):
    with pytest.raises(ValueError, match=message):
        train_image_diffusion(loader, 8, **{"n_steps": 1, "model": tiny(), "progress": False, **more})


def test_a_model_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"made for img_size=8 .* not for 16"):
        train_image_diffusion([torch.zeros(2, 1, 16, 16)], 16, n_steps=1, model=tiny(), progress=False)


@pytest.mark.parametrize(("labels", "num_classes", "message"), [
    (torch.tensor([0, 2] * 4), 2, r"one whole number from 0 to 1 .* from 0 to 2"),
    (torch.tensor([0, -1] * 4), 2, r"from -1 to 0"),
    (torch.rand(8), 2, r"got torch.float32"),
    (torch.tensor([0, 1] * 4), None, r"no `classes`: give num_classes"),
    (None, 2, r"num_classes=2 does not fit .* without labels"),
])
def test_bad_labels_give_one_clear_error(labels, num_classes, message):
    loader = batches() if labels is None else batches(labels=labels)
    with pytest.raises(ValueError, match=message):
        train_image_diffusion(loader, 8, n_steps=1, device="cpu", num_classes=num_classes, progress=False)


@pytest.mark.parametrize(("img_size", "levels"), [(8, 3), (32, 3), (64, 4), (72, 3)])
def test_larger_images_take_a_fourth_level(img_size, levels):
    images = torch.linspace(-1, 1, 2 * img_size**2).reshape(2, 1, img_size, img_size)
    model, _ = train_image_diffusion([images], img_size, n_steps=1, progress=False)
    assert len(model.network.down) == levels


def test_a_size_that_the_network_cannot_halve_is_refused():
    with pytest.raises(ValueError, match=r"img_size=20 cannot be halved.*multiple of 8"):
        train_image_diffusion([torch.zeros(2, 1, 20, 20)], 20, n_steps=1, device="cpu", progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there: nothing to refuse")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match=r"device='cuda' is not available here"):
        train(device="cuda")


# ------------------------------------------------------------------------------------- graphics cards

def test_half_precision_is_for_the_network_alone():
    denoiser = tiny()
    denoiser.fit(Bars(32).images)
    x, sigma = Bars(4).images + 0.3, torch.full((4,), 0.3)
    kinds = []
    denoiser.network.register_forward_hook(lambda network, taken, given: kinds.append(given.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        estimate = denoiser(x, sigma)
    assert kinds == [torch.bfloat16]
    assert estimate.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(estimate, denoiser.linear_estimate(x, sigma))  # an untrained network adds nothing
    assert torch.equal(x, Bars(4).images + 0.3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None,
                    reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_alike():
    _, losses = train()
    counters.clear()
    _, compiled = train(compile_network=True)
    assert counters["stats"]["unique_graphs"] >= 1  # it was compiled indeed
    assert compiled == pytest.approx(losses, rel=1e-5)  # measured: equal


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics card")
def test_a_graphics_card_trains_alike(tmp_path):
    _, losses = train(n_steps=30)
    model, on_card = train(n_steps=30, device="cuda", checkpoint=tmp_path / "model.safetensors")
    assert on_card == pytest.approx(losses, rel=0.05)  # eight bits of mantissa
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert sample_heun(load_denoiser(tmp_path / "model.safetensors"), 2, n_steps=2).isfinite().all()


def test_a_tenth_of_the_labels_is_withheld_and_becomes_no_class():
    asked = []

    class Listener:
        num_classes = 3

        def __call__(self, x, sigma, labels):
            asked.append(labels)
            return x

        def scales(self, sigma):
            return torch.ones(len(sigma), 1, 1, 1), None

    labels = torch.arange(3000) % 3
    denoiser_loss(Listener(), torch.zeros(3000, 1, 1, 1), labels, torch.Generator().manual_seed(0))
    withheld = asked[0] == 3
    assert withheld.float().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(asked[0][~withheld], labels[~withheld])
