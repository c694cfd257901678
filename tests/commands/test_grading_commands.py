"""`genailab train grader` and `grade`: a small run end to end, honest tables, and one line for bad input."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from genailab_helpers.checkpoints import load_checkpoint, save_checkpoint
from genailab_helpers.commands import main
from genailab_helpers.datasets.names import GRADES

N_FILMS = {"train": 60, "val": 20, "test": 40}
QUICK = ("--backbone", "small_cnn", "--img-size", 32, "--n-epochs", 1)
LONGER = (*QUICK[:-1], 60)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command line, and return what it says; typer ends even a success with SystemExit."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert not end.value.code
    return capsys.readouterr().out


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run what must fail with exit status 2, and return its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENAILAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write_films(folder: Path, n_films: int, seed: int, learnable: bool = True) -> None:
    """Write noise with a square that is brighter the higher the grade, or any square where unlearnable."""
    generator = torch.Generator().manual_seed(seed)
    shown = torch.randint(0, 5, (n_films,), generator=generator)
    for i in range(n_films):  # names as in a public set: a number for the person, a letter for the side
        film = 60 + 10 * torch.randn((32, 32), generator=generator)
        film[8:24, 8:24] += 35 * (i % 5 if learnable else int(shown[i]))
        path = folder / GRADES[i % 5] / f"9{seed}00{i:03d}L.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(film.clamp(0, 255).byte().numpy()).save(path)


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("graded")
    for seed, (part, n_films) in enumerate(N_FILMS.items()):
        write_films(root / part, n_films, seed)
    return root


def copy(source: Path, target: Path, *parts: str) -> Path:
    for part in parts:
        shutil.copytree(source / part, target / part)
    return target


def test_a_run_from_films_to_grades(graded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "train", "grader", "--data", graded, "--output", tmp_path / "run", *LONGER)
    assert "train 60 films" in said
    assert "The labels carry signal" in said
    qwk = re.search(r"^qwk +(\S+) \[(\S+), (\S+)\], n = (\d+), seeds 0$", said, re.MULTILINE)
    assert qwk, said
    value, low, high = (float(number) for number in qwk.groups()[:3])
    assert low <= value <= high
    assert value > 0.7
    assert int(qwk[4]) == N_FILMS["test"]  # judged on test, since there is one
    assert "chosen on these films" not in said
    always = re.search(r"^accuracy +(\S+) +difference (\S+) \[", said, re.MULTILINE)
    assert always
    assert float(always[1]) == pytest.approx(1 / 5)  # equally many films of each grade
    assert float(always[2]) > 0.3
    assert "by chance: qwk 0, balanced accuracy 0.200" in said
    assert "Not for diagnosis" in said
    assert said.index("what tells the classes apart besides the anatomy?") < said.index(" epochs, ")
    headline = f"qwk on test {qwk[1]} [{qwk[2]}, {qwk[3]}]"
    assert f"HEADLINE: {headline}" in said
    card = (tmp_path / "run" / "model_card.md").read_text()
    assert headline in card
    assert "genailab grade" in card
    assert str(graded) not in card

    films = [graded / "test" / grade / f"9200{k:03d}L.png" for k, grade in enumerate(GRADES)]
    lines = run(capsys, "grade", tmp_path / "run", *films).splitlines()
    assert len(lines) == 6
    grades = [int(re.search(r": grade (\d)", line)[1]) for line in lines[:5]]  # type: ignore[index]
    assert sum(abs(grade - truth) for truth, grade in enumerate(grades)) <= 2
    for line in lines[:5]:
        assert sum(float(p) for p in re.findall(r"[a-z] (\d\.\d\d)", line)) == pytest.approx(1, abs=0.03)
    assert "grade 4 Severe" in lines[4]
    assert lines[5].startswith("Not for diagnosis")
    assert run(capsys, "grade", tmp_path / "run" / "model.safetensors", films[0]).splitlines()[0] == lines[0]

    again = run(capsys, "train", "grader", "--data", graded, "--output", tmp_path / "run", *LONGER)
    assert qwk[0] in again  # a finished run is not trained anew
    assert "holds another run (seed is 0 in the file and 1 here)" in complaint(
        capsys, "train", "grader", "--data", graded, "--output", tmp_path / "run", "--seed", 1, *LONGER)


def test_val_is_taken_from_train_by_patient(graded: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for film in (graded / "train").glob("*/*.png"):  # two films of each person
        for side in "LR":
            target = data / film.parent.name / f"{film.stem[:-1]}{side}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(film, target)
    said = run(capsys, "train", "grader", "--data", data, "--output", tmp_path / "run", *QUICK)
    found = re.search(r"train (\d+) films, val (\d+) films", said)
    assert found
    assert (int(found[1]), int(found[2])) == (96, 24)
    assert "val: 24 films" in said
    assert "n = 12, seeds 0" in said  # patients, not films
    assert "chosen on these films" in said


def test_where_a_signal_was_not_shown_the_score_says_so(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_films(tmp_path / "data" / "train", 60, 1, learnable=False)
    write_films(tmp_path / "data" / "val", 20, 2, learnable=False)
    said = run(capsys, "train", "grader", "--data", tmp_path / "data", "--output", tmp_path / "run", *QUICK)
    assert "The labels were not shown to carry signal, nor to carry none" in " ".join(said.split())
    verdict = "THAT THE LABELS CAN BE LEARNED AT ALL WAS NOT SHOWN"
    assert verdict in " ".join(said.split("HEADLINE: ")[1].split())
    assert verdict in (tmp_path / "run" / "model_card.md").read_text()
    assert "Not for diagnosis" in said


def test_too_few_patients_get_no_score_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_films(tmp_path / "data" / "train", 10, 1)
    write_films(tmp_path / "data" / "val", 5, 2)
    for film in (tmp_path / "data").glob("*/*/*.png"):  # one person a grade in train, one with all in val
        person = film.parent.name[-1] if film.parts[-3] == "train" else 9
        film.rename(film.with_name(f"person{person}_bacteria_{film.stem[1:-1]}.png"))
    said = run(capsys, "train", "grader", "--data", tmp_path / "data", "--output", tmp_path / "run", *QUICK)
    assert "No score is shown: whether the labels can be learned cannot be told" in said
    assert "qwk" not in said


@pytest.mark.parametrize("fault", ["missing", "one", "corrupt"])
def test_a_grade_without_films_is_one_line(fault: str, graded: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(graded, tmp_path / "data", "train", "val") / "train" / "grade_3"
    films = sorted(folder.iterdir())
    if fault == "missing":
        shutil.rmtree(folder)
    for film in films[1:] if fault == "one" else ():
        film.unlink()
    for film in films if fault == "corrupt" else ():
        film.write_bytes(film.read_bytes()[:60])
    line = complaint(capsys, "train", "grader", "--data", folder.parents[1], "--output", tmp_path / "run")
    count = 1 if fault == "one" else 0
    assert f"{folder.parents[1]}: {count} readable images of grade_3 in train; expected at least 2" in line
    assert not (tmp_path / "run").exists()


def test_a_grade_of_one_film_is_refused_before_train_is_split(graded: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    data = copy(graded, tmp_path / "data", "train") / "train"
    for film in sorted((data / "grade_4").iterdir())[1:]:
        film.unlink()
    for root in (data, data.parent):  # with and without a folder train
        line = complaint(capsys, "train", "grader", "--data", root, "--output", tmp_path / "run", *LONGER)
        assert f"{root}: 1 readable images of grade_4 in train" in line


def test_other_bad_input_is_one_line(graded: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    def train(*arguments: object) -> str:
        return complaint(capsys, "train", "grader", "--output", tmp_path / "run", *arguments)

    assert "no such folder" in train("--data", tmp_path / "absent")
    copy(graded, tmp_path / "untrained", "val", "test")
    assert "found only val/, test/; expected train/" in train("--data", tmp_path / "untrained")
    chests = tmp_path / "chests"
    shutil.copytree(graded / "train" / "grade_0", chests / "Normal")
    shutil.copytree(graded / "train" / "grade_1", chests / "COVID")
    assert "holds the classes Normal, COVID; expected folders grade_0 to grade_4" in train("--data", chests)
    assert "expected one of cross_entropy" in train("--data", graded, "--loss", "mse")
    assert "backbone='resnet': expected small_cnn" in train("--data", graded, "--backbone", "resnet")
    assert "--img-size 16: expected at least 32" in train("--data", graded, "--img-size", 16)
    assert not (tmp_path / "run").exists()


def test_models_and_films_of_another_kind_are_one_line(graded: Path, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    film = next((graded / "val" / "grade_0").iterdir())
    denoiser = tmp_path / "denoiser.safetensors"
    save_checkpoint(denoiser, {"weights.a": torch.zeros(3)}, {"img_size": 64, "network": {}})
    assert f"{denoiser}: holds no classifier" in complaint(capsys, "grade", denoiser, film)
    assert "there is no such checkpoint" in complaint(capsys, "grade", tmp_path / "absent.safetensors", film)
    assert "no safetensors file" in complaint(capsys, "grade", film, film)

    run(capsys, "train", "grader", "--data", graded, "--output", tmp_path / "run", *QUICK)
    broken = tmp_path / "broken.png"
    broken.write_bytes(film.read_bytes()[:60])
    assert "broken.png" in complaint(capsys, "grade", tmp_path / "run", film, broken)
    tensors, recipe = load_checkpoint(tmp_path / "run" / "model.safetensors")
    classes = ["Normal", "Pneumonia", "COVID", "Lung_Opacity", "Viral Pneumonia"]
    save_checkpoint(tmp_path / "chests.safetensors", tensors, {**recipe, "classes": classes})
    line = complaint(capsys, "grade", tmp_path / "chests.safetensors", film)
    assert "holds a model of the classes Normal, Pneumonia" in line
    assert "this one is for `genailab classify`" in line


def test_patients_on_both_sides_are_refused_by_name(graded: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    data = copy(graded, tmp_path / "data", "train", "val")
    left = next((data / "train" / "grade_2").iterdir())
    shutil.copy(left, data / "val" / "grade_2" / left.name.replace("L.", "R."))  # the other knee
    line = complaint(capsys, "train", "grader", "--data", data, "--output", tmp_path / "run", *QUICK)
    assert f"the images of 1 patients ({left.stem[:-1]}) lie in several of its parts" in line
    assert not (tmp_path / "run").exists()
