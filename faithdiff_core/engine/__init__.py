"""FaithDiff on diffusers: from files to restored images, without any other host.

Needs diffusers, transformers and accelerate (the extra `engine`); they are imported when a pipeline is made.
"""

from __future__ import annotations

from .pipeline import FaithDiffPipeline
from .schedulers import SCHEDULERS, make_scheduler
from .settings import RestoreSettings
from .text import TextConditioning

__all__ = ["SCHEDULERS", "FaithDiffPipeline", "RestoreSettings", "TextConditioning", "make_scheduler"]
