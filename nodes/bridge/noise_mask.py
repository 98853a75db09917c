"""Noise masks and tiles: a tile that the mask leaves out is not computed.

ComfyUI's samplers blend in what the mask keeps before and after every call of the MODEL, so what is predicted there has
no effect. In a tile that the mask does not touch, nothing has.
"""

from __future__ import annotations

import logging
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...faithdiff_core.tiling.grid import Tile
from .patch_state import node_name

_LOG = logging.getLogger(__name__)

MASK_FUNCTION = "denoise_mask_function"
"""ComfyUI's: the model option that changes a mask from step to step (Differential Diffusion)."""

_GUIDANCE = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
)
"""ComfyUI's model options of functions that get predictions of the whole latent."""


class NoiseMask:
    """The noise mask of a sampling run.

    Args:
        mask: (B, C, h, w); above 0 where the latent changes.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        self._changes: Tensor | None = None
        self._touched: Tensor | None = None
        self.skips = True

    def begin(self, guider: Any, model_options: dict[str, Any]) -> dict[str, Any]:
        """Prepare for a run.

        Args:
            guider: ComfyUI's, whose predictions the sampler asks for.
            model_options: of the run.

        Returns:
            The model options to sample with.
        """
        reason = _looks_at_everything(guider, model_options)
        if reason is not None:
            self.skips = False
            _LOG.info("FaithDiff: %s looks at the whole latent, so tiles outside the noise mask are computed.", reason)
        function = model_options.get(MASK_FUNCTION)
        if function is None:
            self._see(self._mask)
            return model_options

        def seen(sigma: Tensor, denoise_mask: Tensor, *args: Any, **more: Any) -> Tensor:
            mask: Tensor = function(sigma, denoise_mask, *args, **more)
            self._see(mask)
            return mask

        return {**model_options, MASK_FUNCTION: seen}

    def _see(self, mask: Tensor) -> None:
        """A mask that holds for the next calls of the MODEL."""
        changes = mask > 0
        self._touched = changes.flatten(0, -3).any(dim=0).cpu()
        self._changes = changes if self._changes is None else self._changes | changes

    def touched(self, tiles: tuple[Tile, ...], size: tuple[int, int]) -> tuple[Tile, ...]:
        """The tiles of a latent of this size, (height, width), that have to be computed now."""
        if not self.skips or self._touched is None or tuple(self._touched.shape) != size:
            return tiles
        return tuple(tile for tile in tiles if tile.crop(self._touched).any())

    def kept(self, latent: Tensor, result: Tensor) -> Tensor:
        """The result of a run with the latent that was given, to the bit, where no step could change it."""
        if self._changes is None or self._changes.shape[-2:] != result.shape[-2:]:
            return result
        return torch.where(self._changes.to(result.device), result, latent.to(result))


def mask_of(sampler: Any, tiled: bool, denoise_mask: Tensor | None) -> NoiseMask | None:
    """The mask of a run whose sampler is known to blend with it; None for others, and without tiles or a mask."""
    # A sampler of another pack may do anything with the mask.
    blends = type(sampler).sample is comfy.samplers.KSAMPLER.sample
    if not tiled or not blends or denoise_mask is None or denoise_mask.ndim != 4:
        return None
    return NoiseMask(denoise_mask)


def _looks_at_everything(guider: Any, model_options: dict[str, Any]) -> str | None:
    """What works on predictions of the whole latent, and might use those outside the mask; None if nothing does."""
    for name in _GUIDANCE:
        value = model_options.get(name)
        functions = value if isinstance(value, list) else [value]
        for function in functions:
            if function is not None:
                return node_name(function)
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.PREDICT_NOISE, {})
    for by_key in wrappers.values():
        for wrapper in by_key:
            return node_name(wrapper)
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        return type(guider).__name__
    return None
