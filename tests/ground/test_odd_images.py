"""Images that strangers have: right or refused in one line, never wrong in silence, never large in memory."""

import os
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import png
import pytest
import tifffile
import torch
from PIL import Image

from genailab_helpers.datasets.privacy import find_traces, names_somebody
from genailab_helpers.radiographs import UnreadableRadiographError, inspect_radiograph, read_radiograph

pydicom = pytest.importorskip("pydicom", reason='needs pip install "genailab-helpers[dicom]"')
HEIGHT, WIDTH = 40, 48
UNIT = np.linspace(0.05, 0.95, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
TWELVE = np.round(UNIT * 4095).astype(np.uint16)
FULL = np.round(UNIT * 65535).astype(np.uint16)


def assert_read(path: Path, unit: np.ndarray, atol: float = 1e-5) -> None:
    expected = torch.from_numpy(unit * 2 - 1).float()[None]
    torch.testing.assert_close(read_radiograph(path), expected, atol=atol, rtol=0)


def refusal(path: Path, img_size: int | None = None) -> str:
    with pytest.raises(UnreadableRadiographError) as caught:
        read_radiograph(path, img_size)
    assert "\n" not in str(caught.value)
    return caught.value.reason


# ---------------------------------------------------------------- bits


def write_png(path: Path, channels: list[np.ndarray]) -> None:
    n = len(channels)
    with path.open("wb") as file:
        writer = png.Writer(WIDTH, HEIGHT, greyscale=n < 3, alpha=n in (2, 4), bitdepth=16)
        writer.write(file, np.stack(channels, -1).reshape(HEIGHT, -1).tolist())


@pytest.mark.parametrize(
    "kind", ["rgb.png", "grey alpha.png", "rgba.png", "rgb.tif", "big-endian rgb.tif", "cmyk.tif"])
def test_colours_of_16_bits_are_right_or_refused(tmp_path, kind):
    """Pillow keeps the upper byte: of 12 bits that leaves 16 levels, nearly black."""
    path, opaque = tmp_path / kind, np.full_like(FULL, 65535)
    for pixels, unit in ((FULL, UNIT), (TWELVE, None)):
        if kind.endswith("png"):
            channels = {"rgb.png": [pixels] * 3, "rgba.png": [*[pixels] * 3, opaque]}
            write_png(path, channels.get(kind, [pixels, opaque]))
        else:
            colours, order = ("separated", 4) if "cmyk" in kind else ("rgb", 3), ">" if "big" in kind else "<"
            stored = np.stack([pixels] * colours[1], -1).astype(f"{order}u2")
            tifffile.imwrite(path, stored, photometric=colours[0], byteorder=order)
        if unit is None:
            assert "store it as grey of 16 bits" in refusal(path)
        elif "cmyk" not in kind:
            assert_read(path, unit, atol=2 / 255)


@pytest.mark.filterwarnings("ignore:.* does not say how many bits")
def test_signs_and_kinds_of_numbers_in_tiffs(tmp_path):
    path = tmp_path / "image.tif"
    for pixels, unit in (
            ((UNIT * 100).round().astype("i2"), (UNIT * 100).round() / 255), (UNIT.astype("f4"), UNIT),
            (UNIT * 80000, None), (UNIT.astype("f2"), None), ((UNIT * 9).astype("u8"), None),
            ((UNIT * 100 - 50).astype("i1"), None), ((UNIT * 4e9).astype("u4"), None)):
        tifffile.imwrite(path, pixels)
        if unit is None:  # rare: named for what it is
            assert "TIFF, but" in (said := refusal(path)) or "deep, but not plainly grey" in said
        else:
            assert_read(path, unit)
    Image.fromarray(TWELVE).save(tmp_path / "keyed.png", transparency=5)
    assert "deep, but not plainly grey" in refusal(tmp_path / "keyed.png")


def test_several_pages_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "pages.tif") as file:
        for side in (20, 40):
            file.write(np.full((side, side), 80, np.uint8))
    frames = [Image.new("L", (20, 20), grey) for grey in (9, 99)]
    for suffix in ("png", "webp"):
        frames[0].save(tmp_path / f"frames.{suffix}", save_all=True, append_images=frames[1:])
    for path in tmp_path.iterdir():
        for read in (read_radiograph, inspect_radiograph):
            with pytest.raises(UnreadableRadiographError, match="several pages or frames; expected a single"):
                read(path)


