"""The one engine for grades and classes: it learns, repeats itself, resumes, and keeps what its use needs."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from genailab_helpers.checkpoints import load_checkpoint, save_checkpoint
from genailab_helpers.classification import metrics, training
from genailab_helpers.classification.ordinal import LOSSES
from genailab_helpers.classification.training import (
    Augmentation,
    TrainingResult,
    load_classifier,
    save_classifier,
    train_classifier,
)
from genailab_helpers.datasets.folders import RadiographFolder
from genailab_helpers.radiographs import read_radiograph

LEVELS = ("dark", "dim", "bright")


@pytest.fixture(scope="module", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENAILAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


def films(n: int, seed: int, num_classes: int = 3, img_size: int = 32, common: int = 1) -> TensorDataset:
    """Noise with a square that is brighter the higher the label; label 0 is `common` times as frequent."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % (num_classes - 1 + common) - common + 1).clamp(min=0)
    images = torch.randn((n, 1, img_size, img_size), generator=generator) * 0.2 - 0.5
    images[:, :, 8:20, 8:20] += labels[:, None, None, None] * 0.5
    return TensorDataset(images.clamp(-1, 1), labels)


def train(n: int = 60, **arguments: Any) -> TrainingResult:
    options: dict[str, Any] = {"n_epochs": 3, "batch_size": 12, "lr": 2e-3, "classes": LEVELS,
                               "device": "cpu", "progress": False}
    options |= arguments
    return train_classifier(films(n, 1), films(30, 2), **options)


def weights(result: TrainingResult) -> dict[str, Tensor]:
    return result.model.network.state_dict()


