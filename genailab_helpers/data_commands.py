"""`genailab data`: from a raw folder to splits by patient. What a command needs is imported inside it."""

from pathlib import Path
from typing import Annotated

import typer

CACHES = ("images", "features", "locks")  # what the cache holds besides downloads

data_app = typer.Typer(help="Prepare, audit and get folders of radiographs.", no_args_is_help=True)

_Input = Annotated[Path, typer.Option("--input", help="Folder of images; it stays as it is.")]
_Output = Annotated[Path, typer.Option(help="New or empty folder for the result.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
_Replace = Annotated[bool, typer.Option("--replace", help="Replace what the output holds.")]
_Classes = Annotated[str | None, typer.Option(help="Names with commas between them, such as Normal,COVID.")]
_Pattern = Annotated[str | None, typer.Option(
    help="Regular expression that finds the patient in a file name; its first group counts.",
)]


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


@data_app.command()
def create(
    preset: Annotated[str | None, typer.Option(help="spine, covid or chest.")] = None,
    classes: _Classes = None,
    output: _Output = Path("dataset"),
    dry_run: _DryRun = False,
) -> None:
    """Make the empty tree {train,val,test}/CLASS."""
    from genailab_helpers.datasets.names import PRESETS
    from genailab_helpers.datasets.preparation import create_structure

    if (preset is None) == (classes is None) or (preset and preset not in PRESETS):
        raise ValueError(f"expected either --preset with one of {', '.join(PRESETS)}, or --classes; "
                         f"got --preset {preset} and --classes {classes}")
    typer.echo(create_structure(output, PRESETS[preset] if preset else _names(classes), dry_run))


@data_app.command()
def organize(
    source: _Input,
    output: _Output,
    table: Annotated[Path | None, typer.Option(
        help="CSV with a column for the file, and class and patient where it has them.",
    )] = None,
    classes: _Classes = None,
    dry_run: _DryRun = False,
    replace: _Replace = False,
) -> None:
    """Copy the images of a raw tree into class folders; list what has no class."""
    from genailab_helpers.datasets import index, preparation

    images = index.index_images(source, table)
    typer.echo(preparation.organize(images, output, _names(classes) or None, dry_run, replace))


@data_app.command()
def preprocess(
    source: _Input,
    output: _Output,
    img_size: Annotated[int, typer.Option(help="Side of the images in pixels, at least 16.")] = 256,
    fit: Annotated[str, typer.Option(
        help="letterbox (black bars), squash (aspect lost) or crop (middle square).",
    )] = "letterbox",
    dry_run: _DryRun = False,
    replace: _Replace = False,
) -> None:
    """Write every image as a square grey 8-bit PNG."""
    from genailab_helpers.datasets import index, preparation

    images = index.index_images(source)
    typer.echo(preparation.preprocess(images, output, img_size, fit, dry_run, replace))  # type: ignore[arg-type]


@data_app.command()
def split(
    source: _Input,
    output: _Output,
    ratios: Annotated[str, typer.Option(help="Shares of train, val and test.")] = "0.7,0.15,0.15",
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 42,
    mode: Annotated[str, typer.Option(help="copy, link (hard links) or manifest (only films.csv).")] = "copy",
    patient_pattern: _Pattern = None,
    patients: Annotated[Path | None, typer.Option(help="CSV with file and patient.")] = None,
    near_duplicates: Annotated[bool, typer.Option(
        help="Whether images that look the same go to one split, as equal files do.",
    )] = True,
    dry_run: _DryRun = False,
    replace: _Replace = False,
) -> None:
    """Divide class folders into train, val and test by patient."""
    from genailab_helpers.datasets import index, preparation

    try:
        shares = [float(share) for share in _names(ratios)]
    except ValueError:
        raise ValueError(f"--ratios {ratios}: expected three numbers such as 0.7,0.15,0.15") from None
    images = index.index_images(source, patients, patient_pattern)
    typer.echo(preparation.split(images, output, shares, seed, mode, near_duplicates,  # type: ignore[arg-type]
                                 dry_run, replace))


@data_app.command()
def label(
    source: _Input,
    output: Annotated[Path | None, typer.Option(help="By default dataset.json in the input.")] = None,
    dry_run: _DryRun = False,
    replace: _Replace = False,
) -> None:
    """Write the label file dataset.json of StyleGAN2-ADA."""
    from genailab_helpers.datasets import index, preparation

    typer.echo(preparation.write_labels(index.index_images(source), output, dry_run, replace))


@data_app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.")],
    table: Annotated[Path | None, typer.Option(help="CSV that should name images of the folder.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the report.")] = None,
    patient_pattern: _Pattern = None,
    classes: _Classes = None,
) -> None:
    """Audit a folder of images; exit status 1 if there are errors."""
    from genailab_helpers.checkpoints import whole_file
    from genailab_helpers.datasets.audit import audit_images
    from genailab_helpers.datasets.index import index_images

    if json_file and json_file.exists() and not json_file.read_bytes().startswith(b'{\n "root_dir"'):
        raise FileExistsError(f"{json_file}: exists and is no report of this command; choose another name")
    report = audit_images(index_images(folder, table, patient_pattern), _names(classes) or None)
    typer.echo(report)
    if json_file:
        with whole_file(json_file) as path:
            path.write_text(report.to_json() + "\n", encoding="utf-8")
    if not report.ok:
        raise typer.Exit(1)


@data_app.command()
def download(
    name: Annotated[str | None, typer.Argument(
        metavar="NAME", help="chest, covid, pneumoniamnist, or spine for how to get such images.",
    )] = None,
    kaggle: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Any public Kaggle set.")] = None,
    output: Annotated[Path, typer.Option(help="New or empty folder for the images.")] = Path("raw_data"),
) -> None:
    """Get a public set and check its counts against its card."""
    from genailab_helpers.datasets import download as sets

    if name in sets.CARDS and name not in sets.DOWNLOADS:
        typer.echo(sets.cards(name))
        raise ValueError(f"{name}: has to be fetched by hand; the steps stand above")
    typer.echo(sets.download(name, output, kaggle))


@data_app.command()
def cards(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One set; all if not given.")] = None,
) -> None:
    """Show what is known about the public sets: origin, licence, counts, faults."""
    from genailab_helpers.datasets import download as sets

    typer.echo(sets.cards(name))


@data_app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Empty it.")] = False,
) -> None:
    """Say where decoded images and features are kept, and how much they take; they may show patients."""
    import shutil

    from genailab_helpers.checkpoints import cache_folder

    folders = [cache_folder() / name for name in CACHES]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    for folder in folders if clear else ():
        shutil.rmtree(folder, ignore_errors=True)
    typer.echo(f"{cache_folder()}: {size / 1e6:,.0f} MB" + " emptied" * clear)
