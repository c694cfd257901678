"""Read one file of any common kind as a radiograph, or say clearly why it is none.

Public X-ray sets mix bit depths, colour modes, DICOM and broken files. Everything that is read here comes out
in one form: a float32 tensor `(1, H, W)` in [-1, 1], -1 black (air), +1 white (bone), row 0 the head.
"""

import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

RADIOGRAPH_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".dcm",
                       ".dicom", ".ima")
MIN_SIDE = 16  # pixels; an image or a network input below this shows no anatomy
MAX_PIXELS = 50_000_000  # a mammogram has 28 million

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # closed: Pillow hands an EPS file to Ghostscript
BIT_DEPTHS = (8, 10, 12, 14, 15, 16)  # what detectors and digitisers deliver
_UNIT = 1.05  # floats up to here are images of 0 to 1: resampling adds a little at edges
_PROJECTION_MODALITIES = frozenset({"CR", "DX", "RG", "RF", "XA", "MG", "IO", "PX", "OT", ""})
_WHITE_IS_ZERO = 0  # value of the TIFF tag PhotometricInterpretation
_PHOTOMETRIC_TAG, _SAMPLE_TAG = 262, 339  # of TIFF; samples are unsigned (1), signed (2) or floats (3)
_DICOM_HINT = 'pip install "genailab-helpers[dicom]"'
_DEFLATED = "1.2.840.10008.1.2.1.99"  # transfer syntax: unpacked as a whole as soon as it is opened
_KINDS = {  # what Pillow cannot open, by its first bytes
    "DICOM without the letters DICM": rb"[\2\10]\0.\0([A-Z]{2}|[\0-\100]\0\0\0)", "GIF": rb"GIF8",
    "TIFF": rb"II[*+]\0|MM\0[*+]", "PNG": rb"\x89PNG", "JPEG": rb"\xff\xd8", "WebP": rb"RIFF....WEBP",
    "JPEG 2000": rb"\0\0\0\x0cjP|\xff\x4f", "HEIC or AVIF": rb"....ftyp"}

_one_large_image = threading.Lock()  # many threads may read, and one large image takes up to a gigabyte


