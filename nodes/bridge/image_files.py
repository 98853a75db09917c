"""Image files in ComfyUI's folders: read with all that they say about themselves, and written with it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import folder_paths
import torch
from comfy.cli_args import args
from torch import Tensor

from ...faithdiff_core.errors import ImageError, SettingsError
from ...faithdiff_core.images.formats import read_content, read_suffixes
from ...faithdiff_core.images.geometry import resize_lanczos
from .checks import check_image
from .graph_types import ImageSource
from .step_progress import show_text

# Readers and writers take long to import, so that happens where an image is read or written.
if TYPE_CHECKING:
    from ...faithdiff_core.images.reading import LoadedImage

FORMATS = ("png", "jpg", "webp", "tif")
"""What is written, as endings."""

BITS = ("source", "8", "16")

EXISTING = ("skip", "overwrite")
"""What to do where a result of a folder is there already."""

SOURCE_NAME = "%name%"
"""Stands for the source's name in a file name."""

_MAX_FOLDERS, _MAX_DEPTH = 2000, 5
"""Limits of what the list of folders shows; it is made for every page that is opened."""


def input_images() -> list[str]:
    """Images in ComfyUI's input folder, in all formats that are read."""
    folder = Path(folder_paths.get_input_directory())
    if not folder.is_dir():
        return []
    names = (entry.name for entry in os.scandir(folder) if entry.is_file())
    return sorted(name for name in names if name.lower().endswith(read_suffixes()))


def input_folders() -> list[str]:
    """Folders below ComfyUI's input folder, with those below them; links are followed, a few levels deep."""
    root = Path(folder_paths.get_input_directory())
    found: list[str] = []

    def look(folder: Path, depth: int) -> None:
        try:
            inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        except OSError:
            return
        for name in inner:
            if not name.startswith(".") and len(found) < _MAX_FOLDERS:
                found.append((folder / name).relative_to(root).as_posix())
                if depth < _MAX_DEPTH:
                    look(folder / name, depth + 1)

    look(root, 1)
    return found


def below(root: str, name: str, what: str) -> Path:
    """The path of a file or folder below one of ComfyUI's folders.

    Raises:
        SettingsError: the name leads out of it.
    """
    path = Path(os.path.abspath(os.path.join(root, name)))
    if os.path.isabs(name) or not path.is_relative_to(os.path.abspath(root)):
        raise SettingsError(f"{what} must lie in ComfyUI's folder {root}, got {name}.")
    return path


def input_folder(name: str) -> Path:
    """The path of a folder that `input_folders` listed.

    Raises:
        SettingsError: there is none.
    """
    path = below(folder_paths.get_input_directory(), name, "folder")
    if not path.is_dir():
        raise SettingsError(
            f"there is no folder {name} in ComfyUI's input folder. Make {path}, put the images into it, and refresh "
            f"the page (press R)."
        )
    return path


def image_path(name: str) -> Path:
    """The file that a widget names, as Load Image understands it.

    Raises:
        ImageError: there is none.
    """
    if not folder_paths.exists_annotated_filepath(name):
        raise ImageError(f"there is no image {name} in ComfyUI's input folder. Choose or upload one.")
    return Path(folder_paths.get_annotated_filepath(name))


def fingerprint(name: str) -> str:
    """Changes with a file's content."""
    return hashlib.sha256(image_path(name).read_bytes()).hexdigest()


def load(name: str) -> tuple[Tensor, Tensor, ImageSource]:
    """Read an image.

    Args:
        name: as `image_path` takes it.

    Returns:
        IMAGE (1, H, W, 3), float32 whatever ComfyUI's intermediate precision is; MASK of transparency, (1, H, W), or
        64 x 64 zeros without any, as Load Image gives it; and the source.

    Raises:
        FaithDiffError: it cannot be read.
    """
    from ...faithdiff_core.images.reading import decode_image

    path = image_path(name)
    image = decode_image(read_content(path), path.name)
    device = comfy.model_management.intermediate_device()
    mask = torch.zeros(1, 64, 64) if image.alpha is None else 1.0 - image.alpha
    if image.notes:
        logging.warning("FaithDiff: %s: %s", path.name, "; ".join(image.notes))
        show_text("; ".join(image.notes))
    pixels = image.colors.movedim(0, -1).unsqueeze(0).contiguous()
    return pixels.to(device), mask.to(device), source_of(image, path.stem)


