"""What an image file says about the photograph: EXIF, XMP and resolution, from the file read to the file written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .exif import ExifBlock
from .xmp import edit_xmp

if TYPE_CHECKING:
    from PIL.Image import Image

EXIF_HEADER = b"Exif\0\0"
"""What JPEG, and some programs elsewhere, put before EXIF data."""

XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
"""What JPEG puts before XMP."""


@dataclass(frozen=True)
class Metadata:
    """EXIF, XMP and resolution; the colour profile belongs to the pixels and is kept with them.

    Attributes:
        exif: the block, without `EXIF_HEADER`, or None.
        xmp: the packet, or None.
        dpi: pixels in an inch across and down, or None.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None

    def kept(self, everything: bool, location: bool) -> Metadata:
        """What a result takes over: all, all without the location, or nothing."""
        if not everything:
            return Metadata()
        return self if location else self.without_location()

    def without_location(self) -> Metadata:
        """The same without where the photograph was taken: GPS data, and places in XMP."""
        exif, xmp = self.exif, self.xmp
        if exif is not None:
            block = ExifBlock(exif)
            block.drop_location()
            exif = block.to_bytes()
        return replace(self, exif=exif, xmp=None if xmp is None else edit_xmp(xmp, location=False))

    def with_size(self, height: int, width: int) -> Metadata:
        """The same with an image's size in pixels wherever one is written."""
        exif, xmp = self.exif, self.xmp
        if exif is not None:
            block = ExifBlock(exif)
            block.set_size(height, width)
            exif = block.to_bytes()
        return replace(self, exif=exif, xmp=None if xmp is None else edit_xmp(xmp, size=(height, width)))


def check_metadata(
    exif: bytes | None, xmp: bytes | None, dpi: Any, *, size: tuple[int, int], srgb: bool = False
) -> tuple[Metadata, tuple[str, ...]]:
    """Metadata of an image that was made upright.

    Args:
        exif: as the file has it, or None.
        xmp: likewise.
        dpi: pixels in an inch across and down, as a decoder says; where it does not, EXIF data may.
        size: (height, width) of the upright image.
        srgb: whether colours were converted to sRGB.

    Returns:
        The metadata, and notes about what is corrupted and was left out.
    """
    notes = []
    if exif:
        try:
            block = ExifBlock(exif.removeprefix(EXIF_HEADER))
            block.set_upright()
            if srgb:
                block.set_srgb()
            block.set_size(*size)
            dpi = dpi or block.resolution()
            exif = block.to_bytes()
        except ValueError:
            exif = None
            notes.append("its EXIF data is corrupted, and was left out")
    if xmp:
        try:
            xmp = edit_xmp(xmp, upright=True, srgb=srgb, size=size)
        except ValueError:
            xmp = None
            notes.append("its XMP data is corrupted, and was left out")
    return Metadata(exif or None, xmp or None, _resolution(dpi)), tuple(notes)


def pillow_metadata(image: Image) -> tuple[bytes | None, bytes | None, Any]:
    """EXIF, XMP and resolution as Pillow found them in a file."""
    exif, xmp = image.info.get("exif"), image.info.get("xmp")
    for marker, content in getattr(image, "applist", ()):
        if xmp is None and marker == "APP1" and content.startswith(XMP_HEADER):
            xmp = content[len(XMP_HEADER) :]
    return (
        exif if isinstance(exif, bytes) else None,
        xmp if isinstance(xmp, bytes) else None,
        image.info.get("dpi"),
    )


def _resolution(dpi: Any) -> tuple[float, float] | None:
    try:
        across, down = (float(value) for value in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    sane = all(math.isfinite(value) and 1 <= value <= 65535 for value in (across, down))
    return (across, down) if sane else None
