"""Rows that need torch and diffusers: the alignment, the U-Net it joins, counted costs, and tiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from faithdiff_core.models.alignment import Alignment
from faithdiff_core.tiling.grid import TileGrid

from . import counts, models
from .measure import Spread, Work, interleaved, peak_bytes
from .results import Result, Target, memory, timed
from .settings import PUBLISHED_SIZE, SCALE, Settings
from .shared import shared

STEPS = 20
"""Steps of the published settings, over which what is done once is spread."""

TILED_SIZES = (2048, 4096, 8192)
TILE_BATCHES = (1, 2, 4, 8)
MOST_TILES = 16
"""Tiles of a large image that are timed, spread evenly; all cost the same."""


@shared("diffusers")
def shared_unet(device: torch.device, dtype: torch.dtype) -> Any:
    """The U-Net that several rows use: it takes 5 GB in half precision."""
    return models.unet(device, dtype)


def _case(settings: Settings, size: int) -> str:
    return f"{size} px, {settings.dtype_name}"


def _joined(ours: Alignment, h: Tensor, condition: Tensor) -> Tensor:
    """A guided pair with the residual, which is computed once."""
    return torch.add(h, ours.residual(h[:1], condition))


def alignment(settings: Settings) -> Iterator[Result]:
    """Our alignment against the published formulation."""
    ours = models.alignment(settings.device, settings.dtype)
    published = models.published_alignment(settings.device, settings.dtype)
    target = Target(">=", 4.5 if settings.on_cpu else 5.0)
    for size in settings.sizes:
        h, features, condition = alignment_inputs(settings, size)

        work = partial(_joined, ours, h, condition)
        with torch.inference_mode():
            times = interleaved(
                settings,
                {
                    "ours": work,
                    "published": partial(published, h, features),
                    "embedding": partial(ours.embed, features[:1]),
                },
            )
            yield timed(
                "alignment",
                f"guided pair, {_case(settings, size)}",
                times["ours"],
                times["published"],
                "published formulation",
                ratio=times["published"].over(times["ours"]),
                ratio_name="speed-up",
                target=target,
                note=f"embedding, once a tile, {times['embedding'].median * 1e3:.3g} ms",
            )
            yield memory(
                "alignment",
                f"guided pair, {_case(settings, size)}",
                peak_bytes(settings.device, work),
                peak_bytes(settings.device, partial(published, h, features)),
                "published formulation",
            )


def alignment_inputs(settings: Settings, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The U-Net's first features and the LQ features of a guided pair (two equal rows), and one embedded condition."""
    made: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
    side, config = size // SCALE, models.ALIGNMENT
    h = torch.randn(1, config.unet_channels, side, side, **made).repeat(2, 1, 1, 1)
    features = torch.randn(1, config.feature_channels, side, side, **made).repeat(2, 1, 1, 1)
    return h, features, torch.randn(1, config.condition_channels, side, side, **made)


