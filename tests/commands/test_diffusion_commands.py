"""`genailab train diffusion`, `sample`, `evaluate`: small runs end to end, and one line for bad input."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genailab_helpers.checkpoints import load_checkpoint
from genailab_helpers.commands import diffusion
from genailab_helpers.diffusion import denoiser, evaluation
from genailab_helpers.diffusion.denoiser import load_denoiser
from genailab_helpers.diffusion.sampling import sample_heun
from genailab_helpers.phantoms.chest import FINDINGS, render_chests, sample_chests

pytestmark = pytest.mark.usefixtures("own_cache")

SHIPPED = Path(__file__).parents[2] / "data" / "samples" / "chest_diffusion_64"
MODEL, RECIPE, SHEET = "model.safetensors", "recipe.json", "contact_sheet.png"


def write_images(folder: Path, n_images: int, seed: int, finding: str = "Normal") -> Path:
    folder.mkdir(parents=True)
    images = render_chests(sample_chests(n_images, seed, finding), 16).images[:, 0]
    for i, image in enumerate(images):
        Image.fromarray(((image + 1) * 127.5).round().byte().numpy()).save(
            folder / f"person{seed}{i}_virus_1.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 24 and 8 images, of 16x16 pixels."""
    root = tmp_path_factory.mktemp("images") / "tree"
    write_images(root / "NORMAL", 24, seed=1)
    write_images(root / "COVID", 8, seed=2, finding="COVID")
    return root


@pytest.fixture
def train(genailab, tmp_path: Path):
    """Give the function that trains for some steps in a folder."""
    def call(data: object, n_steps: int = 1, output: Path = tmp_path / "run") -> Path:
        genailab.run("train", "diffusion", "--data", data, "--img-size", 16, "--n-steps", n_steps,
                     "--output", output)
        return output
    return call


