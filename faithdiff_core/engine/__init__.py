"""FaithDiff on diffusers: from files to restored images, without any other host.

Needs diffusers, transformers and accelerate (the extra `engine`); they are imported when a pipeline is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .pipeline import FaithDiffPipeline
    from .schedulers import SCHEDULERS, make_scheduler
    from .settings import RestoreSettings
    from .text import TextConditioning

__all__ = ["SCHEDULERS", "FaithDiffPipeline", "RestoreSettings", "TextConditioning", "make_scheduler"]

# ComfyUI's nodes need the settings alone, so nothing else is imported for them.
__getattr__ = lazy_names(
    __name__,
    {
        ".pipeline": ("FaithDiffPipeline",),
        ".schedulers": ("SCHEDULERS", "make_scheduler"),
        ".settings": ("RestoreSettings",),
        ".text": ("TextConditioning",),
    },
)
