"""TIFF files: which of their images is the main one, and samples read as the file's tags say.

Pillow reads 8-bit TIFF of most layouts; of 16 bits it keeps the upper 8. Here the tags decide (TIFF 6.0, sections 4, 8,
10, 14, 15, 18), Pillow only unpacks strips and tiles as bytes, and a layout that is not read is refused by name.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ImageError
from .exif import exif_of_tiff
from .formats import check_pixels, no_pixel_limit
from .jpeg import check_complete, frame_size

if TYPE_CHECKING:
    import numpy as np

MAX_PAGES = 10_000
"""Most images of a file that are looked at for the main one."""

_BIG = (b"\x2b\x00", b"\x00\x2b")
"""The number in the header of BigTIFF, in both byte orders."""

MAX_EXTRA = 16
"""Most samples of a pixel beside its colour."""

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIP_OFFSETS, _ORIENTATION, _SAMPLES, _ROWS_PER_STRIP, _STRIP_COUNTS, _PLANAR = 273, 274, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_COUNTS = 317, 322, 323, 324, 325
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _ICC, _NEW_SUBFILE, _SUBFILE = 338, 339, 34675, 254, 255
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT, _XMP = 282, 283, 296, 700

_PHOTOMETRIC_NAMES = {
    0: "white is zero", 1: "black is zero", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELab",
    9: "ICCLab", 10: "ITULab", 32803: "raw sensor data", 34892: "raw sensor data",
}  # fmt: skip
_FORMAT_NAMES = {1: "", 2: "signed ", 3: "floating-point ", 5: "complex ", 6: "complex "}
_YCBCR, _OLD_JPEG, _JPEG, _JPEG_TABLES = 6, 6, 7, 347
_SHORT = "its strips or tiles are shorter than their rows"
_COMPRESSIONS = {1, 5, 8, 32773, 32946, 34925, 50000}
"""None, LZW, deflate (two numbers), PackBits, LZMA and Zstandard: those that unpack to the samples' own bytes."""


