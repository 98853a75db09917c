"""The image formats that are read, in one list for every command, training and the demo.

Pillow finds a file's format by its content and knows some (PostScript) that run other programs, so it is only ever
opened with the formats named here.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ImageError, MissingPackageError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 2**28
"""Most pixels of an image that is read or made: 16384 x 16384, eight times an 8K frame. As float32 RGB it is 3 GiB."""

MAX_BYTES = 16 * MAX_PIXELS
"""Largest file that is read: 4 GiB."""

SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
}
"""Pillow's names of the formats, and the endings of their files."""

PLUGINS = {
    "HEIF": ("pillow_heif", "pillow-heif", (".heic", ".heif", ".hif")),
    "JXL": ("pillow_jxl", "pillow-jxl-plugin", (".jxl",)),
}
"""Formats that Pillow reads through a separate package: its module, its name for pip, endings of the files."""

WRITE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
"""Formats that are written; 16 bits are kept by PNG and TIFF."""

_ALSO = ("MPO",)
"""Formats that come under another's ending: phones keep a depth map or a preview beside a photograph in a .jpg."""

_OTHER_SUFFIXES = (
    ".svg", ".psd", ".psb", ".xcf", ".exr", ".hdr", ".dds", ".ico", ".pcx", ".eps", ".pdf", ".ai", ".wmf", ".emf",
    ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".qoi", ".jls", ".jxr",
)  # fmt: skip
"""Endings of images that are not read; a folder's listing names them instead of passing them over."""


WEBP_SIDE = 16383
"""Most pixels along a side of a WebP frame. Only an animation's canvas can claim more, and libwebp then spends minutes
on a file of a few bytes (WebP container specification, chunks VP8X and ANMF)."""


def _plugin_here(name: str) -> bool:
    try:
        return importlib.util.find_spec(PLUGINS[name][0]) is not None
    except (ImportError, ValueError):
        return False


@lru_cache(maxsize=1)
def read_suffixes() -> tuple[str, ...]:
    """Endings by which images are found in a folder. A file that is named itself is read whatever its name."""
    own = [suffix for suffixes in SUFFIXES.values() for suffix in suffixes]
    return (*own, *(suffix for name, (_, _, suffixes) in PLUGINS.items() if _plugin_here(name) for suffix in suffixes))


@lru_cache(maxsize=1)
def pillow_formats() -> tuple[str, ...]:
    """What Pillow may take a file for; plugins are loaded."""
    from PIL import Image

    names = [*SUFFIXES, *_ALSO]
    for name, (module, _, _) in PLUGINS.items():
        if not _plugin_here(name):
            continue
        plugin = importlib.import_module(module)
        if hasattr(plugin, "register_heif_opener"):
            plugin.register_heif_opener()
        names.append(name)
    Image.init()
    return tuple(name for name in names if name in Image.OPEN)


def same_name(first: str, second: str) -> ImageError:
    """The error for two files of which one is meant."""
    return ImageError(
        f"{first} and {second} have the same name but for their endings, and one of them is meant. Remove or rename "
        f"the other."
    )


def named_files(folder: Path, files: Iterable[Path]) -> dict[str, Path]:
    """Files by their names in a folder, without endings.

    Raises:
        ImageError: two have the same name, so that which one is meant is unknown.
    """
    found: dict[str, Path] = {}
    for file in files:
        name = str(file.relative_to(folder).with_suffix(""))
        if name in found:
            raise same_name(str(found[name]), str(file))
        found[name] = file
    return found


def is_readable(name: str) -> bool | None:
    """Whether a file in a folder is an image that is read, by its name; None if it is no image, or hidden."""
    suffix = Path(name).suffix.lower()
    if name.startswith("."):
        return None
    if suffix in read_suffixes():
        return True
    others = (*_OTHER_SUFFIXES, *(suffix for _, _, endings in PLUGINS.values() for suffix in endings))
    return False if suffix in others else None


def left_out_note(counts: Counter[str]) -> str:
    """In words, which images are left out, and what would read them; `counts` has their number by ending."""
    if not counts:
        return ""
    packages = [package for _, package, suffixes in PLUGINS.values() if set(suffixes) & set(counts)]
    how = f" Install {' and '.join(packages)} to read them." * bool(packages)
    endings = ", ".join(sorted(counts))
    return f"left out {counts.total()} file(s) of formats that are not read ({endings}).{how}"


def read_content(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        ImageError: there is no such file, it is no regular file, is empty or larger than `MAX_BYTES`, or may not be
            read.
    """
    try:
        found, folder = os.path.exists(path), os.path.isdir(path)
        if not found and os.path.islink(path):
            raise ImageError(f"{path} is a link that leads to no file.")
        if not found:
            raise ImageError(f"There is no file {path}. Check the name and the folder.")
        if folder:
            raise ImageError(f"{path} is a folder, not an image.")
        if not os.path.isfile(path):
            raise ImageError(f"{path} is no regular file but a device or a pipe. Save it to a file first.")
        size = path.stat().st_size
        if size == 0:
            raise ImageError(f"{path.name} is empty (0 bytes).")
        if size > MAX_BYTES:
            raise ImageError(f"{path.name} has {size} bytes; at most {MAX_BYTES} are read. Save it as PNG.")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path.name} cannot be read: {error.strerror or error}.") from error


def check_pixels(name: str, width: int, height: int) -> None:
    """Refuse an image before its pixels are decoded.

    Raises:
        ImageError: it has none, or more than `MAX_PIXELS`.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{name} is corrupted: it has {width} x {height} pixels. Get the file again.")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {width} x {height} pixels; at most {MAX_PIXELS} are worked with (16384 x 16384, say). Cut it "
            f"into parts, or reduce it first."
        )


def open_pillow(content: bytes, name: str) -> Image:
    """Open an image with Pillow, as one of the formats listed here; its pixels are not decoded yet.

    Raises:
        ImageError: it is of no such format, or has more than `MAX_PIXELS`.
        MissingPackageError: it is of a format whose plugin is not installed.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with no_pixel_limit():
            image = Image.open(io.BytesIO(content), formats=pillow_formats())
    except UnidentifiedImageError as error:
        _refuse_plugin_format(content, name)
        raise ImageError(
            f"{name} is not an image that can be read. Expected {', '.join(SUFFIXES).replace('WEBP', 'WebP')}; a file "
            f"of one of these formats is corrupted."
        ) from error
    check_pixels(name, *image.size)
    if image.format == "WEBP" and max(image.size) > WEBP_SIDE:
        raise ImageError(
            f"{name} is corrupted: a WebP canvas of {image.width} x {image.height} pixels, whose frames have at most "
            f"{WEBP_SIDE} a side. Get the file again."
        )
    return image


def _refuse_plugin_format(content: bytes, name: str) -> None:
    kinds = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
    found = "HEIF" if content[4:8] == b"ftyp" and content[8:12] in kinds else ""
    if content[:2] == b"\xff\x0a" or content[4:12] == b"JXL \r\n\x87\n":
        found = "JXL"
    if found and not _plugin_here(found):
        package = PLUGINS[found][1]
        raise MissingPackageError(f"{name} is {found}; to read it, run `pip install {package}`.")


_pixel_limit_lock = threading.Lock()


@contextmanager
def no_pixel_limit() -> Iterator[None]:
    """Lift Pillow's own limit while a file is opened; it is lower than ours, and an error without a remedy."""
    from PIL import Image

    with _pixel_limit_lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
