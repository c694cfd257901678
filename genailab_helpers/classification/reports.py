"""What a trained model is worth, and a model card that says so beside what the model was made from."""

import hashlib
import html
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from genailab_helpers.classification import metrics
from genailab_helpers.classification.training import Classifier, TrainingResult
from genailab_helpers.datasets.folders import part_images
from genailab_helpers.datasets.names import GRADES
from genailab_helpers.statistics import Interval


class Judgement(NamedTuple):
    """What `judge` found; `str()` gives the tables.

    Attributes
    ----------
    first : str
        The score to look at first: what was measured, on what, and how much it is.
    scores : dict of str to Interval
        By names that hold the class.
    text : str
        All scores beside chance and two baselines, and the accuracy for the images of each class.
    """

    first: str
    scores: dict[str, Interval]
    text: str

    def __str__(self) -> str:
        return self.text


def judge(model: Classifier, parts: Mapping[str, Any], thresholds: Mapping[str, float],
          seed: int = 0) -> Judgement:
    """Measure a model on test, or else on val, beside chance and two baselines.

    Parameters
    ----------
    model : Classifier
        Trained on `parts["train"]`.
    parts : mapping of str to Subset
        "train", "val" and, where there is one, "test": Subsets of a RadiographFolder.
    thresholds : mapping of str to float
        Of each class, chosen on val; not looked at for a model of grades.
    seed : int, default 0
        The seed of the training, which the scores name.

    Returns
    -------
    Judgement
        The baselines are the most common class of train, and a logistic regression, fitted on train, on the
        mean and standard deviation of the grey values of an image.
    """
    part, graded = "test" if "test" in parts else "val", model.classes == list(GRADES)
    shown = part_images(parts[part])
    labels, patients = shown["label"].to_numpy(), shown["patient"].to_numpy(str)
    said = model.predict(torch.stack([image for image, _ in parts[part]]))
    decided, probabilities = {seed: said.decoded.numpy()}, {seed: said.probabilities.numpy()}
    if graded:
        of_grades = (metrics.qwk, metrics.accuracy, metrics.balanced_accuracy, metrics.mae,
                     metrics.off_by_more_than_one)
        found = {m.__name__: metrics.score(m, labels, decided, patients) for m in of_grades}
        found |= {m.__name__: metrics.score(m, labels, probabilities, patients)
                  for m in (metrics.nll, metrics.ece)}
    else:
        chosen = {seed: [thresholds[name] for name in model.classes]}
        found = vars(metrics.class_metrics(labels, probabilities, chosen, patients))
    scores: dict[str, Interval] = {}
    for name, value in found.items():
        each = {"": value} if isinstance(value, Interval) else dict(zip(model.classes, value, strict=True))
        scores |= {f"{name.replace('_', ' ')} {of}".strip(): score for of, score in each.items()}
    train, names = part_images(parts["train"])["label"].to_numpy(), np.array(model.classes)
    common, of_grey = np.bincount(train).argmax(), LogisticRegression(class_weight="balanced")
    guess = {seed: of_grey.fit(_grey_levels(parts["train"]), train).predict(_grey_levels(parts[part]))}
    headline, metric = ("qwk", metrics.qwk) if graded else ("balanced accuracy", metrics.balanced_accuracy)
    of_class = metrics.subgroups(metrics.accuracy, labels, decided, names[labels], patients).scores
    lines = [
        f"{part}: {len(labels)} images; value [95 % interval over patients], n patients", *_aligned(scores),
        f"by chance: {'qwk 0' if graded else 'macro auroc 0.5'}, balanced accuracy {1 / len(names):.3f}",
        f"always {names[common]}, the most common of train: accuracy {np.mean(labels == common):.3f}",
        "mean and deviation of the grey values alone (logistic regression): "
        f"{headline} {metrics.score(metric, labels, guess, patients).value:.3f}",
        f"the model's minus that: {metrics.difference(metric, labels, decided, guess, patients)}",
        "\nfraction of each class classified correctly (most probable class):", *_aligned(of_class)]
    if part == "val":
        lines.append("Epoch, temperature and any thresholds were chosen on these images, which flatters the "
                     "model; a folder test/ does not.")
    return Judgement(f"{headline} on {part} {scores[headline]}", scores, "\n".join(lines))


