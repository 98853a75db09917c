"""Parts of an image: they cover it, have the size and overlap asked for, and share tiles by area."""

from __future__ import annotations

import pytest
import torch

from faithdiff_core.errors import SettingsError
from faithdiff_core.tiling.grid import Tile
from faithdiff_core.tiling.layout import TileLayout, grid_layout


@pytest.mark.parametrize(
    "settings",
    [{"columns": 3, "rows": 2, "overlap": 0.25}, {"tile_size": 96, "overlap": 0.5}, {"columns": 1, "rows": 1}],
)
def test_parts_cover_the_image(settings: dict[str, float]) -> None:
    image = torch.zeros(1, 3, 200, 330)
    crops = grid_layout(200, 330, **settings).crops(image)  # type: ignore[arg-type]
    for crop in crops:
        crop += 1
    assert image.min() == 1
    if "tile_size" in settings:
        assert {crop.shape[-2:] for crop in crops} == {(96, 96)}
        assert len(crops) == 4 * 6
    elif settings["columns"] == 3:
        assert len(crops) == 6
        height, width = crops[0].shape[-2:]
        assert (height, width) == (round(200 / 1.75), round(330 / 2.5))


def test_shares_are_areas() -> None:
    """A tile of 10 x 10 over four quarters of a 40 x 40 latent."""
    layout = grid_layout(320, 320, 2, 2)
    assert layout.shares(Tile(0, 0, 10, 10), 40, 40) == [1, 0, 0, 0]
    assert layout.shares(Tile(15, 18, 10, 10), 40, 40) == pytest.approx([0.1, 0.4, 0.1, 0.4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": 0}, "columns and rows must be from 1"),
        ({"tile_size": 32}, "tile_size must be 0"),
        ({"tile_size": 64, "overlap": 0.9}, "at most 1024 are supported"),
        ({"overlap": 1.0}, "overlap must lie between"),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        grid_layout(600, 600, **settings)  # type: ignore[arg-type]


def test_bad_boxes() -> None:
    with pytest.raises(SettingsError, match="within 0 to 1"):
        TileLayout(((0.0, 0.5, 1.0, 0.5),))
    with pytest.raises(SettingsError, match="do not cover"):
        TileLayout(((0.0, 0.0, 0.1, 0.1),)).shares(Tile(30, 30, 5, 5), 40, 40)