class UnreadableRadiographError(ValueError):
    """A file that cannot be read as a radiograph.

    Parameters
    ----------
    path : str or Path
        The file; kept as the attribute `path`.
    reason : str
        What is wrong with it, in a few words; kept as the attribute `reason`.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)  # both as arguments, so that the error survives a worker process
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        """Return the one line that a user sees."""
        return f"{self.path}: {self.reason}"


def check_img_size(img_size: int, minimum: int = MIN_SIDE) -> int:
    """Return `img_size` if it is the side of an image in pixels.

    Parameters
    ----------
    img_size : int
        What a caller gave as side of a square image; NumPy integers are welcome.
    minimum : int, default 16
        Smallest side allowed.

    Returns
    -------
    int
        The same number.

    Raises
    ------
    ValueError
        If it is no whole number (`True`, `3.5` and `"64"` are none) or below `minimum`.
    """
    if isinstance(img_size, bool) or not isinstance(img_size, int | np.integer) or img_size < minimum:
        raise ValueError(f"img_size={img_size!r}: expected a whole number of pixels, at least {minimum}")
    return int(img_size)


def check_images(images: Tensor) -> None:
    """Raise a ValueError unless `images` is a float32 batch (N, 1, H, W), N >= 1, of values in [-1, 1]."""
    shape, dtype = tuple(getattr(images, "shape", ())), getattr(images, "dtype", None)
    if dtype != torch.float32 or len(shape) != 4 or shape[1:2] != (1,) or 0 in shape:
        raise ValueError(f"images: expected the shape (N, 1, H, W), float32 in [-1, 1], got {shape} {dtype} "
                         f"in a {type(images).__name__}; stack single images, take one channel of colours")
    low, high = (float(v) for v in images.aminmax())
    if not (low >= -1.001 and high <= 1.001):  # false for NaN too
        raise ValueError(f"images: expected values in [-1, 1], got {low:.4g} to {high:.4g}; "
                         "scale pixels of 0 to 255 by x / 127.5 - 1, clamp generated ones")


def read_radiograph(path: str | Path, img_size: int | None = None, bit_depth: int | None = None) -> Tensor:
    """Read one radiograph.

    Parameters
    ----------
    path : str or Path
        A PNG, JPEG, BMP, TIFF or WebP file, told from its content and not from its name, or a DICOM file of a
        projection radiograph (CR, DX and the like; with or without a suffix).
    img_size : int, optional
        Side in pixels, at least 16: the image is squashed to a square, antialiased, as
        `torchvision.transforms.Resize((img_size, img_size))` does. By default the image keeps its size.
    bit_depth : int, optional
        Bits a pixel of a file of more than 8 bits that does not say how many it uses, as `index.BitDepth`
        finds them for a whole data set. By default they are guessed from the brightest pixel, with a warning.

    Returns
    -------
    Tensor
        float32 `(1, H, W)` in [-1, 1], -1 black, +1 white, row 0 the top of the upright image.

    Raises
    ------
    UnreadableRadiographError
        If the file is no radiograph, is damaged or absent, or needs a package that is not installed.
    ValueError
        If `img_size` is no whole number or below 16.

    Notes
    -----
    Black and white are the ends of the *scale*, not the darkest and lightest pixel of the image, so
    contrast and exposure stay what they were and nothing is clipped. 8-bit files have the scale 0 to 255.
    Deeper ones (mode `I;16`, `I`, `F`) have the scale 0 to 2^b - 1: b is what the PNG chunk sBIT says, else
    `bit_depth`, else the smallest of 8, 10, 12, 14, 15, 16 that holds the brightest pixel (a 10-bit image
    in a 16-bit PNG would come out black otherwise). Floats up to 1, give or take what resampling adds, have
    the scale 0 to 1, or -1 to 1 if some are negative. Only where nothing fits (negative integers, values
    above 65,535) is the image stretched from its minimum to its maximum. A 16-bit TIFF whose zero is white
    is inverted. Of colours of 16 bits Pillow keeps the upper 8, so they are refused where these hold less
    than half of the scale, which may be 12 bits.

    Colours become luma (ITU-R BT.601), transparent pixels lie on black, and a 1-bit image is read as black
    and white: whether it is a mask is for the audit of a data set to say. Large JPEGs are decoded at a
    fraction of their size that is still at least twice `img_size`. What has a side below 16 px is no
    radiograph.

    DICOM (PS3.3 C.11): modality rescale, then the first VOI table or window, then MONOCHROME1 inverted, then
    padding made black. Without a window the scale is what `BitsStored` declares; a field without a value, a
    window of no width and a table without data count as absent.

    Refused before they are decoded: more than 50 million pixels, several pages or frames, deflated DICOM.
    """
    path = Path(path)
    if img_size is not None:
        check_img_size(img_size)
    with _one_clear_line(path):
        image = _read_dicom(path) if is_dicom(path) else _read_image_file(path, img_size, bit_depth)
        guessed = image.info.get("guessed bits", 16)
        if img_size is not None:
            image = image.resize((img_size, img_size), Image.Resampling.BILINEAR, image.info.get("box"))
        ImageOps.exif_transpose(image, in_place=True)
        unit = torch.from_numpy(np.array(image))
    if guessed < 16:
        warnings.warn(f"{path}: does not say how many bits it uses; {guessed} were guessed from its "
                      "brightest pixel, which may make it too bright; of a whole set, the brightest counts",
                      stacklevel=2)
    return unit.mul_(2).sub_(1).clamp_(-1, 1)[None]  # the clamp mends rounding only


class FileProperties(NamedTuple):
    """What the header of an image says, before any pixel is seen.

    Attributes
    ----------
    format : str
        "PNG", "JPEG", "BMP", "TIFF", "WEBP" or "DICOM".
    mode : str
        Pillow's name of channels and depth ("L", "RGB", "I;16"), or the photometric interpretation of a DICOM
        file with its bits ("MONOCHROME1 15").
    width, height : int
        Size in pixels as stored.
    """

    format: str
    mode: str
    width: int
    height: int


def inspect_radiograph(path: str | Path) -> FileProperties:
    """Read the header of one image.

    Parameters
    ----------
    path : str or Path
        What `read_radiograph` reads.

    Returns
    -------
    FileProperties
        Format, mode and size.

    Raises
    ------
    UnreadableRadiographError
        If there is no header that can be read. That the pixels can be read is not checked.
    """
    with _one_clear_line(path):
        if not is_dicom(path):
            with open_image(path) as image:
                return FileProperties(str(image.format), image.mode, *image.size)
        header = read_dicom(path)
        mode = f"{_code(header.PhotometricInterpretation)} {int(header.BitsStored)}"
        return FileProperties("DICOM", mode, int(header.Columns), int(header.Rows))


def is_dicom(path: str | Path) -> bool:
    """Tell whether a file is marked as DICOM: the letters DICM after 128 bytes (PS3.10, 7.1)."""
    return _first_bytes(path, 132)[128:] == b"DICM"


def _first_bytes(path: str | Path, number: int) -> bytes:
    """Return the first bytes of a file; nothing of a pipe, which would wait for a writer."""
    with suppress(OSError), open(path if os.path.isfile(path) else os.devnull, "rb") as file:
        return file.read(number)
    return b""


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open what Pillow reads and may be decoded: one page that is not too large.

    Parameters
    ----------
    path : str or Path
        A PNG, JPEG, BMP, TIFF or WebP file.

    Yields
    ------
    Image
        Not yet decoded.

    Raises
    ------
    UnreadableRadiographError
        If it is none, or an error of any kind is met while it is open.
    """
    # opened as a stream: Pillow maps a file that it knows by name, and dies with it if that is cut meanwhile
    with _one_clear_line(path), open(path, "rb") as file, Image.open(file, formats=_FORMATS) as image:
        _check_size(path, *image.size)
        # an MPO file is a photograph with a small copy of it
        _refuse(path, (getattr(image, "is_animated", False) and image.format != "MPO",
                       "holds several pages or frames; expected a single image"))
        yield image


