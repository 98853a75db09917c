"""The alignment as a patch on the U-Net's first block.

The sampling wrapper (`sampling.py`) says, before each U-Net call, which LQ features belong to which conditioning and
which part of the latent the call sees: the `StepPlan`. Just before the U-Net, `apply_model` makes of it what the rows
of this call need, the `LQRows`, with embedded conditions; the patch adds the alignment's residual with them.

With `torch.compile` the patch becomes a part of the U-Net, and the host compiles that without guards on anything that
is reached through the transformer options: a compiled U-Net would go on with the strength, the tile and the sharing
that it saw first. So the patch takes what changes from call to call from elsewhere, where guards hold. What cannot be
compiled (the cache, the look for an interruption) happens outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

import comfy.model_management
import torch
from torch import Tensor

from ...faithdiff_core.models.condition_cache import ConditionCache
from .graph_types import LQFeatures

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ...faithdiff_core.models.alignment import Alignment

PLAN_KEY = "faithdiff_plan"
"""Where the transformer options carry the `StepPlan`."""

CACHE_SHARE = 0.05
"""Part of the device's memory that embedded conditions may take. Embedding anew costs a percent of a U-Net call, so a
large share would buy little; at 1024 px tiles 5 % of 8 GB keep a 4096 px image whole."""

Box = tuple[int, int, int, int]
"""Top, left, height, width in latent units."""


@dataclass(frozen=True)
class LQChunk:
    """What one conditioning's rows of a U-Net call get.

    Attributes:
        features: the features of the whole image.
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


@dataclass(frozen=True)
class LQRows:
    """What the alignment needs for one U-Net call.

    Attributes:
        conditions: for each conditioning of the call, in its order, the embedded condition of its rows, (rows or 1,
            channels, height, width); None leaves its rows alone.
        strengths: factor on the residual, for each conditioning.
        shared: all rows of one image and tile are equal before the alignment, so the first conditioning's residual
            serves all others.
    """

    conditions: tuple[Tensor | None, ...]
    strengths: tuple[float, ...]
    shared: bool


class AlignmentPatch:
    """Input-block patch that adds the alignment's residual after the U-Net's first convolution.

    It holds no state but a cache with complete keys, so clones of a MODEL can share it.

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

    def __call__(self, h: Tensor, options: dict[str, Any]) -> Tensor:
        """Called after every input block with its output, (rows, channels, height, width).

        (The second argument's name is on purpose not the host's: guards on that one would be left out.)
        """
        if not torch.compiler.is_compiling():
            # The host looks for an interruption once a step; a tile of a large image can take as long as a step.
            comfy.model_management.throw_exception_if_processing_interrupted()
        lq = _running.get(h.device)
        if lq is None or options["block"] != ("input", 0):
            return h
        alignment: Alignment = self.alignment.model
        first = lq.conditions[0]
        if lq.shared and first is not None:
            # Every guidance half sees the same latent, and text enters later: one residual serves all of them.
            chunks = len(lq.conditions)
            residual = alignment.residual(h[: h.shape[0] // chunks], first)
            return torch.add(h.view(chunks, *residual.shape), residual.unsqueeze(0), alpha=lq.strengths[0]).view_as(h)
        parts = zip(h.chunk(len(lq.conditions)), lq.conditions, lq.strengths, strict=True)
        return torch.cat([part if c is None else alignment(part, c, strength) for part, c, strength in parts])

    def rows(
        self, transformer_options: dict[str, Any], rows: int, device: torch.device, dtype: torch.dtype
    ) -> LQRows | None:
        """What a U-Net call of `rows` rows needs; None where no LQ features act.

        Args:
            transformer_options: of the call, with the `StepPlan` and the rows' conditionings (`uuids`).
            rows: of the call.
            device: of the call.
            dtype: what the U-Net computes in.
        """
        plan: StepPlan | None = transformer_options.get(PLAN_KEY)
        if plan is None:
            return None
        chunks = [plan.chunks.get(uuid) for uuid in transformer_options["uuids"]]
        if not any(chunk is not None and chunk.strength != 0.0 for chunk in chunks):
            return None
        first = chunks[0]
        others_first = transformer_options["patches"]["input_block_patch"][0] is not self
        shared = first is not None and plan.shareable and not others_first and all(chunk == first for chunk in chunks)
        each = rows // len(chunks)
        conditions: list[Tensor | None]
        if shared and first is not None:
            conditions = [self._condition(first, each, device, dtype)] * len(chunks)
        else:
            conditions = [
                None if chunk is None or chunk.strength == 0.0 else self._condition(chunk, each, device, dtype)
                for chunk in chunks
            ]
        strengths = tuple(0.0 if chunk is None else chunk.strength for chunk in chunks)
        return LQRows(tuple(conditions), strengths, shared)

    def _condition(self, chunk: LQChunk, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The embedded condition of a chunk's rows, (rows or 1, channels, height, width)."""
        parts = [self._embedded(chunk.features, box, device, dtype) for box in chunk.boxes]
        if len(parts) == 1:
            part = parts[0]
            return part if part.shape[0] in (1, rows) else part.repeat(rows // part.shape[0], 1, 1, 1)
        images = rows // len(parts)
        return torch.cat([part.expand(images, -1, -1, -1) for part in parts])

    def _embedded(self, features: LQFeatures, box: Box, device: torch.device, dtype: torch.dtype) -> Tensor:
        def embed() -> Tensor:
            top, left, height, width = box
            crop = features.tensor[..., top : top + height, left : left + width]
            return self.alignment.model.embed(crop.to(device=device, dtype=dtype))

        if self._cache is None:
            budget = int(comfy.model_management.get_total_memory(device) * CACHE_SHARE)
            self._cache = ConditionCache(budget)
        return self._cache.get((features, box, device, dtype), embed)


_running: dict[torch.device, LQRows] = {}
"""The rows of the U-Net call that runs on each device; there is one at a time. Global, so that guards see it."""


def apply_model(
    executor: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None,
    c_crossattn: Tensor | None,
    control: Any,
    transformer_options: dict[str, Any],
    **arguments: Any,
) -> Tensor:
    """Wrapper around the host's `apply_model`: give the patch the rows of this call."""

    def run() -> Tensor:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **arguments)

    patch = _patch_among(transformer_options)
    if patch is None:
        return run()
    dtype = executor.class_obj.get_dtype_inference()  # type: ignore[attr-defined]
    rows = patch.rows(transformer_options, x.shape[0], x.device, dtype)
    if rows is None:
        return run()
    _running[x.device] = rows
    try:
        return run()
    finally:
        del _running[x.device]


def find_patch(model: ModelPatcher) -> AlignmentPatch | None:
    """The alignment patch of a MODEL, if it has one."""
    return _patch_among(model.model_options["transformer_options"])


def set_patch(model: ModelPatcher, patch: AlignmentPatch) -> None:
    """Put an alignment on a MODEL of one's own (a clone); one that is there is replaced."""
    patches: dict[str, list[Any]] = model.model_options["transformer_options"].setdefault("patches", {})
    others = [other for other in patches.get("input_block_patch", []) if not isinstance(other, AlignmentPatch)]
    # In front of the others: what they see is then what follows the alignment in the published model, and rows are
    # known to be equal where the alignment looks at them.
    patches["input_block_patch"] = [patch, *others]


def _patch_among(transformer_options: dict[str, Any]) -> AlignmentPatch | None:
    patches = transformer_options.get("patches", {}).get("input_block_patch", [])
    return next((patch for patch in patches if isinstance(patch, AlignmentPatch)), None)
