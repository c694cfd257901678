"""One file of any kind becomes one (1, H, W) tensor in [-1, 1], or one clear line."""

import pickle
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from contextlib import nullcontext, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

import genailab_helpers  # noqa: F401  (before torchvision)
from genailab_helpers.radiographs import (
    UnreadableRadiographError,
    check_img_size,
    inspect_radiograph,
    read_radiograph,
)

pytestmark = pytest.mark.filterwarnings("ignore:.* does not say how many bits it uses")
HEIGHT, WIDTH = 60, 80


def pattern(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Make a smooth image in [0, 1] that no flip or turn leaves as it is, with pure black and pure white."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    values = 0.2 + 0.5 * x * (1 - y) + 0.3 * np.exp(-40 * ((x - 0.3) ** 2 + (y - 0.2) ** 2))
    return (values - values.min()) / (values.max() - values.min())


def bytes_of(values: np.ndarray) -> np.ndarray:
    return np.round(values * 255).astype(np.uint8)


def expected(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values * 2 - 1).float()[None]


def assert_read(path: Path, unit: np.ndarray) -> None:
    """Compare an image with its values in [0, 1]."""
    torch.testing.assert_close(read_radiograph(path), expected(unit), atol=2e-6, rtol=0)


# ---------------------------------------------------------------- formats, modes and depths

GREY = Image.fromarray(bytes_of(pattern()))


def cmyk_with_black_ink_only() -> Image.Image:
    ink = Image.fromarray(255 - bytes_of(pattern()))
    nothing = Image.new("L", ink.size, 0)
    return Image.merge("CMYK", (nothing, nothing, nothing, ink))


def grey_palette() -> Image.Image:
    image = Image.fromarray(255 - bytes_of(pattern())).convert("P")
    image.putpalette([level for level in range(255, -1, -1) for _ in "rgb"])  # index 0 is white
    return image


LOSSLESS = {
    "grey.png": GREY, "grey.bmp": GREY, "grey.tif": GREY, "grey.tiff": GREY,
    "rgb.png": GREY.convert("RGB"), "rgba.png": GREY.convert("RGBA"), "la.png": GREY.convert("LA"),
    "palette.png": grey_palette(), "cmyk.tif": cmyk_with_black_ink_only(),
}


@pytest.mark.parametrize("name", list(LOSSLESS))
def test_lossless_files_are_read_to_the_bit(tmp_path, name):
    LOSSLESS[name].save(tmp_path / name)
    assert_read(tmp_path / name, bytes_of(pattern()) / 255)


def test_colours_become_luma(tmp_path):
    """ITU-R BT.601: Y = .299 R + .587 G + .114 B, to a level of 8 bits."""
    for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50)]:
        Image.new("RGB", (20, 20), colour).save(tmp_path / "colour.png")
        level = float(np.dot(colour, (0.299, 0.587, 0.114))) / 255
        read = float(read_radiograph(tmp_path / "colour.png").mean())
        assert read == pytest.approx(2 * level - 1, abs=2 / 255)


def test_transparent_pixels_lie_on_black(tmp_path):
    for mode, pixel in (("LA", (200, 51)), ("RGBA", (200, 200, 200, 51))):
        Image.new(mode, (20, 20), pixel).save(tmp_path / "image.png")
        assert float(read_radiograph(tmp_path / "image.png").mean()) == pytest.approx(
            2 * (200 * 51 / 255) / 255 - 1, abs=2 / 255)
    GREY.save(tmp_path / "keyed.png", transparency=255)  # one level of grey is declared transparent
    keyed = bytes_of(pattern())
    keyed[keyed == 255] = 0
    assert_read(tmp_path / "keyed.png", keyed / 255)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
