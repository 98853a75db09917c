"""Inputs that several nodes have, and their checks."""

from __future__ import annotations

from comfy_api.latest import io

from ..faithdiff_core.tiling.grid import MAX_OVERLAP, MIN_TILE, check_overlap, check_tile_size
from .errors import complaint

LARGEST_TILE = 16384


def tile_size_input(tooltip: str, default: int = 1024) -> io.Int.Input:
    """A tile side in pixels."""
    return io.Int.Input("tile_size", default=default, min=MIN_TILE, max=LARGEST_TILE, step=8, tooltip=tooltip)


def overlap_input(tooltip: str, default: float) -> io.Float.Input:
    """A real overlap as a fraction of the tile."""
    return io.Float.Input("overlap", default=default, min=0.0, max=MAX_OVERLAP, step=0.05, round=0.001, tooltip=tooltip)


def check_tiles(tile_size: int | None, overlap: float | None) -> bool | str:
    """For `validate_inputs`: the core's own checks.

    Values that arrive through a link are None here, and are checked when the node runs.
    """
    if tile_size is not None and (message := complaint(check_tile_size, tile_size)):
        return message
    if tile_size is not None and tile_size > LARGEST_TILE:
        return f"tile_size must be at most {LARGEST_TILE} pixels, got {tile_size}."
    if overlap is not None and (message := complaint(check_overlap, overlap)):
        return message
    return True
