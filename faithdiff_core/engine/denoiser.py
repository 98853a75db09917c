"""The denoiser: from noisy latents of any size to the U-Net's prediction (noise or v), tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone, tile_time_ids
from ..errors import SettingsError
from ..models.alignment import Alignment
from ..models.condition import ConditionEmbedder
from ..tiling.grid import Tile, TileGrid
from ..tiling.moving import TileGrids
from .alignment_hook import AlignmentHook
from .attribution import PromptAttention
from .settings import RestoreSettings
from .text import TextConditioning

Place = tuple[int, Tile]
"""Index of an image, and a part of its latent."""


class TiledDenoiser:
    """Predicts whole latents' noise, or v, with the U-Net, the alignment, guidance and tiles.

    Called as denoiser(x, t). All tiles of all images go through the U-Net, in groups of `tile_batch`, and their
    predictions are merged into one of the whole latent. A sampler that steps the whole latent with it therefore sees
    one consistent trajectory; for the published Euler sampler this equals stepping every tile and merging the results.

    The alignment's hook has to be on the U-Net during the calls: `with denoiser.hook.on(unet)`.

    Args:
        unet: diffusers' `UNet2DConditionModel`.
        backbone: its family.
        alignment: FaithDiff's alignment, on the U-Net's device.
        features: of the LQ encoder, (B, C, h, w), on any device; None at strength 0.
        text: one row, or one for each image.
        settings: `tile`, `overlap`, `tile_batch`, `tile_grid`, `cfg` and `strength` are used.
        size: (B, h, w) of the latents.
        sigma_of: noise level of a timestep; moving tiles follow it.
        seeds: of the images; moving tiles follow them. Default to 0.
        device: where to compute.
        dtype: dtype of the U-Net.
        condition_budget: bytes of embedded conditions that may be kept across calls.
        needed: where predictions are needed, (B or 1, 1, h, w), bool, on the CPU: tiles without any are not computed,
            and the prediction is zero there. Defaults to everywhere.
        predictions: number of calls of the denoiser in a run, for the progress.
        progress: called as progress(done, total) after each U-Net call of the run; it may raise to cancel.
        attention: records the cross-attention of the prompts (not of the negative ones).

    Raises:
        SettingsError: features or text do not fit the latents.
    """

    def __init__(
        self,
        unet: Any,
        backbone: Backbone,
        alignment: Alignment,
        features: Tensor | None,
        text: TextConditioning,
        settings: RestoreSettings,
        size: tuple[int, int, int],
        *,
        sigma_of: Callable[[Tensor], float],
        seeds: Sequence[int] | None = None,
        device: torch.device,
        dtype: torch.dtype,
        condition_budget: int,
        needed: Tensor | None = None,
        predictions: int = 1,
        progress: Callable[[int, int], None] | None = None,
        attention: PromptAttention | None = None,
    ) -> None:
        batch, height, width = size
        fits = features is not None and (features.shape[0], *features.shape[-2:]) == size
        if settings.strength and not fits:
            got = "none" if features is None else tuple(features.shape)
            raise SettingsError(f"Features must be ({batch}, channels, {height}, {width}) like the noise, got {got}.")
        if backbone.size_conditioning and text.pooled is None:
            raise SettingsError(f"{backbone.name} needs the text's pooled embeddings, too.")
        self.unet, self.features, self.device, self.dtype = unet, features, device, dtype
        self.size_conditioning = backbone.size_conditioning
        self.cfg, self.tile_batch, self.progress = settings.cfg, settings.tile_batch, progress
        self.tile_size = settings.tile
        self.text = text.rows(batch, settings.cfg > 1, device, dtype)
        # One for each image: its tiles, like its noise, follow its own seed, whatever else is in the batch.
        self.grids = [
            TileGrids(height, width, settings.tile, settings.overlap, settings.tile_grid, seed)
            for seed in seeds or [0] * batch
        ]
        self.sigma_of = sigma_of
        self.attention = attention
        self.hook = AlignmentHook(alignment, settings.strength)
        self.embedder = ConditionEmbedder(alignment, condition_budget)
        self._needed = None if needed is None else needed.expand(batch, -1, -1, -1)
        self._predictions, self._done = predictions, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict what the U-Net was trained to, noise or v; merging and guidance are linear in both.

        Args:
            x: latents as the U-Net takes them, (B, 4, h, w).
            t: timestep.

        Returns:
            (B, 4, h, w), float32.
        """
        sigma = self.sigma_of(t)
        grids = [grid.at(sigma) for grid in self.grids]
        self.embedder.keep_for(tuple(grid.starts for grid in grids), self.device)
        places = [
            (image, grid.tiles[i])
            for i in range(len(grids[0]))
            for image, grid in enumerate(grids)
            if self._needed is None or grid.tiles[i].crop(self._needed[image]).any()
        ]
        # Tiles that move may touch a mask in other numbers: what follows is taken to be like this prediction.
        total = self._done + self._predictions * -(-len(places) // self.tile_batch)
        self._predictions -= 1
        merged = torch.zeros_like(x, dtype=torch.float32)
        for first in range(0, len(places), self.tile_batch):
            group = places[first : first + self.tile_batch]
            for (image, tile), prediction in zip(group, self._predict(x, t, group, grids), strict=True):
                grids[image].merge(merged[image], tile, prediction)
            self._done += 1
            if self.progress is not None:
                self.progress(self._done, total)
        return merged

    def _predict(self, x: Tensor, t: Tensor, group: Sequence[Place], grids: Sequence[TileGrid]) -> Tensor:
        """The guided prediction for some tiles, (tiles, 4, tile height, tile width), float32."""
        if self.hook.strength:
            assert self.features is not None
            self.hook.condition = self.embedder(self.features, group, self.device, self.dtype)
        embeds, pooled = self.text.guided_rows(group, grids)
        copies = len(embeds) // len(group)
        latents = torch.cat([tile.crop(x[image : image + 1]) for image, tile in group])
        added = {}
        if self.size_conditioning:
            height, width = x.shape[-2:]
            ids = [tile_time_ids(height, width, tile.top, tile.left, self.tile_size) for _, tile in group]
            time_ids = torch.tensor(ids, device=self.device, dtype=self.dtype)
            added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids.repeat(copies, 1)}}
        recording: AbstractContextManager[None] = nullcontext()
        if self.attention is not None:
            recording = self.attention.recording(group, grids, copies, x)
        with recording:
            prediction: Tensor = self.unet(
                latents.to(self.dtype).repeat(copies, 1, 1, 1),
                t,
                encoder_hidden_states=embeds,
                return_dict=False,
                **added,
            )[0].float()
        if copies == 1:
            return prediction
        # The negative half comes first.
        negative, positive = prediction.chunk(2)
        return negative + self.cfg * (positive - negative)
