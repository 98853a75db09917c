"""Writing TIFF: 8 and 16 bits, grey or RGB, with alpha, profile and a text.

Pillow writes 16 bits for grey without alpha only. Layout: little-endian, strips packed with deflate over horizontal
differences (TIFF 6.0, sections 2, 4, 6, 14 and 18; deflate: Adobe's TIFF technical notes of 2002).
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_STRIP_BYTES = 2**18
"""Unpacked bytes of a strip, about: readers that show a part of a large image unpack no more than they need."""

_ASCII, _SHORT, _LONG, _RATIONAL, _UNDEFINED = 2, 3, 4, 5, 7
"""TIFF's numbers for types of values."""

_DEFLATE, _DIFFERENCES, _STRAIGHT_ALPHA = 8, 2, 2

_DOTS_PER_INCH = struct.pack("<II", 72, 1)
"""A resolution is required; 72 says that none is known."""


def encode_tiff(values: np.ndarray, *, description: str = "", icc: bytes | None = None) -> bytes:
    """The bytes of a TIFF file.

    Args:
        values: (H, W, C), uint8 or uint16, in the order L, LA, RGB or RGBA, alpha not premultiplied.
        description: ASCII text for the tag ImageDescription.
        icc: colour profile.
    """
    height, width, channels = values.shape
    bits = 8 * values.dtype.itemsize
    alpha = channels in (2, 4)
    rows = max(1, _STRIP_BYTES // (width * channels * values.dtype.itemsize))
    strips = [_packed(values[top : top + rows]) for top in range(0, height, rows)]
    entries: list[tuple[int, int, bytes]] = [
        (256, _LONG, _longs(width)),
        (257, _LONG, _longs(height)),
        (258, _SHORT, _shorts(*[bits] * channels)),
        (259, _SHORT, _shorts(_DEFLATE)),
        (262, _SHORT, _shorts(1 if channels <= 2 else 2)),
        (273, _LONG, _longs(*[0] * len(strips))),
        (277, _SHORT, _shorts(channels)),
        (278, _LONG, _longs(rows)),
        (279, _LONG, _longs(*map(len, strips))),
        (282, _RATIONAL, _DOTS_PER_INCH),
        (283, _RATIONAL, _DOTS_PER_INCH),
        (284, _SHORT, _shorts(1)),
        (296, _SHORT, _shorts(2)),
        (317, _SHORT, _shorts(_DIFFERENCES)),
    ]
    if description:
        entries.append((270, _ASCII, description.encode("ascii") + b"\0"))
    if alpha:
        entries.append((338, _SHORT, _shorts(_STRAIGHT_ALPHA)))
    if icc is not None:
        entries.append((34675, _UNDEFINED, icc))
    start = len(_head(entries))
    offsets = [start]
    for strip in strips[:-1]:
        offsets.append(offsets[-1] + len(strip))
    entries = [(tag, kind, _longs(*offsets) if tag == 273 else value) for tag, kind, value in entries]
    return b"".join([_head(entries), *strips])


def _packed(rows: np.ndarray) -> bytes:
    """Some rows of (H, W, C) as a strip: the first pixel of each, then differences to the left neighbour."""
    import numpy as np

    differences = rows.copy()
    differences[:, 1:] -= rows[:, :-1]
    return zlib.compress(np.ascontiguousarray(differences, dtype=differences.dtype.newbyteorder("<")).tobytes(), 6)


def _shorts(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}H", *numbers)


def _longs(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def _head(entries: list[tuple[int, int, bytes]]) -> bytes:
    """Header and directory, with the values that do not fit into the directory behind it."""
    sizes = {_ASCII: 1, _SHORT: 2, _LONG: 4, _RATIONAL: 8, _UNDEFINED: 1}
    directory, blobs = b"", b""
    start = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, value in sorted(entries):
        count = len(value) // sizes[kind]
        if len(value) > 4:
            field = _longs(start + len(blobs))
            blobs += value + b"\0" * (len(value) % 2)  # values begin at even offsets
        else:
            field = value.ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, kind, count) + field
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + blobs
