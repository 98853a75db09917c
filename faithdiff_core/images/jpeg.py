"""Finding JPEG files whose coded pixels end before the image does.

libjpeg then fills the rest with grey or with what came last, counts a warning that no reader of Python tells, and goes
on. What is made up depends on the bytes behind the coded data, which a complete image never looks at: one decoding
with other bytes there tells the two apart.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator

_SCAN_END = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
"""A marker that ends a scan: neither a byte 0xFF of the data nor a restart marker (ITU-T T.81, B.1.1)."""

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
"""Baseline, extended and progressive; data of arithmetic coding may rightly end early (D.1.8)."""

_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_PROGRESSIVE = 0xC2
_FILLER = bytes(number * number // 3 % 0xFF for number in range(4096))
"""Enough for some blocks of noise, of which a few may saturate to one value whatever is decoded."""


def check_complete(content: bytes) -> None:
    """See that a JPEG's coded data reach to its last pixels.

    Files that are no JPEG, not coded by Huffman's method, or whose markers cannot be followed pass: what is wrong with
    them, the decoder says.

    Args:
        content: all of the file; what follows the first image in it (a preview, a depth map) is not looked at.

    Raises:
        ValueError: they end before.
        OSError: the file does.
    """
    import numpy as np
    from PIL import Image

    from .formats import no_pixel_limit

    filled, progressive = _filled(content)
    if not filled:
        return
    decoded = []
    for data in (content, filled):
        with no_pixel_limit():
            image = Image.open(io.BytesIO(data), formats=("JPEG",))
        if not progressive:
            image.draft(image.mode, (1, 1))  # an eighth of the size, which the blocks' means tell apart
        decoded.append(np.asarray(image))
    if not np.array_equal(decoded[0], decoded[1]):
        raise ValueError("its data end before the image does")


def frame_size(content: bytes) -> tuple[int, int]:
    """(width, height) in a JPEG's frame header.

    Raises:
        ValueError: it has none.
    """
    for marker, at in _segments(content):
        if marker in _FRAMES:
            height, width = struct.unpack(">HH", content[at + 5 : at + 9])
            return width, height
    raise ValueError("it has no JPEG frame where one is expected")


def _filled(content: bytes) -> tuple[bytes, bool]:
    """The first image of a file with other bytes behind the data of each scan, and whether it is progressive.

    The bytes are empty if there are no such data.
    """
    parts: list[bytes] = []
    copied = frame = 0
    for marker, at in _segments(content):
        frame = marker if marker in _FRAMES else frame
        if marker == _END_OF_IMAGE and parts and frame in _HUFFMAN_FRAMES:
            return b"".join([*parts, content[copied : at + 2]]), frame == _PROGRESSIVE
        if marker == _START_OF_SCAN:
            start, end = _scan(content, at)
            restarts = sum(1 for _ in _RESTART.finditer(content, start, end))
            # Behind the restart marker that would be next, too: a decoder looks for no data before it.
            parts += [content[copied:end], _FILLER, bytes((0xFF, 0xD0 + restarts % 8)), _FILLER]
            copied = end
    return b"", False


def _segments(content: bytes) -> Iterator[tuple[int, int]]:
    """The markers of a file's first image and where they are, to its end or to where no marker is."""
    at = 2
    while at + 2 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # fill bytes may precede a marker
            at += 1
            continue
        yield marker, at
        if marker == _END_OF_IMAGE:
            return
        at = _scan(content, at)[1] if marker == _START_OF_SCAN else _behind(content, at)


def _behind(content: bytes, at: int) -> int:
    return at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")


def _scan(content: bytes, at: int) -> tuple[int, int]:
    """Where the coded data behind a scan's header begin and end."""
    start = _behind(content, at)
    end = _SCAN_END.search(content, start)
    return start, len(content) if end is None else end.start()
