"""XMP: what programs write about a photograph, as XML (ISO 16684-1)."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.parsers.expat import ExpatError

if TYPE_CHECKING:
    from xml.dom.minidom import Element

MAX_XMP = 2**24
"""Most bytes that are read: 16 MiB."""

_TIFF = "http://ns.adobe.com/tiff/1.0/"
_EXIF = "http://ns.adobe.com/exif/1.0/"
_XMP = "http://ns.adobe.com/xap/1.0/"
_PHOTOSHOP = "http://ns.adobe.com/photoshop/1.0/"
_IPTC_CORE = "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/"
_IPTC_EXTENSION = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"

_OF_THE_OLD_FILE = (
    "http://ns.google.com/photos/1.0/",
    "http://ns.google.com/photos/dd/1.0/",
    "http://ns.adobe.com/hdr-gain-map/1.0/",
    "http://ns.adobe.com/xmp/note/",
)
"""Beginnings of namespaces that describe other parts of the file read: a film behind the image, a depth map, a gain
map, more XMP. The file written has none of these."""

_LOCATION = {
    (_PHOTOSHOP, "City"), (_PHOTOSHOP, "State"), (_PHOTOSHOP, "Country"), (_IPTC_CORE, "Location"),
    (_IPTC_CORE, "CountryCode"), (_IPTC_EXTENSION, "LocationCreated"), (_IPTC_EXTENSION, "LocationShown"),
}  # fmt: skip


def edit_xmp(
    xmp: bytes,
    *,
    upright: bool = False,
    srgb: bool = False,
    size: tuple[int, int] | None = None,
    location: bool = True,
) -> bytes:
    """Change what XMP says about an image, wherever it says it; other things stay.

    Args:
        xmp: the packet.
        upright: the image needs no turning.
        srgb: its colours are those of sRGB.
        size: (height, width) in pixels.
        location: False takes out where the photograph was taken.

    Raises:
        ValueError: it is no XML, is longer than `MAX_XMP`, or defines entities.
    """
    from xml.dom import minidom

    # XMP needs no document type; entities that unfold without end are defined in one.
    if len(xmp) > MAX_XMP or b"<!DOCTYPE" in xmp or b"<!ENTITY" in xmp:
        raise ValueError("it is not XMP")
    values: dict[tuple[str, str], str] = {}
    if upright:
        values[_TIFF, "Orientation"] = "1"
    if srgb:
        values |= {(_EXIF, "ColorSpace"): "1", (_PHOTOSHOP, "ICCProfile"): "sRGB IEC61966-2.1"}
    if size is not None:
        for space, across, down in (
            (_TIFF, "ImageWidth", "ImageLength"),
            (_EXIF, "PixelXDimension", "PixelYDimension"),
        ):
            values |= {(space, across): str(size[1]), (space, down): str(size[0])}
    try:
        document = minidom.parseString(xmp.strip(b"\0"))
        assert document.documentElement is not None
        _edit(document.documentElement, values, location)
        return "\n".join(node.toxml() for node in document.childNodes).encode()
    except (ExpatError, RecursionError, UnicodeError) as error:
        raise ValueError(f"it is not XMP ({error})") from error


def _edit(element: Element, values: dict[tuple[str, str], str], location: bool) -> None:
    for attribute in list(element.attributes.values()):
        name = (attribute.namespaceURI or "", attribute.localName or "")
        if _unwanted(name, location):
            element.removeAttributeNode(attribute)
        elif name in values:
            attribute.value = values[name]
    for child in list(element.childNodes):
        if child.nodeType != child.ELEMENT_NODE:
            continue
        name = (child.namespaceURI or "", child.localName or "")
        if _unwanted(name, location):
            element.removeChild(child)
        elif name in values:
            _set_text(child, values[name])
        else:
            _edit(child, values, location)


def _set_text(element: Element, text: str) -> None:
    for child in list(element.childNodes):
        element.removeChild(child)
    assert element.ownerDocument is not None
    element.appendChild(element.ownerDocument.createTextNode(text))


def _unwanted(name: tuple[str, str], location: bool) -> bool:
    space, local = name
    if space.startswith(_OF_THE_OLD_FILE) or name == (_XMP, "Thumbnails"):
        return True
    return not location and (name in _LOCATION or (space == _EXIF and local.startswith("GPS")))
