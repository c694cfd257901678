"""`genailab train grader|classifier`, `grade`, `classify`. What a command needs is imported inside it.

Grades and classes go the same way: read the parts, audit them, train, judge, write model and model card.
"""

import json
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from genailab_helpers.classification.training import Classifier

RECIPE, STATE, MODEL = "recipe.json", "training.safetensors", "model.safetensors"  # what a run holds
CARD = "model_card.md"
DEFAULT_EPOCHS = 15

train_app = typer.Typer(help="Train a model and write it to a folder.", no_args_is_help=True)

_Backbone = Annotated[str, typer.Option(
    help="small_cnn, local_cnn, efficientnet_lite0, frozen_lite0, or a torchvision model such as resnet18.",
)]
_Output = Annotated[Path, typer.Option(help="Folder of the run.")]
_Size = Annotated[int, typer.Option(help="Side of the films in pixels, at least 32.")]
_Epochs = Annotated[int | None, typer.Option(min=1, help=f"{DEFAULT_EPOCHS} without --minutes.")]
_Minutes = Annotated[float | None, typer.Option(min=0.01, help="Stop after so long.")]
_Table = Annotated[Path | None, typer.Option(
    help="CSV with file and patient; by default films.csv in the folder.",
)]
_Pattern = Annotated[str | None, typer.Option(
    help="Regular expression that finds the patient in a file name; its first group counts.",
)]
_Seed = Annotated[int, typer.Option(min=0, help="Seed of weights, order and augmentation.")]
_Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder or model that `genailab train` wrote.")]
_Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Radiographs.")]


@train_app.command("grader")
def train_grader(
    data: Annotated[Path, typer.Option(help="Folder of grade_0 to grade_4, or of train/, val/ and test/.")],
    output: _Output = Path("build/grader"),
    loss: Annotated[str, typer.Option(
        help="cross_entropy, soft_labels, squared_emd, qwk, coral or corn.",
    )] = "soft_labels",
    backbone: _Backbone = "efficientnet_lite0",
    img_size: _Size = 224,
    n_epochs: _Epochs = None,
    minutes: _Minutes = None,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror films in training: for knees only.")] = False,
    seed: _Seed = 0,
    table: _Table = None,
    patient_pattern: _Pattern = None,
) -> None:
    """Train a grader and say how good it is; an interrupted run goes on. Not for diagnosis."""
    _train(True, data, output, loss, backbone, img_size, n_epochs, minutes, flip, seed, table,
           patient_pattern)


@train_app.command("classifier")
def train_classes(
    data: Annotated[Path, typer.Option(help="Two or more class folders, or train/, val/ and test/ of them.")],
    output: _Output = Path("build/classifier"),
    backbone: _Backbone = "efficientnet_lite0",
    img_size: _Size = 224,
    n_epochs: _Epochs = None,
    minutes: _Minutes = None,
    seed: _Seed = 0,
    table: _Table = None,
    patient_pattern: _Pattern = None,
) -> None:
    """Train a classifier and say how good it is; an interrupted run goes on. Not for diagnosis."""
    _train(False, data, output, "cross_entropy", backbone, img_size, n_epochs, minutes, False, seed, table,
           patient_pattern)


