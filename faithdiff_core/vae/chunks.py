"""Chunks of a feature map with their halos, and the crops that stand for a whole image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from .decoder_stages import Attention, Resnet, Stage, Upsample


@dataclass(frozen=True)
class Interval:
    """A 1D interval of one side of an image, with its core and halo, at the resolution of its features.

    Attributes:
        start, stop: first position, and the one after the last.
        length: the image's side.
        core_start, core_stop: the core, the positions whose results are kept; the rest is halo.
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

    @classmethod
    def whole(cls, length: int) -> Interval:
        return cls(0, length, length, 0, length)

    @property
    def extent(self) -> slice:
        """The interval as a slice of the image's side."""
        return slice(self.start, self.stop)

    @property
    def core(self) -> slice:
        """The core as a slice of the interval."""
        return slice(self.core_start - self.start, self.core_stop - self.start)

    def narrowed(self) -> Interval:
        """After a 3x3 convolution: positions with a missing neighbour are dropped, except at the image's border."""
        return replace(self, start=self.start + (self.start > 0), stop=self.stop - (self.stop < self.length))

    def within(self, other: Interval) -> slice:
        """This interval as a slice of `other`, which contains it."""
        return slice(self.start - other.start, self.stop - other.start)

    def doubled(self) -> Interval:
        """After an upsampling by 2."""
        return Interval(*(2 * n for n in (self.start, self.stop, self.length, self.core_start, self.core_stop)))


SomeChunk = TypeVar("SomeChunk", bound="Chunk")


@dataclass(frozen=True)
class Chunk:
    """A chunk of a feature map, (B, C, height, width), and the intervals of rows and columns that it covers."""

    x: Tensor
    rows: Interval
    columns: Interval

    @property
    def core(self) -> Tensor:
        return self.x[..., self.rows.core, self.columns.core]

    def convolved(self: SomeChunk, conv: nn.Conv2d, x: Tensor) -> SomeChunk:
        """The chunk after a 3x3 convolution of x, which covers the same intervals as this chunk."""
        rows, columns = self.rows.narrowed(), self.columns.narrowed()
        x = conv(x)[..., rows.within(self.rows), columns.within(self.columns)]
        return replace(self, x=x, rows=rows, columns=columns)

    def cropped_to(self, other: Chunk) -> Tensor:
        return self.x[..., other.rows.within(self.rows), other.columns.within(self.columns)]

    def upsampled(self: SomeChunk, conv: nn.Conv2d) -> SomeChunk:
        x = F.interpolate(self.x, scale_factor=2.0, mode="nearest")
        return replace(self, x=x, rows=self.rows.doubled(), columns=self.columns.doubled()).convolved(conv, x)


@dataclass(frozen=True)
class SampledCrops(Chunk):
    """Crops from all over an image, (crops, C, height, width), that stand for the whole.

    They have no halo, so that many small ones fit into little memory. What a convolution computes at their border is
    replaced by the value beside it.
    """

    def convolved(self, conv: nn.Conv2d, x: Tensor) -> SampledCrops:
        x = conv(x)
        top, left = (1 if side > 2 else 0 for side in x.shape[-2:])
        inner = x[..., top : x.shape[-2] - top, left : x.shape[-1] - left]
        return replace(self, x=F.pad(inner, (left, left, top, top), mode="replicate"))


def halo_of(stages: Sequence[Stage]) -> int:
    """Halo that an exact result needs in front of `stages`, in features."""
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
    """Activations held per input position while a stage runs untiled."""
    if isinstance(stage, Resnet):
        return stage.conv1.in_channels + stage.conv1.out_channels * (1 if stage.shortcut is None else 2)
    if isinstance(stage, Upsample):
        return stage.conv.in_channels + 4 * stage.conv.out_channels
    if isinstance(stage, Attention):
        return 3 * stage.norm.num_channels
    return stage.conv.in_channels + stage.conv.out_channels


def split_into_cores(length: int, core: int) -> list[tuple[int, int]]:
    """Cut a side into intervals of nearly equal size, none longer than `core`."""
    count = -(-length // core)
    return [(i * length // count, (i + 1) * length // count) for i in range(count)]
