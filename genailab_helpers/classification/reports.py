"""What a trained model is worth, and a model card that says so beside what the model was made from."""

import hashlib
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from genailab_helpers.classification import metrics
from genailab_helpers.classification.metrics import Score, SubgroupTable
from genailab_helpers.classification.training import Classifier, TrainingResult
from genailab_helpers.datasets.folders import part_images
from genailab_helpers.datasets.names import GRADES


@dataclass(frozen=True)
class Judgement:
    """What `judge` found; `str()` gives the tables.

    Attributes
    ----------
    part : str
        "test", or "val" where there is no test.
    n_images : int
        How many images that part has.
    scores : dict of str to Score
        Everything of `metrics.class_metrics` or `grade_metrics`, by names that hold the class.
    headline : str
        The name of the score to look at first; `first` tells it.
    chance : str
        What guessing reaches.
    baselines : dict of str to dict
        Description of a baseline: metric: (its score, the model's minus it for the same patients).
    by_class, by_exposure : SubgroupTable
        Accuracy for the images of each class, and for the darkest, middle and brightest third of all.
    ece_before : Score
        Calibration error without temperature.
    """

    part: str
    n_images: int
    scores: dict[str, Score]
    headline: str
    chance: str
    baselines: dict[str, dict[str, tuple[Score, Score]]]
    by_class: SubgroupTable
    by_exposure: SubgroupTable
    ece_before: Score

    @property
    def first(self) -> str:
        """The headline: what was measured, on what, and how much it is."""
        return f"{self.headline} on {self.part} {self.scores[self.headline]}"

    def __str__(self) -> str:
        width = max(map(len, self.scores))
        lines = [f"{self.part}: {self.n_images} images; value [95 % interval over patients], n patients",
                 *(f"{name:{width}}  {score}" for name, score in self.scores.items()),
                 f"by chance: {self.chance}"]
        if any(score.low == score.high for score in self.scores.values()):
            lines.append("An interval without width means too few images for one, not certainty.")
        for what, rows in self.baselines.items():
            lines.append(f"\n{what}; difference: the model's score minus this one's"
                         + " (for mae, below 0 is better)" * ("mae" in rows))
            lines += [f"{name}  {score.value:.3f}  difference {gain}" for name, (score, gain) in rows.items()]
        lines += [f"\nfraction of each class classified correctly (most probable class):\n{self.by_class}",
                  f"\nfraction of dark, middle and bright images classified correctly:\n{self.by_exposure}"]
        if self.part == "val":
            lines.append("Epoch, temperature and any thresholds were chosen on these images, which flatters "
                         "the model; a folder test/ does not.")
        return "\n".join(lines)


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
    part, classes = "test" if "test" in parts else "val", model.classes
    graded = classes == list(GRADES)
    shown = part_images(parts[part])
    labels, patients = shown["label"].to_numpy(), shown["patient"].to_numpy(str)
    logits = model.logits(torch.stack([image for image, _ in parts[part]]))
    before, after = (model.loss.probabilities(z).numpy() for z in (logits, logits / model.temperature))
    decoded, grey = model.loss.decode(logits).numpy(), _grey_levels(parts[part])
    table = (metrics.grade_metrics(labels, {seed: decoded}, {seed: after}, patients) if graded else
             metrics.class_metrics(labels, {seed: after}, {seed: [thresholds[name] for name in classes]},
                                   patients))
    scores: dict[str, Score] = {}
    for name, value in vars(table).items():
        each = {"": value} if isinstance(value, Score) else dict(zip(classes, value, strict=False))
        scores |= {f"{name.replace('_', ' ')} {of}".strip(): score for of, score in each.items()}
    thirds = np.searchsorted(np.quantile(grey[:, 0], [1 / 3, 2 / 3]), grey[:, 0])
    right_in = partial(metrics.subgroups, metrics.accuracy, labels, {seed: decoded}, patients=patients)
    return Judgement(
        part, len(labels), scores, "qwk" if graded else "balanced accuracy",
        f"{'qwk 0' if graded else 'macro auroc 0.5'}, balanced accuracy {1 / len(classes):.3f}",
        {what: _beside(guess, labels, decoded, after, patients, graded, seed)
         for what, guess in _guesses(parts["train"], grey, classes).items()},
        right_in(np.array(classes)[labels]), right_in(np.array(["dark", "middle", "bright"])[thirds]),
        metrics.score(metrics.ece, labels, {seed: before}, patients))


