"""The sampler's tiles: where they lie, and how their results become one image.

Tiles all have one size and are merged with weights that are largest in their middle. All positions are in latent units
unless a name says pixels; one latent unit is 8 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..backbone import VAE_SCALE_FACTOR
from ..errors import SettingsError

MIN_TILE = 64
"""Smallest tile side in pixels: 8 latent units, of which the U-Net's lowest level sees 2."""

MAX_OVERLAP = 0.9
"""Largest overlap; above it the number of tiles explodes and nothing is gained."""

TILE_SIZE = 1024
"""Tile side in pixels of the published code: the size SDXL was trained at."""

TILE_OVERLAP = 0.5
"""Overlap of the published code, as a fraction of the tile."""

_VARIANCE = 0.01
"""Variance of the Gaussian merge weights, in units of the squared tile side."""


def check_tile_size(tile: int, *, what: str = "tile_size") -> int:
    """Check a tile side in pixels and return it in latent units.

    Raises:
        SettingsError: no number, below 64 or not a multiple of 8; the text names the nearest size that works.
    """
    if isinstance(tile, bool) or not isinstance(tile, int | float) or not math.isfinite(tile):
        raise SettingsError(f"{what} must be a number of pixels, such as 1024, got {tile!r}.")
    if int(tile) != tile or tile < MIN_TILE or tile % VAE_SCALE_FACTOR:
        nearest = max(MIN_TILE, round(tile / VAE_SCALE_FACTOR) * VAE_SCALE_FACTOR)
        raise SettingsError(
            f"{what} must be a multiple of {VAE_SCALE_FACTOR} pixels and at least {MIN_TILE}, got {tile}. "
            f"The nearest size that works is {nearest}."
        )
    return int(tile) // VAE_SCALE_FACTOR


def check_overlap(overlap: float, *, what: str = "overlap") -> float:
    """Check an overlap (the fraction of a tile that it shares with its neighbour).

    Raises:
        SettingsError: outside 0 to 0.9.
    """
    if isinstance(overlap, bool) or not isinstance(overlap, int | float) or not 0.0 <= overlap <= MAX_OVERLAP:
        raise SettingsError(f"{what} must lie between 0 and {MAX_OVERLAP} (a fraction of the tile), got {overlap}.")
    return float(overlap)


def tile_stride(tile: int, overlap: float) -> int:
    """Distance between neighbouring tiles, in the unit of `tile`.

    The published code takes ceil(tile * f) with f = 1 - overlap. The product is rounded to nine decimals first: 1 - 0.9
    is a little more than 0.1 in binary, and the ceiling would make a whole latent unit of that.
    """
    return max(1, math.ceil(round(tile * (1.0 - overlap), 9)))


def tile_starts(length: int, tile: int, stride: int) -> list[int]:
    """First positions of tiles along one side; the last tile is moved back to end at the border."""
    if length <= tile:
        return [0]
    starts = list(range(0, length - tile, stride))
    return [*starts, length - tile]


def gaussian_window(length: int, middle: float) -> Tensor:
    """Merge weights along one side, (length,), float64.

    exp(-((p - middle) / length)^2 / (2 * 0.01)) / sqrt(2 pi * 0.01) for p = 0 .. length - 1.
    """
    position = torch.arange(length, dtype=torch.float64)
    return torch.exp(-(((position - middle) / length) ** 2) / (2 * _VARIANCE)) / math.sqrt(2 * math.pi * _VARIANCE)


def gaussian_weights(height: int, width: int) -> Tensor:
    """The published code's merge weights of one tile, (height, width), float64.

    The middle is height / 2 for rows and (width - 1) / 2 for columns: the published code is not symmetric there.
    """
    return torch.outer(gaussian_window(height, height / 2), gaussian_window(width, (width - 1) / 2))


def triangular_window(length: int) -> Tensor:
    """Merge weights along one side that fall linearly to the tile's borders, (length,), float64.

    Where two tiles overlap, their normalized weights run linearly from one to the other over the whole overlap;
    Gaussian ones do so within the middle of it.
    """
    position = torch.arange(length, dtype=torch.float64) + 0.5
    return torch.minimum(position, length - position)


@dataclass(frozen=True)
class Tile:
    """A rectangle of a latent, in latent units.

    Attributes:
        top, left: position of its first row and column.
        height, width: its size; smaller than the tile size where the latent is.
    """

    top: int
    left: int
    height: int
    width: int

    def crop(self, x: Tensor, scale: int = 1) -> Tensor:
        """The tile's part of (..., H, W), as a view; `scale` is the number of x's pixels per latent unit."""
        return x[
            ...,
            self.top * scale : (self.top + self.height) * scale,
            self.left * scale : (self.left + self.width) * scale,
        ]


