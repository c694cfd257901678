"""Write whole or not at all, and know where caches live.

Everything is written under a temporary name beside its target and renamed when it is complete, so that a kill or
a full disk leaves either the old state or the new one, never half of it.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of everything that can be computed again, made if it is absent.

    Returns
    -------
    Path
        `$GENAILAB_CACHE` if that is set, else `genailab` under `$XDG_CACHE_HOME` or `~/.cache`.
    """
    named = os.environ.get("GENAILAB_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(named) if named else Path(base) / "genailab"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to `path` when the block ends without an error.

    Parameters
    ----------
    path : str or Path
        The file to make or to replace. Missing parent folders are made.

    Yields
    ------
    Path
        A name in the same folder and with the same suffix, so that the rename is atomic and formats that are
        told from the suffix come out right.

    Raises
    ------
    OSError
        Whatever writing raised (a full disk, no permission); the temporary file is gone then and `path` is as
        it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files that only their owner can read
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to fill; rename it to `path` when the block ends without an error.

    Parameters
    ----------
    path : str or Path
        The folder to make. It may exist if it is empty.

    Yields
    ------
    Path
        An empty folder beside `path`.

    Raises
    ------
    FileExistsError
        If `path` is a file or a folder that is not empty: nothing is mixed with what is already there.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: expected a new or empty folder; choose another name or remove this one first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
