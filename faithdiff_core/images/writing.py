"""Writing image files: PNG, JPEG, WebP and TIFF, 8 and 16 bits, with texts, metadata and profile."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..atomic import write_atomically
from ..errors import ImageError
from .exif import DESCRIPTION, DOCUMENT, HOST_COMPUTER, MAKE, MODEL, X_RESOLUTION, ExifBlock
from .formats import WRITE_SUFFIXES
from .metadata import EXIF_HEADER, XMP_HEADER, Metadata
from .png import SIGNATURE, XMP_KEYWORD
from .reading import LoadedImage
from .sizes import LARGEST_SIDE
from .tiff_writer import encode_tiff

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

DEEP_SUFFIXES = (".png", ".tif", ".tiff")
"""Formats that keep 16 bits."""

JPEG_QUALITY = 95

MAX_JPEG_TEXT = 65533 - len(EXIF_HEADER)
"""Bytes of EXIF data that a JPEG file holds."""

_LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, by which Pillow turns colours into grey, too."""

_OWN = '{"Software": "FaithDiff'
"""How the description begins that an earlier run wrote."""

_GRAPHS = ("prompt:{", "workflow:{")
"""How the entries begin that a node graph left: they made the image that was read, not the one that is written."""

_ENTRY_TAGS = {"prompt": MODEL, "workflow": MAKE}
"""Where ComfyUI looks for a graph in EXIF data; its page looks at all texts of the first directory."""

_FREE_TAGS = (DESCRIPTION, DOCUMENT, HOST_COMPUTER, *range(0xFE10, 0xFE20))
"""Where texts go whose place is taken by the photograph's own, the camera's name above all; the last are private."""


@dataclass(frozen=True)
class _Parts:
    """What goes into a file beside the pixels.

    Attributes:
        text: by name: PNG texts, and one JSON text in the EXIF description elsewhere.
        entries: by name: PNG texts, and EXIF texts `name:text` elsewhere.
        metadata: of the photograph.
    """

    text: dict[str, str]
    entries: dict[str, str]
    metadata: Metadata = field(default_factory=Metadata)

    def exif(self, *, resolution: bool = False) -> bytes | None:
        """EXIF data with all texts; with `resolution`, that too, for formats that have no other place for it."""
        block = ExifBlock() if self.metadata.exif is None else ExifBlock(self.metadata.exif)
        for tag in list(block.entries):
            if (block.text(tag) or "").startswith((_OWN, *_GRAPHS)):
                del block.entries[tag]
        if self.text:
            block.put_text(_free_tag(block, DESCRIPTION), json.dumps(self.text))
        for name, text in self.entries.items():
            block.put_text(_free_tag(block, _ENTRY_TAGS.get(name, DOCUMENT)), f"{name}:{text}")
        if resolution and self.metadata.dpi is not None and X_RESOLUTION not in block.entries:
            block.put_resolution(self.metadata.dpi)
        return block.to_bytes() if block.entries else None


def _free_tag(block: ExifBlock, wanted: int) -> int:
    return next((tag for tag in (wanted, *_FREE_TAGS) if not block.text(tag)), wanted)


def save_image(
    path: str | Path,
    image: LoadedImage,
    *,
    text: Mapping[str, str] | None = None,
    entries: Mapping[str, str] | None = None,
    quality: int = JPEG_QUALITY,
) -> tuple[str, ...]:
    """Write an image in the format that the name says, to a temporary name first.

    The image's metadata goes with it, with the size of the image that is written.

    Args:
        path: ends with one of `WRITE_SUFFIXES`.
        image: grey, alpha, bits and profile decide about the file's mode.
        text: entries for the file's metadata: PNG text, and the description of TIFF or EXIF (one JSON text) elsewhere.
        entries: likewise, as node graphs are kept: PNG text, and an EXIF text `name:text` for each elsewhere.
        quality: of JPEG and WebP, 1 to 100.

    Returns:
        What a user should know: texts and metadata that are too long for the format, and were left out.

    Raises:
        ImageError: another ending, JPEG for an image with transparency, or more pixels than the format can hold.
        OSError: the file cannot be written; nothing is left under its name.
    """
    path = Path(path)
    content, notes = encode_image(path, image, text, entries=entries, quality=quality)
    write_atomically(path, content)
    return notes


