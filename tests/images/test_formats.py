"""Which formats are read, what is refused before it is decoded, and what a folder's listing says."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageCms, PngImagePlugin

from faithdiff_core.errors import ImageError, MissingPackageError
from faithdiff_core.images.depth import av1_or_hevc_bits, jxl_size_and_bits
from faithdiff_core.images.formats import SUFFIXES, pillow_formats, read_suffixes
from faithdiff_core.images.listing import list_folder
from faithdiff_core.images.reading import LoadedImage, decode_image, load_image
from faithdiff_core.images.writing import save_image

RNG = np.random.default_rng(0)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def _noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def _encoded(values: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


def _colors(image: LoadedImage) -> np.ndarray:
    return image.colors.permute(1, 2, 0).numpy()


def test_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript under an image's name: Pillow would have Ghostscript run it."""
    started = tmp_path / "started"
    for name in ("gs", "gswin32c", "gswin64c"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho started > {started}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "a.png"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(ImageError, match="not an image that can be read"):
        load_image(path)
    assert not started.exists()
    with pytest.raises(OSError, match=r"."), Image.open(path) as image:  # what Pillow does by itself
        image.load()
    assert started.exists()


def test_formats_that_run_programs_or_hold_others_are_not_listed() -> None:
    assert set(SUFFIXES) <= set(pillow_formats())
    assert not {"EPS", "WMF", "FITS", "PSD", "ICNS", "ICO", "HDF5", "MPEG"} & set(pillow_formats())
    assert {".jfif", ".jpe", ".avif", ".jp2", ".tga"} <= set(read_suffixes())


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("PNG", 0),
        ("JPEG", 40),
        ("WEBP", 60),
        ("TIFF", 0),
        ("BMP", 0),
        ("AVIF", 60),
        ("JPEG2000", 0),
        ("PPM", 0),
        ("TGA", 0),
    ],
)
@pytest.mark.parametrize("end", ["own", "none"])
def test_every_format_is_read(kind: str, tolerance: int, end: str) -> None:
    smooth = np.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)
    content = _encoded(smooth, kind)
    assert np.abs(_colors(decode_image(content, "a")) * 255 - smooth).max() <= tolerance + 0.01
    if end == "none":
        cut = content[: len(content) // 2]
        with pytest.raises(ImageError, match="corrupted"):
            decode_image(cut, "a")


def test_a_canvas_that_no_frame_fills_is_refused() -> None:
    frames = [Image.fromarray(_noise(20, 24, 3)) for _ in range(2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    content = bytearray(buffer.getvalue())
    at = content.index(b"VP8X") + 12  # behind the flags: width - 1 and height - 1, of 24 bits
    content[at : at + 3] = (7_000_000 - 1).to_bytes(3, "little")
    with pytest.raises(ImageError, match="a WebP canvas of 7000000 x 20 pixels"):
        decode_image(bytes(content), "a.webp")


@pytest.mark.parametrize("height", [62760, 31528])
def test_a_header_that_claims_more_rows(height: int) -> None:
    """One byte of a file of 40 rows is another: TIFF lists too few strips for it, a GIF's canvas may be that high."""
    values = _noise(40, 48, 3)
    tiff = bytearray(_encoded(values, "TIFF"))
    entry = tiff.index(struct.pack("<H", 257), struct.unpack_from("<I", tiff, 4)[0])
    tiff[entry + 9] = height >> 8
    with pytest.raises(ImageError, match=r"it has 1 strips or tiles, .* are needed"):
        decode_image(bytes(tiff), "a.tif")
    gif = bytearray(_encoded(values, "GIF"))
    gif[9] = height >> 8
    assert decode_image(bytes(gif), "a.gif").size == (height, 48)


JPEG_KINDS = [
    {},
    {"progressive": True},
    {"subsampling": 0},
    {"restart_marker_rows": 1},
    {"quality": 100, "optimize": True},
]


@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_no_rows_of_a_jpeg_are_made_up(mode: str, options: dict[str, int]) -> None:
    """libjpeg fills in what is missing before an end marker, and says nothing."""

    def encoded(values: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(values).convert(mode).save(buffer, "JPEG", **options)
        return buffer.getvalue()

    for values in (_noise(70, 90, 3), np.full((70, 90, 3), 99, np.uint8), _noise(1, 1, 3)):
        assert decode_image(encoded(values), "a.jpg").size == values.shape[:2]
    content = encoded(_noise(70, 90, 3))
    frame = max(content.find(bytes((0xFF, kind))) for kind in (0xC0, 0xC1, 0xC2))
    taller = bytearray(content)
    taller[frame + 6] += 40
    last = content.rindex(b"\xff\xda")
    cut = content[: (last + len(content)) // 2].rstrip(b"\xff") + b"\xff\xd9"
    for damaged in (bytes(taller), cut):
        with pytest.raises(ImageError, match="corrupted or truncated"):
            decode_image(damaged, "a.jpg")


def test_what_follows_a_jpeg_is_not_its_data() -> None:
    buffer = io.BytesIO()
    frames = [Image.fromarray(_noise(40, 48, 3)) for _ in range(2)]
    frames[0].save(buffer, "MPO", save_all=True, append_images=frames[1:])
    for content in (buffer.getvalue(), _encoded(_noise(40, 48, 3), "JPEG") + b"a video" * 99):
        assert decode_image(content, "a.jpg").size == (40, 48)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs the permissions of POSIX")
def test_permission_denied_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        os.chmod(folder, 0o755)
        path = Path(folder) / "a.png"
        path.write_bytes(_encoded(_noise(4, 4, 3), "PNG"))
        path.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            with pytest.raises(ImageError, match=r"a\.png cannot be read: Permission denied\."):
                load_image(path)
        finally:
            os.seteuid(user)


def test_a_folder_says_what_is_left_out(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.jfif", "sub/c.jpe", "d.psd", "e.CR2", "f.txt", "._a.JPG", ".h.png", "sub/g.psd"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    found = list_folder(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in found.files] == ["a.JPG", "b.jfif", "sub/c.jpe"]
    assert found.note == "left out 3 file(s) of formats that are not read (.cr2, .psd)."


def test_a_missing_plugin_is_named(tmp_path: Path) -> None:
    if ".heic" in read_suffixes():
        assert "HEIF" in pillow_formats()
        return
    heic = b"\0\0\0\x18ftypheic" + bytes(40)
    with pytest.raises(MissingPackageError, match="is HEIF; to read it, run `pip install pillow-heif`"):
        decode_image(heic, "a.heic")
    (tmp_path / "a.heic").write_bytes(heic)
    assert "Install pillow-heif to read them" in list_folder(tmp_path).note


# The first bytes of files that libjxl wrote, of 8 bits in several sizes, and of 16 (behind the boxes).
@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("ff0a0508880408000100f5214b3841750b74709d9e7cfa66", (40, 24, 8)),
        ("ff0a4f40240800010091c32bf98b919102aec5198dc16903", (64, 64, 8)),
        ("ff0a8000400c002d880200c100b59f200000152aa38c1bbc", (33, 17, 8)),
        ("ff0a00806e178804080201001c0000000000e00dded4cddd", (3000, 1, 8)),
        ("ff0af83e100908020100c105000000ca800be6810b563905", (640, 480, 8)),
    ],
)
def test_jpeg_xl_headers(header: str, expected: tuple[int, int, int]) -> None:
    assert jxl_size_and_bits(bytes.fromhex(header)) == expected


class TestDeepFormats:
    """Formats other than PNG and TIFF with more than 8 bits: at their depth, or refused."""

    def test_avif(self) -> None:
        content = bytearray(_encoded(_noise(16, 16, 3), "AVIF"))
        assert av1_or_hevc_bits(bytes(content)) == 8
        content[content.index(b"av1C") + 6] |= 0x40
        with pytest.raises(ImageError, match=r"AVIF with 10 bits per channel.*Save it as PNG or TIFF with 16 bits"):
            decode_image(bytes(content), "a.avif")

    def test_jpeg_2000(self) -> None:
        done, content = cv2.imencode(".jp2", _noise(64, 64, 3, dtype=np.uint16))
        assert done
        with pytest.raises(ImageError, match="JPEG 2000 with 16 bits"):
            decode_image(content.tobytes(), "a.jp2")
        grey = _noise(64, 64, dtype=np.uint16)
        loaded = decode_image(_encoded(grey, "JPEG2000"), "a.jp2")
        assert loaded.bits == 16
        assert np.abs(_colors(loaded)[..., 0] * 65535 - grey).max() < 0.01

    @pytest.mark.parametrize("largest", [100, 255, 1023, 65535])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_netpbm(self, largest: int, channels: int) -> None:
        values = RNG.integers(0, largest, (9, 11, channels), endpoint=True)
        values[0, 0] = largest
        kind = "P6" if channels == 3 else "P5"
        content = (
            f"{kind} # a comment\n11 9\n{largest}\n".encode()
            + values.astype(">u2" if largest > 255 else "u1").tobytes()
        )
        loaded = decode_image(content, "a.ppm")
        assert loaded.bits == (16 if largest > 255 else 8)
        step = 65535 if largest > 255 else 255
        assert np.abs(_colors(loaded) - values / largest).max() <= 0.51 / step
        with pytest.raises(ImageError, match="truncated"):
            decode_image(content[:-5], "a.ppm")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(values: np.ndarray, color_type: int, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG of 8 or 16 bits without filters."""
    bits = 8 * values.dtype.itemsize
    rows = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, color_type, 0, 0, 0)
    trns = _chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + trns
        + _chunk(b"IDAT", zlib.compress(rows))
        + _chunk(b"IEND", b"")
    )


class TestPng:
    @pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3)])
    def test_16_bits_keep_a_transparent_colour(self, color_type: int, channels: int) -> None:
        values = _noise(7, 9, channels, dtype=np.uint16)
        content = _png(values, color_type, tuple(int(value) for value in values[2, 3]))
        loaded = decode_image(content, "a.png")
        assert (loaded.bits, loaded.grey) == (16, channels == 1)
        assert loaded.alpha is not None
        assert np.argwhere(loaded.alpha[0].numpy() == 0).tolist() == [[2, 3]]
        assert np.abs(_colors(loaded) * 65535 - values).max() < 0.01

    def test_large_texts_and_profiles_are_no_damage(self) -> None:
        values = _noise(6, 8, 3)
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(2_000_000)
        info = PngImagePlugin.PngInfo()
        for name in ("workflow", "prompt"):
            info.add_itxt(name, "x" * 40_000_000, zip=True)
        content = _encoded(values, "PNG", pnginfo=info, icc_profile=profile)
        with pytest.raises(ValueError, match="Decompressed data too large"), Image.open(io.BytesIO(content)) as image:
            image.load()
        loaded = decode_image(content, "a.png")
        assert (loaded.icc, loaded.notes) == (profile, ())
        assert np.array_equal((_colors(loaded) * 255).round(), values)

    @pytest.mark.parametrize("color_type", [0, 2, 4, 6])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_half_of_the_pixels_is_an_error(self, color_type: int, dtype: type) -> None:
        values = _noise(40, 30, {0: 1, 2: 3, 4: 2, 6: 4}[color_type], dtype=dtype)
        whole = _png(values, color_type)
        short = _png(values[:20], color_type)
        wrong_height = whole[:33] + short[33:]  # an image of 40 rows with the pixels of 20
        for content in (whole[: len(whole) // 2], whole[:-12], wrong_height):
            with pytest.raises(ImageError, match="corrupted or truncated"):
                decode_image(content, "a.png")
        assert decode_image(whole, "a.png").size == (40, 30)


class TestFilesThatAreNone:
    def test_links_pipes_and_names(self, tmp_path: Path) -> None:
        circle, pipe = tmp_path / "circle.png", tmp_path / "pipe.png"
        circle.symlink_to(circle)
        os.mkfifo(pipe)
        for path, message in [
            (circle, "a link that leads to no file"),
            (pipe, "a device or a pipe"),
            (Path("/dev/zero"), "a device or a pipe"),
            (tmp_path / ("x" * 300 + ".png"), "There is no file"),
            (Path("a\0.png"), "There is no file"),
        ]:
            with pytest.raises(ImageError, match=message):
                load_image(path)

    def test_a_name_that_is_not_utf_8(self, tmp_path: Path) -> None:
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfc\xdfe.png"))
        path.write_bytes(_encoded(_noise(4, 4, 3), "PNG"))
        assert load_image(path).size == (4, 4)


def test_webp_of_a_grey_image_has_no_grey_profile(tmp_path: Path) -> None:
    grey = decode_image(_encoded(np.linspace(0, 255, 256).reshape(16, 16).astype(np.uint8), "PNG"), "a.png")
    profile = _grey_profile(gamma=1.0)
    save_image(tmp_path / "a.webp", LoadedImage(grey.colors, grey=True, icc=profile))
    back = load_image(tmp_path / "a.webp")
    assert back.notes == ()
    linear = grey.colors.numpy()
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
    assert np.abs(back.colors.numpy() - srgb).mean() < 0.02  # WebP is lossy


def _grey_profile(gamma: float) -> bytes:
    """A grey display profile with one curve (ICC.1:2010, sections 7, 8.4 and 10.5)."""
    tags = {
        b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2),
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D),
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(79),
    }
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    size = at + len(body)
    header = struct.pack(">I4xI4s4s4s", size, 0x02100000, b"mntr", b"GRAY", b"XYZ ").ljust(36, b"\0") + b"acsp"
    header = header.ljust(68, b"\0") + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def test_a_text_that_jpeg_cannot_hold_is_left_out(tmp_path: Path) -> None:
    image = decode_image(_encoded(_noise(8, 8, 3), "PNG"), "a.png")
    notes = save_image(tmp_path / "a.jpg", image, text={"Software": "FaithDiff", "faithdiff": "x" * 70_000})
    assert notes == ("its metadata `faithdiff` is longer than the 64 KB that JPEG takes, and was left out",)
    with Image.open(tmp_path / "a.jpg") as saved:
        assert saved.getexif()[0x010E] == '{"Software": "FaithDiff"}'
    assert save_image(tmp_path / "a.webp", image, text={"faithdiff": "x" * 70_000}) == ()


def test_a_name_of_the_largest_length_is_written(tmp_path: Path) -> None:
    limit = os.pathconf(tmp_path, "PC_NAME_MAX")
    path = tmp_path / ("n" * (limit - 4) + ".png")
    save_image(path, decode_image(_encoded(_noise(8, 8, 3), "PNG"), "a.png"))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
