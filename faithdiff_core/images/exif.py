"""EXIF data as one block of bytes, changed without moving what is in it.

The block is a small TIFF file (EXIF 2.32, section 4.5; TIFF 6.0, section 2). Maker notes hold offsets into it that only
their makers know, so every value stays where it is: numbers are written over, and the first directory, where entries
come and go, is written again behind all else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

DESCRIPTION, DOCUMENT, MAKE, MODEL, HOST_COMPUTER = 0x010E, 0x010D, 0x010F, 0x0110, 0x013C
ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x0112, 0x011A, 0x011B, 0x0128
EXIF_POINTER, GPS_POINTER, INTEROP_POINTER = 0x8769, 0x8825, 0xA005
_WIDTH, _LENGTH, _PIXEL_X, _PIXEL_Y, _COLOR_SPACE, _INTEROP_INDEX = 0x0100, 0x0101, 0xA002, 0xA003, 0xA001, 0x0001
_THUMBNAIL_START, _THUMBNAIL_SIZE = 0x0201, 0x0202

ASCII, SHORT, LONG, RATIONAL, UNDEFINED = 2, 3, 4, 5, 7
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
"""Bytes of one value, by type."""

DESCRIPTIVE = (
    DOCUMENT, DESCRIPTION, MAKE, MODEL, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, 0x0131, 0x0132, 0x013B,
    HOST_COMPUTER, 0x4746, 0x4749, 0x8298, EXIF_POINTER, GPS_POINTER, 0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F,
)  # fmt: skip
"""Tags of a TIFF file's first directory that say something about the photograph, not about the layout of pixels."""

MAX_COPIED = 2**22
"""Most bytes of EXIF data that are taken out of a TIFF file."""

EMPTY = b"II*\0" + struct.pack("<IHI", 8, 0, 0)


@dataclass
class Entry:
    """One entry of a directory.

    Attributes:
        kind: type of the values.
        count: number of values.
        field: the four bytes that hold the values, or their offset where they are longer.
    """

    kind: int
    count: int
    field: bytes

    @property
    def size(self) -> int:
        """Bytes of all values."""
        return SIZES[self.kind] * self.count


class _Directories:
    """A TIFF structure whose directories are read.

    Args:
        content: all of it.

    Raises:
        ValueError: it is corrupted.
    """

    def __init__(self, content: bytes) -> None:
        if content[:4] not in (b"II*\0", b"MM\0*"):
            raise ValueError("it does not begin as EXIF data does")
        self.order = "<" if content[:2] == b"II" else ">"
        self._content = bytearray(content)

    def number(self, at: int, kind: str) -> int:
        """The whole number at a place, `H` or `I`."""
        try:
            return int(struct.unpack_from(self.order + kind, self._content, at)[0])
        except struct.error as error:
            raise ValueError("it ends too early") from error

    def directory(self, start: int) -> Iterator[tuple[int, Entry, int]]:
        """Tag, entry and place of each entry; those that cannot be understood are passed over."""
        for index in range(self.number(start, "H")):
            at = start + 2 + 12 * index
            entry = Entry(self.number(at + 2, "H"), self.number(at + 4, "I"), bytes(self._content[at + 8 : at + 12]))
            if len(entry.field) < 4:
                raise ValueError("it ends too early")
            if entry.kind in SIZES and (entry.size <= 4 or self.offset(entry) + entry.size <= len(self._content)):
                yield self.number(at, "H"), entry, at

    def directory_size(self, start: int) -> int:
        """Bytes of a directory: its number of entries, they themselves, and where the next one is."""
        return 2 + 12 * self.number(start, "H") + 4

    def offset(self, entry: Entry) -> int:
        """Where an entry's values are, or the directory is that it points to."""
        return int(struct.unpack(self.order + "I", entry.field)[0])

    def data(self, entry: Entry) -> bytes:
        """An entry's values as bytes."""
        if entry.size <= 4:
            return entry.field[: entry.size]
        start = self.offset(entry)
        return bytes(self._content[start : start + entry.size])


