"""TIFF layouts: each is read as it was written, or refused by name; tifffile is the second reader."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

from faithdiff_core.errors import ImageError
from faithdiff_core.images.reading import LoadedImage, decode_image, load_image
from faithdiff_core.images.writing import save_image

H, W = 33, 45
Y, X = np.mgrid[0:H, 0:W]
RGB = np.stack([X / (W - 1), Y / (H - 1), (X + Y) / (H + W - 2)], -1)
ALPHA = np.clip((X[..., None] - 5) / 30, 0, 1)


def _kind(bits: int) -> type:
    return np.uint8 if bits == 8 else np.uint16


def _counts(values: np.ndarray, bits: int) -> np.ndarray:
    return np.round(values * (2**bits - 1)).astype(_kind(bits))


def _written(values: np.ndarray, **options: Any) -> bytes:
    """The file, which tifffile reads back as it was given."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    assert np.array_equal(tifffile.imread(io.BytesIO(buffer.getvalue())), values)
    return buffer.getvalue()


def _colors(image: LoadedImage) -> np.ndarray:
    return image.colors.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"rowsperstrip": 7},
        {"compression": "zlib", "predictor": True},
        {"compression": "zlib", "predictor": True, "byteorder": ">", "rowsperstrip": 10},
        {"compression": "lzma"},
        {"tile": (16, 32)},
        {"tile": (16, 16), "compression": "zlib", "predictor": True, "byteorder": ">"},
        {"tile": (64, 64)},
    ],
    ids=str,
)
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_storage(bits: int, options: dict[str, Any], planes: str) -> None:
    values = _counts(RGB, bits)
    stored = np.moveaxis(values, -1, 0) if planes == "separate" else values
    loaded = decode_image(_written(stored, photometric="rgb", planarconfig=planes, **options), "a.tiff")
    assert (loaded.bits, loaded.grey, loaded.alpha, loaded.notes) == (bits, False, None, ())
    assert np.abs(_colors(loaded) * (2**bits - 1) - values).max() < 0.01


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("extra", ["assocalpha", "unassalpha", "unspecified"])
def test_the_fourth_sample(bits: int, grey: bool, planes: str, extra: str) -> None:
    colors = RGB[..., :1] if grey else RGB
    stored = np.concatenate([colors * ALPHA if extra == "assocalpha" else colors, ALPHA], -1)
    values = _counts(stored, bits)
    content = _written(
        np.moveaxis(values, -1, 0) if planes == "separate" else values,
        photometric="minisblack" if grey else "rgb",
        planarconfig=planes,
        extrasamples=[extra],
    )
    loaded = decode_image(content, "a.tiff")
    assert (loaded.bits, loaded.grey, loaded.alpha is None) == (bits, grey, extra == "unspecified")
    if loaded.alpha is not None:
        assert np.abs(loaded.alpha[0].numpy() - ALPHA[..., 0]).max() < 1 / 2**bits
    # Premultiplied colours are known to a step of the sample, divided by alpha.
    tolerance = 1.5 / 2**bits / (ALPHA if extra == "assocalpha" else np.ones_like(ALPHA)).clip(0.02)
    wanted = np.broadcast_to(colors, RGB.shape)
    seen = (ALPHA > 0) | (extra == "unspecified")
    assert ((np.abs(_colors(loaded) - wanted) <= tolerance) | ~seen).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_white_is_zero(bits: int) -> None:
    white = _written(2**bits - 1 - _counts(RGB[..., 0], bits), photometric="miniswhite")
    black = _written(_counts(RGB[..., 0], bits), photometric="minisblack")
    assert np.abs(_colors(decode_image(white, "a.tif")) - _colors(decode_image(black, "b.tif"))).max() < 1e-6


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(bits: int, orientation: int) -> None:
    content = bytearray(_written(_counts(RGB, bits), photometric="rgb", extratags=[(274, 3, 1, orientation, True)]))
    # TIFF 6.0, tag 274: what the first row and the first column of the file are.
    turned = {
        1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1), 6: lambda x: x.swapaxes(0, 1)[:, ::-1],
        7: lambda x: x.swapaxes(0, 1)[::-1, ::-1], 8: lambda x: x.swapaxes(0, 1)[::-1],
    }[orientation]  # fmt: skip
    loaded = _colors(decode_image(bytes(content), "a.tif"))
    assert loaded.shape == turned(RGB).shape
    assert np.abs(loaded - turned(RGB)).max() < 1 / 2**bits


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_thumbnail_first(tmp_path: Path, bits: int, order: Any) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, byteorder=order) as file:
        file.write(_counts(RGB[::8, ::8], 8), photometric="rgb", subfiletype=1)
        file.write(_counts(RGB, bits), photometric="rgb")
    loaded = load_image(path)
    assert (loaded.size, loaded.bits, loaded.notes) == ((H, W), bits, ())
    assert np.abs(_colors(loaded) - RGB).max() < 1 / 2**bits


