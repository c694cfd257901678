"""Lungs: a network trained on phantoms finds them, in memory, from files, and on real images."""

import numpy as np
import pytest
import torch
from PIL import Image

from genailab_helpers.checkpoints import load_checkpoint, save_checkpoint
from genailab_helpers.phantoms import chest
from genailab_helpers.radiographs import read_radiograph
from genailab_helpers.segmentation import (
    SHIPPED,
    Segmenter,
    dice,
    load_segmenter,
    lungs_of,
    randomise,
    save_segmenter,
    train_segmenter,
)

pytestmark = pytest.mark.usefixtures("own_cache")
SOME = torch.rand(3, 1, 50, 70, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def tiny():
    """A model that has learned little, and its losses."""
    before = torch.random.get_rng_state()
    trained = train_segmenter(80, 32, 24, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    return trained


@pytest.fixture(scope="module")
def shipped():
    return load_segmenter()


@pytest.fixture
def pngs(tmp_path):
    """Three phantoms as PNG files, higher than wide."""
    (tmp_path / "in").mkdir()
    for i, image in enumerate(chest.render_chests(chest.sample_chests(3, 5), 64).images):
        pixels = Image.fromarray(((image[0] + 1) * 127.5).byte().numpy())
        pixels.resize((60, 80)).save(tmp_path / "in" / f"{i}.png")
    return sorted((tmp_path / "in").iterdir())


def test_a_few_steps_lower_the_loss_and_the_same_seed_repeats(tiny):
    _, losses = tiny
    assert len(losses) == 80
    assert np.mean(losses[-15:]) < 0.85 * np.mean(losses[:15])
    first, again, other = (train_segmenter(2, 32, 8, seed, progress=False)[1] for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("name", ["n_steps", "n_samples", "img_size"])
def test_training_refuses_numbers_that_do_not_fit(name):
    with pytest.raises(ValueError, match=name):
        train_segmenter(**{"n_steps": 1, "n_samples": 2, "img_size": 32, "progress": False, name: 0})


def test_a_mask_has_the_size_of_its_image_and_each_image_stands_alone(tiny):
    model = tiny[0]
    found = model.predict(SOME.repeat(7, 1, 1, 1))  # more than a batch
    assert found.dtype == torch.bool
    assert found.shape == (21, 50, 70)
    assert torch.equal(found[7], model.predict(SOME[1:2])[0])


@pytest.mark.parametrize("images", [SOME[0], SOME * 3, SOME.double(), SOME.numpy()])
def test_what_is_no_batch_of_images_is_refused(tiny, images):
    with pytest.raises(ValueError, match="images: expected"):
        tiny[0].predict(images)


class Painted(torch.nn.Module):
    """Stands for a network: lungs are where the image is dark."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images, _):
        return -images * self.weight


def test_two_components_are_kept_and_holes_are_filled():
    image = torch.ones(1, 1, 96, 96)
    image[..., 20:70, 10:40] = image[..., 20:70, 56:86] = image[..., 80:86, 44:52] = -1
    lungs = (image < 0)[0, 0].clone()
    lungs[80:] = False
    image[..., 40:46, 20:26] = 1
    found = Segmenter(Painted()).predict(image)[0]
    assert dice(found, lungs) > 0.98
    assert not found[78:].any()
    assert found[40:46, 20:26].all()
    assert not found[20:70, 42:54].any()


def test_dice_is_twice_the_overlap_over_both():
    one, two = torch.zeros(2, 4, 4, dtype=torch.bool)
    one[:2], two[1:] = True, True
    assert dice(one, two) == pytest.approx(2 * 4 / (8 + 12))
    assert dice(one, one) == 1
    with pytest.raises(ValueError, match=r"masks: expected one shape, got \(4, 4\) and \(1, 4\)"):
        dice(one, two[:1])


def test_the_lungs_of_a_phantom_are_those_that_a_person_sees():
    anatomy = chest.sample_chests(20, 3, confounders={"collimation": 1})
    masks = chest.render_chests(anatomy, 64, masks=True).masks
    lungs = lungs_of(masks)
    assert (lungs & masks["heart"]).flatten(1).any(1).all()
    assert not (lungs & (masks["diaphragm"] | masks["collimation"])).any()
    assert (lungs <= (masks["right_lung"] | masks["left_lung"])).all()


def test_image_and_mask_are_moved_together():
    films = chest.render_chests(chest.sample_chests(60, 4), 64, masks=True)
    truth = torch.stack((lungs_of(films.masks), films.masks["heart"]), 1).float()
    images, lungs = randomise(films.images, truth, 48, torch.Generator().manual_seed(0))
    assert images.shape == lungs.shape == (60, 1, 48, 48)
    assert -1 <= images.min() < images.max() <= 1
    inside = lungs > 0.9
    ring = (torch.nn.functional.max_pool2d(lungs, 5, 1, 2) > 0.5) & (lungs < 0.1)
    darker = [(image[at].mean() < image[around].mean()).item()  # lungs are dark, whatever was done to them
              for image, at, around in zip(images, inside, ring, strict=True) if at.any() and around.any()]
    assert np.mean(darker) > 0.75


def test_a_model_is_the_same_after_it_was_written_and_read(tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    save_segmenter(path, tiny[0], run={"seed": 0})
    again, recipe = load_segmenter(path), load_checkpoint(path).recipe
    assert recipe == {"kind": "lung_segmenter", "img_size": 32, "run": {"seed": 0}}
    assert (again.predict(SOME) == tiny[0].predict(SOME)).float().mean() > 0.995  # 16 bits
    save_segmenter(path, again)
    assert torch.equal(load_segmenter(path).predict(SOME), again.predict(SOME))


@pytest.mark.parametrize(("recipe", "weights", "says"), [
    ({"kind": "classifier", "img_size": 32}, 0, "holds no lung segmenter"),
    ({"kind": "lung_segmenter", "img_size": 40}, 0, "holds no lung segmenter"),
    ({"kind": "lung_segmenter", "img_size": 2**20}, 0, "holds no lung segmenter"),
    ([], 0, "no safetensors file with a recipe"),
    ({"kind": "lung_segmenter", "img_size": 32}, 0, "first difference at"),
    ({"kind": "lung_segmenter", "img_size": 32}, float("nan"), "not finite")])
def test_what_is_no_such_model_is_refused(tiny, tmp_path, recipe, weights, says):
    path = tmp_path / "other.safetensors"
    kept = {name: tensor + weights for name, tensor in tiny[0].network.state_dict().items()}
    save_checkpoint(path, dict(list(kept.items())[1:]) if says.startswith("first") else kept, recipe)
    with pytest.raises(ValueError, match=f"^{path}: .*{says}"):
        load_segmenter(path)


def test_the_commands_from_training_to_masks(genailab, pngs, tmp_path):
    run = tmp_path / "run"
    said = genailab.run("train", "segmenter", "--output", run, "--n-steps", 2, "--img-size", 32,
                        "--n-samples", 8)
    assert "Not for diagnosis" in said
    assert [path.name for path in run.iterdir()] == ["model.safetensors"]
    before = [path.read_bytes() for path in pngs]
    for model, masks in (([run], tmp_path / "a"), ([run / "model.safetensors"], tmp_path / "b"),
                         ([], tmp_path / "shipped")):
        said = genailab.run("segment", *model, *pngs, "--output", masks)
        assert "Not for diagnosis" in said
        expected = load_segmenter(run / "model.safetensors" if model else SHIPPED)
        for path in pngs:
            with Image.open(masks / path.name) as mask:
                assert mask.mode == "1"
                assert mask.size == (60, 80)
                assert np.array_equal(mask, expected.predict(read_radiograph(path)[None])[0])
    assert [path.read_bytes() for path in pngs] == before


def test_a_file_that_cannot_be_read_does_not_stop_the_others(genailab, pngs, tmp_path):
    pngs[1].write_text("no image")
    status, out, err = genailab("segment", *pngs, "--output", tmp_path / "masks")
    assert status == 1
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["0.png", "2.png"]
    assert f"{pngs[1]}: neither PNG" in err
    assert "2 masks" in out
    status, _, _ = genailab("segment", pngs[1], "--output", tmp_path / "none")
    assert status == 1
    assert not (tmp_path / "none").exists()


def test_no_input_is_written_over_and_no_mask_twice(genailab, pngs, tmp_path):
    before = pngs[0].read_bytes()
    assert "expected a new or empty folder" in genailab.refuse("segment", *pngs, "--output", pngs[0].parent)
    assert pngs[0].read_bytes() == before
    pngs[0].rename(pngs[0].with_suffix(".jpg"))
    both = (pngs[0].with_suffix(".jpg"), pngs[1].rename(pngs[0].with_suffix(".jpeg")))
    assert "2 radiographs are called 0" in genailab.refuse("segment", *both, "--output", tmp_path / "masks")
    assert "expected the radiographs" in genailab.refuse("segment", SHIPPED)
    assert "no model; expected" in genailab.refuse("segment", tmp_path / "absent.safetensors", pngs[2])


def test_the_shipped_weights_are_small_and_find_the_lungs_of_other_phantoms(shipped):
    assert SHIPPED.stat().st_size < 2_000_000
    films = chest.render_chests(chest.sample_hospital(40, "B", seed=9), 96, masks=True)
    truth = lungs_of(films.masks)
    scores = [dice(*pair) for pair in zip(shipped.predict(films.images), truth, strict=True)]
    plain = (~films.masks["border"]).flatten(1).all(1) & (~films.masks["collimation"]).flatten(1).all(1)
    assert np.mean(np.array(scores)[plain.numpy()]) > 0.95
    # 0.88 when this was written: a white border around a dark image misleads it; the average lungs reach 0.80
    assert np.mean(scores) > 0.86
    upside_down = shipped.predict(films.images.flip(2))
    assert np.mean([dice(*pair) for pair in zip(upside_down, truth, strict=True)]) < 0.8


def test_the_shipped_weights_find_the_lungs_of_real_patients(shipped, real_data):
    outlines = sorted((real_data / "covid_1125_lung_masks").glob("*.png"))
    images = {path.stem: path for path in (real_data / "covid_1125" / "Covid-19").iterdir()}
    if not outlines:
        pytest.skip(f"{real_data}: has no covid_1125_lung_masks")
    scores = []
    for path in outlines:
        with Image.open(path) as drawn:
            truth = torch.from_numpy(np.array(drawn.convert("1")))
        scores.append(dice(shipped.predict(read_radiograph(images[path.stem])[None])[0], truth))
    assert np.mean(scores) >= 0.90
    assert sum(score > 0.8 for score in scores) >= 25


def test_what_prediction_averages_is_the_image_and_its_mirror(tiny):
    model = tiny[0]
    assert (model.predict(SOME.flip(3)).flip(2) == model.predict(SOME)).float().mean() > 0.99
