"""FaithDiff LQ Encode."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from .bridge.graph_types import AdapterModels, FaithDiffType, LQFeaturesType
from .bridge.model_loading import encode_lq
from .errors import named_errors
from .inputs import CATEGORY, check_tiles, setting_input


class FaithDiffLQEncode(io.ComfyNode):
    """Encodes low-quality images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffLQEncode",
            display_name="FaithDiff LQ Encode",
            category=CATEGORY,
            description="Reads what is in a low-quality image, already enlarged to the final size, with FaithDiff's "
            "LQ encoder. The result is needed once for all seeds, prompts and samplers.",
            search_aliases=["faithdiff encode", "lq encoder", "low quality features"],
            inputs=[
                FaithDiffType.Input("faithdiff", tooltip="From FaithDiff Model Loader."),
                io.Image.Input(
                    "pixels",
                    tooltip="The enlarged low-quality image, sides multiples of 8 pixels: what FaithDiff Prepare "
                    "Image gives. An alpha channel is left out.",
                ),
                setting_input(
                    "encoder_tile",
                    "Pixels. Larger images are encoded in tiles of this side. Smaller tiles need less memory "
                    "(ComfyUI reserves 3.5 GB at 1024 and 0.9 GB at 512 in bf16) and see less of the image at a time.",
                    "tile_size",
                ),
                setting_input(
                    "encoder_overlap",
                    "Part of a tile that it shares with its neighbour. More hides seams, and takes longer.",
                    "overlap",
                ),
            ],
            outputs=[
                LQFeaturesType.Output(display_name="lq_features", tooltip="For FaithDiff Conditioning or Sampler.")
            ],
        )

    @classmethod
    def validate_inputs(cls, tile_size: int | None = None, overlap: float | None = None) -> bool | str:
        return check_tiles(tile_size, overlap)

    @classmethod
    @named_errors
    def execute(cls, faithdiff: AdapterModels, pixels: Tensor, tile_size: int, overlap: float) -> io.NodeOutput:
        return io.NodeOutput(encode_lq(faithdiff, pixels, tile_size, overlap))