def unet_share(settings: Settings) -> Iterator[Result]:
    """Our alignment against the U-Net call that it joins."""
    ours = models.alignment(settings.device, settings.dtype)
    unet = shared_unet(settings.device, settings.dtype)
    for size in settings.sizes:
        h, _, condition = alignment_inputs(settings, size)
        inputs = models.unet_inputs(2, size // SCALE, settings.device, settings.dtype)
        with torch.inference_mode():
            times = interleaved(
                settings,
                {
                    "ours": partial(_joined, ours, h, condition),
                    "U-Net": partial(unet, **inputs),
                },
            )
        flops = counts.alignment_call(size), counts.unet_call(size)
        speeds = [f / times[name].median / 1e9 for f, name in zip(flops, ("ours", "U-Net"), strict=True)]
        yield timed(
            "alignment-share",
            f"guided pair, {_case(settings, size)}",
            times["ours"],
            times["U-Net"],
            "U-Net call",
            target=Target("<=", 0.02),
            note=f"counted share {flops[0] / flops[1]:.2%}; alignment at {speeds[0]:.0f} and U-Net at {speeds[1]:.0f} "
            "GFLOP/s",
        )


def floor(settings: Settings) -> Iterator[Result]:
    """Counted operations and bytes at the published size."""
    size = PUBLISHED_SIZE
    unet = counts.unet_call(size)
    tera = 1e12
    once = {
        "LQ encode": counts.lq_encode(size),
        "VAE encode": counts.lq_encode(size),
        "embedding": counts.embedding(size),
        "VAE decode": counts.vae_decode(size),
    }

    def line(case: str, ours: float, peer: float, peer_name: str, **kw: Any) -> Result:
        mine, other = Spread((ours / tera,)), Spread((peer / tera,))
        more: dict[str, Any] = {"ratio": mine.over(other), "ratio_name": "operations"} | kw
        return Result("floor", f"{case}, {size} px", "TFLOP", mine, other, peer_name, kind="counted", **more)

    aligned = counts.alignment_call(size)
    yield line("alignment of a guided pair", aligned, unet, "U-Net call")
    yield line("published alignment of a guided pair", counts.published_alignment_call(size), unet, "U-Net call")
    yield line("embedding a tile", once["embedding"], unet, "U-Net call")
    yield line("sampling, 20 steps", STEPS * (unet + aligned) + once["embedding"], STEPS * unet, "plain SDXL")
    whole = STEPS * (unet + aligned) + sum(once.values())
    yield line("whole restoration, 20 steps", whole, STEPS * unet + once["VAE decode"], "plain SDXL and decode")
    parameters = counts.parameter_counts()
    added = parameters["LQ encoder"] + parameters["alignment"]
    yield Result(
        "floor",
        "weights beyond SDXL's",
        "M parameters",
        Spread((added / 1e6,)),
        Spread((parameters["U-Net"] / 1e6,)),
        "U-Net",
        Spread((added / parameters["U-Net"],)),
        "parameters",
        kind="counted",
        note="read once a call: two bytes each in half precision",
    )


def tiles(settings: Settings) -> Iterator[Result]:
    """What a tile costs beside its U-Net call, and tiles in batches."""
    unet = shared_unet(settings.device, settings.dtype)
    ours = models.alignment(settings.device, settings.dtype)
    tile = min(settings.sizes) if settings.on_cpu else PUBLISHED_SIZE
    side = tile // SCALE
    inputs = models.unet_inputs(2, side, settings.device, settings.dtype)
    reduced = f"tiles of {tile} px instead of {PUBLISHED_SIZE}" if tile != PUBLISHED_SIZE else ""
    works: dict[str, Work] = {"U-Net": lambda: unet(**inputs)}
    grids = {size: TileGrid(size // SCALE, size // SCALE, tile) for size in TILED_SIZES}
    timed_tiles = {size: grid.tiles[:: max(1, len(grid) // MOST_TILES)] for size, grid in grids.items()}
    result = torch.randn(1, 4, side, side, device=settings.device)
    for size, grid in grids.items():
        latent = torch.randn(1, 4, grid.height, grid.width, device=settings.device)
        # Kept where the host keeps it, in main memory; zeros that are only read take none, and 8192 px have a gigabyte.
        features = torch.zeros(1, models.ALIGNMENT.feature_channels, grid.height, grid.width, dtype=settings.vae_dtype)

        def crop_and_merge(size: int = size, x: Tensor = latent) -> None:
            out = torch.zeros_like(x)
            for one in timed_tiles[size]:
                one.crop(x).contiguous()
                grids[size].merge(out, one, result)

        def condition(size: int = size, features: Tensor = features) -> None:
            for one in timed_tiles[size]:
                ours.embed(one.crop(features).to(settings.device, settings.dtype))

        works |= {f"merge {size}": crop_and_merge, f"condition {size}": condition}
    with torch.inference_mode():
        times = interleaved(settings, works)
    call = times["U-Net"]
    for size, grid in grids.items():
        count = len(timed_tiles[size])
        merge, embed = (times[f"{name} {size}"].times(1 / count) for name in ("merge", "condition"))
        for name, extra, target in (
            ("condition kept for 20 steps", merge.plus(embed.times(1 / STEPS)), None),
            ("condition embedded at every step", merge.plus(embed), Target("<=", 0.02) if size == 8192 else None),
        ):
            yield timed(
                "tiles",
                f"{size} px, {len(grid)} tiles: crop, merge and condition a tile, {name}",
                extra,
                call,
                "U-Net call of a tile",
                target=target,
                note="; ".join(part for part in (reduced, f"crop and merge {merge.median * 1e3:.2g} ms") if part),
            )
    yield from _batches(settings, unet, settings.loop_tile)


def _batches(settings: Settings, unet: Any, tile: int) -> Iterator[Result]:
    inputs = {n: models.unet_inputs(2 * n, tile // SCALE, settings.device, settings.dtype) for n in TILE_BATCHES}
    with torch.inference_mode():
        works = {str(n): partial(unet, **inputs[n]) for n in TILE_BATCHES}
        times = interleaved(settings, works)
    one = times["1"]
    for n in TILE_BATCHES[1:]:
        yield timed(
            "tiles",
            f"{n} tiles of {tile} px in one U-Net call, each",
            times[str(n)].times(1 / n),
            one,
            "one tile in a call",
        )
