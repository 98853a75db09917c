"""Grids that move: they cover everything, keep their overlap, and follow from seed and noise level alone."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from faithdiff_core import SettingsError, TileGrid, sampling_sigmas
from faithdiff_core.tiling.grid import tile_stride
from faithdiff_core.tiling.moving import MOVING_OVERLAP, TileGrids

SIGMAS = sampling_sigmas(20)[:-1].tolist()


def moving(height: int, width: int, tile: int = 1024, overlap: float = MOVING_OVERLAP, seed: int = 0) -> TileGrids:
    return TileGrids(height, width, tile, overlap, "moving", seed)


@pytest.mark.parametrize(("pixels", "most", "published"), [(4096, 25, 49), (8192, 100, 225)])
def test_tiles_of_large_images(pixels: int, most: int, published: int) -> None:
    side = pixels // 8
    assert len(moving(side, side)) <= most
    assert len(TileGrids(side, side)) == published
    assert {len(moving(side, side).at(sigma)) for sigma in SIGMAS} == {len(moving(side, side))}


@pytest.mark.parametrize("tile", [64, 96, 128, 1024])
@pytest.mark.parametrize("overlap", [0.0, 0.125, 0.25, 0.5, 0.75, 0.9])
def test_every_length_is_covered_with_the_overlap(tile: int, overlap: float) -> None:
    side = tile // 8
    # Where tiles could hardly move otherwise, half the overlap is kept.
    widest = tile_stride(side, overlap / 2)
    for length in [*range(1, 6 * side, max(1, side // 8)), 1000]:
        grids = moving(length, 1, tile, overlap)
        for sigma in SIGMAS[:4]:
            grid = grids.at(sigma)
            gaps = [b - a for a, b in pairwise(grid.rows)]
            assert grid.rows[0] == 0
            assert grid.rows[-1] == max(0, length - side)
            assert all(0 < gap <= widest for gap in gaps), (length, grid.rows)
            assert len(grid.rows) == len(grids)
            # Never more than one tile above the smallest number that has the overlap.
            assert len(grids) <= math.ceil(max(0, length - side) / tile_stride(side, overlap)) + 2


@pytest.mark.parametrize("size", [(1, 1), (9, 40), (25, 33), (64, 65)])
def test_merging_loses_nothing(size: tuple[int, int]) -> None:
    grids = moving(*size, 64)
    x = torch.randn((2, 4, *size), generator=torch.Generator().manual_seed(0))
    for sigma in SIGMAS[:5]:
        grid = grids.at(sigma)
        out, total = torch.zeros_like(x), torch.zeros(size, dtype=torch.float64)
        for tile in grid.tiles:
            grid.merge(out, tile, tile.crop(x))
            tile.crop(total).add_(grid.weights(tile, dtype=torch.float64))
        torch.testing.assert_close(out, x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)


def test_weights_run_linearly_from_one_tile_to_the_next() -> None:
    grid = moving(16, 104, 128).at(SIGMAS[0])
    assert grid.rows == [0]
    before, after = grid.tiles[2:4]
    shared = before.left + 16 - after.left
    assert shared >= 2
    rising = (torch.arange(shared, dtype=torch.float64) + 0.5) / shared
    weights = [grid.weights(tile, dtype=torch.float64)[7] for tile in (before, after)]
    torch.testing.assert_close(weights[1][:shared], rising, rtol=1e-12, atol=0)
    torch.testing.assert_close(weights[0][-shared:], rising.flip(0), rtol=1e-12, atol=0)


def test_grids_follow_from_seed_and_noise_level() -> None:
    one, again = moving(64, 80, 128, seed=5), moving(64, 80, 128, seed=5)
    forwards = [one.at(sigma).starts for sigma in SIGMAS]
    assert [again.at(sigma).starts for sigma in reversed(SIGMAS)] == forwards[::-1]
    assert [moving(64, 80, 128, seed=6).at(sigma).starts for sigma in SIGMAS] != forwards
    assert len(set(forwards)) > 15
    # Another device may round a noise level differently.
    for factor in (1 - 1e-6, 1 + 1e-6):
        assert [one.at(sigma * factor).starts for sigma in SIGMAS] == forwards
    # The same on every machine and version: these are in results that people want to repeat.
    assert forwards[0] == EXPECTED


EXPECTED = ((0, 9, 23, 37, 48), (0, 7, 21, 36, 50, 64))


def test_borders_lie_inside_a_tile_in_other_steps() -> None:
    """Every position is in some steps a quarter of a tile away from the borders of the tile that it lies in."""

    def fewest_steps(grids: TileGrids, side: int = 128) -> float:
        inside = torch.zeros(512)
        for sigma in SIGMAS:
            rows = grids.at(sigma).rows
            for start in rows:
                first = 0 if start == 0 else start + side // 4
                last = 512 if start == rows[-1] else start + side - side // 4
                inside[first:last] += 1
        return float(inside.min())

    assert fewest_steps(moving(512, 512)) >= 2
    assert fewest_steps(TileGrids(512, 512, 1024, MOVING_OVERLAP)) == 0


def test_fixed_is_the_published_grid() -> None:
    grids = TileGrids(25, 33, 128, 0.5)
    published = TileGrid(25, 33, 128, 0.5)
    assert all(grids.at(sigma).tiles == published.tiles for sigma in SIGMAS)
    assert torch.equal(grids.at(SIGMAS[0]).weights(published.tiles[0]), published.weights(published.tiles[0]))
    assert (len(grids), grids.tile_height, grids.tile_width) == (len(published), 16, 16)
    assert (moving(9, 33, 128).tile_height, moving(9, 33, 128).tile_width) == (9, 16)


def test_unknown_kind() -> None:
    with pytest.raises(SettingsError, match=r"tile_grid must be one of \['fixed', 'moving'\], got 'random'"):
        TileGrids(8, 8, 64, 0.5, "random")
