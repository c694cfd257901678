"""What all phantoms share: bodies drawn at random, a key for each image, and images drawn in batches."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

_CLIP = 2.2  # standard deviations; keeps every body a possible one


def vary(mean: float, spread: float, *shape: int) -> Any:
    """Declare a field of an anatomy with its distribution: normal, cut at 2.2 standard deviations."""
    return dataclasses.field(metadata={"mean": mean, "spread": spread, "shape": shape})


@dataclass(frozen=True)
class Anatomy:
    """A batch of N bodies, every field a tensor whose first axis is N.

    Use `changed` to move something, and indexing to take some of the bodies.
    """

    keys: Tensor  # (N, 2) int64, seed and number of each image

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Self:
        return type(self)(**{name: values[index] for name, values in vars(self).items()})

    def changed(self, **values: Tensor | float) -> Self:
        """Return a copy with some fields set, one number for all bodies or a tensor."""
        fields = {}
        for name, value in values.items():
            like = getattr(self, name)
            fields[name] = torch.as_tensor(value, dtype=like.dtype).expand(like.shape)
        return dataclasses.replace(self, **fields)


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
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {number!r}")
    varied = {f.name: f.metadata for f in dataclasses.fields(kind) if f.metadata}
    sizes = [int(np.prod(field["shape"])) for field in varied.values()]
    uniform, normal = np.empty((n_samples, n_uniform)), np.empty((n_samples, sum(sizes)), np.float32)
    bits = np.random.Philox(key=[seed, 0])
    generator, start = np.random.Generator(bits), bits.state
    for i in range(n_samples):
        start["state"]["key"][1], bits.state = i, start  # a third of the time of a new generator
        uniform[i] = generator.random(n_uniform)
        normal[i] = generator.standard_normal(sum(sizes), np.float32)
    columns = torch.from_numpy(normal.clip(-_CLIP, _CLIP)).split(sizes, dim=1)
    fields = {name: field["mean"] + field["spread"] * column.reshape(n_samples, *field["shape"])
              for (name, field), column in zip(varied.items(), columns, strict=True)}
    return fields | {"keys": torch.tensor([[seed, i] for i in range(n_samples)])}, uniform


class Render(NamedTuple):
    """Rendered bodies.

    Attributes
    ----------
    images : Tensor
        (N, 1, H, W) float32 in [-1, 1].
    masks : dict of str to Tensor
        (N, H, W) bool for each thing whose place is known; empty unless masks were asked for.
    """

    images: Tensor
    masks: dict[str, Tensor]


@cache
def _keep_memory() -> None:
    """Teach the C library to keep 64 MB that were freed, once: that saves a fifth of the time."""
    torch.empty(8_000_000)


def draw_batches(anatomy: Anatomy, draw: Callable[[slice], tuple[Tensor, dict[str, Tensor]]],
                 n_rays: int, batch_size: int | None) -> Render:
    """Draw images (N, H, W) and masks of some rows of bodies at a time, and join them.

    On the CPU every batch has its own thread, which does better than many threads for each small operation;
    the caller's number of threads is left as it was. Without a `batch_size` a batch has 491,520 rays, n_rays
    a side and body: enough to hide what each step costs at least, and few enough for the processor's cache.
    """
    _keep_memory()
    if batch_size is None:
        batch_size = max(1, 491_520 // n_rays**2)
    ends = np.linspace(0, len(anatomy), 1 + -(-len(anatomy) // batch_size)).round().astype(int).tolist()
    batches = [slice(*pair) for pair in itertools.pairwise(ends)]
    slopes = torch.is_grad_enabled() and any(values.requires_grad for values in vars(anatomy).values())
    draw, n_threads = draw if slopes else torch.inference_mode()(draw), torch.get_num_threads()
    if slopes or n_threads == 1:
        parts = [draw(batch) for batch in batches]
    else:
        try:
            with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                torch.set_num_threads(1)
                # The first batch is drawn alone: libraries set themselves up at their first call, and two
                # threads that made it together were seen to get other last digits, about once in 200 starts.
                parts = [draw(batches[0]), *pool.map(draw, batches[1:])]
        finally:
            torch.set_num_threads(n_threads)  # what a worker sets is also the default of threads yet to come
    images, masks = zip(*parts, strict=True)  # `cat` frees them of the inference mode, `pop` the memory
    return Render(torch.cat(images)[:, None],
                  {name: torch.cat([part.pop(name) for part in masks]) for name in list(masks[0])})
