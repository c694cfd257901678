"""Judging a model beside what needs no model, and the card that tells it, on films whose answer is known."""

import dataclasses
import hashlib
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset

from genailab_helpers.classification.losses import LOSSES
from genailab_helpers.classification.reports import judge, model_card
from genailab_helpers.classification.training import Classifier, Epoch, TrainingResult
from genailab_helpers.datasets.folders import RadiographFolder
from genailab_helpers.datasets.names import GRADES
from genailab_helpers.statistics import Interval

N_FILMS = {"train": (9, 6), "val": (4, 4), "test": (5, 7)}  # of the dark and of the bright class


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Noise, dark in one class and bright in the other; two films a person in test, strangers elsewhere."""
    folder, rng = tmp_path_factory.mktemp("a_secret_place") / "greys", np.random.default_rng(0)
    for part, counts in N_FILMS.items():
        for kind, (name, n) in enumerate(zip(("Dark", "Light"), counts, strict=True)):
            for i in range(n):
                stem = f"person{kind}{i // 2}_virus_{i}" if part == "test" else f"film_{i}"
                path = folder / part / name / f"{stem}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                film = 80 + 90 * kind + 20 * rng.standard_normal((32, 32)) + 10 * rng.standard_normal()
                Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def read(root, *names):
    folders = {name: RadiographFolder(root / name, 32) for name in names}
    return {name: Subset(films, range(len(films))) for name, films in folders.items()}


class Reads(nn.Module):
    """Two logits from the brightness of a film; right for `slope` > 0, wrong below."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, images):
        bright = self.slope * images.mean((1, 2, 3))
        return torch.stack([-bright, bright], 1)


def trained(slope, temperature=2.0):
    model = Classifier(Reads(slope), LOSSES["cross_entropy"](2), ["Dark", "Light"],
                       32, "small_cnn", temperature)
    return TrainingResult(model, [Epoch(1, 0.5), Epoch(1, 0.7), Epoch(1, 0.6)], 1, 30, 4.0)


HALF = {"Dark": 0.5, "Light": 0.5}
RECIPE = {"data": "greys", "classes": {"Dark": 9, "Light": 6}, "seed": 3}


def card_of(root, judged=None, slope=3.0, parts=("train", "val", "test")):
    result, films = trained(slope), read(root, *parts)
    if judged is None:
        judged = judge(result.model, films, HALF, seed=3)
    return model_card(result, films, judged, RECIPE, "Found so.", HALF, "the audit", "the verdict")


def test_a_model_that_is_right(root):
    judged = judge(trained(3.0).model, read(root, "train", "val", "test"), HALF, seed=3)
    assert str(judged).startswith("test: 12 images; ")
    assert judged.first == "balanced accuracy on test 1.000 [1.000, 1.000], n = 7, seeds 3"
    assert judged.scores["accuracy"] == Interval(1, 1, 1, 3 + 4, seeds=(3,))  # 5 and 7 images, two a patient
    for name in ("sensitivity Dark", "npv Light", "auroc Dark", "macro auroc"):
        assert judged.scores[name].value == 1
    for told in ("by chance: macro auroc 0.5, balanced accuracy 0.500",
                 "always Dark, the most common of train: accuracy 0.417",  # of train, not of test
                 "(logistic regression): balanced accuracy 1.000",  # brightness tells these classes
                 "the model's minus that: 0.000 "):
        assert told in str(judged)


def test_a_model_that_is_wrong_is_worse_than_grey_values(root):
    judged = judge(trained(-3.0).model, read(root, "train", "val", "test"), HALF)
    assert judged.scores["balanced accuracy"].value == 0
    assert "the model's minus that: -1.000 " in str(judged)


def test_each_class_is_judged_alone(root):
    """A model that calls every image light is right on those alone."""
    model = trained(3.0).model
    model.network.forward = lambda images: torch.tensor([[-1.0, 1.0]]).repeat(len(images), 1)
    said = str(judge(model, read(root, "train", "val", "test"), HALF))
    assert re.search(r"\nDark +0.000 .*\nLight +1.000 ", said.split("classified correctly")[1])


