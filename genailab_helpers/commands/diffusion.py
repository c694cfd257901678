"""`genailab train diffusion`, `sample`, `evaluate`. What a command needs is imported inside it."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, echo

from genailab_helpers.commands.options import MODEL, RECIPE, Minutes, Output, Seed, model_file, write_text

if TYPE_CHECKING:
    from torch import Tensor

SYNTHETIC, N_PHANTOMS = "synthetic", 4000  # `--data synthetic` renders so many phantoms
STATE, CONTACT_SHEET = "training.safetensors", "contact_sheet.png"
DEFAULT_STEPS, SHOWN = 2000, 192  # SHOWN: images on a contact sheet at most

_Data = Annotated[str, Option(help=f"A class folder, a folder of class folders, or '{SYNTHETIC}': phantoms.")]
_Size = Annotated[int, Option(help="Side of the images in pixels, a multiple of 8.")]
_Steps = Annotated[int | None, Option(min=1, help=f"Batches to train on; {DEFAULT_STEPS} without --minutes.")]
_Batch = Annotated[int, Option(min=1, help="Images a step, of all processes together.")]
_Compile = Annotated[bool, Option("--compile", help="Quicker on a graphics card from 128x128 pixels on.")]
_Run = Annotated[Path, Argument(metavar="RUN", help="Folder that `genailab train diffusion` wrote.")]
_Samples = Annotated[int, Option(min=1, help="Images, of classes as frequent as in training.")]
_Guidance = Annotated[float, Option(min=0, help="1: images of a class; more exaggerates what is typical.")]
_Generated = Annotated[Path, Argument(metavar="GENERATED", help="Folder of generated images.")]
_Real = Annotated[Path, Argument(metavar="REAL", help="Folder of radiographs new to the model.")]
_Train = Annotated[Path | None, Option(metavar="DIR", help="Folder it was trained on, to find copies of it.")]


def train(data: _Data, img_size: _Size = 64, n_steps: _Steps = None, minutes: Minutes = None,
          output: Output = Path("build/diffusion"), seed: Seed = 0, batch_size: _Batch = 16,
          compile_network: _Compile = False) -> None:
    """Train a diffusion model; an interrupted run goes on where it stopped. Writes its recipe beside it.

    On several devices: accelerate launch --multi_gpu -m genailab_helpers.commands train diffusion ...
    """
    from torch.utils.data import DataLoader

    from genailab_helpers.checkpoints import join_processes, load_checkpoint
    from genailab_helpers.diffusion.datasets import ChestXRayDataset, SyntheticXRayDataset
    from genailab_helpers.diffusion.denoiser import save_denoiser
    from genailab_helpers.diffusion.training import train_image_diffusion

    if img_size < 16 or img_size % 8:
        raise ValueError(f"--img-size {img_size}: expected a multiple of 8, at least 16")
    if n_steps is None and minutes is None:
        n_steps = DEFAULT_STEPS
    processes = join_processes()
    with processes.main_process_first():  # the others find images and run where the first has put them
        images: Any = (SyntheticXRayDataset(N_PHANTOMS, img_size, seed, labels=True) if data == SYNTHETIC
                       else ChestXRayDataset(data, img_size, labels=True))
        images.labels = len(images.classes) > 1
        classes = {name: images.targets.count(label) for label, name in enumerate(images.classes)}
        recipe = {"data": data, "img_size": img_size, "classes": classes, "n_steps": n_steps,
                  "minutes": minutes, "seed": seed, "batch_size": batch_size}
        _open_run(output, recipe)
    if processes.is_main_process:
        echo(f"{len(images)} images of {img_size}x{img_size} pixels: "
             + ", ".join(f"{count} {name}" for name, count in classes.items()))
    loader = DataLoader(images, min(batch_size, len(images)), shuffle=True, drop_last=True)
    model, losses = train_image_diffusion(loader, img_size, n_steps=n_steps, minutes=minutes, seed=seed,
                                          checkpoint=output / STATE, compile_network=compile_network,
                                          num_classes=len(classes) if images.labels else None)
    processes.wait_for_everyone()
    processes.destroy_process_group()  # else the one that ends first may take the others with it
    if processes.is_main_process:
        a_step = load_checkpoint(output / STATE).recipe["progress"]["seconds"] / len(losses)
        loss = round(sum(losses[-100:]) / len(losses[-100:]), 4)
        recipe |= {"processes": processes.num_processes, "steps": len(losses),
                   "seconds_a_step": round(a_step, 3), "mean_of_last_100_losses": loss,
                   "date": datetime.now(UTC).date().isoformat()}
        write_text(output / RECIPE, json.dumps(recipe, indent=2) + "\n")
        told = recipe | {"data": Path(data).name}  # a model that travels names no folder of this machine
        save_denoiser(output / MODEL, model, {"run": told}, half=True)  # last: it says that all is there
        echo(f"{len(losses)} steps, {a_step:.3f} s a step, loss {loss} (1: the best linear estimate)\n"
             f"Look at {output}; sample images with: genailab sample {output}")


def _open_run(output: Path, recipe: dict[str, Any]) -> None:
    """Begin a run, or check that the one in the folder is the same."""
    from genailab_helpers.checkpoints import first_difference, holds_files

    if (output / RECIPE).exists():
        if difference := first_difference(_read_recipe(output), recipe):
            raise ValueError(f"{output}: holds another run ({difference}); choose another --output")
        return
    if holds_files(output):
        raise FileExistsError(f"{output}: expected a new or empty folder, or a run to go on with; "
                              "choose another --output")
    write_text(output / RECIPE, json.dumps(recipe, indent=2) + "\n")


def _read_recipe(folder: Path, n_classes: int | None = None) -> dict[str, Any]:
    """Read the recipe of a run; its classes become names of folders, so they are checked."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        recipe = json.loads((folder / RECIPE).read_bytes())
        counts = recipe["classes"]
        if n_classes in (None, len(counts)) and any(counts.values()) and all(
                Path(name).name == name and name.strip(".") and "\0" not in name and 0 <= n < 2**40
                for name, n in counts.items()):
            return recipe
    raise ValueError(f"{folder / RECIPE}: expected classes that can be folders, with counts, as many as the "
                     "model beside it knows; train again")


