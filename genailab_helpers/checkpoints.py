"""Models in safetensors files, files and folders written whole or not at all, the cache, the device.

Everything is written under a temporary name beside its target and renamed when it is complete, so that a kill
or a full disk leaves either the old state or the new one, never half of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:  # commands that only write files start without torch
    import torch
    from torch import Tensor


def cache_folder(part: str = "") -> Path:
    """Return the folder of everything that can be computed again, made if it is absent, for its owner alone.

    Parameters
    ----------
    part : str, default ""
        A folder in it.

    Returns
    -------
    Path
        `$GENAILAB_CACHE` if that is set, else `genailab` under `$XDG_CACHE_HOME` or `~/.cache`.

    Raises
    ------
    FileNotFoundError
        If none is set and there is no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.path.expanduser(os.environ.get("GENAILAB_CACHE") or f"{base}/genailab"))
    if str(folder)[0] == "~":  # nobody by this number is known to the system, and HOME is not set
        raise FileNotFoundError(errno.ENOENT, "no home for a cache; set GENAILAB_CACHE", str(folder))
    for made in (folder, folder / part):
        made.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / part


@contextmanager
def whole_file(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to `path` when the block ends without an error.

    Parameters
    ----------
    path : str or Path
        The file to make or to replace. Missing parent folders are made.
    sync : bool, default True
        Whether it has to outlive a loss of power; a file of a cache need not.

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
    # A name that nobody can foresee; a part of the own one, which may take all of the 255 bytes allowed.
    temporary = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(6)}{path.suffix[-20:]}")
    try:
        with _naming(path):
            temporary.touch(path.stat().st_mode & 0o777 if path.is_file() else 0o666, exist_ok=False)
            yield temporary
            if sync:
                with temporary.open("rb+") as written:
                    os.fsync(written.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_cached(path: str | Path) -> bytes | None:
    """Return what `write_cached` wrote; None where the file is absent or its checksum is another."""
    with suppress(OSError):  # the cache may be emptied at any moment
        content = Path(path).read_bytes()
        if zlib.crc32(content[:-4]).to_bytes(4, "little") == content[-4:]:
            return content[:-4]
    return None


def write_cached(path: str | Path, content: bytes) -> None:
    """Write a file of the cache, for its owner alone, with a checksum at its end."""
    with whole_file(path, sync=False) as temporary:
        temporary.chmod(0o600)
        temporary.write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))


