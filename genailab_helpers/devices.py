"""Where to compute: the best device there is, and the processes that were started with this one."""

import torch
from accelerate import PartialState


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
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = best if name is None else torch.device(name)
    if device.type not in ("cpu", best.type):
        raise RuntimeError(f"device={str(name)!r} is not available here: take device={best.type!r} or None")
    return device


def join_processes() -> PartialState:
    """Meet the other processes that `accelerate launch` or `torchrun` started; alone, there is one.

    Returns
    -------
    PartialState
        Who is who. Has to be called before anything else of `accelerate`: where no device is found, it joins
        processors over gloo, which `accelerate` itself does only when told.
    """
    return PartialState(cpu=choose_device().type == "cpu")
