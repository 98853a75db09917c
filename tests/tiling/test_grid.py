"""Where tiles lie, and that merging them loses nothing."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from faithdiff_core import SettingsError, TileGrid, gaussian_weights
from faithdiff_core.backbone import tile_time_ids
from faithdiff_core.tiling.blend import Span, composite, composite_spans
from faithdiff_core.tiling.grid import tile_starts, tile_stride

SIZES = [(8, 8), (1, 1), (16, 40), (25, 33), (7, 100), (64, 65), (129, 31)]


@pytest.mark.parametrize("tile", range(8, 257, 8))
def test_stride_is_the_exact_ceiling(tile: int) -> None:
    """In exact arithmetic, for every overlap in hundredths; 0.9 of 80 pixels (10 units) moves by 1, not by 2."""
    for hundredths in range(91):
        exact = math.ceil(tile * (1 - Fraction(hundredths, 100)))
        assert tile_stride(tile, hundredths / 100) == max(1, exact), (tile, hundredths)


def test_overlap_of_nine_tenths() -> None:
    assert TileGrid(12, 10, 80, 0.9).rows == [0, 1, 2]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tile", [64, 128, 264])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_grid(size: tuple[int, int], tile: int, overlap: float) -> None:
    grid = TileGrid(*size, tile, overlap)
    latent = tile // 8
    covered = torch.zeros(size)
    for place in grid.tiles:
        assert (place.height, place.width) == (min(latent, size[0]), min(latent, size[1]))
        assert place.crop(covered).shape == (place.height, place.width)
        place.crop(covered).add_(1)
        ids = tile_time_ids(*size, place.top, place.left, grid.tile_pixels)
        assert ids == (size[0] * 8, size[1] * 8, place.top, place.left, tile, tile)
    assert covered.min() >= 1
    assert len(grid.tiles) == len(grid) == len(grid.rows) * len(grid.columns)
    assert [(t.top, t.left) for t in grid.tiles] == sorted((t.top, t.left) for t in grid.tiles)
    for starts, side in ((grid.rows, size[0]), (grid.columns, size[1])):
        assert starts[-1] + min(latent, side) == side
        assert len(set(starts)) == len(starts)
        gaps = [b - a for a, b in pairwise(starts)]
        assert all(gap == tile_stride(latent, overlap) for gap in gaps[:-1])
        assert all(0 < gap <= tile_stride(latent, overlap) for gap in gaps[-1:])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_merge_gives_back_what_was_cut(size: tuple[int, int], overlap: float) -> None:
    grid = TileGrid(*size, 64, overlap)
    x = torch.randn((2, 4, *size), generator=torch.Generator().manual_seed(0))
    out, total = torch.zeros_like(x), torch.zeros(size)
    for tile in grid.tiles:
        grid.merge(out, tile, tile.crop(x))
        tile.crop(total).add_(grid.weights(tile))
    torch.testing.assert_close(out, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, torch.ones(size), rtol=1e-5, atol=1e-5)


def test_merge_is_the_published_weighted_mean() -> None:
    """Sum of weighted tiles by sum of weights, as the published code divides at the end."""
    grid = TileGrid(25, 33, 128, 0.5)
    generator = torch.Generator().manual_seed(1)
    results = [torch.randn((1, 4, t.height, t.width), generator=generator) for t in grid.tiles]
    weights = gaussian_weights(16, 16)
    value, count, out = torch.zeros(1, 4, 25, 33).double(), torch.zeros(25, 33).double(), torch.zeros(1, 4, 25, 33)
    for tile, result in zip(grid.tiles, results, strict=True):
        tile.crop(value).add_(result * weights)
        tile.crop(count).add_(weights)
        grid.merge(out, tile, result)
    torch.testing.assert_close(out.double(), value / count, rtol=1e-5, atol=1e-6)


def test_crop_in_pixels_and_batches() -> None:
    grid = TileGrid(20, 24, 128, 0.5)
    image = torch.arange(160 * 192).view(1, 160, 192)
    last = grid.tiles[-1]
    assert torch.equal(last.crop(image, 8), image[:, 32:160, 64:192])
    assert [len(b) for b in grid.batches(3)] == [3, 1]
    assert [t for b in grid.batches(3) for t in b] == list(grid.tiles)
    with pytest.raises(SettingsError, match="at least one tile, got 0"):
        next(grid.batches(0))


def test_tile_starts() -> None:
    assert tile_starts(16, 16, 8) == [0]
    assert tile_starts(17, 16, 8) == [0, 1]
    assert tile_starts(32, 16, 8) == [0, 8, 16]
    assert tile_starts(33, 16, 8) == [0, 8, 16, 17]


@pytest.mark.parametrize(("tile", "nearest"), [(0, 64), (63, 64), (100, 96), (1020, 1024), (72.5, 72)])
def test_bad_tile_size(tile: int, nearest: int) -> None:
    with pytest.raises(SettingsError, match=f"got {tile}. The nearest size that works is {nearest}"):
        TileGrid(10, 10, tile)


@pytest.mark.parametrize("overlap", [-0.1, 0.91, float("nan")])
def test_bad_overlap(overlap: float) -> None:
    with pytest.raises(SettingsError, match=r"overlap must lie between 0 and 0\.9"):
        TileGrid(10, 10, 64, overlap)


def test_empty_latent() -> None:
    with pytest.raises(SettingsError, match="0 x 5"):
        TileGrid(0, 5)


@pytest.mark.parametrize("length", [1, 8, 16, 17, 40, 129])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_composite_of_equal_tiles_is_the_image(length: int, overlap: float) -> None:
    rows, columns = composite_spans(length, 128, overlap), composite_spans(21, 128, overlap)
    image = torch.randn((3, length, 21), generator=torch.Generator().manual_seed(2))
    out = torch.full_like(image, float("nan"))

    def cut(row: Span, column: Span) -> Tensor:
        return image[:, row.start : row.stop, column.start : column.stop].clone()

    composite(rows, columns, cut, out)
    torch.testing.assert_close(out, image, rtol=1e-5, atol=1e-5)
    assert rows[-1].stop == length
    assert all(b.start < a.stop or b.fade == 0 for a, b in pairwise(rows))


def test_composite_fades_linearly() -> None:
    spans = composite_spans(24, 128, 0.25)
    assert [(s.start, s.stop, s.fade) for s in spans] == [(0, 16, 0), (12, 24, 4)]
    out = torch.zeros(1, 24, 8)
    composite(spans, composite_spans(8, 128, 0.25), lambda r, c: torch.full((1, r.size, c.size), float(r.start)), out)
    assert out[0, :, 0].tolist() == [0.0] * 12 + [0.0, 3.0, 6.0, 9.0] + [12.0] * 8
