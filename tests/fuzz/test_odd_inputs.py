"""Damaged and odd inputs: a documented error in one line or a sane result, quickly and in little memory.

`make test-slow` tries 500, `make test-fuzz` 30,000 (`make test-fuzz FUZZ=100000` more). Input number n is
the same in every run: `FUZZ_START=n FUZZ=1` tries it alone.
"""

import copy
import json
import os
import resource
import signal
import struct
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import genailab_helpers
from genailab_helpers import features, radiographs
from genailab_helpers.checkpoints import load_checkpoint, save_checkpoint
from genailab_helpers.classification.losses import LOSSES
from genailab_helpers.classification.networks import build_backbone
from genailab_helpers.classification.training import Classifier, load_classifier, save_classifier
from genailab_helpers.commands import diffusion
from genailab_helpers.datasets.folders import RadiographFolder
from genailab_helpers.datasets.index import index_images, table_lines
from genailab_helpers.datasets.privacy import find_traces, person_columns
from genailab_helpers.diffusion.architectures import UNet2D
from genailab_helpers.diffusion.denoiser import Denoiser, load_denoiser, save_denoiser

pydicom = pytest.importorskip("pydicom", reason='needs pip install "genailab-helpers[dicom]"')
N_INPUTS, START = int(os.environ.get("FUZZ", 500)), int(os.environ.get("FUZZ_START", 0))
SECONDS, BYTES = 2.0, 2**30  # that one input may take, of a processor and of memory

Random = np.random.Generator
ODD = [
    None, 0, 1, -1, 2, 3, 7, 16, 255, 4096, 65535, 2**31, 10**9, 10**400, 0.5, 1e308, -1e-9, float("nan"),
    float("inf"), True, "", "0", "nan", "inf", "1e400", "../../outside/x", "/tmp/x", "CON", "Normal.", "=1+1",
    "$x^{", "a\0b", "\udcff", "ä", "x" * 300, "<b>", [], [[]], [1, 2], ["a"], {}, {"a": 1},
]


def some(rng: Random, of: Any) -> Any:
    return of[int(rng.integers(len(of)))]


def damage(rng: Random, content: bytes) -> bytes:
    """Change bytes, cut, repeat or put in; a few at a time."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        at, n = int(rng.integers(len(data) + 1)), int(rng.integers(1, 40))
        how = int(rng.integers(7))
        if how < 3 and data:
            data[at % len(data)] = some(rng, (0, 1, 127, 128, 255, int(rng.integers(256))))
        elif how == 3:
            data[at:] = b""
        elif how == 4:
            data[at:at] = data[max(0, at - n) : at]
        elif how == 5:
            data[at : at + n] = rng.bytes(n)
        else:  # a number of a header
            kind = some(rng, ("<I", ">I"))
            data[at : at + 4] = struct.pack(kind, some(rng, (0, 1, 7000, 60000, 2**31, 2**32 - 1)))
    return bytes(data)


def odd_json(rng: Random, value: Any, depth: int = 0) -> Any:
    """Put an odd value somewhere into something that JSON holds."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        value = copy.copy(value)
        key = some(rng, list(value) if isinstance(value, dict) else range(len(value)))
        if isinstance(value, dict) and rng.random() < 0.3:
            value[str(some(rng, ODD))] = value.pop(key)
        else:
            value[key] = odd_json(rng, value[key], depth + 1)
        return value
    return some(rng, ODD)


def odd_text(rng: Random, value: Any) -> bytes:
    """Write JSON with an odd value, damaged bytes, or brackets in brackets."""
    how = int(rng.integers(10))
    if how == 0:
        return b"[" * 100_000 + b"]" * 100_000
    text = json.dumps(odd_json(rng, value) if how < 8 else value).encode("utf-8", "surrogatepass")
    return damage(rng, text) if how > 6 else text


# ---------------------------------------------------------------- what is tried


