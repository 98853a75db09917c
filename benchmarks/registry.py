"""All rows, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import (
    host,
    rows_attribution,
    rows_core,
    rows_engine,
    rows_files,
    rows_grid,
    rows_host,
    rows_lora,
    rows_peers,
    rows_quantized,
    rows_upscaler,
    shared,
)
from .results import Result
from .settings import Settings


@dataclass(frozen=True)
class Row:
    """A row of the benchmark, which may give several lines.

    Attributes:
        name: what `--rows` takes.
        about: one sentence.
        run: gives the lines.
        group: rows of one group share models, which are let go of after its last row.
        on_gpu: whether a GPU changes the figures; rows without one are left out of the preset `gpu`.
    """

    name: str
    about: str
    run: Callable[[Settings], Iterator[Result]]
    group: str = ""
    on_gpu: bool = True

    @property
    def needs_host(self) -> bool:
        """Whether it can be run only where ComfyUI is."""
        return self.group == "host"


ROWS = (
    Row("floor", "operations and weights, counted", rows_core.floor, on_gpu=False),
    Row("alignment", "our alignment against the published formulation", rows_core.alignment),
    Row("alignment-share", "our alignment against the U-Net call it joins", rows_core.unet_share, "diffusers"),
    Row("tiles", "crop, merge and condition a tile; tiles in batches", rows_core.tiles, "diffusers"),
    Row("engine", "the engine against plain SDXL; peaks", rows_engine.restoration, "diffusers"),
    Row("published-loop", "the engine's loop against the published one", rows_engine.published_loop, "diffusers"),
    Row(
        "peers", "beside ControlNet, ControlNet-XS and UltimateSDUpscale (Tables 7 and 8)", rows_peers.rows, "diffusers"
    ),
    Row("attribution", "a U-Net call with its cross-attention recorded", rows_attribution.rows, "diffusers"),
    Row("tile-grid-time", "a whole restoration in moving tiles", rows_grid.time_rows, on_gpu=False),
    Row("tile-grid", "moving tiles against the published grid, on photographs", rows_grid.rows, on_gpu=False),
    Row("quantized", "errors of the U-Net in 8 bits and fewer", rows_quantized.rows, on_gpu=False),
    Row("import", "start-up", rows_files.start, on_gpu=False),
    Row("files", "loading and converting against reading and copying", rows_files.files, on_gpu=False),
    Row("lora", "extracting a LoRA: time, memory and errors by rank", rows_lora.extraction, on_gpu=False),
    Row("nodes", "the nodes against plain SDXL in ComfyUI", rows_host.restoration, "host"),
    Row("nodes-tiled", "tiles through the nodes against untiled steps", rows_host.tiled, "host"),
    Row("supir", "the nodes against ComfyUI's SUPIR", rows_host.supir, "host"),
    Row("supir-counts", "operations and parameters beside SUPIR", rows_host.supir_counts, "host", on_gpu=False),
    Row("upscaler-time", "a whole image beside UltimateSDUpscale", rows_upscaler.time_rows, "host"),
    Row("vae", "LQ encode and tiled decode against ComfyUI's tiled functions", rows_host.vae, "host"),
)


def release(group: str) -> None:
    """Let go of a group's models."""
    shared.release(group)
    if group == "host":
        host.unload_all()
