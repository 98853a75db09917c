"""The HDR effect of the published demo: dark and bright parts of an image get contrast before it is restored.

The image is exposed nine times, darker and brighter, and the exposures are fused (Mertens, Kautz, Van Reeth 2007) with
weights for contrast and saturation, as OpenCV does by default.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SettingsError

MAX_HDR = 2.0
"""End of the published demo's slider."""

_EXPOSURES = (-0.9, -0.7, -0.45, -0.25, 0.0, 0.2, 0.4, 0.6, 0.8)
"""An exposure is the image times 1 + amount * this."""

_GREY = (0.114, 0.587, 0.299)
"""Weights of red, green and blue for the contrast. The published code hands over BGR where RGB is expected, so red and
blue have changed places."""

_EPSILON = 1e-12


def hdr_effect(images: Tensor, amount: float) -> Tensor:
    """Apply the effect.

    Args:
        images: RGB in [0, 1], (B, 3, H, W).
        amount: 0 (off) to 2.

    Returns:
        (B, 3, H, W) in [0, 1]; the images themselves at 0.

    Raises:
        SettingsError: the amount is out of range.
    """
    if not 0 <= amount <= MAX_HDR:
        raise SettingsError(f"hdr must lie between 0 and {MAX_HDR:g}, got {amount}.")
    if amount == 0:
        return images
    exposures = [1.0 + amount * exposure for exposure in _EXPOSURES]
    total = sum(_weights(_exposed(images, factor)) for factor in exposures)
    assert isinstance(total, Tensor)
    levels = min(images.shape[-2:]).bit_length() - 1
    fused: list[Tensor] = []
    for factor in exposures:
        image = _exposed(images, factor)
        weight = _weights(image) / total
        for level in range(levels + 1):
            smaller = None if level == levels else _down(image)
            detail = image if smaller is None else image - _up(smaller, image.shape[-2], image.shape[-1])
            if len(fused) <= level:
                fused.append(detail * weight)
            else:
                fused[level] += detail * weight
            if smaller is not None:
                image, weight = smaller, _down(weight)
    result = fused.pop()
    while fused:
        finer = fused.pop()
        result = finer + _up(result, finer.shape[-2], finer.shape[-1])
    return result.clamp(0, 1)


def _exposed(images: Tensor, factor: float) -> Tensor:
    # As published: bytes, and where a strong effect turns the factor negative, its absolute value. The contrast of
    # flat places depends on the rounding.
    return (images.mul(255).round() * factor).abs().clamp(max=255).round() / 255


def _weights(images: Tensor) -> Tensor:
    """Contrast (absolute Laplacian) times saturation (spread of the channels), (B, 1, H, W)."""
    grey = (images * images.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)
    laplacian = sum(_shifted(grey, dim, by) for dim in (-2, -1) for by in (-1, 1)) - 4 * grey
    saturation = (images - images.mean(1, keepdim=True)).square().sum(1, keepdim=True).sqrt()
    return laplacian.abs() * saturation + _EPSILON


def _mirrored(index: Tensor, length: int) -> Tensor:
    """Positions beyond the borders mirrored at the border pixels, which are not repeated."""
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * (length - 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def _shifted(x: Tensor, dim: int, by: int) -> Tensor:
    length = x.shape[dim]
    return x.index_select(dim, _mirrored(torch.arange(length, device=x.device) + by, length))


def _down(x: Tensor) -> Tensor:
    """Half the size, rounded up, after the binomial filter 1 4 6 4 1."""
    for dim in (-2, -1):
        length = x.shape[dim]
        centres = torch.arange(0, length, 2, device=x.device)
        taps = [x.index_select(dim, _mirrored(centres + by, length)) for by in (-2, -1, 0, 1, 2)]
        x = (taps[0] + taps[4] + 4 * (taps[1] + taps[3]) + 6 * taps[2]) / 16
    return x


def _up(x: Tensor, height: int, width: int) -> Tensor:
    """Twice the size by the same filter, cut to a height and a width; the far borders repeat their last pixel."""
    for dim, size in ((-2, height), (-1, width)):
        length = x.shape[dim]
        here = torch.arange(length, device=x.device)
        before = x.index_select(dim, _mirrored(here - 1, length))
        after = x.index_select(dim, (here + 1).clamp(max=length - 1))
        pairs = torch.stack([(before + 6 * x + after) / 8, (x + after) / 2], dim=x.ndim if dim == -1 else x.ndim - 1)
        x = pairs.flatten(-2) if dim == -1 else pairs.flatten(-3, -2)
        x = x.narrow(dim, 0, size)
    return x
