"""Rows of the engine on diffusers: the price over SDXL, and the gain over the published loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from faithdiff_core.backbone import tile_time_ids
from faithdiff_core.engine import FaithDiffPipeline, TextConditioning, make_scheduler
from faithdiff_core.images.color import fix_colors
from faithdiff_core.sampling.schedule import DEFAULT_CFG, StartPoint
from faithdiff_core.tiling.grid import TileGrid, gaussian_weights

from . import models
from .measure import Spread, held_bytes, interleaved, peak_bytes
from .results import Result, Target, memory, missing, timed
from .rows_core import STEPS, shared_unet
from .settings import PUBLISHED_SIZE, SCALE, Settings
from .shared import release

PUBLISHED_PEAK = 9301
"""MiB at 1024 px in fp16 (paper, Table 7)."""


def _pipeline(settings: Settings) -> FaithDiffPipeline:
    """The engine on random weights; texts come as embeddings, so there are no text encoders."""
    from diffusers import StableDiffusionXLPipeline

    sdxl = StableDiffusionXLPipeline(
        vae=models.vae(settings.device, settings.vae_dtype),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=shared_unet(settings.device, settings.dtype),
        scheduler=make_scheduler(),
        add_watermarker=False,
    )
    sdxl.set_progress_bar_config(disable=True)
    lq_encoder = models.lq_encoder(settings.device, settings.vae_dtype)
    alignment = models.alignment(settings.device, settings.dtype)
    return FaithDiffPipeline(sdxl, lq_encoder, alignment, device=settings.device)


def text_rows(settings: Settings) -> TextConditioning:
    """Random text embeddings of a prompt and a negative prompt."""
    made: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
    inputs = models.unet_inputs(2, 8, **made)
    embeds, pooled = inputs["encoder_hidden_states"], inputs["added_cond_kwargs"]["text_embeds"]
    return TextConditioning(embeds[:1], pooled[:1], embeds[1:], pooled[1:])


def composed(parts: Mapping[str, Spread], steps: int, names: tuple[str, ...], sampling: str) -> Spread:
    """Seconds of a whole run of `STEPS` steps, from parts measured in the same rounds."""
    whole = parts[sampling].times(STEPS / steps)
    for name in names:
        whole = whole.plus(parts[name])
    return whole


def restoration(settings: Settings) -> Iterator[Result]:
    """A restoration against plain SDXL sampling of the same steps and size."""
    pipeline = _pipeline(settings)
    text = text_rows(settings)
    weights = held_bytes(settings.device) if not settings.on_cpu else 0
    for size in settings.loop_sizes:
        side = size // SCALE
        pixels = torch.rand(1, 3, size, size) * 2 - 1
        noise = torch.randn(1, 4, side, side)
        features = pipeline.encode_lq(pixels)
        latent = pipeline.encode_latent(pixels)

        def ours(features: Tensor = features, noise: Tensor = noise, latent: Tensor = latent) -> Tensor:
            return pipeline.sample(features, text, noise, lq_latent=latent, steps=settings.steps)

        def plain(noise: Tensor = noise, size: int = size) -> Any:
            return plain_sdxl(pipeline.base, text, noise, size, settings.steps)

        times = interleaved(
            settings,
            {
                "ours": ours,
                "plain": plain,
                "LQ encode": partial(pipeline.encode_lq, pixels),
                "VAE encode": partial(pipeline.encode_latent, pixels),
                "decode": partial(pipeline.decode, latent),
                "colour": partial(fix_colors, pixels, pixels, "adain"),
            },
            settings.close_rounds,
        )
        case = f"{size} px, {settings.dtype_name}"
        yield timed(
            "engine",
            f"sampling, {settings.steps} steps, {case}",
            times["ours"],
            times["plain"],
            "plain SDXL sampling",
            target=Target("<=", 1.03),
        )
        whole = composed(times, settings.steps, ("LQ encode", "VAE encode", "decode", "colour"), "ours")
        peer = composed(times, settings.steps, ("decode",), "plain")
        yield timed(
            "engine",
            f"whole restoration, {STEPS} steps, {case}",
            whole,
            peer,
            "plain SDXL sampling and decode",
            target=Target("<=", 1.10),
            note="" if settings.steps == STEPS else f"composed of parts; sampling measured with {settings.steps} steps",
        )
        if settings.on_cpu:
            continue
        peak = peak_bytes(settings.device, partial(_whole, pipeline, pixels, text, settings.steps))
        target = Target("<=", PUBLISHED_PEAK) if size == PUBLISHED_SIZE else None
        yield memory("engine", f"peak with weights, {case}", weights + peak, None, target=target)
    if settings.on_cpu:
        yield missing("engine", "peak at 1024 px, fp16", "needs a GPU", Target("<=", PUBLISHED_PEAK))
        yield missing("engine", "peak at 1024 px, offload", "needs a GPU", Target("<=", 6000))
        yield missing("engine", "growth of the peak up to 8192 px, bytes a pixel", "needs a GPU", Target("<=", 60))
        return
    yield from _growth(settings, pipeline, text)
    yield from _offloaded(settings, text)


def _whole(pipeline: FaithDiffPipeline, pixels: Tensor, text: TextConditioning, steps: int, tile: int = 1024) -> Tensor:
    features = pipeline.encode_lq(pixels)
    latent = pipeline.encode_latent(pixels, tile)
    noise = torch.randn(latent.shape)
    sampled = pipeline.sample(features, text, noise, lq_latent=latent, steps=steps, tile=tile)
    return fix_colors(pipeline.decode(sampled, tile), pixels, "adain")


def plain_sdxl(sdxl: Any, text: TextConditioning, noise: Tensor, size: int, steps: int) -> Tensor:
    """Plain SDXL sampling by diffusers' own pipeline."""
    latent: Tensor = sdxl(
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=DEFAULT_CFG,
        prompt_embeds=text.embeds,
        pooled_prompt_embeds=text.pooled,
        negative_prompt_embeds=text.negative_embeds,
        negative_pooled_prompt_embeds=text.negative_pooled,
        latents=noise.to(text.embeds),
        output_type="latent",
        return_dict=False,
    )[0]
    return latent