def encode_image(
    path: Path,
    image: LoadedImage,
    text: Mapping[str, str] | None = None,
    *,
    entries: Mapping[str, str] | None = None,
    quality: int = JPEG_QUALITY,
) -> tuple[bytes, tuple[str, ...]]:
    """The bytes that `save_image` writes, and its notes; `path` is only looked at.

    Raises:
        ImageError: as `save_image`.
    """
    suffix = check_output(path, *image.size, transparent=image.alpha is not None)
    parts = _Parts(dict(text or {}), dict(entries or {}), image.metadata.with_size(*image.size))
    notes: tuple[str, ...] = ()
    if suffix == ".png":
        return _encode_png(image, parts), notes
    if suffix in (".tif", ".tiff"):
        exif, metadata = parts.exif(resolution=True), parts.metadata
        values = _quantised(image, image.bits)
        return encode_tiff(values, exif=exif, xmp=metadata.xmp, icc=image.icc, dpi=metadata.dpi), notes
    if suffix == ".webp":
        return _encode_webp(image, parts, quality), notes
    return _encode_jpeg(image, parts, quality)


def check_output_name(path: Path) -> str:
    """The ending of an image's name, in lower case.

    Raises:
        ImageError: it is none of `WRITE_SUFFIXES`.
    """
    suffix = path.suffix.lower()
    if suffix not in WRITE_SUFFIXES:
        endings = ", ".join(WRITE_SUFFIXES)
        raise ImageError(f"{path.name}: images are written as {endings}, not as {suffix or 'a name without ending'}.")
    return suffix


def check_output(path: Path, height: int, width: int, *, transparent: bool) -> str:
    """Check, before any work is done, that an image can be written as the name says; gives the ending.

    Raises:
        ImageError: another ending, JPEG for an image with transparency, or more pixels than the format can hold.
    """
    suffix = check_output_name(path)
    if suffix in (".jpg", ".jpeg") and transparent:
        raise ImageError(f"{path.name}: JPEG cannot hold the image's transparency. Name it .png or .webp.")
    limit = LARGEST_SIDE.get(suffix)
    if limit is not None and max(height, width) > limit:
        raise ImageError(
            f"{path.name}: an image of {width} x {height} is too large for {suffix}, whose sides have at most {limit} "
            f"pixels. Name it .png."
        )
    return suffix


def _quantised(image: LoadedImage, bits: int) -> np.ndarray:
    """(H, W, C) of uint8 or uint16 in the order L, LA, RGB or RGBA."""
    import numpy as np

    colors = image.colors.detach().to(device="cpu", dtype=torch.float32)
    if image.grey:
        colors = (colors * torch.tensor(_LUMA)[:, None, None]).sum(0, keepdim=True)
    if image.alpha is not None:
        colors = torch.cat([colors, image.alpha.detach().to(colors)])
    limit = 2**bits - 1
    values = colors.clamp(0.0, 1.0).mul(limit).round_().permute(1, 2, 0).numpy()
    return np.ascontiguousarray(values.astype(np.uint8 if bits == 8 else np.uint16))


def _as_image(image: LoadedImage) -> Image:
    from PIL import Image

    values = _quantised(image, 8)
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


def _encode_png(image: LoadedImage, parts: _Parts) -> bytes:
    """PNG (PNG specification, sections 7, 9 and 11); Pillow writes 16 bits for grey without alpha only."""
    if image.bits == 16:
        content = _encode_png16(_quantised(image, 16))
    else:
        buffer = io.BytesIO()
        _as_image(image).save(buffer, "PNG")
        content = buffer.getvalue()
    header_end = len(SIGNATURE) + 25
    return content[:header_end] + b"".join(_png_chunks(image.icc, parts)) + content[header_end:]


