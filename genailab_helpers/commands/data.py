"""`genailab data`: from a raw folder to splits by patient. What a command needs is imported inside it."""

import shutil
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option, Typer, echo

from genailab_helpers.commands.options import Output, Pattern, Seed, Table, write_text

CACHES = ("images", "features", "locks")  # what the cache holds besides downloads

_Input = Annotated[Path, Option("--input", help="Folder of images; it stays as it is.")]
_DryRun = Annotated[bool, Option("--dry-run", help="Say what would be done; write nothing.")]
_Replace = Annotated[bool, Option("--replace", help="Replace what an earlier run has written there.")]
_Preset = Annotated[str | None, Option(help="spine, covid or chest.")]
_Classes = Annotated[str | None, Option(help="Names with commas between them, such as Normal,COVID.")]
_Size = Annotated[int, Option(help="Side of the images in pixels, at least 16.")]
_Fit = Annotated[str, Option(help="letterbox (black bars), squash (aspect lost) or crop (middle square).")]
_Ratios = Annotated[str, Option(help="Fractions of train, val and test.")]
_Mode = Annotated[str, Option(help="copy, link (hard links) or manifest (only films.csv).")]
_Patients = Annotated[Path | None, Option("--patients", "--table", help="CSV that names files and patients.")]
_Near = Annotated[bool, Option(help="Put images that look the same into one split, as equal files.")]
_Labels = Annotated[Path | None, Option(help="By default dataset.json in the input.")]
_Folder = Annotated[Path, Argument(metavar="DIR", help="Folder of images.")]
_Json = Annotated[Path | None, Option("--json", help="File for the report.")]
_Set = Annotated[str | None, Argument(metavar="NAME", help="chest, covid, pneumoniamnist, or spine.")]
_Kaggle = Annotated[str | None, Option(metavar="OWNER/NAME", help="Any public Kaggle set.")]
_From = Annotated[Path | None, Option(
    "--from", metavar="FILE", help="pneumoniamnist_128.npz, fetched elsewhere; needs no network.")]

app = Typer(help="Prepare, audit and get folders of radiographs.", no_args_is_help=True)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


@app.command()
def create(preset: _Preset = None, classes: _Classes = None, output: Output = Path("dataset"),
           dry_run: _DryRun = False) -> None:
    """Make the empty tree {train,val,test}/CLASS."""
    from genailab_helpers.datasets import names, preparation

    if (preset is None) == (classes is None) or (preset and preset not in names.PRESETS):
        raise ValueError(f"expected either --preset with one of {', '.join(names.PRESETS)}, or --classes; "
                         f"got --preset {preset} and --classes {classes}")
    wanted = names.PRESETS[preset] if preset else _names(classes)
    echo(preparation.create_structure(output, wanted, dry_run))


@app.command()
def organize(source: _Input, output: Output, table: Table = None, classes: _Classes = None,
             dry_run: _DryRun = False, replace: _Replace = False) -> None:
    """Copy the images of a raw tree into class folders; list what has no class."""
    from genailab_helpers.datasets import index, preparation

    images = index.index_images(source, table)
    echo(preparation.organize(images, output, _names(classes) or None, dry_run, replace))


@app.command()
def preprocess(source: _Input, output: Output, img_size: _Size = 256, fit: _Fit = "letterbox",
               dry_run: _DryRun = False, replace: _Replace = False) -> None:
    """Write every image as a square grey 8-bit PNG."""
    from genailab_helpers.datasets import index, preparation

    images = index.index_images(source)
    echo(preparation.preprocess(images, output, img_size, fit, dry_run, replace))  # type: ignore[arg-type]


@app.command()
def split(source: _Input, output: Output, ratios: _Ratios = "0.7,0.15,0.15", seed: Seed = 42,
          mode: _Mode = "copy", patient_pattern: Pattern = None, patients: _Patients = None,
          near_duplicates: _Near = True, dry_run: _DryRun = False, replace: _Replace = False) -> None:
    """Divide class folders into train, val and test by patient."""
    from genailab_helpers.datasets import index, preparation

    try:
        fractions = [float(fraction) for fraction in _names(ratios)]
    except ValueError:
        raise ValueError(f"--ratios {ratios}: expected three numbers such as 0.7,0.15,0.15") from None
    images = index.index_images(source, patients, patient_pattern)
    echo(preparation.split(images, output, fractions, seed, mode,  # type: ignore[arg-type]
                           near_duplicates, dry_run, replace))


@app.command()
def label(source: _Input, output: _Labels = None, dry_run: _DryRun = False,
          replace: _Replace = False) -> None:
    """Write the label file dataset.json of StyleGAN2-ADA."""
    from genailab_helpers.datasets import index, preparation

    echo(preparation.write_labels(index.index_images(source), output, dry_run, replace))


@app.command()
def verify(folder: _Folder, table: Table = None, json_file: _Json = None, patient_pattern: Pattern = None,
           classes: _Classes = None) -> None:
    """Audit a folder of images; exit status 1 if there are errors."""
    from genailab_helpers.datasets import audit, index

    if json_file and json_file.exists() and not json_file.read_bytes().startswith(b'{\n "root_dir"'):
        raise FileExistsError(f"{json_file}: exists and is no report of this command; choose another name")
    report = audit.audit_images(index.index_images(folder, table, patient_pattern), _names(classes) or None)
    echo(report)
    if json_file:
        write_text(json_file, report.to_json() + "\n")
    if not report.ok:
        raise Exit(1)


@app.command()
def download(name: _Set = None, kaggle: _Kaggle = None, output: Output = Path("raw_data"),
             file: _From = None) -> None:
    """Get a public set and check its counts against its card."""
    from genailab_helpers.datasets import download as sets

    echo(sets.download(name, output, kaggle, file))


@app.command()
def cards(name: _Set = None) -> None:
    """Show what is known about one or all public sets: origin, licence, counts, faults."""
    from genailab_helpers.datasets import download as sets

    echo(sets.cards(name))


@app.command()
def cache(clear: Annotated[bool, Option("--clear", help="Empty it.")] = False) -> None:
    """Say where decoded images and features are kept, and how much they take; they may show patients."""
    from genailab_helpers.checkpoints import cache_folder

    folders = [cache_folder() / name for name in CACHES]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    for folder in folders if clear else ():
        shutil.rmtree(folder, ignore_errors=True)
    echo(f"{cache_folder()}: {size / 1e6:,.0f} MB" + " emptied" * clear)
