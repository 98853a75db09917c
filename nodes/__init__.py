"""The nodes. This package is the only place that imports ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .attribution import FaithDiffAttributionMap, FaithDiffAttributionRecord
from .bridge.folders import register_folders
from .caption import FaithDiffCaption
from .compare import FaithDiffCompare
from .conditioning import FaithDiffConditioning, FaithDiffTrimCaption
from .demo_models import FaithDiffDemoModels
from .extract_lora import FaithDiffExtractLoRA
from .folder import FaithDiffRestoreFolder
from .image_files import FaithDiffLoadImage, FaithDiffSaveImage
from .loader import FaithDiffModelLoader
from .lq_encode import FaithDiffLQEncode
from .prepare_finish import FaithDiffFinishImage, FaithDiffPrepareImage
from .sampler import FaithDiffSampler, FaithDiffTiledDiffusion
from .tile_captions import FaithDiffTileCaptions, FaithDiffTileConditioning
from .vae_decode import FaithDiffTiledVAEDecode


class FaithDiffExtension(ComfyExtension):
    """What the pack adds to ComfyUI."""

    @override
    async def on_load(self) -> None:
        register_folders()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            FaithDiffModelLoader,
            FaithDiffPrepareImage,
            FaithDiffLQEncode,
            FaithDiffConditioning,
            FaithDiffTiledDiffusion,
            FaithDiffSampler,
            FaithDiffTiledVAEDecode,
            FaithDiffFinishImage,
            FaithDiffLoadImage,
            FaithDiffSaveImage,
            FaithDiffRestoreFolder,
            FaithDiffTrimCaption,
            FaithDiffCaption,
            FaithDiffTileCaptions,
            FaithDiffTileConditioning,
            FaithDiffCompare,
            FaithDiffAttributionRecord,
            FaithDiffAttributionMap,
            FaithDiffDemoModels,
            FaithDiffExtractLoRA,
        ]