def _train(graded: bool, data: Path, output: Path, loss: str, backbone: str, img_size: int,
           n_epochs: int | None, minutes: float | None, flip: bool, seed: int, table: Path | None,
           patient_pattern: str | None) -> None:
    import torch

    from genailab_helpers.checkpoints import whole_file
    from genailab_helpers.classification.backbones import build_backbone
    from genailab_helpers.classification.cards import judge, model_card
    from genailab_helpers.classification.metrics import choose_threshold
    from genailab_helpers.classification.ordinal import LOSSES
    from genailab_helpers.classification.training import Augmentation, save_classifier, train_classifier
    from genailab_helpers.datasets.folders import part_images, read_parts
    from genailab_helpers.datasets.index import index_images

    if img_size < 32:
        raise ValueError(f"--img-size {img_size}: expected at least 32")
    if loss not in LOSSES:
        raise ValueError(f"--loss {loss}: expected one of {', '.join(LOSSES)}")
    build_backbone(backbone, 2)  # refuse a name, or fetch weights, before anything is written
    if n_epochs is None and minutes is None:
        n_epochs = DEFAULT_EPOCHS
    data = data.expanduser()
    images = index_images(data, table, patient_pattern, graded)
    parts, split = read_parts(images, img_size, seed, graded)
    classes, labels = images.attrs["classes"], part_images(parts["train"])["label"].tolist()
    recipe: dict[str, Any] = {"data": str(data), "loss": loss, "backbone": backbone, "img_size": img_size,
                              "n_epochs": n_epochs, "minutes": minutes, "flip": flip, "seed": seed,
                              "classes": {name: labels.count(label) for label, name in enumerate(classes)}}
    open_run(output, recipe)
    typer.echo(", ".join(f"{name} {len(part)} films" for name, part in parts.items())
               + "\n\nBefore any training: what tells the classes apart besides the anatomy?")
    audit, verdict, withheld = _examine(images)
    typer.echo(audit)
    result = train_classifier(parts["train"], parts["val"], loss, backbone, n_epochs=n_epochs,
                              minutes=minutes, augmentation=Augmentation(flip=flip), classes=classes,
                              seed=seed, checkpoint=output / STATE)
    thresholds: dict[str, float] = {}
    if not graded:
        truth = part_images(parts["val"])["label"].to_numpy()
        found = result.model.predict(torch.stack([image for image, _ in parts["val"]])).probabilities
        thresholds = {name: choose_threshold(truth == k, found[:, k]) for k, name in enumerate(classes)}
    told = {**recipe, "data": data.resolve().name}  # a model that travels names no folder of this machine
    if bit_depth := parts["train"].dataset.bit_depth:
        told["bit_depth"] = bit_depth
    save_classifier(output / MODEL, result.model, run=told, thresholds=thresholds)
    typer.echo(f"{result.steps} steps in {len(result.history)} epochs, {result.seconds:.0f} s; "
               f"the model is that of epoch {result.best_epoch + 1}, the best on val")
    judgement = None if withheld else judge(result.model, parts, thresholds, seed)
    if judgement is None:
        typer.echo(withheld)
    else:
        typer.echo(f"\n{judgement}\n\n" + textwrap.fill(f"HEADLINE: {judgement.first}. {verdict}", 100))
    with whole_file(output / CARD) as path:
        path.write_text(model_card(result, parts, judgement or withheld, told, split, thresholds, audit,
                                   verdict), encoding="utf-8")
    typer.echo(f"Not for diagnosis. All of this stands in {output / CARD}. Use the model with: "
               f"genailab {'grade' if graded else 'classify'} {output} FILE...")


