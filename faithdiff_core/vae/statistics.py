"""Mean and variance of normalization groups: measured over chunks, combined, and shared by all tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .chunks import Chunk, SampledCrops


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each group of a norm's input, (groups,), float32, on the device that computes."""

    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, norm: nn.GroupNorm, x: Tensor) -> Moments:
        """Moments over the batch and all pixels of x, (B, C, H, W)."""
        groups = x.unflatten(1, (norm.num_groups, -1))
        if x.dtype == torch.float32:
            var, mean = torch.var_mean(groups, dim=(0, 2, 3, 4), correction=0)
            return cls(mean, var)
        # In half precision the results would be rounded, too. A few groups at a time keep the float32 copy small.
        pairs = [torch.var_mean(chunk.float(), dim=(0, 2, 3, 4), correction=0) for chunk in groups.split(4, dim=1)]
        return cls(torch.cat([mean for _, mean in pairs]), torch.cat([var for var, _ in pairs]))

    @classmethod
    def combine(cls, chunks: Sequence[tuple[int, Moments]]) -> Moments:
        """Moments of a union from (number of pixels, moments) of its chunks, summed in double precision."""
        device = chunks[0][1].mean.device
        weight = torch.tensor([count for count, _ in chunks], dtype=torch.float64)[:, None]
        weight = weight / weight.sum()
        means = torch.stack([moments.mean for _, moments in chunks]).cpu().double()
        variances = torch.stack([moments.var for _, moments in chunks]).cpu().double()
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


MomentsFor = Callable[[nn.GroupNorm, Chunk], Moments]
"""Gives the moments that a norm normalizes a chunk with."""


class SharedStatistics:
    """The moments of every norm that all tiles of an image share.

    They are the solution of s = F(s), with F(s) the moments that the whole image has when it is decoded with s. The
    first s is that of a sample of small crops, which is its own exact solution. A pass over all tiles measures F(s);
    the correction of s takes F(s) and adds what the sample's moments change by when the norms before it change. That
    is first order in the error of s and needs no pass over the image.

    Args:
        sample: crops of the image at the first stage.
        run: runs the stages on a chunk, with the moments that the second argument gives.
    """

    def __init__(self, sample: SampledCrops, run: Callable[[Chunk, MomentsFor], object]) -> None:
        self._sample = sample
        self._run = run
        self._sampled: dict[nn.GroupNorm, Moments] = {}
        self._measured: dict[nn.GroupNorm, list[tuple[int, Moments]]] = {}
        self._totals: dict[nn.GroupNorm, Moments] = {}
        run(sample, self._measure_sample)
        self._shared = dict(self._sampled)

    def start_pass(self) -> None:
        """Forget what the last pass measured."""
        self._measured = {norm: [] for norm in self._shared}

    def measure(self, norm: nn.GroupNorm, chunk: Chunk) -> Moments:
        """Record the moments of the chunk's core and return the shared ones, which the chunk is normalized with."""
        core = chunk.core
        self._measured[norm].append((core.shape[-2] * core.shape[-1], Moments.of(norm, core)))
        return self._shared[norm]

    def error(self) -> float:
        """Finish a pass: largest difference of shared and measured moments, in standard deviations of a group."""
        self._totals = {norm: Moments.combine(chunks) for norm, chunks in self._measured.items()}
        distances = [self._totals[norm].distance(shared, norm.eps) for norm, shared in self._shared.items()]
        return float(torch.tensor(distances).max())  # Unlike Python's max, NaN wins.

    def correct(self) -> None:
        """Replace the shared moments by those of the finished pass, corrected for the change of the norms before."""
        before = dict(self._sampled)

        def replaced(norm: nn.GroupNorm, chunk: Chunk) -> Moments:
            after = self._measure_sample(norm, chunk)
            self._shared[norm] = self._totals[norm].corrected(before[norm], after, norm.eps)
            return self._shared[norm]

        self._run(self._sample, replaced)

    def _measure_sample(self, norm: nn.GroupNorm, chunk: Chunk) -> Moments:
        self._sampled[norm] = Moments.of(norm, chunk.core)
        return self._sampled[norm]