class Images:
    """Files of every kind, damaged, read by everything that opens images."""

    def __init__(self, folder: Path) -> None:
        y, x = np.mgrid[0:1:48j, 0:1:40j]
        values = 0.2 + 0.6 * x * (1 - y)
        grey, deep = (values * 255).astype(np.uint8), (values * 4095).astype(np.uint16)
        exif = Image.Exif()
        exif[274], exif[315] = 6, "Somebody"
        self.bases: list[bytes] = []
        for image, kinds in (
                (Image.fromarray(grey), ("PNG", "JPEG", "BMP", "TIFF", "WEBP")),
                (Image.fromarray(grey).convert("RGB"), ("PNG", "JPEG", "TIFF")),
                (Image.fromarray(grey).convert("P"), ("PNG", "BMP", "TIFF")),
                (Image.fromarray(grey).convert("LA"), ("PNG",)), (Image.fromarray(deep), ("PNG", "TIFF")),
                (Image.fromarray(values.astype(np.float32)), ("TIFF",))):
            for kind in kinds:
                stream = BytesIO()
                image.save(stream, kind, exif=exif, **({"progressive": True} if kind == "JPEG" else {}))
                self.bases.append(stream.getvalue())
        self.folder = folder

    def make(self, rng: Random) -> bytes:
        base = some(rng, self.bases)
        if base[:4] == b"\x89PNG" and rng.random() < 0.5:  # chunks with valid sums
            chunks, at = [], 8
            while at < len(base):
                length = int.from_bytes(base[at : at + 4], "big")
                chunks.append((base[at + 4 : at + 8], base[at + 8 : at + 8 + length]))
                at += length + 12
            at = int(rng.integers(len(chunks)))
            kind, content = chunks[at]
            if kind == b"IDAT" and rng.random() < 0.5:
                content = zlib.compress(damage(rng, zlib.decompress(content)))
            else:
                content = damage(rng, content)
            chunks[at] = (kind, content)
            return base[:8] + b"".join(
                struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)) for kind, content in chunks)
        return damage(rng, base)

    def __call__(self, rng: Random) -> None:
        path = self.folder / some(rng, ("image.png", "image", "image.dcm", "a$b.tif"))
        path.write_bytes(self.make(rng))
        try:
            size = some(rng, (None, 16, 64))
            check(radiographs.read_radiograph(path, size, some(rng, (None, 12, 16))), size)
            radiographs.brightest_undeclared(path)
        finally:
            find_traces(path)
            with warnings.catch_warnings():
                try:
                    mode = radiographs.inspect_radiograph(path)
                except radiographs.UnreadableRadiographError:
                    pass
                else:
                    assert "Somebody" not in str(mode)
            path.unlink()


FIELDS = [
    "Modality", "PhotometricInterpretation", "SamplesPerPixel", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "WindowCenter", "WindowWidth", "VOILUTFunction", "RescaleSlope",
    "RescaleIntercept", "VOILUTSequence", "ModalityLUTSequence", "PlanarConfiguration", "PixelSpacing",
]


