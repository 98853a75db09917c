"""JPEG as the published training process computes it: a transform of the image, without a bit stream.

The steps are those of the standard (ITU-T T.81): YCbCr, chroma averaged over 2 x 2 pixels, DCT of 8 x 8 blocks,
division by the quality's tables and rounding, and back. Two things differ from an encoder and decoder: chroma samples
are repeated and not interpolated when the image is enlarged again, and values are not rounded to 8 bits before or
after. The quality may be a fraction.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
"""Quantisation of luminance at quality 50 (T.81, table K.1)."""

CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)
"""Quantisation of chrominance at quality 50 (T.81, table K.2)."""

FINEST = 1e-3
"""Smallest factor on the tables: at quality 100 the formula gives 0, which nothing can be divided by."""

_TO_YCBCR = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=torch.float32
)


def jpeg_transform(image: Tensor, quality: float) -> Tensor:
    """Compress and restore an image.

    Args:
        image: RGB in [0, 1], (3, H, W).
        quality: 1 to 100.

    Returns:
        The same shape, in [0, 1], not rounded to 8 bits.
    """
    factor = max(FINEST, (50 / quality) if quality < 50 else (2 - quality / 50))
    height, width = image.shape[-2:]
    # Whole blocks of the halved chroma; the border is repeated, as encoders do.
    padded = F.pad(image[None], (0, -width % 16, 0, -height % 16), mode="replicate")[0] * 255
    planes = torch.tensordot(_TO_YCBCR.to(image), padded, dims=1)
    luma = _blocks(planes[:1] - 128, _table(LUMINANCE, factor, image)) + 128
    halved = F.avg_pool2d(planes[None, 1:], 2)[0]
    chroma = _blocks(halved, _table(CHROMINANCE, factor, image))
    chroma = chroma.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    rgb = torch.tensordot(torch.linalg.inv(_TO_YCBCR).to(image), torch.cat([luma, chroma]), dims=1)
    return (rgb[:, :height, :width] / 255).clamp(0, 1)


def _table(values: tuple[tuple[int, ...], ...], factor: float, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device) * factor


def _blocks(planes: Tensor, table: Tensor) -> Tensor:
    """Transform 8 x 8 blocks, quantise, and transform back; (C, H, W), H and W multiples of 8."""
    basis = _dct_basis(planes)
    channels, height, width = planes.shape
    cut = planes.view(channels, height // 8, 8, width // 8, 8).transpose(2, 3)
    coefficients = basis @ cut @ basis.T
    quantised = (coefficients / table).round() * table
    restored: Tensor = (basis.T @ quantised @ basis).transpose(2, 3).reshape(channels, height, width)
    return restored


def _dct_basis(like: Tensor) -> Tensor:
    """The orthonormal DCT-II of 8 values, (frequency, place)."""
    rows = [
        [math.sqrt((1 if u == 0 else 2) / 8) * math.cos((2 * x + 1) * u * math.pi / 16) for x in range(8)]
        for u in range(8)
    ]
    return torch.tensor(rows, dtype=like.dtype, device=like.device)
