"""Maps, words and overlays by themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from faithdiff_core.attribution.head_maps import head_sums
from faithdiff_core.attribution.maps import TokenMaps
from faithdiff_core.attribution.overlay import attribution_sheet, heat_colors, image_maps
from faithdiff_core.attribution.words import content_tokens, split_words, word_positions
from faithdiff_core.errors import SettingsError
from faithdiff_core.tiling.grid import TileGrid


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_coarser_maps_are_means_of_fine_ones(factor: int) -> None:
    """Tiles at odd places, an odd size, two steps: each cell is the mean over what it covers."""
    height, width, tokens = 21, 34, 3
    grid = TileGrid(height, width, 64, 0.3, rows=[0, 5, 13], columns=[0, 7, 13, 19, 26])
    cells = -(-height // factor) * -(-width // factor)
    maps = TokenMaps(2, tokens, height, width, memory=4 * 2 * (tokens + 1) * cells)
    assert maps.factor == factor
    whole = torch.rand(2, tokens, height, width, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        for tile in grid.tiles:
            for heads in (1, 2):  # a sum over three heads, in two parts
                maps.add(1, tile, heads * tile.crop(whole[1]), grid.weights(tile))
            maps.add_weights(1, tile, grid.weights(tile), 3)
        maps.add(0, TileGrid(height, width, 512).tiles[0], whole[0])
        maps.add_weights(0, TileGrid(height, width, 512).tiles[0])
    covered = F.avg_pool2d(torch.ones(1, 1, height, width), factor, ceil_mode=True, divisor_override=1)
    means = F.avg_pool2d(whole, factor, ceil_mode=True, divisor_override=1) / covered
    got = maps.sums / maps.weights[:, None]
    assert torch.allclose(got, means, atol=1e-5)
    assert maps.mean([0, 2]).shape == (2, height, width)
    if factor == 1:
        assert torch.allclose(maps.mean([0, 2]), whole[:, [0, 2]].mean(1), atol=1e-5)


def test_maps_need_memory_and_every_part() -> None:
    with pytest.raises(SettingsError, match=r"77 tokens for 1 latents of 1024 x 512 need at least 0\.0 MiB"):
        TokenMaps(1, 77, 512, 1024, memory=1000)
    maps = TokenMaps(1, 2, 16, 16, memory=2**20)
    with pytest.raises(SettingsError, match="No attention was recorded for a part of the image"):
        maps.mean([0])


@pytest.mark.parametrize(("size", "target"), [((35, 21), (139, 82)), ((9, 17), (9, 17)), ((5, 9), (9, 17))])
def test_heads_are_clamped_after_enlarging_in_any_parts(size: tuple[int, int], target: tuple[int, int]) -> None:
    """Against the definition: one map for each head and token, each enlarged whole and clamped by itself."""
    random = torch.Generator().manual_seed(0)
    heads, tokens, length = 3, 7, size[0] * size[1]
    q = 3 * torch.randn(length, heads * 64, generator=random)
    k = torch.randn(tokens, heads * 64, generator=random)
    maps = torch.softmax(q.view(-1, heads, 64).transpose(0, 1) @ k.view(tokens, heads, 64).permute(1, 2, 0) / 8, dim=-1)
    large = F.interpolate(maps.mT.unflatten(2, size), target, mode="bicubic")
    expected = large.clamp(min=0).sum(0)
    if size != target:
        assert (expected - large.sum(0)).abs().max() > 0.1  # the clamp makes a difference
    for memory in (16 * tokens * 11**2, 16 * tokens * 35**2, 2**24):  # one head in parts of 8, of 32, all at once
        got, count = torch.zeros(tokens, *target), torch.zeros(target)
        for part, values in head_sums(q, k, heads, size, target, memory):
            part.crop(got).add_(values)
            part.crop(count).add_(1)
        assert (count == 1).all()
        assert torch.allclose(got, expected, atol=1e-5)
    with pytest.raises(SettingsError, match=r"Attribution maps of 7 tokens need at least 0\.1 MiB"):
        next(head_sums(q, k, heads, size, target, 1000))


def test_words_are_found_in_all_chunks() -> None:
    begin, end, pad = 100, 101, 0
    chunks = [[begin, 1, 2, 3, 1, end, pad], [begin, 2, 5, end, end, end, end]]
    tokens = content_tokens(chunks, {begin}, end)
    assert tokens == [(1, 1), (2, 2), (3, 3), (4, 1), (8, 2), (9, 5)]
    ids = {"a": [1], "ab": [1, 2], "five": [5], "none": [9], "empty": []}
    assert word_positions(["a", "ab", "five"], "x", tokens, ids.__getitem__) == [[1, 4], [1, 2, 4, 8], [9]]
    for word in ("none", "empty"):
        with pytest.raises(SettingsError, match=rf"The word '{word}' is not in the prompt\. Its words are: red, x-ray"):
            word_positions([word], "(Red:1.3) x-ray, red", tokens, ids.__getitem__)
    assert split_words(" hair,red window,, hair") == ["hair", "red window"]


def test_the_hottest_place_is_red_and_the_sheet_shows_it() -> None:
    maps = torch.zeros(1, 8, 8)
    maps[0, 6, 2] = 3.0
    shown = image_maps(maps, 64, 60)
    assert shown.shape == (1, 64, 60)
    assert shown.amin() == 0
    assert shown.amax() == 1
    y, x = divmod(int(shown[0].argmax()), 60)
    assert 48 <= y < 56
    assert 16 <= x < 24
    colours = heat_colors(torch.tensor([[[0.0, 0.5, 1.0]]]))[0, :, 0]
    assert colours.mT.tolist() == [[0, 0, 0.5], [0.5, 1, 0.5], [0.5, 0, 0]]
    sheet = attribution_sheet(torch.zeros(3, 64, 60), shown, ["hair"])
    red, _, blue = sheet.getpixel(((sheet.width + 8) // 2 + x, 28 + y))  # type: ignore[misc]
    assert red > 80 > blue
