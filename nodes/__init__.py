"""The nodes. This package is the only place that imports ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .bridge.captioner import register_folder as register_captioner_folder
from .captioner import FaithDiffCaption
from .compare import FaithDiffCompare
from .conditioning import FaithDiffConditioning, FaithDiffTrimCaption
from .demo import FaithDiffDemoModels
from .loader import FaithDiffModelLoader, register_folder
from .lq_encode import FaithDiffLQEncode
from .pictures import FaithDiffFinishImage, FaithDiffPrepareImage
from .sampling import FaithDiffSampler, FaithDiffTiledDiffusion
from .vae import FaithDiffTiledVAEDecode


class FaithDiffExtension(ComfyExtension):
    """What the pack adds to ComfyUI."""

    @override
    async def on_load(self) -> None:
        register_folder()
        register_captioner_folder()

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
            FaithDiffTrimCaption,
            FaithDiffCaption,
            FaithDiffCompare,
            FaithDiffDemoModels,
        ]
