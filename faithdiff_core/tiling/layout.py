"""Parts of an image that have texts of their own, and how much each counts in a tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingsError
from .grid import MIN_TILE, Tile, check_overlap, tile_starts, tile_stride

Box = tuple[float, float, float, float]
"""Top, left, bottom and right as fractions of the image's height and width, 0 to 1."""

PART_OVERLAP = 0.1
"""Default fraction of a part that neighbours share, so that a captioner sees objects on a border whole."""

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
        boxes = self.pixel_boxes(*image.shape[-2:])
        return [image[..., top:bottom, left:right] for top, left, bottom, right in boxes]

    def pixel_boxes(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Top, left, bottom and right of the parts of an image in pixels; every part has at least one pixel."""
        out = []
        for top, left, bottom, right in self.boxes:
            first_row, first_column = min(round(top * height), height - 1), min(round(left * width), width - 1)
            last_row = max(round(bottom * height), first_row + 1)
            last_column = max(round(right * width), first_column + 1)
            out.append((first_row, first_column, last_row, last_column))
        return out

    def covers_image(self) -> bool:
        """Whether every position of the image lies in a part."""
        rows = sorted({0.0, 1.0, *(edge for box in self.boxes for edge in box[0::2])})
        columns = sorted({0.0, 1.0, *(edge for box in self.boxes for edge in box[1::2])})
        covered = torch.zeros(len(rows) - 1, len(columns) - 1, dtype=torch.bool)
        row_of, column_of = ({edge: i for i, edge in enumerate(edges)} for edges in (rows, columns))
        for top, left, bottom, right in self.boxes:
            covered[row_of[top] : row_of[bottom], column_of[left] : column_of[right]] = True
        return bool(covered.all())

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
    # Without overlap an end and the next start are one expression: rounded to pixels they leave no gap.
    places = [(i * (1 - overlap), i * (1 - overlap) + 1) for i in range(count)]
    return [(start * size, 1.0 if i == count - 1 else end * size) for i, (start, end) in enumerate(places)]
