"""The one engine for grades and classes: it learns, repeats itself, and keeps what its use needs."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.metrics import log_loss
from torch import Tensor
from torch.utils.data import TensorDataset

from genailab_helpers.checkpoints import load_checkpoint, save_checkpoint
from genailab_helpers.classification import metrics
from genailab_helpers.classification.losses import LOSSES
from genailab_helpers.classification.training import (
    Augmentation,
    TrainingResult,
    load_classifier,
    save_classifier,
    train_classifier,
)
from genailab_helpers.datasets.folders import RadiographFolder
from genailab_helpers.datasets.names import GRADES
from genailab_helpers.radiographs import read_radiograph

LEVELS = ("dark", "dim", "bright")
SAMPLES = Path(__file__).parents[2] / "data/samples"


@pytest.fixture(scope="module", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENAILAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


def images(n: int, seed: int, num_classes: int = 3, img_size: int = 32, common: int = 1,
           noise: float = 0.2) -> TensorDataset:
    """Noise with a square that is brighter the higher the label; label 0 is `common` times as frequent."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % (num_classes - 1 + common) - common + 1).clamp(min=0)
    batch = torch.randn((n, 1, img_size, img_size), generator=generator) * noise - 0.5
    batch[:, :, 8:20, 8:20] += labels[:, None, None, None] * 0.5
    return TensorDataset(batch.clamp(-1, 1), labels)


def train(n: int = 60, **arguments: Any) -> TrainingResult:
    options: dict[str, Any] = {"n_epochs": 3, "batch_size": 12, "lr": 2e-3, "classes": LEVELS,
                               "device": "cpu", "progress": False}
    return train_classifier(images(n, 1), images(30, 2), **{**options, **arguments})


def weights(result: TrainingResult) -> dict[str, Tensor]:
    return result.model.network.state_dict()


def same(first: TrainingResult, second: TrainingResult) -> bool:
    return first.history == second.history and first.model.temperature == second.model.temperature and all(
        torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics card")
@pytest.mark.parametrize("backbone", ["small_cnn", "frozen_lite0"])
def test_a_graphics_card_trains_and_grades_alike(backbone: str) -> None:
    here, there = (train(n_epochs=1, backbone=backbone, device=device) for device in ("cpu", "cuda"))
    new = images(12, seed=9).tensors[0]
    probabilities, on_card = (result.model.predict(new).probabilities for result in (here, there))
    assert on_card == pytest.approx(probabilities, abs=0.02)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_levels_of_brightness(loss: str) -> None:
    result, new = train(120, loss=loss, n_epochs=8, augmentation=None), images(60, seed=9)
    predicted = result.model.predict(new.tensors[0])
    assert metrics.qwk(new.tensors[1].numpy(), predicted.decoded.numpy()) > 0.8
    assert predicted.probabilities.shape == (60, 3)
    torch.testing.assert_close(predicted.probabilities.sum(1), torch.ones(60))
    assert result.steps == 80
    assert len(result.history) == 8


def test_shuffled_labels_are_not_learned() -> None:
    """The control of the test above: nothing but the images tells the labels."""
    batch, labels = images(120, 1).tensors
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    result = train_classifier(TensorDataset(batch, labels[order]), images(30, 2), classes=LEVELS, n_epochs=4,
                              progress=False)
    new = images(60, seed=9)
    predicted = result.model.predict(new.tensors[0]).decoded
    assert metrics.qwk(new.tensors[1].numpy(), predicted.numpy()) < 0.5


def test_a_training_goes_on_from_a_model_and_leaves_it_alone() -> None:
    first = train(120, loss="coral", n_epochs=6, augmentation=None)
    before = {name: tensor.clone() for name, tensor in weights(first).items()}
    gentle: dict[str, Any] = {"n_epochs": 1, "lr": 1e-5, "augmentation": None}
    further, fresh = train(60, model=first.model, **gentle), train(60, **gentle)
    assert type(further.model.loss) is type(first.model.loss)
    assert further.history[0].score > fresh.history[0].score + 0.3
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(first).items())
    assert not torch.equal(next(further.model.network.parameters()), next(first.model.network.parameters()))
    with pytest.raises(ValueError, match="model: its classes are dark, dim, bright; expected those"):
        train(model=first.model, classes=("dim", "dark", "bright"))


