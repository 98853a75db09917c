"""Bits per channel of files that Pillow would cut to 8 without a word, and netpbm files of any range."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_NETPBM = re.compile(rb"(P[56])(?:\s+|#[^\n]*\n)+(\d{1,10})(?:\s+|#[^\n]*\n)+(\d{1,10})(?:\s+|#[^\n]*\n)+(\d{1,5})\s")
"""Header of a binary grey (P5) or RGB (P6) file: width, height, largest value."""


def jpeg2000_bits(content: bytes) -> int:
    """Most bits of a channel (ISO/IEC 15444-1, A.5.1, marker SIZ); 8 if the file does not say."""
    at = content.find(b"\xff\x4f\xff\x51")
    if at < 0 or at + 42 > len(content):
        return 8
    (channels,) = struct.unpack_from(">H", content, at + 40)
    depths = content[at + 42 : at + 42 + 3 * channels : 3]
    return max(((depth & 0x7F) + 1 for depth in depths), default=8)


def av1_or_hevc_bits(content: bytes) -> int:
    """Most bits of a channel of AVIF or HEIF by its decoder configurations; 8 if the file does not say.

    Sources: AV1 in ISOBMFF, section 2.3.3; ISO/IEC 14496-15, section 8.3.3.1.
    """
    bits = 8
    head = content[:65536]
    for match in re.finditer(rb"av1C|hvcC", head):
        box = content[match.end() : match.end() + 20]
        if match.group() == b"av1C" and len(box) > 3 and box[0] == 0x81:
            bits = max(bits, 8 if not box[2] & 0x40 else 12 if box[2] & 0x20 else 10)
        elif match.group() == b"hvcC" and len(box) > 18 and box[0] == 1:
            bits = max(bits, (box[17] & 7) + 8, (box[18] & 7) + 8)
    return bits


class _Bits:
    """Bits of a byte string from the lowest of each byte on, as JPEG XL counts them."""

    def __init__(self, content: bytes) -> None:
        self.value, self.at = int.from_bytes(content, "little"), 0

    def take(self, count: int) -> int:
        taken = self.value >> self.at & ((1 << count) - 1)
        self.at += count
        return taken

    def choose(self, *options: tuple[int, int]) -> int:
        """One of four (base, bits), as its first two bits say."""
        base, bits = options[self.take(2)]
        return base + self.take(bits)


def jxl_size_and_bits(content: bytes) -> tuple[int, int, int] | None:
    """Width, height and bits of a JPEG XL file (ISO/IEC 18181-1, annex D), as its plugin decodes all to say so.

    Returns:
        None for a file whose header is not understood.
    """
    start = content.find(b"\xff\x0a") if content[:2] == b"\xff\x0a" else _jxl_codestream(content)
    if start < 0:
        return None
    bits = _Bits(content[start + 2 : start + 66])
    height, width = _jxl_size(bits)
    if bits.take(1):  # all_default
        return width, height, 8
    if bits.take(1):  # extra_fields
        bits.take(3)  # orientation
        if bits.take(1):  # intrinsic size
            _jxl_size(bits)
        if bits.take(1) or bits.take(1):  # preview, animation
            return None
    if bits.take(1):  # floating point
        return width, height, bits.choose((32, 0), (16, 0), (24, 0), (1, 6))
    return width, height, bits.choose((8, 0), (10, 0), (12, 0), (1, 6))


def _jxl_codestream(content: bytes) -> int:
    for kind, skip in ((b"jxlc", 4), (b"jxlp", 8)):
        at = content.find(kind, 0, 2**20)
        if at >= 0:
            return at + skip if content[at + skip : at + skip + 2] == b"\xff\x0a" else -1
    return -1


def _jxl_size(bits: _Bits) -> tuple[int, int]:
    def side(small: int) -> int:
        return (bits.take(5) + 1) * 8 if small else bits.choose((1, 9), (1, 13), (1, 18), (1, 30))

    small = bits.take(1)
    height = side(small)
    ratio = bits.take(3)
    if ratio == 0:
        return height, side(small)
    above, below = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height, height * above // below


def read_netpbm(content: bytes) -> tuple[np.ndarray, int] | None:
    """A binary grey or RGB file whose largest value is not 255: (H, W, C) of uint8 or uint16, white at its
    largest number, and its bits.

    Returns:
        None for other files.

    Raises:
        ValueError: pixels are missing, or are above the largest value.
    """
    import numpy as np

    header = _NETPBM.match(content)
    if header is None or int(header[4]) in (0, 255) or int(header[4]) > 65535:
        return None
    width, height, largest = int(header[2]), int(header[3]), int(header[4])
    channels = 3 if header[1] == b"P6" else 1
    kind = np.dtype(">u2" if largest > 255 else "u1")
    count = width * height * channels
    if len(content) - header.end() < count * kind.itemsize:
        raise ValueError("it ends before its image does")
    values = np.frombuffer(content, kind, count, header.end()).reshape(height, width, channels)
    if values.size and int(values.max()) > largest:
        raise ValueError(f"it has values above {largest}, which it says is the largest")
    bits, white, wanted = (16, 65535, np.uint16) if largest > 255 else (8, 255, np.uint8)
    return (values * (white / largest)).round().astype(wanted), bits