def _growth(settings: Settings, pipeline: FaithDiffPipeline, text: TextConditioning) -> Iterator[Result]:
    """How the peak grows with the pixels, one step being as good as twenty."""
    peaks = {}
    for size in (1024, 2048, 4096, 8192):
        pixels = torch.rand(1, 3, size, size) * 2 - 1
        peaks[size] = peak_bytes(settings.device, partial(_whole, pipeline, pixels, text, 1))
        yield memory("engine", f"peak beyond the weights, {size} px, tiles of 1024", peaks[size], None)
    grown = (peaks[8192] - peaks[1024]) / (8192**2 - 1024**2)
    yield Result(
        "engine", "growth of the peak up to 8192 px", "bytes a pixel", Spread((grown,)), target=Target("<=", 60)
    )


def _offloaded(settings: Settings, text: TextConditioning) -> Iterator[Result]:
    target = Target("<=", 6000)
    case = f"peak at 1024 px, {settings.dtype_name}, offload `model`"
    if settings.device.type != "cuda":
        yield missing("engine", case, "needs CUDA", target)
        return
    release("diffusers")
    cpu = torch.device("cpu")
    from diffusers import StableDiffusionXLPipeline

    sdxl = StableDiffusionXLPipeline(
        vae=models.vae(cpu, settings.vae_dtype),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=models.unet(cpu, settings.dtype),
        scheduler=make_scheduler(),
        add_watermarker=False,
    )
    sdxl.set_progress_bar_config(disable=True)
    pipeline = FaithDiffPipeline(
        sdxl,
        models.lq_encoder(cpu, settings.vae_dtype),
        models.alignment(cpu, settings.dtype),
        device=settings.device,
        offload="model",
    )
    pixels = torch.rand(1, 3, 1024, 1024) * 2 - 1
    held = held_bytes(settings.device)
    peak = peak_bytes(settings.device, lambda: _whole(pipeline, pixels, text, settings.steps))
    yield memory("engine", case, held + peak, None, target=target)


