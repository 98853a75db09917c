"""The embedded condition of tiles, and the one residual for all copies of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from faithdiff_core import Alignment, AlignmentConfig, TileGrid
from faithdiff_core.models.condition import ConditionEmbedder

SMALL = AlignmentConfig(feature_channels=64, condition_channels=32, unet_channels=32, mlp_channels=96, layers=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def alignment() -> Alignment:
    torch.manual_seed(0)
    return Alignment(SMALL).eval().requires_grad_(False)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(2, 64, 12, 20, generator=torch.Generator().manual_seed(1))


def test_each_place_is_embedded_alone_and_once(alignment: Alignment, features: Tensor) -> None:
    tiles = TileGrid(12, 20, 64, 0.5).tiles
    places = [(image, tile) for tile in tiles for image in range(2)]
    seen: list[int] = []
    handle = alignment.condition_embedding.register_forward_hook(lambda *_: seen.append(1))
    try:
        embedder = ConditionEmbedder(alignment, 2**20)
        first = embedder(features, places, CPU, torch.float32)
        assert len(seen) == len(places)
        assert torch.equal(embedder(features, places[::-1], CPU, torch.float32), first.flip(0))
        assert len(seen) == len(places)
        embedder(features.clone(), places[:1], CPU, torch.float32)  # other features, as far as can be known
        embedder.clear()
        embedder(features, places[:1], CPU, torch.float32)
        assert len(seen) == len(places) + 2
    finally:
        handle.remove()
    for row, (image, tile) in zip(first, places, strict=True):
        crop = features[image, :, tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
        assert torch.equal(row, alignment.embed(crop[None])[0])


@pytest.mark.parametrize("strength", [1.0, 0.4, torch.tensor([0.3, 1.2])], ids=["one", "number", "each row"])
def test_one_residual_serves_all_copies(alignment: Alignment, strength: float | Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    h, condition = (torch.randn(2, 32, 6, 10, generator=generator) for _ in range(2))
    rows: list[int] = []
    handle = alignment.proj.register_forward_hook(lambda _, __, out: rows.append(out.shape[0]))
    try:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            copies = h.repeat(3, 1, 1, 1).contiguous(memory_format=memory_format)
            expected = alignment(h, condition, strength).repeat(3, 1, 1, 1)
            torch.testing.assert_close(alignment(copies, condition, strength, 3), expected, rtol=1e-6, atol=1e-6)
    finally:
        handle.remove()
    assert rows == [2] * 4
