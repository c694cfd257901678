"""`genailab train diffusion`, `sample`, `evaluate`: small runs end to end, and one line for bad input."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genailab_helpers import commands
from genailab_helpers.checkpoints import load_checkpoint
from genailab_helpers.commands import main
from genailab_helpers.diffusion import evaluation, process, training
from genailab_helpers.diffusion.denoiser import load_denoiser
from genailab_helpers.diffusion.sampling import sample_heun
from genailab_helpers.features import lite0_features
from genailab_helpers.phantoms.chest import FINDINGS, render_chests, sample_chests

SHIPPED = Path(__file__).parents[2] / "data" / "samples" / "chest_diffusion_64"


def run(*arguments: object) -> None:
    """Run the command line; typer ends even a success with SystemExit."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert not end.value.code


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run what must fail with exit status 2, and return its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def write_films(folder: Path, n_films: int, seed: int, img_size: int = 16, finding: str = "Normal") -> Path:
    folder.mkdir(parents=True)
    films = render_chests(sample_chests(n_films, seed, finding), img_size).images[:, 0]
    for i, film in enumerate(films):
        levels = ((film + 1) * 127.5).round().byte().numpy()
        Image.fromarray(levels).save(folder / f"person{seed}{i}_virus_1.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENAILAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 24 and 8 films, of 16x16 pixels."""
    root = tmp_path_factory.mktemp("films") / "tree"
    write_films(root / "NORMAL", 24, seed=1)
    write_films(root / "COVID", 8, seed=2, finding="COVID")
    return root


@pytest.fixture(scope="module")
def trained(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps over two classes."""
    folder = tmp_path_factory.mktemp("run") / "run"
    run("train", "diffusion", "--data", films, "--img-size", 16, "--n-steps", 3, "--output", folder)
    return folder


def weights(run_folder: Path) -> list[torch.Tensor]:
    return list(load_denoiser(run_folder / commands.MODEL).state_dict().values())


def test_run_holds_its_recipe_and_a_class_conditional_model(trained: Path, films: Path) -> None:
    recipe = json.loads((trained / commands.RECIPE).read_text())
    assert recipe["classes"] == {"Normal": 24, "COVID": 8}
    assert (recipe["data"], recipe["img_size"], recipe["seed"], recipe["steps"]) == (str(films), 16, 0, 3)
    assert load_denoiser(trained / commands.MODEL).num_classes == 2


def test_one_class_folder_trains_without_labels(films: Path, tmp_path: Path) -> None:
    run("train", "diffusion", "--data", films / "NORMAL", "--img-size", 16, "--n-steps", 1,
        "--output", tmp_path / "run")
    assert load_denoiser(tmp_path / "run" / commands.MODEL).num_classes is None
    run("sample", tmp_path / "run", "--n-samples", 2, "--output", tmp_path / "drawn")
    assert len(list((tmp_path / "drawn" / "films" / "Normal").iterdir())) == 2


def test_synthetic_trains_on_all_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "N_PHANTOMS", 20)
    run("train", "diffusion", "--data", "synthetic", "--img-size", 16, "--n-steps", 1,
        "--output", tmp_path / "run")
    recipe = json.loads((tmp_path / "run" / commands.RECIPE).read_text())
    assert tuple(recipe["classes"]) == FINDINGS
    assert sum(recipe["classes"].values()) == 20


class Killed(BaseException):
    """Ends a training as a kill does: nothing catches it."""


def test_killed_run_goes_on_to_the_same_weights(trained: Path, films: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    again, draw, draws = tmp_path / "run", training._draw, []
    arguments = ("train", "diffusion", "--data", films, "--img-size", 16, "--n-steps", 3, "--output", again)

    def dies_at_step_3(*given: object) -> object:
        draws.append(1)
        if len(draws) == 3:
            raise Killed
        return draw(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_draw", dies_at_step_3)
        patch.setitem(training.train_image_diffusion.__kwdefaults__, "checkpoint_every", 1)
        with pytest.raises(Killed):
            run(*arguments)
    assert not (again / commands.MODEL).exists()
    run(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(trained), strict=True))


@pytest.mark.slow
def test_two_processes_give_the_losses_and_weights_of_one(films: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["-m", "genailab_helpers.commands", "train", "diffusion", "--data", films, "--img-size", 16,
               "--n-steps", 12, "--output"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, *command]
    said = {}
    for folder, arguments in (("one", command), ("two", launch)):
        done = subprocess.run([sys.executable, *map(str, arguments), str(tmp_path / folder)],
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said[folder] = [line for line in done.stdout.splitlines() if "films of" in line]
    assert len(said["one"]) == 1
    assert said["two"] == said["one"]  # said once, not by each process
    one, two = (load_checkpoint(tmp_path / folder / commands.STATE) for folder in ("one", "two"))
    assert one.tensors["losses"].shape == (12,)
    processes = [json.loads((tmp_path / folder / commands.RECIPE).read_text())["processes"]
                 for folder in ("one", "two")]
    assert processes == [1, 2]  # the launcher starts one only, and says nothing, where it is not told right
    # measured: losses differ by 2e-7 of themselves, weights by 1e-7
    torch.testing.assert_close(two.tensors["losses"], one.tensors["losses"], rtol=5e-6, atol=0)
    for name, tensor in one.tensors.items():
        if name.startswith("weights."):
            torch.testing.assert_close(two.tensors[name], tensor, rtol=0, atol=5e-6)


def test_finished_run_is_left_as_it_is(trained: Path, films: Path) -> None:
    before = (trained / commands.MODEL).read_bytes(), (trained / commands.RECIPE).read_bytes()
    run("train", "diffusion", "--data", films, "--img-size", 16, "--n-steps", 3, "--output", trained)
    assert before == ((trained / commands.MODEL).read_bytes(), (trained / commands.RECIPE).read_bytes())


def test_the_model_is_written_last(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed before it has its model finishes when it is called again."""
    def told_before(*args: object, **more: object) -> None:
        assert "steps" in json.loads((tmp_path / "run" / commands.RECIPE).read_text())
        raise OSError("disk full")

    arguments = ("train", "diffusion", "--data", films, "--img-size", 16, "--n-steps", 3,
                 "--output", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(process, "save_denoiser", told_before)
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert end.value.code
    run(*arguments)
    assert (tmp_path / "run" / commands.MODEL).exists()


def test_samples_come_in_class_folders_as_frequent_as_in_training(trained: Path, tmp_path: Path) -> None:
    run("sample", trained, "--n-samples", 8, "--seed", 5, "--guidance", 1.5, "--output", tmp_path / "drawn")
    # the classes had 24 and 8 films in training
    drawn = {folder.name: sorted(folder.iterdir()) for folder in (tmp_path / "drawn/films").iterdir()}
    assert {name: len(paths) for name, paths in drawn.items()} == {"Normal": 6, "COVID": 2}
    films_drawn = [np.asarray(Image.open(path)) for path in drawn["Normal"] + drawn["COVID"]]
    assert all(film.shape == (16, 16) and film.dtype == np.uint8 for film in films_drawn)
    sheet = np.asarray(Image.open(tmp_path / "drawn" / commands.CONTACT_SHEET))
    assert sheet.shape == (2 * 16, 4 * 16)
    for i, film in enumerate(films_drawn):
        row, column = divmod(i, 4)
        assert np.array_equal(sheet[16 * row:16 * (row + 1), 16 * column:16 * (column + 1)], film)


def test_same_seed_draws_the_same_films(trained: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("sample", trained, "--n-samples", 2, "--seed", seed, "--output", tmp_path / name)
    a, b, c = ((tmp_path / name / commands.CONTACT_SHEET).read_bytes() for name in "abc")
    assert a == b != c


def test_interrupted_sampling_goes_on_to_the_same_films(trained: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands, "DRAWN_AT_ONCE", 4)
    command = ["sample", trained, "--n-samples", 11, "--output"]
    run(*command, tmp_path / "whole")
    saved = Image.Image.save

    def breaks(film: Image.Image, path: Path, *rest: object, **more: object) -> None:
        if len(list(tmp_path.glob("drawn/films/*/*.png"))) == 6:  # the temporary one beside five films
            raise Killed
        saved(film, path, *rest, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", breaks)
        with pytest.raises(Killed):
            run(*command, tmp_path / "drawn")
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("drawn/films/*/*.png")}
    assert len(there) == 5
    assert not (tmp_path / "drawn" / commands.CONTACT_SHEET).exists()
    assert "holds another run" in complaint(capsys, "sample", trained, "--n-samples", 12, "--output",
                                        tmp_path / "drawn")
    run(*command, tmp_path / "drawn")
    assert sum(path.stat().st_mtime_ns == written for path, written in there.items()) == 4  # a whole batch

    def content(folder: str) -> dict[Path, bytes]:
        return {path.relative_to(tmp_path / folder): path.read_bytes()
                for path in (tmp_path / folder).rglob("*") if path.is_file()}

    assert content("drawn") == content("whole")
    run(*command, tmp_path / "drawn")  # finished: nothing to do
    assert content("drawn") == content("whole")


def test_a_contact_sheet_shows_some_of_many_films(trained: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "SHOWN", 4)
    run("sample", trained, "--n-samples", 9, "--output", tmp_path / "drawn")
    assert Image.open(tmp_path / "drawn" / commands.CONTACT_SHEET).size == (3 * 16, 2 * 16)


def test_evaluate_prints_table_and_plain_distance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generated = write_films(tmp_path / "generated" / "films", 24, seed=1)
    Image.new("L", (400, 300)).save(tmp_path / "generated" / commands.CONTACT_SHEET)  # is no film
    real = write_films(tmp_path / "real", 48, seed=2)
    run("evaluate", tmp_path / "generated", real)
    out = capsys.readouterr().out
    assert "No --train" in out
    assert "24 films stand in" in out
    assert "24 are held out" in out
    assert re.search("generated +real against real +copies of the training films +one film repeated", out)
    assert re.search(r"^frechet( +[\d.]+ \[[\d., ]+\]){4}$", out, re.MULTILINE)
    a, b = (lite0_features(commands._read_films(folder)[0]) for folder in (generated, real))
    assert f"all 24 generated against all 48 real films: {evaluation.frechet_distance(a, b):.1f}" in out


def test_evaluate_finds_copies_of_the_named_training_films(tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    train, real = write_films(tmp_path / "train", 24, seed=1), write_films(tmp_path / "real", 24, seed=2)
    run("evaluate", train, real, "--train", train)
    out = capsys.readouterr().out
    assert "copies its training films" in out
    assert "No --train" not in out


@pytest.mark.parametrize("told_by", ["names", "films.csv"])
def test_evaluate_splits_by_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by: str) -> None:
    """Two equal films a patient: a film on both sides would mean that its patient is on both."""
    real, rows = write_films(tmp_path / "real", 20, seed=3), ["file,patient"]
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
    run("evaluate", write_films(tmp_path / "generated", 2, seed=4), real)
    halves = {name: {film.numpy().tobytes() for film in films} for name, films in seen.items()}
    assert len(seen["t"]) == len(seen["h"]) == 20
    assert not halves["t"] & halves["h"]


# ------------------------------------------------------------------------------------------------ bad input

def test_bad_training_input_is_one_line(films: Path, trained: Path, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    for words, *arguments in (
            ("empty folder", "--data", tmp_path / "empty"),
            ("no such folder", "--data", tmp_path / "absent"),
            ("--img-size 30: expected a multiple of 8", "--data", films, "--img-size", 30),
            ("--img-size 0: expected a multiple of 8", "--data", films, "--img-size", 0),
            ("full: expected a new or empty folder", "--data", films, "--output", full),
            ("n_steps is 3 in the file and 4 here", "--data", films, "--img-size", 16, "--n-steps", 4,
             "--output", trained)):
        if "--output" not in arguments:
            arguments += ["--output", tmp_path / "new"]
        assert words in complaint(capsys, "train", "diffusion", *arguments)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in full.iterdir()] == ["notes.txt"]


def test_bad_sampling_input_is_one_line(trained: Path, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    unfinished, broken = tmp_path / "unfinished", tmp_path / "broken"
    for folder in (unfinished, broken):
        folder.mkdir()
        (folder / commands.RECIPE).write_bytes((trained / commands.RECIPE).read_bytes())
    (broken / commands.MODEL).write_bytes((trained / commands.MODEL).read_bytes()[:5000])
    no_recipe = tmp_path / "no_recipe"
    no_recipe.mkdir()
    (no_recipe / commands.RECIPE).write_text("[1]")
    new = ["--output", tmp_path / "new"]
    assert "expected a run of" in complaint(capsys, "sample", tmp_path / "absent", *new)
    assert "has not ended" in complaint(capsys, "sample", unfinished, *new)
    assert "truncated" in complaint(capsys, "sample", broken, *new)
    assert "no recipe of" in complaint(capsys, "sample", no_recipe, *new)
    assert not (tmp_path / "new").exists()
    full = write_films(tmp_path / "full", 1, seed=9)
    assert "expected a new or empty folder" in complaint(capsys, "sample", trained, "--output", full)
    assert len(list(full.iterdir())) == 1


def test_bad_evaluation_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some, one = write_films(tmp_path / "some", 10, seed=1), write_films(tmp_path / "one", 1, seed=2)
    assert "no such folder" in complaint(capsys, "evaluate", tmp_path / "absent", some)
    assert "at least 2 patients" in complaint(capsys, "evaluate", some, one)
    assert "at least 20 films" in complaint(capsys, "evaluate", some, some)


# ------------------------------------------------------------------------------------- the shipped model

def test_shipped_model_draws_films_and_says_what_it_is() -> None:
    recipe = json.loads((SHIPPED / commands.RECIPE).read_text())
    assert recipe["data"] == "synthetic"
    assert tuple(recipe["classes"]) == FINDINGS
    assert {"seed", "date", "batch_size", "seconds_a_step"} <= recipe.keys()
    assert recipe["steps"] > 0
    header = load_checkpoint(SHIPPED / commands.MODEL).recipe
    assert header["run"] == recipe
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 8e6
    denoiser = load_denoiser(SHIPPED / commands.MODEL)
    assert denoiser.image_shape == (1, 64, 64)
    assert denoiser.num_classes == len(FINDINGS)
    drawn = sample_heun(denoiser, 8, n_steps=12, labels=torch.arange(8) % 5)
    assert drawn.shape == (8, 1, 64, 64)
    assert drawn.isfinite().all()
    assert drawn.abs().max() <= 1
    phantoms = render_chests(sample_chests(100, seed=1, finding=FINDINGS), 64).images
    mean, others = phantoms[:50].mean(0).flatten(), phantoms[50:]

    def likeness(films: torch.Tensor) -> torch.Tensor:
        """Correlate each film with the mean phantom."""
        return torch.stack([torch.corrcoef(torch.stack([mean, film]))[0, 1] for film in films.flatten(1)])

    assert likeness(drawn).median() > likeness(others).quantile(0.05)  # noise lies near 0


def test_a_label_file_can_be_trained_on(tmp_path, capsys):
    for finding in ("Normal", "COVID"):
        write_films(tmp_path / "films" / finding, 8, 5, finding=finding)
    run("data", "label", "--input", tmp_path / "films")
    run("train", "diffusion", "--data", tmp_path / "films" / "dataset.json", "--img-size", 16, "--n-steps", 1,
        "--output", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["classes"] == {"Normal": 8, "COVID": 8}
