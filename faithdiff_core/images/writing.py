"""Writing image files: PNG, TIFF, JPEG and WebP, 8 and 16 bits, with text and profile."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..atomic import write_atomically
from ..errors import ImageError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
from .geometry import LARGEST_SIDE
from .reading import LoadedImage
from .tiff_writer import encode_tiff

WRITE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
"""Formats that are written; PNG and TIFF keep 16 bits."""

JPEG_QUALITY = 95

MAX_JPEG_TEXT = 65533 - len(b"Exif\0\0")
"""Bytes of EXIF data that a JPEG file holds."""

_LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, by which Pillow turns colours into grey, too."""

_DESCRIPTION_TAG = 0x010E


def save_image(
    path: str | Path,
    image: LoadedImage,
    *,
    text: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Write an image in the format that the name says, to a temporary name first.

    Args:
        path: ends with one of `WRITE_SUFFIXES`.
        image: grey, alpha, bits and profile decide about the file's mode.
        text: entries for the file's metadata: PNG text, and the description of TIFF or EXIF (one JSON text) elsewhere.

    Returns:
        What a user should know: texts that are too long for the format, and were left out.

    Raises:
        ImageError: another ending, JPEG for an image with transparency, or more pixels than the format can hold.
        OSError: the file cannot be written; nothing is left under its name.
    """
    path = Path(path)
    content, notes = encode_image(path, image, text)
    write_atomically(path, content)
    return notes


def encode_image(
    path: Path, image: LoadedImage, text: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[str, ...]]:
    """The bytes that `save_image` writes, and its notes; `path` is only looked at.

    Raises:
        ImageError: as `save_image`.
    """
    suffix = check_output(path, *image.size, transparent=image.alpha is not None)
    kept = dict(text or {})
    notes: tuple[str, ...] = ()
    if suffix in (".jpg", ".jpeg"):
        while kept and len(_exif(kept)) > MAX_JPEG_TEXT:
            longest = max(kept, key=lambda key: len(kept[key]))
            del kept[longest]
            notes += (f"its metadata `{longest}` is longer than the 64 KB that JPEG takes, and was left out",)
    if suffix == ".png":
        return _encode_png(image, kept), notes
    if suffix in (".tif", ".tiff"):
        description = json.dumps(kept) if kept else ""
        return encode_tiff(_quantised(image, image.bits), description=description, icc=image.icc), notes
    return _encode_lossy(image, suffix, kept), notes


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


def _encode_png(image: LoadedImage, text: Mapping[str, str]) -> bytes:
    from PIL import PngImagePlugin

    if image.bits == 16:
        return _encode_png16(_quantised(image, 16), image.icc, text)
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    _as_image(image).save(buffer, "PNG", pnginfo=info, icc_profile=image.icc)
    return buffer.getvalue()


def _encode_png16(values: np.ndarray, icc: bytes | None, text: Mapping[str, str]) -> bytes:
    """PNG with 16 bits, which Pillow writes for grey without alpha only (PNG specification, sections 7, 9 and 11)."""
    import numpy as np

    height, width, channels = values.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    filtered = np.empty((height, rows.shape[1] + 1), dtype=np.uint8)
    filtered[:, 0] = 2  # filter "up": the difference to the row above
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))]
    if icc is not None:
        chunks.append(chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
    for key, value in text.items():
        chunks.append(chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + value.encode()))
    chunks += [chunk(b"IDAT", zlib.compress(filtered.tobytes(), 6)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _exif(text: Mapping[str, str]) -> bytes:
    """EXIF data with all texts as one JSON text in the description."""
    from PIL import Image

    exif = Image.Exif()
    exif[_DESCRIPTION_TAG] = json.dumps(dict(text))
    return exif.tobytes()


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


def _encode_lossy(image: LoadedImage, suffix: str, text: Mapping[str, str]) -> bytes:
    encoded, icc = _as_image(image), image.icc
    if suffix == ".webp" and encoded.mode in ("L", "LA"):  # WebP has no grey
        encoded, icc = _grey_as_rgb(encoded, icc)
    options: dict[str, Any] = {"quality": JPEG_QUALITY, "icc_profile": icc}
    if text:
        options["exif"] = _exif(text)
    if suffix == ".webp":
        kind = "WEBP"
    else:
        kind = "JPEG"
        options["subsampling"] = 0
    buffer = io.BytesIO()
    encoded.save(buffer, kind, **options)
    return buffer.getvalue()
