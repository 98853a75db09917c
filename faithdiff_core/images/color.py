"""Colour correction: giving a restored image the colours of its low-quality original."""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingsError
from .cutout import has_transparency

ADAIN_EPS = 1e-5
"""Added to the variance before its root is taken."""

WAVELET_LEVELS = 5
"""Levels of the wavelet decomposition; the lowest band then holds what is larger than about 64 pixels."""


class ColorFix(str, Enum):
    """How colours are matched to the low-quality image."""

    ADAIN = "adain"
    """Mean and standard deviation of each channel; the published default."""

    WAVELET = "wavelet"
    """Low frequencies from the low-quality image, high ones from the result; follows local colours."""

    NONE = "none"
    """As the model made them."""


def adain(content: Tensor, style: Tensor, weight: Tensor | None = None) -> Tensor:
    """Match each channel's mean and standard deviation.

    Args:
        content: the restored images, (B, C, H, W), any range.
        style: the low-quality images, (B or 1, C, H', W').
        weight: how much each pixel counts, such as its opacity, (B or 1, 1, H, W), for images of one size. Defaults to
            all alike.

    Returns:
        (B, C, H, W), not clamped.
    """
    content_mean, content_std = _mean_std(content, weight)
    style_mean, style_std = _mean_std(style, weight)
    return (content - content_mean) * (style_std / content_std) + style_mean


def _mean_std(x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if weight is not None:
        total = weight.sum(dim=(-2, -1), keepdim=True)
        mean = (x * weight).sum(dim=(-2, -1), keepdim=True) / total
        squares = (weight * (x - mean).square()).sum(dim=(-2, -1), keepdim=True)
        variance = squares / torch.where(total > 1, total - 1, total)
        return mean, (variance + ADAIN_EPS).sqrt()
    # One pixel has no unbiased variance: torch would give NaN.
    correction = 1 if x.shape[-2] * x.shape[-1] > 1 else 0
    variance, mean = torch.var_mean(x, dim=(-2, -1), keepdim=True, correction=correction)
    return mean, (variance + ADAIN_EPS).sqrt()


def _blur(x: Tensor, radius: int) -> Tensor:
    """[1 2 1] / 4 along both sides with a distance of `radius` pixels, border replicated; (B, C, H, W)."""
    channels = x.shape[1]
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    for shape, padding, dilation in (
        ((channels, 1, 3, 1), (0, 0, radius, radius), (radius, 1)),
        ((channels, 1, 1, 3), (radius, radius, 0, 0), (1, radius)),
    ):
        weight = kernel.view(1, 1, *shape[2:]).expand(shape)
        x = F.conv2d(F.pad(x, padding, mode="replicate"), weight, groups=channels, dilation=dilation)
    return x


def low_frequencies(x: Tensor, levels: int = WAVELET_LEVELS) -> Tensor:
    """What remains of (B, C, H, W) after blurring with dilations 1, 2, 4, ..."""
    for level in range(levels):
        x = _blur(x, 2**level)
    return x


def wavelet(content: Tensor, style: Tensor, levels: int = WAVELET_LEVELS) -> Tensor:
    """Take the high frequencies of `content` and the low ones of `style`.

    Args:
        content: the restored images, (B, C, H, W), any range.
        style: the low-quality images, (B or 1, C, H, W).

    Returns:
        (B, C, H, W), not clamped.

    Raises:
        SettingsError: the two differ in height or width.
    """
    if content.shape[-2:] != style.shape[-2:]:
        raise SettingsError(
            f"wavelet colour correction: both images must have one size, got {tuple(content.shape[-2:])} and "
            f"{tuple(style.shape[-2:])} (height, width)."
        )
    # The high bands add up to content minus its lowest band.
    return content - low_frequencies(content, levels) + low_frequencies(style, levels)


def fix_colors(
    content: Tensor, style: Tensor, method: ColorFix | str = ColorFix.ADAIN, alpha: Tensor | None = None
) -> Tensor:
    """Correct the colours of restored images, one by one so that memory does not grow with the batch.

    Args:
        content: the restored images, (B, C, H, W), any range and device.
        style: the enlarged low-quality images in the same range, (B or 1, C, H, W).
        method: `adain`, `wavelet` or `none`.
        alpha: opacity in [0, 1], (B or 1, 1, H, W): what is transparent counts for nothing in `adain`. `wavelet` works
            place by place and needs colours that go on under it, as `resize_cutout` makes them.

    Returns:
        (B, C, H, W), not clamped.

    Raises:
        SettingsError: unknown method, or rows or sizes that do not match.
    """
    try:
        method = ColorFix(method)
    except ValueError:
        raise SettingsError(f"color_fix must be one of {[m.value for m in ColorFix]}, got {method!r}.") from None
    if method is ColorFix.NONE:
        return content
    if style.shape[0] not in (1, content.shape[0]) or style.shape[1] != content.shape[1]:
        raise SettingsError(
            f"colour correction: expected low-quality images for {content.shape[0]} result(s) of {content.shape[1]} "
            f"channels, got shape {tuple(style.shape)}."
        )
    out = torch.empty_like(content)
    for i in range(content.shape[0]):
        j = i if style.shape[0] > 1 else 0
        one, low_quality = content[i : i + 1], style[j : j + 1].to(content)
        if method is ColorFix.WAVELET:
            out[i : i + 1] = wavelet(one, low_quality)
        else:
            opacity = None if alpha is None else alpha[i : i + 1] if alpha.shape[0] > 1 else alpha
            seen = opacity.to(content) if opacity is not None and has_transparency(opacity) else None
            out[i : i + 1] = adain(one, low_quality, seen)
    return out
