"""FaithDiff for ComfyUI: faithful image super-resolution with SDXL (CVPR 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension


WEB_DIRECTORY = "./web"
"""Where ComfyUI finds the nodes' help pages, in `docs/`."""


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI when it loads the pack."""
    from .nodes import FaithDiffExtension

    return FaithDiffExtension()