@pytest.mark.parametrize("backbone", ["small_cnn", "efficientnet_lite0", "frozen_lite0"])
def test_a_training_repeats_itself_to_the_bit_and_leaves_global_randomness_alone(backbone: str) -> None:
    options: dict[str, Any] = {"n": 24, "backbone": backbone, "n_epochs": 2, "loss": "coral"}
    torch.manual_seed(1)
    first, before = train(**options), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert same(first, train(**options))
    assert not same(first, train(**options, seed=1))
    torch.manual_seed(1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_stops_early_and_keeps_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.5, math.nan, 0.4, 0.5, 0.9])
    monkeypatch.setattr(metrics, "balanced_accuracy", lambda *_: next(scores))
    result, val = train(n_epochs=20, patience=3), images(30, 2)
    assert len(result.history) == 5  # three epochs without a better score than that of the second
    assert result.best_epoch == 1
    losses = [epoch.val_loss for epoch in result.history]
    assert len(set(losses)) == 5  # so the loss tells whose weights these are
    assert result.model.loss(result.model.logits(val.tensors[0]), val.tensors[1]).item() == losses[1]


def test_minutes_end_a_training() -> None:
    result = train(n_epochs=None, minutes=0.02, patience=10**6)
    assert 1.2 <= result.seconds < 10  # 0.02 minutes are 1.2 seconds; then the epoch is judged
    assert result.steps >= 1


def test_minutes_that_describing_the_images_uses_up_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"minutes=1e-05: over before .* took [\d.]+ s; give more"):
        train(backbone="frozen_lite0", n_epochs=None, minutes=1e-5)


@pytest.mark.parametrize(("loss", "classes", "metric"), [
    ("cross_entropy", LEVELS, metrics.balanced_accuracy), ("cross_entropy", GRADES[:3], metrics.qwk),
    ("coral", LEVELS, metrics.qwk)])
def test_the_score_is_kappa_for_grades_and_balanced_accuracy_for_classes(
        loss: str, classes: tuple[str, ...], metric: metrics.Metric) -> None:
    result, val = train(loss=loss, classes=classes), images(30, 2)
    decoded = result.model.predict(val.tensors[0]).decoded.numpy()
    expected = metric(val.tensors[1].numpy(), decoded)
    assert result.history[result.best_epoch].score == pytest.approx(expected)


@dataclasses.dataclass(frozen=True)
class Spy(Augmentation):
    """Keep what it is given."""

    seen: list[Tensor] = dataclasses.field(default_factory=list)

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        self.seen.append(batch)
        return super().__call__(batch, generator)


def rows_of(batches: list[Tensor], known: Tensor) -> Tensor:
    """Tell which of the known images those of the batches are, up to rounding to 8 bits."""
    away = torch.stack([(known - image).abs().amax((1, 2, 3)) for image in torch.cat(batches)])
    assert (away.amin(1) < 1 / 255 + 1e-6).all()
    return away.argmin(1)


def test_rare_classes_are_seen_as_often_as_common_ones_and_training_images_alone_are_augmented() -> None:
    data, spy = images(100, 0, common=8), Spy()
    labels = data.tensors[1]
    assert labels.bincount().tolist() == [80, 10, 10]
    train_classifier(data, images(30, 2), n_epochs=2, batch_size=10, classes=LEVELS, augmentation=spy,
                     progress=False)
    assert len(spy.seen) == 20
    rows, other = rows_of(spy.seen, data.tensors[0]).split(100)
    assert not torch.equal(rows, other)
    counts = labels[rows].bincount().tolist()
    assert max(counts) - min(counts) <= 2
    for label in range(3):  # no image again before all others of its class
        times = rows.bincount(minlength=100)[labels == label]
        assert times.max() - times.min() <= 2
        assert times.max() <= (1 if label == 0 else 4)


NOTHING = {"rotation": 0.0, "shift": 0.0, "zoom": 0.0, "brightness": 0.0, "contrast": 0.0}


