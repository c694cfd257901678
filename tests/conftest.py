"""Fixtures that every room's tests share."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from genailab_helpers.commands import main


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real films for tests, named by GENAILAB_REAL_DATA; skips where it is absent."""
    folder = os.environ.get("GENAILAB_REAL_DATA", "")
    if not folder:
        pytest.skip("GENAILAB_REAL_DATA is not set: tests on real films need a folder of them")
    if not Path(folder).is_dir():
        pytest.skip(f"GENAILAB_REAL_DATA={folder} is no folder: tests on real films need one")
    return Path(folder)


@pytest.fixture
def pinned() -> None:
    """Skip a comparison with recorded pictures where another release than the pinned one draws them."""
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for package in ("matplotlib", "pillow"):
        if version(package) != pins[package]:
            pytest.skip(f"{package} {version(package)}: what is recorded holds for {pins[package]}")


@pytest.fixture(scope="module")
def load_script() -> Callable[[str], ModuleType]:
    """Give the function that imports a script of benchmarks/ by its name."""
    folder = Path(__file__).parents[1] / "benchmarks"

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path.insert(0, str(folder))  # as for a script: it imports what lies beside it
        spec.loader.exec_module(module)
        sys.path.pop(0)
        return module

    return load


class Command:
    """The command line in this process; typer ends even a success with SystemExit."""

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Give exit status, stdout and stderr."""
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, \
                pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return int(end.value.code or 0), out.getvalue(), err.getvalue()

    def run(self, *arguments: object) -> str:
        """Run what must succeed, and give back what it says."""
        status, out, err = self(*arguments)
        assert status == 0, err
        return out

    def refuse(self, *arguments: object) -> str:
        """Run what must end with exit status 2, and give back its one line on stderr."""
        status, _, err = self(*arguments)
        assert status == 2, err
        [line] = [line for line in err.splitlines() if line]
        assert line.startswith("genailab: ")
        return line


@pytest.fixture(scope="session")
def genailab() -> Command:
    """Give the command line."""
    return Command()


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a module of tests a cache that nobody else fills."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GENAILAB_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def save_dicom() -> Callable[..., Path]:
    """Give the function that writes a radiograph as DICOM, with other tags where they are named."""
    pydicom = pytest.importorskip("pydicom", reason='DICOM tests need pip install "genailab-helpers[dicom]"')

    def save(path: Path, pixels: np.ndarray | None, **tags: object) -> Path:
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = tags.pop("syntax", pydicom.uid.ExplicitVRLittleEndian)
        data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = "1.2", "1.2.3"
        data.Modality, data.PhotometricInterpretation, data.SamplesPerPixel = "CR", "MONOCHROME2", 1
        if pixels is not None:
            data.Rows, data.Columns = pixels.shape[:2]
            data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
            data.PixelRepresentation, data.PixelData = int(pixels.dtype.kind == "i"), pixels.tobytes()
        for name, value in tags.items():
            data.add_new(name, pydicom.datadict.dictionary_VR(name).replace("US or SS", "SS"), value)
        data.HighBit = 11 if tags.get("BitsStored") else data.get("BitsAllocated", 8) - 1
        data.save_as(path, enforce_file_format=True)
        return path

    return save
