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
from collections.abc import Sequence
from types import ModuleType

MISSING_OPERATOR = "operator torchvision::nms does not exist"
_SCHEMAS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_libraries: list[object] = []  # a Library's definitions vanish with the object


class _RepairingLoader(importlib.abc.Loader):
    """Load torchvision natively; define the missing operators and load again if exactly that failed."""

    def __init__(self, native: importlib.abc.Loader) -> None:
        self.native = native

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.native.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.native.exec_module(module)
        except RuntimeError as error:
            if str(error) != MISSING_OPERATOR:
                raise
            for name in [n for n in sys.modules if n.startswith("torchvision.")]:
                del sys.modules[name]
            _define_missing_operators()
            self.native.exec_module(module)


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Wrap the loader of `torchvision` itself, and of nothing else."""

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RepairingLoader(spec.loader)
        return spec


def _define_missing_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)


def repair_on_import() -> None:
    """Arrange that the first `import torchvision` of this process is repaired if it needs to be."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _TorchvisionFinder) for f in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())
