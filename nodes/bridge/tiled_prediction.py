"""Tiles and LQ features for every sampler of ComfyUI.

One wrapper around ComfyUI's `calc_cond_batch` does both: it says which LQ features belong to which conditioning and
which part of the latent a U-Net call sees, and, where a MODEL asks for tiles, predicts tile by tile and merges the
predictions. A sampler never notices: it steps the whole latent. For samplers that are linear in the latent and the
predictions this equals the published code, which steps every tile and merges afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

import comfy.conds
import comfy.model_base
import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...faithdiff_core.errors import SettingsError
from ...faithdiff_core.sdxl import tile_time_ids
from ...faithdiff_core.tiling.grid import Tile, TileGrid
from .alignment_patch import find_patch, patch_among
from .graph_types import CONDITION_KEY, LQCondition
from .sampling_run import CallCondition, Tiling, run_of, set_up_run, with_run
from .step_progress import show_tiles

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

WRAPPER_KEY = "faithdiff"

LARGEST_AUTO_BATCH = 8
"""Most tiles in one U-Net call when the number is chosen by free memory; beyond it a GPU gains nothing."""

Conds = list[list[dict[str, Any]] | None]
Executor = Callable[..., Any]
Active = dict[UUID, tuple[LQCondition, float]]
"""The LQ condition of each conditioning that has one, and its strength in this step."""


def add_sampling_wrappers(model: ModelPatcher) -> None:
    """Put the sampling wrappers on a cloned MODEL, once."""
    for kind, wrapper in (
        (WrappersMP.PREPARE_SAMPLING, prepare_sampling),
        (WrappersMP.SAMPLER_SAMPLE, sampler_sample),
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
        (WrappersMP.APPLY_MODEL, apply_model),
    ):
        if not model.get_wrappers(kind, WRAPPER_KEY):
            model.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper)


def tiled(model: ModelPatcher, tiling: Tiling) -> ModelPatcher:
    """A MODEL that samples in tiles; the given one stays as it is."""
    clone = model.clone()
    add_sampling_wrappers(clone)
    set_up_run(clone, tiling=tiling)
    return clone


def prepare_sampling(executor: Executor, model: ModelPatcher, noise_shape: Sequence[int], *args: Any, **kw: Any) -> Any:
    """Wrapper: have ComfyUI reserve memory for what one U-Net call sees, not for the whole latent."""
    tiling = run_of(model.model_options["transformer_options"]).tiling
    if tiling is not None and len(noise_shape) == 4:
        batch, channels, height, width = noise_shape
        grids = tiling.grids(height, width)
        tiles = min(max(tiling.tile_batch, 1), len(grids))
        noise_shape = [batch * tiles, channels, grids.tile_height, grids.tile_width]
    return executor(model, noise_shape, *args, **kw)


def sampler_sample(
    executor: Executor, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], *args: Any, **kw: Any
) -> Any:
    """Wrapper around a sampler: give the run a `SamplingRun` of its own."""
    model_options = extra_args["model_options"]
    run = run_of(model_options.get("transformer_options", {}))
    extra_args = {**extra_args, "model_options": with_run(model_options, run.started(extra_args.get("seed") or 0))}
    return executor(guider, sigmas, extra_args, *args, **kw)


def calc_cond_batch(
    executor: Executor, model: BaseModel, conds: Conds, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> list[Tensor]:
    """Wrapper: predict with LQ features, and in tiles where the MODEL asks for them.

    Returns:
        One prediction for each entry of `conds`, of x_in's shape.
    """
    options = model_options.get("transformer_options", {})
    run = run_of(options)
    active = _active_conditions(model, conds, timestep)
    if run.tiling is None and not active:
        return executor(model, conds, x_in, timestep, model_options)
    if x_in.ndim != 4:
        raise SettingsError(
            f"FaithDiff: expected image latents of shape (batch, channels, height, width), got {tuple(x_in.shape)}. "
            f"Video models cannot be used."
        )
    _check_features(active, x_in)
    height, width = x_in.shape[-2:]
    copies_equal = not any(
        "control" in cond or "c_concat" in cond["model_conds"] for group in conds for cond in group or ()
    )
    if run.tiling is None:
        call = run.calling(_call_conditions(active, conds, (Tile(0, 0, height, width),)), copies_equal)
        return executor(model, conds, x_in, timestep, with_run(model_options, call))

    grid = run.tiling.grids(height, width, run.seed).at(float(timestep[0]))
    patch = patch_among(options)
    if patch is not None:
        patch.keep_for(grid, x_in.device)
    images = x_in.shape[0]
    outs = [torch.zeros_like(x_in) for _ in conds]
    done = 0
    for tiles in grid.batches(_tiles_per_call(model, run.tiling, grid, conds, x_in)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        show_tiles(run.progress, done + 1, done + len(tiles), len(grid))
        tile_conds = [None if group is None else _tile_conds(model, group, grid, tiles, images) for group in conds]
        call = run.calling(_call_conditions(active, tile_conds, tiles), copies_equal)
        x = torch.cat([tile.crop(x_in) for tile in tiles])
        with run.hints.cropped(tile_conds, (height, width), tiles, images):
            predictions = executor(model, tile_conds, x, timestep.repeat(len(tiles)), with_run(model_options, call))
        for out, prediction in zip(outs, predictions, strict=True):
            for tile, part in zip(tiles, prediction.split(images), strict=True):
                grid.merge(out, tile, part)
        done += len(tiles)
        if run.progress is not None:
            run.progress.tiles_done(done)
    return outs


def apply_model(
    executor: Executor,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None,
    c_crossattn: Tensor | None,
    control: Any,
    transformer_options: dict[str, Any],
    **arguments: Any,
) -> Tensor:
    """Wrapper around ComfyUI's `apply_model`: give the alignment patch what this U-Net call needs."""

    def call_unet() -> Tensor:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **arguments)

    patch = patch_among(transformer_options)
    run = run_of(transformer_options)
    if patch is None or not run.conditions:
        return call_unet()
    conditions = [run.conditions.get(uuid) for uuid in transformer_options["uuids"]]
    # A patch in front of ours may treat the conditionings' rows differently.
    is_first = transformer_options["patches"]["input_block_patch"][0] is patch
    dtype = executor.class_obj.get_dtype_inference()  # type: ignore[attr-defined]
    rows = x.shape[0] // len(conditions)
    parts = patch.parts(conditions, run.copies_equal and is_first, rows, x.device, dtype)
    if not parts:
        return call_unet()
    with patch.running(parts, x.device):
        return call_unet()


