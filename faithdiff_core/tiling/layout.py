"""Parts of an image that have texts of their own, and how much each counts in a tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import SettingsError
from .grid import MIN_TILE, Tile, check_overlap, tile_starts, tile_stride

Box = tuple[float, float, float, float]
"""Top, left, bottom and right as fractions of the image's height and width, 0 to 1."""

MOST_PARTS = 1024
"""More parts than anybody would have captioned."""


@dataclass(frozen=True)
class TileLayout:
    """Where parts of an image are. Fractions, so that it holds for the image, its enlargement and its latent.

    Attributes:
        boxes: of the parts; together they cover the image.
    """

    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        for box in self.boxes:
            top, left, bottom, right = box
            if not (0.0 <= top < bottom <= 1.0 and 0.0 <= left < right <= 1.0):
                raise SettingsError(f"A part must be (top, left, bottom, right) within 0 to 1, got {tuple(box)}.")
        if not self.boxes:
            raise SettingsError("A layout needs at least one part.")

    def crops(self, image: Tensor) -> list[Tensor]:
        """The parts of an image, (..., H, W), as views; every part has at least one pixel."""
        height, width = image.shape[-2:]
        out = []
        for top, left, bottom, right in self.boxes:
            first_row, first_column = min(round(top * height), height - 1), min(round(left * width), width - 1)
            rows = slice(first_row, max(round(bottom * height), first_row + 1))
            columns = slice(first_column, max(round(right * width), first_column + 1))
            out.append(image[..., rows, columns])
        return out

    def shares(self, tile: Tile, height: int, width: int) -> list[float]:
        """How much each part's text counts in a tile: its area within the tile, as a part of all parts' areas there.

        Args:
            tile: a part of a latent.
            height, width: of the whole latent.

        Returns:
            One number for each part; they add up to 1.
        """
        top, left = tile.top / height, tile.left / width
        bottom, right = (tile.top + tile.height) / height, (tile.left + tile.width) / width
        areas = [
            max(0.0, min(bottom, box[2]) - max(top, box[0])) * max(0.0, min(right, box[3]) - max(left, box[1]))
            for box in self.boxes
        ]
        total = math.fsum(areas)
        if not total:
            raise SettingsError("The layout's parts do not cover the image: a tile lies in none of them.")
        return [area / total for area in areas]


def grid_layout(
    height: int, width: int, columns: int = 2, rows: int = 2, tile_size: int = 0, overlap: float = 0.0
) -> TileLayout:
    """Parts of an image in rows and columns, row by row.

    Args:
        height, width: of the image in pixels.
        columns, rows: how many; without effect where there is a tile size.
        tile_size: side of a part in pixels, 64 or more; 0 for `columns` and `rows`. The last part in a row or column is
            moved back to end at the border.
        overlap: fraction of a part that neighbours share, 0 to 0.9.

    Raises:
        SettingsError: a value out of range, or more parts than pixels or than 1024.
    """
    check_overlap(overlap)
    if tile_size and tile_size < MIN_TILE:
        raise SettingsError(f"tile_size must be 0 (columns and rows) or at least {MIN_TILE} pixels, got {tile_size}.")
    if not tile_size and (not 1 <= columns <= width or not 1 <= rows <= height):
        raise SettingsError(
            f"columns and rows must be from 1 to the image's {width} x {height} pixels, got {columns} and {rows}."
        )
    sides = [
        _by_size(length, tile_size, overlap) if tile_size else _by_count(count, overlap)
        for length, count in ((height, rows), (width, columns))
    ]
    boxes = tuple((top, left, bottom, right) for top, bottom in sides[0] for left, right in sides[1])
    if len(boxes) > MOST_PARTS:
        raise SettingsError(f"These settings make {len(boxes)} parts; at most {MOST_PARTS} are supported.")
    return TileLayout(boxes)


def _by_size(length: int, tile: int, overlap: float) -> Sequence[tuple[float, float]]:
    starts = tile_starts(length, tile, tile_stride(tile, overlap))
    return [(start / length, min(start + tile, length) / length) for start in starts]


def _by_count(count: int, overlap: float) -> Sequence[tuple[float, float]]:
    size = 1 / (1 + (count - 1) * (1 - overlap))
    starts = [i * size * (1 - overlap) for i in range(count)]
    return [(start, 1.0 if i == count - 1 else start + size) for i, start in enumerate(starts)]
