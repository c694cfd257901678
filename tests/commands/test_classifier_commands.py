"""`genailab train classifier` and `classify`: a run end to end, an honest verdict, one line for bad input."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genailab_helpers.checkpoints import load_checkpoint, save_checkpoint
from genailab_helpers.commands import main

CLASSES = ("Normal", "COVID", "Tuberculosis")  # in the order of the labels
N_FILMS = {"train": 40, "val": 10, "test": 10}  # of each class
QUICK = ("--backbone", "small_cnn", "--img-size", 32, "--n-epochs", 1)
LONGER = (*QUICK[:-1], 40)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENAILAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write_films(root: Path, n_films: dict[str, int], shortcut: bool = False, learnable: bool = True) -> Path:
    """Write noise with a bar that lies, a bar that stands, or a square; or any, with a frame that tells."""
    rng = np.random.default_rng(0)
    for part, n in n_films.items():
        for i in range(n * len(CLASSES)):
            film = 60 + 12 * rng.standard_normal((32, 32))
            shape = i % 3 if learnable and not shortcut else int(rng.integers(3))
            height, width = ((4, 16), (16, 4), (8, 8))[shape]  # equally large: brightness tells nothing
            film[16 - height // 2:16 + height // 2, 16 - width // 2:16 + width // 2] += 80
            if shortcut:
                film[:2] += 50 * (i % 3)
            path = root / part / CLASSES[i % 3] / f"person{len(part)}{i:03d}_virus_{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def chests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_films(tmp_path_factory.mktemp("chests"), N_FILMS)


@pytest.fixture
def data(chests: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(chests, tmp_path / "data"))


class Commands:
    def __init__(self, capsys: pytest.CaptureFixture[str], output: Path) -> None:
        self.capsys, self.output = capsys, output

    def _end(self, *arguments: object) -> tuple[int, str, str]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return (end.value.code or 0, *self.capsys.readouterr())  # type: ignore[return-value]

    def run(self, *arguments: object) -> str:
        status, out, _ = self._end(*arguments)
        assert status == 0
        return out

    def refuse(self, *arguments: object) -> str:
        """Run what must end with status 2 and one line on stderr; return that line."""
        status, _, err = self._end(*arguments)
        assert status == 2
        assert len(err.strip().splitlines()) == 1, err
        return err.strip()

    def train(self, data: Path, *options: object) -> str:
        return self.run("train", "classifier", "--data", data, "--output", self.output, *options)

    def refuse_data(self, data: Path) -> str:
        """Train with films that must be refused before anything is written."""
        line = self.refuse("train", "classifier", "--data", data, "--output", self.output, *QUICK)
        assert not self.output.exists()
        return line


@pytest.fixture
def genailab(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Commands:
    return Commands(capsys, tmp_path / "run")


def score_of(name: str, said: str) -> tuple[float, float, float, int]:
    found = re.search(rf"^{name} +(\S+) \[(\S+), (\S+)\], n = (\d+), seeds 0$", said, re.MULTILINE)
    assert found, said
    return float(found[1]), float(found[2]), float(found[3]), int(found[4])


def test_a_run_from_films_to_classes(chests: Path, genailab: Commands) -> None:
    said = genailab.train(chests, *LONGER)
    assert "train 120 films, val 30 films, test 30 films" in said
    value, low, high, n = score_of("balanced accuracy", said)
    assert low <= value <= high
    assert value > 0.8
    assert n == 30  # judged on test
    assert "chosen on these films" not in said
    for name in CLASSES:
        for metric in ("auroc", "sensitivity", "specificity", "ppv", "npv"):
            score_of(f"{metric} {name}", said)
    baselines = re.findall(r"^balanced accuracy +(\S+) +difference (\S+) \[(\S+), ", said, re.MULTILINE)
    assert len(baselines) == 2
    assert float(baselines[0][0]) == pytest.approx(1 / 3, abs=6e-4)  # always one class
    assert float(baselines[1][0]) < 0.67  # grey values alone: all classes are equally bright
    assert all(float(low) > 0 for _, _, low in baselines)
    assert "by chance: macro auroc 0.5, balanced accuracy 0.333" in said
    assert said.index("besides the anatomy?") < said.index(" epochs, ")
    verdict = said.split("HEADLINE: ")[1]
    assert "No shortcut found" in verdict
    assert "DOES NOT SHOW" not in verdict
    assert "Not for diagnosis" in said
    card = (genailab.output / "model_card.md").read_text()
    assert f"**balanced accuracy on test {value:.2f}" in card
    assert "No shortcut found" in card

    films = [next((chests / "test" / name).iterdir()) for name in CLASSES]
    lines = genailab.run("classify", genailab.output, *films).splitlines()
    assert len(lines) == 5
    thresholds = load_checkpoint(genailab.output / "model.safetensors").recipe["thresholds"]
    for line, film in zip(lines, films, strict=False):
        assert line.startswith(f"{film}: {film.parent.name} (")
        found = {name: float(re.search(rf"{name} (\d\.\d\d)", line)[1]) for name in CLASSES}  # type: ignore[index]
        assert sum(found.values()) == pytest.approx(1, abs=0.02)
        reached = line.split("threshold reached: ")[1].split(", ")
        for name in CLASSES:
            if abs(found[name] - thresholds[name]) > 0.005:  # what is printed is rounded
                assert (name in reached) == (found[name] > thresholds[name])
    assert lines[3] == "Thresholds, chosen in training: " + ", ".join(
        f"{name} {thresholds[name]:.2f}" for name in CLASSES)
    assert lines[4].startswith("Not for diagnosis")

    again = genailab.train(chests, *LONGER)  # ends at once
    assert score_of("balanced accuracy", again)[0] == value


def test_thresholds_are_those_of_val_and_the_model_names_no_folder(
        chests: Path, data: Path, genailab: Commands) -> None:
    genailab.train(chests, *QUICK)
    recipe = load_checkpoint(genailab.output / "model.safetensors").recipe
    assert str(chests) not in json.dumps(recipe)
    shutil.rmtree(data / "test")
    genailab.output = data.parent / "other"
    said = genailab.train(data, *QUICK)
    assert load_checkpoint(genailab.output / "model.safetensors").recipe["thresholds"] == recipe["thresholds"]
    assert score_of("accuracy", said)[3] == 30
    assert "chosen on these films" in said


def test_a_shortcut_is_named_beside_the_headline(tmp_path: Path, genailab: Commands) -> None:
    data = write_films(tmp_path / "data", {"train": 20, "val": 8, "test": 8}, shortcut=True)
    said = genailab.train(data, *QUICK)
    assert re.search(r"^2-pixel frame .* YES$", said, re.MULTILINE)
    verdict = " ".join(said.split("HEADLINE: ")[1].split())
    assert "Shortcut: 2-pixel frame" in verdict
    assert "SO A GOOD SCORE DOES NOT SHOW THAT THE MODEL SEES THE DISEASE" in verdict
    frame = re.search(r"^2-pixel frame +\S+ \[\S+ \S+ +(\S+)", said, re.MULTILINE)
    alone = re.search(r"tiny model reaches balanced accuracy (\S+) \(chance 0\.333\)", verdict)
    assert frame
    assert alone
    assert float(alone[1]) >= float(frame[1]) > 0.9
    card = (genailab.output / "model_card.md").read_text()
    headline = next(line for line in card.splitlines() if line.startswith("**balanced accuracy on test"))
    assert "SO A GOOD SCORE DOES NOT SHOW" in headline


def test_labels_without_signal_get_no_score(tmp_path: Path, genailab: Commands) -> None:
    data = write_films(tmp_path / "data", {"train": 130, "val": 26}, learnable=False)  # few show nothing
    said = genailab.train(data, *QUICK)
    assert "The labels carry no signal" in said
    assert "No score is shown" in said
    card = (genailab.output / "model_card.md").read_text()
    assert "No score is shown" in card
    for text in (said, card):
        assert "auroc" not in text
        assert "HEADLINE" not in text
        assert "Calibration" not in text


def test_one_folder_gives_a_fifth_of_its_patients_to_val(chests: Path, tmp_path: Path,
                                                         genailab: Commands) -> None:
    data = tmp_path / "data"
    for film in (chests / "train").glob("*/*.png"):  # two films of each person
        for visit in "ab":
            target = data / film.parent.name / film.name.replace("_virus_", f"_virus_{ord(visit)}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(film, target)
    said = genailab.train(data, *QUICK)
    found = re.search(r"^train (\d+) films, val (\d+) films$", said, re.MULTILINE)
    assert found
    assert (int(found[1]), int(found[2])) == (192, 48)
    assert score_of("accuracy", said)[3] == 24  # patients, not films
    assert "a fifth of the patients of train" in (genailab.output / "model_card.md").read_text()


def test_a_table_of_bare_names_keeps_patients_whole(tmp_path: Path, genailab: Commands) -> None:
    data, lines = tmp_path / "data", ["Image Index,Patient ID"]
    for i, film in enumerate(sorted(write_films(tmp_path / "raw", {"": 20}).rglob("*.png"))):
        target = data / film.parent.name / f"scan{i:03d}.png"  # a name that tells no patient
        target.parent.mkdir(parents=True, exist_ok=True)
        film.rename(target)
        lines.append(f"{target.name},{i // 2}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    genailab.train(data, "--table", tmp_path / "table.csv", *QUICK)
    card = (genailab.output / "model_card.md").read_text()
    n_patients = [int(n) for n in re.findall(r"^\| (?:train|val) \| \d+ \| (\d+) \|", card, re.MULTILINE)]
    assert len(n_patients) == 2
    assert sum(n_patients) == 30  # of 60 images; one on both sides would be counted twice


def test_a_class_that_train_lacks(data: Path, genailab: Commands) -> None:
    for part in ("test", "val"):
        shutil.copytree(data / part / "COVID", data / part / "Silicosis")
        line = genailab.refuse_data(data)
        assert f"{data}: 0 readable images of Silicosis in train; expected at least 2 of each of " in line
        shutil.rmtree(data / part / "Silicosis")
    shutil.rmtree(data / "test" / "Tuberculosis")
    assert f"{data}: 0 readable images of Tuberculosis in test" in genailab.refuse_data(data)


def test_a_folder_of_colour_photographs(data: Path, genailab: Commands) -> None:
    films = sorted((data / "train").glob("*/*.png"))
    rng = np.random.default_rng(0)
    for film in films:  # as from an old scanner: brownish, but grey
        grey = np.asarray(Image.open(film), dtype=float)
        Image.fromarray((grey[..., None] * [1.0, 0.9, 0.7]).astype(np.uint8)).save(film)
    genailab.train(data, *QUICK)
    shutil.rmtree(genailab.output)
    for film in films:
        across, down = np.meshgrid(np.linspace(0, 1, 32), np.linspace(0, 1, 32))
        red, green, blue = across, down, 1 - (across + down) / 2
        picture = 255 * np.stack([red, green, blue], 2) * rng.uniform(0.6, 1)
        Image.fromarray(picture.astype(np.uint8)).save(film)
    line = genailab.refuse_data(data)
    assert f"{data}: 60 of 90 images looked at are in colour (channels differ by" in line
    assert "expected radiographs, which are grey" in line


def test_one_film_in_a_class(data: Path, genailab: Commands) -> None:
    films = sorted((data / "train" / "COVID").iterdir())
    for film in films[1:]:
        film.unlink()
    assert f"{data}: 1 readable images of COVID in train; expected at least 2" in genailab.refuse_data(data)
    shutil.rmtree(data / "val")
    shutil.copy(films[0], films[1])  # now it is two films, but too few patients for a fifth
    assert f"{data}: images of 2 patients of COVID; expected 5 or more" in genailab.refuse_data(data)


def test_corrupt_files_only(data: Path, genailab: Commands) -> None:
    for folder, says in (("train/COVID", "0 readable images of COVID in train"), ("", "none of 180 images")):
        for film in (data / folder).rglob("*.png"):  # one class, then all
            film.write_bytes(film.read_bytes()[:60])
        assert says in genailab.refuse_data(data)


def test_patients_on_both_sides_are_named(data: Path, genailab: Commands) -> None:
    own = next((data / "train" / "Normal").iterdir())
    shutil.copy(own, data / "test" / "Normal" / own.name.replace("virus", "bacteria"))
    line = genailab.refuse_data(data)
    assert f"the images of 1 patients ({own.name.split('_')[0]}) lie in several of its parts" in line


def test_other_folders_are_one_line(data: Path, tmp_path: Path, genailab: Commands) -> None:
    assert "no such folder" in genailab.refuse_data(tmp_path / "absent")
    assert "holds one class, Normal" in genailab.refuse_data(data / "train" / "Normal")
    for number, name in enumerate(CLASSES):
        shutil.copytree(data / "train" / name, tmp_path / "graded" / f"grade_{number}")
    assert "for grades there is `genailab train grader`" in genailab.refuse_data(tmp_path / "graded")
    shutil.rmtree(data / "train")
    assert "found only val/, test/; expected train/" in genailab.refuse_data(data)


def test_models_of_another_kind_are_one_line(chests: Path, tmp_path: Path, genailab: Commands) -> None:
    film = next((chests / "test" / "COVID").iterdir())
    genailab.train(chests, *QUICK)
    line = genailab.refuse("grade", genailab.output, film)
    assert "holds a model of the classes Normal, COVID, Tuberculosis" in line
    assert "this one is for `genailab classify`" in line
    tensors, recipe = load_checkpoint(genailab.output / "model.safetensors")
    bare = {name: value for name, value in recipe.items() if name != "thresholds"}
    save_checkpoint(tmp_path / "bare.safetensors", tensors, bare)
    assert "holds no thresholds" in genailab.refuse("classify", tmp_path / "bare.safetensors", film)

    for part, n in (("train", 4), ("val", 2)):
        for i in range(5 * n):
            grey = np.random.default_rng(i).integers(0, 256, (32, 32), dtype=np.uint8)
            path = tmp_path / "spines" / part / f"grade_{i % 5}" / f"case{len(part)}{i:02d}_0.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey).save(path)
    genailab.run("train", "grader", "--data", tmp_path / "spines", "--output", tmp_path / "grader", *QUICK)
    line = genailab.refuse("classify", tmp_path / "grader", film)
    assert "holds a model of the classes grade_0, grade_1" in line
    assert "this one is for `genailab grade`" in line
