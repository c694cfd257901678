"""The data sets under the names that the first document promised, and the recipe to add one."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from genailab_helpers.diffusion import datasets
from genailab_helpers.diffusion.datasets import ChestXRayDataset, SyntheticXRayDataset, get_dataset
from genailab_helpers.phantoms.chest import FINDINGS


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root with train and test, two classes each; the grey of an image tells which it is."""
    for i, (split, name) in enumerate([("train", "NORMAL"), ("train", "PNEUMONIA"), ("test", "NORMAL"),
                                       ("test", "PNEUMONIA")]):
        folder = tmp_path / "chest_xray" / split / name
        folder.mkdir(parents=True)
        for k in range(3):
            Image.new("L", (40, 40), 60 * i + 10 * k).save(folder / f"image{i}{k}.png")
    return tmp_path / "chest_xray"


def test_synthetic_as_promised() -> None:
    dataset = SyntheticXRayDataset(
        n_samples=12,
        img_size=128,
        seed=42
    )
    img = dataset[0]
    assert img.shape == (1, 128, 128)
    assert img.dtype == torch.float32
    assert -1 <= img.min() < img.max() <= 1
    assert len(dataset) == 12


def test_synthetic_defaults_are_the_promised_ones() -> None:
    given = inspect.signature(SyntheticXRayDataset).parameters
    assert [given[name].default for name in ("n_samples", "img_size", "seed")] == [1000, 128, 42]


def test_synthetic_prefix_and_seed() -> None:
    few, more = SyntheticXRayDataset(3, 32), SyntheticXRayDataset(9, 32)
    assert all(torch.equal(few[i], more[i]) for i in range(3))
    assert not torch.equal(few[0], SyntheticXRayDataset(3, 32, seed=43)[0])


def test_synthetic_labels() -> None:
    dataset = SyntheticXRayDataset(20, 32, labels=True)
    assert dataset.classes == list(FINDINGS)
    assert len(set(dataset.targets)) > 2
    for i in range(20):
        image, target = dataset[i]
        assert image.shape == (1, 32, 32)
        assert target == dataset.targets[i]


@pytest.mark.parametrize("img_size", [0, -1, 15, 3.5, True])
def test_impossible_sizes(img_size: Any, tree: Path) -> None:
    makers: list[Callable[[], Any]] = [lambda: SyntheticXRayDataset(2, img_size),
                                       lambda: ChestXRayDataset(tree / "train", img_size)]
    for make in makers:
        with pytest.raises(ValueError, match="img_size"):
            make()


def test_chest_folder_and_factory_as_promised(tree: Path) -> None:
    dataset = ChestXRayDataset(
        root_dir=str(tree / "train/NORMAL"),
        img_size=128
    )
    again = get_dataset(
        name='chest_xray',
        root_dir=str(tree / "train/NORMAL"),
        img_size=128
    )
    assert len(dataset) == len(again) == 3
    assert dataset[0].shape == (1, 128, 128)
    assert torch.equal(dataset[1], again[1])
    # grey 10 of 255 lies at 2 * 10 / 255 - 1
    assert float(dataset[1].mean()) == pytest.approx(2 * 10 / 255 - 1, abs=1e-6)


def test_chest_tree(tree: Path) -> None:
    dataset = ChestXRayDataset(tree / "train", 32, labels=True)
    assert len(dataset) == 6
    assert len(dataset.classes) == 2
    for image, target in (dataset[i] for i in range(6)):
        # images of the second folder start at grey 60
        second = float(image.mean()) >= 2 * 60 / 255 - 1.001
        assert dataset.classes[target] == ("Pneumonia" if second else "Normal")


def test_factory_and_loader_as_promised() -> None:
    synthetic_ds = get_dataset('synthetic', img_size=128, n_samples=4)
    assert synthetic_ds[3].shape == (1, 128, 128)
    dataset = get_dataset('synthetic', img_size=64, n_samples=6)
    dataloader = DataLoader(dataset, batch_size=4, shuffle=True)
    assert [batch.shape for batch in dataloader] == [(4, 1, 64, 64), (2, 1, 64, 64)]


def test_factory_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'mri'.*synthetic, chest_xray"):
        get_dataset("mri")
    with pytest.raises(TypeError, match="colour"):
        get_dataset("synthetic", colour=True)
    with pytest.raises(ValueError, match=tmp_path.name):
        get_dataset("chest_xray", root_dir=tmp_path)


def test_the_recipe_to_add_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING.md, "Add a data set": a class, its line in `_DATASETS`, and this check."""
    class FadingDataset(Dataset[Tensor]):
        def __init__(self, n_samples: int = 10, img_size: int = 128) -> None:
            grey = torch.linspace(-1, 1, n_samples)
            self.images = grey[:, None, None, None].expand(-1, 1, img_size, img_size)

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> Tensor:
            return self.images[index]

    monkeypatch.setitem(datasets._DATASETS, "fading", FadingDataset)
    dataset = get_dataset("fading", n_samples=4, img_size=32)
    image = dataset[3]
    assert image.shape == (1, 32, 32)
    assert image.dtype == torch.float32
    assert image.abs().max() <= 1
    with pytest.raises(ValueError, match="synthetic, chest_xray, fading"):
        get_dataset("mri")
