"""Write whole or not at all, and know where caches live.

Everything is written under a temporary name beside its target and renamed when it is complete, so that a kill
or a full disk leaves either the old state or the new one, never half of it.
"""

import errno
import os
import secrets
import shutil
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
        Whatever writing raised: no permission, or a full disk, whose error names `path`. The temporary file
        is gone then and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _explain_full_disk(error, path)
        raise
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
    OSError
        Whatever writing raised; the temporary folder is gone then and `path` is as it was.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: expected a new or empty folder; choose another or remove this one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rmdir()  # Windows renames onto no folder; a folder filled in the meantime stops it here
        os.replace(temporary, path)
    except OSError as error:
        _explain_full_disk(error, path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """Return a hidden name that nobody else uses, in the same folder and with the same suffix."""
    return path.with_name(f".{path.stem}-{secrets.token_hex(6)}{path.suffix}")


def _explain_full_disk(error: OSError, path: Path) -> None:
    """Raise the error of a full disk again with the name of the target, which the system does not give."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason = f"no room to write, nothing was changed ({os.strerror(error.errno)})"
        raise OSError(error.errno, reason, str(path)) from error
