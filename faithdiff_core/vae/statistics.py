"""Mean and variance of normalisation groups, measured over pieces and combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each group of a norm's input, (groups,), float32, on the device that computes."""

    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, norm: Any, x: Tensor) -> Moments:
        """Moments over the batch and all pixels of x, (B, C, H, W)."""
        groups = x.unflatten(1, (norm.num_groups, -1))
        if x.dtype == torch.float32:
            var, mean = torch.var_mean(groups, dim=(0, 2, 3, 4), correction=0)
            return cls(mean, var)
        # Half precision rounds the results too. Some groups at a time, so that the copy in full precision stays small.
        pairs = [torch.var_mean(part.float(), dim=(0, 2, 3, 4), correction=0) for part in groups.split(4, dim=1)]
        return cls(torch.cat([mean for _, mean in pairs]), torch.cat([var for var, _ in pairs]))

    @classmethod
    def combine(cls, parts: Sequence[tuple[int, Moments]]) -> Moments:
        """Moments of a union from (number of pixels, moments) of its parts, summed in double precision."""
        device = parts[0][1].mean.device
        weight = torch.tensor([count for count, _ in parts], dtype=torch.float64)[:, None]
        weight = weight / weight.sum()
        means = torch.stack([part.mean for _, part in parts]).cpu().double()
        variances = torch.stack([part.var for _, part in parts]).cpu().double()
        mean = (weight * means).sum(0)
        var = (weight * (variances + (means - mean) ** 2)).sum(0)
        return cls(mean.float().to(device), var.float().to(device))

    def corrected(self, before: Moments, after: Moments, eps: float) -> Moments:
        """These moments changed as a sample's moments changed from `before` to `after`."""
        ratio = (after.var + eps) / (before.var + eps)
        return Moments(self.mean + after.mean - before.mean, self.var * ratio)

    def distance(self, other: Moments, eps: float) -> float:
        """Largest difference of a mean or a standard deviation, in standard deviations of the group."""
        deviation = (self.var + eps).sqrt()
        mean = (self.mean - other.mean).abs() / deviation
        return float(torch.maximum(mean, ((other.var + eps).sqrt() / deviation - 1).abs()).max())


def affine(norm: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight and bias of a GroupNorm, float32, on `device`.

    A host's casting layer keeps its parameters elsewhere or in another form and brings them along when it is called.
    Such a layer is asked: for +1 and -1 in every channel it answers bias + weight and bias - weight.
    """
    if not getattr(norm, "comfy_cast_weights", False):
        return norm.weight.to(device, torch.float32), norm.bias.to(device, torch.float32)
    probe = torch.tensor([1.0, -1.0], device=device).expand(1, norm.num_channels, 2)
    plus, minus = norm(probe)[0].unbind(-1)
    # The probe's variance is 1, to which the norm adds its epsilon.
    return (plus - minus) / 2 * (1 + norm.eps) ** 0.5, (plus + minus) / 2
