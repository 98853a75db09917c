"""Photographs with everything that a camera and a photographer's programs write about them, written with Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import IFDRational

XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/"
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/" xmlns:GCamera="http://ns.google.com/photos/1.0/camera/"
 xmp:Rating="4" tiff:Orientation="6" tiff:ImageWidth="24" exif:PixelXDimension="24" exif:GPSLatitude="48,12.5N"
 photoshop:City="Vienna" GCamera:MicroVideo="1" GCamera:MicroVideoOffset="4711">
<exif:GPSLongitude>16,22.05E</exif:GPSLongitude><exif:PixelYDimension>16</exif:PixelYDimension>
<dc:title><rdf:Alt><rdf:li xml:lang="x-default">Bridge &amp; towör</rdf:li></rdf:Alt></dc:title>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>""".encode()
"""Turned on its side, 24 x 16 pixels, taken in Vienna, with a film behind the image that only a phone would find."""

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

LATITUDE = b"LATITUDE-REFERENCE"
"""Bytes in the GPS directory that a file must not have any more when the location was stripped."""


def exif(width: int, height: int, orientation: int = 6, dpi: int | None = None) -> bytes:
    """EXIF data of a camera, with maker notes and GPS."""
    block = Image.Exif()
    block.update(
        {
            0x010F: "Camera Works", 0x0110: "CW 5", 0x0112: orientation, 0x0132: "2003:07:08 09:10:11",
            0x013B: "A. Photographer", 0x8298: "(c) A. Photographer", 0x010E: "On the bridge",
        }
    )  # fmt: skip
    if dpi is not None:
        block.update({0x011A: IFDRational(dpi), 0x011B: IFDRational(dpi), 0x0128: 2})
    block.get_ifd(0x8769).update(
        {
            0x829A: IFDRational(1, 125), 0x9003: "2003:07:08 09:10:11", 0x9000: b"0231", 0xA002: width, 0xA003: height,
            0xA001: 65535, 0x927C: b"MAKERNOTE" * 5,
        }
    )  # fmt: skip
    degrees = (IFDRational(48), IFDRational(12), IFDRational(30))
    block.get_ifd(0x8825).update({1: "N", 2: degrees, 3: "E", 4: degrees, 27: LATITUDE})
    return block.tobytes()


def photograph(kind: str, values: np.ndarray, *, orientation: int = 6, dpi: int = 300, **more: Any) -> bytes:
    """A file of a format with EXIF, XMP and resolution.

    Args:
        kind: Pillow's name of the format: JPEG, PNG, WEBP or TIFF.
        values: the pixels, (H, W, C) or (H, W).
        orientation: as EXIF and XMP say.
        dpi: resolution.
        **more: options of Pillow's `save`.
    """
    image = Image.fromarray(values)
    block = exif(image.width, image.height, orientation, dpi if kind == "WEBP" else None)
    options: dict[str, Any] = {"exif": block, "dpi": (dpi, dpi), **more}
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=True)
    elif kind == "TIFF":
        # Pillow takes EXIF data for TIFF apart, and writes XMP as one of the file's own tags.
        options["exif"] = Image.Exif()
        options["exif"].load(block)
        options["exif"][700] = XMP
    else:
        options["xmp"] = XMP
    if kind == "JPEG":
        options["quality"] = 95
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def wide_photograph(values: np.ndarray, *, dpi: int = 240) -> bytes:
    """A PNG file with 16 bits and Adobe RGB's profile, which Pillow cannot write, and EXIF, XMP and resolution.

    Args:
        values: (H, W, 3), uint16.
        dpi: resolution.
    """
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    per_meter = round(dpi / 0.0254)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0),
        b"iCCP": b"profile\0\0" + zlib.compress(wide_profile()),
        b"eXIf": exif(width, height, 1).removeprefix(b"Exif\0\0"),
        b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0" + XMP,
        b"pHYs": struct.pack(">IIB", per_meter, per_meter, 1),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    out = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks.items():
        out += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return out


def linear_profile() -> bytes:
    """sRGB's profile with curves of gamma 1 (ICC.1:2010, section 10.5: a curve without entries is the identity)."""
    curve = b"curv" + bytes(8)
    return _changed_srgb("LINE", {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def wide_profile() -> bytes:
    """sRGB's profile with the primaries of Adobe RGB (1998), adapted to D50 (ICC.1:2010, section 10.31)."""
    primaries = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }
    xyz = {tag: struct.pack(">4s4x3i", b"XYZ ", *(round(v * 65536) for v in of)) for tag, of in primaries.items()}
    return _changed_srgb("WIDE", xyz)


def _changed_srgb(name: str, changes: dict[bytes, bytes]) -> bytes:
    """sRGB's profile under another name of four letters, with other content of some tags, no longer than before."""
    out = bytearray(SRGB)
    count = struct.unpack(">I", SRGB[128:132])[0]
    for i in range(count):
        tag, offset, size = struct.unpack(">4sII", SRGB[132 + 12 * i : 144 + 12 * i])
        if tag in changes:
            content = changes[tag]
            assert len(content) <= size
            out[offset : offset + len(content)] = content
            out[132 + 12 * i + 8 : 132 + 12 * i + 12] = struct.pack(">I", len(content))
        if tag == b"desc":
            at = out.index("sRGB".encode("utf-16-be"), offset, offset + size)
            out[at : at + 8] = name.encode("utf-16-be")
    return bytes(out)