def test_deep_images_keep_their_scale_and_are_never_clipped(tmp_path, bits, suffix):
    """The brightest pixel is at 80 % of the scale: more than the next smaller depth holds."""
    pixels = np.round(0.8 * pattern() * (2**bits - 1)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"deep{suffix}")
    told = pytest.warns(UserWarning, match=rf"deep\{suffix}: .* {bits} were guessed .* of a whole set")
    with told if bits < 16 else nullcontext():  # 16 bits are never too few
        assert_read(tmp_path / f"deep{suffix}", pixels / (2**bits - 1))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def save_with_significant_bits(path: Path, pixels: np.ndarray, bits: int) -> Path:
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()  # the mark of a PNG and its header take 33 bytes
    path.write_bytes(content[:33] + png_chunk(b"sBIT", bytes([bits])) + content[33:])
    return path


@pytest.mark.filterwarnings("error")
def test_a_dark_image_is_read_by_the_bits_that_its_file_or_its_data_set_says(tmp_path):
    """At a fifth of 12 bits the brightest pixel fits into 10."""
    dark = np.round(0.2 * pattern() * 4095).astype(np.uint16)
    Image.fromarray(dark).save(tmp_path / "dark.tif")
    torch.testing.assert_close(read_radiograph(tmp_path / "dark.tif", bit_depth=12), expected(dark / 4095))
    said = save_with_significant_bits(tmp_path / "said.png", dark, 12)
    for bit_depth in (None, 10, 16):  # the file knows better than the set
        torch.testing.assert_close(read_radiograph(said, bit_depth=bit_depth), expected(dark / 4095))
    Image.fromarray(5 * dark).save(tmp_path / "bright.tif")  # brighter than the set: not clipped
    read = read_radiograph(tmp_path / "bright.tif", bit_depth=10)
    torch.testing.assert_close(read, expected(dark / dark.max()))


@pytest.mark.filterwarnings("error")
def test_significant_bits_that_fill_the_sample_as_the_specification_of_png_asks(tmp_path):
    """Section 11.3.2.7: samples are scaled to the full range of 16 bits, and sBIT is what they had before."""
    for brightness in (0.8, 0.3):
        twelve = np.round(brightness * pattern() * 4095).astype(np.uint16)
        scaled = (twelve << 4) | (twelve >> 8)
        assert_read(save_with_significant_bits(tmp_path / "full.png", scaled, 12), scaled / 65535)


def test_big_endian_and_white_is_zero_tiffs(tmp_path):
    pixels = np.round(pattern() * 65535).astype(np.uint16)
    Image.fromarray(pixels.astype(">u2")).save(tmp_path / "big.tif")
    assert_read(tmp_path / "big.tif", pixels / 65535)
    white_is_zero = TiffImagePlugin.ImageFileDirectory_v2()
    white_is_zero[262] = 0
    for depth, stored in (("16", pixels), ("8", bytes_of(pattern()))):
        Image.fromarray(stored).save(tmp_path / f"{depth}.tif", tiffinfo=white_is_zero)
        with Image.open(tmp_path / f"{depth}.tif") as image:
            assert image.getexif()[262] == 0
            on_disk = np.frombuffer((tmp_path / f"{depth}.tif").read_bytes()[-stored.nbytes:], stored.dtype)
        turned = 1 - on_disk.reshape(stored.shape) / np.iinfo(stored.dtype).max
        assert_read(tmp_path / f"{depth}.tif", turned)


@pytest.mark.parametrize(("pixels", "unit"), [
    (pattern().astype(np.float32), pattern()),
    (0.5 * pattern().astype(np.float32), 0.5 * pattern()),
    (2 * pattern().astype(np.float32) - 1, pattern()),
    (1.04 * pattern().astype(np.float32) - 0.02, (1.04 * pattern() - 0.02).clip(0, 1)),
    (1000 * pattern().astype(np.float32), pattern() * 1000 / 1023),
    (-800 + 2000 * pattern().astype(np.float32), pattern()),
    (np.round(pattern() * 4095).astype(np.int32), np.round(pattern() * 4095) / 4095),
    (np.round(pattern() * 100000).astype(np.int32), np.round(pattern() * 100000) / 100000),
    (np.round(pattern() * 3000 - 1000).astype(np.int32), np.round(pattern() * 3000) / 3000),
    (np.full((20, 20), -7, np.int32), np.zeros((20, 20))),
    (np.ones((20, 20), np.uint16), np.full((20, 20), 1 / 255))],
    ids=["unit", "dark unit", "signed unit", "overshoot", "float 10 bit", "float HU", "12 bit in 32",
         "deeper", "HU", "flat", "nearly black"])
