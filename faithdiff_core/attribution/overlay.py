"""Maps as people look at them: scaled to their own minimum and maximum, coloured, and laid over the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone import VAE_SCALE_FACTOR
from ..errors import SettingsError

if TYPE_CHECKING:
    from PIL.Image import Image

OPACITY = 0.7
"""Default opacity of the hottest places."""


def image_maps(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps at an image's size, each scaled to its own minimum (0) and maximum (1).

    Args:
        maps: (B, h, w) of the latents, which belong to the image padded to multiples of 8.
        height, width: of the image in pixels.

    Returns:
        (B, height, width); zeros for a map that is the same everywhere.

    Raises:
        SettingsError: the image is of another size than the latents.
    """
    padded = maps.shape[-2] * VAE_SCALE_FACTOR, maps.shape[-1] * VAE_SCALE_FACTOR
    if not all(0 <= whole - side < VAE_SCALE_FACTOR for whole, side in zip(padded, (height, width), strict=True)):
        raise SettingsError(
            f"The attention was recorded for images of {padded[1]} x {padded[0]} pixels (padded to multiples of "
            f"{VAE_SCALE_FACTOR}), but this image has {width} x {height}. Take the image that was restored with it."
        )
    large = F.interpolate(maps[:, None].float(), padded, mode="bicubic", align_corners=False)[:, 0, :height, :width]
    low, high = large.amin((-2, -1), keepdim=True), large.amax((-2, -1), keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (large - low) / spread.clamp(min=torch.finfo(spread.dtype).tiny), 0.0)


def heat_colors(maps: Tensor) -> Tensor:
    """Values in [0, 1], (B, H, W), as colours from blue over green to red, (B, 3, H, W)."""
    centres = torch.tensor([0.75, 0.5, 0.25], device=maps.device)[:, None, None]
    return (1.5 - (4 * (maps[:, None] - centres)).abs()).clamp(0, 1)


def overlay(images: Tensor, maps: Tensor, opacity: float = OPACITY) -> Tensor:
    """Images with maps over them: hot places are coloured, cold ones stay as they are.

    Args:
        images: (B, 3, H, W) in [0, 1].
        maps: from `image_maps`, (B, H, W).
        opacity: of the hottest places, 0 to 1.
    """
    amount = (maps * opacity)[:, None].to(images)
    return images * (1 - amount) + heat_colors(maps).to(images) * amount


def attribution_sheet(image: Tensor, maps: Tensor, words: Sequence[str], side: int = 768) -> Image:
    """The image and its overlays side by side, each under its word.

    Args:
        image: (3, H, W) in [0, 1].
        maps: from `image_maps`, one for each word.
        words: the labels.
        side: longer side of each in pixels, if the image is larger.
    """
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    shown = torch.cat([image[None], overlay(image[None].expand(len(maps), -1, -1, -1), maps)])
    factor = min(1.0, side / max(image.shape[-2:]))
    height, width = (max(1, round(length * factor)) for length in image.shape[-2:])
    font = ImageFont.load_default(18)
    labels = ["restored", *words]
    column = max(width, *(int(font.getlength(label)) + 1 for label in labels)) + 8
    sheet = PILImage.new("RGB", (len(labels) * column - 8, height + 28), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, pixels) in enumerate(zip(labels, shown, strict=True)):
        cell = PILImage.fromarray(pixels.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())
        sheet.paste(cell.resize((width, height), PILImage.Resampling.LANCZOS), (i * column, 28))
        draw.text((i * column, 4), label, fill="black", font=font)
    return sheet
