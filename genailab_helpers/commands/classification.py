"""`genailab train grader|classifier`, `grade`, `classify`. What a command needs is imported inside it.

Grades and classes go the same way: read the parts, audit them, train, judge, write model and model card.
"""

import json
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option, echo

from genailab_helpers.commands import options
from genailab_helpers.commands.options import Minutes, Output, Pattern, Seed, Table

if TYPE_CHECKING:
    import pandas as pd

    from genailab_helpers.classification.training import Classifier

CARD = "model_card.md"
DEFAULT_EPOCHS = 15

_Grades = Annotated[Path, Option(help="Folder of grade_0 to grade_4, or of train/, val/ and test/.")]
_Classes = Annotated[Path, Option(help="Two or more class folders, or train/, val/ and test/ of them.")]
_Loss = Annotated[str, Option(help="cross_entropy, soft_labels, squared_emd, qwk, coral or corn.")]
_Backbone = Annotated[str, Option(
    help="small_cnn, local_cnn, efficientnet_lite0, frozen_lite0, or a torchvision model such as resnet18.")]
_Size = Annotated[int, Option(min=32, help="Side of the images in pixels.")]
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
    from genailab_helpers.classification import reports, training
    from genailab_helpers.classification.losses import LOSSES
    from genailab_helpers.classification.networks import build_backbone
    from genailab_helpers.datasets import folders, index

    if settings["loss"] not in LOSSES:
        raise ValueError(f"--loss {settings['loss']}: expected one of {', '.join(LOSSES)}")
    build_backbone(settings["backbone"], 2)  # refuse a name, or fetch weights, before anything is read
    if settings["n_epochs"] is None and settings["minutes"] is None:
        settings["n_epochs"] = DEFAULT_EPOCHS
    images = index.index_images(data, table, patient_pattern, graded)
    parts, split = folders.read_parts(images, settings["img_size"], settings["seed"], graded)
    counts = folders.part_images(parts["train"])["class"].value_counts()[images.attrs["classes"]].to_dict()
    recipe = {"data": str(data), **settings, "classes": counts}
    # a model that travels names no folder of this machine
    told = recipe | {"data": data.resolve().name, "bit_depth": parts["train"].dataset.bit_depth}
    with whole_folder(output) as folder:
        echo(", ".join(f"{name} {len(part)} images" for name, part in parts.items())
             + "\n\nBefore any training: what tells the classes apart besides the anatomy?")
        audit, verdict, withheld = _examine(images)
        echo(audit)
        del settings["img_size"]  # the parts have it
        result = training.train_classifier(
            parts["train"], parts["val"], classes=list(counts),
            augmentation=training.Augmentation(flip=settings.pop("flip")), **settings)
        echo(f"{result.steps} steps in {len(result.history)} epochs, {result.seconds:.0f} s; "
             f"the model is that of epoch {result.best_epoch + 1}, the best on val")
        thresholds = {} if graded else _thresholds(result.model, parts["val"])
        judgement = None if withheld else reports.judge(result.model, parts, thresholds, settings["seed"])
        echo(f"\n{judgement}\n\n" + textwrap.fill(f"HEADLINE: {judgement.first}. {verdict}", 100)
             if judgement else withheld)
        (folder / options.RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        training.save_classifier(folder / options.MODEL, result.model, run=told, thresholds=thresholds)
        (folder / CARD).write_text(reports.model_card(
            result, parts, judgement or withheld, told, split, thresholds, audit, verdict), encoding="utf-8")
    echo(f"Not for diagnosis. All of this stands in {output / CARD}. Use the model with: "
         f"genailab {'grade' if graded else 'classify'} {output} FILE...")


def _thresholds(model: "Classifier", val: Any) -> dict[str, float]:
    """Choose a threshold for each class on the images of val."""
    import torch

    from genailab_helpers.classification.metrics import choose_threshold
    from genailab_helpers.datasets.folders import part_images

    truth = part_images(val)["label"].to_numpy()
    found = model.predict(torch.stack([image for image, _ in val])).probabilities
    return {name: choose_threshold(truth == k, found[:, k]) for k, name in enumerate(model.classes)}


def _examine(images: "pd.DataFrame") -> tuple[str, str, str]:
    """Return what the audit says, what that means for scores, and why none is shown or ""."""
    from genailab_helpers.datasets import shortcuts

    try:
        with warnings.catch_warnings(action="ignore"):  # of unreadable images, which was said
            report, signal = shortcuts.audit_shortcuts(images), shortcuts.label_signal(images)
    except ValueError as error:  # too few patients
        reason = str(error).removeprefix(f"{images.attrs['root']}: ")
        return (f"Shortcuts and label signal: not looked for ({reason}).",
                "Whether shortcuts give the classes away is not known.",
                "No score is shown: whether the labels can be learned is unknown.")
    verdict = report.verdict
    if not signal.signal and not signal.absent:
        verdict += " THAT THE LABELS CAN BE LEARNED AT ALL WAS NOT SHOWN: there are too few patients to tell."
    withheld = ("No score is shown: what looks better than chance here is chance. Check who labelled the "
                "images, and whether files were mixed up.") * signal.absent
    return f"{report}\n{signal}", verdict, withheld


def grade(model: _Model, files: _Files) -> None:
    """Grade radiographs: grade and probabilities. Not for diagnosis."""
    _predict(model, files, graded=True)


def classify(model: _Model, files: _Files) -> None:
    """Classify radiographs: class, probabilities, thresholds reached. Not for diagnosis."""
    _predict(model, files, graded=False)


def _predict(model: Path, files: list[Path], graded: bool) -> None:
    from genailab_helpers.checkpoints import load_checkpoint
    from genailab_helpers.classification.training import load_classifier
    from genailab_helpers.datasets.names import GRADE_NAMES, GRADES

    path = options.model_file(model)
    classifier, recipe = load_classifier(path), load_checkpoint(path).recipe
    classes, thresholds = classifier.classes, recipe.get("thresholds", {})
    if (classes == list(GRADES)) != graded:
        raise ValueError(f"{path}: holds a model of the classes {', '.join(classes)}; this one is for "
                         f"`genailab {'classify' if graded else 'grade'}`")
    unread, bit_depth = len(files), recipe.get("run", {}).get("bit_depth")
    for file, image in options.readable(files, classifier.img_size, bit_depth):
        unread -= 1
        [probabilities], [number] = (found.tolist() for found in classifier.predict(image[None]))
        each = dict(zip(GRADE_NAMES if graded else classes, probabilities, strict=True))
        best = f"grade {number} {GRADE_NAMES[number]}" if graded else classes[number]
        shown = ", ".join(f"{name} {p:.2f}" for name, p in each.items())
        reached = [name for name, p in each.items() if thresholds and p >= thresholds[name]]
        ended = f"; threshold reached: {', '.join(reached) or 'none'}" if thresholds else ""
        echo(f"{file}: {best} ({shown}){ended}")
    echo(options.NOT_FOR_DIAGNOSIS)
    raise Exit(2 * bool(unread))
