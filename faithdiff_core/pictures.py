"""Pictures: sizes, resizing and padding of tensors, and picture files for the command line.

The tensor functions need torch and Pillow and are shared with hosts. Files are read into `Picture`, which keeps what a
user expects to find again: transparency, grey, 16 bits and the colour profile.
"""

from __future__ import annotations

import io
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import MissingPackageError, PictureError, SettingsError, install_extra
from .tiles import LATENT_SCALE

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

MAX_PIXELS = 2**28
"""Most pixels of a picture that is read or made: 16384 x 16384, eight times an 8K frame. As float32 RGB it is 3 GiB."""

READ_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".tif",
    ".tiff",
    ".bmp",
    ".gif",
    ".avif",
    ".jp2",
    ".ppm",
    ".pgm",
    ".tga",
)
"""Names by which pictures are found in a folder. A file that is named itself is read whatever its name."""

WRITE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Formats that are written; 16 bits are kept by PNG alone."""

JPEG_QUALITY = 95

_LARGEST_SIDE = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383}
"""What libjpeg and libwebp can hold, in pixels."""

_LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, by which Pillow turns colours into grey, too."""

_ORIENTATION_TAG = 0x0112
_DESCRIPTION_TAG = 0x010E
_TIFF_BITS_TAG = 258


# Sizes and tensors


def target_size(
    height: int,
    width: int,
    *,
    scale: float | None = None,
    longest_side: int | None = None,
    megapixels: float | None = None,
) -> tuple[int, int]:
    """The size to enlarge (or reduce) a picture to; the aspect ratio stays.

    Sides are rounded to the nearest pixel, halves up, and are at least 1.

    Args:
        height, width: of the picture, in pixels.
        scale: factor on both sides; taken where neither of the others is given.
        longest_side: pixels of the longer side.
        megapixels: area in millions of pixels.

    Returns:
        (height, width).

    Raises:
        SettingsError: nothing or too much is given, a value is not positive, or the result has more than `MAX_PIXELS`.
    """
    if longest_side is not None and megapixels is not None:
        raise SettingsError("Give a longest side or a number of megapixels, not both.")
    if longest_side is not None:
        factor = _positive("longest side", longest_side) / max(height, width)
    elif megapixels is not None:
        factor = math.sqrt(_positive("number of megapixels", megapixels) * 1e6 / (height * width))
    elif scale is not None:
        factor = _positive("scale", scale)
    else:
        raise SettingsError("Give a scale, a longest side or a number of megapixels.")
    # The product is rounded first, so that 0.1 * 5 in binary counts as the half that it is.
    sides = [max(1, math.floor(round(side * factor, 6) + 0.5)) for side in (height, width)]
    if sides[0] * sides[1] > MAX_PIXELS:
        raise SettingsError(
            f"A picture of {width} x {height} would become {sides[1]} x {sides[0]}, more than the {MAX_PIXELS} pixels "
            f"that are worked with. Choose a smaller scale."
        )
    return sides[0], sides[1]


def _positive(what: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise SettingsError(f"The {what} must be a positive number, got {value}.")
    return value


def resize_lanczos(pictures: Tensor, height: int, width: int) -> Tensor:
    """Resize with Pillow's Lanczos filter, in floating point: nothing is rounded to 8 bits on the way.

    Args:
        pictures: values in [0, 1], (B, C, H, W), floating point, on any device.
        height, width: the new size in pixels.

    Returns:
        Values in [0, 1], (B, C, height, width), of the same dtype and device. Lanczos overshoots at edges; what leaves
        the range is clamped.

    Raises:
        SettingsError: the tensor has another layout, or the size is empty.
    """
    import numpy as np
    from PIL import Image

    if pictures.ndim != 4 or not pictures.is_floating_point():
        raise SettingsError(
            f"resize_lanczos: expected floating-point pictures of shape (batch, channels, height, width), got "
            f"{tuple(pictures.shape)} of {pictures.dtype}."
        )
    if height < 1 or width < 1:
        raise SettingsError(f"resize_lanczos: a picture of {width} x {height} pixels cannot be made.")
    if tuple(pictures.shape[-2:]) == (height, width):
        return pictures.clamp(0.0, 1.0)
    planes = pictures.detach().to(device="cpu", dtype=torch.float32).flatten(0, 1).contiguous().numpy()
    out = np.empty((len(planes), height, width), dtype=np.float32)
    for plane, target in zip(planes, out, strict=True):
        target[:] = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS))
    resized = torch.from_numpy(out).clamp_(0.0, 1.0).unflatten(0, pictures.shape[:2])
    return resized.to(device=pictures.device, dtype=pictures.dtype)


def pad_to_multiple(pictures: Tensor, multiple: int = LATENT_SCALE) -> Tensor:
    """Repeat the last column and row of (B, C, H, W) until both sides are multiples of `multiple`.

    The picture stays at the top left: `crop_to` with the old size gives it back exactly.
    """
    if multiple < 1:
        raise SettingsError(f"Sides cannot be multiples of {multiple}; the smallest is 1.")
    height, width = pictures.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    return F.pad(pictures, (0, right, 0, bottom), mode="replicate") if bottom or right else pictures


def crop_to(pictures: Tensor, height: int, width: int) -> Tensor:
    """The top left (..., height, width) of a padded picture, as a view."""
    return pictures[..., :height, :width]


# Files


@dataclass(frozen=True)
class Picture:
    """A picture file's content.

    Attributes:
        colors: RGB in [0, 1], (3, H, W), float32, upright; grey is repeated three times.
        alpha: opacity in [0, 1], (1, H, W), or None.
        grey: whether the file has no colours; the result will have none either.
        bits: per channel, 8 or 16.
        icc: colour profile that belongs to `colors` and goes into the result, or None.
        notes: what a user should know: frames left out, a damaged profile.
    """

    colors: Tensor
    alpha: Tensor | None = None
    grey: bool = False
    bits: int = 8
    icc: bytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.colors.shape[-2], self.colors.shape[-1]


def load_picture(path: str | Path) -> Picture:
    """Read a picture file.

    The orientation in its EXIF data is applied. Colours of 8 bits with a profile, and CMYK, are converted to sRGB; grey
    and 16-bit pictures keep their numbers and their profile. Of several frames the first is taken.

    Raises:
        PictureError: it is no picture, is damaged, or has more than `MAX_PIXELS`.
        MissingPackageError: 16-bit colours need opencv-python-headless.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.exists():
        raise PictureError(f"There is no file {path}. Check the name and the folder.")
    if path.is_dir():
        raise PictureError(f"{path} is a folder, not a picture.")
    if path.stat().st_size == 0:
        raise PictureError(f"{path.name} is empty (0 bytes).")
    try:
        with _no_pixel_limit(), Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PictureError(
                    f"{path.name} has {width} x {height} pixels; at most {MAX_PIXELS} are worked with (16384 x 16384, "
                    f"say). Cut it into parts, or reduce it first."
                )
            return _load(path, image)
    except UnidentifiedImageError as error:
        raise PictureError(
            f"{path.name} is not a picture that can be read. Expected PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF."
        ) from error
    except PictureError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error) as error:
        raise PictureError(f"{path.name} is damaged or cut ({error}). Get the file again.") from error


def save_picture(
    path: str | Path,
    picture: Picture,
    *,
    text: Mapping[str, str] | None = None,
) -> None:
    """Write a picture in the format that the name says, to a temporary name first.

    Args:
        path: ends with one of `WRITE_SUFFIXES`.
        picture: grey, alpha, bits and profile decide about the file's mode.
        text: entries for the file's metadata: PNG text, and the EXIF description (one JSON text) elsewhere.

    Raises:
        PictureError: another ending, JPEG for a picture with transparency, or more pixels than the format can hold.
    """
    path = Path(path)
    suffix = check_output(path, *picture.size, transparent=picture.alpha is not None)
    content = _encode_png(picture, text or {}) if suffix == ".png" else _encode_lossy(picture, suffix, text or {})
    write_atomically(path, content)


def check_output_name(path: Path) -> str:
    """The ending of a picture's name, in lower case.

    Raises:
        PictureError: it is none of `WRITE_SUFFIXES`.
    """
    suffix = path.suffix.lower()
    if suffix not in WRITE_SUFFIXES:
        endings = ", ".join(WRITE_SUFFIXES)
        raise PictureError(
            f"{path.name}: pictures are written as {endings}, not as {suffix or 'a name without ending'}."
        )
    return suffix


def check_output(path: Path, height: int, width: int, *, transparent: bool) -> str:
    """Check, before any work is done, that a picture can be written as the name says; gives the ending.

    Raises:
        PictureError: another ending, JPEG for a picture with transparency, or more pixels than the format can hold.
    """
    suffix = check_output_name(path)
    if suffix in (".jpg", ".jpeg") and transparent:
        raise PictureError(f"{path.name}: JPEG cannot hold the picture's transparency. Name it .png or .webp.")
    limit = _LARGEST_SIDE.get(suffix)
    if limit is not None and max(height, width) > limit:
        raise PictureError(
            f"{path.name}: a picture of {width} x {height} is too large for {suffix}, whose sides have at most {limit} "
            f"pixels. Name it .png."
        )
    return suffix


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside `path`, then rename: under `path` there is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_pixel_limit_lock = threading.Lock()


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
    """Lift Pillow's own limit while a file is opened; it is lower than ours, and an error without a remedy."""
    from PIL import Image

    with _pixel_limit_lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _load(path: Path, image: Image) -> Picture:
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO is how phones keep a depth map or a preview beside a photograph
        notes.append(f"it has {frames} frames; only the first is used")
    icc = image.info.get("icc_profile") or None
    bits, grey = 8, False
    if _has_16_bit_colors(path, image):
        orientation = image.getexif().get(_ORIENTATION_TAG, 1) if image.format != "TIFF" else 1
        values = _read_with_opencv(path)
        bits = 16
    else:
        image.load()
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        if image.mode in ("F", "I") or image.mode.startswith("I;"):
            values = _deep_grey(path, image)
            bits = 16
        else:
            flat, icc, note = _to_plain_mode(image, icc)
            notes += note
            values = _as_array(flat)
    channels = values.shape[2]
    grey = channels <= 2
    limit = 255.0 if bits == 8 else 65535.0
    tensor = _upright(torch.from_numpy(values.astype("float32")).permute(2, 0, 1).div_(limit), orientation)
    alpha = tensor[-1:].contiguous() if channels in (2, 4) else None
    colors = tensor[:1].expand(3, -1, -1) if grey else tensor[:3]
    return Picture(colors.contiguous(), alpha, grey, bits, icc, tuple(notes))


def _to_plain_mode(image: Image, icc: bytes | None) -> tuple[Image, bytes | None, list[str]]:
    """Bring an 8-bit picture to L, LA, RGB or RGBA; colours with a profile to sRGB.

    Returns:
        The picture, the profile that it now has, and notes.
    """
    transparent = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    if image.mode in ("1", "L", "LA", "La"):
        return image.convert("LA" if transparent else "L"), icc, []
    notes: list[str] = []
    alpha: Image | None = None
    if transparent:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if image.mode not in ("CMYK", "LAB"):
        image = image.convert("RGB")
    if icc is not None or image.mode == "LAB":
        image, icc, notes = _to_srgb(image, icc)
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
    return image, icc, notes


def _to_srgb(image: Image, icc: bytes | None) -> tuple[Image, bytes | None, list[str]]:
    from PIL import ImageCms

    srgb = ImageCms.createProfile("sRGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(icc)) if icc is not None else ImageCms.createProfile("LAB")
        if icc is not None and image.mode == "RGB" and ImageCms.getProfileDescription(source).startswith("sRGB"):
            return image, icc, []
        converted = ImageCms.profileToProfile(
            image,
            source,
            srgb,
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return (
            image.convert("RGB"),
            None,
            ["its colour profile is damaged or does not fit, and was left out"],
        )
    assert converted is not None
    return converted, ImageCms.ImageCmsProfile(srgb).tobytes(), []


def _as_array(image: Image) -> np.ndarray:
    import numpy as np

    values = np.asarray(image)
    return values if values.ndim == 3 else values[..., None]


def _deep_grey(path: Path, image: Image) -> np.ndarray:
    """Grey of 16 bits, (H, W, 1), which Pillow gives in one of several modes."""
    values = _as_array(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise PictureError(
            f"{path.name} has grey values of 32 bits ({values.min()} to {values.max()}), whose white point is unknown. "
            f"Save it with 8 or 16 bits."
        )
    return values


def _has_16_bit_colors(path: Path, image: Image) -> bool:
    """Whether a file has more than 8 bits in several channels, which Pillow would cut to 8."""
    if image.format == "PNG":
        with path.open("rb") as file:
            header = file.read(26)
        return header[24] == 16 and header[25] != 0
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS_TAG, (8,))
        return len(bits) > 1 and bits[0] == 16
    return False


def _read_with_opencv(path: Path) -> np.ndarray:
    """16-bit LA, RGB or RGBA, (H, W, C), uint16."""
    try:
        import cv2
    except ImportError as error:
        raise MissingPackageError(
            f"{path.name} has 16-bit colours, for which opencv-python-headless is needed: {install_extra('engine')}, "
            f"or save it with 8 bits."
        ) from error
    import numpy as np

    values = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        raise PictureError(
            f"{path.name} is damaged, or has 16-bit colours in a layout that cannot be read. Save it as PNG."
        )
    if values.ndim == 2:
        return np.ascontiguousarray(values[..., None])
    order = [2, 1, 0, 3][: values.shape[2]]
    values = np.ascontiguousarray(values[..., order])
    with path.open("rb") as file:
        header = file.read(26)
    if header[:4] == b"\x89PNG" and header[25] == 4:  # grey with alpha, which OpenCV gives as colours
        return np.ascontiguousarray(values[..., [0, 3]])
    return values


def _upright(picture: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation (1 to 8) to (C, H, W)."""
    if orientation in (5, 6, 7, 8):
        picture = picture.transpose(1, 2)
    horizontal, vertical = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    dims = [dim for dim, flip in ((2, horizontal), (1, vertical)) if flip]
    return picture.flip(dims) if dims else picture


def _quantised(picture: Picture, bits: int) -> np.ndarray:
    """(H, W, C) of uint8 or uint16 in the order L, LA, RGB or RGBA."""
    import numpy as np

    colors = picture.colors.detach().to(device="cpu", dtype=torch.float32)
    if picture.grey:
        colors = (colors * torch.tensor(_LUMA)[:, None, None]).sum(0, keepdim=True)
    if picture.alpha is not None:
        colors = torch.cat([colors, picture.alpha.detach().to(colors)])
    limit = 2**bits - 1
    values = colors.clamp(0.0, 1.0).mul(limit).round_().permute(1, 2, 0).numpy()
    return np.ascontiguousarray(values.astype(np.uint8 if bits == 8 else np.uint16))


def _as_image(picture: Picture) -> Image:
    from PIL import Image

    values = _quantised(picture, 8)
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


def _encode_png(picture: Picture, text: Mapping[str, str]) -> bytes:
    from PIL import PngImagePlugin

    if picture.bits == 16:
        return _encode_png16(_quantised(picture, 16), picture.icc, text)
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    _as_image(picture).save(buffer, "PNG", pnginfo=info, icc_profile=picture.icc)
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


def _encode_lossy(picture: Picture, suffix: str, text: Mapping[str, str]) -> bytes:
    import json

    from PIL import Image

    image = _as_image(picture)
    options: dict[str, Any] = {"quality": JPEG_QUALITY, "icc_profile": picture.icc}
    if text:
        exif = Image.Exif()
        exif[_DESCRIPTION_TAG] = json.dumps(dict(text))
        options["exif"] = exif.tobytes()
    if suffix == ".webp":
        kind = "WEBP"
        if image.mode in ("L", "LA"):  # WebP has no grey
            image = image.convert("RGB" if image.mode == "L" else "RGBA")
    else:
        kind = "JPEG"
        options["subsampling"] = 0
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
