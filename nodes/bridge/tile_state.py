"""Patches that keep something between U-Net calls: every tile has it for itself.

A cache, say, answers a call with what it kept of the last one. With tiles that would be another tile's. So whatever the
patches of a MODEL change during a tile's call is set aside after it, and put back before the tile's next one: each
tile finds what it would have found if it had been sampled alone. What a patch hands to the guidance, which works on the
whole latent, cannot be told apart so; such patches are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy.patcher_extension import WrappersMP

from ...faithdiff_core.errors import SettingsError
from ...faithdiff_core.tiling.grid import Tile
from .patch_state import (
    MISSING,
    ImageMasks,
    Values,
    assigned_cells,
    changed,
    node_name,
    read_all,
    same,
    slots_of,
    write_changes,
)
from .sampling_run import RUN_KEY

INNER_WRAPPERS = (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
"""Wrappers around what happens for one tile; the others are around a step or the whole run."""

HOST_OPTIONS = {RUN_KEY, "wrappers", "callbacks", "patches", "patches_replace", "sample_sigmas", "cond_or_uncond"}


class TileState:
    """What the patches of a MODEL hold, apart for every tile of a sampling run.

    Args:
        model_options: of the run, before its first step.

    Attributes:
        masks: patches hold masks of the image.
        kept: a patch was seen to keep something from call to call.
        known: a call has been seen.
    """

    def __init__(self, model_options: dict[str, Any]) -> None:
        inner, outer = _callables(model_options)
        self._slots = slots_of(inner)
        self._inner = [root for _, root in inner]
        self._guidance = {id(slot.owner): slot.root for slot in slots_of(outer)}
        self._image_masks = ImageMasks()
        self._kept: dict[Tile, Values] = {}
        self._outside: dict[Tile, Values] = {}
        self.masks = bool(self._image_masks.find(self._slots))
        self.kept = False
        self.known = not self._slots

    def one_by_one(self) -> bool:
        """Whether a U-Net call may see one tile only."""
        return self.masks or self.kept or not self.known

    def refuse_what_guidance_reads(self, tiles: int) -> None:
        """Refuse patches that assign, in a U-Net call, to what the guidance reads afterwards.

        Raises:
            SettingsError: there is one; the text names its node.
        """
        for cell in assigned_cells(self._inner):
            if cell in self._guidance:
                raise SettingsError(_refusal(self._guidance[cell], tiles))

    def keep_for(self, tiles: tuple[Tile, ...]) -> None:
        """Forget what was kept for tiles that a step no longer has: it would be of an older step when they return."""
        for tile in self._kept.keys() - set(tiles):
            del self._kept[tile], self._outside[tile]

    @contextmanager
    def of(self, tiles: tuple[Tile, ...], size: tuple[int, int], total: int) -> Iterator[None]:
        """While the context lasts, patches hold what belongs to these tiles.

        Args:
            tiles: of one U-Net call; a single one where `one_by_one` says so.
            size: (height, width) of the whole latent.
            total: tiles of the whole latent.

        Raises:
            SettingsError: the call changed what the guidance reads.
        """
        if not self._slots:
            yield
            return
        outside = read_all(self._slots)
        if len(tiles) == 1:
            self._put_back(tiles[0], outside)
            if self.masks:
                for slot, name in self._image_masks.find(self._slots):
                    slot.write(name, self._image_masks.cut(slot.read()[name], *size, tiles[0]))
        before = read_all(self._slots)
        try:
            yield
        finally:
            after = read_all(self._slots)
            write_changes(self._slots, after, outside)
        changes = changed(before, after)
        self.known = True
        for number, _ in changes:
            owner = id(self._slots[number].owner)
            if owner in self._guidance and total > 1:
                raise SettingsError(_refusal(self._guidance[owner], total))
        if changes:
            self.kept = True
            for tile in tiles if len(tiles) == 1 else ():
                kept = self._kept.setdefault(tile, {})
                kept.update({key: after.get(key, MISSING) for key in changes})
                self._outside[tile] = {key: outside.get(key, MISSING) for key in kept}

    def _put_back(self, tile: Tile, outside: Values) -> None:
        """Give the slots a tile's values, but for those that somebody outside of tiles has changed since."""
        kept, known = self._kept.get(tile, {}), self._outside.get(tile, {})
        for (number, name), value in list(kept.items()):
            key = (number, name)
            if same(outside.get(key, MISSING), known.get(key, MISSING)):
                self._slots[number].write(name, value)
            else:
                del kept[key]


def _callables(model_options: dict[str, Any]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """What works within a tile's call, and what works on the whole latent."""
    options = model_options.get("transformer_options", {})
    inner: list[tuple[str, Any]] = []
    outer: list[tuple[str, Any]] = []
    for kind, by_key in options.get("wrappers", {}).items():
        for wrappers in by_key.values():
            (inner if kind in INNER_WRAPPERS else outer).extend(("", wrapper) for wrapper in wrappers)
    for patches in options.get("patches", {}).values():
        inner.extend(("", patch) for patch in patches)
    for blocks in options.get("patches_replace", {}).values():
        inner.extend(("", patch) for patch in blocks.values())
    inner.extend((name, value) for name, value in options.items() if name not in HOST_OPTIONS)
    for name, value in model_options.items():
        if name == "model_function_wrapper":
            inner.append(("", value))
        elif name != "transformer_options" and not name.startswith("multigpu"):
            outer.extend(("", item) for item in (value if isinstance(value, list) else [value]))
    return inner, outer


def _refusal(root: Any, tiles: int) -> str:
    return (
        f"FaithDiff: {node_name(root)} takes what it saw in one U-Net call for the whole latent and guides with it "
        f"afterwards, but here the latent is sampled in {tiles} tiles, and a call sees one of them. Take that node "
        f"out, or sample in one tile: a tile_size of at least the image's longer side."
    )