def test_floats_and_32_bit_integers(tmp_path, pixels, unit):
    Image.fromarray(pixels).save(tmp_path / "image.tif")
    assert_read(tmp_path / "image.tif", unit)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation, suffix):
    """The stored pixels are turned by the inverse of what the tag asks for."""
    upright = bytes_of(pattern())
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored)).convert("RGB")
    image.save(tmp_path / f"image{suffix}", exif=exif, quality=95)
    read = read_radiograph(tmp_path / f"image{suffix}")
    assert read.shape == (1, HEIGHT, WIDTH)
    assert (read - expected(pattern())).abs().max() < 0.05


# ---------------------------------------------------------------- size

def test_resizing_is_that_of_torchvision(tmp_path):
    """torchvision rounds an 8-bit image twice, along x and y, each time by up to half a level of 2 / 255."""
    from torchvision.transforms import Resize

    GREY.save(tmp_path / "image.png")
    theirs = np.asarray(Resize((32, 32))(GREY)) / 255
    ours = read_radiograph(tmp_path / "image.png", 32)
    assert (ours - expected(theirs)).abs().max() <= 2 * (2 / 255) / 2 + 1e-6


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_large_jpegs_in_draft_mode_differ_little_from_a_full_decode(tmp_path, orientation):
    """1,306 px are no multiple of 8: the padding of the last block must not shift the image."""
    big = Image.fromarray(bytes_of(pattern(1306, 1047)))
    exif = Image.Exif()
    exif[274] = orientation
    big.save(tmp_path / "big.jpg", quality=95, exif=exif)
    full = Image.fromarray(read_radiograph(tmp_path / "big.jpg")[0].numpy())
    for img_size in (64, 224):
        slow = torch.from_numpy(np.array(full.resize((img_size, img_size), Image.Resampling.BILINEAR)))
        difference = (read_radiograph(tmp_path / "big.jpg", img_size)[0] - slow).abs()
        assert difference.mean() < 0.002
        assert difference.max() < 0.03


@pytest.mark.parametrize("img_size", [0, -1, 15, 3.5, 64.0, True, "64", [64]])
def test_bad_img_size_is_one_clear_error(tmp_path, img_size):
    GREY.save(tmp_path / "image.png")
    for call in (lambda: read_radiograph(tmp_path / "image.png", img_size), lambda: check_img_size(img_size)):
        with pytest.raises(ValueError, match=r"^img_size=.*: expected a whole number of .*, at least 16$"):
            call()


def test_good_img_size_comes_back_as_int():
    assert [check_img_size(16), check_img_size(np.int64(64)), check_img_size(8, minimum=8)] == [16, 64, 8]
    assert type(check_img_size(np.int64(64))) is int
    with pytest.raises(ValueError, match="img_size=True"):
        check_img_size(True, minimum=1)


# ---------------------------------------------------------------- DICOM

TWELVE = np.round(pattern() * 4095).astype(np.uint16)