@contextmanager
def whole_folder(path: str | Path, disposable: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Give a temporary folder to fill; rename it to `path` when the block ends without an error.

    Parameters
    ----------
    path : str or Path
        The folder to make. It may exist if no file is in it.
    disposable : callable, optional
        Allows that a full folder is replaced: it is given the folder and raises an error if that holds
        anything that must stay. The old folder is moved aside, the new one takes its place, the old one is
        removed.

    Yields
    ------
    Path
        An empty folder beside `path`. What a killed run has left beside it is put back or removed first.

    Raises
    ------
    FileExistsError
        If `path` is a file, is a folder that holds anything and may not be replaced, or is being written by
        another process.
    OSError
        Whatever writing raised; the temporary folder is gone then and `path` is as it was.
    """
    path = Path(os.path.expanduser(path)).resolve()
    new, old = (path.with_name(f".{_short(path)}-{secrets.token_hex(6)}.{kind}") for kind in ("new", "old"))
    with _alone(path), _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        _check_free(path, disposable)
        try:
            new.mkdir()
            yield new
            _check_free(path, disposable)  # somebody else may have filled it meanwhile
            if path.exists():
                os.replace(path, old)
            os.replace(new, path)
        finally:
            _remove_leftovers(path)


def _short(path: Path) -> str:
    """Return a name to which more can be added: a name takes 255 bytes at most."""
    return f"{path.name[:40]}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}"


def _alone(path: Path) -> AbstractContextManager[object]:
    """Take the lock of a folder, to be held for a block; it ends with the process, however that ends."""
    lock = cache_folder("locks") / hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    try:
        return FileLock(lock, timeout=0).acquire()
    except Timeout:
        raise FileExistsError(f"{path}: another run is writing it; wait until it has ended, "
                              "or choose another folder") from None


def _remove_leftovers(path: Path) -> None:
    """Put back the old folder if the new one is not in its place, and remove what is left of both."""
    for left in path.parent.iterdir():
        ours = re.fullmatch(rf"\.{re.escape(_short(path))}-[0-9a-f]{{12}}\.(new|old)", left.name)
        if ours and not left.is_symlink():
            if left.suffix == ".old" and not path.exists():
                os.replace(left, path)
            shutil.rmtree(left, ignore_errors=True)


def _check_free(path: Path, disposable: Callable[[Path], None] | None) -> None:
    if holds_files(path):
        if disposable is None or path.is_file():
            raise FileExistsError(f"{path}: expected a new or empty folder; choose another")
        disposable(path)


def holds_files(path: Path) -> bool:
    """Tell whether a path is a file, or a folder with a file at any depth."""
    return path.is_file() or any(files for _, _, files in os.walk(path))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an error of the system the name of the target where it has none: that of a full disk, for one."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


class Checkpoint(NamedTuple):
    """What `load_checkpoint` reads."""

    tensors: dict[str, Tensor]
    recipe: dict[str, Any]


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], recipe: Mapping[str, Any],
                    half: bool = False) -> None:
    """Write tensors and the recipe that explains them into one safetensors file, whole or not at all.

    Parameters
    ----------
    path : str or Path
        The file to make or to replace. The recipe is in its header, so that one rename puts both in place.
    tensors : mapping of str to Tensor
        Any devices and shapes.
    recipe : mapping
        What is needed to build and to judge the model; anything that JSON can hold.
    half : bool, default False
        Store floating-point tensors of two or more axes in 16 bits.

    Raises
    ------
    TypeError
        If JSON cannot hold the recipe.
    OSError
        If the file cannot be written; an older one is as it was then.
    """
    from safetensors.torch import save

    def packed(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to("cpu", copy=True).contiguous()  # safetensors refuses shared memory
        return tensor.half() if half and tensor.is_floating_point() and tensor.ndim > 1 else tensor

    header = {"recipe": json.dumps(recipe, sort_keys=True)}
    data = save({name: packed(tensor) for name, tensor in tensors.items()}, metadata=header)
    with whole_file(path) as temporary:
        temporary.write_bytes(data)  # save_file would make a file that only its owner can read


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote. Nothing in the file is ever run.

    Parameters
    ----------
    path : str or Path
        The safetensors file.

    Returns
    -------
    Checkpoint
        `tensors`, on the CPU, and `recipe`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is truncated, is something else, or has no recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint; expected a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            recipe = json.loads(file.metadata()["recipe"])
            names = file.keys()
            return Checkpoint({name: file.get_tensor(name) for name in names}, {**recipe})
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: truncated, or no safetensors file with a recipe, as this project writes "
                         f"them ({type(error).__name__}: {error}); make or download it again") from error


def load_weights(module: torch.nn.Module, tensors: Mapping[str, Tensor], path: str | Path,
                 prefix: str = "") -> None:
    """Copy the tensors of a checkpoint into a module; say what differs if they do not fit.

    Parameters
    ----------
    module : nn.Module
        Receives the weights; unchanged if they do not fit.
    tensors : mapping of str to Tensor
        From `load_checkpoint`.
    path : str or Path
        Named in errors.
    prefix : str, default ""
        Only tensors whose name starts so are meant, and the rest of their name is the module's.

    Raises
    ------
    ValueError
        At the first tensor that is missing, unknown, of another shape, or not finite.
    """
    module.load_state_dict(fitting_weights(module, tensors, path, prefix))


def fitting_weights(module: torch.nn.Module, tensors: Mapping[str, Tensor], path: str | Path,
                    prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the names of a module, which may be on the device "meta".

    Parameters and errors are those of `load_weights`. On "meta" a module has shapes and takes no memory: so a
    recipe of a few bytes that asks for gigabytes is refused before they are taken.
    """
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    wanted = module.state_dict()
    for name in [*wanted, *found]:
        has, needs = (f"shape {tuple(side[name].shape)}" if name in side else "none"
                      for side in (found, wanted))
        if has != needs:
            raise ValueError(f"{path}: another architecture; first difference at {name}: "
                             f"the file has {has}, the model needs {needs}")
        if not found[name].isfinite().all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite; train again")
    return found


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any], name: str = "") -> str | None:
    """Return a clause that names the first field in which two recipes differ, or None if they agree.

    Parameters
    ----------
    found, wanted : mapping
        Recipes as JSON gives them; fields that only `found` has do not count.
    name : str, default ""
        Prefix of the field's name.
    """
    for key, value in wanted.items():
        other = found.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            if inner := first_difference(other, value, f"{name}{key}."):
                return inner
        elif other != value:
            return f"{name}{key} is {other!r} in the file and {value!r} here"
    return None


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """Return a device by its name.

    Parameters
    ----------
    name : str or torch.device, optional
        Such as "cpu" or "cuda"; None takes the best there is.

    Returns
    -------
    torch.device
        One that torch can use here.

    Raises
    ------
    RuntimeError
        If it is not there.
    """
    import torch

    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name is not None and torch.device(name).type not in ("cpu", best.type):
        raise RuntimeError(f"device={str(name)!r} is not available here: take device={best.type!r} or None")
    return torch.device(name or best)


def join_processes() -> Any:
    """Meet the other processes that `accelerate launch` or `torchrun` started; alone, there is one.

    Returns
    -------
    accelerate.PartialState
        Who is who. Has to be called before anything else of `accelerate`: where no device is found, it joins
        processors over gloo, which `accelerate` itself does only when told.
    """
    from accelerate import PartialState

    return PartialState(cpu=choose_device().type == "cpu")
