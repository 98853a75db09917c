"""Reading image files of any mode, depth and profile into tensors."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ImageError, MissingPackageError, install_extra

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

MAX_PIXELS = 2**28
"""Most pixels of an image that is read or made: 16384 x 16384, eight times an 8K frame. As float32 RGB it is 3 GiB."""

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
"""Names by which images are found in a folder. A file that is named itself is read whatever its name."""

_ORIENTATION_TAG = 0x0112

_TIFF_BITS_TAG = 258


@dataclass(frozen=True)
class LoadedImage:
    """An image file's content.

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


def load_image(path: str | Path) -> LoadedImage:
    """Read an image file.

    The orientation in its EXIF data is applied. Colours of 8 bits with a profile, and CMYK, are converted to sRGB; grey
    and 16-bit images keep their numbers and their profile. Of several frames the first is taken.

    Raises:
        ImageError: it is no image, is damaged, or has more than `MAX_PIXELS`.
        MissingPackageError: 16-bit colours need opencv-python-headless.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.exists():
        raise ImageError(f"There is no file {path}. Check the name and the folder.")
    if path.is_dir():
        raise ImageError(f"{path} is a folder, not an image.")
    if path.stat().st_size == 0:
        raise ImageError(f"{path.name} is empty (0 bytes).")
    try:
        with _no_pixel_limit(), Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    f"{path.name} has {width} x {height} pixels; at most {MAX_PIXELS} are worked with (16384 x 16384, "
                    f"say). Cut it into parts, or reduce it first."
                )
            return _load(path, image)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path.name} is not an image that can be read. Expected PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF."
        ) from error
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error) as error:
        raise ImageError(f"{path.name} is damaged or cut ({error}). Get the file again.") from error


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


def _load(path: Path, image: Image) -> LoadedImage:
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
    return LoadedImage(colors.contiguous(), alpha, grey, bits, icc, tuple(notes))


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
        raise ImageError(
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
        raise ImageError(
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


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation (1 to 8) to (C, H, W)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    horizontal, vertical = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    dims = [dim for dim, flip in ((2, horizontal), (1, vertical)) if flip]
    return image.flip(dims) if dims else image
