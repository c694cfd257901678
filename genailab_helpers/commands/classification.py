"""`genailab train grader|classifier`, `grade`, `classify`. What a command needs is imported inside it.

Grades and classes go the same way: read the parts, audit them, train, judge, write model and model card.
"""

import json
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option, echo

from genailab_helpers.commands.options import MODEL, RECIPE, Minutes, Output, Pattern, Seed, Table, complain

if TYPE_CHECKING:
    import pandas as pd

CARD = "model_card.md"
DEFAULT_EPOCHS = 15
NOT_FOR_DIAGNOSIS = "Not for diagnosis: a model of a lesson, tested on no patient of yours."

_Grades = Annotated[Path, Option(help="Folder of grade_0 to grade_4, or of train/, val/ and test/.")]
_Classes = Annotated[Path, Option(help="Two or more class folders, or train/, val/ and test/ of them.")]
_Loss = Annotated[str, Option(help="cross_entropy, soft_labels, squared_emd, qwk, coral or corn.")]
_Backbone = Annotated[str, Option(
    help="small_cnn, local_cnn, efficientnet_lite0, frozen_lite0, or a torchvision model such as resnet18.")]
_Size = Annotated[int, Option(help="Side of the images in pixels, at least 32.")]
_Epochs = Annotated[int | None, Option(min=1, help=f"{DEFAULT_EPOCHS} without --minutes.")]
_Flip = Annotated[bool, Option("--flip", help="Mirror images in training: for knees only.")]
_Model = Annotated[Path, Argument(metavar="MODEL", help="Folder or model that `genailab train` wrote.")]
_Files = Annotated[list[Path], Argument(metavar="FILE...", help="Radiographs.")]


def train_grader(data: _Grades, output: Output = Path("build/grader"), loss: _Loss = "soft_labels",
                 backbone: _Backbone = "efficientnet_lite0", img_size: _Size = 224, n_epochs: _Epochs = None,
                 minutes: Minutes = None, flip: _Flip = False, seed: Seed = 0, table: Table = None,
                 patient_pattern: Pattern = None) -> None:
    """Train a grader and say how good it is. Not for diagnosis."""
    _train(graded=True, **locals())


def train_classes(data: _Classes, output: Output = Path("build/classifier"),
                  backbone: _Backbone = "efficientnet_lite0", img_size: _Size = 224, n_epochs: _Epochs = None,
                  minutes: Minutes = None, seed: Seed = 0, table: Table = None,
                  patient_pattern: Pattern = None) -> None:
    """Train a classifier and say how good it is. Not for diagnosis."""
    _train(graded=False, loss="cross_entropy", flip=False, **locals())


