"""The alignment as a patch on the U-Net's first block.

With `torch.compile` the patch becomes a part of the U-Net, and ComfyUI compiles that without guards on anything that
is reached through the transformer options: a compiled U-Net would go on with the strength, the tile and the sharing
that it saw first. So the patch takes what changes from call to call from a global of this module, where guards hold.
What cannot be compiled (embedding and keeping conditions, the look for an interruption) happens outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
from torch import Tensor

from ...faithdiff_core.backbone import SDXL, Backbone
from ...faithdiff_core.models.condition import ConditionEmbedder
from .sampling_run import CallCondition

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ...faithdiff_core.models.alignment import Alignment
    from ...faithdiff_core.tiling.grid import TileGrid

CACHE_SHARE = 0.05
"""Part of a device's memory that embedded conditions may take. Embedding again costs a percent of a U-Net call, so a
large share would buy little; at 1024 px tiles 5 % of 8 GB keep a 4096 px image whole."""

EmbeddedPart = tuple[Tensor | None, float, int]
"""For consecutive rows of a U-Net call: the condition (None leaves them alone), its strength, and how many copies of
the same latents these rows are."""

_running: dict[torch.device, tuple[EmbeddedPart, ...]] = {}
"""What the U-Net call that runs on each device gets. ComfyUI runs one call at a time on a device, and with several
devices each in its own thread. A global, so that guards see it."""


class AlignmentPatch:
    """Input-block patch that adds the alignment's residual after the U-Net's conv_in.

    Clones of a MODEL share it: it holds no state but conditions that are kept for what they were made of.

    Args:
        alignment: patcher of an `Alignment`; ComfyUI loads it with the U-Net.
        backbone: what it is made for.
    """

    def __init__(self, alignment: ModelPatcher, backbone: Backbone = SDXL) -> None:
        self.alignment = alignment
        self.backbone = backbone
        self._embedder = ConditionEmbedder(alignment.model, _cache_budget)

    def models(self) -> list[ModelPatcher]:
        """For ComfyUI: further models that have to be in memory."""
        return [self.alignment]

    def to(self, device_or_dtype: torch.device | torch.dtype) -> AlignmentPatch:
        """For ComfyUI: nothing moves here, `models` are moved on their own, and weights keep their dtype."""
        return self

    def cleanup(self) -> None:
        """For ComfyUI, at the end of a sampling run: forget the embedded conditions."""
        self._embedder.clear()

    def keep_for(self, grid: TileGrid, device: torch.device) -> None:
        """Forget a device's conditions if the tiles have moved."""
        self._embedder.keep_for(grid.starts, device)

    def __call__(self, h: Tensor, options: dict[str, Any]) -> Tensor:
        """Called after every input block with its output, (rows, channels, height, width).

        (The second argument's name is on purpose not ComfyUI's: guards on that one would be left out.)
        """
        if not torch.compiler.is_compiling():
            # ComfyUI checks for interrupts once per step; a tile of a large image can take as long as a step.
            comfy.model_management.throw_exception_if_processing_interrupted()
        parts = _running.get(h.device)
        if parts is None or options["block"] != ("input", 0):
            return h
        alignment: Alignment = self.alignment.model
        if len(parts) == 1:
            condition, strength, copies = parts[0]
            return h if condition is None else alignment(h, condition, strength, copies)
        rows = zip(h.chunk(len(parts)), parts, strict=True)
        return torch.cat([part if c is None else alignment(part, c, strength) for part, (c, strength, _) in rows])

    @contextmanager
    def running(self, parts: tuple[EmbeddedPart, ...], device: torch.device) -> Iterator[None]:
        """Have the U-Net calls on a device act with these parts while the context lasts."""
        outer = _running.get(device)
        _running[device] = parts
        try:
            yield
        finally:
            if outer is None:
                del _running[device]
            else:
                _running[device] = outer

    def parts(
        self,
        conditions: list[CallCondition | None],
        copies_equal: bool,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[EmbeddedPart, ...]:
        """What a U-Net call needs.

        Args:
            conditions: for each conditioning of the call, in the order of its rows; None leaves them alone.
            copies_equal: all rows of one image and tile are equal when they reach this patch, whatever their
                conditioning.
            rows: of each conditioning.
            device: of the call.
            dtype: what the U-Net computes in.

        Returns:
            One part for all conditionings where one residual serves all of them, else one for each; nothing where no
            LQ features act.
        """
        acting = [c if c is not None and c.strength != 0.0 else None for c in conditions]
        if not any(acting):
            return ()
        first = acting[0]
        if copies_equal and first is not None and all(c == first for c in acting):
            return ((self._embedded(first, rows, device, dtype), first.strength, len(acting)),)
        return tuple(
            (None, 0.0, 1) if c is None else (self._embedded(c, rows, device, dtype), c.strength, 1) for c in acting
        )

    def _embedded(self, condition: CallCondition, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The embedded condition of one conditioning's rows, (rows or 1, channels, height, width)."""
        features, tiles = condition.features.tensor, condition.tiles
        if features.shape[0] == 1 and len(tiles) == 1:
            return self._embedder(features, [(0, tiles[0])], device, dtype)
        images = rows // len(tiles)
        places = [(i % features.shape[0], tile) for tile in tiles for i in range(images)]
        return self._embedder(features, places, device, dtype)


def find_patch(model: ModelPatcher) -> AlignmentPatch | None:
    """The alignment patch of a MODEL, if it has one."""
    return patch_among(model.model_options["transformer_options"])


def set_patch(model: ModelPatcher, patch: AlignmentPatch) -> None:
    """Put an alignment on a cloned MODEL; one that is there is replaced."""
    patches: dict[str, list[Any]] = model.model_options["transformer_options"].setdefault("patches", {})
    others = [other for other in patches.get("input_block_patch", []) if not isinstance(other, AlignmentPatch)]
    # In front of the others: what they see is then what follows the alignment in the published model, and rows are
    # known to be equal where the alignment looks at them.
    patches["input_block_patch"] = [patch, *others]


def patch_among(transformer_options: dict[str, Any]) -> AlignmentPatch | None:
    """The alignment patch in transformer options, if there is one."""
    patches = transformer_options.get("patches", {}).get("input_block_patch", [])
    return next((patch for patch in patches if isinstance(patch, AlignmentPatch)), None)


def _cache_budget(device: torch.device) -> int:
    return int(comfy.model_management.get_total_memory(device) * CACHE_SHARE)
