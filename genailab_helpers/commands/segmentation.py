"""`genailab train segmenter`, `segment`. What a command needs is imported inside it."""

from collections import Counter
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option, echo

from genailab_helpers.commands.options import MODEL, NOT_FOR_DIAGNOSIS, Output, Seed, model_file, readable

_Steps = Annotated[int, Option(min=1, help="Batches to train on.")]
_Phantoms = Annotated[int, Option(min=1, help="Phantoms to render.")]
_Size = Annotated[int, Option(help="Side of the images in pixels, a multiple of 16.")]
_Files = Annotated[list[Path], Argument(
    metavar="[MODEL] FILE...", help="Radiographs; first, if you like, a .safetensors file or a folder that "
    "`genailab train segmenter` wrote. Without one, the weights that come with the lessons.")]
_Masks = Annotated[Path, Option(help="New or empty folder for the masks.")]


def train(output: Output = Path("build/segmenter"), n_steps: _Steps = 1800, img_size: _Size = 96,
          n_samples: _Phantoms = 1500, seed: Seed = 0) -> None:
    """Train a network on phantoms alone to find the lungs. Not for diagnosis."""
    from genailab_helpers.checkpoints import whole_folder
    from genailab_helpers.segmentation import save_segmenter, train_segmenter

    with whole_folder(output) as folder:
        model, losses = train_segmenter(n_steps, img_size, n_samples, seed)
        run = {"n_steps": n_steps, "n_samples": n_samples, "seed": seed}
        save_segmenter(folder / MODEL, model, run=run)
    echo(f"{len(losses)} steps, last loss {losses[-1]:.3f}\n{NOT_FOR_DIAGNOSIS} "
         f"Use the model with: genailab segment {output} FILE...")


def segment(files: _Files, output: _Masks = Path("build/masks")) -> None:
    """Find the lungs in radiographs; write a PNG mask of the size of each. Not for diagnosis."""
    from PIL import Image

    from genailab_helpers.checkpoints import whole_folder
    from genailab_helpers.segmentation import SHIPPED, load_segmenter

    named = files[0].is_dir() or files[0].suffix == ".safetensors"
    model, files = (files[0], files[1:]) if named else (SHIPPED, files)
    segmenter = load_segmenter(model_file(model))
    if not files:
        raise ValueError(f"{model}: a model alone; expected the radiographs after it")
    [(name, n_files)] = Counter(file.stem for file in files).most_common(1)
    if n_files > 1:
        raise ValueError(f"{n_files} radiographs are called {name}; expected one of each name, since a mask "
                         "has that of its radiograph; run them apart, with another --output")
    with whole_folder(output) as folder:
        for file, image in readable(files):
            lungs = segmenter.predict(image[None])[0]
            Image.fromarray(lungs.numpy()).save(folder / f"{file.stem}.png")
            echo(f"{file}: lungs cover {lungs.float().mean():.0%} of the image")
        if not (n_masks := len(list(folder.iterdir()))):
            raise Exit(1)
    echo(f"{n_masks} masks in {output}. {NOT_FOR_DIAGNOSIS}")
    raise Exit(int(n_masks < len(files)))
