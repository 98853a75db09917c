"""A node pack for tests: a tiny SDXL model, VAE, text encoder, ControlNet and LoRA, and the golden data from nodes.

Nothing in it is a stand-in: each node hands out an object of the host's own classes, only with very small sizes.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .inputs import TestCapture, TestConditioning, TestGoldenCase, TestImage, TestNoise
from .lists import TestCollect, TestList
from .models import TestCLIP, TestControlNet, TestLoRA, TestModel, TestVAE


class TestExtension(ComfyExtension):
    """The nodes of this pack."""

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            TestModel,
            TestVAE,
            TestCLIP,
            TestControlNet,
            TestLoRA,
            TestConditioning,
            TestImage,
            TestGoldenCase,
            TestNoise,
            TestCapture,
            TestList,
            TestCollect,
        ]


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI when it loads the pack."""
    return TestExtension()