def published_loop(settings: Settings) -> Iterator[Result]:
    """The engine's sampling loop against the published one."""
    pipeline = _pipeline(settings)
    alignment = models.published_alignment(settings.device, settings.dtype)
    text = text_rows(settings)
    if settings.on_cpu:
        tile = settings.loop_tile
        cases: list[tuple[int, int, Target | None]] = [(tile, tile, None), (tile * 3 // 2, tile, None)]
    else:
        cases = [(1024, 1024, Target("<=", 0.95)), (4096, 1024, Target("<=", 0.85))]
    for size, tile, target in cases:
        side = size // SCALE
        noise = torch.randn(1, 4, side, side)
        features = torch.randn(1, models.ALIGNMENT.feature_channels, side, side, dtype=settings.vae_dtype)
        steps = settings.steps if size == tile else 1
        # What stays the same from one step to the next shows with two.
        steps = max(2, steps) if settings.on_cpu and size == tile else steps
        times = interleaved(
            settings,
            {
                "ours": partial(pipeline.sample, features, text, noise, steps=steps, start=StartPoint.NOISE, tile=tile),
                "published": partial(published_sample, pipeline, alignment, features, text, noise, steps, tile),
            },
        )
        tiles = len(TileGrid(side, side, tile))
        yield timed(
            "published-loop",
            f"{steps} steps, {size} px, {tiles} tile(s) of {tile}, {settings.dtype_name}",
            times["ours"],
            times["published"],
            "published loop",
            target=target,
            note="sizes that a CPU can run, instead of 1024 and 4096 px" if settings.on_cpu else "",
        )


@torch.no_grad()
def published_sample(
    pipeline: FaithDiffPipeline,
    alignment: Any,
    features: Tensor,
    text: TextConditioning,
    noise: Tensor,
    steps: int,
    tile: int,
) -> Tensor:
    """Sampling in the order of the published code: each tile in a separate call, with a deep copy of the
    scheduler, its condition embedded at every step, and the stepped tiles merged and divided by the sum of weights.

    Returns:
        The latent, (1, 4, h, w).
    """
    device, dtype = pipeline.device, pipeline.dtype
    height, width = noise.shape[-2:]
    grid = TileGrid(height, width, tile)
    scheduler = make_scheduler()
    scheduler.set_timesteps(steps, device=device)
    x = noise.to(device, torch.float32) * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    schedulers = [copy.deepcopy(scheduler) for _ in grid.tiles]
    weights = gaussian_weights(grid.tile_height, grid.tile_width).to(device, torch.float32)
    embeds, pooled = text.guided_rows([(0, grid.tiles[0])], [grid])
    crop: list[Tensor] = []
    handle = pipeline.base.unet.conv_in.register_forward_hook(lambda module, inputs, h: alignment(h, crop[0]))
    try:
        for t in scheduler.timesteps:
            total, count = torch.zeros_like(x), torch.zeros_like(x)
            for one, own in zip(grid.tiles, schedulers, strict=True):
                latent = one.crop(x)
                crop[:] = [one.crop(features).to(device, dtype).repeat(2, 1, 1, 1)]
                ids = tile_time_ids(grid.height, grid.width, one.top, one.left, grid.tile_pixels)
                time_ids = torch.tensor([ids] * 2, device=device, dtype=dtype)
                eps = pipeline.base.unet(
                    own.scale_model_input(latent.repeat(2, 1, 1, 1), t).to(dtype),
                    t,
                    encoder_hidden_states=embeds,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
                    return_dict=False,
                )[0].float()
                negative, positive = eps.chunk(2)
                stepped = own.step(negative + DEFAULT_CFG * (positive - negative), t, latent, return_dict=False)[0]
                one.crop(total).add_(stepped * weights)
                one.crop(count).add_(weights)
            x = total / count
    finally:
        handle.remove()
    return x