def sample(run_folder: _Run, n_samples: _Samples = 48, output: Output = Path("build/samples"),
           seed: Seed = 0, guidance: _Guidance = 1.0) -> None:
    """Sample images from a trained model: films/CLASS/*.png and contact_sheet.png. They show no person."""
    import numpy as np
    import torch
    from PIL import Image
    from torchvision.utils import make_grid
    from tqdm import tqdm

    from genailab_helpers.checkpoints import choose_device, whole_folder
    from genailab_helpers.datasets.privacy import mark_synthetic
    from genailab_helpers.diffusion.denoiser import LINEAR_ABOVE, load_denoiser
    from genailab_helpers.diffusion.sampling import generate

    model = model_file(run_folder)
    denoiser = load_denoiser(model)
    if denoiser.num_classes is None and guidance != 1:
        raise ValueError(f"--guidance {guidance}: this model knows no classes; leave the option out")
    classes = _read_recipe(model.parent, denoiser.num_classes or 1)["classes"]  # in the order of the labels
    up_to = np.cumsum(list(classes.values()))
    labels = np.searchsorted(up_to, (np.arange(n_samples) + 0.5) * up_to[-1] / n_samples, side="right")
    told = torch.from_numpy(labels) if denoiser.num_classes else None
    mark = mark_synthetic(f"diffusion model, seed {seed}")
    with whole_folder(output) as folder:
        batches = generate(denoiser.to(choose_device()), n_samples, seed=seed, guidance=guidance, labels=told,
                           linear_above=LINEAR_ABOVE)
        images = torch.cat([((batch[:, 0] + 1) * 127.5).round().byte().cpu()
                            for batch in tqdm(batches, desc="sampling", unit="batch")])
        for i, (image, label) in enumerate(zip(images, labels, strict=True), 1):
            path = folder / "films" / list(classes)[label] / f"generated_{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(path, pnginfo=mark)
        shown = images[np.unique(np.linspace(0, n_samples - 1, SHOWN).round().astype(int))]
        n_columns = int(np.ceil(np.sqrt(len(shown) * 4 / 3)))  # about three rows for four columns
        Image.fromarray(make_grid(shown[:, None], n_columns, padding=0)[0].numpy()).save(
            folder / CONTACT_SHEET, pnginfo=mark)
    echo(f"Look at {output / CONTACT_SHEET}; the images are in {output / 'films'}")


def evaluate(generated: _Generated, real: _Real, train: _Train = None) -> None:
    """Judge generated images against real ones, beside copies, a collapse, and real against real."""
    from sklearn.model_selection import GroupShuffleSplit

    from genailab_helpers.diffusion import evaluation

    made, _ = _read_images(generated)
    held_out, patients = _read_images(real, made.shape[-1])
    if train is not None:
        shown, reference = _read_images(train, made.shape[-1])[0], held_out
    else:
        if len(set(patients)) < 2:
            raise ValueError(f"{real}: expected images of at least 2 patients, or a folder --train")
        halves = next(GroupShuffleSplit(1, test_size=0.5, random_state=0).split(patients, groups=patients))
        shown, reference = (held_out[half] for half in halves)
        echo(f"No --train: {real} is split by patient, {len(shown)} images stand in for those of the "
             f"training, {len(reference)} are held out. Copies of training images cannot be seen so.")
    echo(evaluation.evaluate(made, shown, reference))

def _read_images(folder: Path, img_size: int | None = None) -> "tuple[Tensor, list[str]]":
    """Read the images of a folder and name their patients; without a size, in the size of the first one."""
    from genailab_helpers import radiographs
    from genailab_helpers.datasets import folders, index

    table = index.index_images(folder).drop(CONTACT_SHEET, errors="ignore")
    size = img_size or radiographs.read_radiograph(table["path"].iloc[0], bit_depth=16).shape[-1]
    images, kept = folders.read_images(table, size)
    return images, kept["patient"].tolist()
