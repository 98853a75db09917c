"""Texts for the tiles of a sampler, on ComfyUI's CONDITIONINGs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...faithdiff_core.captions.tile_texts import TileTexts, same_length
from ...faithdiff_core.errors import SettingsError
from ...faithdiff_core.tiling.grid import Tile, TileGrid
from ...faithdiff_core.tiling.layout import TileLayout, grid_layout
from .checks import check_image
from .lq_conditioning import Conditioning

TEXTS_KEY = "faithdiff_tile_texts"
"""Where a CONDITIONING entry carries its `TileTexts`."""

_SPATIAL = ("control", "mask", "area", "gligen", "hooks")
"""What a part's conditioning must not have, since the whole image's applies to all tiles."""


def cut_image(
    image: Tensor, columns: int, rows: int, tile_size: int, overlap: float
) -> tuple[list[Tensor], TileLayout]:
    """The parts of an IMAGE, row by row, and where they are; the arguments are those of `grid_layout`.

    Raises:
        SettingsError: several images, or a value out of range.
    """
    image = check_image(image, "image")
    if image.shape[0] != 1:
        raise SettingsError(
            f"expected one image, got a batch of {image.shape[0]}: each has parts and texts of its own. Send them one "
            f"after the other, as a list (Rebatch Images, batch size 1)."
        )
    layout = grid_layout(image.shape[1], image.shape[2], columns, rows, tile_size, overlap)
    return [crop.movedim(1, -1).contiguous() for crop in layout.crops(image.movedim(-1, 1))], layout


def only(values: list[Any], name: str) -> Any:
    """The one value of an input of a node that takes lists.

    Raises:
        SettingsError: there are several.
    """
    if len(values) != 1:
        raise SettingsError(f"{name}: expected one value, got a list of {len(values)}. Restore one image at a time.")
    return values[0]


def with_tile_texts(layout: TileLayout, parts: Sequence[Conditioning], whole: Conditioning, mix: float) -> Conditioning:
    """The whole image's CONDITIONING, whose entries carry the parts' texts; the given ones stay as they are.

    Args:
        layout: where the parts are.
        parts: a CONDITIONING for each.
        whole: of the whole image.
        mix: share of the parts' texts, 0 to 1.

    Raises:
        SettingsError: parts and layout do not go together, or a part is more than a text.
    """
    if len(parts) != len(layout.boxes):
        raise SettingsError(
            f"there are {len(parts)} conditionings for the {len(layout.boxes)} parts of the layout. Encode the list of "
            f"captions that was made of the crops of the same FaithDiff Tile Captions."
        )
    for number, part in enumerate(parts, start=1):
        if len(part) != 1:
            raise SettingsError(
                f"the conditioning of part {number} has {len(part)} entries; a part has one text. Combine prompts in "
                f"the whole image's conditioning instead."
            )
        extra = [name for name in _SPATIAL if name in part[0][1] and not (name == "hooks" and _hooked(whole))]
        if extra:
            raise SettingsError(
                f"the conditioning of part {number} carries `{extra[0]}`, which would be lost. Apply ControlNets, "
                f"masks, areas and LoRA hooks to the whole image's conditioning: they act on all tiles."
            )
        if part[0][0].shape[-1] != whole[0][0].shape[-1] or part[0][0].shape[0] != 1:
            raise SettingsError(
                f"the conditioning of part {number} has the shape {tuple(part[0][0].shape)}, but the whole image's "
                f"{tuple(whole[0][0].shape)}. Encode both with the same CLIP, a single text at a time."
            )
    texts = TileTexts(layout, tuple(p[0][0] for p in parts), tuple(p[0][1].get("pooled_output") for p in parts), mix)
    return [[entry[0], {**entry[1], TEXTS_KEY: texts}] for entry in whole]


def _hooked(conditioning: Conditioning) -> bool:
    return any("hooks" in entry[1] for entry in conditioning)


def tile_texts_of(cond: dict[str, Any]) -> TileTexts | None:
    """The parts' texts of one of ComfyUI's conditionings, where it has some and they act."""
    texts = cond.get(TEXTS_KEY)
    return texts if isinstance(texts, TileTexts) and texts.mix else None


def put_texts(
    cond: dict[str, Any], model_conds: dict[str, Any], grid: TileGrid, tiles: Sequence[Tile], images: int
) -> None:
    """Exchange the text among a tile's `model_conds` for the tiles' own, in place.

    Args:
        cond: of the whole image, with ComfyUI's `model_conds` for it.
        model_conds: the tiles', with size conditioning of their own.
        grid: of the step.
        tiles: of the U-Net call.
        images: rows of each tile.

    Raises:
        SettingsError: the MODEL takes no such text.
    """
    texts = tile_texts_of(cond)
    if texts is None or len(grid) == 1:
        return
    whole = cond["model_conds"].get("c_crossattn")
    if whole is None:
        raise SettingsError("FaithDiff Tile Conditioning: this MODEL takes no text embeddings. Connect an SDXL MODEL.")
    if not whole.cond.any():
        return  # ConditioningZeroOut takes the text away, and that of the parts with it.
    pooled, vector = None, cond["model_conds"].get("y")
    widths = {None if part is None else part.shape[-1] for part in texts.pooled}
    if vector is not None and None not in widths and "unclip_conditioning" not in cond:
        pooled = vector.cond[:, : widths.pop()]
    mixed, pooled = _rows_of_tiles(texts, grid, tiles, images, whole.cond, pooled)
    model_conds["c_crossattn"] = whole._copy_with(mixed)
    if pooled is not None:
        y = model_conds["y"]
        model_conds["y"] = y._copy_with(torch.cat([pooled.to(y.cond), y.cond[:, pooled.shape[1] :]], dim=1))


def _rows_of_tiles(
    texts: TileTexts, grid: TileGrid, tiles: Sequence[Tile], images: int, embeds: Tensor, pooled: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The texts of a U-Net call's rows, which are tile by tile, and image by image within a tile.

    Args:
        texts: of the parts.
        grid: of the step.
        tiles: of the call.
        images: rows of each tile.
        embeds, pooled: of the whole image, (1 or images, ...); pooled may be None.
    """
    rows = [texts.for_tile(tile, grid.height, grid.width, embeds, pooled) for tile in tiles]
    if len(tiles) == 1:
        return rows[0]
    joined = torch.cat([_rows(text, images) for text in same_length([text for text, _ in rows])])
    if pooled is None:
        return joined, None
    return joined, torch.cat([_rows(vector, images) for _, vector in rows if vector is not None])


def _rows(x: Tensor, images: int) -> Tensor:
    """One row for each image, as ComfyUI repeats what comes with fewer rows."""
    return x.repeat(-(-images // x.shape[0]), *[1] * (x.ndim - 1))[:images]