class ExifBlock(_Directories):
    """EXIF data that is being changed. The small copy of the image in it is dropped: it shows what was before.

    Args:
        content: the block, without the `Exif` that some formats put before it.

    Raises:
        ValueError: it is corrupted.
    """

    def __init__(self, content: bytes = EMPTY) -> None:
        super().__init__(content)
        start = self.number(4, "I")
        self.entries = {tag: entry for tag, entry, _ in self.directory(start)}
        for pointer in (EXIF_POINTER, GPS_POINTER):
            try:
                self._sub(pointer)
            except ValueError:
                del self.entries[pointer]
        size = self.directory_size(start)
        self._drop_thumbnail(start + size - 4)
        self._erase(start, size)

    def _sub(self, pointer: int) -> dict[int, tuple[Entry, int]]:
        """Entries, and their places, of a directory that an entry of the first one points to."""
        if pointer not in self.entries:
            return {}
        return {tag: (entry, at) for tag, entry, at in self.directory(self.offset(self.entries[pointer]))}

    def _erase(self, start: int, size: int) -> None:
        end = min(start + size, len(self._content))
        self._content[start:end] = bytes(max(0, end - start))

    def _drop_thumbnail(self, at: int) -> None:
        """Take out the second directory, whose offset is at a place, and what it shows."""
        try:
            second = self.number(at, "I")
            found = {tag: self.offset(entry) for tag, entry, _ in self.directory(second)} if second else {}
            self._erase(second, self.directory_size(second) if second else 0)
            used = self._used()
        except ValueError:
            return
        if _THUMBNAIL_START not in found or _THUMBNAIL_SIZE not in found:
            return
        begin, size = found[_THUMBNAIL_START], found[_THUMBNAIL_SIZE]
        if used <= begin <= len(self._content) <= begin + size + 3:
            del self._content[begin:]
        elif used <= begin:
            self._erase(begin, size)

    def _used(self) -> int:
        """Where the last value ends that is no thumbnail's."""
        ends = [at for _, _, at in self.directory(self.number(4, "I"))]
        entries = list(self.entries.values())
        for pointer in (EXIF_POINTER, GPS_POINTER):
            sub = self._sub(pointer)
            entries += [entry for entry, _ in sub.values()]
            ends += [at + 12 + 4 for _, at in sub.values()]
            if INTEROP_POINTER in sub:
                start = self.offset(sub[INTEROP_POINTER][0])
                ends.append(start + self.directory_size(start))
                entries += [entry for _, entry, _ in self.directory(start)]
        return max([8, *ends, *(self.offset(entry) + entry.size for entry in entries if entry.size > 4)])

    def append(self, data: bytes) -> int:
        """Put bytes behind all else, at an even offset, and say where."""
        self._content += bytes(len(self._content) % 2)
        at = len(self._content)
        self._content += data
        return at

    def put(self, tag: int, kind: int, data: bytes) -> None:
        """Set an entry of the first directory; `data` are its values in the block's byte order."""
        field = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(self.order + "I", self.append(data))
        self.entries[tag] = Entry(kind, len(data) // SIZES[kind], field)

    def put_numbers(self, tag: int, kind: int, *values: int) -> None:
        """Set an entry to whole numbers (`SHORT` or `LONG`)."""
        self.put(tag, kind, struct.pack(f"{self.order}{len(values)}{'H' if kind == SHORT else 'I'}", *values))

    def put_text(self, tag: int, text: str) -> None:
        """Set an entry to a text; UTF-8, as the later versions of EXIF allow."""
        self.put(tag, ASCII, text.encode() + b"\0")

    def put_resolution(self, dpi: tuple[float, float]) -> None:
        """Set the number of pixels in an inch, along both sides."""
        for tag, value in zip((X_RESOLUTION, Y_RESOLUTION), dpi, strict=True):
            self.put(tag, RATIONAL, struct.pack(self.order + "2I", round(value * 1000), 1000))
        self.put_numbers(RESOLUTION_UNIT, SHORT, 2)

    def resolution(self) -> tuple[float, float] | None:
        """Pixels in an inch across and down; None where it does not say."""
        unit = self.entries.get(RESOLUTION_UNIT)
        factor = 1.0 if unit is None else {2: 1.0, 3: 2.54}.get(self._short(unit))
        sides = [self.entries.get(tag) for tag in (X_RESOLUTION, Y_RESOLUTION)]
        found = [
            self.data(entry) for entry in sides if entry is not None and entry.kind == RATIONAL and entry.count == 1
        ]
        fractions = [struct.unpack(self.order + "2I", data) for data in found]
        if factor is None or len(fractions) < 2 or not all(below for _, below in fractions):
            return None
        return fractions[0][0] / fractions[0][1] * factor, fractions[1][0] / fractions[1][1] * factor

    def _short(self, entry: Entry) -> int:
        return int(struct.unpack(self.order + "H", entry.field[:2])[0])

    def text(self, tag: int) -> str | None:
        """A text in the first directory, without what follows its end; None if there is none."""
        entry = self.entries.get(tag)
        if entry is None or entry.kind != ASCII:
            return None
        return self.data(entry).split(b"\0")[0].decode("utf-8", "replace")

    def set_upright(self) -> None:
        """Say that the image needs no turning."""
        if ORIENTATION in self.entries:
            self.put_numbers(ORIENTATION, SHORT, 1)

    def set_size(self, height: int, width: int) -> None:
        """Write an image's size wherever there is one."""
        for tag, value in ((_WIDTH, width), (_LENGTH, height)):
            if tag in self.entries:
                self.put_numbers(tag, LONG, value)
        sub = self._sub(EXIF_POINTER)
        for tag, value in ((_PIXEL_X, width), (_PIXEL_Y, height)):
            if tag in sub:
                struct.pack_into(self.order + "HII", self._content, sub[tag][1] + 2, LONG, 1, value)

    def set_srgb(self) -> None:
        """Say that colours are those of sRGB."""
        sub = self._sub(EXIF_POINTER)
        if _COLOR_SPACE in sub:
            struct.pack_into(self.order + "HIHH", self._content, sub[_COLOR_SPACE][1] + 2, SHORT, 1, 1, 0)
        try:
            interop = list(self.directory(self.offset(sub[INTEROP_POINTER][0]))) if INTEROP_POINTER in sub else []
        except ValueError:
            return
        for tag, entry, at in interop:
            if tag == _INTEROP_INDEX and entry.kind == ASCII and entry.size == 4:
                self._content[at + 8 : at + 12] = b"R98\0"

    def drop_location(self) -> None:
        """Erase the directory of GPS data."""
        for entry, at in self._sub(GPS_POINTER).values():
            if entry.size > 4:
                self._erase(self.offset(entry), entry.size)
            self._erase(at, 12)
        self.entries.pop(GPS_POINTER, None)

    def to_bytes(self) -> bytes:
        """The block with its first directory at the end."""
        directory = struct.pack(self.order + "H", len(self.entries))
        for tag, entry in sorted(self.entries.items()):
            directory += struct.pack(self.order + "HHI", tag, entry.kind, entry.count) + entry.field
        start = self.append(directory + bytes(4))
        self._content[:8] = (b"II*\0" if self.order == "<" else b"MM\0*") + struct.pack(self.order + "I", start)
        return bytes(self._content)


def exif_of_tiff(content: bytes, offset: int = 0) -> bytes | None:
    """EXIF data of one image in a TIFF file, as a block of its own; None where it has none.

    Values are copied to new places, so maker notes with offsets of their own may no longer be readable.

    Args:
        content: of the file; not BigTIFF.
        offset: of the image's directory. Defaults to the file's first.

    Raises:
        ValueError: it is corrupted, or longer than `MAX_COPIED`.
    """
    source = _Directories(content)
    target = ExifBlock(EMPTY if source.order == "<" else b"MM\0*" + struct.pack(">IHI", 8, 0, 0))
    budget = MAX_COPIED
    for tag, entry, _ in source.directory(offset or source.number(4, "I")):
        if tag not in DESCRIPTIVE:
            continue
        budget -= entry.size
        if budget < 0:
            raise ValueError("it is too long")
        if tag in (EXIF_POINTER, GPS_POINTER):
            start, budget = _copy_directory(source, source.offset(entry), target, budget)
            target.put_numbers(tag, LONG, start)
        else:
            target.put(tag, entry.kind, source.data(entry))
    return target.to_bytes() if target.entries else None


def _copy_directory(source: _Directories, start: int, target: ExifBlock, budget: int) -> tuple[int, int]:
    """Copy a directory with its values, and that of interoperability in it; gives its new place, and what is left."""
    copied = b""
    count = 0
    for tag, entry, _ in source.directory(start):
        budget -= 12 + entry.size
        if budget < 0:
            raise ValueError("it is too long")
        field = entry.field
        if tag == INTEROP_POINTER:
            inner, budget = _copy_directory(source, source.offset(entry), target, budget)
            field = struct.pack(source.order + "I", inner)
        elif entry.size > 4:
            field = struct.pack(source.order + "I", target.append(source.data(entry)))
        copied += struct.pack(source.order + "HHI", tag, entry.kind, entry.count) + field
        count += 1
    return target.append(struct.pack(source.order + "H", count) + copied + bytes(4)), budget