@pytest.fixture(scope="module")
def trained(genailab, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps over two classes."""
    folder = tmp_path_factory.mktemp("run") / "run"
    genailab.run("train", "diffusion", "--data", images, "--img-size", 16, "--n-steps", 3,
                 "--output", folder)
    return folder


def test_a_recipe_of_other_classes_than_the_models_is_refused(trained: Path, tmp_path: Path,
                                                              genailab) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / RECIPE).write_text(json.dumps(recipe_of(run) | {"classes": {"Normal": 24}}))
    line = genailab.refuse("sample", run, "--output", tmp_path / "new")
    assert "recipe.json: expected classes that can be folders, with counts, as many as the model" in line


def recipe_of(run: Path) -> dict:
    return json.loads((run / RECIPE).read_text())


def test_run_holds_its_recipe_and_a_class_conditional_model(trained: Path, images: Path, train) -> None:
    recipe = recipe_of(trained)
    assert recipe["classes"] == {"Normal": 24, "COVID": 8}
    assert (recipe["data"], recipe["img_size"], recipe["seed"], recipe["steps"], recipe["processes"]) == (
        str(images), 16, 0, 3, 1)
    assert load_denoiser(trained / MODEL).num_classes == 2
    assert load_checkpoint(trained / MODEL).recipe["run"] == recipe | {"data": images.name}  # no folder
    before = (trained / MODEL).read_bytes(), (trained / RECIPE).read_bytes()
    train(images, 3, trained)  # a finished run is left as it is
    assert before == ((trained / MODEL).read_bytes(), (trained / RECIPE).read_bytes())


def test_one_class_folder_trains_without_labels(images: Path, tmp_path: Path, train, genailab) -> None:
    run = train(images / "NORMAL")
    assert load_denoiser(run / MODEL).num_classes is None
    genailab.run("sample", run, "--n-samples", 2, "--output", tmp_path / "sampled")
    assert len(list((tmp_path / "sampled" / "films" / "Normal").iterdir())) == 2


def test_synthetic_trains_on_all_findings(monkeypatch: pytest.MonkeyPatch, train) -> None:
    monkeypatch.setattr(diffusion, "N_PHANTOMS", 20)
    recipe = recipe_of(train("synthetic"))
    assert tuple(recipe["classes"]) == FINDINGS
    assert sum(recipe["classes"].values()) == 20


def test_a_run_that_could_not_write_its_model_goes_on(
        trained: Path, images: Path, tmp_path: Path, train, genailab,
        monkeypatch: pytest.MonkeyPatch) -> None:
    def told_before(*_: object, **more: object) -> None:
        assert "steps" in recipe_of(tmp_path / "run")  # the model comes last
        raise OSError(28, "No space left on device", "model")

    with monkeypatch.context() as patch:
        patch.setattr(denoiser, "save_denoiser", told_before)
        status, _, err = genailab("train", "diffusion", "--data", images, "--img-size", 16, "--n-steps", 3,
                                  "--output", tmp_path / "run")
    assert status == 2
    assert err.splitlines()[-1] == "genailab: [Errno 28] No space left on device: 'model'"
    again = train(images, 3)
    weights = [list(load_denoiser(run / MODEL).state_dict().values()) for run in (again, trained)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.slow
def test_two_processes_train_one_model(images: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["-m", "genailab_helpers.commands", "train", "diffusion", "--data", images, "--img-size", 16,
               "--n-steps", 12, "--output"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, *command]
    said = {}
    for folder, arguments in (("one", command), ("two", launch)):
        done = subprocess.run([sys.executable, *map(str, arguments), str(tmp_path / folder)],
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said[folder] = [line for line in done.stdout.splitlines() if "images of" in line]
    assert len(said["one"]) == 1
    assert said["two"] == said["one"]  # said once, not by each process
    # the launcher starts one only, and says nothing, where it is not classified correctly
    assert [recipe_of(tmp_path / folder)["processes"] for folder in ("one", "two")] == [1, 2]
    one, two = (recipe_of(tmp_path / folder)["mean_of_last_100_losses"] for folder in ("one", "two"))
    assert two == pytest.approx(one, rel=0.05)  # other noise on each process: .972 and .956


def test_samples_come_in_class_folders_as_frequent_as_in_training(trained: Path, tmp_path: Path,
                                                                  genailab) -> None:
    genailab.run("sample", trained, "--n-samples", 8, "--seed", 5, "--guidance", 1.5,
                 "--output", tmp_path / "sampled")
    # the classes had 24 and 8 images in training
    sampled = {folder.name: sorted(folder.iterdir()) for folder in (tmp_path / "sampled/films").iterdir()}
    assert {name: len(paths) for name, paths in sampled.items()} == {"Normal": 6, "COVID": 2}
    assert sampled["COVID"][0].name == "generated_0007.png"
    pixels = [np.asarray(Image.open(path)) for path in sampled["Normal"] + sampled["COVID"]]
    assert all(image.shape == (16, 16) and image.dtype == np.uint8 for image in pixels)
    _, said, _ = genailab("data", "verify", tmp_path / "sampled/films")
    assert "8 files of 8 marked as synthetic" in said
    genailab.run("data", "preprocess", "--input", tmp_path / "sampled/films", "--output", tmp_path / "small")
    copies = [Image.open(path).text for path in (tmp_path / "small").rglob("*.png")]
    assert [text["Synthetic"].split("; ")[:2] for text in copies] == [
        ["not for diagnosis", "diffusion model, seed 5"]] * 8
    sheet = np.asarray(Image.open(tmp_path / "sampled" / SHEET))
    assert sheet.shape == (2 * 16, 4 * 16)
    for i, image in enumerate(pixels):
        row, column = divmod(i, 4)
        assert np.array_equal(sheet[16 * row:16 * (row + 1), 16 * column:16 * (column + 1)], image)


def test_same_seed_samples_the_same_images(trained: Path, tmp_path: Path, genailab) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        genailab.run("sample", trained, "--n-samples", 2, "--seed", seed, "--output", tmp_path / name)
    a, b, c = ((tmp_path / name / SHEET).read_bytes() for name in "abc")
    assert a == b != c
    assert "expected a new or empty folder" in genailab.refuse("sample", trained, "--output", tmp_path / "a")


def test_a_contact_sheet_shows_some_of_many_images(trained: Path, tmp_path: Path, genailab,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "SHOWN", 4)
    genailab.run("sample", trained, "--n-samples", 9, "--output", tmp_path / "sampled")
    assert Image.open(tmp_path / "sampled" / SHEET).size == (3 * 16, 2 * 16)


def test_evaluate_prints_a_table(tmp_path: Path, genailab) -> None:
    write_images(tmp_path / "generated" / "films", 24, seed=1)
    Image.new("L", (400, 300)).save(tmp_path / "generated" / SHEET)  # is no radiograph
    real = write_images(tmp_path / "real", 48, seed=2)
    out = genailab.run("evaluate", tmp_path / "generated", real)
    assert "No --train" in out
    assert "24 images stand in" in out
    assert "24 are held out" in out
    assert re.search(r"^frechet( +[\d.]+ \[[\d., ]+\]){4}$", out, re.MULTILINE)


def test_evaluate_finds_copies_of_the_named_training_images(tmp_path: Path, genailab) -> None:
    train, real = write_images(tmp_path / "train", 24, seed=1), write_images(tmp_path / "real", 24, seed=2)
    out = genailab.run("evaluate", train, real, "--train", train)
    assert "copies its training" in out
    assert "No --train" not in out


@pytest.mark.parametrize("told_by", ["names", "films.csv"])
def test_evaluate_splits_by_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by: str,
                                    genailab) -> None:
    """Two equal images a patient: an image on both sides would mean that its patient is on both."""
    real, rows = write_images(tmp_path / "real", 20, seed=3), ["file,patient"]
    for i, path in enumerate(list(real.iterdir())):
        for visit in (1, 2):
            name = f"person{i}_virus_{visit}.png" if told_by == "names" else f"image_{visit}{i:02}.png"
            Image.open(path).save(real / name)
            rows.append(f"{name},P{i}")
        path.unlink()  # person30_virus_1.png and so on: other names than those
    if told_by == "films.csv":
        (real / "films.csv").write_text("\n".join(rows) + "\n")
    seen = {}
    monkeypatch.setattr(evaluation, "evaluate", lambda _, train, held_out: seen.update(t=train, h=held_out))
    genailab.run("evaluate", write_images(tmp_path / "generated", 2, seed=4), real)
    halves = {name: {image.numpy().tobytes() for image in images} for name, images in seen.items()}
    assert len(seen["t"]) == len(seen["h"]) == 20
    assert not halves["t"] & halves["h"]


@pytest.mark.parametrize(("says", "words"), [
    ("empty folder", "train diffusion --data empty --output new"),
    ("no such folder", "train diffusion --data absent --output new"),
    ("--img-size 30: expected a multiple of 8", "train diffusion --data some --img-size 30 --output new"),
    ("--img-size 0: expected a multiple of 8", "train diffusion --data some --img-size 0 --output new"),
    ("some: expected a new or empty folder", "train diffusion --data some --output some"),
    ("n_steps is 3 in the file and 4 here",
     "train diffusion --data IMAGES --img-size 16 --n-steps 4 --output TRAINED"),
    ("absent: no model; expected a folder", "sample absent --output new"),
    ("unfinished: no model; expected a folder", "sample unfinished --output new"),
    ("truncated", "sample broken --output new"),
    ("expected a new or empty folder", "sample TRAINED --output some"),
    ("no such folder", "evaluate absent some"),
    ("at least 2 patients", "evaluate some one"),
    ("at least 20", "evaluate some some"),
])
def test_bad_input_is_one_line(says: str, words: str, images: Path, trained: Path, tmp_path: Path, genailab,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "some", 10, seed=1)
    write_images(tmp_path / "one", 1, seed=2)
    for folder in ("empty", "unfinished", "broken"):
        (tmp_path / folder).mkdir()
    shutil.copy(trained / RECIPE, tmp_path / "unfinished")
    (tmp_path / "broken" / MODEL).write_bytes((trained / MODEL).read_bytes()[:5000])
    places = {"IMAGES": images, "TRAINED": trained}
    before = sorted(tmp_path.rglob("*"))
    assert says in genailab.refuse(*(places.get(word, word) for word in words.split()))
    assert sorted(tmp_path.rglob("*")) == before


def test_shipped_model_samples_images_and_says_what_it_is() -> None:
    recipe = recipe_of(SHIPPED)
    assert recipe["data"] == "synthetic"
    assert tuple(recipe["classes"]) == FINDINGS
    assert {"seed", "date", "batch_size", "seconds_a_step"} <= recipe.keys()
    assert recipe["steps"] > 0
    assert load_checkpoint(SHIPPED / MODEL).recipe["run"] == recipe
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 8e6
    denoiser = load_denoiser(SHIPPED / MODEL)
    assert denoiser.image_shape == (1, 64, 64)
    assert denoiser.num_classes == len(FINDINGS)
    sampled = sample_heun(denoiser, 8, n_steps=12, labels=torch.arange(8) % 5)
    assert sampled.shape == (8, 1, 64, 64)
    assert sampled.isfinite().all()
    assert sampled.abs().max() <= 1
    phantoms = render_chests(sample_chests(100, seed=1, finding=FINDINGS), 64).images
    mean, others = phantoms[:50].mean(0).flatten(), phantoms[50:]

    def likeness(images: torch.Tensor) -> torch.Tensor:
        """Correlate each image with the mean phantom."""
        return torch.stack([torch.corrcoef(torch.stack([mean, image]))[0, 1] for image in images.flatten(1)])

    assert likeness(sampled).median() > likeness(others).quantile(0.05)  # noise lies near 0