def changed(**only: Any) -> tuple[Tensor, Tensor]:
    """Return images before and after one kind of change."""
    batch = images(40, 3).tensors[0]
    return batch, Augmentation(**{**NOTHING, **only})(batch, torch.Generator().manual_seed(0))


def test_no_change_changes_nothing_and_flip_mirrors_about_half() -> None:
    batch, same_images = changed()
    torch.testing.assert_close(same_images, batch, rtol=0, atol=1e-5)
    assert not Augmentation().flip
    batch, flipped = changed(flip=True)
    mirrored = (flipped - batch.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    kept = (flipped - batch).abs().amax((1, 2, 3)) < 1e-5
    assert (mirrored ^ kept).all()
    assert 10 < mirrored.sum() < 30  # of 40; chance leaves this range once in 500


def test_each_image_is_changed_within_the_ranges() -> None:
    batch, lighter = changed(brightness=0.1)
    inside = (batch.abs() < 0.85)
    offset = torch.stack([(b - a)[i].mean() for a, b, i in zip(batch, lighter, inside, strict=True)])
    assert offset.abs().max() <= 0.1 + 1e-5
    assert offset.std() > 0.03  # uniform in [-0.1, 0.1]: 0.058
    batch, stretched = changed(contrast=0.2)
    gain = torch.stack([(b[i] * a[i]).sum() / a[i].square().sum()
                        for a, b, i in zip(batch, stretched, inside, strict=True)])
    assert gain.min() >= 0.8 - 1e-4
    assert gain.max() <= 1.2 + 1e-4
    assert gain.std() > 0.06  # uniform in [0.8, 1.2]: 0.115


def moved_dot(**only: Any) -> Tensor:
    """Return where a dot, a quarter to the right of the centre, ends in 200 changed copies: (200, 2)."""
    image = torch.full((200, 1, 64, 64), -1.0)
    image[:, :, 30:34, 46:50] = 1.0  # its middle: (0.25, 0)
    light = Augmentation(**{**NOTHING, **only})(image, torch.Generator().manual_seed(0))[:, 0] + 1
    steps = (torch.arange(64) + 0.5) / 64 - 0.5
    moments = torch.stack([(light.sum(1) * steps).sum(1), (light.sum(2) * steps).sum(1)], 1)
    return moments / light.sum((1, 2))[:, None]


def test_a_dot_moves_as_far_as_shift_zoom_and_rotation_allow() -> None:
    place = moved_dot(shift=0.1)
    assert 0.09 < (place - torch.tensor([0.25, 0.0])).abs().max() < 0.102
    place = moved_dot(zoom=0.1)  # away from the centre by up to a tenth
    assert 0.27 < place[:, 0].max() < 0.277
    assert 0.223 < place[:, 0].min() < 0.23
    place = moved_dot(rotation=20)
    angle = torch.atan2(place[:, 1], place[:, 0]).rad2deg()
    assert 18.5 < angle.abs().max() < 20.3
    assert (place.norm(dim=1) - 0.25).abs().max() < 0.003


def test_a_saved_model_grades_alike(tmp_path: Path) -> None:
    result, batch = train(loss="corn"), images(5, 7).tensors[0]
    file = tmp_path / "model.safetensors"
    save_classifier(file, result.model, run={"data": "phantoms"})
    loaded = load_classifier(file)
    assert loaded.recipe == result.model.recipe
    assert loaded.recipe["classes"] == list(LEVELS)
    assert not loaded.network.training
    for before, after in zip(result.model.predict(batch), loaded.predict(batch), strict=True):
        assert torch.equal(before, after)
    assert load_checkpoint(file).recipe["run"] == {"data": "phantoms"}


def test_use_sees_the_same_pixels_as_training(tmp_path: Path) -> None:
    """An image read for use has more than 8 bits, one of the cache has not: the network must not notice."""
    levels = torch.rand((1, 50, 40), generator=torch.Generator().manual_seed(0)).mul(255).byte()[0].numpy()
    folder = tmp_path / "grade_0"
    folder.mkdir()
    Image.fromarray(levels).save(folder / "image.png")
    cached, read = RadiographFolder(tmp_path, 32)[0][0], read_radiograph(folder / "image.png", 32)
    assert not torch.equal(cached, read)
    model = train(n_epochs=1).model
    assert torch.equal(model.logits(cached[None]), model.logits(read[None]))


def test_the_temperature_is_that_of_the_validation_images() -> None:
    model, val = train().model, images(30, 2)
    logits = model.logits(val.tensors[0])
    expected = metrics.fit_temperature(logits, val.tensors[1], model.loss.probabilities)
    assert model.temperature == pytest.approx(expected)
    torch.testing.assert_close(model.predict(val.tensors[0]).probabilities, (logits / expected).softmax(1))


def faint(n: int, seed: int, common: int) -> TensorDataset:
    """Two classes that overlap: an even image whose level is Gaussian, a standard deviation apart."""
    labels = (torch.arange(n) % (common + 1) == common).long()
    level = torch.randn(n, generator=torch.Generator().manual_seed(seed)) + labels
    batch = (level / 6)[:, None, None, None].expand(n, 1, 8, 8).clamp(-1, 1)
    return TensorDataset(batch.contiguous(), labels)


def test_probabilities_are_those_of_the_proportions_in_training_not_of_equal_draws(tmp_path: Path) -> None:
    """Trained on nine to one, judged on one to one, against the posterior that is known in closed form."""
    result = train_classifier(faint(1000, 1, 9), faint(400, 2, 9), n_epochs=10, lr=3e-3, classes=("a", "b"),
                              augmentation=None, progress=False)
    model = result.model
    by_bayes = [math.log(2 * 0.9), math.log(2 * 0.1)]
    assert model.logit_shift == pytest.approx([model.temperature * shift for shift in by_bayes])
    batch, labels = faint(2000, 3, 9).tensors
    said = model.predict(batch).probabilities[:, 1]
    known = (6 * batch[:, 0, 0, 0] - 0.5 - math.log(9)).sigmoid()  # log odds by the level, less 9 to 1
    assert said.mean() == pytest.approx(0.1, abs=0.02)
    assert (said - known).abs().mean() < 0.03
    equal = dataclasses.replace(model, logit_shift=[0.0]).predict(batch).probabilities[:, 1]
    assert log_loss(labels, said) < log_loss(labels, equal) - 0.1
    save_classifier(tmp_path / "model.safetensors", model)
    loaded = load_classifier(tmp_path / "model.safetensors")
    assert torch.equal(loaded.predict(batch).probabilities[:, 1], said)


def test_shares_of_val_shift_nothing_and_even_classes_neither() -> None:
    options: dict[str, Any] = {"n_epochs": 1, "classes": LEVELS, "progress": False}
    uneven = train_classifier(images(60, 1), images(60, 2, common=8), **options).model
    assert uneven.logit_shift == [0.0, 0.0, 0.0]
    coral = train_classifier(images(100, 1, common=8), images(60, 2), "coral", **options).model
    assert coral.logit_shift == [0.0]


def test_wrong_images_are_refused_by_the_model() -> None:
    model = train(n_epochs=1).model
    with pytest.raises(ValueError, match=r"trained on images of 32x32 pixels, got \(2, 1, 40, 40\)"):
        model.predict(torch.zeros(2, 1, 40, 40))
    with pytest.raises(ValueError, match="scale pixels"):
        model.predict(torch.full((1, 1, 32, 32), 255.0))


def test_files_that_are_no_classifier_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "denoiser.safetensors"
    save_checkpoint(file, {"w": torch.zeros(2)}, {"img_size": 64})
    with pytest.raises(ValueError, match=r"denoiser.safetensors: holds no classifier"):
        load_classifier(file)
    with pytest.raises(FileNotFoundError):
        load_classifier(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(("field", "value"), [
    ("loss", None), ("loss", "mse"), ("loss", ["coral"]), ("backbone", 3), ("classes", "abc"),
    ("classes", []), ("classes", ["a"] * 8000), ("classes", ["a", 1]), ("img_size", 10**6), ("img_size", 0),
    ("img_size", True), ("temperature", math.nan), ("temperature", 0.0), ("temperature", -1.0),
    ("temperature", math.inf), ("temperature", "1"), ("logit_shift", [0.0, 1.0]), ("logit_shift", [math.nan]),
    ("logit_shift", 0.0),
    ("backbone", "vit_h_14")])  # 632 million weights, 2.5 GB
def test_a_recipe_without_sense_is_one_line_before_anything_is_built(
        field: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, recipe = load_checkpoint(SAMPLES / "covid_classifier.safetensors")
    changed_recipe = {name: x for name, x in {**recipe, field: value}.items() if x is not None}
    save_checkpoint(tmp_path / "model.safetensors", tensors, changed_recipe)
    monkeypatch.setattr("torch.nn.Linear.__init__", lambda *_: pytest.fail("a layer was built"))
    with pytest.raises(ValueError, match=rf"model.safetensors: .*({field}|vit_h_14 has)") as error:
        load_classifier(tmp_path / "model.safetensors")
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_a_model_with_a_weight_that_is_no_number_is_refused(tmp_path: Path) -> None:
    tensors, recipe = load_checkpoint(SAMPLES / "spine_grader.safetensors")
    tensors["body.head.bias"][2] = math.nan
    save_checkpoint(tmp_path / "model.safetensors", tensors, recipe)
    with pytest.raises(ValueError, match=r"body.head.bias holds numbers that are not finite"):
        load_classifier(tmp_path / "model.safetensors")


class Named(TensorDataset):
    """Images whose classes have names."""

    def __init__(self, dataset: TensorDataset, classes: tuple[str, ...]) -> None:
        super().__init__(*dataset.tensors)
        self.classes = classes


NAMES = ("Normal", "COVID", "Lung_Opacity")


@pytest.mark.parametrize(("message", "parts", "options"), [
    ("val: its classes are COVID, Normal",
     (Named(images(9, 1), NAMES), Named(images(9, 2), NAMES[1::-1])), {}),
    ("labels from 0 to 2; expected 0 to 1", (images(9, 1), images(9, 2)), {"classes": NAMES[:2]}),
    ("train: 0 images of d; expected 2 or more", (images(9, 1), images(9, 2)), {"classes": (*LEVELS, "d")}),
    ("train: 1 images of bright", (images(5, 1), images(9, 2)), {"classes": LEVELS}),
    ("val: 0 images of bright; expected 1 or more", (images(9, 1), images(2, 2)), {"classes": LEVELS}),
    ("val: 0 images of dark", (images(9, 1), images(0, 2)), {"classes": LEVELS}),
    (r"val of \(1, 40, 40\)", (images(9, 1), images(9, 2, img_size=40)), {"classes": LEVELS}),
    ("n_epochs.* or minutes", (images(9, 1), images(9, 2)), {"classes": LEVELS, "n_epochs": None}),
    ("loss='mse': expected one of", (images(9, 1), images(9, 2)), {"classes": LEVELS, "loss": "mse"}),
])
def test_classes_and_options_that_do_not_fit_are_refused(message: str, parts: Any, options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        train_classifier(*parts, progress=False, **{"n_epochs": 1, **options})


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    with pytest.raises(FloatingPointError, match=r"loss (nan|inf).*lower lr"):
        train(n_epochs=50, lr=1e18, augmentation=None)


@pytest.mark.slow
def test_a_network_grades_new_spines_of_known_severity() -> None:
    from genailab_helpers.phantoms.spine import THRESHOLDS, render_spines, sample_spines

    def spines(n: int, seed: int) -> TensorDataset:
        anatomy = sample_spines(n, seed)
        grades = torch.bucketize(anatomy.severity, torch.tensor(THRESHOLDS))
        return TensorDataset(render_spines(anatomy, 96).images, grades)

    result = train_classifier(spines(400, 1), spines(100, 2), "soft_labels", classes=GRADES, n_epochs=10,
                              lr=2e-3, progress=False)
    batch, grades = spines(200, 3).tensors
    found = metrics.qwk(grades.numpy(), result.model.predict(batch).decoded.numpy())
    assert found > 0.6