def same(first: TrainingResult, second: TrainingResult) -> bool:
    return first.history == second.history and first.model.temperature == second.model.temperature and all(
        torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics card")
@pytest.mark.parametrize("backbone", ["small_cnn", "frozen_lite0"])
def test_a_graphics_card_trains_and_grades_alike(backbone: str) -> None:
    here, there = (train(n_epochs=1, backbone=backbone, device=device) for device in ("cpu", "cuda"))
    new = films(12, seed=9).tensors[0]
    probabilities, on_card = (result.model.predict(new).probabilities for result in (here, there))
    assert on_card == pytest.approx(probabilities, abs=0.02)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_levels_of_brightness(loss: str) -> None:
    result = train(120, loss=loss, n_epochs=8, augmentation=None)
    new = films(60, seed=9)
    predicted = result.model.predict(new.tensors[0])
    assert metrics.qwk(new.tensors[1].numpy(), predicted.decoded.numpy()) > 0.8
    assert predicted.probabilities.shape == (60, 3)
    torch.testing.assert_close(predicted.probabilities.sum(1), torch.ones(60))
    assert result.steps == 80
    assert len(result.history) == 8


def test_shuffled_labels_are_not_learned() -> None:
    """The control of the test above: nothing but the images tells the labels."""
    images, labels = films(120, 1).tensors
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    result = train_classifier(TensorDataset(images, labels[order]), films(30, 2), classes=LEVELS, n_epochs=4,
                              progress=False)
    new = films(60, seed=9)
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
    with pytest.raises(ValueError, match="model: knows the classes dark, dim, bright; expected those"):
        train(model=first.model, classes=("dim", "dark", "bright"))


@pytest.mark.parametrize("backbone", ["small_cnn", "efficientnet_lite0", "frozen_lite0"])
def test_a_training_repeats_itself_to_the_bit(backbone: str) -> None:
    n = 24
    first, again = (train(n, backbone=backbone, n_epochs=2, loss="coral") for _ in range(2))
    assert same(first, again)
    assert not same(first, train(n, backbone=backbone, n_epochs=2, loss="coral", seed=1))


@pytest.mark.parametrize(("backbone", "kill_after"),
                         [("small_cnn", 1), ("small_cnn", 2), ("frozen_lite0", 1)])
def test_a_killed_training_resumes_to_the_same_model(backbone: str, kill_after: int, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(backbone=backbone, n_epochs=4)
    file = tmp_path / "state.safetensors"
    move, steps_an_epoch = training._State.move, 60 // 12

    def die(state: Any, share: float) -> None:
        if state.step == kill_after * steps_an_epoch + 2:  # in the middle of an epoch
            raise KeyboardInterrupt
        move(state, share)

    with monkeypatch.context() as patch:
        patch.setattr(training._State, "move", die)
        with pytest.raises(KeyboardInterrupt):
            train(backbone=backbone, n_epochs=4, checkpoint=file)
    assert len(load_checkpoint(file).recipe["history"]) == kill_after
    resumed = train(backbone=backbone, n_epochs=4, checkpoint=file)
    assert same(whole, resumed)
    assert same(whole, train(backbone=backbone, n_epochs=4, checkpoint=file))  # and once more, all done


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    train(n_epochs=1, checkpoint=file)
    for other in ({"seed": 1}, {"loss": "coral"}, {"augmentation": None}, {"n": 63}, {"classes": "abc"}):
        with pytest.raises(ValueError, match="belongs to another training"):
            train(**{"n_epochs": 1, "checkpoint": file, **other})
    with pytest.raises(ValueError, match="holds no classifier"):  # a checkpoint is no model
        load_classifier(file)


def test_global_randomness_is_neither_used_nor_changed() -> None:
    torch.manual_seed(1)
    first, before = train(n_epochs=1), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert same(first, train(n_epochs=1))
    torch.manual_seed(1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_stops_early_and_keeps_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.5, math.nan, 0.4, 0.5, 0.9])
    kept: list[dict[str, Tensor]] = []
    keep = training._State.keep

    def note(state: Any, epoch: training.Epoch) -> None:
        kept.append({name: tensor.clone() for name, tensor in state.network.state_dict().items()})
        keep(state, epoch._replace(score=next(scores)))

    monkeypatch.setattr(training._State, "keep", note)
    result = train(n_epochs=20, patience=3)
    assert len(result.history) == 5  # three epochs without a better score than that of the second
    assert result.best_epoch == 1
    assert all(torch.equal(tensor, weights(result)[name]) for name, tensor in kept[1].items())


def test_minutes_end_a_training() -> None:
    result = train(n_epochs=None, minutes=0.02, patience=10**6)
    assert 1.2 <= result.seconds < 10  # 0.02 minutes are 1.2 seconds; then the epoch is judged
    assert result.steps >= 1


def test_the_score_is_kappa_for_grades_and_balanced_accuracy_for_classes() -> None:
    val = films(30, 2)
    for loss, classes, metric in (("cross_entropy", LEVELS, metrics.balanced_accuracy),
                                  ("cross_entropy", ("grade_0", "grade_1", "grade_2"), metrics.qwk),
                                  ("coral", LEVELS, metrics.qwk)):
        result = train(loss=loss, classes=classes)
        decoded = result.model.predict(val.tensors[0]).decoded.numpy()
        expected = metric(val.tensors[1].numpy(), decoded)
        assert result.history[result.best_epoch].score == pytest.approx(expected)


def test_rare_classes_are_seen_as_often_as_common_ones() -> None:
    labels = films(100, 0, common=8).tensors[1]
    assert labels.bincount().tolist() == [80, 10, 10]
    rows = training._balanced(labels, seed=0, epoch=0)
    assert len(rows) == 100
    counts = labels[rows].bincount().tolist()
    assert max(counts) - min(counts) <= 2
    for label in range(3):  # no film again before all others of its class
        times = rows.bincount(minlength=100)[labels == label]
        assert times.max() - times.min() <= 2
        assert times.max() <= (1 if label == 0 else 4)
    assert not torch.equal(rows, training._balanced(labels, seed=0, epoch=1))


def test_only_training_films_are_augmented() -> None:
    seen: list[Tensor] = []

    @dataclasses.dataclass(frozen=True)
    class Spy(Augmentation):
        def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
            seen.append(images)
            return super().__call__(images, generator)

    train(n_epochs=2, augmentation=Spy())
    known = {image.numpy().tobytes() for image in training._as_stored(films(60, 1).tensors[0])}
    assert len(seen) == 10
    assert all(image.numpy().tobytes() in known for batch in seen for image in batch)


def changed(generator_seed: int = 0, **only: Any) -> tuple[Tensor, Tensor]:
    """Return films before and after one kind of change."""
    none = {"rotation": 0.0, "shift": 0.0, "zoom": 0.0, "brightness": 0.0, "contrast": 0.0}
    images = films(40, 3, img_size=32).tensors[0]
    generator = torch.Generator().manual_seed(generator_seed)
    return images, Augmentation(**{**none, **only})(images, generator)


def test_no_change_changes_nothing_and_flip_is_off_by_default() -> None:
    images, same_images = changed()
    torch.testing.assert_close(same_images, images, rtol=0, atol=1e-5)
    assert not Augmentation().flip


def test_flip_mirrors_about_half_of_the_films_and_leaves_the_others() -> None:
    images, flipped = changed(flip=True)
    mirrored = (flipped - images.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    kept = (flipped - images).abs().amax((1, 2, 3)) < 1e-5
    assert (mirrored ^ kept).all()
    assert 10 < mirrored.sum() < 30  # of 40; chance leaves this range once in 500


def test_each_film_is_changed_within_the_ranges() -> None:
    images, lighter = changed(brightness=0.1)
    inside = (images.abs() < 0.85)
    offset = torch.stack([(b - a)[i].mean() for a, b, i in zip(images, lighter, inside, strict=True)])
    assert offset.abs().max() <= 0.1 + 1e-5
    assert offset.std() > 0.03  # uniform in [-0.1, 0.1]: 0.058
    images, stretched = changed(contrast=0.2)
    gain = torch.stack([(b[i] * a[i]).sum() / a[i].square().sum()
                        for a, b, i in zip(images, stretched, inside, strict=True)])
    assert gain.min() >= 0.8 - 1e-4
    assert gain.max() <= 1.2 + 1e-4
    assert gain.std() > 0.06  # uniform in [0.8, 1.2]: 0.115


def centre(image: Tensor) -> Tensor:
    """Return where, in image sides from the centre, the light of an image (1, S, S) lies: right, down."""
    light, steps = image[0] + 1, (torch.arange(image.shape[-1]) + 0.5) / image.shape[-1] - 0.5
    return torch.stack([(light.sum(0) * steps).sum(), (light.sum(1) * steps).sum()]) / light.sum()


def moved_dot(**only: Any) -> Tensor:
    """Return where a dot, a quarter to the right of the centre, ends in 200 changed copies: (200, 2)."""
    image = torch.full((200, 1, 64, 64), -1.0)
    image[:, :, 30:34, 46:50] = 1.0  # its middle: (0.25, 0)
    none = {"rotation": 0.0, "shift": 0.0, "zoom": 0.0, "brightness": 0.0, "contrast": 0.0}
    after = Augmentation(**{**none, **only})(image, torch.Generator().manual_seed(0))
    return torch.stack([centre(one) for one in after])


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
    result, images = train(loss="corn"), films(5, 7).tensors[0]
    file = tmp_path / "model.safetensors"
    save_classifier(file, result.model, run={"data": "phantoms"})
    loaded = load_classifier(file)
    assert loaded.recipe == result.model.recipe
    assert loaded.recipe["classes"] == list(LEVELS)
    assert not loaded.network.training
    for before, after in zip(result.model.predict(images), loaded.predict(images), strict=True):
        assert torch.equal(before, after)
    assert load_checkpoint(file).recipe["run"] == {"data": "phantoms"}


def test_use_sees_the_same_pixels_as_training(tmp_path: Path) -> None:
    """A film read for use has more than 8 bits, one of the cache has not: the network must not notice."""
    levels = torch.rand((1, 50, 40), generator=torch.Generator().manual_seed(0)).mul(255).byte()[0].numpy()
    folder = tmp_path / "grade_0"
    folder.mkdir()
    Image.fromarray(levels).save(folder / "film.png")
    cached, read = RadiographFolder(tmp_path, 32)[0][0], read_radiograph(folder / "film.png", 32)
    assert not torch.equal(cached, read)
    model = train(n_epochs=1).model
    assert torch.equal(model.logits(cached[None]), model.logits(read[None]))


def test_the_temperature_is_that_of_the_validation_films() -> None:
    model, val = train().model, films(30, 2)
    logits = model.logits(val.tensors[0])
    expected = metrics.fit_temperature(logits, val.tensors[1], model.loss.probabilities)
    assert model.temperature == pytest.approx(expected)
    torch.testing.assert_close(model.predict(val.tensors[0]).probabilities, (logits / expected).softmax(1))


def test_wrong_films_are_refused_by_the_model() -> None:
    model = train(n_epochs=1).model
    with pytest.raises(ValueError, match=r"trained on films of 32x32 pixels, got \(2, 1, 40, 40\)"):
        model.predict(torch.zeros(2, 1, 40, 40))
    with pytest.raises(ValueError, match="scale pixels"):
        model.predict(torch.full((1, 1, 32, 32), 255.0))


def test_files_that_are_no_classifier_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "denoiser.safetensors", {"w": torch.zeros(2)}, {"img_size": 64})
    with pytest.raises(ValueError, match=r"denoiser.safetensors: holds no classifier"):
        load_classifier(tmp_path / "denoiser.safetensors")
    with pytest.raises(FileNotFoundError):
        load_classifier(tmp_path / "absent.safetensors")


class Named(TensorDataset):
    """Films whose classes have names."""

    def __init__(self, dataset: TensorDataset, classes: tuple[str, ...]) -> None:
        super().__init__(*dataset.tensors)
        self.classes = classes


def test_classes_that_do_not_fit_are_refused() -> None:
    def refuse(message: str, train_films: Any, val_films: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            train_classifier(train_films, val_films, progress=False, **{"n_epochs": 1, **options})

    names = ("Normal", "COVID", "Lung_Opacity")
    refuse("val: its classes are COVID, Normal", Named(films(9, 1), names), Named(films(9, 2), names[1::-1]))
    refuse("labels from 0 to 2; expected 0 to 1", films(9, 1), films(9, 2), classes=names[:2])
    refuse("train: 0 films of d; expected at least 2", films(9, 1), films(9, 2), classes=(*LEVELS, "d"))
    refuse("train: 1 films of bright", films(5, 1), films(9, 2), classes=LEVELS)
    refuse("val: holds no films", films(9, 1), films(0, 2), classes=LEVELS)
    refuse(r"val: films of shape \(1, 40, 40\)", films(9, 1), films(9, 2, img_size=40), classes=LEVELS)
    refuse("Give n_epochs or minutes", films(9, 1), films(9, 2), classes=LEVELS, n_epochs=None)
    refuse("loss='mse': expected one of cross_entropy", films(9, 1), films(9, 2), classes=LEVELS, loss="mse")


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

    names = [f"grade_{k}" for k in range(5)]
    result = train_classifier(spines(400, 1), spines(100, 2), "soft_labels", classes=names, n_epochs=10,
                              lr=2e-3, progress=False)
    images, grades = spines(200, 3).tensors
    found = metrics.qwk(grades.numpy(), result.model.predict(images).decoded.numpy())
    assert found > 0.6
