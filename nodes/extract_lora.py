"""FaithDiff Extract LoRA."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge.folders import base_files, faithdiff_files
from .bridge.lora_saving import CONTENTS, DTYPES, save_lora
from .errors import named_errors
from .inputs import CATEGORY


class FaithDiffExtractLoRA(io.ComfyNode):
    """Saves what FaithDiff learned as a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffExtractLoRA",
            display_name="FaithDiff Extract LoRA",
            category=CATEGORY,
            description="Saves what FaithDiff learned as a LoRA for any SDXL checkpoint: a few hundred megabytes "
            "instead of gigabytes. It reads the files layer by layer, so that no model is loaded.",
            search_aliases=["faithdiff lora", "extract lora", "save lora", "lora extraction", "compress faithdiff"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "faithdiff_name",
                    options=faithdiff_files(),
                    tooltip="FaithDiff.bin, or the same weights as safetensors: a file with FaithDiff's U-Net.",
                ),
                io.Combo.Input(
                    "base_name",
                    options=base_files(),
                    tooltip="What FaithDiff was trained from: RealVisXL V4.0. Searched in models/checkpoints and "
                    "models/diffusion_models.",
                ),
                io.Combo.Input(
                    "contents",
                    options=list(CONTENTS),
                    default="lora_and_adapter",
                    tooltip="`lora_and_adapter`: one file for FaithDiff Model Loader, which takes it with any SDXL "
                    "MODEL. `lora`: for Load LoRA and other programs. `lora_with_differences`: for Load LoRA, with "
                    "biases and norms, which not all programs read.",
                ),
                io.Int.Input(
                    "rank",
                    default=64,
                    min=1,
                    max=4096,
                    tooltip="Size of the LoRA: twice the rank is twice the file, and closer to FaithDiff.",
                ),
                io.Float.Input(
                    "energy",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Below 1: each layer has the smallest rank that keeps this share of what FaithDiff "
                    "changed there, `rank` at most.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="fp16",
                    optional=True,
                    advanced=True,
                    tooltip="Precision of the file. fp32 is twice as large, for comparisons.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="FaithDiff",
                    optional=True,
                    tooltip="Beginning of the file's name. Without a folder in it, the file goes to "
                    "output/diffusion_models or output/loras, where the nodes that load it look.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="report",
                    tooltip="The file's name, and its errors by block, by kind of layer and by rank.",
                )
            ],
        )

    @classmethod
    @named_errors
    def execute(
        cls,
        faithdiff_name: str,
        base_name: str,
        contents: str,
        rank: int,
        energy: float = 1.0,
        dtype: str = "fp16",
        filename_prefix: str = "FaithDiff",
    ) -> io.NodeOutput:
        return io.NodeOutput(save_lora(faithdiff_name, base_name, contents, rank, energy, dtype, filename_prefix))