def _guesses(train: Any, grey: np.ndarray, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Return what two simple models say of images with these grey levels, as probabilities (N, K)."""
    labels = part_images(train)["label"].to_numpy()
    common = int(np.bincount(labels).argmax())
    simple = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    simple.fit(_grey_levels(train), labels)
    return {f"always {classes[common]}, the most common of train": np.eye(len(classes))[[common] * len(grey)],
            "mean and deviation of the grey values alone (logistic regression)": simple.predict_proba(grey)}


def _beside(guess: np.ndarray, labels: np.ndarray, decoded: np.ndarray, probabilities: np.ndarray,
            patients: np.ndarray, graded: bool, seed: int) -> dict[str, tuple[Score, Score]]:
    """Score a baseline, and the model minus it, for each metric."""
    of_labels = [metrics.accuracy, metrics.balanced_accuracy, *[metrics.mae, metrics.qwk][:2 * graded]]
    compared: list[tuple[metrics.Metric, Any, Any]] = [(m, decoded, guess.argmax(1)) for m in of_labels]
    compared += [] if graded else [(metrics.macro_auroc, probabilities, guess)]
    return {metric.__name__.replace("_", " "): (
        metrics.score(metric, labels, {seed: theirs}, patients),
        metrics.difference(metric, labels, {seed: ours}, {seed: theirs}, patients))
        for metric, ours, theirs in compared}


def _grey_levels(part: Any) -> np.ndarray:
    """Return mean and standard deviation of each image (N, 2)."""
    return np.array([[image.mean().item(), image.std().item()] for image, _ in part])


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
                "seconds": round(result.seconds), "torch": torch.__version__}
    limits = ["Images of another hospital, age, view or device were not tried.",
              "Intervals are over patients; what another seed of the training would change is not in them."]
    if untold := sum((images["known"] == "own").sum() for images in tables.values()):
        limits.append(f"Nothing tells the patient of {untold} images, which count as one patient each: "
                      "several images of one person may be on both sides.")
    scores = [judged] if isinstance(judged, str) else [
        f"**{judged.first}.** {verdict}", f"```text\n{fenced[0]}\n```",
        f"Calibration: temperature {model.temperature:.3f}, fitted on val. Calibration error (ECE) on "
        f"{judged.part} before: {judged.ece_before}; after: {judged.scores['ece']}."]
    if thresholds:
        limits.append("PPV and NPV hold for the class frequencies of these images alone.")
        scores.append("Thresholds, chosen on val and frozen: "
                      + ", ".join(f"{_plain(name)} {value:.3f}" for name, value in thresholds.items()) + ".")
    return "\n\n".join([
        f"# Model card: {names}",
        f"{datetime.now(UTC).date().isoformat()}. **Not for diagnosis.**",
        "## What it is for",
        f"A `{model.backbone}` network that tells {names} apart, from one grey image of "
        f"{model.img_size}x{model.img_size} pixels. It is for learning how such models are made and judged, "
        "not for diagnosis, triage or any decision about a person. Use it with "
        f"`genailab {'grade' if model.classes == list(GRADES) else 'classify'}`.",
        "## Data", f"`{_plain(recipe['data'])}`. {split} No known patient is in two parts.",
        _table(["part", "images", "patients", *model.classes, "SHA-256"], counts),
        "A hash is that of the sorted SHA-256 sums of the files of a part, one a line.",
        "## Training", _table(["argument", "value"], training.items()),
        "## Scores", *scores,
        "## Shortcut audit", f"```text\n{fenced[1]}\n```", verdict,
        "## Limits", "\n".join(f"- {limit}" for limit in limits)]) + "\n"


def _table(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(_plain, row))} |" for row in [header, ["---"] * len(header), *rows])


def _plain(text: object) -> str:
    """Return a text that Markdown and HTML show as it is, whatever a class or a folder is called."""
    return re.sub(r"([\\`\[\]|])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _hash(paths: Iterable[str]) -> str:
    sums = sorted(hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths)
    return hashlib.sha256("".join(f"{line}\n" for line in sums).encode()).hexdigest()