@dataclass(frozen=True)
class TiffPage:
    """One image of a TIFF file, as its tags describe it.

    Attributes:
        tags: by number, each a tuple or bytes.
        offset: of the page's directory in the file; 0 for the file's first page.
        pages: number of pages in the file that are no thumbnails.
        order: "<" or ">", the byte order.
    """

    tags: dict[int, Any]
    offset: int
    pages: int
    order: str

    def numbers(self, tag: int, default: Sequence[int] = ()) -> tuple[int, ...]:
        value = self.tags.get(tag, tuple(default))
        if isinstance(value, (bytes, str)):
            raise ValueError(f"tag {tag} is text where numbers are expected")
        values = value if isinstance(value, tuple) else (value,)
        return tuple(int(number) for number in values)

    def number(self, tag: int, default: int | None = None) -> int:
        values = self.numbers(tag, () if default is None else (default,))
        if not values:
            raise ValueError(f"tag {tag} is missing")
        return values[0]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.number(_WIDTH), self.number(_LENGTH)

    @property
    def samples(self) -> int:
        return self.number(_SAMPLES, 1)

    @property
    def bits(self) -> int:
        """Of the widest sample."""
        return max(self.numbers(_BITS, (1,)))

    @property
    def sample_format(self) -> int:
        """1 unsigned, 2 signed, 3 floating point; "undefined" (4) counts as unsigned."""
        formats = {1 if number == 4 else number for number in self.numbers(_SAMPLE_FORMAT, (1,))}
        return formats.pop() if len(formats) == 1 else 0

    @property
    def orientation(self) -> int:
        return self.number(_ORIENTATION, 1)

    @property
    def icc(self) -> bytes | None:
        profile = self.tags.get(_ICC)
        return profile if isinstance(profile, bytes) else None

    @property
    def xmp(self) -> bytes | None:
        packet = self.tags.get(_XMP)
        return packet if isinstance(packet, bytes) else None

    @property
    def dpi(self) -> tuple[float, float] | None:
        """Pixels in an inch across and down; None where the file gives no unit."""
        factor = {2: 1.0, 3: 2.54}.get(self.number(_RESOLUTION_UNIT, 2))
        across, down = self.tags.get(_X_RESOLUTION), self.tags.get(_Y_RESOLUTION)
        if factor is None or across is None or down is None:
            return None
        try:
            return float(across) * factor, float(down) * factor
        except (TypeError, ValueError, ZeroDivisionError):
            return None

    def exif(self, content: bytes) -> bytes | None:
        """EXIF data as a block of its own, or None; that of BigTIFF is not read.

        Raises:
            ValueError: it is corrupted.
        """
        return None if content[2:4] in _BIG else exif_of_tiff(content, self.offset)

    @property
    def needs_own_reader(self) -> bool:
        """Whether Pillow would lose bits (16), cannot put planes together, or rounds premultiplied colours down."""
        special = self.number(_PLANAR, 1) == 2 or self.numbers(_EXTRA_SAMPLES)[:1] == (1,)
        plain = self.number(_PHOTOMETRIC, -1) in (0, 1, 2) and self.number(_COMPRESSION, 1) in _COMPRESSIONS
        return self.bits == 16 or (self.bits == 8 and self.samples > 1 and special and plain)

    def pieces(self, listed: int) -> list[tuple[int, int]]:
        """(columns, rows) of each strip or tile of a plane.

        Args:
            listed: number of strips or tiles that the file lists for it.

        Raises:
            ValueError: more are needed to cover the image.
        """
        width, height = self.size
        tiled = _TILE_OFFSETS in self.tags
        columns = max(1, self.number(_TILE_WIDTH)) if tiled else width
        rows = max(1, self.number(_TILE_LENGTH) if tiled else min(self.number(_ROWS_PER_STRIP, height), height))
        needed = -(-width // columns) * -(-height // rows)
        if listed < needed:
            raise ValueError(f"it has {listed} strips or tiles, {needed} are needed")
        if tiled:
            return [(columns, rows)] * needed
        return [(columns, min(rows, height - rows * strip)) for strip in range(needed)]

    def alone(self, content: bytes) -> bytes:
        """The file with this page as its first."""
        if not self.offset:
            return content
        if content[2:4] in _BIG:
            return content[:8] + struct.pack(self.order + "Q", self.offset) + content[16:]
        return content[:4] + struct.pack(self.order + "I", self.offset) + content[8:]

    def describe(self) -> str:
        """The layout, in words."""
        photometric = self.number(_PHOTOMETRIC, -1)
        kind = _PHOTOMETRIC_NAMES.get(photometric, f"photometric {photometric}")
        depth = f"{_FORMAT_NAMES.get(self.sample_format, 'mixed ')}{self.bits}-bit"
        planes = " in separate planes" if self.number(_PLANAR, 1) == 2 else ""
        return (
            f"{self.samples} {depth} samples{planes}, {kind}, compression {self.number(_COMPRESSION, 1)}, "
            f"extra samples {list(self.numbers(_EXTRA_SAMPLES)) or 'none'}"
        )


def main_page(content: bytes, name: str) -> TiffPage:
    """The tags of a file's main image: the first that is no thumbnail.

    Raises:
        ImageError: the file is corrupted, or all its images are thumbnails (raw files of cameras).
    """
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    order = "<" if content[:2] == b"II" else ">"
    header = content[:16] if content[2:4] in _BIG else content[:8]
    directory: Any = ImageFileDirectory_v2(header)
    file = io.BytesIO(content)
    seen: set[int] = set()
    pages: list[tuple[int, dict[int, Any]]] = []
    offset = directory.next
    while offset and offset not in seen and len(pages) < MAX_PAGES:
        seen.add(offset)
        if offset >= len(content):
            break
        file.seek(offset)
        directory = ImageFileDirectory_v2(header)
        directory.load(file)
        pages.append((offset, {tag: directory[tag] for tag in directory if tag <= _XMP or tag == _ICC}))
        offset = directory.next
    if not pages:
        raise ImageError(f"{name} is corrupted or truncated: it has no image. Get the file again.")
    entries = [TiffPage(tags, offset if index else 0, 1, order) for index, (offset, tags) in enumerate(pages)]
    full = [page for page in entries if not page.number(_NEW_SUBFILE, 0) & 1 and page.number(_SUBFILE, 1) != 2]
    if not full:
        raise ImageError(
            f"{name} holds thumbnails alone; its image is elsewhere, as in a camera's raw file. Develop it to a TIFF "
            f"or PNG first."
        )
    first = full[0]
    check_pixels(name, *first.size)
    return TiffPage(first.tags, first.offset, len(full), order)


def check_layout(page: TiffPage, name: str) -> None:
    """Refuse what neither Pillow nor `read_samples` reads rightly.

    Raises:
        ImageError: samples are signed, floating-point, or of 9 to 15 or more than 16 bits.
    """
    grey = page.samples == 1
    if grey and page.bits == 32 and page.sample_format in (1, 2, 3):
        return  # refused with its range of values when it is decoded
    if page.sample_format != 1 or page.bits not in (1, 2, 4, 8, 16) or len(set(page.numbers(_BITS, (1,)))) > 1:
        raise ImageError(
            f"{name} is a TIFF of a layout that is not supported: {page.describe()}. Save it with 8 or 16 bits "
            f"(unsigned) per channel."
        )


def check_pieces(page: TiffPage, content: bytes) -> None:
    """See that strips or tiles cover the image; Pillow fills in black, or other bytes of the file, where they do not.

    Args:
        page: of a layout that Pillow reads.
        content: of the file.

    Raises:
        ValueError: there are too few, or uncompressed ones or those of JPEG are shorter than their rows.
    """
    compression = page.number(_COMPRESSION, 1)
    if compression == _OLD_JPEG:
        return  # lies in one piece, perhaps elsewhere
    tiled = _TILE_OFFSETS in page.tags
    planes = page.samples if page.number(_PLANAR, 1) == 2 else 1
    pieces = page.pieces(len(page.numbers(_TILE_OFFSETS if tiled else _STRIP_OFFSETS)) // planes) * planes
    counts = page.numbers(_TILE_COUNTS if tiled else _STRIP_COUNTS)
    if compression == _JPEG and planes == 1:
        tables = page.tags.get(_JPEG_TABLES, b"")
        starts = page.numbers(_TILE_OFFSETS if tiled else _STRIP_OFFSETS)
        for start, count, (columns, rows) in zip(starts, counts, pieces, strict=False):
            piece = content[start : start + count]
            width, height = frame_size(piece)
            if width < columns or height < rows:
                raise ValueError(_SHORT)
            check_complete(tables[:-2] + piece[2:] if isinstance(tables, bytes) and tables else piece)
    if compression != 1 or page.number(_PHOTOMETRIC, -1) == _YCBCR or not any(counts):
        return
    bits = page.bits * page.samples // planes
    if any(count < -(-columns * bits // 8) * rows for count, (columns, rows) in zip(counts, pieces, strict=False)):
        raise ValueError(_SHORT)


def read_samples(content: bytes, page: TiffPage, name: str) -> tuple[np.ndarray, list[str]]:
    """Read samples of 8 or 16 bits.

    Args:
        content: of the file.
        page: with 8 or 16 bits in all samples, unsigned.
        name: for messages.

    Returns:
        L, LA, RGB or RGBA with straight alpha, (H, W, C), uint8 or uint16, black at 0; and notes.

    Raises:
        ImageError: a layout that is not supported, or corrupted or truncated data.
    """
    import numpy as np

    photometric, compression = page.number(_PHOTOMETRIC, -1), page.number(_COMPRESSION, 1)
    colors = {0: 1, 1: 1, 2: 3}.get(photometric, 0)
    extra = page.numbers(_EXTRA_SAMPLES)
    surplus = page.samples - colors
    if not extra and surplus == 1:
        extra = (2,)  # files from before TIFF 6.0, and of careless programs, have an alpha channel without the tag
    kind = extra[0] if surplus > 0 and extra else 0
    if (
        not colors
        or not 0 <= surplus <= MAX_EXTRA
        or compression not in _COMPRESSIONS
        or page.number(_PREDICTOR, 1) not in (1, 2)
        or page.number(_FILL_ORDER, 1) != 1
        or kind not in (0, 1, 2)
        or (photometric == 0 and kind == 1)
    ):
        raise ImageError(
            f"{name} is a TIFF of a layout that is not supported: {page.describe()}. Save it as RGB or grey, or as PNG."
        )
    values = _samples(content, page)
    white = np.iinfo(values.dtype).max
    notes = []
    if photometric == 0:
        values[..., 0] = white - values[..., 0]
    keep = colors + (kind != 0)
    if page.samples > keep:
        notes.append(f"{page.samples - keep} of its {page.samples} samples are neither colour nor alpha; left out")
    values = values[..., :keep]
    if kind == 1:
        alpha = values[..., colors:].astype(np.float32)
        straight = values[..., :colors].astype(np.float32) * white / np.maximum(alpha, 1)
        straight = np.minimum(straight, white).round().astype(values.dtype)
        values = np.concatenate([straight, values[..., colors:]], axis=-1)
    return np.ascontiguousarray(values), notes


def _samples(content: bytes, page: TiffPage) -> np.ndarray:
    """All samples as they are in the file, in the machine's byte order: (H, W, samples), uint8 or uint16."""
    import numpy as np

    width, height = page.size
    planes = page.samples if page.number(_PLANAR, 1) == 2 else 1
    each = page.samples // planes
    tiled = _TILE_OFFSETS in page.tags
    offsets = page.numbers(_TILE_OFFSETS if tiled else _STRIP_OFFSETS)
    counts = page.numbers(_TILE_COUNTS if tiled else _STRIP_COUNTS)
    if not offsets or len(offsets) != len(counts) or len(offsets) % planes:
        raise ValueError("its strips or tiles are not listed")
    if any(start < 8 or start + size > len(content) for start, size in zip(offsets, counts, strict=True)):
        raise ValueError("it ends before its image does")
    share = len(offsets) // planes
    kind = np.dtype(np.uint16 if page.bits == 16 else np.uint8)
    result = np.empty((height, width, page.samples), dtype=kind)
    for plane in range(planes):
        chosen = slice(plane * share, (plane + 1) * share)
        chunks = [content[start : start + size] for start, size in zip(offsets[chosen], counts[chosen], strict=True)]
        unpacked = _unpacked(chunks, page, each)
        values = (
            unpacked.view(kind.newbyteorder("<" if page.order == "<" else ">"))
            .astype(kind)
            .reshape(height, width, each)
        )
        if page.number(_PREDICTOR, 1) == 2 and page.number(_COMPRESSION, 1) != 1:
            step = page.number(_TILE_WIDTH) if tiled else width
            for left in range(0, width, step):
                part = values[:, left : left + step]
                np.cumsum(part, axis=1, dtype=kind, out=part)
        result[..., plane * each : (plane + 1) * each] = values
    return result


def _unpacked(chunks: Sequence[bytes], page: TiffPage, samples: int) -> np.ndarray:
    """The bytes of strips or tiles, (H, W * bytes of a pixel), uint8: Pillow takes them for grey of 8 bits."""
    import numpy as np
    from PIL import Image

    width, height = page.size
    scale = page.bits // 8 * samples
    compression = page.number(_COMPRESSION, 1)
    tags: dict[int, tuple[int, ...]] = {
        _WIDTH: (width * scale,), _LENGTH: (height,), _BITS: (8,), _COMPRESSION: (compression,), _PHOTOMETRIC: (1,),
        _SAMPLES: (1,), _PLANAR: (1,),
    }  # fmt: skip
    where, sizes = _STRIP_OFFSETS, _STRIP_COUNTS
    pieces = page.pieces(len(chunks))
    if len(chunks) > len(pieces):
        raise ValueError(f"it has {len(chunks)} strips or tiles, {len(pieces)} are needed")
    columns, rows = pieces[0]
    if _TILE_OFFSETS in page.tags:
        where, sizes = _TILE_OFFSETS, _TILE_COUNTS
        tags[_TILE_WIDTH], tags[_TILE_LENGTH] = (columns * scale,), (rows,)
    else:
        tags[_ROWS_PER_STRIP] = (rows,)
    if compression == 1 and any(
        len(chunk) < columns * scale * rows for chunk, (columns, rows) in zip(chunks, pieces, strict=True)
    ):
        raise ValueError(_SHORT)
    tags[where] = tags[sizes] = (0,) * len(chunks)
    start = len(_tiff(tags))
    ends = np.cumsum([0, *(len(chunk) for chunk in chunks)]) + start
    tags[where] = tuple(int(end) for end in ends[:-1])
    tags[sizes] = tuple(len(chunk) for chunk in chunks)
    with no_pixel_limit():
        image = Image.open(io.BytesIO(_tiff(tags) + b"".join(chunks)), formats=("TIFF",))
    return np.asarray(image)


def _tiff(tags: dict[int, tuple[int, ...]]) -> bytes:
    """Header and directory of a little-endian TIFF; all tags are of 32 bits but the short ones that must not be."""
    entries, blobs = b"", b""
    start = 8 + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            blobs, packed = blobs + packed, struct.pack("<I", start + len(blobs))
        entries += struct.pack("<HHI", tag, 4, len(values)) + packed
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + blobs
