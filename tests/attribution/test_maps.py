"""Maps, words and overlays by themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from faithdiff_core.attribution.maps import TokenMaps
from faithdiff_core.attribution.overlay import attribution_sheet, heat_colors, image_maps
from faithdiff_core.attribution.recorder import head_sums
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
            for first in (0, 2):  # some tokens at a time
                maps.add(1, tile, tile.crop(whole[1, first : first + 2]), first, grid.weights(tile))
            maps.add_weights(1, tile, grid.weights(tile))
        maps.add(0, TileGrid(height, width, 512).tiles[0], whole[0], 0)
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


def test_probabilities_in_pieces_are_those_of_the_whole() -> None:
    q, k = torch.randn(2, 50, 128), torch.randn(2, 7, 128)
    heads = torch.softmax(q.view(2, 50, 2, 64).transpose(1, 2) @ k.view(2, 7, 2, 64).permute(0, 2, 3, 1) / 8, dim=-1)
    for memory in (1, 5000, 2**20):
        assert torch.allclose(head_sums(q, k, 2, memory), heads.sum(1), atol=1e-6)


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
