"""Tiles and LQ features for every sampler of the host.

One wrapper around the host's `calc_cond_batch` does both: it hands the alignment patch what it needs to know, and,
where a MODEL asks for tiles, predicts tile by tile and merges the predictions. A sampler never notices: it steps the
whole latent. For samplers that are linear in the latent and the predictions this equals the published code, which
steps every tile and merges afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import comfy.conds
import comfy.model_base
import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...faithdiff_core.errors import SettingsError
from ...faithdiff_core.tiling.grid import Tile, TileGrid, check_overlap, check_tile_size
from .alignment_patch import PLAN_KEY, LQChunk, StepPlan, apply_model, find_patch
from .control_hints import ControlHints
from .graph_types import CONDITION_KEY, LQCondition
from .step_progress import PROGRESS_KEY, TileProgress, show_tiles

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

WRAPPER_KEY = "faithdiff"
TILING_KEY = "faithdiff_tiling"
"""Where a MODEL's transformer options carry its `Tiling`."""

HINTS_KEY = "faithdiff_hints"
"""Where the transformer options of a sampling run carry its `ControlHints`."""

LARGEST_AUTO_BATCH = 8
"""Most tiles in one U-Net call when the number is chosen by free memory; beyond it a GPU gains nothing."""

Conds = list[list[dict[str, Any]] | None]
Executor = Callable[..., Any]


@dataclass(frozen=True)
class Tiling:
    """How a MODEL samples in tiles.

    Attributes:
        tile_size: tile side in pixels, a multiple of 8 from 64.
        overlap: real overlap, 0 to 0.9.
        tile_batch: tiles in one U-Net call; 0 for as many as fit.
    """

    tile_size: int
    overlap: float
    tile_batch: int = 0

    def __post_init__(self) -> None:
        check_tile_size(self.tile_size)
        check_overlap(self.overlap)
        if self.tile_batch < 0:
            raise SettingsError(f"tile_batch must be 0 (as many as fit) or more, got {self.tile_batch}.")

    def grid(self, height: int, width: int) -> TileGrid:
        """The tiles of a latent of this size."""
        return TileGrid(height, width, self.tile_size, self.overlap)


def add_sampling_wrappers(model: ModelPatcher) -> None:
    """Put the sampling wrappers on a MODEL of one's own (a clone), once."""
    for kind, wrapper in (
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
        (WrappersMP.PREPARE_SAMPLING, prepare_sampling),
        (WrappersMP.APPLY_MODEL, apply_model),
    ):
        if not model.get_wrappers(kind, WRAPPER_KEY):
            model.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper)


def set_tiling(model: ModelPatcher, tiling: Tiling) -> None:
    """Make a MODEL of one's own (a clone) sample in tiles."""
    add_sampling_wrappers(model)
    model.model_options["transformer_options"][TILING_KEY] = tiling


def prepare_sampling(executor: Executor, model: ModelPatcher, noise_shape: Sequence[int], *args: Any, **kw: Any) -> Any:
    """Wrapper: have the host reserve memory for what one U-Net call sees, not for the whole latent."""
    tiling: Tiling | None = model.model_options["transformer_options"].get(TILING_KEY)
    if tiling is not None and len(noise_shape) == 4:
        batch, channels, height, width = noise_shape
        grid = tiling.grid(height, width)
        tiles = min(max(tiling.tile_batch, 1), len(grid))
        noise_shape = [batch * tiles, channels, grid.tile_height, grid.tile_width]
    return executor(model, noise_shape, *args, **kw)


