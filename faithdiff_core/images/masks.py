"""Masks in files: which one belongs to an image, and reading them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..errors import ImageError, SettingsError
from .formats import list_folder, named_files
from .reading import load_image

SHAPE_TOLERANCE = 0.02
"""How far a mask's width to height may be from the image's, as a part of it: rounding of a smaller mask's sides."""


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
        if len(images) > 1:
            raise SettingsError(
                f"{masks} is one mask, but there are {len(images)} images. Give a folder with a mask for each, named "
                f"like the image."
            )
        if not os.path.exists(masks):
            raise SettingsError(f"There is no mask {masks}.")
        return dict.fromkeys(images, masks)
    found = {Path(name).parts: file for name, file in named_files(masks, list_folder(masks).files).items()}
    longest = max((len(parts) for parts in found), default=0)
    chosen: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for image in images:
        parts = image.absolute().with_suffix("").parts
        mask = next((found[parts[-n:]] for n in range(longest, 0, -1) if parts[-n:] in found), None)
        if mask is None:
            raise SettingsError(f"There is no mask for {image} in {masks}: no image by the name {image.stem}.")
        if mask in taken:
            raise SettingsError(
                f"{mask} would be the mask of both {taken[mask]} and {image}. Put the masks into folders named like "
                f"those of the images."
            )
        chosen[image], taken[mask] = mask, image
    return chosen


def load_mask(path: Path, image: str, height: int, width: int) -> Tensor:
    """A mask from a file.

    Args:
        path: an image; white is 1, black and what is transparent 0.
        image: name of the image that it belongs to, for messages.
        height, width: of that image.

    Returns:
        (1, h, w), in [0, 1], of the file's size.

    Raises:
        ImageError: it cannot be read, or has another shape than the image.
    """
    loaded = load_image(path)
    mask = loaded.colors.mean(dim=0, keepdim=True)
    if loaded.alpha is not None:
        mask = mask * loaded.alpha
    rows, columns = mask.shape[-2:]
    if abs(rows * width - columns * height) > SHAPE_TOLERANCE * rows * width:
        raise ImageError(
            f"The mask {path.name} is {columns} x {rows}, and {image} is {width} x {height}: another shape. Draw the "
            f"mask on the image itself, or on one that is scaled alike in both directions."
        )
    return mask
