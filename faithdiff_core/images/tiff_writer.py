"""Writing TIFF: 8 and 16 bits, grey or RGB, with alpha, profile and metadata.

Pillow writes 16 bits for grey without alpha only. Layout: strips packed with deflate over horizontal differences (TIFF
6.0, sections 2, 4, 6, 14 and 18; deflate: Adobe's TIFF technical notes of 2002).

EXIF data is itself a TIFF file without pixels. So the file begins with it as it is, strips follow, and the new first
directory at the end holds its entries and those about pixels: whatever EXIF data points to stays where it was.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from .exif import DESCRIPTIVE, LONG, SHORT, UNDEFINED, X_RESOLUTION, ExifBlock

if TYPE_CHECKING:
    import numpy as np

_STRIP_BYTES = 2**18
"""Unpacked bytes of a strip, about: readers that show a part of a large image unpack no more than they need."""

_DEFLATE, _DIFFERENCES, _STRAIGHT_ALPHA = 8, 2, 2

_UNKNOWN_DPI = (72, 72)
"""A resolution is required; 72 says that none is known."""


def encode_tiff(
    values: np.ndarray,
    *,
    exif: bytes | None = None,
    xmp: bytes | None = None,
    icc: bytes | None = None,
    dpi: tuple[float, float] | None = None,
) -> bytes:
    """The bytes of a TIFF file.

    Args:
        values: (H, W, C), uint8 or uint16, in the order L, LA, RGB or RGBA, alpha not premultiplied.
        exif: EXIF data; its entries about the photograph are kept.
        xmp: the packet.
        icc: a colour profile.
        dpi: pixels in an inch, across and down.
    """

    height, width, channels = values.shape
    block = ExifBlock() if exif is None else ExifBlock(exif)
    block.entries = {tag: entry for tag, entry in block.entries.items() if tag in DESCRIPTIVE or tag >= 0xFE00}
    if X_RESOLUTION not in block.entries:
        block.put_resolution(dpi or _UNKNOWN_DPI)
    rows = min(height, max(1, _STRIP_BYTES // (width * channels * values.itemsize)))
    offsets, counts = [], []
    for top in range(0, height, rows):
        strip = values[top : top + rows].copy()
        strip[:, 1:] -= values[top : top + rows, :-1]
        packed = zlib.compress(strip.astype(strip.dtype.newbyteorder(block.order)).tobytes(), 6)
        offsets.append(block.append(packed))
        counts.append(len(packed))
    alpha = channels in (2, 4)
    numbers: dict[int, tuple[int, tuple[int, ...]]] = {
        256: (LONG, (width,)),
        257: (LONG, (height,)),
        258: (SHORT, (8 * values.itemsize,) * channels),
        259: (SHORT, (_DEFLATE,)),
        262: (SHORT, (1 if channels < 3 else 2,)),
        273: (LONG, tuple(offsets)),
        274: (SHORT, (1,)),
        277: (SHORT, (channels,)),
        278: (LONG, (rows,)),
        279: (LONG, tuple(counts)),
        284: (SHORT, (1,)),
        317: (SHORT, (_DIFFERENCES,)),
        339: (SHORT, (1,) * channels),
    }
    if alpha:
        numbers[338] = (SHORT, (_STRAIGHT_ALPHA,))
    for tag, (kind, entries) in numbers.items():
        block.put_numbers(tag, kind, *entries)
    for tag, kind, data in ((700, 1, xmp), (34675, UNDEFINED, icc)):
        if data is not None:
            block.put(tag, kind, data)
    return block.to_bytes()
