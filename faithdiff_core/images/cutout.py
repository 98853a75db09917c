"""Images with transparency: what lies under alpha 0 counts nowhere, neither in resizing nor in the model or colours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import lanczos, resize_lanczos

_LEAST_ALPHA = 0.02
"""Below this opacity, colours come from the neighbourhood: a quotient of two small numbers says nothing."""


def has_transparency(alpha: Tensor | None) -> bool:
    """Whether something is transparent, and not all of it: else there is nothing to keep apart."""
    return alpha is not None and bool((alpha < 1).any()) and bool((alpha > 0).any())


def bleed(colors: Tensor, alpha: Tensor) -> Tensor:
    """Continue visible colours where an image is fully transparent.

    Averages over ever larger squares, weighted with alpha, fill in what has no colour of its own.

    Args:
        colors: (B, C, H, W), floating point.
        alpha: opacity in [0, 1], (B, 1, H, W).

    Returns:
        (B, C, H, W), the same where alpha is above 0.
    """
    levels = [(colors * alpha, alpha)]
    while max(levels[-1][0].shape[-2:]) > 1:
        levels.append(
            tuple(F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in levels[-1])  # type: ignore[arg-type]
        )
    premultiplied, weight = levels[-1]
    filled = premultiplied / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    for premultiplied, weight in reversed(levels[:-1]):
        below = F.interpolate(filled, size=premultiplied.shape[-2:], mode="bilinear", align_corners=False)
        own = premultiplied / weight.clamp_min(torch.finfo(weight.dtype).tiny)
        filled = torch.where(weight > 0, own, below)
    return torch.where(alpha > 0, colors, filled)


def resize_cutout(colors: Tensor, alpha: Tensor | None, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    """Resize an image with transparency: colours weighted with alpha (premultiplied), then divided by it again.

    Args:
        colors: in [0, 1], (B, 3, H, W), floating point.
        alpha: opacity in [0, 1], (B, 1, H, W), or None.
        height, width: the new size in pixels.

    Returns:
        Colours (B, 3, height, width), which go on under what is transparent, and alpha (B, 1, height, width) or None.
        Where nothing or everything is transparent, the colours are those of `resize_lanczos`.
    """
    resized = None if alpha is None else resize_lanczos(alpha, height, width)
    if alpha is None or not has_transparency(alpha):
        return resize_lanczos(colors, height, width), resized
    alpha = alpha.to(colors)
    bled = bleed(colors.clamp(0, 1), alpha)
    # Not clamped: Lanczos overshoots by one factor in both, and the quotient is free of it.
    premultiplied, opacity = lanczos(bled * alpha, height, width), lanczos(alpha, height, width)
    straight = premultiplied / opacity.clamp_min(_LEAST_ALPHA)
    return torch.where(opacity > _LEAST_ALPHA, straight, lanczos(bled, height, width)).clamp(0, 1), resized