def open_run(output: Path, recipe: dict[str, Any]) -> None:
    """Begin a run, or check that the one in the folder is the same."""
    from genailab_helpers.checkpoints import first_difference, whole_file

    if (output / RECIPE).exists():
        if difference := first_difference(read_recipe(output), recipe):
            raise ValueError(f"{output}: holds another run ({difference}); choose another --output")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output}: expected a new or empty folder, or a run to go on with; "
                              "choose another --output")
    with whole_file(output / RECIPE) as path:
        path.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def read_recipe(run: Path) -> dict[str, Any]:
    """Read what `open_run` wrote."""
    path = run / RECIPE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected a run of `genailab train diffusion`")
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        return {**recipe, "classes": {str(name): int(count) for name, count in recipe["classes"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no recipe of `genailab train` ({error}); train again") from error


def _examine(images: "pd.DataFrame") -> tuple[str, str, str]:
    """Return what the audit says, what that means for scores, and why none is shown or ""."""
    from genailab_helpers.datasets.shortcuts import audit_shortcuts, label_signal

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of films that cannot be read, which was said already
        try:
            report, signal = audit_shortcuts(images), label_signal(images)
        except ValueError as error:  # too few patients
            reason = str(error).removeprefix(f"{images.attrs['root']}: ")
            return (f"Shortcuts and label signal: not looked for ({reason}).",
                    "Whether shortcuts give the classes away is not known.",
                    f"No score is shown: whether the labels can be learned cannot be told ({reason}).")
    verdict = report.verdict
    if report.flagged:
        reached = max(row.balanced for row in report.rows if row.flagged)
        verdict += (f" From that alone a tiny model reaches balanced accuracy {reached:.3f} (chance "
                    f"{1 / len(report.classes):.3f}), SO A GOOD SCORE DOES NOT SHOW THAT THE MODEL SEES THE "
                    "DISEASE.")
    withheld = ("No score is shown: what looks better than chance here is chance. Check who labelled the "
                "images, and whether files were mixed up.") if signal.absent else ""
    if not (signal.signal or signal.absent):
        verdict += " THAT THE LABELS CAN BE LEARNED AT ALL WAS NOT SHOWN: there are too few patients to tell."
    return f"{report}\n{signal}", verdict, withheld


def grade(model: _Model, files: _Files) -> None:
    """Grade films: grade and probabilities. Not for diagnosis."""
    from genailab_helpers.datasets.names import GRADE_NAMES

    grader, _, bit_depth = _load(model, graded=True)
    for file, probabilities, decoded in _predict(grader, files, bit_depth):
        each = ", ".join(f"{name} {p:.2f}" for name, p in zip(GRADE_NAMES, probabilities, strict=True))
        typer.echo(f"{file}: grade {decoded} {GRADE_NAMES[decoded]} ({each})")
    typer.echo("Not for diagnosis: a model of a lesson, tested on no patient of yours.")


def classify(model: _Model, files: _Files) -> None:
    """Classify films: class, probabilities, thresholds reached. Not for diagnosis."""
    classifier, thresholds, bit_depth = _load(model, graded=False)
    for file, probabilities, decoded in _predict(classifier, files, bit_depth):
        found = dict(zip(classifier.classes, probabilities.tolist(), strict=True))
        each = ", ".join(f"{name} {p:.2f}" for name, p in found.items())
        reached = ", ".join(name for name, p in found.items() if p >= thresholds[name]) or "none"
        typer.echo(f"{file}: {classifier.classes[decoded]} ({each}); threshold reached: {reached}")
    typer.echo("Thresholds, chosen in training: "
               + ", ".join(f"{name} {thresholds[name]:.2f}" for name in classifier.classes))
    typer.echo("Not for diagnosis: a model of a lesson, tested on no patient of yours.")


def _load(model: Path, graded: bool) -> "tuple[Classifier, dict[str, float], int | None]":
    """Read a model of the right kind, its thresholds, and the bit depth of the images it was trained on."""
    from genailab_helpers.checkpoints import load_checkpoint
    from genailab_helpers.classification.training import load_classifier
    from genailab_helpers.datasets.names import GRADES

    path = model / MODEL if model.is_dir() else model
    classifier = load_classifier(path)
    if (classifier.classes == list(GRADES)) != graded:
        kind, other = ("grader", "classify") if graded else ("classifier", "grade")
        raise ValueError(f"{path}: holds a model of the classes {', '.join(classifier.classes)}; expected "
                         f"one of `genailab train {kind}`; this one is for `genailab {other}`")
    recipe = load_checkpoint(path).recipe
    thresholds = recipe.get("thresholds") or {}
    if not graded and set(thresholds) != set(classifier.classes):
        raise ValueError(f"{path}: holds no thresholds of its classes; expected a model of "
                         "`genailab train classifier`")
    return classifier, thresholds, recipe.get("run", {}).get("bit_depth")


def _predict(model: "Classifier", files: Sequence[Path],
             bit_depth: int | None) -> Iterator[tuple[Path, Any, int]]:
    """Yield each film with its probabilities and the number of its grade or class."""
    import torch

    from genailab_helpers.radiographs import read_radiograph

    films = torch.stack([read_radiograph(file, model.img_size, bit_depth) for file in files])
    probabilities, decoded = model.predict(films)
    yield from zip(files, probabilities, decoded.tolist(), strict=True)