# ---------------------------------------------------------------- files that end early


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def grey_png(rows: int, level: int = 150, side: int = 40, *extra: tuple[bytes, bytes]) -> bytes:
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    stream = zlib.compressobj(9)  # row by row: the test itself must not need the memory
    body = b"".join(stream.compress(b"\0" + bytes([level]) * side) for _ in range(rows)) + stream.flush()
    return png_of([(b"IHDR", head), *extra, (b"IDAT", body), (b"IEND", b"")])


def test_a_stream_that_ends_early_is_damaged_and_a_black_bottom_is_not(tmp_path):
    path = tmp_path / "image"
    for rows in (39, 20):
        path.write_bytes(grey_png(rows))
        assert "end early" in refusal(path)
    path.write_bytes(grey_png(40, level=0))
    assert_read(path, np.zeros((40, 40)))
    shown = np.zeros((64, 64), np.uint8)
    shown[:32] = 150
    for kind, mode in (("PNG", "L"), ("PNG", "P"), ("BMP", "RGB"), ("TIFF", "L"), ("TIFF", "1")):
        Image.fromarray(shown).convert(mode).save(path, kind)
        assert read_radiograph(path)[0, -1].max() == -1
    noise = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3] + b"\xff\xd9")
    for img_size in (None, 16):
        assert "end early" in refusal(path, img_size)
    noise[32:] = 128  # a grey bar, as libjpeg makes one
    for options in ({}, {"progressive": True}):
        Image.fromarray(noise).save(path, "JPEG", **options)
        assert read_radiograph(path)[0, -1].abs().max() < 0.01


def test_a_broken_exif_chunk_is_one_line(tmp_path):
    (tmp_path / "image.png").write_bytes(grey_png(40, 150, 40, (b"eXIf", b"garbage")))
    assert "damaged or incomplete" in refusal(tmp_path / "image.png", 16)


# ---------------------------------------------------------------- DICOM


@pytest.fixture
def save(save_dicom):
    """Give the function that writes 12 bits, by default the usual ones."""
    return lambda path, pixels=TWELVE, **tags: save_dicom(path, pixels, **{"BitsStored": 12} | tags)


VOID = {
    "window of width 0": {"WindowCenter": 900, "WindowWidth": 0},
    "empty slope": {"RescaleSlope": None, "RescaleIntercept": "0"},
    "exact window of width 0": {"WindowCenter": 9, "WindowWidth": 0, "VOILUTFunction": "LINEAR_EXACT"},
    "empty width": {"WindowCenter": 9, "WindowWidth": None},
    "empty intercept": {"RescaleIntercept": None, "RescaleSlope": "1"},
    "table without data": {"VOILUTSequence": [pydicom.Dataset()]},
    "no tables": {"VOILUTSequence": []},
    "rescale table without data": {"ModalityLUTSequence": [pydicom.Dataset()]},
    "empty padding": {"PixelPaddingValue": None},
}


@pytest.mark.parametrize("name", VOID)
def test_a_void_field_counts_as_absent(save, tmp_path, name):
    assert_read(save(tmp_path / "image", **VOID[name]), TWELVE / 4095)


@pytest.mark.parametrize("tags", [
    *({"RescaleSlope": slope, "RescaleIntercept": intercept}
      for slope, intercept in (("nan", "0"), ("1e400", "0"), ("1e307", "0"), ("1", "nan"))),
    {"WindowCenter": "nan", "WindowWidth": "100"}])
def test_no_number_in_a_dicom_header_becomes_a_pixel(save, tmp_path, tags):
    with pydicom.config.disable_value_validation():
        assert "grey scale has no width" in refusal(save(tmp_path / "image", **tags))


@pytest.mark.parametrize("syntax", [pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian])
def test_padding_is_black_however_the_scale_runs(save, tmp_path, syntax):
    pixels = TWELVE.astype(np.int16) - 2048
    pixels[:4], pixels[-4:] = -2048, -2046
    unit = 1 - (pixels + 2048) / 4095
    unit[:4] = 0
    path = tmp_path / "image"
    tags = {"PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": -2048, "syntax": syntax}
    assert_read(save(path, pixels, **tags), unit)
    unit[-4:] = 0
    assert_read(save(path, pixels, **tags, PixelPaddingRangeLimit=-2045), unit)


