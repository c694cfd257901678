"""The `genailab` command. What a command needs is imported inside it, so that the help appears at once."""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

import typer

import genailab_helpers
from genailab_helpers.commands import classification, data, diffusion, lessons, segmentation
from genailab_helpers.commands.options import complain

app = typer.Typer(help="GenAI Lab: notebook lessons on medical-imaging AI. Not for diagnosis.",
                  add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
train_app = typer.Typer(help="Train a model and write it to a folder.", no_args_is_help=True)
for command in (lessons.run, diffusion.sample, diffusion.evaluate, classification.grade,
                classification.classify, segmentation.segment):
    app.command()(command)
for name, training in (("diffusion", diffusion.train), ("grader", classification.train_grader),
                       ("classifier", classification.train_classes), ("segmenter", segmentation.train)):
    train_app.command(name)(training)
app.add_typer(train_app, name="train")
app.add_typer(data.app, name="data")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a wrong input ends in one line on stderr and exit status 2.

    A fault of ours shows its traceback.

    Parameters
    ----------
    arguments : sequence of str, optional
        What was typed after `genailab`; by default that of this process.

    Raises
    ------
    SystemExit
        With the exit status, after a success too.
    """
    for stream in (sys.stdout, sys.stderr):  # a console or pipe that cannot write every letter
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")
    try:
        app(_join_parameters(sys.argv[1:] if arguments is None else arguments))
    except Exception as error:
        if not _is_on_purpose(error):
            raise
        complain(error)
        sys.exit(2)


def _is_on_purpose(error: Exception) -> bool:
    """Tell whether a `raise` in our code made this error, the file system, naming a file, or the network."""
    if isinstance(error, URLError) or (isinstance(error, OSError) and error.filename is not None):
        return True
    place = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(place.filename).is_relative_to(genailab_helpers.__path__[0])
    return ours and str(place.line).startswith("raise ")


def _join_parameters(arguments: Sequence[str]) -> list[str]:
    """Join each `-p NAME VALUE` to `-p NAME=VALUE`: typer has no option that takes two words and repeats.

    A `~` at the start of a path, also after `=`, is the home folder.
    """
    joined: list[str] = []
    for word in (re.sub(r"(^|=)~(?=/|$)", lambda m: m[1] + os.path.expanduser("~"), w) for w in arguments):
        if joined[-2:-1] == ["-p"] and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined
