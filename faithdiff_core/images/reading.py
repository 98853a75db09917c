"""Reading image files of any mode, depth and profile into tensors."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ImageError, MissingPackageError, install_extra
from .depth import av1_or_hevc_bits, jpeg2000_bits, jxl_size_and_bits, read_netpbm
from .formats import check_pixels, no_pixel_limit, open_pillow, read_content
from .jpeg import check_complete as check_complete_jpeg
from .metadata import Metadata, check_metadata, pillow_metadata
from .png import PngFile, check_complete, read_png
from .tiff import TiffPage, check_layout, check_pieces, main_page, read_samples

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_ORIENTATION_TAG = 0x0112

_About = tuple[bytes | None, bytes | None, Any]
"""EXIF, XMP and resolution as the file has them; nothing of it is checked yet."""

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_MAX_COUNTED = 2**25
"""Bytes of the largest GIF whose frames are counted: Pillow walks through all of them."""


@dataclass(frozen=True)
class LoadedImage:
    """An image file's content.

    Attributes:
        colors: RGB in [0, 1], (3, H, W), float32, upright; grey is repeated three times.
        alpha: opacity in [0, 1], (1, H, W), or None.
        grey: whether the file has no colours; the result will have none either.
        bits: per channel, 8 or 16.
        icc: colour profile that belongs to `colors` and goes into the result, or None.
        notes: what a user should know: frames left out, a corrupted profile.
        metadata: EXIF, XMP and resolution, brought into agreement with the upright image and its colours.
    """

    colors: Tensor
    alpha: Tensor | None = None
    grey: bool = False
    bits: int = 8
    icc: bytes | None = None
    notes: tuple[str, ...] = ()
    metadata: Metadata = Metadata()  # noqa: RUF009 - frozen

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.colors.shape[-2], self.colors.shape[-1]


def load_image(path: str | Path) -> LoadedImage:
    """Read an image file of a format in `formats`.

    The orientation in its EXIF data is applied. Colours of 8 bits with a profile, and CMYK, are converted to sRGB; grey
    and 16-bit images keep their numbers and their profile. Of several frames the first is taken, of a TIFF the first
    that is no thumbnail. Pixels are counted before they are decoded.

    Raises:
        ImageError: it is no image, is corrupted or truncated, has more than `MAX_PIXELS`, or has a layout or depth that
            is not supported.
        MissingPackageError: 16-bit colours of PNG need opencv-python-headless, HEIF and JPEG XL their plugins.
    """
    path = Path(path)
    return decode_image(read_content(path), os.fspath(path.name))


def decode_image(content: bytes, name: str) -> LoadedImage:
    """Read an image from a file's bytes; see `load_image`.

    Args:
        content: all of the file.
        name: what to call it in messages.
    """
    try:
        decoded = _decode(content, name)
        return _as_loaded(decoded)
    except (ImageError, MissingPackageError):
        raise
    except MemoryError as error:
        raise ImageError(f"{name} needs more memory than there is. Reduce it first.") from error
    # Pillow's decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, RuntimeError and more.
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        if "can't allocate memory" in reason:
            raise ImageError(f"{name} needs more memory than there is. Reduce it first.") from error
        raise ImageError(f"{name} is corrupted or truncated ({reason}). Get the file again.") from error


@dataclass
class _Decoded:
    """An image as the file has it: (H, W, C) with 1 to 4 channels (L, LA, RGB, RGBA) from 0 to 2**bits - 1.

    `about` is the file's metadata, `converted` whether colours were converted to sRGB.
    """

    values: np.ndarray
    bits: int
    orientation: int
    icc: bytes | None
    notes: list[str]
    about: _About = (None, None, None)
    converted: bool = False


def _as_loaded(decoded: _Decoded) -> LoadedImage:
    channels = decoded.values.shape[2]
    grey = channels <= 2
    limit = 255.0 if decoded.bits == 8 else 65535.0
    tensor = torch.from_numpy(decoded.values.astype("float32")).permute(2, 0, 1).div_(limit)
    tensor = _upright(tensor, decoded.orientation)
    alpha = tensor[-1:].contiguous() if channels in (2, 4) else None
    colors = tensor[:1].expand(3, -1, -1) if grey else tensor[:3]
    metadata, notes = check_metadata(*decoded.about, size=(tensor.shape[-2], tensor.shape[-1]), srgb=decoded.converted)
    return LoadedImage(colors.contiguous(), alpha, grey, decoded.bits, decoded.icc, (*decoded.notes, *notes), metadata)


def _decode(content: bytes, name: str) -> _Decoded:
    if content[:4] in _TIFF_MAGIC:
        return _decode_tiff(content, name)
    _check_depth(content, name)
    png = read_png(content)
    image = open_pillow(content if png is None else png.content, name)
    notes = _frame_notes(image, len(content))
    icc = image.info.get("icc_profile") or None
    if png is not None:
        icc = png.icc
        if png.bad_profile:
            notes.append("its colour profile is corrupted, and was left out")
        check_complete(png)
        if png.bits == 16:
            values = _png_16_bit_grey(image, png) if png.color_type == 0 else _png_16_bit_colors(png, name)
            return _Decoded(values, 16, _orientation(image), icc, notes, (png.exif, png.xmp, png.dpi))
    if image.format == "PPM":
        check_pixels(name, *image.size)
        netpbm = read_netpbm(content)
        if netpbm is not None:
            values, bits = netpbm
            return _Decoded(values, bits, 1, None, notes)
    if image.format in ("JPEG", "MPO"):
        check_complete_jpeg(content)
    if image.format == "JPEG2000" and image.mode != "I;16" and jpeg2000_bits(content) > 8:
        raise _too_deep(name, "JPEG 2000", jpeg2000_bits(content))
    return _decode_pillow(image, name, icc, notes, None if png is None else (png.exif, png.xmp, png.dpi))


def _decode_pillow(
    image: Image, name: str, icc: bytes | None, notes: list[str], about: _About | None = None
) -> _Decoded:
    image.load()
    about = pillow_metadata(image) if about is None else about
    orientation = _orientation(image)  # behind a PNG's pixels, perhaps; Pillow turns a TIFF by itself, and says 1
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return _Decoded(_deep_grey(name, image), 16, orientation, icc, notes, about)
    flat, profile, more = _to_plain_mode(image, icc)
    converted = profile is not None and profile != icc
    return _Decoded(_as_array(flat), 8, orientation, profile, notes + more, about, converted)


def _decode_tiff(content: bytes, name: str) -> _Decoded:
    page = main_page(content, name)
    check_layout(page, name)
    notes = [f"it has {page.pages} frames; only the first is used"] if page.pages > 1 else []
    exif: bytes | None = None
    try:
        exif = page.exif(content)
    except ValueError:
        notes.append("its EXIF data is corrupted, and was left out")
    about = (exif, page.xmp, page.dpi)
    if page.needs_own_reader:
        values, more = read_samples(content, page, name)
        return _Decoded(values, page.bits, page.orientation, page.icc, notes + more, about)
    check_pieces(page, content)
    image = _open_tiff(content, page, name)
    return _decode_pillow(image, name, page.icc, notes, about)


def _open_tiff(content: bytes, page: TiffPage, name: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with no_pixel_limit():
            image = Image.open(io.BytesIO(page.alone(content)), formats=("TIFF",))
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is a TIFF of a layout that is not supported: {page.describe()}. Save it as RGB or grey, or as PNG."
        ) from error
    check_pixels(name, *image.size)
    return image


def _check_depth(content: bytes, name: str) -> None:
    """Refuse what Pillow would cut to 8 bits, and count the pixels of what its plugin decodes while opening it."""
    if content[4:8] == b"ftyp" and (bits := av1_or_hevc_bits(content)) > 8:
        raise _too_deep(name, "AVIF" if b"av1C" in content[:65536] else "HEIF", bits)
    if content[:2] == b"\xff\x0a" or content[4:12] == b"JXL \r\n\x87\n":
        header = jxl_size_and_bits(content)
        if header is None:
            raise ImageError(f"{name} is a JPEG XL of a layout that is not supported. Save it as PNG.")
        width, height, bits = header
        check_pixels(name, width, height)
        if bits > 8:
            raise _too_deep(name, "JPEG XL", bits)


def _too_deep(name: str, kind: str, bits: int) -> ImageError:
    return ImageError(
        f"{name} is {kind} with {bits} bits per channel, of which 8 alone could be read. Save it as PNG or TIFF with "
        f"16 bits, or with 8 bits."
    )


def _frame_notes(image: Image, size: int) -> list[str]:
    """A word about frames that are left out. MPO is how phones keep a depth map or a preview beside a photograph."""
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return []
    if image.format == "GIF" and size > _MAX_COUNTED:
        return ["it has several frames; only the first is used"]
    return [f"it has {getattr(image, 'n_frames', 1)} frames; only the first is used"]


def _orientation(image: Image) -> int:
    """The EXIF orientation; that of a file with corrupted EXIF data is upright, as viewers show it."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # as with decoders, anything
        return 1


def _to_plain_mode(image: Image, icc: bytes | None) -> tuple[Image, bytes | None, list[str]]:
    """Bring an 8-bit image to L, LA, RGB or RGBA; colours with a profile to sRGB.

    Returns:
        The image, the profile that it now has, and notes.
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
            ["its colour profile is corrupted or does not fit, and was left out"],
        )
    assert converted is not None
    return converted, ImageCms.ImageCmsProfile(srgb).tobytes(), []


def _as_array(image: Image) -> np.ndarray:
    import numpy as np

    values = np.asarray(image)
    return values if values.ndim == 3 else values[..., None]


def _deep_grey(name: str, image: Image) -> np.ndarray:
    """Grey of 16 bits, (H, W, 1), which Pillow gives in one of several modes."""
    values = _as_array(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name} has grey values of 32 bits ({values.min()} to {values.max()}), whose white point is unknown. "
            f"Save it with 8 or 16 bits."
        )
    return values


def _png_16_bit_grey(image: Image, png: PngFile) -> np.ndarray:
    """L or LA of 16 bits, (H, W, C), uint16."""
    import numpy as np

    image.load()
    values = _as_array(image).astype(np.uint16)
    if not png.transparent:
        return values
    return np.concatenate([values, np.where(values == png.transparent[0], 0, 65535).astype(np.uint16)], axis=2)


def _png_16_bit_colors(png: PngFile, name: str) -> np.ndarray:
    """LA, RGB or RGBA of 16 bits, (H, W, C), uint16; Pillow would cut them to 8."""
    try:
        import cv2
    except ImportError as error:
        raise MissingPackageError(
            f"{name} has 16-bit colours, for which opencv-python-headless is needed: {install_extra('engine')}, "
            f"or save it with 8 bits."
        ) from error
    import numpy as np

    values = cv2.imdecode(np.frombuffer(png.content, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.shape[:2] != (png.height, png.width) or values.ndim != 3:
        raise ValueError("its pixels cannot be decoded")
    if png.color_type == 4:  # grey with alpha, which OpenCV gives as colours
        return np.ascontiguousarray(values[..., [0, 3]])
    colors = np.ascontiguousarray(values[..., [2, 1, 0]])
    if png.color_type == 6:
        return np.concatenate([colors, values[..., 3:]], axis=2)
    if png.transparent:
        hidden = (colors == np.array(png.transparent, dtype=np.uint16)).all(axis=2, keepdims=True)
        return np.concatenate([colors, np.where(hidden, 0, 65535).astype(np.uint16)], axis=2)
    return colors


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation (1 to 8) to (C, H, W)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    horizontal, vertical = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    dims = [dim for dim, flip in ((2, horizontal), (1, vertical)) if flip]
    return image.flip(dims) if dims else image