class Dicom(Images):
    """DICOM with odd values in its header, or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, rng: Random) -> bytes:
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" + some(rng, ("", ".1", ".1", ".1.99"))
        data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = "1.2", "1.2.3"
        data.Modality, data.PhotometricInterpretation = "CR", some(rng, ("MONOCHROME1", "MONOCHROME2"))
        data.SamplesPerPixel, data.Rows, data.Columns, data.PixelRepresentation = 1, 20, 24, 0
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PatientName = 16, 12, 11, "Somebody"
        data.PixelData = (np.arange(480) * 8).astype(np.uint16).tobytes()
        for name in rng.choice(FIELDS, int(rng.integers(0, 4)), replace=False):
            table = pydicom.Dataset()
            if rng.random() < 0.7:
                table.LUTDescriptor = [4096, 0, some(rng, (8, 12, 16))]
                table.LUTData = [1] * int(some(rng, (0, 5, 4096)))
            tables = [], [table], [pydicom.Dataset()]
            value = some(rng, tables if name.endswith("Sequence") else ODD)
            try:
                setattr(data, str(name), value)
                pydicom.filewriter.write_data_element(pydicom.filebase.DicomBytesIO(), data[str(name)])
            except Exception:  # it cannot be written
                data.add_new(str(name), pydicom.datadict.dictionary_VR(str(name)), None)
        stream = BytesIO()
        try:
            data.save_as(stream, enforce_file_format=True)
        except Exception:
            return b"no DICOM"
        content = stream.getvalue()
        content = content[132:] if rng.random() < 0.05 else content
        return damage(rng, content) if rng.random() < 0.4 else content


class Models:
    """Models whose bytes or recipes are odd."""

    def __init__(self, folder: Path) -> None:
        loss = LOSSES["cross_entropy"](2)
        made = Classifier(build_backbone("small_cnn", loss.head), loss, ["A", "B"], 32, "small_cnn")
        network = UNet2D(1, 1, base_channels=8, channel_multipliers=(1, 2))
        save_classifier(folder / "classifier", made, run={"bit_depth": 12}, thresholds={"A": 0.5, "B": 0.5})
        save_denoiser(folder / "denoiser", Denoiser(network, 16, 8))
        self.loaders = {"classifier": load_classifier, "denoiser": load_denoiser}
        self.whole = {name: (folder / name).read_bytes() for name in self.loaders}
        self.parts = {name: load_checkpoint(folder / name) for name in self.loaders}
        self.folder = folder

    def __call__(self, rng: Random) -> None:
        name, path = some(rng, list(self.loaders)), self.folder / "odd.safetensors"
        if rng.random() < 0.4:
            content = self.whole[name]
            head = int.from_bytes(content[:8], "little") + 8  # most that can go wrong stands there
            path.write_bytes(damage(rng, content[:head]) + content[head:])
        else:
            recipe = odd_json(rng, self.parts[name].recipe)
            save_checkpoint(path, self.parts[name].tensors, recipe)
        model = self.loaders[some(rng, list(self.loaders)) if rng.random() < 0.1 else name](path)
        if isinstance(model, Classifier) and model.img_size <= 64:
            assert np.isfinite(model.predict(torch.zeros(1, 1, 32, 32)).probabilities).all()


class Runs:
    """Runs of a diffusion training whose recipe is odd: its classes become folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        network = UNet2D(1, 1, base_channels=8, channel_multipliers=(1, 2))
        save_denoiser(folder / "model.safetensors", Denoiser(network, 16, 8))

    def __call__(self, rng: Random) -> None:
        if rng.random() < 0.3:
            recipe = {"classes": {some(rng, [text for text in ODD if isinstance(text, str)]): 3}}
            content = json.dumps(recipe).encode()
        else:
            content = odd_text(rng, {"classes": {"Normal": 3}, "data": "x"})
        (self.folder / "recipe.json").write_bytes(content)
        output = self.folder / f"out{rng.integers(2**60)}"
        diffusion.sample(self.folder, 1, output)
        assert all(len(path.relative_to(output).parts) < 4 for path in output.rglob("*"))


