"""FaithDiff LQ Encode."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..faithdiff_core.engine.settings import LARGEST_HOST_TILE
from ..faithdiff_core.tiling.grid import TILE_SIZE
from .bridge.graph_types import AdapterModels, FaithDiffType, LQFeaturesType
from .bridge.model_loading import encode_lq
from .errors import named_errors
from .inputs import CATEGORY, check_tile, setting_input


class FaithDiffLQEncode(io.ComfyNode):
    """Encodes low-quality images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffLQEncode",
            display_name="FaithDiff LQ Encode",
            category=CATEGORY,
            description="Encodes a low-quality image, already enlarged to its final size, with FaithDiff's LQ encoder. "
            "The LQ features serve all seeds, prompts and samplers.",
            search_aliases=["faithdiff encode", "lq encoder", "low quality features"],
            inputs=[
                FaithDiffType.Input("faithdiff", tooltip="From FaithDiff Model Loader."),
                io.Image.Input(
                    "pixels",
                    tooltip="The enlarged low-quality image, sides multiples of 8 pixels: the output of FaithDiff "
                    "Prepare Image. An alpha channel is ignored.",
                ),
                setting_input(
                    "encoder_tile",
                    "Pixels. Larger images are encoded in tiles of this side. Smaller tiles need less memory "
                    "(ComfyUI reserves 3.5 GiB at 1024, 0.9 GiB at 512 in bf16) and see less of the image at a time.",
                    "tile_size",
                ),
                setting_input(
                    "encoder_overlap",
                    "Fraction of a tile that it shares with its neighbour. More hides seams and takes longer.",
                    "overlap",
                ),
                io.Mask.Input(
                    "restore_mask",
                    optional=True,
                    tooltip="White is restored: only the surroundings of the mask are encoded. Give the sampler's "
                    "latent the same mask (Set Latent Noise Mask).",
                ),
                io.Int.Input(
                    "mask_margin",
                    default=TILE_SIZE,
                    min=0,
                    max=LARGEST_HOST_TILE,
                    step=8,
                    optional=True,
                    advanced=True,
                    tooltip="Pixels. How far around restore_mask features are needed: give the sampler's tile_size.",
                ),
            ],
            outputs=[
                LQFeaturesType.Output(display_name="lq_features", tooltip="For FaithDiff Conditioning or Sampler.")
            ],
        )

    @classmethod
    def validate_inputs(cls, tile_size: int | None = None) -> bool | str:
        return check_tile(tile_size)

    @classmethod
    @named_errors
    def execute(
        cls,
        faithdiff: AdapterModels,
        pixels: Tensor,
        tile_size: int,
        overlap: float,
        restore_mask: Tensor | None = None,
        mask_margin: int = TILE_SIZE,
    ) -> io.NodeOutput:
        return io.NodeOutput(encode_lq(faithdiff, pixels, tile_size, overlap, restore_mask, mask_margin))
