"""The stages of a restoration, each of which can be used by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..captions.tile_captions import TileCaptions
from ..captions.tile_texts import TILE_MIX, TileTexts, same_length
from ..errors import NotFiniteError, SettingsError
from ..finite import is_finite
from ..models.alignment import Alignment
from ..models.lq_encoder import ENCODER_OVERLAP, ENCODER_TILE, LQEncoder
from .attribution import PromptAttention
from .denoiser import TiledDenoiser
from .kept import Kept
from .latents import decode_latent, encode_latent
from .loading import Offload
from .long_prompts import LongPrompt, encode_in_chunks, fit_at_once
from .schedulers import fresh_scheduler, initial_latent, noise_level, run_scheduler
from .settings import RestoreSettings
from .text import TextConditioning

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total); stages are `encode`, `sample` and `decode`. It may raise to cancel."""

_TEXTS_AT_ONCE = 16
"""Texts of parts that are encoded together: there may be a thousand."""


class Stages:
    """Text, LQ features, latents, sampling and decoding with models that are loaded and placed.

    Attributes:
        base: diffusers' pipeline of the backbone (SDXL: `StableDiffusionXLPipeline`).
        backbone: the base's family.
        lq_encoder, alignment: FaithDiff's parts.
        device: where to compute.
        offload: how models are kept off the device while they are not used.
        condition_budget: bytes of embedded conditions that are kept across steps.
    """

    base: Any
    backbone: Backbone
    lq_encoder: LQEncoder
    alignment: Alignment
    device: torch.device
    offload: Offload
    condition_budget: int

    @property
    def dtype(self) -> torch.dtype:
        """What the U-Net computes in."""
        dtype: torch.dtype = self.base.unet.dtype
        return dtype

    @torch.no_grad()
    def encode_text(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None = None,
        *,
        guided: bool = True,
        long_prompt: LongPrompt | str = LongPrompt.CHUNKS,
    ) -> TextConditioning:
        """Encode texts with the checkpoint's text encoders.

        An empty negative prompt is encoded too, as FaithDiff was published. (SDXL pipelines take zeros for a negative
        prompt that is absent.)

        Args:
            prompts: one for each image.
            negative_prompts: as many. Default to empty ones.
            guided: whether guidance needs the negative ones.
            long_prompt: `chunks` encodes prompts of more than 75 tokens in chunks, `cut` cuts them as published.
        """
        negative = list(negative_prompts) if negative_prompts is not None else [""] * len(prompts)
        texts = [*prompts, *(negative if guided else ())]
        if not fit_at_once(self.base, texts):
            embeds, pooled = encode_in_chunks(self.base, texts, LongPrompt(long_prompt), self.device)
            self.base.maybe_free_model_hooks()
            return TextConditioning.of_prompts(same_length(embeds), pooled, len(prompts))
        encoded = self.base.encode_prompt(
            prompt=list(prompts),
            negative_prompt=negative,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        self.base.maybe_free_model_hooks()
        # Embeddings and negative ones; where the U-Net takes pooled ones too, these follow in the same order.
        embeds, negative_embeds, pooled, negative_pooled = (*encoded, None, None)[:4]
        return TextConditioning(embeds, pooled, negative_embeds, negative_pooled)

    def encode_tiles(
        self,
        captions: Sequence[TileCaptions | None],
        mix: float = TILE_MIX,
        *,
        long_prompt: LongPrompt | str = LongPrompt.CHUNKS,
    ) -> tuple[TileTexts | None, ...]:
        """Encode the captions of images' parts, as `TextConditioning.tiles` takes them.

        Args:
            captions: of each image's parts; None for an image that has none.
            mix: share of the parts' texts, 0 to 1; the rest is the whole image's.
            long_prompt: see `encode_text`.

        Raises:
            SettingsError: mix out of range.
        """
        texts = sorted({text for each in captions if each is not None for text in each.captions})
        encoded: dict[str, tuple[Tensor, Tensor | None]] = {}
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            some = texts[first : first + _TEXTS_AT_ONCE]
            rows = self.encode_text(some, guided=False, long_prompt=long_prompt)
            pooled: Sequence[Tensor | None] = [None] * len(some) if rows.pooled is None else rows.pooled.split(1)
            encoded.update(zip(some, zip(rows.embeds.split(1), pooled, strict=True), strict=True))
        return tuple(
            None
            if each is None
            else TileTexts(
                each.layout,
                tuple(encoded[text][0] for text in each.captions),
                tuple(encoded[text][1] for text in each.captions),
                mix,
            )
            for each in captions
        )

    def encode_lq(
        self,
        pixels: Tensor,
        tile: int | None = ENCODER_TILE,
        overlap: float = ENCODER_OVERLAP,
        progress: Progress | None = None,
        needed: Tensor | None = None,
    ) -> Tensor:
        """Features of low-quality images of the result's size.

        Args:
            pixels: RGB in [-1, 1], (B, 3, H, W), sides multiples of 8; features are kept on its device.
            tile, overlap, progress, needed: see `LQEncoder.encode` and `Progress`.

        Returns:
            (B, C, H / 8, W / 8), on the device of `pixels`.
        """
        with self._on_device(self.lq_encoder):
            staged = _staged(progress, "encode")
            return self.lq_encoder.encode(pixels, tile, overlap, staged, device=self.device, needed=needed)

    @torch.no_grad()
    def encode_latent(self, pixels: Tensor, tile: int | None = None) -> Tensor:
        """The VAE's latent of images, times its scaling factor: the mean of the distribution, so no chance is in it.

        Args:
            pixels: RGB in [-1, 1], (B, 3, H, W), sides multiples of 8.
            tile: tile side in pixels; None encodes in one piece.

        Returns:
            (B, 4, H / 8, W / 8), float32, on the device that computes.

        Raises:
            NotFiniteError: the VAE overflows in half precision.
        """
        latent = encode_latent(self.base.vae, pixels, tile, self.device)
        self.base.maybe_free_model_hooks()
        return latent

    @torch.no_grad()
    def decode(self, latent: Tensor, tile: int | None = None, progress: Progress | None = None) -> Tensor:
        """Decode latents to images, one by one.

        Args:
            latent: (B, 4, h, w), as `sample` gives it.
            tile: tile side in pixels; None decodes in one piece. Tiles share their statistics, so no seams or shifts
                of colour come from them.
            progress: see `Progress`.

        Returns:
            RGB in [0, 1], (B, 3, 8 h, 8 w), float32, on the CPU.

        Raises:
            NotFiniteError: the VAE overflows in half precision.
        """
        pixels = decode_latent(self.base.vae, latent, tile, self.device, _staged(progress, "decode"))
        self.base.maybe_free_model_hooks()
        return (pixels / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def sample(
        self,
        features: Tensor | None,
        text: TextConditioning,
        noise: Tensor,
        settings: RestoreSettings | None = None,
        *,
        lq_latent: Tensor | None = None,
        generators: list[torch.Generator] | None = None,
        mask: Tensor | None = None,
        progress: Progress | None = None,
        attention: PromptAttention | None = None,
        **overrides: Any,
    ) -> Tensor:
        """Run the sampling loop on latents of one size.

        At every step all tiles of all images go through the U-Net, their predictions are merged into one of the whole
        latent, and the scheduler steps that once. For the published Euler sampler this equals stepping every tile and
        merging the results, and any other scheduler sees one consistent trajectory.

        Args:
            features: from `encode_lq`, (B, C, h, w), on any device; None only at strength 0.
            text: one row, or one for each image.
            noise: standard normal, (B, 4, h, w).
            settings: how to sample. Defaults to the published settings.
            lq_latent: from `encode_latent`, for the start `lr` and with a mask.
            generators: one for each image, for schedulers that add noise on the way; moving tiles follow their seeds.
            mask: above 0 where the latent is sampled, (B or 1, 1, h, w). Elsewhere the result is `lq_latent`, and tiles
                that the mask does not touch are not computed.
            progress: called after each U-Net call.
            attention: records the prompts' cross-attention.
            **overrides: single settings by name, which replace those of `settings`.

        Returns:
            (B, 4, h, w), float32, on the device that computes.

        Raises:
            SettingsError: a setting out of range, or features, latents, mask or text of other sizes.
            TypeError: an override that is not a setting.
            NotFiniteError: the U-Net overflows in half precision.
        """
        settings = (settings or RestoreSettings()).changed(**overrides)
        if mask is not None and (lq_latent is None or mask.shape[-2:] != noise.shape[-2:]):
            raise SettingsError("A mask needs `lq_latent`, and the size of the noise in latent units.")
        if settings.tile > self.backbone.tile:
            _say_tiles_are_large(self.backbone.name, self.backbone.tile)
        batch, _, height, width = noise.shape
        seeds = [generator.initial_seed() for generator in generators] if generators else None
        scheduler = fresh_scheduler(self.base.scheduler, seeds)
        scheduler.set_timesteps(settings.steps, device=self.device)
        dtype = self.dtype  # asked once: diffusers looks through all parameters to tell
        denoiser = TiledDenoiser(
            self.base.unet,
            self.backbone,
            self.alignment,
            features,
            text,
            settings,
            (batch, height, width),
            sigma_of=partial(noise_level, scheduler),
            seeds=seeds,
            device=self.device,
            dtype=dtype,
            condition_budget=self.condition_budget,
            needed=None if mask is None else (mask > 0).cpu(),
            predictions=len(scheduler.timesteps),
            progress=_staged(progress, "sample"),
            attention=attention,
        )
        noise = noise.to(self.device, torch.float32)
        lq_latent = None if lq_latent is None else lq_latent.to(self.device, torch.float32)
        x = initial_latent(scheduler, settings.start, noise, lq_latent)
        extra = self.base.prepare_extra_step_kwargs(generators, 0.0)
        kept = None
        if mask is not None and lq_latent is not None:
            kept = Kept.of(scheduler, x, lq_latent, mask)
        watching = nullcontext() if attention is None else attention.recorder.watching(self.base.unet)
        with self._on_device(self.alignment), denoiser.hook.on(self.base.unet), watching:
            x = run_scheduler(scheduler, denoiser, x, None if kept is None else kept.put_back, **extra)
        if kept is not None:
            x = kept.finish(x)
        if not is_finite(x):
            raise NotFiniteError(f"Sampling gave values that are not finite in {dtype}; take bf16 or fp32.")
        return x

    @contextmanager
    def _on_device(self, module: nn.Module) -> Iterator[None]:
        """Keep one of FaithDiff's own parts on the device while it is used; with offloading, not longer."""
        module.to(self.device)
        try:
            yield
        finally:
            if self.offload != "none":
                module.to("cpu")


@cache
def _say_tiles_are_large(name: str, tile: int) -> None:
    """Warn, once, that tiles are larger than the images that the backbone was trained on."""
    logger.warning("%s was trained on images of %d px; tiles of that side (tile=%d) look better", name, tile, tile)


def _staged(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)
