"""Resizing, padding and cropping of images as tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone import VAE_SCALE_FACTOR
from ..errors import SettingsError


def resize_lanczos(images: Tensor, height: int, width: int) -> Tensor:
    """Resize with Pillow's Lanczos filter, in floating point: nothing is rounded to 8 bits on the way.

    Args:
        images: values in [0, 1], (B, C, H, W), floating point, on any device.
        height, width: the new size in pixels.

    Returns:
        Values in [0, 1], (B, C, height, width), of the same dtype and device. Lanczos overshoots at edges; what leaves
        the range is clamped.

    Raises:
        SettingsError: the tensor has another layout, or the size is empty.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise SettingsError(
            f"resize_lanczos: expected floating-point images of shape (batch, channels, height, width), got "
            f"{tuple(images.shape)} of {images.dtype}."
        )
    if height < 1 or width < 1:
        raise SettingsError(f"resize_lanczos: an image of {width} x {height} pixels cannot be made.")
    return lanczos(images, height, width).clamp(0.0, 1.0)


def lanczos(images: Tensor, height: int, width: int) -> Tensor:
    """`resize_lanczos` without its checks and its clamp, so that it stays linear in `images`."""
    import numpy as np
    from PIL import Image

    if tuple(images.shape[-2:]) == (height, width):
        return images
    planes = images.detach().to(device="cpu", dtype=torch.float32).flatten(0, 1).contiguous().numpy()
    out = np.empty((len(planes), height, width), dtype=np.float32)
    for plane, target in zip(planes, out, strict=True):
        target[:] = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS))
    resized = torch.from_numpy(out).unflatten(0, images.shape[:2])
    return resized.to(device=images.device, dtype=images.dtype)


def pad_to_multiple(images: Tensor, multiple: int = VAE_SCALE_FACTOR) -> Tensor:
    """Repeat the last column and row of (B, C, H, W) until both sides are multiples of `multiple`.

    The image stays at the top left: `crop_to` with the old size gives it back exactly.
    """
    if multiple < 1:
        raise SettingsError(f"Sides cannot be multiples of {multiple}; the smallest is 1.")
    height, width = images.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def crop_to(images: Tensor, height: int, width: int) -> Tensor:
    """The top left (..., height, width) of a padded image, as a view."""
    return images[..., :height, :width]
