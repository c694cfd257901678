"""Where the images of a lesson come from: phantoms, or a folder that the reader names."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor
from torch.utils.data import Subset

from genailab_helpers.datasets.folders import OnUnreadable
from genailab_helpers.diffusion.datasets import ChestXRayDataset, SyntheticXRayDataset


class ChestParts(NamedTuple):
    """Images to train on and images held out, none of the same patient.

    Attributes
    ----------
    images, held_out : Tensor
        (N, 1, H, W) in [-1, 1].
    labels : Tensor
        (N,) class of each image to train on.
    classes : list of str
        Names of the classes.
    kind : str
        "phantoms" or "real".
    """

    images: Tensor
    labels: Tensor
    held_out: Tensor
    classes: list[str]
    kind: str


def chest_parts(folder: str | Path | None, img_size: int, n_train: int, n_held_out: int, seed: int,
                labels: bool = False, on_unreadable: OnUnreadable = "stop") -> ChestParts:
    """Read a folder of chest radiographs, or render phantoms where `folder` is None.

    Without `labels`, phantoms are normal chests. A folder with `train` and `test` keeps this split; of any
    other, 30 % of the patients are held out.
    """
    if folder is None:
        parts: list[Any] = [SyntheticXRayDataset(n, img_size, seed + k, labels=labels)
                            for k, n in enumerate((n_train, n_held_out))]
        return ChestParts(parts[0].images, torch.tensor(parts[0].targets), parts[1].images, parts[0].classes,
                          "phantoms")
    root = Path(folder)
    if (root / "train").is_dir():
        parts = [ChestXRayDataset(root / part, img_size, None, True, on_unreadable)
                 for part in ("train", "test")]
        classes = parts[0].classes
    else:
        whole = ChestXRayDataset(root, img_size, None, True, on_unreadable)
        split = next(GroupShuffleSplit(1, test_size=0.3, random_state=seed).split(
            whole.patients, groups=whole.patients))
        parts, classes = [Subset(whole, rows.tolist()) for rows in split], whole.classes
    (images, targets), (held_out, _) = ([torch.stack(images), torch.tensor(targets)]
                                        for images, targets in (zip(*part, strict=True) for part in parts))
    return ChestParts(images, targets, held_out, classes, "real")
