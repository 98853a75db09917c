"""FaithDiff Tiled Diffusion and FaithDiff Sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..faithdiff_core.tiling.moving import TileGridKind
from .bridge.graph_types import LQFeatures, LQFeaturesType
from .bridge.lq_conditioning import Conditioning
from .bridge.restoration import PUBLISHED_SCHEDULE, SAMPLERS, SCHEDULES, restore
from .bridge.sampling_run import Tiling
from .bridge.tiled_prediction import tiled
from .errors import named_errors
from .inputs import CATEGORY, check_tile, setting_input

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

TILE_TOOLTIP = (
    "Pixels. Larger images are sampled in tiles of this side. 1024 is what SDXL was trained at (SD 2.1: 768 or 512, "
    "SD 1.5: 512); smaller tiles need less memory and see less of the image."
)
OVERLAP_TOOLTIP = (
    "Fraction of a tile that it shares with its neighbour. 0.5 as published: no seams, about four times the work of 0. "
    "With tile_grid `moving`: 0.125."
)


TILE_BATCH_TOOLTIP = (
    "Tiles that go through the U-Net at once; 0: as many as fit (up to 8). The result does not depend on it."
)


TILE_GRID_TOOLTIP = (
    "`fixed`: tiles lie at the same places in every step (published). `moving`: they move from step to step, so that "
    "an overlap of 0.125 hides seams, in about half the time."
)


def tile_inputs() -> list[io.Input]:
    """The inputs about tiles that both nodes have."""
    return [
        setting_input("tile", TILE_TOOLTIP, "tile_size"),
        setting_input("overlap", OVERLAP_TOOLTIP),
        setting_input("tile_batch", TILE_BATCH_TOOLTIP, advanced=True),
    ]


class FaithDiffTiledDiffusion(io.ComfyNode):
    """Makes any sampler work in tiles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffTiledDiffusion",
            display_name="FaithDiff Tiled Diffusion",
            category=CATEGORY,
            description="Makes a MODEL sample large images in overlapping tiles, with any sampler. Every tile gets "
            "its part of the LQ features, ControlNet hints, masks and areas, and SDXL's size conditioning as FaithDiff "
            "was published with it.",
            search_aliases=["faithdiff tiles", "tiled diffusion", "multidiffusion", "large image"],
            inputs=[
                io.Model.Input("model", tooltip="From FaithDiff Model Loader, or any SDXL, SD 2.1 or SD 1.5 MODEL."),
                *tile_inputs(),
                setting_input("tile_grid", TILE_GRID_TOOLTIP, optional=True),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def validate_inputs(cls, tile_size: int | None = None) -> bool | str:
        return check_tile(tile_size)

    @classmethod
    @named_errors
    def execute(
        cls,
        model: ModelPatcher,
        tile_size: int,
        overlap: float,
        tile_batch: int,
        tile_grid: str = TileGridKind.FIXED.value,
    ) -> io.NodeOutput:
        return io.NodeOutput(tiled(model, Tiling(tile_size, overlap, tile_batch, tile_grid)))


class FaithDiffSampler(io.ComfyNode):
    """Samples as published."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffSampler",
            display_name="FaithDiff Sampler",
            category=CATEGORY,
            description="Restores: FaithDiff Conditioning, FaithDiff Tiled Diffusion and a sampler in one node, with "
            "the published schedule and starting point.",
            search_aliases=["faithdiff", "restore", "upscale", "super resolution", "ksampler"],
            inputs=[
                io.Model.Input("model", tooltip="From FaithDiff Model Loader; LoRAs may follow it."),
                io.Conditioning.Input("positive", tooltip="The caption or prompt: say what is in the image."),
                io.Conditioning.Input("negative", tooltip="Published: the encoded empty text."),
                LQFeaturesType.Input("lq_features", tooltip="From FaithDiff LQ Encode."),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the initial noise.",
                ),
                setting_input("steps", "Published: 20. More adds little; 4 to 8 with a few-step LoRA."),
                setting_input(
                    "cfg",
                    "Published: 5. Higher is crisper and less faithful; 1 halves the time (for few-step LoRAs).",
                ),
                io.Combo.Input("sampler_name", options=SAMPLERS, default="euler", tooltip="Published: euler."),
                io.Combo.Input(
                    "scheduler",
                    options=SCHEDULES,
                    default=PUBLISHED_SCHEDULE,
                    tooltip="`faithdiff` is the published schedule (leading spacing); the others are ComfyUI's.",
                ),
                setting_input(
                    "start",
                    "`lr`: noise with a trace of the low-quality image (published; needs latent_image). `noise`: noise "
                    "alone.",
                    "start_point",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1: starts later, from latent_image with less noise, and changes the image less "
                    "(needs latent_image; start_point then has no effect).",
                ),
                *tile_inputs(),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="The low-quality image through VAE Encode. Its noise mask, if it has one, limits what "
                    "changes.",
                ),
                io.Noise.Input("noise", optional=True, tooltip="Used instead of the seed's noise."),
                setting_input(
                    "strength", "How strongly the image acts. 1 as published, 0 off.", optional=True, advanced=True
                ),
                setting_input("tile_grid", TILE_GRID_TOOLTIP, optional=True),
                io.Int.Input(
                    "preview_tile",
                    default=-1,
                    min=-1,
                    max=65535,
                    optional=True,
                    advanced=True,
                    tooltip="Restores only the tile of this number, counted row by row from 0, to judge the settings "
                    "quickly (needs latent_image, which the tile is placed into). -1: all tiles.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def validate_inputs(cls, tile_size: int | None = None) -> bool | str:
        return check_tile(tile_size)

    @classmethod
    @named_errors
    def execute(
        cls,
        model: ModelPatcher,
        positive: Conditioning,
        negative: Conditioning,
        lq_features: LQFeatures,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        start_point: str,
        denoise: float,
        tile_size: int,
        overlap: float,
        tile_batch: int,
        latent_image: dict[str, Any] | None = None,
        noise: Any = None,
        strength: float = 1.0,
        tile_grid: str = TileGridKind.FIXED.value,
        preview_tile: int = -1,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            restore(
                model,
                positive,
                negative,
                lq_features,
                seed=seed,
                steps=steps,
                cfg=cfg,
                sampler_name=sampler_name,
                scheduler=scheduler,
                start_point=start_point,
                denoise=denoise,
                tiling=Tiling(tile_size, overlap, tile_batch, tile_grid),
                latent_image=latent_image,
                noise=noise,
                strength=strength,
                preview_tile=preview_tile,
            )
        )