def _train(graded: bool, data: Path, output: Path, table: Path | None, patient_pattern: str | None,
           **settings: Any) -> None:
    from genailab_helpers.checkpoints import whole_folder
    from genailab_helpers.classification.losses import LOSSES
    from genailab_helpers.classification.networks import build_backbone
    from genailab_helpers.classification.training import Augmentation, train_classifier
    from genailab_helpers.datasets import folders, index

    if settings["img_size"] < 32:
        raise ValueError(f"--img-size {settings['img_size']}: expected at least 32")
    if settings["loss"] not in LOSSES:
        raise ValueError(f"--loss {settings['loss']}: expected one of {', '.join(LOSSES)}")
    build_backbone(settings["backbone"], 2)  # refuse a name, or fetch weights, before anything is read
    if settings["n_epochs"] is None and settings["minutes"] is None:
        settings["n_epochs"] = DEFAULT_EPOCHS
    images = index.index_images(data, table, patient_pattern, graded)
    parts, split = folders.read_parts(images, settings["img_size"], settings["seed"], graded)
    classes, labels = images.attrs["classes"], folders.part_images(parts["train"])["label"].tolist()
    recipe = {"data": str(data), **settings,
              "classes": {name: labels.count(label) for label, name in enumerate(classes)}}
    with whole_folder(output) as folder:
        echo(", ".join(f"{name} {len(part)} images" for name, part in parts.items())
             + "\n\nBefore any training: what tells the classes apart besides the anatomy?")
        audit, verdict, withheld = _examine(images)
        echo(audit)
        chosen = {name: settings[name] for name in ("loss", "backbone", "n_epochs", "minutes", "seed")}
        result = train_classifier(parts["train"], parts["val"], classes=classes,
                                  augmentation=Augmentation(flip=settings["flip"]), **chosen)
        (folder / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        told = recipe | {"data": data.resolve().name}  # a model that travels names no folder of this machine
        _judge(folder, graded, result, parts, split, told, audit, verdict, withheld)
    echo(f"Not for diagnosis. All of this stands in {output / CARD}. Use the model with: "
         f"genailab {'grade' if graded else 'classify'} {output} FILE...")


def _judge(folder: Path, graded: bool, result: Any, parts: dict[str, Any], split: str, recipe: dict[str, Any],
           audit: str, verdict: str, withheld: str) -> None:
    """Choose thresholds on val, say how good the model is, and write it with its card."""
    import torch

    from genailab_helpers.classification import metrics, reports, training
    from genailab_helpers.datasets import folders

    thresholds: dict[str, float] = {}
    if not graded:
        truth = folders.part_images(parts["val"])["label"].to_numpy()
        found = result.model.predict(torch.stack([image for image, _ in parts["val"]])).probabilities
        thresholds = {name: metrics.choose_threshold(truth == k, found[:, k])
                      for k, name in enumerate(result.model.classes)}
    if bit_depth := parts["train"].dataset.bit_depth:
        recipe["bit_depth"] = bit_depth
    training.save_classifier(folder / MODEL, result.model, run=recipe, thresholds=thresholds)
    echo(f"{result.steps} steps in {len(result.history)} epochs, {result.seconds:.0f} s; "
         f"the model is that of epoch {result.best_epoch + 1}, the best on val")
    judgement = None if withheld else reports.judge(result.model, parts, thresholds, recipe["seed"])
    echo(f"\n{judgement}\n\n" + textwrap.fill(f"HEADLINE: {judgement.first}. {verdict}", 100)
         if judgement else withheld)
    card = reports.model_card(result, parts, judgement or withheld, recipe, split, thresholds, audit, verdict)
    (folder / CARD).write_text(card, encoding="utf-8")


def _examine(images: "pd.DataFrame") -> tuple[str, str, str]:
    """Return what the audit says, what that means for scores, and why none is shown or ""."""
    from genailab_helpers.datasets import shortcuts

    with warnings.catch_warnings(action="ignore"):  # of images that cannot be read, which was said already
        try:
            report, signal = shortcuts.audit_shortcuts(images), shortcuts.label_signal(images)
        except ValueError as error:  # too few patients
            reason = str(error).removeprefix(f"{images.attrs['root']}: ")
            return (f"Shortcuts and label signal: not looked for ({reason}).",
                    "Whether shortcuts give the classes away is not known.",
                    f"No score is shown: whether the labels can be learned is unknown ({reason}).")
    verdict, withheld = report.verdict, ""
    if report.flagged:
        reached = max(row.balanced for row in report.rows if row.flagged)
        verdict += (f" From that alone a tiny model reaches balanced accuracy {reached:.3f} (chance "
                    f"{1 / len(report.classes):.3f}), SO A GOOD SCORE DOES NOT SHOW THAT THE MODEL SEES THE "
                    "DISEASE.")
    if signal.absent:
        withheld = ("No score is shown: what looks better than chance here is chance. Check who labelled the "
                    "images, and whether files were mixed up.")
    elif not signal.signal:
        verdict += " THAT THE LABELS CAN BE LEARNED AT ALL WAS NOT SHOWN: there are too few patients to tell."
    return f"{report}\n{signal}", verdict, withheld


def grade(model: _Model, files: _Files) -> None:
    """Grade radiographs: grade and probabilities. Not for diagnosis."""
    from genailab_helpers.datasets.names import GRADE_NAMES

    def tell(found: dict[str, float], decoded: int, _thresholds: dict[str, float]) -> str:
        each = ", ".join(f"{name} {p:.2f}" for name, p in zip(GRADE_NAMES, found.values(), strict=True))
        return f"grade {decoded} {GRADE_NAMES[decoded]} ({each})"

    _predict(model, files, True, tell)


def classify(model: _Model, files: _Files) -> None:
    """Classify radiographs: class, probabilities, thresholds reached. Not for diagnosis."""
    def tell(found: dict[str, float], decoded: int, thresholds: dict[str, float]) -> str:
        each = ", ".join(f"{name} {p:.2f}" for name, p in found.items())
        reached = ", ".join(name for name, p in found.items() if p >= thresholds[name]) or "none"
        return f"{list(found)[decoded]} ({each}); threshold reached: {reached}"

    _predict(model, files, False, tell)


def _predict(model: Path, files: list[Path], graded: bool, tell: Callable[..., str]) -> None:
    """Print of each file what `tell` makes of probabilities, number of the class, and thresholds."""
    import torch

    from genailab_helpers import checkpoints, radiographs
    from genailab_helpers.classification.training import load_classifier
    from genailab_helpers.datasets.names import GRADES

    path = model / MODEL if model.is_dir() else model
    classifier, recipe = load_classifier(path), checkpoints.load_checkpoint(path).recipe
    if (classifier.classes == list(GRADES)) != graded:
        kind, other = ("grader", "classify") if graded else ("classifier", "grade")
        raise ValueError(f"{path}: holds a model of the classes {', '.join(classifier.classes)}; expected "
                         f"one of `genailab train {kind}`; this one is for `genailab {other}`")
    thresholds, bit_depth = recipe.get("thresholds", {}), recipe.get("run", {}).get("bit_depth")
    if not graded and set(thresholds) != set(classifier.classes):
        raise ValueError(f"{path}: holds no thresholds of its classes; expected one of `genailab train`")
    read = []
    for file in files:
        try:
            read.append((file, radiographs.read_radiograph(file, classifier.img_size, bit_depth)))
        except radiographs.UnreadableRadiographError as error:
            complain(error)
    if read:
        probabilities, decoded = classifier.predict(torch.stack([image for _, image in read]))
        for (file, _), found, number in zip(read, probabilities.tolist(), decoded.tolist(), strict=True):
            echo(f"{file}: {tell(dict(zip(classifier.classes, found, strict=True)), number, thresholds)}")
        if not graded:
            each = ", ".join(f"{name} {thresholds[name]:.2f}" for name in classifier.classes)
            echo(f"Thresholds, chosen in training: {each}")
        echo(NOT_FOR_DIAGNOSIS)
    raise Exit(2 * (len(read) < len(files)))