def _grey_levels(part: Any) -> np.ndarray:
    """Return mean and standard deviation of each image (N, 2)."""
    return np.array([[image.mean().item(), image.std().item()] for image, _ in part])


def _aligned(scores: Mapping[str, Interval]) -> list[str]:
    return [f"{name:{max(map(len, scores))}}  {score}" for name, score in scores.items()]


def model_card(result: TrainingResult, parts: Mapping[str, Any], judged: Judgement | str,
               recipe: Mapping[str, Any], split: str, thresholds: Mapping[str, float], audit: str,
               verdict: str) -> str:
    """Write what a user of a model has to know, as Markdown.

    Parameters
    ----------
    result : TrainingResult
        From `train_classifier`.
    parts : mapping of str to Subset
        As for `judge`. Their images are read once more, for their hashes.
    judged : Judgement or str
        From `judge`; or why no score is shown.
    recipe : mapping of str to str or number
        Arguments of the training; `data` is the name of the data set, not its place on this machine.
    split : str
        A sentence: how train, val and test came about.
    thresholds : mapping of str to float
        Of each class; empty for a model of grades.
    audit, verdict : str
        Text of the shortcut audit, and what follows for the scores.

    Returns
    -------
    str
        The card. It names no patient.

    Notes
    -----
    The sections follow Mitchell et al., Model cards for model reporting, FAT* 2019. The hash of a part is
    that of the sorted SHA-256 sums of its files: `sha256sum FILES | cut -c1-64 | sort | sha256sum`.
    """
    model, names = result.model, _plain(", ".join(result.model.classes))
    fenced = [text.replace("```", "~~~") for text in (str(judged), audit)]
    tables = {name: part_images(part) for name, part in parts.items()}
    counts = [[name, len(images), images["patient"].nunique(),
              *np.bincount(images["label"], minlength=len(model.classes)), _hash(images["path"])]
             for name, images in tables.items()]
    shifted = ", probabilities shifted to the proportions of train" * any(model.logit_shift)
    training = {**recipe, "classes": "each drawn equally often" + shifted, "steps": result.steps,
                "epochs": f"{len(result.history)}, of which number {result.best_epoch + 1} was best on val",
                "temperature": f"{model.temperature:.3f}, fitted on val",
                **{f"threshold of {name}": f"{at:.3f}, chosen on val" for name, at in thresholds.items()},
                "seconds": round(result.seconds), "torch": torch.__version__}
    limits = ["Images of another hospital, age, view or device were not tried.",
              "Intervals are over patients; what another seed of the training would change is not in them."]
    if untold := sum((images["known"] == "own").sum() for images in tables.values()):
        limits.append(f"Nothing tells the patient of {untold} images, which count as one patient each: "
                      "several images of one person may be on both sides.")
    if thresholds:
        limits.append("PPV and NPV hold for the class frequencies of these images alone.")
    scores = judged if isinstance(judged, str) else (
        f"**{judged.first}.** {verdict}\n\n```text\n{fenced[0]}\n```")
    return "\n\n".join([
        f"# Model card: {names}",
        f"{datetime.now(UTC).date().isoformat()}. **Not for diagnosis.**",
        "## What it is for",
        f"A `{model.backbone}` network that tells {names} apart, from one grey image of "
        f"{model.img_size}x{model.img_size} pixels. It is for learning how such models are made and judged, "
        "not for diagnosis, triage or any decision about a person. Use it with "
        f"`genailab {'grade' if model.classes == list(GRADES) else 'classify'}`.",
        "## Data", f"`{_plain(recipe['data'])}`. {split} No known patient is in two parts.",
        _table(["part", "images", "patients", *model.classes, "SHA-256 of the files' sorted sums"], counts),
        "## Training", _table(["argument", "value"], training.items()),
        "## Scores", scores,
        "## Shortcut audit", f"```text\n{fenced[1]}\n```", verdict,
        "## Limits", "\n".join(f"- {limit}" for limit in limits)]) + "\n"


def _table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(_plain, row))} |" for row in [header, ["---"] * len(header), *rows])


def _plain(text: object) -> str:
    """Return a text that Markdown and HTML show as it is, whatever a class or a folder is called."""
    return re.sub(r"([\\`\[\]|])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _hash(paths: Iterable[str]) -> str:
    sums = sorted(hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths)
    return hashlib.sha256("".join(f"{line}\n" for line in sums).encode()).hexdigest()
