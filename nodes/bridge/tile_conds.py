"""Conditionings as tiles need them: everything spatial is cut, and images keep their own text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid5

import comfy.conds
import comfy.model_base
import torch
from torch import Tensor

from ...faithdiff_core.backbone import tile_time_ids
from ...faithdiff_core.tiling.grid import Tile, TileGrid
from .active_conditions import OUTER_UUID
from .tile_texts import put_texts

if TYPE_CHECKING:
    from comfy.model_base import BaseModel


def tile_conds(
    model: BaseModel, group: Sequence[dict[str, Any]], grid: TileGrid, tiles: Sequence[Tile], images: int
) -> list[dict[str, Any]]:
    """Conditionings of a prompt as the tiles of a U-Net call need them.

    Those whose area lies outside are left out. Patches that keep something by a conditioning's uuid are given another
    one for each group of tiles, the same at every step.
    """
    out = []
    place = ",".join(f"{tile.top}:{tile.left}:{tile.height}:{tile.width}" for tile in tiles)
    for cond in group:
        tile_cond = {**cond, OUTER_UUID: cond["uuid"], "uuid": uuid5(cond["uuid"], place)}
        if "area" in cond:
            area = _area_in_tile(cond["area"], tiles[0])
            if area is None:
                continue
            tile_cond["area"] = area
        if "gligen" in cond:
            tile_cond["gligen"] = _gligen_in_tile(cond["gligen"], tiles[0])
        if "mask" in cond:
            tile_cond["mask"] = _tile_rows(cond["mask"], tiles, images)
        model_conds = dict(cond["model_conds"])
        for name, value in model_conds.items():
            if isinstance(value, comfy.conds.CONDNoiseShape):
                model_conds[name] = value._copy_with(_tile_rows(value.cond, tiles, images))
            elif len(tiles) > 1 and isinstance(value, comfy.conds.CONDRegular) and value.cond.shape[0] > 1:
                # Rows belong to images: those of the call, which start over with every tile, are spelt out.
                model_conds[name] = value._copy_with(torch.cat([_rows_of(value.cond, images)] * len(tiles)))
        if isinstance(model, comfy.model_base.SDXL) and "y" in model_conds:
            y = model_conds["y"]
            model_conds["y"] = y._copy_with(_tile_size_conditioning(model, y.cond, grid, tiles, images))
        put_texts(cond, model_conds, grid, tiles, images)
        tile_cond["model_conds"] = model_conds
        out.append(tile_cond)
    return out


def _area_in_tile(area: Sequence[int], tile: Tile) -> tuple[int, int, int, int] | None:
    """The part of an area (height, width, top, left) that lies in a tile, in the tile's own positions."""
    height, width, top, left = area
    first_row, first_column = max(top, tile.top), max(left, tile.left)
    last_row = min(top + height, tile.top + tile.height)
    last_column = min(left + width, tile.left + tile.width)
    if first_row >= last_row or first_column >= last_column:
        return None
    return last_row - first_row, last_column - first_column, first_row - tile.top, first_column - tile.left


def _gligen_in_tile(gligen: tuple[Any, ...], tile: Tile) -> tuple[Any, ...]:
    """GLIGEN's boxes (embedding, height, width, top, left) as far as they lie in a tile, in its own positions."""
    kind, model, boxes, *rest = gligen
    if kind != "position":
        return gligen
    inside = []
    for embedding, *box in boxes:
        area = _area_in_tile(box, tile)
        if area is not None:
            inside.append((embedding, *area))
    return (kind, model, inside, *rest)


def _tile_rows(x: Tensor, tiles: Sequence[Tile], images: int) -> Tensor:
    """The tiles' crops of (N, ..., H, W), one below the other as the rows of a call are."""
    if len(tiles) == 1:
        return tiles[0].crop(x)
    return torch.cat([_rows_of(tile.crop(x), images) for tile in tiles])


def _rows_of(x: Tensor, images: int) -> Tensor:
    """One row for each image, as ComfyUI repeats what comes with fewer rows."""
    repeats = -(-images // x.shape[0])
    return x.repeat(repeats, *[1] * (x.ndim - 1))[:images]


def _tile_size_conditioning(model: BaseModel, y: Tensor, grid: TileGrid, tiles: Sequence[Tile], images: int) -> Tensor:
    """SDXL's vector conditioning with the published size conditioning of each tile.

    The vector is the pooled text followed by the embeddings of six numbers.
    """
    out = []
    for tile in tiles:
        ids = tile_time_ids(grid.height, grid.width, tile.top, tile.left, grid.tile_pixels)
        embedded = model.embedder(torch.tensor(ids, dtype=torch.float32)).flatten()
        embedded = embedded.to(y).expand(y.shape[0], -1)
        out.append(torch.cat([y[:, : y.shape[1] - embedded.shape[1]], embedded], dim=1))
    if len(out) == 1:
        return out[0]
    return torch.cat([_rows_of(rows, images) for rows in out])
