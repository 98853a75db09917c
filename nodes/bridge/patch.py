"""The alignment as a patch on the U-Net's first block.

The sampling wrapper (`sampling.py`) says, before each U-Net call, which LQ features belong to which conditioning and
which part of the latent the call sees: the `StepPlan`. The patch finds the plan in the transformer options, the rows'
conditionings in `uuids`, and adds the alignment's residual. It holds no state but a cache with complete keys, so clones
of a MODEL can share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

import comfy.model_management
import torch
from torch import Tensor

from ...faithdiff_core.conditions import ConditionCache
from .types import LQFeatures

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

PLAN_KEY = "faithdiff_plan"
"""Where the transformer options carry the `StepPlan`."""

CACHE_SHARE = 0.05
"""Part of the device's memory that embedded conditions may take. Embedding anew costs a percent of a U-Net call, so a
large share would buy little; at 1024 px tiles 5 % of 8 GB keep a 4096 px picture whole."""

Box = tuple[int, int, int, int]
"""Top, left, height, width in latent units."""


@dataclass(frozen=True)
class LQChunk:
    """What one conditioning's rows of a U-Net call get.

    Attributes:
        features: the features of the whole picture.
        boxes: the part that each tile of the call sees; rows are tile by tile, and image by image within a tile.
        strength: factor on the residual.
    """

    features: LQFeatures
    boxes: tuple[Box, ...]
    strength: float


@dataclass
class StepPlan:
    """What the U-Net calls of one step and one group of tiles get.

    Attributes:
        chunks: by the conditioning's uuid; a conditioning that is missing is left alone.
        shareable: whether all rows of one image and tile are equal before the alignment, whatever their conditioning.
            True unless a control or concatenated latents differ between conditionings.
    """

    chunks: dict[UUID, LQChunk] = field(default_factory=dict)
    shareable: bool = True


class AlignmentPatch:
    """Input-block patch that adds the alignment's residual after the U-Net's first convolution.

    Args:
        alignment: patcher of an `Alignment`; the host loads it with the U-Net.
    """

    def __init__(self, alignment: ModelPatcher) -> None:
        self.alignment = alignment
        self._cache: ConditionCache | None = None

    def models(self) -> list[ModelPatcher]:
        """For the host: further models that have to be in memory."""
        return [self.alignment]

    def to(self, device_or_dtype: torch.device | torch.dtype) -> AlignmentPatch:
        """For the host: nothing moves here, `models` are moved on their own, and weights keep their dtype."""
        return self

    def cleanup(self) -> None:
        """For the host, at the end of a sampling run: forget the embedded conditions."""
        if self._cache is not None:
            self._cache.clear()

    def __call__(self, h: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """Called after every input block with its output, (rows, channels, height, width)."""
        # The host looks for an interruption once a step; a tile of a large picture can take as long as a step.
        comfy.model_management.throw_exception_if_processing_interrupted()
        plan: StepPlan | None = transformer_options.get(PLAN_KEY)
        if plan is None or transformer_options["block"] != ("input", 0):
            return h
        uuids: list[UUID] = transformer_options["uuids"]
        chunks = [plan.chunks.get(uuid) for uuid in uuids]
        if not any(chunk is not None and chunk.strength != 0.0 for chunk in chunks):
            return h
        rows = h.shape[0] // len(chunks)
        first = chunks[0]
        others_first = transformer_options["patches"]["input_block_patch"][0] is not self
        if first is not None and plan.shareable and not others_first and all(chunk == first for chunk in chunks):
            # Every guidance half sees the same latent, and text enters later: one residual serves all of them.
            residual = self.alignment.model.residual(h[:rows], self._condition(first, rows, h))
            shared = torch.add(h.view(len(chunks), *residual.shape), residual.unsqueeze(0), alpha=first.strength)
            return shared.view_as(h)
        return torch.cat([self._aligned(part, chunk) for part, chunk in zip(h.chunk(len(chunks)), chunks, strict=True)])

    def _aligned(self, h: Tensor, chunk: LQChunk | None) -> Tensor:
        if chunk is None or chunk.strength == 0.0:
            return h
        return self.alignment.model(h, self._condition(chunk, h.shape[0], h), chunk.strength)

    def _condition(self, chunk: LQChunk, rows: int, h: Tensor) -> Tensor:
        """The embedded condition of a chunk's rows, (rows or 1, channels, height, width), like `h`."""
        parts = [self._embedded(chunk.features, box, h) for box in chunk.boxes]
        if len(parts) == 1:
            part = parts[0]
            return part if part.shape[0] in (1, rows) else part.repeat(rows // part.shape[0], 1, 1, 1)
        images = rows // len(parts)
        return torch.cat([part.expand(images, -1, -1, -1) for part in parts])

    def _embedded(self, features: LQFeatures, box: Box, h: Tensor) -> Tensor:
        def embed() -> Tensor:
            top, left, height, width = box
            crop = features.tensor[..., top : top + height, left : left + width]
            return self.alignment.model.embed(crop.to(device=h.device, dtype=h.dtype))

        if self._cache is None:
            budget = int(comfy.model_management.get_total_memory(h.device) * CACHE_SHARE)
            self._cache = ConditionCache(budget)
        return self._cache.get((features, box, h.device, h.dtype), embed)


def find_patch(model: ModelPatcher) -> AlignmentPatch | None:
    """The alignment patch of a MODEL, if it has one."""
    patches = _input_block_patches(model)
    return next((patch for patch in patches if isinstance(patch, AlignmentPatch)), None)


def set_patch(model: ModelPatcher, patch: AlignmentPatch) -> None:
    """Put an alignment on a MODEL of one's own (a clone); one that is there is replaced."""
    patches: dict[str, list[Any]] = model.model_options["transformer_options"].setdefault("patches", {})
    others = [other for other in _input_block_patches(model) if not isinstance(other, AlignmentPatch)]
    # In front of the others: what they see is then what follows the alignment in the published model, and rows are
    # known to be equal where the alignment looks at them.
    patches["input_block_patch"] = [patch, *others]


def _input_block_patches(model: ModelPatcher) -> Iterable[Any]:
    return model.model_options["transformer_options"].get("patches", {}).get("input_block_patch", [])