def read_dicom(path: str | Path, pixels: bool = False) -> Any:
    """Read a DICOM file with pydicom, by default without its pixels.

    Raises
    ------
    UnreadableRadiographError
        If that fails, or the file is deflated: nothing bounds the memory that it takes.
    """
    with _one_clear_line(path):
        import pydicom

        meta = pydicom.filereader.read_file_meta_info(path)
        _refuse(path, (meta.get("TransferSyntaxUID") == _DEFLATED, "deflated DICOM; store it uncompressed"))
        return pydicom.dcmread(path, stop_before_pixels=not pixels)


def _refuse(path: str | Path, *faults: tuple[bool, str]) -> None:
    """Raise an UnreadableRadiographError of the first reason that holds."""
    for holds, reason in faults:
        if holds:
            raise UnreadableRadiographError(path, reason)


def _check_size(path: str | Path, width: int, height: int) -> None:
    size = f"{width} x {height} px"
    _refuse(path, (min(width, height) < MIN_SIDE, f"{size}; a radiograph has at least {MIN_SIDE} px a side"),
            (width * height > MAX_PIXELS, f"{size}, above {MAX_PIXELS:,}: too many pixels for a radiograph"))


def _turn(width: int, height: int) -> AbstractContextManager[Any]:
    """Return what an image has to wait for before it is decoded."""
    return _one_large_image if width * height > 2**24 else nullcontext()