def test_several_pages_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for number in range(3):
            file.write(_counts(RGB / (number + 1), 16), photometric="rgb")
    loaded = load_image(path)
    assert loaded.notes == ("it has 3 frames; only the first is used",)
    assert np.abs(_colors(loaded) - RGB).max() < 1e-4


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (RGB.astype(np.float32), {"photometric": "rgb"}, "3 floating-point 32-bit samples, RGB"),
        (RGB.astype(np.float16), {"photometric": "rgb"}, "3 floating-point 16-bit samples, RGB"),
        (_counts(RGB, 16).astype(np.uint32), {"photometric": "rgb"}, "3 32-bit samples, RGB"),
        (_counts(RGB, 16).astype(np.int16), {"photometric": "rgb"}, "3 signed 16-bit samples, RGB"),
        (_counts(RGB[..., 0] / 4, 8).astype(np.int8), {"photometric": "minisblack"}, "1 signed 8-bit samples, black"),
        (_counts(np.concatenate([RGB, ALPHA], -1), 16), {"photometric": "separated"}, "4 16-bit samples, CMYK"),
        (_counts(RGB, 16), {"photometric": "cielab"}, "3 16-bit samples, CIELab"),
    ],
)  # fmt: skip
def test_refused_by_name(values: np.ndarray, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError, match=f"not supported: {message}.*Save it"):
        decode_image(_written(values, **options), "a.tif")


def test_thumbnails_alone_are_a_raw_file() -> None:
    content = _written(_counts(RGB, 8), photometric="rgb", subfiletype=1)
    with pytest.raises(ImageError, match=r"thumbnails alone.* camera's raw file"):
        decode_image(content, "a.dng")


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "predictor": True}, {"tile": (16, 16)}], ids=str)
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("bits", [8, 16])
def test_no_pixels_are_made_up(options: dict[str, Any], planes: str, bits: int) -> None:
    """A file without its end, with strips shorter than its rows or too few gives an error and no half-filled image."""
    values = _counts(RGB, bits)
    stored = np.moveaxis(values, -1, 0) if planes == "separate" else values
    content = _written(stored, photometric="rgb", planarconfig=planes, **options)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages[0]
        offsets, counts = page.dataoffsets, page.databytecounts
        lists = [tag for tag in page.tags.values() if tag.code in (279, 325)]
        heights = [tag for tag in page.tags.values() if tag.code == 257]
    with pytest.raises(ImageError, match="corrupted or truncated"):
        decode_image(content[: offsets[-1] + 8], "a.tif")
    short = bytearray(content)
    struct.pack_into("<I" if lists[0].dtype == 4 else "<H", short, lists[0].valueoffset, counts[0] // 2)
    with pytest.raises(ImageError, match="corrupted or truncated"):
        decode_image(bytes(short), "a.tif")
    for height in (4 * H, 5_000_000):
        few = bytearray(content)
        few[heights[0].offset + 2] = 4  # of 32 bits
        struct.pack_into("<I", few, heights[0].valueoffset, height)
        with pytest.raises(ImageError, match=r"are needed|shorter than their rows"):
            decode_image(bytes(few), "a.tif")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_in_strips_is_as_high_as_they_are(mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, "TIFF", compression="jpeg", tiffinfo={278: 16})
    content = buffer.getvalue()
    assert decode_image(content, "a.tif").size == (H, W)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        start, count = file.pages[0].dataoffsets[1], file.pages[0].databytecounts[1]
    lower, early = bytearray(content), bytearray(content)
    frame = content.index(b"\xff\xc0", start)
    lower[frame + 5 : frame + 7] = struct.pack(">H", 8)
    early[start + count - count // 4 : start + count - count // 4 + 2] = b"\xff\xd9"
    for damaged in (lower, early):
        with pytest.raises(ImageError, match=r"shorter than their rows|end before the image"):
            decode_image(bytes(damaged), "a.tif")


def test_directories_in_a_circle_end() -> None:
    content = bytearray(_written(_counts(RGB, 16), photometric="rgb"))
    (first,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, first)
    struct.pack_into("<I", content, first + 2 + 12 * entries, first)
    assert decode_image(bytes(content), "a.tif").notes == ()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
def test_what_is_written(tmp_path: Path, bits: int, grey: bool, transparent: bool) -> None:
    """tifffile, this package and, for 8 bits, Pillow read the values back; text and profile are there."""
    height, width = 700, 333  # several strips, the last one shorter
    values = np.random.default_rng(1).integers(0, 2**bits, (height, width, 1 if grey else 3), endpoint=False)
    alpha = np.random.default_rng(2).integers(0, 2**bits, (height, width, 1), endpoint=False)
    scaled = torch.from_numpy(values / (2**bits - 1)).float().permute(2, 0, 1)
    opacity = torch.from_numpy(alpha / (2**bits - 1)).float().permute(2, 0, 1) if transparent else None
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    colors = scaled.expand(3, -1, -1)
    image = LoadedImage(colors, opacity, grey, bits, None if grey else icc)
    path = tmp_path / "a.TIF"
    save_image(path, image, text={"faithdiff": '{"prompt": "Käse – 雪"}'})

    expected = np.concatenate([values, alpha], -1) if transparent else values
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert np.array_equal(page.asarray().reshape(expected.shape), expected)
        assert [int(kind) for kind in page.extrasamples] == [2] * transparent  # straight alpha
        assert json.loads(json.loads(page.description)["faithdiff"]) == {"prompt": "Käse – 雪"}
    loaded = load_image(path)
    assert (loaded.bits, loaded.grey, loaded.notes, loaded.icc is None) == (bits, grey, (), grey)
    assert torch.equal(loaded.colors, colors)
    assert (loaded.alpha is not None) == transparent
    if opacity is not None and loaded.alpha is not None:
        assert torch.equal(loaded.alpha, opacity)
    if bits == 8:
        with Image.open(path) as opened:
            assert np.array_equal(np.asarray(opened).reshape(expected.shape), expected)


def test_a_small_one_is_written_in_one_strip(tmp_path: Path) -> None:
    save_image(tmp_path / "a.tiff", LoadedImage(torch.full((3, 1, 1), 0.5), bits=16))
    assert tifffile.imread(tmp_path / "a.tiff").tolist() == [[[32768, 32768, 32768]]]