def test_probabilities_are_judged_with_the_temperature(root):
    result, films = trained(3.0, temperature=2.0), read(root, "train", "val", "test")
    judged = judge(result.model, films, HALF)
    logits = result.model.logits(torch.stack([image for image, _ in films["test"]]))
    # where every image is right, all gaps have one sign and the calibration error is 1 - mean confidence
    confidence = (logits / 2).softmax(1).max(1).values.mean().item()
    assert judged.scores["ece"].value == pytest.approx(1 - confidence, abs=1e-6)


def test_without_a_test_part_val_judges_and_says_so(root):
    judged = judge(trained(3.0).model, read(root, "train", "val"), HALF)
    assert judged.first.startswith("balanced accuracy on val")
    assert judged.scores["accuracy"].n == 8
    assert "which flatters the model" in str(judged)
    assert "which flatters the model" in card_of(root, parts=("train", "val"))
    assert "which flatters the model" not in card_of(root)


def test_grades_get_the_metrics_of_grades(root, tmp_path):
    for i in range(20):
        path = tmp_path / ("train", "val")[i // 10] / GRADES[i % 5] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), 40 + 40 * (i % 5)).save(path)

    class Rungs(Reads):
        def forward(self, images):
            steps = (40 + 40 * torch.arange(5)) / 127.5 - 1
            return -100 * (images.mean((1, 2, 3))[:, None] - steps) ** 2

    model = Classifier(Rungs(1.0), LOSSES["cross_entropy"](5), list(GRADES), 32, "small_cnn")
    films = read(tmp_path, "train", "val")
    judged = judge(model, films, {})
    assert judged.first.startswith("qwk on val 1.000")
    assert judged.scores["qwk"].value == 1
    assert list(judged.scores) == [
        "qwk", "accuracy", "balanced accuracy", "mae", "off by more than one", "nll", "ece"]
    result = trained(1.0)._replace(model=model)
    card = model_card(result, films, judged, RECIPE, "Found so.", {}, "the audit", "the verdict")
    assert "`genailab grade`" in card
    assert "| threshold of" not in card
    assert "PPV" not in card


def test_the_card_tells_the_run(root):
    card = card_of(root)
    hashes = [hashlib.sha256(film.read_bytes()).hexdigest() for film in (root / "test").rglob("*.png")]
    listed = hashlib.sha256("".join(f"{h}\n" for h in sorted(hashes)).encode()).hexdigest()
    for told in (f"| test | 12 | 7 | 5 | 7 | {listed} |", "| train | 15 | 15 | 9 | 6 | ",
                 "`greys`. Found so.", "Nothing tells the patient of 23 images",  # those of train and val
                 "**balanced accuracy on test 1.000 [1.000, 1.000], n = 7, seeds 3.** the verdict",
                 "| temperature | 2.000, fitted on val |", "| threshold of Dark | 0.500, chosen on val |",
                 "```text\nthe audit\n```", "3, of which number 2 was best on val",
                 "| classes | each drawn equally often |", "`genailab classify`"):
        assert told in card
    assert card.count("Not for diagnosis") == 1
    for private in ("a_secret_place", "person0", "film_"):
        assert private not in card


def test_withheld_scores_are_not_in_the_card(root):
    card = card_of(root, "No score is shown: the labels carry no signal.")
    assert "## Scores\n\nNo score is shown: the labels carry no signal." in card
    for score in ("accuracy", "auroc", "sensitivity"):
        assert score not in card


def test_a_card_runs_nothing_that_a_class_is_called(root):
    names = ["<img src=x onerror=alert(1)>", "[x](javascript:1)|`<b>`"]
    result = trained(1.0)
    result = result._replace(model=dataclasses.replace(result.model, classes=names))
    audit = "the audit of \n```\n<script>"
    card = model_card(result, read(root, "train", "val"), "not judged", RECIPE | {"data": "a|<b>"},
                      "Found so.", dict.fromkeys(names, 0.5), audit, "the verdict")
    outside = "".join(card.split("```")[::2])
    assert "<img" not in outside
    assert "<script" not in outside
    assert "<b>" not in outside
    assert not re.search(r"(?<!\\)\]\(javascript", outside)
    tables = [line for line in outside.splitlines() if line.startswith(("| part", "| train"))]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables}) == 1  # no column is added
