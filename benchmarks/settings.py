"""What a run of the benchmarks was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from faithdiff_core.dtypes import dtype_name
from faithdiff_core.tiling.grid import MIN_TILE

SCALE = 8
"""Pixels per latent unit."""

PUBLISHED_SIZE = 1024
"""Pixels per side at which the published figures were taken, and the tile side."""


@dataclass(frozen=True)
class Settings:
    """Settings that all rows share.

    Attributes:
        device: `cpu`, `cuda` or `mps`.
        dtype: what the models compute in.
        sizes: image sides in pixels, multiples of 8.
        steps: sampling steps.
        repeats: how often each side of a comparison is measured, after one warm-up.
        quick: reduced sizes, for a run of a few minutes.
        clock: `wall`, or `cpu` for the CPU time of this process: on a machine that others use too, this is
            what is left of the difference.
        say: takes lines about the progress.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: tuple[int, ...]
    steps: int
    repeats: int
    quick: bool
    clock: str
    say: Callable[[str], None]

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU does all the work."""
        return self.device.type == "cpu"

    @property
    def loop_sizes(self) -> tuple[int, ...]:
        """Sizes for rows that sample: a quick run has time for half a side."""
        return (self.sizes[0] // 2,) if self.quick and self.on_cpu else self.sizes

    @property
    def loop_tile(self) -> int:
        """Tile side for rows that sample in tiles."""
        if not self.on_cpu:
            return PUBLISHED_SIZE
        return MIN_TILE if self.quick else max(MIN_TILE, min(self.sizes) // 2)

    @property
    def close_rounds(self) -> int:
        """Rounds for ratios near 1, which two rounds of a quick run would not tell from chance."""
        return max(self.repeats, 4)

    @property
    def dtype_name(self) -> str:
        """Such as `bf16`."""
        return dtype_name(self.dtype)

    @property
    def vae_dtype(self) -> torch.dtype:
        """What VAE and LQ encoder compute in: their activations overflow fp16."""
        return torch.bfloat16 if self.dtype is torch.float16 else self.dtype
