"""FaithDiff on diffusers: from files to restored images, without any other host.

Needs diffusers, transformers and accelerate (the extra `engine`); they are imported when a pipeline is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import FaithDiffPipeline
    from .schedulers import SCHEDULERS, make_scheduler
    from .settings import RestoreSettings
    from .text import TextConditioning

__all__ = ["SCHEDULERS", "FaithDiffPipeline", "RestoreSettings", "TextConditioning", "make_scheduler"]

_HOMES = {
    "FaithDiffPipeline": ".pipeline",
    "SCHEDULERS": ".schedulers",
    "make_scheduler": ".schedulers",
    "RestoreSettings": ".settings",
    "TextConditioning": ".text",
}
"""Where the public names live. ComfyUI's nodes need the settings alone, so nothing else is imported for them."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
    return value
