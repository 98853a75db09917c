"""FaithDiff Model Loader."""

from __future__ import annotations

from typing import TYPE_CHECKING

import folder_paths
from comfy_api.latest import io

from .bridge.graph_types import FaithDiffType
from .bridge.model_loading import WEIGHT_DTYPES, file_of, load_faithdiff
from .errors import named_errors

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

FOLDERS = ("faithdiff", "model_patches", "diffusion_models")
"""Model folders that are searched, in order; the first is this pack's own."""


def register_folder() -> None:
    """Tell the host of models/faithdiff, so that it is searched, and shown in error messages, like its own folders."""
    from pathlib import Path

    folder_paths.add_model_folder_path(FOLDERS[0], str(Path(folder_paths.models_dir) / FOLDERS[0]))
    folder_paths.folder_names_and_paths[FOLDERS[0]][1].update(folder_paths.supported_pt_extensions)


def model_files() -> list[str]:
    """Names in all of the folders, each once."""
    names: dict[str, None] = {}
    for folder in FOLDERS:
        if folder in folder_paths.folder_names_and_paths:
            names.update(dict.fromkeys(folder_paths.get_filename_list(folder)))
    return list(names)


class FaithDiffModelLoader(io.ComfyNode):
    """Loads a FaithDiff file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffModelLoader",
            display_name="FaithDiff Model Loader",
            category="FaithDiff",
            description="Loads FaithDiff: a MODEL whose U-Net follows a low-quality image through the alignment, and "
            "the LQ encoder that reads the image. Without LQ features the MODEL is an ordinary SDXL model.",
            search_aliases=["faithdiff", "super resolution", "upscale", "restore", "load faithdiff", "alignment"],
            inputs=[
                io.Combo.Input(
                    "faithdiff_name",
                    options=model_files(),
                    tooltip="FaithDiff.bin, the same as safetensors, or an `_adapter` file made by `convert`. Looked "
                    "for in models/faithdiff, models/model_patches and models/diffusion_models.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="Precision of the U-Net's weights. `default` lets ComfyUI choose for your card; fp8 halves "
                    "the memory of fp16 (2.6 instead of 5.1 GB) for a small loss of detail; fp32 is for comparisons. A "
                    "connected MODEL keeps its own precision.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Your own SDXL MODEL, with or without LoRAs. The alignment goes onto it. Needed with an "
                    "`_adapter` file.",
                ),
                io.Float.Input(
                    "unet_strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="With `model` connected: how far its U-Net is moved to FaithDiff's. 1 is FaithDiff's own "
                    "weights (most faithful), 0 leaves yours (your style; follows the image less). LoRAs keep their "
                    "full strength. No effect without `model` or with an `_adapter` file.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The alignment-patched MODEL."),
                FaithDiffType.Output(display_name="faithdiff", tooltip="For FaithDiff LQ Encode."),
            ],
        )

    @classmethod
    def execute(
        cls,
        faithdiff_name: str,
        weight_dtype: str,
        model: ModelPatcher | None = None,
        unet_strength: float = 1.0,
    ) -> io.NodeOutput:
        with named_errors("FaithDiff Model Loader"):
            path = file_of(FOLDERS, faithdiff_name)
            return io.NodeOutput(*load_faithdiff(path, weight_dtype, model, unet_strength))
