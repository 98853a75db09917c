"""Masks in files: which one belongs to an image, and reading them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, TypeVar

from ..errors import ImageError, SettingsError
from .formats import named_files, read_content
from .listing import list_folder
from .sizes import same_shape

if TYPE_CHECKING:
    from torch import Tensor

Found = TypeVar("Found")


def find_masks(images: Sequence[Path], masks: Path) -> dict[Path, Path]:
    """The mask of each image.

    Args:
        images: files.
        masks: a file, for a single image, or a folder with a mask of the same name (whatever its ending) for each. In
            subfolders, masks belong to images in folders of the same names.

    Raises:
        SettingsError: an image has no mask, or one would serve several images.
        ImageError: two masks have the same name.
    """
    if not masks.is_dir():
        check_one_mask(str(masks), len(images), os.path.exists(masks))
        return dict.fromkeys(images, masks)
    found = {Path(name).parts: file for name, file in named_files(masks, list_folder(masks).files).items()}
    longest = max((len(key) for key in found), default=0)
    chosen: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for image in images:
        mask = match_mask(image.absolute(), found.get, longest)
        if mask is None:
            raise no_mask(str(image), str(masks))
        if mask in taken:
            raise mask_taken_twice(str(mask), str(taken[mask]), str(image))
        chosen[image], taken[mask] = mask, image
    return chosen


def mask_key(name: PurePath) -> tuple[str, ...]:
    """By what a mask is found: the parts of its name in the folder of masks, without the ending."""
    return name.with_suffix("").parts


def match_mask(image: PurePath, find: Callable[[tuple[str, ...]], Found | None], longest: int) -> Found | None:
    """The mask of an image: the one with which it shares the most folders' names.

    Args:
        image: its whole path.
        find: gives the mask of a `mask_key`, or None.
        longest: most parts of a mask's key.
    """
    parts = mask_key(image)
    lengths = range(min(longest, len(parts)), 0, -1)
    return next((mask for length in lengths if (mask := find(parts[-length:])) is not None), None)


def check_one_mask(masks: str, images: int, exists: bool) -> None:
    """Refuse a mask that is no folder for several images, or is not there.

    Raises:
        SettingsError: it is so.
    """
    if images > 1:
        raise SettingsError(
            f"{masks} is one mask, but there are {images} images. Give a folder with a mask for each, named like the "
            f"image."
        )
    if not exists:
        raise SettingsError(f"There is no mask {masks}.")


def no_mask(image: str, masks: str) -> SettingsError:
    """The error for an image that has none."""
    return SettingsError(f"There is no mask for {image} in {masks}: no image by the name {PurePath(image).stem}.")


def mask_taken_twice(mask: str, first: str, second: str) -> SettingsError:
    """The error for a mask that two images would share."""
    return SettingsError(
        f"{mask} would be the mask of both {first} and {second}. Put the masks into folders named like those of the "
        f"images."
    )


def load_mask(path: Path, image: str, height: int, width: int) -> Tensor:
    """A mask from a file; see `decode_mask`."""
    return decode_mask(read_content(path), path.name, image, height, width)


def decode_mask(content: bytes, name: str, image: str, height: int, width: int) -> Tensor:
    """A mask from a file's bytes.

    Args:
        content: of an image; white is 1, black and what is transparent 0.
        name: what to call it in messages.
        image: name of the image that it belongs to, for messages.
        height, width: of that image.

    Returns:
        (1, h, w), in [0, 1], of the file's size.

    Raises:
        ImageError: it cannot be read, or has another shape than the image.
    """
    from .reading import decode_image

    loaded = decode_image(content, name)
    mask = loaded.colors.mean(dim=0, keepdim=True)
    if loaded.alpha is not None:
        mask = mask * loaded.alpha
    rows, columns = mask.shape[-2:]
    if not same_shape(rows, columns, height, width):
        raise ImageError(
            f"The mask {name} is {columns} x {rows}, and {image} is {width} x {height}: another shape. Draw the mask "
            f"on the image itself, or on one that is scaled alike in both directions."
        )
    return mask
