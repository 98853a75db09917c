"""The ends of a graph: enlarged images on their way in, finished ones on their way out."""

from __future__ import annotations

import torch
from torch import Tensor

from ...faithdiff_core.errors import ImageError
from ...faithdiff_core.images.cutout import resize_cutout
from ...faithdiff_core.images.geometry import pad_to_multiple, resize_lanczos
from ...faithdiff_core.images.hdr import hdr_effect
from ...faithdiff_core.images.region import feathered, fix_and_composite
from ...faithdiff_core.images.sizes import target_size
from .checks import check_image, mask_of_images
from .graph_types import LQFrame


def prepare(
    image: Tensor, scale_by: float, longest_side: int, multiple: int, mask: Tensor | None, hdr: float = 0.0
) -> tuple[Tensor, LQFrame]:
    """Enlarge and pad IMAGEs.

    Args:
        image: (B, H, W, 3 or 4) in [0, 1].
        scale_by: factor on both sides.
        longest_side: pixels of the longer side instead of the factor; 0 is off.
        multiple: of pixels that the padded sides are, itself a multiple of 8.
        mask: transparency, (B or 1, h, w); an alpha channel takes its place where it is None.
        hdr: amount of the published HDR effect, 0 to 2; the frame keeps the colours without it.

    Returns:
        The padded IMAGE, and what the end of the graph needs to know.

    Raises:
        ImageError: `multiple` is none of 8, or the images or masks are none, empty, not finite or differ in number.
    """
    if multiple % 8:
        nearest = max(8, round(multiple / 8) * 8)
        raise ImageError(f"multiple must be a multiple of 8, got {multiple}. The nearest is {nearest}.")
    image = check_image(image, "image")
    height, width = target_size(image.shape[1], image.shape[2], scale=scale_by, longest_side=longest_side or None)
    alpha: Tensor | None = None
    if mask is not None:
        mask = _checked_mask(mask, image)
        # A mask of another size (Load Image gives 64 x 64 zeros without one) is taken as an image of the transparency.
        alpha = 1.0 - resize_lanczos(mask.unsqueeze(1), *image.shape[1:3]).to(image)
        alpha = alpha.expand(image.shape[0], -1, -1, -1)
    elif image.shape[-1] == 4:
        alpha = _channels_first(image[..., 3:])
    colors, opacity = resize_cutout(_channels_first(image[..., :3]), alpha, height, width)
    if mask is not None:
        mask = resize_lanczos(mask.unsqueeze(1), height, width)[:, 0]
    elif opacity is not None:
        mask = 1.0 - opacity[:, 0]
    padded = hdr_effect(pad_to_multiple(colors, multiple), hdr)
    return _channels_last(padded), LQFrame(_channels_last(colors), mask)


def finish(
    image: Tensor, frame: LQFrame, color_fix: str, restore_mask: Tensor | None = None, feather: int = 0
) -> tuple[Tensor, Tensor]:
    """Crop restored IMAGEs and correct their colours.

    Args:
        image: (B, H, W, 3) in [0, 1], padded.
        frame: from `prepare`.
        color_fix: adain, wavelet or none.
        restore_mask: MASK, 1 where the image was restored; elsewhere the result is the enlarged image. Colours are
            matched within it.
        feather: width of the mask's soft edge in pixels.

    Returns:
        IMAGE of the frame's size, and MASK.

    Raises:
        ImageError: image and frame do not belong together.
    """
    image = check_image(image, "image")
    height, width = frame.size
    if image.shape[1] < height or image.shape[2] < width:
        raise ImageError(
            f"the image is {image.shape[2]} x {image.shape[1]}, smaller than the {width} x {height} of the "
            "frame. Connect the frame of the same FaithDiff Prepare Image that this image came through."
        )
    if frame.image.shape[0] not in (1, image.shape[0]):
        raise ImageError(
            f"there are {image.shape[0]} images, but the frame is of {frame.image.shape[0]}. Connect the "
            "frame that belongs to this batch."
        )
    cropped = _channels_first(image[:, :height, :width, :3])
    alpha = None if frame.mask is None else 1.0 - frame.mask.unsqueeze(1)
    original = _channels_first(frame.image)
    region = None
    if restore_mask is not None:
        # The mask is one of the padded image, whether it was drawn on that or on a smaller one.
        region = feathered(mask_of_images(restore_mask, image), feather)[..., :height, :width]
    fixed = fix_and_composite(cropped, original, color_fix, alpha, region)
    mask = frame.mask if frame.mask is not None else torch.zeros(1, height, width)
    return _channels_last(fixed), mask.expand(image.shape[0], -1, -1).clone()


def _checked_mask(mask: Tensor, image: Tensor) -> Tensor:
    """A MASK as (B or 1, h, w)."""
    mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
    if mask.ndim != 3 or not mask.numel():
        raise ImageError(f"mask must be a MASK of shape (batch, height, width), got {tuple(mask.shape)}.")
    if mask.shape[0] not in (1, image.shape[0]):
        raise ImageError(
            f"there are {mask.shape[0]} masks for {image.shape[0]} images; give one for each, or one for all."
        )
    return mask.float()


def _channels_first(image: Tensor) -> Tensor:
    return image.movedim(-1, 1)


def _channels_last(image: Tensor) -> Tensor:
    return image.movedim(1, -1).contiguous()
