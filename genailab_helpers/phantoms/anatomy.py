"""What all phantoms share: bodies drawn at random, a key for each film, and films drawn in batches."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

_CLIP = 2.2  # standard deviations; keeps every body a possible one


def vary(mean: Any, spread: float, *shape: int) -> Any:
    """Declare a field of an anatomy with its distribution: normal, cut at 2.2 standard deviations."""
    return dataclasses.field(metadata={"mean": mean, "spread": spread, "shape": shape})


def given() -> Any:
    """Declare a field that is not drawn from a normal distribution."""
    return dataclasses.field(metadata={})


@dataclass(frozen=True)
class Anatomy:
    """A batch of N bodies, every field a tensor whose first axis is N.

    Use `changed` to move something, and indexing to take some of the bodies.
    """

    keys: Tensor = dataclasses.field(kw_only=True)  # (N, 2) int64, seed and number of each film

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Self:
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})

    def changed(self, **values: Tensor | float) -> Self:
        """Return a copy with some fields set, one number for all bodies or a tensor.

        Raises
        ------
        ValueError
            If there is no such field.
        """
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(known)}")
            old = known[name]
            known[name] = torch.as_tensor(value, dtype=old.dtype, device=old.device).expand(old.shape)
        return type(self)(**known)

    @property
    def requires_grad(self) -> bool:
        """Whether films drawn now must be differentiable."""
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return torch.is_grad_enabled() and any(value.requires_grad for value in values)

    def to(self, device: str | torch.device) -> Self:
        """Return a copy on another device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})


def draw_fields(kind: type[Anatomy], n_samples: int, seed: int,
                n_uniform: int) -> tuple[dict[str, Tensor], np.ndarray]:
    """Draw what varies in `n_samples` bodies; body i depends on `seed` and i alone.

    Parameters
    ----------
    kind : type
        The anatomy, whose fields carry their distributions.
    n_samples : int
        At least 1.
    seed : int
        At least 0.
    n_uniform : int
        How many uniform numbers a body needs besides.

    Returns
    -------
    fields : dict of str to Tensor
        Every field declared with `vary`, and `keys`.
    uniform : numpy.ndarray
        (N, n_uniform) float64 in [0, 1).

    Raises
    ------
    ValueError
        For numbers out of range.
    """
    for name, number, least in (("n_samples", n_samples, 1), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {number!r}")
    random_fields = [f for f in dataclasses.fields(kind) if f.metadata]
    shapes = [f.metadata["shape"] for f in random_fields]
    sizes = [int(np.prod(shape)) for shape in shapes]
    normal = np.empty((n_samples, sum(sizes)), dtype=np.float32)
    uniform = np.empty((n_samples, n_uniform))
    for i in range(n_samples):
        generator = np.random.Generator(np.random.Philox(key=[seed, i]))
        uniform[i] = generator.random(n_uniform)
        generator.standard_normal(out=normal[i], dtype=np.float32)
    columns = np.split(normal.clip(-_CLIP, _CLIP), np.cumsum(sizes)[:-1], axis=1)
    fields: dict[str, Tensor] = {}
    for field, shape, column in zip(random_fields, shapes, columns, strict=True):
        mean = torch.tensor(field.metadata["mean"], dtype=torch.float32)
        spread = torch.from_numpy(np.ascontiguousarray(column)).reshape(n_samples, *shape)
        fields[field.name] = mean + field.metadata["spread"] * spread
    fields["keys"] = torch.stack([torch.full((n_samples,), seed), torch.arange(n_samples)], dim=1)
    return fields, uniform


def draw_batches(anatomy: Anatomy, draw: Callable[[slice], tuple[Tensor, dict[str, Tensor]]],
                 batch_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw films `batch_size` at a time, and join the images and the masks.

    On the CPU every batch has its own thread, which does better than many threads for each small operation;
    the caller's number of threads is left as it was.
    """
    batches = [slice(i, i + batch_size) for i in range(0, len(anatomy), batch_size)]
    n_threads = torch.get_num_threads()
    if n_threads == 1 or len(batches) == 1 or anatomy.keys.device.type != "cpu" or anatomy.requires_grad:
        parts = [draw(batch) for batch in batches]
    else:
        def draw_alone(batch: slice) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                return draw(batch)

        # The first batch is drawn alone: libraries set themselves up at their first call, and two threads
        # that made it together were seen to get other last digits, about once in 200 starts.
        parts = [draw_alone(batches[0])]
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts += pool.map(draw_alone, batches[1:])
        torch.set_num_threads(n_threads)  # what a worker sets is also the default of threads yet to come
    return (torch.cat([images for images, _ in parts]),
            {name: torch.cat([masks[name] for _, masks in parts]) for name in parts[0][1]})
