"""Whether values are finite: the one check for weights, images and results."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN and no infinite value."""
    if not tensor.numel():
        return True
    if tensor.dtype.itemsize > 1:
        low, high = torch.aminmax(tensor)  # both are NaN if one value is; faster than `isfinite`, and no copy
        return math.isfinite(low.item()) and math.isfinite(high.item())
    # torch computes nothing in 8 bits: the largest exponent, with any fraction or with all of it, is not finite.
    limit = 0x7F if tensor.dtype == torch.float8_e4m3fn else 0x7C
    return int((tensor.view(torch.uint8) & 0x7F).amax()) < limit
