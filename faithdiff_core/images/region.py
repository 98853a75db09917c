"""The part of an image that is to be restored: a mask, its soft edge, and the two images put together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone import VAE_SCALE_FACTOR
from ..errors import ImageError
from .color import ColorFix, fix_colors

FEATHER = 16
"""Default width of a mask's soft edge in pixels of the result."""


def mask_for(mask: Tensor, height: int, width: int, count: int) -> Tensor:
    """A mask at the size of an image.

    Args:
        mask: 1 where the image is to be restored and 0 where it is to stay, (B or 1, 1, h, w), of any size.
        height, width: of the image in pixels.
        count: number of images.

    Returns:
        (B or 1, 1, height, width), float32, in [0, 1].

    Raises:
        ImageError: another shape, or neither one mask nor one for each image.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or not mask.numel():
        raise ImageError(f"A mask must have the shape (batch, 1, height, width), got {tuple(mask.shape)}.")
    if mask.shape[0] not in (1, count):
        raise ImageError(f"There are {mask.shape[0]} masks for {count} images; give one for each, or one for all.")
    mask = mask.float()
    if mask.shape[-2:] != (height, width):
        mask = F.interpolate(mask, size=(height, width), mode="bilinear", align_corners=False)
    return mask.clamp(0.0, 1.0)


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """A mask with a soft edge outside of it.

    What the mask has stays as it is. Around it the value falls to 0, which it reaches after `pixels` pixels; beyond,
    the mask is exactly 0.

    Args:
        mask: (B, 1, H, W), in [0, 1].
        pixels: width of the edge, 0 or more.
    """
    if pixels < 0:
        raise ImageError(f"The soft edge of a mask must be 0 pixels wide or more, got {pixels}.")
    radius = (pixels + 1) // 2
    if not radius:
        return mask
    side = 2 * radius + 1
    soft = mask
    # A square reaches `radius` pixels, and so does the mean over a square; each side on its own, for speed.
    for kernel, padding in (((side, 1), (radius, 0)), ((1, side), (0, radius))):
        soft = F.max_pool2d(soft, kernel, stride=1, padding=padding)
    for kernel, padding in (((side, 1), (radius, 0)), ((1, side), (0, radius))):
        soft = F.avg_pool2d(soft, kernel, stride=1, padding=padding, count_include_pad=False)
    return torch.maximum(mask, soft.clamp(0.0, 1.0))


def at_latent_size(mask: Tensor) -> Tensor:
    """A mask of an image, (B, 1, H, W), at the size of its latent: the largest value of each latent position."""
    return F.max_pool2d(mask, VAE_SCALE_FACTOR, ceil_mode=True)


def around(mask: Tensor, pixels: int) -> Tensor:
    """Where a mask or its surroundings are.

    Args:
        mask: (B, 1, h, w), of a latent's size.
        pixels: how far the surroundings reach, in pixels of the image.

    Returns:
        (h, w), bool, on the CPU: true where the mask of any image is above 0 within that distance.
    """
    touched = (mask > 0).float().amax(dim=(0, 1), keepdim=True).cpu()
    reach = -(-pixels // VAE_SCALE_FACTOR)
    for kernel, padding in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):
        touched = F.max_pool2d(touched, kernel, stride=1, padding=padding)
    return touched[0, 0] > 0


def composite(image: Tensor, restored: Tensor, mask: Tensor) -> Tensor:
    """The restored image where the mask is 1, the other one where it is 0, and a mixture between.

    Args:
        image, restored: (B, C, H, W), or with the channels last.
        mask: of the same layout with one channel, (B or 1, 1, H, W), in [0, 1].
    """
    # lerp gives exactly one or the other at both ends.
    return torch.lerp(image, restored, mask.to(image).expand_as(image))


def fix_and_composite(
    restored: Tensor, image: Tensor, color_fix: ColorFix | str, alpha: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The end of a restoration: colours, and the part that a mask leaves out.

    Args:
        restored: (B, 3, H, W), any range.
        image: the enlarged low-quality images in [0, 1], (B or 1, 3, H, W).
        color_fix: see `fix_colors`. What the mask leaves out counts for nothing in it.
        alpha: opacity, (B or 1, 1, H, W), or None.
        mask: 1 where the result is the restored image, (B or 1, 1, H, W); None for everywhere.

    Returns:
        (B, 3, H, W), in [0, 1]; where the mask is 0, exactly `image`.
    """
    if mask is None:
        return fix_colors(restored, image, color_fix, alpha).clamp(0.0, 1.0)
    mask = mask.to(restored)
    weight = mask if alpha is None else mask * alpha.to(mask)
    fixed = fix_colors(restored, image, color_fix, weight).clamp(0.0, 1.0)
    return composite(image.to(fixed).expand_as(fixed), fixed, mask)
