"""FaithDiff Model Loader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..faithdiff_core.weights.block_strengths import BlockStrengths
from .bridge.folders import faithdiff_files, faithdiff_path
from .bridge.graph_types import FaithDiffType
from .bridge.model_loading import WEIGHT_DTYPES, load_faithdiff
from .errors import named_errors
from .inputs import CATEGORY

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class FaithDiffModelLoader(io.ComfyNode):
    """Loads a FaithDiff file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffModelLoader",
            display_name="FaithDiff Model Loader",
            category=CATEGORY,
            description="Loads FaithDiff: a MODEL whose U-Net follows a low-quality image through the alignment, and "
            "the LQ encoder that reads the image. Without LQ features the MODEL is an ordinary one.",
            search_aliases=["faithdiff", "super resolution", "upscale", "restore", "load faithdiff", "alignment"],
            inputs=[
                io.Combo.Input(
                    "faithdiff_name",
                    options=faithdiff_files(),
                    tooltip="FaithDiff.bin, the same weights as safetensors, an `_adapter` file made by `convert`, or "
                    "a `_faithdiff_lora` file (adapter and LoRA). Searched in models/faithdiff, models/model_patches "
                    "and models/diffusion_models.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="Precision of the U-Net's weights. `default` lets ComfyUI choose for your card; fp8 halves "
                    "the memory of fp16 (2.6 instead of 5.1 GB) for a small loss of detail; fp32 is for comparisons. A "
                    "connected MODEL keeps its own precision, and so does a quantized file (`default` only).",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Your own MODEL of the file's kind (published: SDXL), with or without LoRAs. "
                    "The alignment is added to it. Needed with an `_adapter` or `_faithdiff_lora` file.",
                ),
                io.Float.Input(
                    "unet_strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="With `model` connected: how far its U-Net is moved to FaithDiff's. 1 is FaithDiff's own "
                    "weights (most faithful), 0 leaves yours (your style, less faithful). LoRAs keep their "
                    "full strength. With a `_faithdiff_lora` file: the strength of its LoRA. No effect without `model` "
                    "or with an `_adapter` file.",
                ),
                io.Model.Input(
                    "base_model",
                    optional=True,
                    tooltip="The MODEL that FaithDiff was trained from: RealVisXL V4.0. With it, what FaithDiff "
                    "learned is added to your own U-Net, which keeps its style: yours + unet_strength * (FaithDiff - "
                    "base). Needs `model` and a full FaithDiff file.",
                ),
                _factor("input_blocks", "the input blocks, where the U-Net looks at the image"),
                _factor("middle_block", "the middle block, where it sees the image as a whole"),
                _factor("output_blocks", "the output blocks, where it draws the result"),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MODEL with the alignment."),
                FaithDiffType.Output(display_name="faithdiff", tooltip="For FaithDiff LQ Encode."),
            ],
        )

    @classmethod
    @named_errors
    def execute(
        cls,
        faithdiff_name: str,
        weight_dtype: str,
        model: ModelPatcher | None = None,
        unet_strength: float = 1.0,
        base_model: ModelPatcher | None = None,
        input_blocks: float = 1.0,
        middle_block: float = 1.0,
        output_blocks: float = 1.0,
    ) -> io.NodeOutput:
        factors = BlockStrengths(input_blocks, middle_block, output_blocks)
        return io.NodeOutput(
            *load_faithdiff(faithdiff_path(faithdiff_name), weight_dtype, model, unet_strength, base_model, factors)
        )


def _factor(name: str, part: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        optional=True,
        advanced=True,
        tooltip=f"Factor on unet_strength for {part}. 1: unet_strength as it is; 0: your own weights there. No effect "
        "without `model`.",
    )
