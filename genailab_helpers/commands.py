"""The `genailab` command. What a command needs is imported inside it, so that the help appears at once."""

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import genailab_helpers
from genailab_helpers.data_commands import data_app
from genailab_helpers.model_commands import (
    MODEL,
    RECIPE,
    STATE,
    classify,
    grade,
    open_run,
    read_recipe,
    train_app,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset
    from tqdm import tqdm

SYNTHETIC, N_PHANTOMS = "synthetic", 4000  # `--data synthetic` draws so many phantoms
CONTACT_SHEET = "contact_sheet.png"
BATCH_SIZE, DEFAULT_STEPS = 16, 2000
DRAWN_AT_ONCE, SHOWN = 16, 192  # films in a batch of `sample`, and at most on its contact sheet

app = typer.Typer(help="GenAI Lab: notebook lessons on medical-imaging AI. Not for diagnosis.",
                  add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

app.add_typer(train_app, name="train")
app.add_typer(data_app, name="data")


@app.command()
def run(
    lessons: Annotated[list[str] | None, typer.Argument(
        metavar="LESSON", help="Number, name or path, such as 2 or 02_synthetic_xrays. All if none is given.",
    )] = None,
    parameters: Annotated[list[str] | None, typer.Option(
        "-p", metavar="NAME VALUE", help="Set a parameter, such as -p DATA path/to/films. May be repeated.",
    )] = None,
    output: Annotated[Path, typer.Option(
        help="Folder for the executed notebooks and pages.",
    )] = Path("build"),
    folder: Annotated[Path | None, typer.Option(
        "--lessons", hidden=True, help="Folder of other lessons.",
    )] = None,
) -> None:
    """Execute lessons and write the notebooks, with an HTML page each, to a folder."""
    from tqdm import tqdm

    from genailab_helpers import execution

    given = dict(_split(parameter) for parameter in parameters or [])
    chosen = _find_lessons(lessons or [], folder)
    values = [execution.convert_parameters(lesson, given) for lesson in chosen]
    _check_data(given)
    _check_output(output)
    failures = 0
    for number, (lesson, converted) in enumerate(zip(chosen, values, strict=True), 1):
        with tqdm(desc=f"[{number}/{len(chosen)}] {lesson.stem}",
                  bar_format="{desc}: cell {n_fmt} of {total_fmt} |{bar:20}| {elapsed}") as bar:
            notebook = execution.execute_lesson(lesson, converted, partial(_show, bar))
        written = execution.save_lesson(notebook, lesson.stem, output, given)
        if error := notebook.metadata["genailab"]["error"]:
            failures += 1
            _complain(f"lesson {lesson.stem} failed in {error} (executed so far: {written})")
    typer.echo(f"Look at {output / 'index.html'}")
    if failures:
        raise typer.Exit(1)


def _show(bar: "tqdm", done: int, total: int) -> None:
    bar.n, bar.total = done, total
    bar.refresh()


def _split(parameter: str) -> tuple[str, str]:
    name, equals, value = parameter.partition("=")
    if not equals:
        raise ValueError(f"-p {parameter}: expected a name and a value, such as -p SEED 1")
    return name, value


def _check_data(given: dict[str, str]) -> None:
    """Refuse a folder without radiographs now, not after minutes of lessons."""
    from genailab_helpers.datasets.index import index_images
    from genailab_helpers.execution import FILMS

    for folder in (given.get(name) for name in FILMS):
        if folder not in (None, "None"):
            index_images(folder)


def _check_output(output: Path) -> None:
    """Refuse a folder that cannot be written now, not after minutes of lessons."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise OSError(f"{output}: expected a folder to write to ({error.strerror}); "
                      "choose another with --output") from error


@train_app.command("diffusion")
def train_diffusion(
    data: Annotated[str, typer.Option(
        help=f"A class folder, a folder of class folders, or '{SYNTHETIC}' for phantoms of all findings.",
    )],
    img_size: Annotated[int, typer.Option(help="Side of the films in pixels, a multiple of 8.")] = 64,
    n_steps: Annotated[int | None, typer.Option(
        min=1, help=f"Batches to train on; {DEFAULT_STEPS} if neither steps nor minutes are given.",
    )] = None,
    minutes: Annotated[float | None, typer.Option(
        min=0.01, help="Stop after so long; such a run cannot be repeated exactly.",
    )] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("build/diffusion"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, order and noise.")] = 0,
    batch_size: Annotated[int, typer.Option(
        min=1, help="Films a step, of all processes together.",
    )] = BATCH_SIZE,
    compile_network: Annotated[bool, typer.Option(
        "--compile", help="Compile the network first: quicker on a graphics card from 128x128 pixels on.",
    )] = False,
) -> None:
    """Train a diffusion model; an interrupted run goes on where it stopped. Writes its recipe beside it.

    On several devices: accelerate launch --multi_gpu -m genailab_helpers.commands train diffusion ...
    """
    from torch.utils.data import DataLoader

    from genailab_helpers.checkpoints import join_processes, load_checkpoint, whole_file
    from genailab_helpers.diffusion.denoiser import save_denoiser
    from genailab_helpers.diffusion.training import train_image_diffusion

    if img_size < 16 or img_size % 8:
        raise ValueError(f"--img-size {img_size}: expected a multiple of 8, at least 16")
    if n_steps is None and minutes is None:
        n_steps = DEFAULT_STEPS
    processes = join_processes()
    with processes.main_process_first():  # the others find films and run where the first has put them
        films, classes = _training_films(data, img_size, seed)
    recipe: dict[str, Any] = {"data": data, "img_size": img_size, "classes": classes, "n_steps": n_steps,
                              "minutes": minutes, "seed": seed, "batch_size": batch_size}
    with processes.main_process_first():
        open_run(output, recipe)
    if processes.is_main_process:
        typer.echo(f"{sum(classes.values())} films of {img_size}x{img_size} pixels: "
                   + ", ".join(f"{count} {name}" for name, count in classes.items()))
    model, losses = train_image_diffusion(
        DataLoader(films, batch_size=min(batch_size, len(films)), shuffle=True, drop_last=True),  # type: ignore[arg-type]
        img_size, n_steps=n_steps, minutes=minutes, seed=seed, checkpoint=output / STATE,
        compile_network=compile_network)
    processes.wait_for_everyone()
    processes.destroy_process_group()  # else the one that ends first may take the others with it
    if not processes.is_main_process:
        return
    if not (output / MODEL).exists():
        seconds = load_checkpoint(output / STATE).recipe["progress"]["seconds"]
        recipe |= {"processes": processes.num_processes, "steps": len(losses),
                   "seconds_a_step": round(seconds / len(losses), 3),
                   "mean_of_last_100_losses": round(sum(losses[-100:]) / len(losses[-100:]), 4),
                   "date": datetime.now(UTC).date().isoformat()}
        with whole_file(output / RECIPE) as path:
            path.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        save_denoiser(output / MODEL, model, {"run": recipe}, half=True)  # last: it says that all is there
    done = json.loads((output / RECIPE).read_text(encoding="utf-8"))
    typer.echo(f"{done['steps']} steps, {done['seconds_a_step']} s a step, "
               f"loss {done['mean_of_last_100_losses']} (1: the best linear estimate)")
    typer.echo(f"Look at {output}; draw films with: genailab sample {output}")


def _training_films(data: str, img_size: int, seed: int) -> "tuple[Dataset[Any], dict[str, int]]":
    """Return the films, with labels where there are several classes, and how many each class has."""
    from genailab_helpers.diffusion.datasets import ChestXRayDataset, SyntheticXRayDataset

    films: ChestXRayDataset | SyntheticXRayDataset
    if data == SYNTHETIC:
        films = SyntheticXRayDataset(N_PHANTOMS, img_size, seed, labels=True)
    else:
        films = ChestXRayDataset(data, img_size, labels=True)
    films.labels = len(films.classes) > 1
    return films, {name: films.targets.count(label) for label, name in enumerate(films.classes)}


@app.command()
def sample(
    run_folder: Annotated[Path, typer.Argument(
        metavar="RUN", help="Folder that `genailab train diffusion` wrote.",
    )],
    n_samples: Annotated[int, typer.Option(
        min=1, help="Films to draw, classes as frequent as in training.",
    )] = 48,
    output: Annotated[Path, typer.Option(
        help="New or empty folder for the films, or one that the same command did not finish.",
    )] = Path("build/samples"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    guidance: Annotated[float, typer.Option(
        min=0, help="1 draws the films of a class; more exaggerates what is typical of it.",
    )] = 1.0,
) -> None:
    """Draw films with a trained model: films/CLASS/*.png and contact_sheet.png. They show no person.

    Films are written as they are drawn; if it is stopped, the same command goes on.
    """
    import numpy as np
    import torch
    from PIL import Image
    from tqdm import tqdm

    from genailab_helpers.checkpoints import choose_device, whole_file
    from genailab_helpers.diffusion.denoiser import LINEAR_ABOVE, load_denoiser
    from genailab_helpers.diffusion.sampling import generate

    classes = read_recipe(run_folder)["classes"]
    if not (run_folder / MODEL).is_file():
        raise FileNotFoundError(f"{run_folder / MODEL}: not found; the training has not ended: "
                                "run the same `genailab train diffusion` again to finish it")
    denoiser = load_denoiser(run_folder / MODEL)
    if (denoiser.num_classes or 1) != len(classes):
        raise ValueError(f"{run_folder}: {RECIPE} names {len(classes)} classes, {MODEL} knows "
                         f"{denoiser.num_classes or 1}; train again")
    if denoiser.num_classes is None and guidance != 1:
        raise ValueError(f"--guidance {guidance}: this model knows no classes; leave the option out")
    of_films = np.repeat(np.arange(len(classes)), list(classes.values()))
    places = ((np.arange(n_samples) + 0.5) * len(of_films) / n_samples).astype(int)
    labels = torch.from_numpy(of_films[places])
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    model_hash = hashlib.blake2b((run_folder / MODEL).read_bytes(), digest_size=16).hexdigest()
    open_run(output, {"classes": dict(zip(classes, counts, strict=True)), "seed": seed, "guidance": guidance,
                      "model": model_hash})
    digits = max(4, len(str(n_samples)))
    paths = [output / "films" / list(classes)[label] / f"generated_{i:0{digits}d}.png"
             for i, label in enumerate(labels.tolist(), 1)]
    there = next((i for i, path in enumerate(paths) if not path.exists()), n_samples)
    first = there - there % DRAWN_AT_ONCE  # in the batches of a run that was not stopped: the same films
    if not (output / CONTACT_SHEET).exists():
        told = None if denoiser.num_classes is None else labels
        drawing = generate(denoiser.to(choose_device()), n_samples, seed=seed, labels=told, guidance=guidance,
                           batch_size=DRAWN_AT_ONCE, first=first, linear_above=LINEAR_ABOVE)
        unwritten = iter(paths[first:])
        with tqdm(total=n_samples, initial=first, desc="drawing", unit="film") as bar:
            for batch in drawing:
                for film in ((batch[:, 0] + 1) * 127.5).round().byte().cpu().numpy():
                    with whole_file(next(unwritten)) as path:
                        Image.fromarray(film).save(path)
                bar.update(len(batch))
        shown = np.unique(np.linspace(0, n_samples - 1, SHOWN).round().astype(int))
        sheet = _contact_sheet(np.stack([np.asarray(Image.open(paths[i])) for i in shown]))
        with whole_file(output / CONTACT_SHEET) as path:
            Image.fromarray(sheet).save(path)
    typer.echo(f"Look at {output / CONTACT_SHEET}; the films are in {output / 'films'}")


def _contact_sheet(films: Any) -> Any:
    """Lay films (N, H, W) of 8 bits side by side, about three rows for four columns, the rest black."""
    import numpy as np

    n_films, height, width = films.shape
    n_columns = int(np.ceil(np.sqrt(n_films * 4 / 3)))
    n_rows = -(-n_films // n_columns)
    blank = np.zeros((n_rows * n_columns - n_films, height, width), np.uint8)
    sheet = np.concatenate([films, blank]).reshape(n_rows, n_columns, height, width)
    return sheet.swapaxes(1, 2).reshape(n_rows * height, n_columns * width)


@app.command()
def evaluate(
    generated: Annotated[Path, typer.Argument(metavar="GENERATED", help="Folder of generated films.")],
    real: Annotated[Path, typer.Argument(metavar="REAL", help="Folder of films new to the model.")],
    train: Annotated[Path | None, typer.Option(
        metavar="DIR", help="Folder of the films that it was trained on: only with it can copies be found.",
    )] = None,
) -> None:
    """Judge generated films against real ones, beside copies, a collapse, and real against real."""
    from genailab_helpers.diffusion import evaluation
    from genailab_helpers.features import lite0_features

    made, _ = _read_films(generated)
    img_size = made.shape[-1]
    held_out, patients = _read_films(real, img_size)
    if train is not None:
        shown, _ = _read_films(train, img_size)
        reference = held_out
    else:
        from sklearn.model_selection import GroupShuffleSplit

        if len(set(patients)) < 2:
            raise ValueError(f"{real}: expected films of at least 2 patients, or a folder --train")
        halves = next(GroupShuffleSplit(1, test_size=0.5, random_state=0).split(patients, groups=patients))
        shown, reference = (held_out[half] for half in halves)
        typer.echo(f"No --train: {real} is split by patient, {len(shown)} films stand in for those of the "
                   f"training, {len(reference)} are held out. Copies of training films cannot be seen so.")
    table = evaluation.evaluate(made, shown, reference)
    plain = evaluation.frechet_distance(lite0_features(made), lite0_features(held_out))
    typer.echo(str(table))
    typer.echo(f"plain Frechet distance, all {len(made)} generated against all {len(held_out)} real films: "
               f"{plain:.1f}")


def _read_films(folder: Path, img_size: int | None = None) -> "tuple[Tensor, list[str]]":
    """Read all films of a folder and name their patients; without a size, in the size of the first one."""
    from genailab_helpers.datasets.folders import read_images
    from genailab_helpers.datasets.index import index_images
    from genailab_helpers.radiographs import read_radiograph

    images = index_images(folder)
    images = images[images.index != CONTACT_SHEET]
    if images.empty:
        raise ValueError(f"{folder}: holds {CONTACT_SHEET} alone; expected a folder of images")
    size = img_size or read_radiograph(images["path"].iloc[0], bit_depth=16).shape[-1]
    films, kept = read_images(images, size)
    return films, kept["patient"].tolist()


app.command()(grade)
app.command()(classify)


def _find_lessons(wanted: Sequence[str], folder: Path | None) -> list[Path]:
    known = _known_lessons(folder)
    found: dict[Path, None] = {}  # a set that keeps the order
    for name in wanted:
        path = Path(name).expanduser()
        if path.suffix == ".ipynb" and path.is_file():
            found[path.resolve()] = None
            continue
        matches = [lesson for lesson in known if name in (lesson.stem, lesson.name)
                   or name.lstrip("0") == lesson.stem.partition("_")[0].lstrip("0")]
        if not matches:
            listed = ", ".join(lesson.stem for lesson in known) or "none; run this in a clone of GenAI Lab"
            raise ValueError(f"no lesson {name}; the lessons: {listed}")
        found.update(dict.fromkeys(matches))
    if not known and not wanted:
        raise FileNotFoundError("no lessons found: expected a folder notebooks/ with files such as "
                                "02_synthetic_xrays.ipynb; run this in a clone of GenAI Lab")
    return list(found) or known


def _known_lessons(folder: Path | None) -> list[Path]:
    """List the lessons of the repository if this is an editable install of it, else of the current folder."""
    repository = Path(genailab_helpers.__file__).resolve().parent.parent
    places = [folder] if folder else [repository / "notebooks", Path("notebooks")]
    found = (sorted(place.resolve().glob("[0-9]*_*.ipynb")) for place in places)
    return next((lessons for lessons in found if lessons), [])


def _join_parameters(arguments: Sequence[str]) -> list[str]:
    """Join each `-p NAME VALUE` to `-p NAME=VALUE`: typer has no option that takes two words and repeats.

    A `~` at the start of a path, also after `=`, is the home folder.
    """
    words = (re.sub(r"(^|=)~(?=/|$)", lambda match: match[1] + str(Path.home()), word) for word in arguments)
    joined = []
    for word in words:
        joined.append(word)
        if word == "-p":
            pair = [part for part in (next(words, None), next(words, None)) if part is not None]
            joined.extend(["=".join(pair)] if pair else [])
    return joined


def _complain(message: object) -> None:
    typer.echo(f"genailab: {' '.join(str(message).split())}", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a wrong input ends in one line on stderr and exit status 2."""
    try:
        app(_join_parameters(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError, FloatingPointError) as error:
        _complain(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
