"""DICOM files for the tests of the reader."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


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
