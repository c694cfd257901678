"""What several commands share: options, names of files, reading radiographs, one line on stderr."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option, echo

if TYPE_CHECKING:
    from torch import Tensor

RECIPE, MODEL = "recipe.json", "model.safetensors"  # what the folder of a training holds
NOT_FOR_DIAGNOSIS = "Not for diagnosis: a model of a lesson, tested on no patient of yours."

Output = Annotated[Path, Option(help="New or empty folder; `train diffusion` goes on with its own run.")]
Table = Annotated[Path | None, Option(help="CSV that names files, and class and patient where it has them.")]
Seed = Annotated[int, Option(min=0, help="Seed of all that is random.")]
Minutes = Annotated[float | None, Option(min=0.01, help="Stop after so long; not exactly repeatable.")]
Pattern = Annotated[str | None, Option(help="Regular expression; its group 1 is the patient in a file name.")]


def complain(message: object) -> None:
    """Write one line to stderr."""
    echo(f"genailab: {' '.join(str(message).split())}", err=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    from genailab_helpers.checkpoints import whole_file

    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def readable(files: list[Path], img_size: int | None = None,
             bit_depth: int | None = None) -> "Iterator[tuple[Path, Tensor]]":
    """Read radiographs one after the other; say of each that cannot be read why."""
    from genailab_helpers.radiographs import UnreadableRadiographError, read_radiograph

    for file in files:
        try:
            with warnings.catch_warnings(record=True, action="always") as caught:
                image = read_radiograph(file, img_size, bit_depth)
        except UnreadableRadiographError as error:
            complain(error)
            continue
        for warning in caught:
            complain(warning.message)
        yield file, image


def model_file(path: Path) -> Path:
    """Return the model in the folder of a training, or the file itself."""
    file = path / MODEL if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(f"{path}: no model; expected a folder that `genailab train` wrote, or a "
                         ".safetensors file, before the images")
    return file