def calc_cond_batch(
    executor: Executor, model: BaseModel, conds: Conds, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> list[Tensor]:
    """Wrapper: predict with LQ features, and in tiles where the MODEL asks for them.

    Returns:
        One prediction for each entry of `conds`, of x_in's shape.
    """
    options = model_options.get("transformer_options", {})
    tiling: Tiling | None = options.get(TILING_KEY)
    active = _active_conditions(model, conds, timestep)
    if tiling is None and not active:
        return executor(model, conds, x_in, timestep, model_options)
    if x_in.ndim != 4:
        raise SettingsError(
            f"FaithDiff: expected image latents of shape (batch, channels, height, width), got {tuple(x_in.shape)}. "
            f"Video models cannot be used."
        )
    _check_features(active, x_in)
    height, width = x_in.shape[-2:]
    shareable = not any(
        "control" in cond or "c_concat" in cond["model_conds"] for group in conds for cond in group or ()
    )
    if tiling is None:
        whole = Tile(0, 0, 0, 0, height, width)
        plan = _plan(active, conds, (whole,), shareable)
        return executor(model, conds, x_in, timestep, _with_plan(model_options, plan))

    grid = tiling.grid(height, width)
    images = x_in.shape[0]
    outs = [torch.zeros_like(x_in) for _ in conds]
    # The options belong to one sampling run: hints enlarged at its first step serve the others.
    hints: ControlHints = options.setdefault(HINTS_KEY, ControlHints(height, width))
    progress: TileProgress | None = options.get(PROGRESS_KEY)
    done = 0
    for tiles in grid.batches(_tiles_per_call(model, tiling, grid, conds, x_in)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        show_tiles(progress, done + 1, done + len(tiles), len(grid))
        tile_conds = [None if group is None else _tile_conds(model, group, grid, tiles, images) for group in conds]
        plan = _plan(active, tile_conds, tiles, shareable)
        x = torch.cat([tile.crop(x_in) for tile in tiles])
        with hints.cropped(tile_conds, tiles, images):
            predictions = executor(model, tile_conds, x, timestep.repeat(len(tiles)), _with_plan(model_options, plan))
        for out, prediction in zip(outs, predictions, strict=True):
            for tile, part in zip(tiles, prediction.split(images), strict=True):
                grid.merge(out, tile, part)
        done += len(tiles)
        if progress is not None:
            progress.tiles_done(done)
    return outs


def _active_conditions(model: BaseModel, conds: Conds, timestep: Tensor) -> dict[UUID, tuple[LQCondition, float]]:
    """Which LQ features act on which conditioning in this step, and how strongly.

    LQ features tell of the image, not of a prompt. Where all that there is comes from one FaithDiffConditioning, it
    therefore holds for conditionings that did not pass through it too, such as the empty one of perpendicular guidance:
    guidance compares predictions, and these must be about the same image.
    """
    own = {cond["uuid"]: cond[CONDITION_KEY] for group in conds for cond in group or () if CONDITION_KEY in cond}
    if not own:
        return {}
    distinct = {id(condition): condition for condition in own.values()}
    common = next(iter(distinct.values())) if len(distinct) == 1 else None
    sampling = model.model_sampling
    sigma = float(timestep[0]) if any(condition.ranged for condition in own.values()) else 0.0
    active: dict[UUID, tuple[LQCondition, float]] = {}
    for group in conds:
        for cond in group or ():
            condition = own.get(cond["uuid"], common)
            if condition is not None:
                active[cond["uuid"]] = (
                    condition,
                    condition.strength_at(sigma, sampling) if condition.ranged else condition.strength,
                )
    patcher = getattr(model, "current_patcher", None)
    if patcher is not None and find_patch(patcher) is None:
        raise SettingsError(
            "FaithDiff: the conditioning carries LQ features, but this MODEL has no alignment to use them. Connect the "
            "MODEL that FaithDiff Model Loader gives."
        )
    return active


def _check_features(active: dict[UUID, tuple[LQCondition, float]], x_in: Tensor) -> None:
    for condition, _ in active.values():
        features = condition.features
        height, width = x_in.shape[-2:]
        if features.size != (height, width):
            raise SettingsError(
                f"FaithDiff: the LQ features are of an image of {features.size[1] * 8} x {features.size[0] * 8} "
                f"pixels, but the latent is one of {width * 8} x {height * 8}. Make both from the same prepared image."
            )
        if features.tensor.shape[0] not in (1, x_in.shape[0]):
            raise SettingsError(
                f"FaithDiff: there are LQ features of {features.tensor.shape[0]} images, but {x_in.shape[0]} "
                "latents. Encode as many images as there are latents, or one for all."
            )


def _plan(
    active: dict[UUID, tuple[LQCondition, float]], conds: Conds, tiles: Sequence[Tile], shareable: bool
) -> StepPlan:
    plan = StepPlan(shareable=shareable)
    for group in conds:
        for cond in group or ():
            if cond["uuid"] in active:
                condition, strength = active[cond["uuid"]]
                boxes = tuple(_box(tile, cond.get("area")) for tile in tiles)
                plan.chunks[cond["uuid"]] = LQChunk(condition.features, boxes, strength)
    return plan


def _box(tile: Tile, area: Sequence[int] | None) -> tuple[int, int, int, int]:
    """What the U-Net sees of a tile: all of it, or an area (height, width, top, left within the tile)."""
    if area is None:
        return tile.top, tile.left, tile.height, tile.width
    height, width, top, left = area
    return tile.top + top, tile.left + left, min(height, tile.height - top), min(width, tile.width - left)


def _with_plan(model_options: dict[str, Any], plan: StepPlan) -> dict[str, Any]:
    options = {**model_options.get("transformer_options", {}), PLAN_KEY: plan}
    return {**model_options, "transformer_options": options}


def _tiles_per_call(model: BaseModel, tiling: Tiling, grid: TileGrid, conds: Conds, x_in: Tensor) -> int:
    """How many tiles go through the U-Net at once."""
    if any("area" in cond for group in conds for cond in group or ()):
        return 1  # An area lies differently in every tile, and a call has one shape.
    if tiling.tile_batch:
        return tiling.tile_batch
    if comfy.model_management.is_device_cpu(x_in.device):
        return 1  # A processor is busy with one tile.
    free = model.current_patcher.get_free_memory(x_in.device)
    rows = x_in.shape[0] * sum(1 for group in conds if group)
    size = min(len(grid), LARGEST_AUTO_BATCH)
    while size > 1:
        shape = [size * rows, x_in.shape[1], grid.tile_height, grid.tile_width]
        # The factor is the host's own reserve when it decides what to batch.
        if model.memory_required(shape) * 1.5 < free:
            break
        size -= 1
    return size


def _tile_conds(
    model: BaseModel, group: Sequence[dict[str, Any]], grid: TileGrid, tiles: Sequence[Tile], images: int
) -> list[dict[str, Any]]:
    """Conditionings as the tiles need them; those whose area lies outside are left out."""
    out = []
    for cond in group:
        tile_cond = dict(cond)
        if "area" in cond:
            area = _area_in_tile(cond["area"], tiles[0])
            if area is None:
                continue
            tile_cond["area"] = area
        if "mask" in cond:
            tile_cond["mask"] = _tile_rows(cond["mask"], tiles, images)
        model_conds = dict(cond["model_conds"])
        for name, value in model_conds.items():
            if isinstance(value, comfy.conds.CONDNoiseShape):
                model_conds[name] = value._copy_with(_tile_rows(value.cond, tiles, images))
        if isinstance(model, comfy.model_base.SDXL) and "y" in model_conds:
            y = model_conds["y"]
            model_conds["y"] = y._copy_with(_tile_size_conditioning(model, y.cond, grid, tiles, images))
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


def _tile_rows(x: Tensor, tiles: Sequence[Tile], images: int) -> Tensor:
    """The tiles' crops of (N, ..., H, W), one below the other as the rows of a call are."""
    if len(tiles) == 1:
        return tiles[0].crop(x)
    return torch.cat([_rows_of(tile.crop(x), images) for tile in tiles])


def _rows_of(x: Tensor, images: int) -> Tensor:
    """One row for each image, as the host repeats what comes with fewer rows."""
    repeats = -(-images // x.shape[0])
    return x.repeat(repeats, *[1] * (x.ndim - 1))[:images]


def _tile_size_conditioning(model: BaseModel, y: Tensor, grid: TileGrid, tiles: Sequence[Tile], images: int) -> Tensor:
    """SDXL's vector conditioning with the published size conditioning of each tile.

    The vector is the pooled text followed by the embeddings of six numbers.
    """
    out = []
    for tile in tiles:
        embedded = model.embedder(torch.tensor(grid.time_ids(tile), dtype=torch.float32)).flatten()
        embedded = embedded.to(y).expand(y.shape[0], -1)
        out.append(torch.cat([y[:, : y.shape[1] - embedded.shape[1]], embedded], dim=1))
    if len(out) == 1:
        return out[0]
    return torch.cat([_rows_of(rows, images) for rows in out])
