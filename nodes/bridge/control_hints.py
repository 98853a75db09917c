"""ControlNet hints under tiles.

A ControlNet fits its whole hint to whatever latent it is called with, so a tile has to be given the hint's part. For
the time of one call the hint of every control in the chain is exchanged for the tiles' crops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import comfy.utils
import torch
from torch import Tensor

from ...faithdiff_core.tiling.grid import Tile
from .patch_state import ImageMasks, Slot, slots_of

if TYPE_CHECKING:
    from comfy.controlnet import ControlBase

Conds = Sequence[Sequence[dict[str, Any]] | None]


class ControlHints:
    """Hints of one sampling run, each enlarged once to the whole image, and the masks that controls hold."""

    def __init__(self) -> None:
        self._full: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._masks = ImageMasks()

    def have_masks(self, conds: Conds) -> bool:
        """Whether controls of the conditionings hold masks of the image; a call can see one tile only then."""
        return any(self._masks.find(slots_of([("", control)], whole=True)) for control in _controls(conds))

    @contextmanager
    def cropped(
        self,
        conds: Conds,
        size: tuple[int, int],
        tiles: Sequence[Tile],
        images: int,
    ) -> Iterator[None]:
        """Give all controls of `conds` the hints of `tiles` while the context lasts.

        Args:
            conds: the conditionings of a step.
            size: (height, width) of the whole latent.
            tiles: tiles of one U-Net call, in order.
            images: rows of each tile.
        """
        saved: list[tuple[ControlBase, Tensor | None, list[Tensor]]] = []
        masks: list[tuple[Slot, Any, Any]] = []
        try:
            for control in _controls(conds):
                slots = slots_of([("", control)], whole=True)
                masks.extend((slot, name, value) for slot in slots for name, value in _masks_and_derived(slot))
                if len(tiles) == 1:
                    for slot, name in self._masks.find(slots):
                        slot.write(name, self._masks.cut(slot.read()[name], *size, tiles[0]))
                extra = list(getattr(control, "extra_concat_orig", []))
                saved.append((control, control.cond_hint_original, extra))
                if control.cond_hint_original is not None:
                    control.cond_hint_original = self._crops(control, control.cond_hint_original, size, tiles, images)
                if extra:
                    control.extra_concat_orig = [self._crops(control, e, size, tiles, images) for e in extra]
                _forget(control)
            yield
        finally:
            for slot, name, value in reversed(masks):  # a control may be reached through another one, too
                slot.write(name, value)
            for control, hint, extra in saved:
                control.cond_hint_original = hint
                if extra:
                    control.extra_concat_orig = extra
                _forget(control)

    def _crops(
        self, control: ControlBase, hint: Tensor, size: tuple[int, int], tiles: Sequence[Tile], images: int
    ) -> Tensor:
        scale = _hint_scale(control)
        full = self._enlarged(control, hint, size[0] * scale, size[1] * scale)
        crops = [tile.crop(full, scale) for tile in tiles]
        if len(crops) == 1:
            return crops[0]
        # Rows are tile by tile, and image by image within a tile.
        return torch.cat([comfy.utils.repeat_to_batch_size(crop, images) for crop in crops])

    def _enlarged(self, control: ControlBase, hint: Tensor, height: int, width: int) -> Tensor:
        """The hint at the size of the whole image, made as the control itself would make it."""
        # The hint is kept beside the result: an id is only unique while its object lives.
        key = (id(hint), height, width)
        known = self._full.get(key)
        if known is None:
            full = comfy.utils.common_upscale(hint, width, height, control.upscale_algorithm, "center")
            known = self._full[key] = (hint, full)
        return known[1]


def _masks_and_derived(slot: Slot) -> list[tuple[Any, Any]]:
    """Masks, and places for what is made of them, which are empty before a control is called."""
    return [
        (name, value)
        for name, value in slot.read().items()
        if isinstance(name, str) and "mask" in name.lower() and (value is None or isinstance(value, Tensor))
    ]


def _hint_scale(control: ControlBase) -> int:
    """Hint pixels per latent unit."""
    vae = getattr(control, "vae", None)
    return control.compression_ratio * (vae.spacial_compression_encode() if vae is not None else 1)


def _controls(conds: Conds) -> list[ControlBase]:
    """All controls of the conditionings, with those that they are chained to, each once."""
    found: dict[int, ControlBase] = {}
    for group in conds:
        for cond in group or ():
            control = cond.get("control")
            while control is not None and id(control) not in found:
                found[id(control)] = control
                control = control.previous_controlnet
    return list(found.values())


def _forget(control: ControlBase) -> None:
    """Drop what a control has derived from its hint."""
    control.cond_hint = None
    if hasattr(control, "control_input"):
        control.control_input = None