class TileGrid:
    """The sampler's tiles over a latent.

    Tiles run row by row. Because the grid is a product of rows and columns and the weights are one too, the weights are
    normalized along each side: they add up to 1 everywhere, so merging is a plain sum into one tensor, with no
    tensor of counts and no division.

    Args:
        height, width: the latent's size in latent units.
        tile: tile side in pixels, a multiple of 8 from 64.
        overlap: fraction of a tile that neighbours share, 0 to 0.9.
        rows, columns: first positions of the tiles along each side, which must cover it. Default to the published ones.
        linear: merge with weights that fall linearly to the tiles' borders; else with the published Gaussian ones.

    Raises:
        SettingsError: a size or an overlap out of range.
    """

    def __init__(
        self,
        height: int,
        width: int,
        tile: int = TILE_SIZE,
        overlap: float = TILE_OVERLAP,
        *,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        linear: bool = False,
    ) -> None:
        if height < 1 or width < 1:
            raise SettingsError(
                f"There is nothing to make tiles of: the latent is {height} x {width}. Check the node that made it."
            )
        self.height, self.width = height, width
        self.tile_pixels = int(tile)
        self.tile = check_tile_size(tile)
        self.overlap = check_overlap(overlap)
        stride = tile_stride(self.tile, self.overlap)
        self.tile_height, self.tile_width = min(self.tile, height), min(self.tile, width)
        self.rows = tile_starts(height, self.tile, stride) if rows is None else list(rows)
        self.columns = tile_starts(width, self.tile, stride) if columns is None else list(columns)
        self.linear = linear
        self._row_index = {start: i for i, start in enumerate(self.rows)}
        self._column_index = {start: i for i, start in enumerate(self.columns)}
        self._windows: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles, row by row."""
        return tuple(Tile(top, left, self.tile_height, self.tile_width) for top in self.rows for left in self.columns)

    @property
    def starts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First positions of the tiles along the rows and the columns."""
        return tuple(self.rows), tuple(self.columns)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def batches(self, size: int) -> Iterator[tuple[Tile, ...]]:
        """The tiles in groups of at most `size`, for U-Net calls with several tiles."""
        if size < 1:
            raise SettingsError(f"A batch of tiles needs at least one tile, got {size}.")
        for start in range(0, len(self.tiles), size):
            yield self.tiles[start : start + size]

    @cached_property
    def _row_weights(self) -> Tensor:
        size = self.tile_height
        return _normalized(
            self.rows, triangular_window(size) if self.linear else gaussian_window(size, size / 2), self.height
        )

    @cached_property
    def _column_weights(self) -> Tensor:
        size = self.tile_width
        return _normalized(
            self.columns, triangular_window(size) if self.linear else gaussian_window(size, (size - 1) / 2), self.width
        )

    def weights(
        self, tile: Tile, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Merge weights of a tile, (height, width); over all tiles they add up to 1 at every position."""
        # A grid's windows go to the device once: a copy for each tile would have it wait for the CPU.
        place = (torch.device(device or "cpu"), dtype)
        if place not in self._windows:
            self._windows[place] = (self._row_weights.to(*place), self._column_weights.to(*place))
        rows, columns = self._windows[place]
        return torch.outer(rows[self._row_index[tile.top]], columns[self._column_index[tile.left]])

    def merge(self, out: Tensor, tile: Tile, result: Tensor) -> None:
        """Add a tile's weighted result to `out`, in place.

        Args:
            out: (..., height, width) of the whole latent, zeros before the first tile.
            tile: one of `tiles`.
            result: (..., tile.height, tile.width).
        """
        if len(self) == 1:
            out.copy_(result)
            return
        tile.crop(out).addcmul_(result.to(out.dtype), self.weights(tile, out.device, out.dtype))


class OneTileGrid(TileGrid):
    """A published grid of whose tiles a single one is worked on; its result is taken as it is.

    Args:
        height, width, tile, overlap: see `TileGrid`.
        only: one of the grid's tiles.
    """

    def __init__(self, height: int, width: int, tile: int, overlap: float, *, only: Tile) -> None:
        super().__init__(height, width, tile, overlap)
        self._only = only

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The one tile; `len` still counts all of the grid."""
        return (self._only,)

    def merge(self, out: Tensor, tile: Tile, result: Tensor) -> None:
        """Put the tile's result into `out`, in place."""
        tile.crop(out).copy_(result)


def _normalized(starts: list[int], window: Tensor, length: int) -> Tensor:
    """Windows at `starts`, (tiles, n), scaled so that they add up to 1 at each of the `length` positions."""
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + len(window)] += window
    return torch.stack([window / total[start : start + len(window)] for start in starts])
