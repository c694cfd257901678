"""Data sets for diffusion training under the promised names: a front over phantoms and image folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor
from torch.utils.data import Dataset

from genailab_helpers.datasets.folders import OnUnreadable, RadiographFolder
from genailab_helpers.phantoms.chest import FINDINGS, render_chests, sample_chests


class SyntheticXRayDataset(Dataset[Any]):
    """Chest phantoms, all drawn when the data set is made.

    Parameters
    ----------
    n_samples : int, default 1000
        Number of images. The first ten of 1,000 are those of `n_samples=10`.
    img_size : int, default 128
        Side in pixels, at least 16.
    seed : int, default 42
        Image i depends on `seed` and i alone.
    labels : bool, default False
        Whether items are pairs (image, class). The images then show all findings, else normal chests.

    Attributes
    ----------
    classes : list of str
        The findings, in the order of the class numbers.
    targets : list of int
        Class of each image.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    def __init__(self, n_samples: int = 1000, img_size: int = 128, seed: int = 42,
                 labels: bool = False) -> None:
        anatomy = sample_chests(n_samples, seed, FINDINGS if labels else "Normal")
        self.images = render_chests(anatomy, img_size).images
        self.classes, self.targets, self.labels = list(FINDINGS), anatomy.finding.tolist(), labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        """Return image (1, H, W) in [-1, 1], or with `labels=True` image and class."""
        return (self.images[index], self.targets[index]) if self.labels else self.images[index]


class ChestXRayDataset(RadiographFolder):
    """Images of one class folder or of a tree of class folders.

    Parameters
    ----------
    root_dir : str, Path or pandas.DataFrame
        A folder of images or of class folders, or its table; see `RadiographFolder`, which decodes each once.
    img_size : int, default 128
        Side in pixels, at least 16.
    transform : callable, optional
        Applied to each image when it is taken.
    labels : bool, default False
        Whether items are pairs (image, class).
    on_unreadable : {"stop", "skip"}, default "stop"
        Whether an image that cannot be read ends the reading or is left out with a warning.

    Attributes
    ----------
    classes : list of str
        Class names, in the order of the class numbers.
    targets : list of int
        Class of each image.
    patients : list of str
        Patient of each image.

    Raises
    ------
    UnreadableRadiographError
        With "stop": names the image.
    ValueError
        If the folder holds no radiographs or `img_size` is out of range.
    """

    def __init__(self, root_dir: str | Path | pd.DataFrame, img_size: int = 128,
                 transform: Callable[[Tensor], Any] | None = None, labels: bool = False,
                 on_unreadable: OnUnreadable = "stop") -> None:
        super().__init__(root_dir, img_size, transform, on_unreadable)
        self.labels = labels

    def __getitem__(self, index: int) -> Any:
        """Return image (1, H, W) in [-1, 1], or with `labels=True` image and class."""
        image, target = super().__getitem__(index)
        return (image, target) if self.labels else image


_DATASETS: dict[str, Callable[..., Dataset[Any]]] = {
    "synthetic": SyntheticXRayDataset,
    "chest_xray": ChestXRayDataset,
}


def get_dataset(name: str, **arguments: Any) -> Dataset[Any]:
    """Make a data set by name.

    Parameters
    ----------
    name : str
        "synthetic" or "chest_xray".
    **arguments
        For the class behind the name, for example `img_size=128, n_samples=1000` or `root_dir="images"`.

    Returns
    -------
    Dataset
        Items are images (1, H, W) in [-1, 1], with `labels=True` pairs (image, class).

    Raises
    ------
    ValueError
        For an unknown name.
    TypeError
        For an argument that the class does not take.
    """
    if name not in _DATASETS:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(_DATASETS)}")
    return _DATASETS[name](**arguments)