@pytest.mark.parametrize(("pixels", "tags", "unit"), [
    (bytes_of(pattern()), {}, bytes_of(pattern()) / 255),
    (TWELVE, {"BitsStored": 12}, TWELVE / 4095),
    (TWELVE // 2, {"BitsStored": 12}, (TWELVE // 2) / 4095),  # no stretching of a dark image
    (TWELVE, {"BitsStored": 12, "PhotometricInterpretation": "MONOCHROME1"}, 1 - TWELVE / 4095),
    (TWELVE, {"BitsStored": 12, "RescaleSlope": "0.5", "RescaleIntercept": "-100"}, TWELVE / 4095),
    (TWELVE, {"BitsStored": 12, "RescaleSlope": "-1", "RescaleIntercept": "4095"}, 1 - TWELVE / 4095),
    ((TWELVE.astype(np.int16) - 2048), {"BitsStored": 12}, TWELVE / 4095),
    # LINEAR_EXACT of centre 2000 and width 1000: 1500 is black, 2500 white (PS3.3 C.11.2.1.3.2)
    (TWELVE, {"BitsStored": 12, "WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"},
     ((TWELVE - 1500.0) / 1000).clip(0, 1)),
    # LINEAR: ((x - (c - .5)) / (w - 1) + .5) (PS3.3 C.11.2.1.2.1); the first of two, after the rescale
    (TWELVE, {"BitsStored": 12, "WindowCenter": [1000, 9], "WindowWidth": [501, 9], "RescaleSlope": "0.5",
              "RescaleIntercept": "0"}, ((TWELVE / 2 - 999.5) / 500 + 0.5).clip(0, 1)),
    (TWELVE, {"BitsStored": 12, "WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"},
     1 / (1 + np.exp(-4 * (TWELVE - 2000.0) / 1000))),
], ids=["8 bit", "12 bit", "dark", "monochrome1", "rescale", "negative slope", "signed", "window",
        "first window", "sigmoid"])
def test_dicom_scales(save_dicom, tmp_path, pixels, tags, unit):
    assert_read(save_dicom(tmp_path / "image", pixels, **tags), unit)


def test_dicom_table_comes_before_the_window(save_dicom, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    table = pydicom.Dataset()
    table.LUTDescriptor = [256, 0, 12]
    table.LUTData = [4095 - 16 * level for level in range(256)]
    table["LUTData"].VR = "US"
    path = save_dicom(tmp_path / "image.dcm", bytes_of(pattern()), VOILUTSequence=[table],
                      WindowCenter=5, WindowWidth=3)
    unit = (4095 - 16.0 * bytes_of(pattern())) / 4095
    assert_read(path, unit)


@pytest.mark.parametrize(("pixels", "tags", "reason"), [
    (None, {}, "DICOM without pixels"),
    (TWELVE, {"Modality": "US"}, "DICOM of modality US; expected one such as CR or DX"),
    (TWELVE, {"Modality": "MR"}, "DICOM of modality MR"),
    (np.stack([bytes_of(pattern())] * 3, -1),
     {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0},
     "DICOM with RGB pixels; expected grey ones"),
    (TWELVE, {"NumberOfFrames": 7}, "DICOM with several frames; expected a single"),
    (TWELVE, {"PixelData": TWELVE.tobytes()[:-2000]}, "damaged or incomplete"),
    (TWELVE, {"RescaleSlope": "0", "RescaleIntercept": "5"}, "its grey scale has no width"),
    (TWELVE[:8], {}, "80 x 8 px; a radiograph has at least 16 px a side")])
def test_dicom_that_is_no_radiograph(save_dicom, tmp_path, pixels, tags, reason):
    path = save_dicom(tmp_path / "image.dcm", pixels, **tags)
    with pytest.raises(UnreadableRadiographError, match="image.dcm: .*" + reason):
        read_radiograph(path)


@pytest.mark.parametrize(("package", "compressed"), [("pydicom", False), ("pylibjpeg", True)])
def test_a_missing_extra_says_what_brings_it(save_dicom, tmp_path, package, compressed):
    """In a fresh process in which the package cannot be imported (nor Pillow's JPEG 2000 decoder used)."""
    path = save_dicom(tmp_path / "image.dcm", TWELVE, BitsStored=12)
    if compressed:
        pytest.importorskip("openjpeg", reason='JPEG 2000 needs pip install "genailab-helpers[dicom]"')
        import pydicom

        small = pydicom.dcmread(path)
        small.compress(pydicom.uid.JPEG2000Lossless)
        small.save_as(path)
    code = f"""
        import sys
        sys.modules["{package}"] = None
        from PIL import features
        check = features.check_codec
        features.check_codec = lambda name: name != "jpg_2000" and check(name)
        from genailab_helpers.radiographs import UnreadableRadiographError, read_radiograph
        try:
            read_radiograph(sys.argv[1])
        except UnreadableRadiographError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)],
                          capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.endswith('pip install "genailab-helpers[dicom]"\n')
    assert done.stdout.startswith(f"{path}: ")


# ---------------------------------------------------------------- what is no radiograph

def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png() -> bytes:
    return stored(Image.fromarray(bytes_of(pattern(300, 300))), "PNG")


def jpeg() -> bytes:
    return stored(Image.fromarray(bytes_of(pattern(600, 600))), "JPEG", quality=95)


def png_with_bad_sum() -> bytes:
    content = bytearray(png())
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def bomb() -> bytes:
    """Make a PNG of a few bytes that declares 60,000 x 60,000 pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def small(width: int, height: int) -> bytes:
    return stored(Image.new("L", (width, height), 155), "PNG")


def tiff_cut_short() -> bytes:
    content = stored(Image.fromarray(bytes_of(pattern(200, 200))), "TIFF", compression="tiff_lzw")
    return content[:200] + bytes(400) + content[600:]


def float_tiff_with_nan() -> bytes:
    values = pattern().astype(np.float32)
    values[3, 3] = np.nan
    return stored(Image.fromarray(values), "TIFF")


BROKEN = {
    "zero.png": (lambda: b"", "neither PNG"),
    "text.png": (lambda: b"no picture, only words\n" * 9, "neither PNG, JPEG, BMP, TIFF, WebP nor DICOM"),
    "page.jpg": (lambda: b"<!DOCTYPE html><html></html>", "neither PNG, JPEG, BMP, TIFF, WebP nor DICOM"),
    "image.dcm": (lambda: b"not DICOM" * 50, "neither PNG, JPEG, BMP, TIFF, WebP nor DICOM"),
    "dicom.dcm": (lambda: bytes(128) + b"DICM" + b"\x00\x01garbage" * 20, "DICOM without pixels|damaged"),
    "program.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "neither PNG, JPEG"),
    "header.jpg": (lambda: jpeg()[:180], "damaged or incomplete"),
    "header.png": (lambda: png()[:60], "damaged or incomplete"),
    "half.jpg": (lambda: jpeg()[:len(jpeg()) // 2], "damaged or incomplete"),
    "half.png": (lambda: png()[:len(png()) * 6 // 10], "damaged or incomplete"),
    "sum.png": (png_with_bad_sum, "damaged or incomplete"),
    "lzw.tif": (tiff_cut_short, "damaged or incomplete"),
    "nan.tif": (float_tiff_with_nan, "infinite or not a number"),
    "bomb.png": (bomb, "damaged or incomplete .*pixels"),
    "dot.png": (lambda: small(1, 1), "1 x 1 px; a radiograph has at least 16 px a side"),
    "strip.png": (lambda: small(2000, 3), "2000 x 3 px; a radiograph has at least 16 px a side"),
}


@pytest.mark.parametrize("img_size", [None, 64])
@pytest.mark.parametrize("name", list(BROKEN))
def test_every_fault_is_one_clear_line(tmp_path, capfd, name, img_size):
    make, reason = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(make())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(UnreadableRadiographError, match=reason) as caught:
            read_radiograph(path, img_size)
    assert caught.value.path == path
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in str(caught.value)
    assert [str(w.message) for w in warned if w.category is not ResourceWarning] == []
    if name != "lzw.tif":  # libtiff itself writes a line to stderr, which no Python code can hold back
        assert capfd.readouterr() == ("", "")


def test_an_image_that_makes_pillow_warn_is_read_in_silence(tmp_path, monkeypatch, recwarn):
    GREY.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH - 1)
    assert_read(tmp_path / "large.png", bytes_of(pattern()) / 255)
    assert [warning.category for warning in recwarn] == []


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(UnreadableRadiographError, match="a folder, a pipe or a device; expected one"):
        read_radiograph(tmp_path)
    with pytest.raises(UnreadableRadiographError, match="No such file"):
        read_radiograph(tmp_path / "absent.png")


def test_the_error_survives_a_worker_process():
    error = pickle.loads(pickle.dumps(UnreadableRadiographError("a/b.png", "torn")))
    path = Path("a/b.png")
    assert (str(error), error.path, error.reason) == (f"{path}: torn", path, "torn")
    assert isinstance(error, ValueError)


@settings(deadline=None)
@given(cut=st.integers(0, 2000), make=st.sampled_from([png, jpeg, tiff_cut_short]),
       flips=st.lists(st.tuples(st.integers(0, 1999), st.integers(1, 255)), max_size=5))
def test_damaged_bytes_give_an_image_or_the_one_error(tmp_path_factory, cut, make, flips):
    content = bytearray(make())
    for place, change in flips:
        content[place % len(content)] ^= change
    path = tmp_path_factory.mktemp("fuzz") / "image"
    path.write_bytes(bytes(content[:len(content) - cut]))
    with suppress(UnreadableRadiographError):
        read = read_radiograph(path, 16)
        assert read.shape == (1, 16, 16)
        assert read.abs().max() <= 1


# ---------------------------------------------------------------- real odd files

HARD_INPUTS = {  # shape of the image, or the reason why it is none: names, read once and looked at
    (1970, 1625): "5.dcm", (16, 16): "CR_CSPINE_6154_noext", (4280, 3520): "Lat_Vertebra.png",
    (1955, 1841): "RG1_J2KI.dcm", (1760, 1760): "RG3_J2KI.dcm RG3_J2KI_inverted_10bit.png",
    (299, 299): "COVID-120.png all_black.png",
    (603, 700): "cmyk.jpeg exif_orientation_3.jpeg exif_orientation_6.jpeg exif_reference_upright.jpeg "
                "gray16_12bit_range.png gray16_full_range.png inverted.png jpeg_named_png.png "
                "la_half_alpha.png palette.png",
    (350, 374): "rgba_374x350_1-s2.0-S1684118220300682-main.pdf-003-b1.png",
    (391, 439): "rgba_439x391_1-s2.0-S1684118220300682-main.pdf-003-b2.png",
    "damaged or incomplete": "bad_crc.png header_only.jpeg truncated_50.jpeg truncated_60.png",
    "DICOM without pixels": "chrJapMulti.dcm emri_small_jpeg_2k_lossless_too_short.dcm",
    "at least 16 px a side": "one_pixel.png strip_2000x3.png",
    "neither PNG": "text_as_png.png zero_bytes.png .DS_Store ._01-July-2019-1.jpg",
}


@pytest.fixture(scope="module")
def hard_inputs(real_data: Path) -> Path:
    if not (real_data / "hard_inputs").is_dir():
        pytest.skip(f"{real_data} has no hard_inputs")
    return real_data / "hard_inputs"


@pytest.mark.parametrize(("outcome", "name"), [
    (outcome, name) for outcome, names in HARD_INPUTS.items() for name in names.split()])
def test_hard_inputs(hard_inputs, capfd, outcome, name):
    if isinstance(outcome, str):
        for img_size in (None, 64):
            with pytest.raises(UnreadableRadiographError, match=outcome):
                read_radiograph(hard_inputs / name, img_size)
    else:
        read = read_radiograph(hard_inputs / name)
        assert read.shape == (1, *outcome)
        assert -1 <= read.min() <= read.max() <= 1
        assert read_radiograph(hard_inputs / name, 64).shape == (1, 64, 64)
        if name != "all_black.png":
            assert read.std() > 0.05  # neither all white nor all black
    assert capfd.readouterr() == ("", "")


def test_headers_are_read_without_pixels(tmp_path):
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (20, 40)).save(tmp_path / "colour.jpg")
    assert inspect_radiograph(tmp_path / "deep.png") == ("PNG", "I;16", 30, 20)
    assert inspect_radiograph(str(tmp_path / "colour.jpg")) == ("JPEG", "RGB", 20, 40)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UnreadableRadiographError, match="neither PNG"):
        inspect_radiograph(tmp_path / "text.png")