@pytest.mark.parametrize(("tags", "reason"), [
    ({"Modality": "DOE^JANE"}, "modality unknown"),
    ({"PhotometricInterpretation": "DOE JANE"}, "unknown pixels"),
    ({"BitsStored": [12, 12]}, "damaged"), ({"BitsStored": None}, "damaged"),
    ({"BitsAllocated": 17}, "damaged"),
    ({"PatientName": "DOE^JANE", "RescaleSlope": "12345678"}, "damaged")])
def test_what_a_header_says_of_somebody_reaches_no_message(save, tmp_path, tags, reason):
    with pydicom.config.disable_value_validation():
        path = save(tmp_path / "image.dcm", **tags)
    path.write_bytes(path.read_bytes().replace(b"12345678", b"DOE^JANE"))
    said = refusal(path)
    assert reason in said
    try:
        said += str(inspect_radiograph(path))
    except UnreadableRadiographError as error:
        said += str(error)
    assert "JANE" not in said


def test_dicom_without_its_mark_or_with_floats_is_named(save, tmp_path):
    path = save(tmp_path / "image.dcm")
    path.write_bytes(path.read_bytes()[132:])
    assert "DICOM without the letters DICM" in refusal(path)
    data = pydicom.dcmread(save(path))
    data.FloatPixelData = UNIT.astype(np.float32).tobytes()
    del data.PixelData
    data.save_as(path)
    assert "float pixels" in refusal(path)


# ---------------------------------------------------------------- time and memory


def test_a_long_text_in_a_file_costs_no_seconds(tmp_path):
    text = zlib.compress(b"a" * 1_000_000)
    (tmp_path / "image.png").write_bytes(grey_png(40, 90, 40, (b"zTXt", b"Comment\0\0" + text)))
    began = time.process_time()
    assert find_traces(tmp_path / "image.png") == ([], ["Comment"], False, False)
    assert not names_somebody("aa, " * 200_000 + "Dr." * 100_000 + "." * 100_000)
    assert time.process_time() - began < 1
    assert names_somebody("x DOE^JANE")


def test_more_than_50_million_pixels_are_refused_before_they_are_decoded(save, tmp_path):
    """In a process of its own: what was ever taken stays counted."""
    (tmp_path / "large.png").write_bytes(grey_png(7000, 90, 7000))
    (tmp_path / "too_large.png").write_bytes(grey_png(10, 90, 13300))
    save(tmp_path / "large.dcm", np.zeros((3000, 5000), np.uint16), Rows=65535, Columns=65535)
    save(tmp_path / "deflated.dcm", np.zeros((20000, 20000), np.uint16),
         syntax=pydicom.uid.DeflatedExplicitVRLittleEndian)
    code = """
        import resource, sys
        from genailab_helpers.radiographs import inspect_radiograph, read_radiograph
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        began, said = peak(), []
        for name in ("too_large.png", "large.dcm", "deflated.dcm"):
            for read in (read_radiograph, inspect_radiograph):
                try: said.append(str(read(f"{sys.argv[1]}/{name}")))
                except ValueError as error: said.append(error.reason)
        refused = peak() - began
        read_radiograph(f"{sys.argv[1]}/large.png", 64)
        print(*said, refused, peak() - began, sep="\\n")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
                          capture_output=True, text=True, check=True)
    *said, refused, read = done.stdout.splitlines()
    assert ["too many pixels" in line for line in said] == [True, True, True, False, False, False]
    assert ["deflated" in line for line in said] == [False] * 4 + [True] * 2
    assert int(refused) < 100  # MiB
    assert int(read) < 900


# ---------------------------------------------------------------- what is no file


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    for name in ("pipe.png", "link.png"):
        assert refusal(tmp_path / name) == "a folder, a pipe or a device; expected one image"


def test_other_files_are_named_for_what_they_are(tmp_path):
    for content, kind in ((b"GIF89a", "GIF"), (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"),
                          (b"\0\0\0\x18ftypheic", "HEIC or AVIF"), (b"MM\0\x2b", "TIFF")):
        (tmp_path / "image").write_bytes(content + bytes(60))
        assert refusal(tmp_path / "image").startswith(f"{kind}, but damaged or of a kind that is not read")
