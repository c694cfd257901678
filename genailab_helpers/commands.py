"""The `genailab` command. What a command needs is imported inside it, so that the help appears at once."""

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import genailab_helpers

if TYPE_CHECKING:
    from tqdm import tqdm

app = typer.Typer(help="GenAI Lab: five notebook lessons on medical-imaging AI. Not for diagnosis.",
                  add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def genailab() -> None:
    """Keep `run` a command of its own: typer drops the name of an only command."""


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
    if given.get("DATA") not in (None, "None"):
        from genailab_helpers.datasets.folders import list_radiographs

        list_radiographs(Path(given["DATA"]).expanduser())


def _check_output(output: Path) -> None:
    """Refuse a folder that cannot be written now, not after minutes of lessons."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise OSError(f"{output}: expected a folder to write to ({error.strerror}); "
                      "choose another with --output") from error


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
    """Join each `-p NAME VALUE` to `-p NAME=VALUE`: typer has no option that takes two words and repeats."""
    words = iter(arguments)
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
    except (ValueError, OSError) as error:
        _complain(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