def _active_conditions(model: BaseModel, conds: Conds, timestep: Tensor) -> Active:
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
    active: Active = {}
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


def _check_features(active: Active, x_in: Tensor) -> None:
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


def _call_conditions(active: Active, conds: Conds, tiles: Sequence[Tile]) -> dict[UUID, CallCondition]:
    """The LQ conditions of a U-Net call that sees these tiles."""
    conditions = {}
    for group in conds:
        for cond in group or ():
            if cond["uuid"] in active:
                condition, strength = active[cond["uuid"]]
                seen = tuple(_seen(tile, cond.get("area")) for tile in tiles)
                conditions[cond["uuid"]] = CallCondition(condition.features, seen, strength)
    return conditions


def _seen(tile: Tile, area: Sequence[int] | None) -> Tile:
    """What the U-Net sees of a tile: all of it, or an area (height, width, top, left within the tile)."""
    if area is None:
        return tile
    height, width, top, left = area
    size = min(height, tile.height - top), min(width, tile.width - left)
    return Tile(tile.top + top, tile.left + left, *size)


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
        ids = tile_time_ids(grid.height, grid.width, tile.top, tile.left, grid.tile_pixels)
        embedded = model.embedder(torch.tensor(ids, dtype=torch.float32)).flatten()
        embedded = embedded.to(y).expand(y.shape[0], -1)
        out.append(torch.cat([y[:, : y.shape[1] - embedded.shape[1]], embedded], dim=1))
    if len(out) == 1:
        return out[0]
    return torch.cat([_rows_of(rows, images) for rows in out])
