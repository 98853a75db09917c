"""Tiles and LQ features for every sampler of ComfyUI.

One wrapper around ComfyUI's `calc_cond_batch` does both: it says which LQ features belong to which conditioning and
which part of the latent a U-Net call sees, and, where a MODEL asks for tiles, predicts tile by tile and merges the
predictions. A sampler never notices: it steps the whole latent. For samplers that are linear in the latent and the
predictions this equals the published code, which steps every tile and merges afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...faithdiff_core.errors import SettingsError
from ...faithdiff_core.tiling.grid import Tile, TileGrid
from .active_conditions import (
    Conds,
    active_conditions,
    call_conditions,
    carries_lq,
    check_channels,
    check_encoded,
    check_features,
    other_tiler,
    without_lq,
)
from .alignment_patch import find_patch, patch_among
from .executing_node import refuse_nodes_that_cut
from .lq_conditioning import NO_ALIGNMENT
from .noise_mask import mask_of
from .sampling_run import SamplingRun, Tiling, run_of, set_up_run, with_run
from .step_progress import show_tiles
from .tile_conds import tile_conds
from .tile_state import TileState

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

    from .attribution import AttributionRecord

WRAPPER_KEY = "faithdiff"

LARGEST_AUTO_BATCH = 8
"""Most tiles in one U-Net call when the number is chosen by free memory; beyond it a GPU gains nothing."""

Executor = Callable[..., Any]


def add_sampling_wrappers(model: ModelPatcher) -> None:
    """Put the sampling wrappers on a cloned MODEL, once."""
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer_sample),
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


def recorded(model: ModelPatcher, record: AttributionRecord) -> ModelPatcher:
    """A MODEL whose sampling runs are recorded; the given one stays as it is."""
    clone = model.clone()
    add_sampling_wrappers(clone)
    set_up_run(clone, record=record)
    return clone


def outer_sample(
    executor: Executor,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    *rest: Any,
    **more: Any,
) -> Any:
    """Wrapper around all of sampling: what the noise mask leaves out comes back as it was given.

    A recording remembers the result, by which the map knows it.
    """
    guider = executor.class_obj  # type: ignore[attr-defined]
    options = guider.model_options
    run = run_of(options.get("transformer_options", {}))
    mask = mask_of(sampler, run.tiling is not None, denoise_mask)
    if mask is None:
        result = executor(noise, latent_image, sampler, sigmas, denoise_mask, *rest, **more)
        return result if run.record is None else run.record.ended(result)
    # Asked before: uni_pc replaces the last level, in place.
    to_the_end = float(sigmas[-1]) == 0.0
    guider.model_options = with_run(options, replace(run, mask=mask))
    try:
        result = executor(noise, latent_image, sampler, sigmas, denoise_mask, *rest, **more)
    finally:
        guider.model_options = options
    # Sampling that stops at a noise level leaves noise everywhere, for another run to go on with.
    result = mask.kept(latent_image, result) if to_the_end else result
    return result if run.record is None else run.record.ended(result)


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
    executor: Executor,
    guider: Any,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Any,
    noise: Tensor,
    *rest: Any,
) -> Any:
    """Wrapper around a sampler: give the run a `SamplingRun` of its own.

    Raises:
        SettingsError: something in the graph cannot be sampled as asked.
    """
    model_options = _ours_first(extra_args["model_options"])
    run = run_of(model_options.get("transformer_options", {}))
    prompts = tuple(getattr(guider, "conds", {}).values())
    if carries_lq(prompts):
        refuse_nodes_that_cut()
    state = None
    if run.tiling is not None and noise.ndim == 4:
        tiles = len(run.tiling.grids(*noise.shape[-2:]))
        if tiles > 1:
            state = TileState(model_options)
            state.refuse_what_guidance_reads(tiles)
    if run.mask is not None:
        model_options = run.mask.begin(guider, model_options)
    run = run.started(extra_args.get("seed") or 0, state, prompts)
    extra_args = {**extra_args, "model_options": with_run(model_options, run)}
    if run.record is None:
        return executor(guider, sigmas, extra_args, callback, noise, *rest)
    masked = run.mask is not None or run.only is not None
    with run.record.run(guider, tiled=state is not None, masked=masked):
        return executor(guider, sigmas, extra_args, callback, noise, *rest)


def _ours_first(model_options: dict[str, Any]) -> dict[str, Any]:
    """Model options in which other wrappers around the prediction are called for each tile, as for a whole latent."""
    options = model_options.get("transformer_options", {})
    wrappers = dict(options.get("wrappers", {}))
    by_key = wrappers.get(WrappersMP.CALC_COND_BATCH, {})
    if WRAPPER_KEY in by_key:
        wrappers[WrappersMP.CALC_COND_BATCH] = {WRAPPER_KEY: by_key[WRAPPER_KEY], **by_key}
    return {**model_options, "transformer_options": {**options, "wrappers": wrappers}}


def calc_cond_batch(
    executor: Executor, model: BaseModel, conds: Conds, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> list[Tensor]:
    """Wrapper: predict with LQ features, and in tiles where the MODEL asks for them.

    Returns:
        One prediction for each entry of `conds`, of x_in's shape.
    """
    options = model_options.get("transformer_options", {})
    run = run_of(options)
    patcher = getattr(model, "current_patcher", None)
    if carries_lq(conds) and patcher is not None and find_patch(patcher) is None:
        raise SettingsError(NO_ALIGNMENT)
    active = active_conditions(conds, run.prompts, timestep, model.model_sampling)
    conds = without_lq(conds)
    step = None if run.record is None else run.record.step(conds, x_in, timestep)
    if run.tiling is None and not active and step is None:
        return executor(model, conds, x_in, timestep, model_options)
    if x_in.ndim != 4:
        raise SettingsError(
            f"FaithDiff: expected image latents of shape (batch, channels, height, width), got {tuple(x_in.shape)}. "
            f"Video models cannot be used."
        )
    check_channels(x_in, model)
    patch = patch_among(options)
    check_features(active, x_in, None if patch is None else patch.backbone)
    height, width = x_in.shape[-2:]
    copies_equal = not any(
        "control" in cond or "c_concat" in cond["model_conds"] for group in conds for cond in group or ()
    )
    if run.tiling is None:
        whole = (Tile(0, 0, height, width),)
        check_encoded(active, whole)
        calls = None if step is None else step.of(conds, whole, None)
        call = run.calling(call_conditions(active, conds, whole), copies_equal, calls)
        return executor(model, conds, x_in, timestep, with_run(model_options, call))

    grid = run.tiling.grid(height, width, run.seed, float(timestep[0]), run.only)
    if patch is not None:
        patch.keep_for(grid, x_in.device)
    images = x_in.shape[0]
    outs = [torch.zeros_like(x_in) for _ in conds]
    needed = grid.tiles if run.mask is None else run.mask.touched(grid.tiles, (height, width))
    check_encoded(active, needed)
    at_once = _tiles_per_call(model, run, grid, conds, x_in)
    done = 0
    if run.state is not None:
        run.state.keep_for(grid.tiles)
    while done < len(needed):
        comfy.model_management.throw_exception_if_processing_interrupted()
        alone = run.state is not None and run.state.one_by_one()
        tiles = needed[done : done + (1 if alone else at_once)]
        show_tiles(run.progress, done + 1, done + len(tiles), len(needed))
        cut = [None if group is None else tile_conds(model, group, grid, tiles, images) for group in conds]
        calls = None if step is None else step.of(cut, tiles, grid)
        call = run.calling(call_conditions(active, cut, tiles), copies_equal, calls)
        x = torch.cat([tile.crop(x_in) for tile in tiles])
        with ExitStack() as stack:
            stack.enter_context(run.hints.cropped(cut, (height, width), tiles, images))
            if run.state is not None:
                stack.enter_context(run.state.of(tiles, (height, width), len(grid)))
            predictions = executor(model, cut, x, timestep.repeat(len(tiles)), with_run(model_options, call))
        for out, prediction in zip(outs, predictions, strict=True):
            for tile, part in zip(tiles, prediction.split(images), strict=True):
                grid.merge(out, tile, part)
        done += len(tiles)
        if run.progress is not None:
            run.progress.tiles_done(done, len(needed))
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
    """Wrapper around ComfyUI's `apply_model`: give the alignment patch what this U-Net call needs, and record it."""

    run = run_of(transformer_options)

    def call_unet() -> Tensor:
        calls = run.recorded
        with nullcontext() if calls is None else calls.call(transformer_options["uuids"], x):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **arguments)

    patch = patch_among(transformer_options)
    if patch is None or not run.conditions:
        return call_unet()
    conditions = [run.conditions.get(uuid) for uuid in transformer_options["uuids"]]
    for condition in conditions:
        seen, got = condition.tiles[0] if condition is not None else None, (x.shape[-2], x.shape[-1])
        if seen is not None and (seen.height, seen.width) != got:
            raise SettingsError(other_tiler(seen, got))
    # A patch in front of ours may treat the conditionings' rows differently.
    is_first = transformer_options["patches"]["input_block_patch"][0] is patch
    dtype = executor.class_obj.get_dtype_inference()  # type: ignore[attr-defined]
    rows = x.shape[0] // len(conditions)
    parts = patch.parts(conditions, run.copies_equal and is_first, rows, x.device, dtype)
    if not parts:
        return call_unet()
    with patch.running(parts, x.device):
        return call_unet()


def _tiles_per_call(model: BaseModel, run: SamplingRun, grid: TileGrid, conds: Conds, x_in: Tensor) -> int:
    """How many tiles go through the U-Net at once."""
    each = [cond for group in conds for cond in group or ()]
    if any("area" in cond or "gligen" in cond for cond in each) or run.hints.have_masks(conds):
        return 1  # An area or a box lies differently in every tile, and a call has one shape and one set of boxes.
    if run.tiling is not None and run.tiling.tile_batch:
        return run.tiling.tile_batch
    if comfy.model_management.is_device_cpu(x_in.device):
        return 1  # On a CPU, several tiles in a call gain nothing.
    free = model.current_patcher.get_free_memory(x_in.device)
    rows = x_in.shape[0] * sum(1 for group in conds if group)
    size = min(len(grid), LARGEST_AUTO_BATCH)
    while size > 1:
        shape = [size * rows, x_in.shape[1], grid.tile_height, grid.tile_width]
        # The factor is the reserve that ComfyUI keeps when it decides what to batch.
        if model.memory_required(shape) * 1.5 < free:
            break
        size -= 1
    return size