class Folders:
    """Tables of a small data set."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, [f"{label}/{i}.png" for label in ("A", "B") for i in range(2)]
        for number, name in enumerate(self.images):
            (folder / name).parent.mkdir(exist_ok=True)
            Image.new("L", (20, 20), 40 * number).save(folder / name)
        rows = [f"{name},A,p{i},train\n" for i, name in enumerate(self.images)]
        self.table = "".join(["file,class,patient,split\n", *rows])

    def __call__(self, rng: Random) -> None:
        path, text = self.folder / "odd.csv", self.table
        if rng.random() < 0.5:
            cells = text.replace("\n", ",\n").split(",")
            cells[int(rng.integers(len(cells)))] = str(some(rng, ODD))
            text = some(rng, ("", "sep=;\n", "\n\n;;\n")) + some(rng, ",;\t").join(cells)
        content = text.encode("utf-8", "surrogateescape")
        path.write_bytes(damage(rng, content) if rng.random() < 0.5 else content)
        person_columns(table_lines(path, 1 << 16, "replace")[1][0])
        assert list(index_images(self.folder, path).index) == self.images


class Caches:
    """Files of the cache, damaged: they are made again, and the result is as before."""

    def __init__(self, folder: Path) -> None:
        Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)).save(folder / "a.png")
        self.folder, self.image = folder, torch.linspace(-1, 1, 1024).reshape(1, 1, 32, 32)
        self.first = self.results()
        self.cache = Path(os.environ["GENAILAB_CACHE"])

    def results(self) -> tuple[Any, ...]:
        read = RadiographFolder(self.folder, 16)
        return read[0][0].tolist(), read.bit_depth, features.lite0_features(self.image, side=32).tolist()

    def __call__(self, rng: Random) -> None:
        files = sorted(path for suffix in ("u8", "f4", "bits") for path in self.cache.rglob(f"*.{suffix}"))
        path = some(rng, files)
        odd = damage(rng, path.read_bytes()), b"", b"\xff", "²".encode(), b"99", b"x" * 10**6
        path.write_bytes(some(rng, odd))
        assert self.results() == self.first


def check(image: torch.Tensor, size: int | None) -> None:
    """Demand a radiograph."""
    assert image.shape[-3] == 1
    assert size is None or image.shape[-2:] == (size, size)
    assert image.isfinite().all()
    assert image.abs().max() <= 1


# ---------------------------------------------------------------- how it is judged


def fault_of(action: Callable[[Random], None], rng: Random) -> str:
    """Return what is wrong with how an input was treated, or nothing."""
    began = time.process_time()
    try:
        action(rng)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(place.filename).is_relative_to(genailab_helpers.__path__[0])
        on_purpose = ours and str(place.line).startswith("raise ")
        named = isinstance(error, OSError) and error.filename is not None
        known = named or (on_purpose and isinstance(error, ValueError | FileNotFoundError))
        if not known or "\n" in str(error):
            return "".join(traceback.format_exception(error))[-1500:]
        if "Somebody" in str(error):
            return f"names a patient: {error}"
    seconds = time.process_time() - began
    return f"took {seconds:.1f} s" if seconds > SECONDS else ""


@pytest.fixture
def time_is_limited() -> Iterator[None]:
    """Wake up whoever waits for a pipe."""

    def ring(*_: object) -> None:
        raise TimeoutError("waits forever")

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("time_is_limited")
def test_odd_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", pydicom.config.IGNORE)
    monkeypatch.setattr(pydicom.config.logger, "disabled", True)
    kinds = {}
    for kind in (Images, Dicom, Models, Runs, Folders, Caches):
        (tmp_path / "inside" / kind.__name__).mkdir(parents=True)
        kinds[kind] = kind(tmp_path / "inside" / kind.__name__)
    turns = [Images] * 6 + [Dicom] * 6 + [Models] * 3 + [Folders] * 4 + [Caches] + [Runs]
    faults: dict[int, str] = {}
    for number in range(START, START + N_INPUTS):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        signal.alarm(60)
        kind = turns[number % len(turns)]
        fault = fault_of(kinds[kind], np.random.default_rng([21, number]))
        if (taken := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) > BYTES:
            fault += f" took {taken / 2**30:.1f} GiB"
        if strange := {path.name for path in tmp_path.iterdir()} - {"inside", "cache"}:
            fault += f" wrote outside: {strange}"
        if fault:
            faults[number] = f"{kind.__name__}: {fault}"
    capsys.readouterr()
    told = [f"FUZZ_START={number}: {fault}" for number, fault in list(faults.items())[:12]]
    assert not faults, f"{len(faults)} of {N_INPUTS}: " + "\n\n".join(told)
