"""FaithDiff Tile Captions and FaithDiff Tile Conditioning: a text for each part of a large image."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..faithdiff_core.captions.tile_texts import TILE_MIX
from ..faithdiff_core.tiling.grid import MAX_OVERLAP
from ..faithdiff_core.tiling.layout import MOST_PARTS, PART_OVERLAP, TileLayout
from .bridge.graph_types import TileLayoutType
from .bridge.lq_conditioning import Conditioning
from .bridge.tile_texts import cut_image, only, with_tile_texts
from .errors import named_errors
from .inputs import CATEGORY


class FaithDiffTileCaptions(io.ComfyNode):
    """Cuts an image into parts to be captioned."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffTileCaptions",
            display_name="FaithDiff Tile Captions",
            category=CATEGORY,
            description="Cuts a large image into parts, so that a captioner describes each of them and the sampler's "
            "tiles are prompted with what is in them, not with what is elsewhere.",
            search_aliases=["faithdiff tiles", "caption tiles", "tile prompt", "regional caption", "split image"],
            inputs=[
                io.Image.Input("image", tooltip="The low-quality image; it may be enlarged or not."),
                io.Int.Input("columns", default=2, min=1, max=MOST_PARTS, tooltip="Parts side by side."),
                io.Int.Input("rows", default=2, min=1, max=MOST_PARTS, tooltip="Parts one above the other."),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="Pixels. Side of a part, instead of columns and rows; 0 is off.",
                ),
                io.Float.Input(
                    "overlap",
                    default=PART_OVERLAP,
                    min=0.0,
                    max=MAX_OVERLAP,
                    step=0.05,
                    round=0.001,
                    tooltip="Fraction of a part that it shares with its neighbour, so that the captioner sees objects "
                    "on a border whole.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="crops",
                    is_output_list=True,
                    tooltip="The parts, row by row, as a list: for FaithDiff Caption or any captioner.",
                ),
                TileLayoutType.Output(display_name="layout", tooltip="For FaithDiff Tile Conditioning."),
            ],
        )

    @classmethod
    @named_errors
    def execute(cls, image: Tensor, columns: int, rows: int, tile_size: int, overlap: float) -> io.NodeOutput:
        return io.NodeOutput(*cut_image(image, columns, rows, tile_size, overlap))


class FaithDiffTileConditioning(io.ComfyNode):
    """Tells each tile its own text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffTileConditioning",
            display_name="FaithDiff Tile Conditioning",
            category=CATEGORY,
            description="Combines the captions of an image's parts and of the whole image into one conditioning: each "
            "tile, fixed or moving, gets the captions of the parts that it overlaps. Works in every sampler; without "
            "tiles, only the whole image's caption acts.",
            search_aliases=["faithdiff tiles", "tile prompt", "regional prompt", "caption tiles"],
            is_input_list=True,
            inputs=[
                TileLayoutType.Input("layout", tooltip="From FaithDiff Tile Captions."),
                io.Conditioning.Input(
                    "conditionings",
                    tooltip="The encoded captions of the crops, as a list in their order: CLIP Text Encode after the "
                    "captioner gives it.",
                ),
                io.Conditioning.Input(
                    "whole",
                    tooltip="The encoded caption of the whole image. ControlNets, masks and LoRA hooks on it, or "
                    "applied afterwards, act on all tiles.",
                ),
                io.Float.Input(
                    "mix",
                    default=TILE_MIX,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the parts' captions. 0: only the whole image's. 1: only the parts'; tiles may "
                    "then differ in style.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="For FaithDiff Sampler, or FaithDiff Conditioning."
                )
            ],
        )

    @classmethod
    @named_errors
    def execute(
        cls,
        layout: list[TileLayout],
        conditionings: list[Conditioning],
        whole: list[Conditioning],
        mix: list[float],
    ) -> io.NodeOutput:
        return io.NodeOutput(
            with_tile_texts(only(layout, "layout"), conditionings, only(whole, "whole"), only(mix, "mix"))
        )
