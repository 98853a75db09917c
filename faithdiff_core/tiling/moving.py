"""Tile grids that move from step to step, so that large images need little overlap.

What lies on a border in one step lies inside a tile in the next, which hides seams as well as a large overlap does and
takes half the tiles. (The idea is SpotDiffusion's, Frolov et al., arXiv 2407.15507, for panoramas of text-to-image
models.) A grid follows from the seed and the noise level alone: a sampler that asks several times at one noise level,
or a run that is split in two, gets the same grids.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from enum import Enum

from ..errors import SettingsError
from .grid import TILE_OVERLAP, TILE_SIZE, TileGrid, check_overlap, check_tile_size, tile_stride

MOVING_OVERLAP = 0.125
"""Suggested overlap of a moving grid."""

LEVELS_PER_OCTAVE = 64
"""Noise levels that count as different, per factor of two. Levels closer than a percent share a grid, so that rounding
on another device changes nothing."""


class TileGridKind(str, Enum):
    """Where the sampler's tiles lie."""

    FIXED = "fixed"
    """At the same places in all steps, as published."""

    MOVING = "moving"
    """At other places at every noise level."""


@dataclass(frozen=True)
class _Side:
    """How one side is covered by tiles that move.

    Attributes:
        length: of the side.
        tile: side of a tile.
        count: number of tiles; the first and the last lie at the borders.
        stride: largest distance between neighbours. Distances are whole; their mean need not be.
    """

    length: int
    tile: int
    count: int
    stride: float

    @classmethod
    def plan(cls, length: int, tile: int, overlap: float) -> _Side:
        """As few tiles as the overlap allows; where these could hardly move, less overlap or one tile more."""
        last = length - tile
        if last <= 0:
            return cls(length, tile, 1, tile)
        stride = tile_stride(tile, overlap)
        count = math.ceil(last / stride) + 1
        if count == 2:
            # Both lie at the borders. They need not move where they overlap by half, as in the published grid.
            return cls(length, tile, 2 if 2 * last <= tile else 3, stride)
        # Half a tile is enough to move by. Tiles that overlap by half need not move far.
        needed = stride if 2 * stride <= tile else max(stride, (last + tile / 2) / (count - 1))
        if needed <= tile_stride(tile, overlap / 2):
            return cls(length, tile, count, needed)
        return cls(length, tile, count + 1, stride)

    def starts(self, draw: random.Random) -> list[int]:
        """First positions of the tiles; the inner ones are moved together by a random distance."""
        last = self.length - self.tile
        if self.count <= 2:
            return [0, last][: self.count]
        slack = (self.count - 1) * self.stride - last
        # Within these limits the inner tiles stay between the outer ones, and no gap is wider than the stride.
        moved = draw.uniform(max(0.0, slack - self.stride + 1), min(slack, self.stride - 1))
        # Rounded up, so that the last gap is not wider than the stride either.
        inner = [math.ceil(i * self.stride - moved) for i in range(1, self.count - 1)]
        return [0, *inner, last]


class TileGrids:
    """The tile grid of each step of a sampling run.

    All grids of a run have the same number of tiles, of one size. Merge weights are normalized for each grid: Gaussian
    ones where it is fixed, as published; linear ones where it moves, which are nearer to the result of one tile there
    (docs/performance.md).

    Args:
        height, width: the latent's size in latent units.
        tile: tile side in pixels, a multiple of 8 from 64.
        overlap: fraction of a tile that neighbours share, 0 to 0.9. With `moving` it is the smallest, or half of it
            where the tiles could not move otherwise.
        kind: `fixed` or `moving`.
        seed: of the run; grids of another seed move differently.

    Raises:
        SettingsError: a size, an overlap or a kind that is not supported.
    """

    def __init__(
        self,
        height: int,
        width: int,
        tile: int = TILE_SIZE,
        overlap: float = TILE_OVERLAP,
        kind: TileGridKind | str = TileGridKind.FIXED,
        seed: int = 0,
    ) -> None:
        try:
            self.kind = TileGridKind(kind)
        except ValueError:
            raise SettingsError(f"tile_grid must be one of {[k.value for k in TileGridKind]}, got {kind!r}.") from None
        self.height, self.width, self.tile_pixels, self.seed = height, width, tile, seed
        self.overlap = check_overlap(overlap)
        side = check_tile_size(tile)
        self._fixed = TileGrid(height, width, tile, overlap) if self.kind is TileGridKind.FIXED else None
        self._rows, self._columns = _Side.plan(height, side, overlap), _Side.plan(width, side, overlap)
        self._last: tuple[int, TileGrid] | None = None

    def __len__(self) -> int:
        """Tiles in each step."""
        return len(self._fixed) if self._fixed is not None else self._rows.count * self._columns.count

    @property
    def tile_height(self) -> int:
        """Height of every tile in latent units."""
        return min(self._rows.tile, self.height)

    @property
    def tile_width(self) -> int:
        """Width of every tile in latent units."""
        return min(self._columns.tile, self.width)

    def at(self, sigma: float) -> TileGrid:
        """The grid at a noise level.

        Args:
            sigma: noise level in the sigma space, x = z + sigma * noise.
        """
        if self._fixed is not None:
            return self._fixed
        level = round(LEVELS_PER_OCTAVE * math.log2(max(sigma, 1e-6)))
        if self._last is None or self._last[0] != level:
            # Strings seed it through SHA-512, the same in every version of Python and on every machine.
            draw = random.Random(f"{self.seed} {level}")
            rows, columns = self._rows.starts(draw), self._columns.starts(draw)
            grid = TileGrid(
                self.height, self.width, self.tile_pixels, self.overlap, rows=rows, columns=columns, linear=True
            )
            self._last = (level, grid)
        return self._last[1]
