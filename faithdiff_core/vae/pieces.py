"""Pieces of a feature map with their surroundings, and the crops that stand for a whole one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import NotFiniteError
from .decoder_stages import Attention, Resnet, Stage, Upsample
from .statistics import Moments


@dataclass(frozen=True)
class Interval:
    """The stretch of one side of an image that a piece holds, at the resolution of its features.

    Attributes:
        start, stop: the stretch.
        length: the image's side.
        core_start, core_stop: the part of the stretch that counts; the rest is surroundings.
    """

    start: int
    stop: int
    length: int
    core_start: int
    core_stop: int

    @classmethod
    def around(cls, core: tuple[int, int], length: int, halo: int) -> Interval:
        start, stop = core
        return cls(max(0, start - halo), min(length, stop + halo), length, start, stop)

    @property
    def extent(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def core(self) -> slice:
        """The core within the piece."""
        return slice(self.core_start - self.start, self.core_stop - self.start)

    def narrowed(self) -> Interval:
        """After a 3x3 convolution: what it computed from missing neighbours is gone; at the border nothing is."""
        return replace(self, start=self.start + (self.start > 0), stop=self.stop - (self.stop < self.length))

    def within(self, other: Interval) -> slice:
        """This stretch as a slice of `other`."""
        return slice(self.start - other.start, self.stop - other.start)

    def doubled(self) -> Interval:
        return Interval(*(2 * n for n in (self.start, self.stop, self.length, self.core_start, self.core_stop)))


@dataclass(frozen=True)
class Piece:
    """Features (B, C, rows, columns) and where they lie."""

    x: Tensor
    rows: Interval
    columns: Interval

    @property
    def core(self) -> Tensor:
        return self.x[..., self.rows.core, self.columns.core]

    def conv(self, module: nn.Module, x: Tensor) -> Piece:
        """The piece after a 3x3 convolution of x, which lies where this piece does."""
        rows, columns = self.rows.narrowed(), self.columns.narrowed()
        return Piece(module(x)[..., rows.within(self.rows), columns.within(self.columns)], rows, columns)

    def cropped_to(self, other: Piece) -> Tensor:
        return self.x[..., other.rows.within(self.rows), other.columns.within(self.columns)]

    def upsampled(self, conv: nn.Module) -> Piece:
        x = F.interpolate(self.x, scale_factor=2.0, mode="nearest")
        return replace(self, x=x, rows=self.rows.doubled(), columns=self.columns.doubled()).conv(conv, x)


@dataclass(frozen=True)
class SampledCrops(Piece):
    """Crops from all over an image, (crops, C, rows, columns), that stand for the whole.

    They have no surroundings, so that many small ones fit into little memory. What a convolution computes at their
    border is replaced by what it computed beside it.
    """

    def conv(self, module: nn.Module, x: Tensor) -> SampledCrops:
        x = module(x)
        top, left = (1 if side > 2 else 0 for side in x.shape[-2:])
        inner = x[..., top : x.shape[-2] - top, left : x.shape[-1] - left]
        return replace(self, x=F.pad(inner, (left, left, top, top), mode="replicate"))


Statistics = Callable[[nn.Module, Piece], Moments]
"""Says with which moments a norm is to normalise a piece."""


def halo_of(stages: Sequence[Stage]) -> int:
    """Surroundings that exactness needs in front of `stages`, in features."""
    halo = 0
    for stage in reversed(stages):
        if isinstance(stage, Upsample):
            halo = (halo + 2) // 2
        elif isinstance(stage, Resnet):
            halo += 2
        else:
            halo += 1
    return halo


def activations_of(stage: Stage) -> int:
    """Feature values per input feature position that are held while a stage runs on the whole image."""
    if isinstance(stage, Resnet):
        inputs, outputs = _channels(stage.conv1)
        return inputs + outputs * (1 if stage.shortcut is None else 2)
    if isinstance(stage, Upsample):
        inputs, outputs = _channels(stage.conv)
        return inputs + 4 * outputs
    if isinstance(stage, Attention):
        return 3 * stage.norm.num_channels  # type: ignore[return-value, operator]
    return sum(_channels(stage.conv))


def _channels(conv: Any) -> tuple[int, int]:
    return conv.in_channels, conv.out_channels


def split_into_cores(length: int, core: int) -> list[tuple[int, int]]:
    """Cut a side into parts of nearly one size, none longer than `core`."""
    count = -(-length // core)
    return [(i * length // count, (i + 1) * length // count) for i in range(count)]


def _finite(x: Tensor) -> bool:
    """Whether all of x is finite, without a copy of it: NaN passes through minimum and maximum."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def not_finite(dtype: torch.dtype) -> NotFiniteError:
    name = str(dtype).removeprefix("torch.")
    return NotFiniteError(
        f"The VAE's result is not finite (NaN or infinite) in {name}. Run the VAE in bfloat16 or float32, "
        f"or use a VAE that was made for float16 (sdxl-vae-fp16-fix)."
    )
