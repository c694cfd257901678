"""`genailab train grader|classifier`, `grade`, `classify`: runs end to end, and one line for bad input."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genailab_helpers.checkpoints import load_checkpoint, save_checkpoint
from genailab_helpers.datasets.names import GRADES

pytestmark = pytest.mark.usefixtures("own_cache")

FINDINGS = ("Normal", "COVID", "Tuberculosis")  # in the order of the labels
CLASSES = {"grader": GRADES, "classifier": FINDINGS}
QUICK = ("--backbone", "small_cnn", "--img-size", 32, "--n-epochs", 1)
LONGER = (*QUICK[:-1], 50)
PARTS = ("train", "val", "test")
KINDS = pytest.mark.parametrize("kind", CLASSES)


def write_images(root: Path, kind: str, n_images: dict[str, int], shortcut: bool = False,
                 learnable: bool = True) -> Path:
    """Write noise with a square, brighter by grade, or bars by class; or any of them, with a frame.

    Names are as in public sets: a person and a side or a visit.
    """
    rng, classes = np.random.default_rng(0), CLASSES[kind]
    for part, n in n_images.items():
        for i in range(n * len(classes)):
            image = 60 + 12 * rng.standard_normal((32, 32))
            shown = i % len(classes) if learnable and not shortcut else int(rng.integers(len(classes)))
            height, width = ((4, 16), (16, 4), (8, 8))[shown] if kind == "classifier" else (16, 16)
            bright = 80 if kind == "classifier" else 35 * shown  # equally large: brightness tells no class
            image[16 - height // 2:16 + height // 2, 16 - width // 2:16 + width // 2] += bright
            image[:2] += 50 * (i % 3) * shortcut
            number = f"{len(part)}{i:03d}"
            name = f"person{number}_virus_{i}" if kind == "classifier" else f"900{number}L"
            path = root / part / classes[i % len(classes)] / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give a folder with train, val and test of each kind."""
    n_images = {"grader": (12, 4, 8), "classifier": (40, 10, 10)}
    return {kind: write_images(tmp_path_factory.mktemp(kind), kind, dict(zip(PARTS, n, strict=True)))
            for kind, n in n_images.items()}


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], genailab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give a quick run of each kind."""
    outputs = {kind: tmp_path_factory.mktemp("runs") / kind for kind in CLASSES}
    for kind, output in outputs.items():
        genailab.run("train", kind, "--data", folders[kind], "--output", output, *QUICK)
    return outputs


@pytest.fixture
def refuse(genailab, tmp_path: Path):
    """Give the function that trains with what must be refused before anything is written."""
    def call(kind: str, data: Path, *options: object) -> str:
        output = tmp_path / "run"
        line = genailab.refuse("train", kind, "--data", data, "--output", output, *(options or QUICK))
        assert not output.exists()
        return line
    return call


def copy(source: Path, target: Path, parts: Sequence[str] = PARTS) -> Path:
    for part in parts:
        shutil.copytree(source / part, target / part)
    return target


def score_of(name: str, said: str) -> tuple[float, float, float, int]:
    found = re.search(rf"^{name} +(\S+) \[(\S+), (\S+)\], n = (\d+), seeds 0$", said, re.MULTILINE)
    assert found, said
    return float(found[1]), float(found[2]), float(found[3]), int(found[4])


@pytest.mark.parametrize(("kind", "metric", "least", "by_chance"), [
    ("grader", "qwk", 0.7, "qwk 0, balanced accuracy 0.200"),
    ("classifier", "balanced accuracy", 0.8, "macro auroc 0.5, balanced accuracy 0.333")])
def test_a_run_from_images_to_answers(kind: str, metric: str, least: float, by_chance: str, genailab,
                                      folders: dict[str, Path], tmp_path: Path) -> None:
    data, output, classes = folders[kind], tmp_path / "run", CLASSES[kind]
    said = genailab.run("train", kind, "--data", data, "--output", output, *LONGER)
    n = {part: len(list((data / part).glob("*/*.png"))) for part in PARTS}
    assert ", ".join(f"{part} {count} images" for part, count in n.items()) in said
    assert "The labels carry signal" in said
    value, low, high, judged = score_of(metric, said)
    assert low <= value <= high
    assert value > least
    assert judged == n["test"]
    assert "chosen on these" not in said
    assert f"the most common of train: accuracy {1 / len(classes):.3f}" in said
    gain = re.search(r"^the model's minus that: (\S+) \[(\S+), ", said, re.MULTILINE)
    assert gain
    assert float(gain[1]) > (0.3 if kind == "classifier" else 0)  # brightness tells no class, but grades
    assert f"by chance: {by_chance}" in said
    assert said.index("besides the anatomy?") < said.index(" epochs, ")
    verdict, card = said.split("HEADLINE: ")[1], (output / "model_card.md").read_text()
    assert verdict.startswith(f"{metric} on test {value:.2f}")
    assert "DOES NOT SHOW" not in verdict
    assert "Not for diagnosis" in said
    assert f"{metric} on test {value:.2f}" in card
    assert str(data) not in card
    recipe = load_checkpoint(output / "model.safetensors").recipe
    assert str(data) not in json.dumps(recipe)  # a model that travels names no folder of this machine
    assert sorted(path.name for path in output.iterdir()) == [
        "model.safetensors", "model_card.md", "recipe.json"]
    assert json.loads((output / "recipe.json").read_text())["data"] == str(data)

    images = [sorted((data / "test" / name).iterdir())[0] for name in classes]
    command = "grade" if kind == "grader" else "classify"
    lines = genailab.run(command, output, *images).splitlines()
    assert lines[-1].startswith("Not for diagnosis")
    assert genailab.run(command, output / "model.safetensors", images[0]).splitlines()[0] == lines[0]
    found = [[float(p) for p in re.findall(r" (\d\.\d\d)[,)]", line)] for line in lines[:len(classes)]]
    assert [sum(p) for p in found] == pytest.approx([1] * len(classes), abs=0.03)
    if kind == "grader":
        grades = [int(re.search(r": grade (\d)", line)[1]) for line in lines[:5]]  # type: ignore[index]
        assert sum(abs(grade - truth) for truth, grade in enumerate(grades)) <= 2
        assert "grade 4 Severe" in lines[4]
        return
    for metric in ("auroc", "sensitivity", "specificity", "ppv", "npv"):
        assert all(score_of(f"{metric} {name}", said) for name in classes)
    thresholds = recipe["thresholds"]
    for line, image, probabilities in zip(lines, images, found, strict=False):
        assert line.startswith(f"{image}: {image.parent.name} (")
        reached = line.split("threshold reached: ")[1].split(", ")
        for name, p in zip(classes, probabilities, strict=True):
            if abs(p - thresholds[name]) > 0.005:  # what is printed is rounded
                assert (name in reached) == (p > thresholds[name])


def test_a_folder_of_a_run_is_refused(genailab, folders: dict[str, Path], runs: dict[str, Path]) -> None:
    before = {path: path.read_bytes() for path in runs["grader"].iterdir()}
    for kind in CLASSES:
        line = genailab.refuse("train", kind, "--data", folders[kind], "--output", runs["grader"], *QUICK)
        assert f"{runs['grader']}: expected a new or empty folder" in line
    assert {path: path.read_bytes() for path in runs["grader"].iterdir()} == before


def test_thresholds_are_those_of_val(genailab, folders: dict[str, Path], runs: dict[str, Path],
                                     tmp_path: Path) -> None:
    data, output = copy(folders["classifier"], tmp_path / "data", ("train", "val")), tmp_path / "run"
    said = genailab.run("train", "classifier", "--data", data, "--output", output, *QUICK)
    with_test, without = (load_checkpoint(run / "model.safetensors").recipe["thresholds"]
                          for run in (runs["classifier"], output))
    assert with_test == without
    assert score_of("accuracy", said)[3] == 30
    assert "chosen on these" in said


def test_a_shortcut_is_named_beside_the_headline(tmp_path: Path, genailab) -> None:
    data = write_images(tmp_path / "data", "classifier", {"train": 20, "val": 8, "test": 8}, shortcut=True)
    said = genailab.run("train", "classifier", "--data", data, "--output", tmp_path / "run", *QUICK)
    assert re.search(r"^2-pixel frame .* YES$", said, re.MULTILINE)
    verdict = " ".join(said.split("HEADLINE: ")[1].split())
    assert "can be told from 2-pixel frame" in verdict
    assert "a good score does not show that it sees the disease" in verdict
    frame = re.search(r"^2-pixel frame +\S+ \[\S+ \S+ +(\S+)", said, re.MULTILINE)
    alone = re.search(r"balanced accuracy ([\d.]+), chance 0\.333\)", verdict)
    assert frame
    assert alone
    assert float(alone[1]) >= float(frame[1]) > 0.9
    card = (tmp_path / "run" / "model_card.md").read_text()
    headline = next(line for line in card.splitlines() if line.startswith("**balanced accuracy on test"))
    assert "a good score does not show" in headline


@pytest.mark.parametrize(("kind", "n_images", "says"), [
    ("classifier", {"train": 130, "val": 26}, "The labels carry no signal"),  # few show nothing
    ("grader", {"train": 2, "val": 1}, "whether the labels can be learned is unknown")])
def test_no_score_is_shown(kind: str, n_images: dict[str, int], says: str, tmp_path: Path, genailab) -> None:
    data = write_images(tmp_path / "data", kind, n_images, learnable=False)
    for image in data.glob("*/*/*.png") if kind == "grader" else ():  # a person a grade, one with all in val
        person = image.parent.name[-1] if image.parts[-3] == "train" else 9
        image.rename(image.with_name(f"person{person}_bacteria_{image.stem[1:-1]}.png"))
    said = genailab.run("train", kind, "--data", data, "--output", tmp_path / "run", *QUICK)
    assert says in said
    for text in (said, (tmp_path / "run" / "model_card.md").read_text()):
        assert "No score is shown" in text
        assert not re.search("auroc|qwk|HEADLINE|Calibration", text)


def test_where_a_signal_was_not_shown_the_score_says_so(tmp_path: Path, genailab) -> None:
    data = write_images(tmp_path / "data", "grader", {"train": 12, "val": 4}, learnable=False)
    said = genailab.run("train", "grader", "--data", data, "--output", tmp_path / "run", *QUICK)
    assert "The labels were not shown to carry signal, nor to carry none" in " ".join(said.split())
    verdict = "THAT THE LABELS CAN BE LEARNED AT ALL WAS NOT SHOWN"
    assert verdict in " ".join(said.split("HEADLINE: ")[1].split())
    assert verdict in (tmp_path / "run" / "model_card.md").read_text()


@KINDS
def test_a_folder_without_parts_gives_a_fifth_of_its_patients_to_val(
        kind: str, folders: dict[str, Path], tmp_path: Path, genailab) -> None:
    images = list((folders[kind] / "train").glob("*/*.png"))
    for image in images:  # two images of each person
        for name in ((image.name.replace("L.", "R."), image.name) if kind == "grader" else
                     (image.name.replace("virus_", "virus_9"), image.name.replace("virus_", "virus_8"))):
            target = tmp_path / "data" / image.parent.name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, target)
    said = genailab.run("train", kind, "--data", tmp_path / "data", "--output", tmp_path / "run", *QUICK)
    found = re.search(r"^train (\d+) images, val (\d+) images$", said, re.MULTILINE)
    assert found
    assert (int(found[1]), int(found[2])) == (1.6 * len(images), 0.4 * len(images))
    assert f"n = {len(images) // 5}, seeds 0" in said  # patients, not images
    assert "chosen on these" in said
    assert "a fifth of the patients of train" in (tmp_path / "run" / "model_card.md").read_text()


def test_a_table_of_bare_names_keeps_patients_whole(tmp_path: Path, genailab) -> None:
    data, lines = tmp_path / "data", ["Image Index,Patient ID"]
    for i, image in enumerate(sorted(write_images(tmp_path / "raw", "classifier", {"": 20}).rglob("*.png"))):
        target = data / image.parent.name / f"scan{i:03d}.png"  # a name that tells no patient
        target.parent.mkdir(parents=True, exist_ok=True)
        image.rename(target)
        lines.append(f"{target.name},{i // 2}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    genailab.run("train", "classifier", "--data", data, "--table", tmp_path / "table.csv",
                 "--output", tmp_path / "run", *QUICK)
    card = (tmp_path / "run" / "model_card.md").read_text()
    n_patients = [int(n) for n in re.findall(r"^\| (?:train|val) \| \d+ \| (\d+) \|", card, re.MULTILINE)]
    assert len(n_patients) == 2
    assert sum(n_patients) == 30  # of 60 images; one on both sides would be counted twice


# ------------------------------------------------------------------------------------------------ bad input

def keep(folder: Path, n_images: int) -> None:
    for image in sorted(folder.iterdir())[n_images:]:
        image.unlink()


def corrupt(folder: Path) -> None:
    for image in folder.rglob("*.png"):
        image.write_bytes(image.read_bytes()[:60])


@pytest.mark.parametrize(("kind", "spoil", "says"), [
    ("grader", lambda data: corrupt(data / "train/grade_1"), "0 readable images of grade_1 in train"),
    ("grader", lambda data: keep(data / "train/grade_1", 1), "1 readable images of grade_1 in train"),
    ("classifier", lambda data: shutil.rmtree(data / "train/COVID"), "0 readable images of COVID in train"),
    ("classifier", lambda data: shutil.copytree(data / "test/COVID", data / "test/Silicosis"),
     "0 readable images of Silicosis in train"),
    ("classifier", lambda data: shutil.rmtree(data / "test/Tuberculosis"),
     "0 readable images of Tuberculosis in test"),
    ("classifier", lambda data: (shutil.rmtree(data / "val"), keep(data / "train/COVID", 2)),
     "images of 2 patients of COVID; expected 5 or more"),
    ("grader", lambda data: (shutil.rmtree(data / "val"), keep(data / "train/grade_4", 1)),
     "1 readable images of grade_4 in train"),
    ("grader", lambda data: shutil.copy(data / "train/grade_0/9005000L.png",
                                        data / "test/grade_0/9005000R.png"),
     "the images of 1 patients (9005000) lie in several of its parts"),
    ("grader", lambda data: shutil.rmtree(data / "train"), "found only val/, test/; expected train/"),
    ("grader", shutil.rmtree, "no such folder"),
])
def test_a_faulty_folder_is_one_line(kind: str, spoil: Callable[[Path], object], says: str, tmp_path: Path,
                                     folders: dict[str, Path], refuse) -> None:
    data = copy(folders[kind], tmp_path / "data")
    spoil(data)
    assert f"{data}: {says}" in refuse(kind, data)


def test_colour_photographs(folders: dict[str, Path], tmp_path: Path, genailab, refuse) -> None:
    data = copy(folders["classifier"], tmp_path / "data")
    images = sorted((data / "train").glob("*/*.png"))
    rng = np.random.default_rng(0)
    for image in images:  # as from an old scanner: brownish, but grey
        grey = np.asarray(Image.open(image), dtype=float)
        Image.fromarray((grey[..., None] * [1.0, 0.9, 0.7]).astype(np.uint8)).save(image)
    genailab.run("train", "classifier", "--data", data, "--output", tmp_path / "brown", *QUICK)
    across, down = np.meshgrid(np.linspace(0, 1, 32), np.linspace(0, 1, 32))
    colours = 255 * np.stack([across, down, 1 - (across + down) / 2], 2)
    for image in images:
        Image.fromarray((colours * rng.uniform(0.6, 1)).astype(np.uint8)).save(image)
    line = refuse("classifier", data)
    assert f"{data}: 60 of 90 images looked at are in colour (channels differ by" in line
    assert "expected radiographs, which are grey" in line


def test_other_bad_input_is_one_line(folders: dict[str, Path], tmp_path: Path, refuse) -> None:
    broken = copy(folders["classifier"], tmp_path / "broken", ["train"])
    corrupt(broken)
    assert "none of 120 images" in refuse("classifier", broken)
    graded, chests = folders["grader"], folders["classifier"]
    assert "holds the classes Normal, COVID, Tuberculosis; expected folders grade_0 to grade_4" in refuse(
        "grader", chests)
    assert "for grades there is `genailab train grader`" in refuse("classifier", graded)
    assert "The images are of one class, Normal, in ." in refuse("classifier", chests / "train" / "Normal")
    assert "expected one of cross_entropy" in refuse("grader", graded, "--loss", "mse")
    assert "backbone='resnet': expected small_cnn" in refuse("grader", graded, "--backbone", "resnet")


def test_models_and_images_of_another_kind_are_one_line(
        folders: dict[str, Path], runs: dict[str, Path], tmp_path: Path, genailab) -> None:
    image = next((folders["grader"] / "val" / "grade_0").iterdir())
    denoiser, broken = tmp_path / "denoiser.safetensors", tmp_path / "b.png"
    save_checkpoint(denoiser, {}, {"img_size": 64, "network": {}})
    broken.write_bytes(image.read_bytes()[:60])
    for says, *words in (
            ("holds no classifier", "grade", denoiser, image),
            ("no model; expected a folder", "grade", tmp_path / "absent.safetensors", image),
            ("no model; expected a folder", "grade", image, image),
            ("b.png", "grade", runs["grader"], image, broken),
            ("this one is for `genailab classify`", "grade", runs["classifier"], image),
            ("holds a model of the classes Normal, COVID, Tuberculosis", "grade", runs["classifier"], image),
            ("this one is for `genailab grade`", "classify", runs["grader"], image)):
        assert says in genailab.refuse(*words)