def _png_chunks(icc: bytes | None, parts: _Parts) -> list[bytes]:
    """Chunks before the pixels."""
    chunks = []
    metadata = parts.metadata
    if icc is not None:
        chunks.append(_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
    if metadata.dpi is not None:
        chunks.append(_chunk(b"pHYs", struct.pack(">IIB", *(round(dpi / 0.0254) for dpi in metadata.dpi), 1)))
    if (exif := _Parts({}, {}, metadata).exif()) is not None:
        chunks.append(_chunk(b"eXIf", exif))
    if metadata.xmp is not None:
        chunks.append(_chunk(b"iTXt", XMP_KEYWORD + b"\0\0\0\0\0" + metadata.xmp))
    for key, value in {**parts.text, **parts.entries}.items():
        if value.isascii():
            chunks.append(_chunk(b"tEXt", key.encode("latin-1") + b"\0" + value.encode()))
        else:
            chunks.append(_chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + value.encode()))
    return chunks


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _encode_png16(values: np.ndarray) -> bytes:
    """Header and pixels of a PNG file with 16 bits."""
    import numpy as np

    height, width, channels = values.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    filtered = np.empty((height, rows.shape[1] + 1), dtype=np.uint8)
    filtered[:, 0] = 2  # filter "up": the difference to the row above
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))
    return SIGNATURE + header + _chunk(b"IDAT", zlib.compress(filtered.tobytes(), 6)) + _chunk(b"IEND", b"")


def _grey_as_rgb(encoded: Image, icc: bytes | None) -> tuple[Image, bytes | None]:
    """L or LA as RGB or RGBA, with sRGB's profile if it had a grey one: a profile goes with a number of channels."""
    from PIL import ImageCms

    colors = encoded.convert("RGB")
    if icc is not None:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            if profile.profile.xcolor_space.strip() == "GRAY":
                srgb = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(encoded.getchannel(0), profile, srgb, outputMode="RGB")
                assert converted is not None
                colors, icc = converted, ImageCms.ImageCmsProfile(srgb).tobytes()
        except (ImageCms.PyCMSError, OSError):
            icc = None
    if encoded.mode == "LA":
        colors.putalpha(encoded.getchannel("A"))
    return colors, icc


def _encode_webp(image: LoadedImage, parts: _Parts, quality: int) -> bytes:
    encoded, icc = _as_image(image), image.icc
    if encoded.mode in ("L", "LA"):  # WebP has no grey
        encoded, icc = _grey_as_rgb(encoded, icc)
    options: dict[str, Any] = {"quality": quality, "icc_profile": icc}
    if (exif := parts.exif(resolution=True)) is not None:
        options["exif"] = exif
    if parts.metadata.xmp is not None:
        options["xmp"] = parts.metadata.xmp
    buffer = io.BytesIO()
    encoded.save(buffer, "WEBP", **options)
    return buffer.getvalue()


def _encode_jpeg(image: LoadedImage, parts: _Parts, quality: int) -> tuple[bytes, tuple[str, ...]]:
    """The file, and notes about what a segment of JPEG (64 KB) cannot hold."""
    notes: list[str] = []
    exif, xmp = parts.exif(), parts.metadata.xmp
    while exif is not None and len(exif) > MAX_JPEG_TEXT and (parts.text or parts.entries):
        both = {**parts.text, **parts.entries}
        longest = max(both, key=lambda key: len(both[key]))
        (parts.text if longest in parts.text else parts.entries).pop(longest)
        notes.append(f"its metadata `{longest}` is longer than the 64 KB that JPEG takes, and was left out")
        exif = parts.exif()
    if exif is not None and len(exif) > MAX_JPEG_TEXT:
        exif = None
        notes.append("its EXIF data is longer than the 64 KB that JPEG takes, and was left out")
    if xmp is not None and len(xmp) > 65533 - len(XMP_HEADER):
        xmp = None
        notes.append("its XMP data is longer than the 64 KB that JPEG takes, and was left out")
    options: dict[str, Any] = {"quality": quality, "icc_profile": image.icc, "subsampling": 0}
    if parts.metadata.dpi is not None:
        options["dpi"] = parts.metadata.dpi
    buffer = io.BytesIO()
    _as_image(image).save(buffer, "JPEG", **options)
    content = buffer.getvalue()
    header_end = 4 + int.from_bytes(content[4:6], "big")  # behind JFIF's segment, which Pillow writes first
    segments = [EXIF_HEADER + exif] if exif is not None else []
    segments += [XMP_HEADER + xmp] if xmp is not None else []
    packed = b"".join(b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data for data in segments)
    return content[:header_end] + packed + content[header_end:], tuple(notes)
