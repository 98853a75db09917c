"""PNG files chunk by chunk: what Pillow and OpenCV leave out, or refuse for no need (PNG specification, section 11)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_PROFILE = 2**26
"""Most bytes of an unpacked colour profile: 64 MiB; the largest of scanners and printers have a tenth."""

XMP_KEYWORD = b"XML:com.adobe.xmp"
"""Keyword of the text chunk that holds XMP."""

_METRES_IN_INCH = 0.0254

_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Interlacing: first column, first row, steps along both."""


@dataclass(frozen=True)
class PngFile:
    """A PNG file without what is no image.

    Attributes:
        content: the file without texts and colour profile, both of which Pillow limits to 1 MiB.
        width, height: in pixels.
        bits: per channel.
        color_type: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGB with alpha.
        interlaced: whether pixels come in seven passes.
        icc: the colour profile, or None.
        bad_profile: whether there was one that cannot be unpacked.
        transparent: the grey value or colour that is transparent, or ().
        exif: EXIF data, or None.
        xmp: XMP, or None.
        dpi: pixels in an inch across and down, or None.
    """

    content: bytes
    width: int
    height: int
    bits: int
    color_type: int
    interlaced: bool
    icc: bytes | None
    bad_profile: bool
    transparent: tuple[int, ...]
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of every chunk, the last perhaps cut."""
    at = len(SIGNATURE)
    while at + 8 <= len(content):
        (size,) = struct.unpack_from(">I", content, at)
        kind, end = content[at + 4 : at + 8], at + 12 + size
        yield kind, at, min(end, len(content))
        if kind == b"IEND":
            return
        at = end


def read_png(content: bytes) -> PngFile | None:
    """Take a PNG file apart; None if it is none, or has no header to speak of."""
    if not content.startswith(SIGNATURE) or len(content) < 33 or content[12:16] != b"IHDR":
        return None
    width, height, bits, color_type, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    kept = [SIGNATURE]
    icc: bytes | None = None
    bad_profile = False
    transparent: tuple[int, ...] = ()
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    for kind, start, end in _chunks(content):
        data = content[start + 8 : end - 4]
        if kind == b"iCCP":
            icc = _profile(data)
            bad_profile = icc is None
        elif kind == b"tRNS" and color_type in (0, 2) and len(data) == 2 * _CHANNELS[color_type]:
            transparent = struct.unpack(f">{len(data) // 2}H", data)
        elif kind == b"eXIf":
            exif = data
        elif kind == b"iTXt" and data.startswith(XMP_KEYWORD + b"\0"):
            xmp = _international_text(data)
        elif kind == b"pHYs" and len(data) == 9 and data[8] == 1:
            across, down = struct.unpack(">II", data[:8])
            dpi = (across * _METRES_IN_INCH, down * _METRES_IN_INCH)
        if kind not in (*_TEXT, b"iCCP"):
            kept.append(content[start:end])
    return PngFile(
        b"".join(kept), width, height, bits, color_type, bool(interlaced), icc, bad_profile, transparent, exif, xmp, dpi
    )


def _profile(data: bytes) -> bytes | None:
    name_end = data.find(b"\0")
    return None if name_end < 0 else _unpacked(data[name_end + 2 :])


def _international_text(data: bytes) -> bytes | None:
    """The text of an iTXt chunk: behind keyword, compression, language and translated keyword."""
    packed = data[len(XMP_KEYWORD) + 1 : len(XMP_KEYWORD) + 2] == b"\1"
    rest = data[len(XMP_KEYWORD) + 3 :].split(b"\0", 2)
    if len(rest) < 3:
        return None
    return _unpacked(rest[2]) if packed else rest[2]


def _unpacked(data: bytes) -> bytes | None:
    """What was compressed, or None where it is corrupted or longer than `MAX_PROFILE`."""
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(data, MAX_PROFILE)
    except zlib.error:
        return None
    return unpacked if unpacker.eof else None


def check_complete(png: PngFile) -> None:
    """See that all pixels are there and whole; Pillow and OpenCV hand out a half-filled image where they are not.

    Raises:
        ValueError: a chunk that the image needs is corrupted, or pixels are missing.
    """
    wanted = sum(
        rows * (1 + (columns * _CHANNELS.get(png.color_type, 0) * png.bits + 7) // 8)
        for columns, rows in _pass_sizes(png)
        if columns and rows
    )
    unpacker, size, ended = zlib.decompressobj(), 0, False
    for kind, start, end in _chunks(png.content):
        needed = kind[:1].isupper()
        if start + 12 > end or (
            needed and struct.unpack_from(">I", png.content, end - 4)[0] != zlib.crc32(png.content[start + 4 : end - 4])
        ):
            raise ValueError(f"its chunk {kind!r} is corrupted")
        if kind == b"IDAT":
            size += _unpacked_size(unpacker, png.content[start + 8 : end - 4], wanted - size)
        ended = ended or kind == b"IEND"
    if size < wanted or not ended:
        raise ValueError(f"it has {size} of {wanted} bytes of pixels")


def _unpacked_size(unpacker: zlib._Decompress, data: bytes, most: int) -> int:
    """How many bytes there are; not much more than `most` are unpacked."""
    size = 0
    while data and not unpacker.eof and size < most:
        size += len(unpacker.decompress(data, 2**24))
        data = unpacker.unconsumed_tail
    return size


def _pass_sizes(png: PngFile) -> list[tuple[int, int]]:
    """Columns and rows of each pass."""
    if not png.interlaced:
        return [(png.width, png.height)]
    return [
        (
            -(-(png.width - left) // across) if png.width > left else 0,
            -(-(png.height - top) // down) if png.height > top else 0,
        )
        for left, top, across, down in _PASSES
    ]
