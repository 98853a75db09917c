"""The LQ encoder's tiles, which fade into each other linearly as in the published code.

Positions are in latent units unless a name says pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbone import VAE_SCALE_FACTOR
from ..errors import SettingsError
from .grid import check_overlap, tile_stride


@dataclass(frozen=True)
class Span:
    """A stretch of one side that is encoded at once and faded into what precedes it.

    Attributes:
        start, stop: first position and the one after the last.
        fade: number of leading positions that are blended with the preceding span's last ones.
    """

    start: int
    stop: int
    fade: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def of(self, x: Tensor, dim: int) -> Tensor:
        """The span's part of a tensor's dimension, as a view."""
        return x.narrow(dim, self.start, self.size)

    def fade_in(self, values: Tensor, before: Tensor, dim: int) -> None:
        """Blend the first `fade` positions of `values` along `dim` with the preceding span's last ones, in place.

        The weight of `values` rises linearly as p / fade for p = 0 .. fade - 1.
        """
        if self.fade:
            ramp = torch.arange(self.fade, device=values.device, dtype=torch.float32) / self.fade
            ramp = ramp.to(values.dtype).view([-1, *[1] * (-1 - dim)])
            head = values.narrow(dim, 0, self.fade)
            tail = before.narrow(dim, before.shape[dim] - self.fade, self.fade)
            head.copy_(torch.lerp(tail, head, ramp))


def composite(rows: list[Span], columns: list[Span], compute: Callable[[Span, Span], Tensor], out: Tensor) -> None:
    """Compute all tiles of an image row by row and fade each into its neighbours, in place.

    As in the published code, a tile is blended with the tile above it and then with the one to its left, both as they
    were *after* their own blending. (Where four tiles meet, this differs from a product of two ramps.) Only the strips
    that later tiles need are kept: one row of them.

    Args:
        rows, columns: from `composite_spans`.
        compute: gives the tile (..., row.size, column.size) of a row and a column.
        out: (..., height, width), written everywhere.
    """
    above: list[Tensor] = []
    for i, row in enumerate(rows):
        below: list[Tensor] = []
        keep_rows = rows[i + 1].fade if i + 1 < len(rows) else 0
        left: Tensor | None = None
        for j, column in enumerate(columns):
            tile = compute(row, column)
            if above:
                row.fade_in(tile, above[j], dim=-2)
            if left is not None:
                column.fade_in(tile, left, dim=-1)
            out[..., row.start : row.stop, column.start : column.stop] = tile
            below.append(tile[..., tile.shape[-2] - keep_rows :, :].clone())
            keep_columns = columns[j + 1].fade if j + 1 < len(columns) else 0
            left = tile[..., tile.shape[-1] - keep_columns :].clone()
        above = below


def complete(rows: list[Span], columns: list[Span], needed: Tensor) -> Tensor:
    """Where a composite is complete if only the tiles are computed that something is needed of.

    Args:
        rows, columns: from `composite_spans`.
        needed: (height, width), bool.

    Returns:
        (height, width), bool: true where all tiles that lie there are computed. It is true where `needed` is.
    """
    out = torch.ones_like(needed)
    for row in rows:
        for column in columns:
            if not column.of(row.of(needed, -2), -1).any():
                column.of(row.of(out, -2), -1).fill_(False)
    return out


def composite_spans(length: int, tile: int, overlap: float, scale: int = VAE_SCALE_FACTOR) -> list[Span]:
    """Cut one side into spans as the published code cuts images for the LQ encoder and the VAE.

    Args:
        length: the side in latent units.
        tile: tile side in pixels, a multiple of `scale`.
        overlap: fraction of a tile that neighbours share, 0 to 0.9.
        scale: pixels per latent unit.

    Returns:
        Spans from first to last; the last one ends at `length` and may be shorter than the tile.

    Raises:
        SettingsError: a tile that is no positive multiple of `scale`, or an overlap out of range.
    """
    check_overlap(overlap)
    if tile < scale or tile % scale:
        nearest = max(scale, round(tile / scale) * scale)
        raise SettingsError(
            f"The tile must be a multiple of {scale} pixels, got {tile}. The nearest size that works is {nearest}."
        )
    size = tile // scale
    stride = tile_stride(size, overlap)
    spans: list[Span] = []
    covered = 0
    start = 0
    while covered < length:
        stop = min(start + size, length)
        spans.append(Span(start, stop, min(covered - start, stop - start) if spans else 0))
        covered, start = stop, start + stride
    return spans
