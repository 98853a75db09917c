"""The row beside UltimateSDUpscale: a whole image through its nodes and through ours, in tiles of one size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from comfy_host import FOLDER_VARIABLE, load_pack, packs_folder
from torch import Tensor

from faithdiff_core.sampling.schedule import DEFAULT_CFG
from faithdiff_core.tiling.grid import TILE_OVERLAP
from faithdiff_core.tiling.moving import MOVING_OVERLAP

from . import host
from .measure import Work, interleaved
from .results import Result, missing, timed
from .rows_host import REDUCED_VAE
from .settings import PUBLISHED_SIZE, Settings

PACK = "ComfyUI_UltimateSDUpscale"
CASE = "whole image in tiles of one size"


def time_rows(settings: Settings) -> Iterator[Result]:
    """VAE encode, LQ encode, sampling and decode of an image, fixed and moving, against UltimateSDUpscale.

    Both sample all steps of the schedule; its default `denoise` of 0.2 changes what it samples, not how often. On a CPU
    U-Net and VAE are small ones, the LQ features are made beforehand, and its padding is a sixteenth of the tile, as by
    default (32 of 512 px).
    """
    folder = packs_folder()
    if folder is None or not (folder / PACK).is_dir():
        yield missing("upscaler-time", CASE, f"needs a clone of {PACK} in the folder that {FOLDER_VARIABLE} names")
        return
    running = host.start_host()
    if "UltimateSDUpscaleNoUpscale" not in running.node_ids:
        load_pack(running, folder / PACK)
    small = settings.on_cpu
    tile, size = (128, 384) if small else (PUBLISHED_SIZE, 4 * PUBLISHED_SIZE)
    steps = min(settings.steps, 2)
    model = host.small_sdxl_model(settings.dtype) if small else host.sdxl_model(settings.dtype)
    vae = host.sdxl_vae(settings.vae_dtype, REDUCED_VAE) if small else host.sdxl_vae(settings.vae_dtype)
    patched, faithdiff = running.call(
        "FaithDiffModelLoader",
        faithdiff_name=host.ADAPTER,
        weight_dtype="default",
        model=model,
        unet_strength=1.0,
    )
    image = torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(0))
    positive, negative = host.conditioning(settings)

    def encode() -> Any:
        return running.call(
            "FaithDiffLQEncode", faithdiff=faithdiff, pixels=image, tile_size=PUBLISHED_SIZE, overlap=0.25
        )[0]

    kept = encode()
    common: dict[str, Any] = {
        "positive": positive,
        "negative": negative,
        "seed": 1,
        "steps": steps,
        "cfg": DEFAULT_CFG,
        "sampler_name": "euler",
    }

    def ours(kind: str, overlap: float) -> Tensor:
        latent = running.call("VAEEncode", pixels=image, vae=vae)[0]
        sampled = running.call(
            "FaithDiffSampler",
            model=patched,
            lq_features=kept if small else encode(),
            latent_image=latent,
            scheduler="faithdiff",
            start_point="lr",
            denoise=1.0,
            tile_size=tile,
            overlap=overlap,
            tile_batch=1,
            tile_grid=kind,
            **common,
        )[0]
        out: Tensor = running.call(
            "FaithDiffTiledVAEDecode", samples=sampled, vae=vae, tile_size=tile, overlap=TILE_OVERLAP / 2
        )[0]
        return out

    def theirs() -> Tensor:
        out: Tensor = running.call(
            "UltimateSDUpscaleNoUpscale",
            upscaled_image=image,
            model=model,
            vae=vae,
            scheduler="normal",
            denoise=1.0,
            mode_type="Linear",
            tile_width=tile,
            tile_height=tile,
            mask_blur=8,
            tile_padding=tile // 16,
            seam_fix_mode="None",
            seam_fix_denoise=1.0,
            seam_fix_mask_blur=8,
            seam_fix_width=64,
            seam_fix_padding=16,
            force_uniform_tiles=True,
            tiled_decode=False,
            **common,
        )[0]
        return out

    grids = {"fixed": TILE_OVERLAP, "moving": MOVING_OVERLAP}
    works: dict[str, Work] = {kind: partial(ours, kind, overlap) for kind, overlap in grids.items()}
    calls = {kind: host.unet_calls(patched, work) for kind, work in works.items()}
    their_calls = host.unet_calls(model, theirs)
    times = interleaved(settings, works | {"theirs": theirs})
    note = "; a U-Net with a tenth of the weights, a small VAE, LQ features made beforehand" if small else ""
    for kind, overlap in grids.items():
        yield timed(
            "upscaler-time",
            f"{size} px, {steps} steps, {kind} {overlap:g}, tiles of {tile} px, {settings.dtype_name}",
            times[kind],
            times["theirs"],
            f"UltimateSDUpscale, tiles of {tile + tile // 16} px",
            note=f"{calls[kind]} U-Net calls against {their_calls}{note}",
        )