@contextmanager
def _one_clear_line(path: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong into one UnreadableRadiographError; oddities of what is read are no warning.

    Damaged bytes surface as nearly any error of Pillow, zlib, struct or pydicom. What pydicom says of them is
    not passed on: it quotes the header, which may name somebody.
    """
    try:
        _refuse(path, (os.path.exists(path) and not os.path.isfile(path),
                       "a folder, a pipe or a device; expected one image"))
        with warnings.catch_warnings(action="ignore"):
            yield
    except (UnreadableRadiographError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, ImportError) or "missing dependencies" in str(error):
            reason = f"a DICOM file; reading those needs {_DICOM_HINT}"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif isinstance(error, Image.UnidentifiedImageError):
            start = _first_bytes(path, 16)
            kinds = [kind for kind, first in _KINDS.items() if re.match(first, start, re.DOTALL)]
            reason = f"{kinds[0]}, but damaged or of a kind that is not read; store it as grey PNG" if kinds \
                else "neither PNG, JPEG, BMP, TIFF, WebP nor DICOM by its content"
        else:
            said = "" if is_dicom(path) else " ".join(str(error).split())
            reason = f"damaged or incomplete ({said or type(error).__name__}); get the file again"
        raise UnreadableRadiographError(path, reason) from error


def brightest_undeclared(path: str | Path) -> float:
    """Return the brightest pixel of a file of 9 to 16 bits that does not say how many; 0 of others."""
    with suppress(UnreadableRadiographError), open_image(path) as image, _turn(*image.size):
        if image.mode.startswith(("I", "F")) and not _significant_bits(path):
            values = np.asarray(image)
            if values.min() >= 0 and _UNIT < values.max() < 2**16:
                return float(values.max())
    return 0.0  # of an unreadable one too: whoever reads it says so


def smallest_bit_depth(brightest: float) -> int:
    """Return the smallest number of bits that detectors deliver and that holds a pixel of this value."""
    return next(bits for bits in BIT_DEPTHS if brightest <= 2**bits - 1)


def _significant_bits(path: str | Path) -> int | None:
    """Return what the chunk sBIT of a PNG file says (PNG specification, 11.3.2.7), which Pillow drops."""
    with open(path, "rb") as file:
        head = file.read(2**16).partition(b"IDAT")[0]
    found = re.match(rb"\x89PNG\r\n\x1a\n.*?\0\0\0[\1-\4]sBIT(.)", head, re.DOTALL)
    return found[1][0] or None if found else None


def _read_image_file(path: Path, img_size: int | None, bit_depth: int | None) -> Image.Image:
    """Read what Pillow reads: an image of mode F in [0, 1], not yet upright.

    Its `info` keeps the EXIF orientation, a guess of bits, and the box that counts: a JPEG decoded at a
    fraction of its size is padded to whole blocks at the right and at the bottom, which would shift the image
    by up to a pixel.
    """
    with open_image(path) as image:
        drafted = image.draft("L", None if img_size is None else (2 * img_size, 2 * img_size))
        unpacked = str(getattr(image, "tile", [])[:1])  # Pillow's name of what is stored, such as RGB;16B
        with _turn(*image.size):
            image.load()
            _refuse(path, (_ends_early(path, image), "damaged or incomplete (its pixels end early)"),
                    (_loses_bits(image, unpacked), "deep, but not plainly grey; store it as grey of 16 bits"))
            if image.mode.startswith(("I", "F")):
                unit, bits = _to_unit_scale(np.asarray(image), _significant_bits(path), bit_depth)
                if image.mode.startswith("I;16") and image.getexif().get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
                    unit = 1 - unit  # Pillow does this for 1 and 8 bits only
            else:
                unit, bits = np.asarray(_to_grey(image)) / np.float32(255), 16
        read = Image.fromarray(unit)
        read.info = image.info | {"box": drafted and drafted[1], "guessed bits": bits}
        return read


def _loses_bits(image: Image.Image, unpacked: str) -> bool:
    """Tell whether Pillow has dropped bits that count: transparency, low bytes of colours, signs."""
    kind = getattr(image, "tag_v2", {}).get(_SAMPLE_TAG, (1,))[0]
    if image.mode.startswith(("I", "F")):
        return "transparency" in image.info or (kind == 1 and bool(np.asarray(image).min() < 0))
    highest = np.reshape(image.getextrema(), (-1, 2))[:len(image.getbands()) - ("A" in image.mode), 1].max()
    return highest < 128 if ";16" in unpacked else kind == 2 and highest > 127


def _ends_early(path: Path, image: Image.Image) -> bool:
    """Tell whether the last row was not in the file: a stream may be cut short and well-formed.

    Then it is black, or mid-grey in a JPEG. That may be meant, so such an image is decoded again: onto
    another ground, or with more bytes at the end of the JPEG, which change nothing in a whole one.
    """
    is_jpeg = image.format in ("JPEG", "MPO")
    last = np.asarray(image.crop((0, image.height - 1, *image.size)))
    if not np.isin(last, (127, 128) if is_jpeg else 0).all():
        return False
    content = path.read_bytes()
    if is_jpeg:
        content = (b"\x55" * 2**16 + b"\xff\xd9").join(content.rsplit(b"\xff\xd9", 1))
    with Image.open(io.BytesIO(content), formats=_FORMATS) as again:
        again.draft("L", image.size)
        if not is_jpeg:
            bands, stored = again.getbands(), getattr(again, "_tile_size", again.size)  # a TIFF not upright
            again.im = Image.new(again.mode, stored, (1,) * len(bands) if len(bands) > 1 else 1).im
        again.load()
        return again.tobytes() != image.tobytes()


def _to_grey(image: Image.Image) -> Image.Image:
    """Convert an image of 8 bits a channel, of any mode, to L, with black behind what is transparent."""
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")  # CMYK and LAB have no direct way to L
    return image.convert("L")


def _to_unit_scale(values: np.ndarray, declared: int | None,
                   bit_depth: int | None) -> tuple[np.ndarray, int]:
    """Map deep pixels to [0, 1] by the scale that `read_radiograph` documents; return guessed bits, or 16."""
    lowest, highest, guessed = float(values.min()), float(values.max()), 16
    if not np.isfinite(lowest + highest):
        raise ValueError("some pixels are infinite or not a number")
    black, white = lowest, highest
    if values.dtype.kind == "f" and lowest >= -_UNIT and highest <= _UNIT:
        black, white = (-1.0, 1.0) if lowest < 1 - _UNIT else (0.0, 1.0)
    elif lowest >= 0 and highest < 2**16:
        bits = declared or bit_depth or smallest_bit_depth(highest)
        if highest > 2**bits - 1:  # the PNG specification wants samples scaled up to 16 bits
            bits = 16 if declared else smallest_bit_depth(highest)
        guessed = 16 if declared or bit_depth else bits
        black, white = 0.0, 2.0**bits - 1
    unit = (values.astype(np.float64) - black) / max(white - black, 1e-12)
    return unit.clip(0, 1).astype(np.float32), guessed


def _code(value: object) -> str:
    """Return a code of a DICOM header, or "unknown": the field may hold anything, such as a name."""
    return str(value) if re.fullmatch("[A-Z]{2}|MONOCHROME[12]|RGB|PALETTE COLOR|YBR_[A-Z0-9_]{3,12}",
                                      str(value)) else "unknown"


def _read_dicom(path: Path) -> Image.Image:
    """Read a projection radiograph in DICOM: an image of mode F in [0, 1]."""
    film = read_dicom(path, pixels=True)
    modality, photometric = film.get("Modality") or "", _code(film.get("PhotometricInterpretation"))
    _refuse(path, (modality not in _PROJECTION_MODALITIES,
                   f"DICOM of modality {_code(modality)}; expected one such as CR or DX"),
            ("PixelData" not in film, "DICOM without pixels, or with float pixels"),
            (photometric[:-1] != "MONOCHROME", f"DICOM with {photometric} pixels; expected grey ones"),
            (int(film.get("NumberOfFrames") or 1) > 1, "DICOM with several frames; expected a single image"))
    _check_size(path, film.Columns, film.Rows)
    _fill_void_fields(film)
    with _turn(film.Columns, film.Rows):
        stored = film.pixel_array
        values, black, white = _apply_voi(film, stored)
        _refuse(path, (not 0 < abs(white - black) < np.inf, "DICOM; its grey scale has no width"))
        black, white = (white, black) if photometric == "MONOCHROME1" else (black, white)
        unit = ((values - black) / (white - black)).astype(np.float32)
    padding = film.get("PixelPaddingValue", np.inf)
    low, high = sorted((padding, film.get("PixelPaddingRangeLimit", padding)))
    unit[(stored >= low) & (stored <= high)] = 0
    _refuse(path, (not (unit.min() > -.01 and unit.max() < 1.01),  # true for NaN, too
                   "DICOM with pixels outside of the scale that its header gives"))
    return Image.fromarray(unit)


def _fill_void_fields(film: Any) -> None:
    """Treat fields without a value and tables without data as absent, and rescaling as PS3.3 C.11.1 does."""
    from pydicom.filewriter import correct_ambiguous_vr

    for element in film.group_dataset(0x28):
        if element.is_empty or (element.VR == "SQ" and not (
                element.value[0].get("LUTData") and element.value[0].get("LUTDescriptor"))):
            del film[element.tag]
    film.RescaleSlope, film.RescaleIntercept = film.get("RescaleSlope", 1), film.get("RescaleIntercept", 0)
    correct_ambiguous_vr(film, film.original_encoding[1])  # of padding, in files that do not tell types


def _apply_voi(film: Any, values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Apply modality rescale and the first VOI table or window; return values and the ends of their scale."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    values = np.asarray(apply_modality_lut(values, film), dtype=np.float64)
    if "VOILUTSequence" in film:
        bits = film.VOILUTSequence[0].LUTDescriptor[2]
        return apply_voi(values.astype(np.int64), film), 0.0, float(2**bits - 1)
    if "WindowCenter" in film and "WindowWidth" in film:
        with suppress(ValueError):  # a window of no width
            # A window maps what lies outside onto the ends of its output, so two far values reveal them.
            black, white = apply_windowing(np.array([-1e30, 1e30]), film)
            return apply_windowing(values, film), float(black), float(white)
    lowest = -(2 ** (film.BitsStored - 1)) if film.PixelRepresentation == 1 else 0
    black, white = sorted(apply_modality_lut(np.array([lowest, lowest + 2**film.BitsStored - 1]), film))
    return values, float(black), float(white)  # sorted, because a negative slope swaps them
