"""Rows in ComfyUI: the nodes against plain SDXL, against ComfyUI's SUPIR, and the tiled VAE and encoder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from tiny_models.comfyui_configs import SDXL_VAE
from torch import Tensor

from faithdiff_core.models.lq_encoder import LQEncoder, LQEncoderConfig
from faithdiff_core.sampling.schedule import DEFAULT_CFG, sampling_sigmas

from . import counts, host, models
from .measure import Spread, Work, interleaved, peak_bytes
from .results import Result, Target, memory, timed
from .rows_core import STEPS, TILED_SIZES
from .rows_engine import composed
from .settings import PUBLISHED_SIZE, SCALE, Settings
from .shared import shared

REDUCED_VAE = 32
"""Channels of the finest level of VAE and LQ encoder in a quick run; a sixteenth of the operations."""


@shared("host")
def _faithdiff(dtype: torch.dtype) -> tuple[Any, Any]:
    """An alignment-patched MODEL and its FAITHDIFF, from an adapter of the published sizes."""
    running = host.start_host()
    loaded: tuple[Any, Any] = running.call(
        "FaithDiffModelLoader",
        faithdiff_name=host.ADAPTER,
        weight_dtype="default",
        model=host.sdxl_model(dtype),
        unet_strength=1.0,
    )
    return loaded


def _plain(running: Any, settings: Settings, model: Any, size: int, steps: int) -> Tensor:
    """The stock sampler on a MODEL."""
    positive, negative = host.conditioning(settings)
    latent: dict[str, Tensor] = running.call(
        "SamplerCustomAdvanced",
        noise=running.call("RandomNoise", noise_seed=1)[0],
        guider=running.call("CFGGuider", model=model, positive=positive, negative=negative, cfg=DEFAULT_CFG)[0],
        sampler=running.call("KSamplerSelect", sampler_name="euler")[0],
        sigmas=sampling_sigmas(steps),
        latent_image={"samples": torch.zeros(1, 4, size // SCALE, size // SCALE)},
    )[0]
    return latent["samples"]


def _restored(
    running: Any, settings: Settings, features: Any, steps: int, tile: int = 1024, tile_batch: int = 0
) -> Tensor:
    """FaithDiffSampler."""
    positive, negative = host.conditioning(settings)
    latent: dict[str, Tensor] = running.call(
        "FaithDiffSampler",
        model=_faithdiff(settings.dtype)[0],
        positive=positive,
        negative=negative,
        lq_features=features,
        seed=1,
        steps=steps,
        cfg=DEFAULT_CFG,
        sampler_name="euler",
        scheduler="faithdiff",
        start_point="noise",
        denoise=1.0,
        tile_size=tile,
        overlap=0.5,
        tile_batch=tile_batch,
    )[0]
    return latent["samples"]


def restoration(settings: Settings) -> Iterator[Result]:
    """A restoration through the nodes against plain SDXL sampling in the host."""
    running = host.start_host()
    base = host.sdxl_model(settings.dtype)
    faithdiff = _faithdiff(settings.dtype)[1]
    vae = host.sdxl_vae(settings.vae_dtype)
    for size in settings.loop_sizes:
        image = torch.rand(1, size // 2, size // 2, 3)
        prepared, frame = running.call("FaithDiffPrepareImage", image=image, scale_by=2.0, longest_side=0, multiple=8)

        def encode(prepared: Tensor = prepared) -> Any:
            return running.call(
                "FaithDiffLQEncode", faithdiff=faithdiff, pixels=prepared, tile_size=1024, overlap=0.25
            )[0]

        features = encode()
        latent = running.call("VAEEncode", pixels=prepared, vae=vae)[0]
        times = interleaved(
            settings,
            {
                "ours": partial(_restored, running, settings, features, settings.steps),
                "plain": partial(_plain, running, settings, base, size, settings.steps),
                "prepare": partial(
                    running.call, "FaithDiffPrepareImage", image=image, scale_by=2.0, longest_side=0, multiple=8
                ),
                "LQ encode": encode,
                "VAE encode": partial(running.call, "VAEEncode", pixels=prepared, vae=vae),
                "our decode": partial(
                    running.call, "FaithDiffTiledVAEDecode", samples=latent, vae=vae, tile_size=1024, overlap=0.25
                ),
                "plain decode": partial(running.call, "VAEDecode", samples=latent, vae=vae),
                "finish": partial(running.call, "FaithDiffFinishImage", image=prepared, frame=frame, color_fix="adain"),
            },
            settings.close_rounds,
        )
        case = f"{size} px, {settings.dtype_name}"
        yield timed(
            "nodes",
            f"sampling, {settings.steps} steps, {case}",
            times["ours"],
            times["plain"],
            "plain SDXL sampling",
            target=Target("<=", 1.03),
        )
        around = ("prepare", "LQ encode", "VAE encode", "our decode", "finish")
        yield timed(
            "nodes",
            f"whole restoration, {STEPS} steps, {case}",
            composed(times, settings.steps, around, "ours"),
            composed(times, settings.steps, ("plain decode",), "plain"),
            "plain SDXL sampling and decode",
            target=Target("<=", 1.10),
            note="" if settings.steps == STEPS else f"composed of parts; sampling measured with {settings.steps} steps",
        )


def tiled(settings: Settings) -> Iterator[Result]:
    """Sampling in tiles through the nodes: time per tile against an untiled call of the tile's size."""
    running = host.start_host()
    _faithdiff(settings.dtype)
    tile = settings.loop_tile
    sizes = (tile * 3 // 2,) if settings.on_cpu else TILED_SIZES

    def features(size: int) -> Any:
        types = running.pack_module("nodes.bridge.graph_types")
        side = size // SCALE
        return types.LQFeatures(torch.randn(1, models.ALIGNMENT.feature_channels, side, side, dtype=settings.vae_dtype))

    one = features(tile)
    for size in sizes:
        whole = features(size)
        batches = (1,) if settings.on_cpu else (1, 2, 4, 8)
        count = (2 * size // tile - 1) ** 2
        works: dict[str, Work] = {
            f"{batch} in a call": partial(_restored, running, settings, whole, 1, tile, batch) for batch in batches
        }
        works["untiled"] = lambda: _restored(running, settings, one, 1, tile)
        times = interleaved(settings, works)
        for batch in batches:
            each = times[f"{batch} in a call"].times(1 / count)
            yield timed(
                "nodes-tiled",
                f"{size} px, {count} tiles of {tile}, {batch} in a call: a tile and step",
                each,
                times["untiled"],
                "untiled step of the tile's size",
                note=f"tiles of {tile} px instead of {PUBLISHED_SIZE}" if tile != PUBLISHED_SIZE else "",
            )


def supir(settings: Settings) -> Iterator[Result]:
    """Sampling through the nodes against ComfyUI's SUPIR."""
    running = host.start_host()
    base = host.sdxl_model(settings.dtype)
    patch = host.supir_patch(settings.dtype)
    vae = host.sdxl_vae(settings.vae_dtype)
    size = settings.loop_sizes[0]
    image = torch.rand(1, size, size, 3)
    features = running.call(
        "FaithDiffLQEncode", faithdiff=_faithdiff(settings.dtype)[1], pixels=image, tile_size=1024, overlap=0.25
    )[0]
    controlled = running.call(
        "SUPIRApply",
        model=base,
        model_patch=patch,
        vae=vae,
        image=image,
        strength_start=1.0,
        strength_end=1.0,
        restore_cfg=4.0,
        restore_cfg_s_tmin=0.05,
    )[0]
    works = {
        "ours": lambda: _restored(running, settings, features, settings.steps),
        "SUPIR": lambda: _plain(running, settings, controlled, size, settings.steps),
    }
    times = interleaved(settings, works)
    case = f"{size} px, {settings.dtype_name}"
    yield timed(
        "supir",
        f"sampling, {settings.steps} steps, {case}",
        times["ours"],
        times["SUPIR"],
        "SUPIRApply",
        target=Target("<=", 0.65),
    )
    flops = [Spread((counts.count(works[name]) / 1e12,)) for name in ("ours", "SUPIR")]
    yield Result(
        "supir",
        f"operations of sampling, {settings.steps} steps, {case}",
        "TFLOP",
        flops[0],
        flops[1],
        "SUPIRApply",
        flops[0].over(flops[1]),
        "operations",
        kind="counted",
        note="below this ratio the time can hardly fall",
    )
    weights = counts.parameter_counts()
    ours = weights["U-Net"] + weights["alignment"] + weights["LQ encoder"]
    theirs = weights["U-Net"] + counts.parameters(patch.model)
    size_of = settings.dtype.itemsize
    mine, other = Spread((ours * size_of / 2**20,)), Spread((theirs * size_of / 2**20,))
    yield Result(
        "supir",
        f"weights for sampling, {settings.dtype_name}",
        "MiB",
        mine,
        other,
        "SUPIR",
        mine.over(other),
        "memory",
        Target("<=", 0.7) if settings.on_cpu else None,
        kind="counted",
    )
    if settings.on_cpu:
        return
    peaks = {}
    for name, work in works.items():
        host.unload_all()
        peaks[name] = peak_bytes(settings.device, work)
    yield memory(
        "supir", f"peak with weights, {case}", peaks["ours"], peaks["SUPIR"], "SUPIRApply", target=Target("<=", 0.7)
    )


def supir_counts(settings: Settings) -> Iterator[Result]:
    """Operations and parameters of sampling at 1024 px with ComfyUI's SUPIR, without weights."""
    host.start_host()
    size, scheduled = PUBLISHED_SIZE, STEPS
    calls, their_parameters = host.supir_counts(size)
    once = counts.lq_encode(size) + counts.embedding(size)
    sizes = counts.parameter_counts()
    our_parameters = sizes["U-Net"] + sizes["alignment"] + sizes["LQ encoder"]
    operations = scheduled * (counts.unet_call(size) + counts.alignment_call(size)) + once
    for case, unit, scale, ours, theirs, name in (
        (
            f"operations of sampling, {scheduled} steps, {size} px, LQ encode included",
            "TFLOP",
            1e12,
            operations,
            scheduled * calls + counts.lq_encode(size),
            "operations",
        ),
        ("parameters for sampling", "M parameters", 1e6, our_parameters, their_parameters, "parameters"),
    ):
        mine, other = Spread((ours / scale,)), Spread((theirs / scale,))
        yield Result(
            "supir-counts",
            case,
            unit,
            mine,
            other,
            "ComfyUI's SUPIR",
            other.over(mine),
            f"their {name} over ours",
            kind="counted",
        )


def vae(settings: Settings) -> Iterator[Result]:
    """LQ encode and tiled VAE decode against ComfyUI's tiled functions: time, memory, difference to untiled."""
    running = host.start_host()
    channels = REDUCED_VAE if settings.on_cpu else SDXL_VAE["ch"]
    size, tile = (256, 128) if settings.quick and settings.on_cpu else (1024, 512)
    dtype = torch.float32 if settings.on_cpu else settings.vae_dtype
    note = f"{channels} instead of 128 channels" if channels != SDXL_VAE["ch"] else ""
    case = f"{size} px in tiles of {tile}, {'fp32' if dtype is torch.float32 else 'bf16'}"
    theirs = host.sdxl_vae(dtype, channels)
    config = LQEncoderConfig(tuple(channels * n for n in SDXL_VAE["ch_mult"]), 2)
    encoder = LQEncoder(config, dtype=dtype, device=settings.device)
    models.randomize(encoder, 2)
    # Smooth, as images are: white noise has no large scale.
    low = torch.rand(1, 3, size // 32, size // 32)
    pixels = torch.nn.functional.interpolate(low, (size, size), mode="bicubic").clamp(0, 1)
    image = pixels.movedim(1, -1).contiguous()
    scaled = (pixels * 2 - 1).to(dtype)
    with torch.inference_mode():
        encode = {
            "ours": lambda: encoder.encode(scaled, tile, 0.25),
            "host": lambda: theirs.encode_tiled(image, tile, tile, tile // 4),
            "ours untiled": lambda: encoder.encode(scaled, None),
            "host untiled": lambda: theirs.encode(image),
        }
        yield from _against_host(settings, "lq-encode", f"encode, {case}", encode, note)
        latent = theirs.encode(image)
        samples = {"samples": latent}
        decode = {
            "ours": lambda: running.call(
                "FaithDiffTiledVAEDecode", samples=samples, vae=theirs, tile_size=tile, overlap=0.25
            )[0],
            "host": lambda: theirs.decode_tiled(latent, tile // SCALE, tile // SCALE, tile // SCALE // 4),
            "ours untiled": lambda: theirs.decode(latent),
            "host untiled": lambda: theirs.decode(latent),
        }
        yield from _against_host(settings, "vae-decode", f"decode, {case}", decode, note)


def _against_host(settings: Settings, row: str, case: str, works: dict[str, Any], note: str) -> Iterator[Result]:
    peer = "the host's tiled function"
    times = interleaved(settings, {name: works[name] for name in ("ours", "host", "host untiled")})
    yield timed(
        row,
        case,
        times["ours"],
        times["host"],
        peer,
        note="; ".join(part for part in (note, f"untiled {times['host untiled'].median * 1e3:.4g} ms") if part),
    )
    yield memory(
        row,
        case,
        peak_bytes(settings.device, works["ours"]),
        peak_bytes(settings.device, works["host"]),
        peer,
        note=note,
    )
    mine, other = (Spread((_difference(works[name](), works[f"{name} untiled"]()),)) for name in ("ours", "host"))
    yield Result(
        row,
        f"{case}: largest difference to untiled, of the range",
        "",
        mine,
        other,
        peer,
        mine.over(other) if other.median else None,
        "difference",
        note=note,
    )


def _difference(tiled_result: Tensor, untiled: Tensor) -> float:
    expected = untiled.float()
    return float((tiled_result.float() - expected).abs().max() / (expected.max() - expected.min()))
