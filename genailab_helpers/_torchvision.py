"""Let a torchvision wheel built for CUDA work beside a CPU build of torch.

`import torchvision` then stops with "operator torchvision::nms does not exist", because the wheel's compiled
operators cannot be loaded and the Python part registers shapes for them (pytorch #122494, vision #8985).
Defining the two missing schemas lets the Python part (transforms, datasets, models, utils) load. The compiled
operators themselves (`ops.nms`, `io.read_image`) stay unavailable.

The native import is always tried first, nothing is changed where it works, and any other error passes
through.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

MISSING_OPERATOR = "operator torchvision::nms does not exist"
_OPERATORS = ("nms", "qnms")
_libraries: list[object] = []  # a Library's definitions vanish with the object


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Have `torchvision` itself, and nothing else, loaded by `_load`."""

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == "torchvision" else None
        if spec and spec.loader:
            spec.loader.exec_module = partial(_load, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _load(native: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Load torchvision natively; define the missing operators and load again if exactly that failed."""
    try:
        native(module)
    except RuntimeError as error:
        if str(error) != MISSING_OPERATOR:
            raise
        import torch

        _libraries.append(library := torch.library.Library("torchvision", "FRAGMENT"))
        for name in _OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.startswith("torchvision.")]:
            del sys.modules[name]
        native(module)


sys.meta_path.insert(0, _TorchvisionFinder())