def source_of(image: LoadedImage, name: str) -> ImageSource:
    """What a result takes over from an image that was read."""
    return ImageSource(name, image.grey, image.bits, image.alpha is not None, image.icc, image.metadata)


def graph_entries(hidden: Any) -> dict[str, str]:
    """The workflow, as ComfyUI's own nodes put it into images; nothing where --disable-metadata forbids it.

    Args:
        hidden: a node's hidden inputs `prompt` and `extra_pnginfo`.
    """
    if args.disable_metadata or hidden is None:
        return {}
    entries = {} if hidden.prompt is None else {"prompt": json.dumps(hidden.prompt)}
    return entries | {key: json.dumps(value) for key, value in (hidden.extra_pnginfo or {}).items()}


def bits_of(choice: str, source: ImageSource, suffix: str) -> int:
    """Bits per channel of a file.

    Raises:
        SettingsError: 16 for a format that has 8.
    """
    from ...faithdiff_core.images.writing import DEEP_SUFFIXES

    deep = suffix in DEEP_SUFFIXES
    if choice == "16" and not deep:
        raise SettingsError(f"{suffix[1:]} has 8 bits per channel. Choose png or tif for 16, or bits `source` or 8.")
    return 16 if choice == "16" or (choice == "source" and source.bits == 16 and deep) else 8


def save(
    images: Tensor,
    source: ImageSource,
    mask: Tensor | None,
    *,
    prefix: str,
    suffix: str,
    bits: str,
    quality: int,
    entries: Mapping[str, str],
) -> tuple[list[dict[str, str]], list[str]]:
    """Write IMAGEs into ComfyUI's output folder, numbered as Save Image numbers them.

    Args:
        images: (B, H, W, 1 to 4) in [0, 1].
        source: name, mode, profile and metadata.
        mask: transparency, (B or 1, h, w); zeros stand for none.
        prefix: of the names; `%name%` is the source's.
        suffix: ending, one of `WRITE_SUFFIXES`.
        bits: one of `BITS`.
        quality: of JPEG and WebP, 1 to 100.
        entries: texts for the files, see `graph_entries`.

    Returns:
        The files as the page expects them, and notes.

    Raises:
        FaithDiffError: the format cannot hold the image, or the mask does not belong to it.
    """
    from ...faithdiff_core.images.formats import WRITE_SUFFIXES
    from ...faithdiff_core.images.reading import LoadedImage
    from ...faithdiff_core.images.writing import save_image

    assert suffix in WRITE_SUFFIXES
    images = check_image(images, "images")
    if SOURCE_NAME in prefix and not source.name:
        raise SettingsError(f"{SOURCE_NAME} in filename_prefix is the name of the source. Connect source.")
    depth = bits_of(bits, source, suffix)
    alpha = _opacity(images, mask, source)
    height, width = images.shape[1:3]
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix.replace(SOURCE_NAME, source.name), folder_paths.get_output_directory(), width, height
    )
    results: list[dict[str, str]] = []
    notes: dict[str, None] = {}
    for index, image in enumerate(images):
        file = f"{name.replace('%batch_num%', str(index))}_{counter + index:05}_{suffix}"
        loaded = LoadedImage(
            image[..., :3].movedim(-1, 0).float(),
            None if alpha is None else alpha[index],
            source.grey,
            depth,
            source.icc,
            metadata=source.metadata,
        )
        notes |= dict.fromkeys(save_image(Path(folder) / file, loaded, entries=entries, quality=quality))
        results.append({"filename": file, "subfolder": subfolder, "type": "output"})
    return results, list(notes)


def _opacity(images: Tensor, mask: Tensor | None, source: ImageSource) -> Tensor | None:
    """(B, 1, H, W), or None where nothing is transparent and the source has no alpha channel either."""
    if mask is None:
        return images[..., 3:].movedim(-1, 1).float() if images.shape[-1] == 4 else None
    mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
    if not source.transparent and not torch.count_nonzero(mask):
        return None
    if mask.shape[0] not in (1, images.shape[0]):
        raise ImageError(
            f"there are {mask.shape[0]} masks for {images.shape[0]} images; give one for each, or one for all."
        )
    alpha = 1.0 - resize_lanczos(mask.unsqueeze(1).float(), *images.shape[1:3])
    return alpha.expand(images.shape[0], -1, -1, -1)
