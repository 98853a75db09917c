"""The pipeline: images in, restored images out.

Data flows one way: the enlarged image goes through the LQ encoder (features) and the VAE (the `lr` start), the
sampling loop works on the latent with the features cropped and embedded tile by tile, and the VAE decodes the result.
Features of whole images stay in main memory; a tile at a time goes to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backbone import VAE_SCALE_FACTOR
from ..captions.tile_captions import TileCaptions
from ..captions.tile_texts import TILE_MIX
from ..errors import SettingsError, WeightsError
from ..images.cutout import resize_cutout
from ..images.geometry import crop_to, pad_to_multiple
from ..images.hdr import hdr_effect
from ..images.region import FEATHER, around, at_latent_size, feathered, fix_and_composite, mask_for
from ..models.alignment import Alignment
from ..models.lq_encoder import LQEncoder
from ..sampling.schedule import StartPoint
from ..weights.faithdiff_file import read_faithdiff
from ..weights.lora_names import add_lora
from .attribution import Attribution, PromptAttention
from .loading import (
    Offload,
    backbone_of_unet,
    check_offload,
    choose_device,
    choose_dtype,
    load_base,
    load_lora,
    require_diffusers,
)
from .long_prompts import LongPrompt
from .prediction import Prediction, prediction_of, with_prediction
from .schedulers import make_scheduler
from .settings import RestoreSettings, as_list, one_seed_each, one_text_each, same_size
from .stages import Progress, Stages
from .text import TextConditioning

CONDITION_BUDGET = 2**30
"""Bytes of embedded conditions kept on the device across steps: a hundred tiles of 1024 px in half precision."""

Images = TypeVar("Images", Tensor, list[Tensor])
"""Images of one size as a tensor, or of any sizes as a list."""


class FaithDiffPipeline(Stages):
    """FaithDiff on top of diffusers' pipeline for its backbone: SDXL, SD 2.1 or SD 1.5.

    The alignment joins the U-Net by a forward hook on `conv_in`, which is there during sampling only; everything else,
    LoRAs included, is the pipeline `base`, which stays usable by itself.

    Args:
        base: diffusers' `StableDiffusionXLPipeline`, or its `StableDiffusionPipeline` of SD 2.1 or SD 1.5.
        lq_encoder, alignment: FaithDiff's parts, from `FaithDiffWeights`.
        device: where to compute. Defaults to CUDA, MPS or the CPU, whichever is available.
        offload: `none` keeps all models on the device; `model` keeps one at a time there; `sequential` one layer of
            the U-Net and the text encoders at a time (slow, smallest).
        condition_budget: bytes of embedded conditions that are kept across steps.

    Raises:
        SettingsError: offloading to no other device, or an unknown offload.
        WeightsError: the parts belong to different models.
    """

    def __init__(
        self,
        base: Any,
        lq_encoder: LQEncoder,
        alignment: Alignment,
        *,
        device: torch.device | str | None = None,
        offload: Offload = "none",
        condition_budget: int = CONDITION_BUDGET,
    ) -> None:
        self.device = choose_device(device)
        check_offload(offload, self.device)
        self.backbone = backbone_of_unet(base.unet.config)
        if (
            alignment.config.feature_channels != lq_encoder.config.feature_channels
            or alignment.config.unet_channels != base.unet.config.block_out_channels[0]
            or lq_encoder.config.scale != base.vae_scale_factor
        ):
            raise WeightsError(
                f"The {self.backbone.name} model and FaithDiff's parts do not fit together: the U-Net begins with "
                f"{base.unet.config.block_out_channels[0]} channels and the VAE reduces {base.vae_scale_factor} times; "
                f"the alignment is made for {alignment.config.unet_channels} channels, the LQ encoder reduces "
                f"{lq_encoder.config.scale} times."
            )
        if base.unet.config.in_channels != base.vae.config.latent_channels:
            raise WeightsError(
                f"The {self.backbone.name} model's U-Net takes {base.unet.config.in_channels} channels (an inpainting "
                f"or editing variant), but FaithDiff's takes {base.vae.config.latent_channels}. Give an ordinary model."
            )
        self.base = base
        self.lq_encoder = lq_encoder
        self.alignment = alignment
        self.offload = offload
        self.condition_budget = condition_budget
        self._loras: dict[str, float] = {}
        if base.vae.dtype == torch.float16 and base.vae.config.force_upcast:
            # SDXL's own VAE overflows in half precision; its configuration says so.
            base.vae.to(torch.float32)
        self._place()

    def _place(self) -> None:
        """Put the models where they belong, or have accelerate's hooks do so when they are used."""
        if self.offload == "none":
            self.base.to(self.device)
            self.lq_encoder.to(self.device)
            self.alignment.to(self.device)
        elif self.offload == "model":
            self.base.enable_model_cpu_offload(device=self.device)
        else:
            # The tiled decode reads the VAE's parameters, which layer-wise offloading would take away; it is small.
            self.base._exclude_from_cpu_offload = ["vae"]
            self.base.enable_sequential_cpu_offload(device=self.device)

    @classmethod
    def from_files(
        cls,
        model: str | Path,
        faithdiff: str | Path,
        *,
        unet: str | Path | None = None,
        config: str | Path | None = None,
        vae: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        offload: Offload = "none",
        scheduler: Any = None,
    ) -> FaithDiffPipeline:
        """Make a pipeline from files.

        Args:
            model: a checkpoint of FaithDiff's backbone (SDXL for the published one) in a single file, or a folder in
                diffusers' format.
            faithdiff: a FaithDiff file. One with a U-Net replaces the checkpoint's; a LoRA is added to it; with an
                adapter alone, the checkpoint's U-Net stays.
            unet: FaithDiff's U-Net where it is a separate file, as `convert` writes it.
            config: for a single-file checkpoint, a folder in diffusers' format to take configuration and tokenizers
                from. Defaults to the hub's of the backbone.
            vae: another VAE, a file or a folder.
            dtype: fp32, bf16 or fp16, by name or as torch's. Defaults to fp16 on accelerators and fp32 on the CPU.
            device, offload: see the class.
            scheduler: a name out of `SCHEDULERS` or any diffusers scheduler. Defaults to the published Euler. What
                the U-Net predicts is set in it: for FaithDiff's what its file says (noise for the published one), and
                for the checkpoint's own what its file or its folder's scheduler tells.

        Raises:
            WeightsError: a file is not what it should be, or the files do not fit together.
            SettingsError: an unknown dtype, scheduler or offload.
            MissingPackageError: diffusers, transformers or accelerate is not installed.
        """
        require_diffusers()
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        chosen = make_scheduler(scheduler or "euler") if scheduler is None or isinstance(scheduler, str) else scheduler
        weights = read_faithdiff(faithdiff)
        weights.check_finite()
        unet_weights = weights
        if unet is not None and weights.lora is not None:
            raise SettingsError(
                f"{weights.path.name} holds a LoRA for the checkpoint's U-Net, which {Path(unet).name} would replace. "
                f"Give no U-Net, or an adapter without a LoRA."
            )
        if unet is not None:
            unet_weights = read_faithdiff(unet)
            unet_weights.check_finite()
            if unet_weights.unet is None:
                raise WeightsError(f"{Path(unet).name} holds no U-Net; `convert` writes it as *_unet.safetensors.")
            if unet_weights.backbone is not weights.backbone:
                raise WeightsError(
                    f"{Path(unet).name} is a U-Net of {unet_weights.backbone.name}, but {Path(faithdiff).name} is made "
                    f"for {weights.backbone.name}. Give the two files of one conversion."
                )
        unet_part = unet_weights.unet
        own = None if unet_part is None else Prediction(unet_weights.prediction)
        lq_encoder, alignment = weights.build_lq_encoder(dtype), weights.build_alignment(dtype)
        unet_state = unet_part.state if unet_part is not None else None
        base = load_base(model, weights, config=config, vae=vae, unet_state=unet_state, dtype=dtype)
        if own is None:
            own = prediction_of(model, base.scheduler, weights.backbone, config)
        base.scheduler = with_prediction(chosen, own)
        if weights.lora is not None:
            if own != Prediction(weights.prediction):
                raise WeightsError(
                    f"{Path(model).name} predicts something else than noise on SDXL's schedule, but the LoRA of "
                    f"{weights.path.name} was made for noise. Give another checkpoint."
                )
            add_lora(base.unet.state_dict(), weights.lora.state, weights.path.name)
        return cls(base, lq_encoder, alignment, device=device, offload=offload)

    def load_lora(self, path: str | Path, weight: float = 1.0, adapter_name: str | None = None) -> None:
        """Add a LoRA file; several add up.

        Args:
            path: a LoRA for the backbone in any format that diffusers reads.
            weight: its strength.
            adapter_name: name of the adapter. Defaults to the file's name.

        Raises:
            WeightsError: the file is missing, or is no LoRA for this model.
            SettingsError: the name is taken.
        """
        # PEFT keeps adapters as attributes of modules, so dots cannot be part of a name.
        name = (adapter_name or Path(path).stem).replace(".", "_")
        if name in self._loras:
            raise SettingsError(f"A LoRA by the name {name!r} is loaded already; give another adapter_name.")
        # The hooks of offloading wrap layers that a LoRA replaces: they go first, and come back afterwards.
        self.base.remove_all_hooks()
        try:
            load_lora(self.base, path, name, self.backbone)
            self._loras[name] = weight
            self.base.set_adapters(list(self._loras), list(self._loras.values()))
        finally:
            self._place()

    def unload_loras(self) -> None:
        """Take all LoRAs out again."""
        if self._loras:
            self.base.remove_all_hooks()
            self.base.unload_lora_weights()
            self._loras.clear()
            self._place()

    def __call__(
        self,
        images: Images,
        settings: RestoreSettings | None = None,
        *,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        seed: int | Sequence[int] | None = None,
        progress: Progress | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        noise: Tensor | None = None,
        alpha: Tensor | Sequence[Tensor] | None = None,
        mask: Tensor | Sequence[Tensor] | None = None,
        feather: int = FEATHER,
        attribution: Attribution | None = None,
        tile_captions: TileCaptions | Sequence[TileCaptions | None] | None = None,
        tile_mix: float = TILE_MIX,
        **overrides: Any,
    ) -> Images:
        """Restore images.

        Args:
            images: RGB in [0, 1], (B, 3, H, W), or a list of (3, H, W), whose sizes may differ; on any device.
            settings: how to restore. Defaults to the published settings.
            prompt, negative_prompt: one text for all images or one for each. An empty text is encoded like any other.
            seed: one for each image, or a number from which they count up. Defaults to a random one. An image's result
                depends on its own seed alone.
            progress: called as progress(stage, done, total) with the stages `encode`, `sample` and `decode` of each
                batch of equal sizes and each pass; it may raise to cancel, which leaves nothing behind.
            prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds: the text as
                embeddings, one row or one for each image, instead of the two texts.
            noise: starting noise instead of the seeds', (B, 4, h, w) of the padded result; for a tensor and one pass.
            alpha: opacity of the images in [0, 1], (B, 1, H, W) or a list of (1, H, W). What lies under alpha 0 then
                counts neither in resizing nor in colours; the results' own alpha is not part of what is returned.
            mask: 1 where an image is restored and 0 where it stays, (B, 1, h, w) or a list of (1, h, w), of the images'
                shape but any size. Tiles that it does not touch are not computed; what it leaves out is the enlarged
                image, exactly.
            feather: width in pixels of the soft edge that is added around a mask.
            attribution: gets the maps of its words, which have to be in the prompts; of several passes, the last one's.
            tile_captions: captions of the images' parts, for all images or for each (None: it has none). Each tile of
                the sampler gets those of the parts that it overlaps, mixed by area, beside the prompt; an image that
                is sampled in one piece gets the prompt alone.
            tile_mix: share of the parts' captions, 0 to 1; the rest is the prompt's.
            **overrides: single settings by name (`scale=3`, `steps=30`), which replace those of `settings`.

        Returns:
            Restored images in [0, 1], float32, on the device of `images`: (B, 3, H', W'), or a list as it came.

        Raises:
            SettingsError: a setting out of range, or images, texts or seeds that do not go together.
            TypeError: an override that is not a setting.
            NotFiniteError: VAE or U-Net overflow in half precision.
        """
        settings = (settings or RestoreSettings()).changed(**overrides)
        inputs = as_list(images)
        count = len(inputs)
        opacities = None if alpha is None else list(alpha)
        if opacities is not None and [x.shape[-2:] for x in opacities] != [x.shape[-2:] for x in inputs]:
            raise SettingsError("alpha must have one row for each image, of the image's size.")
        masks = None if mask is None else list(mask)
        if masks is not None and len(masks) != count:
            raise SettingsError(f"mask must have one row for each image, {count}, got {len(masks)}.")
        seeds = one_seed_each(seed, count)
        if noise is not None and (not isinstance(images, Tensor) or settings.passes > 1):
            raise SettingsError("`noise` requires a batched tensor of images and `passes=1`.")
        if attribution is not None:
            if tile_captions is not None and tile_mix:
                raise SettingsError(
                    "Attribution maps show words of one prompt, but tile_captions give each tile another text. Leave "
                    "one of the two out, or set tile_mix to 0."
                )
            if prompt_embeds is not None:
                raise SettingsError("Attribution needs the prompt as text, not as prompt_embeds.")
            attribution.begin(self.base, one_text_each(prompt, count, "prompt"), LongPrompt(settings.long_prompt))
        try:
            given_text = (prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds)
            text = self._given_text(*given_text) or self.encode_text(
                one_text_each(prompt, count, "prompt"),
                one_text_each(negative_prompt, count, "negative_prompt"),
                guided=settings.cfg > 1,
                long_prompt=settings.long_prompt,
            )
            if tile_captions is not None:
                parts = _captions_of(inputs, tile_captions)
                text = replace(text, tiles=self.encode_tiles(parts, tile_mix, long_prompt=settings.long_prompt))
            results: list[Tensor] = [torch.empty(0)] * count
            for group in same_size(inputs):
                batch = torch.stack([inputs[i].to(device="cpu", dtype=torch.float32) for i in group])
                opacity = None
                if opacities is not None:
                    opacity = torch.stack([opacities[i].to(device="cpu", dtype=torch.float32) for i in group])
                generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in group]
                of_pass = settings
                for height, width in settings.sizes(*batch.shape[-2:]):
                    batch, opacity = resize_cutout(batch, opacity, height, width)
                    region = None
                    if masks is not None:
                        rows = [mask_for(masks[i].unsqueeze(0).cpu(), height, width, 1) for i in group]
                        region = feathered(torch.cat(rows), feather)
                    attention = None if attribution is None else attribution.of(group, masked=region is not None)
                    given = (noise, generators, progress, opacity, region, attention)
                    batch = self._pass(batch, text.select(group), of_pass, *given)
                    of_pass = settings.changed(hdr=0.0)  # the effect is on the input, not on results of passes
                if attribution is not None and attention is not None:
                    attribution.keep(group, attention)
                for i, restored in zip(group, batch, strict=True):
                    results[i] = restored.to(inputs[i].device)
        finally:
            self.base.maybe_free_model_hooks()
        return torch.stack(results) if isinstance(images, Tensor) else results

    def _given_text(
        self, embeds: Tensor | None, pooled: Tensor | None, negative: Tensor | None, negative_pooled: Tensor | None
    ) -> TextConditioning | None:
        """The text that was given as embeddings; None if none was."""
        takes_pooled = self.backbone.size_conditioning
        if embeds is None and pooled is None:
            return None
        if embeds is None or (takes_pooled and pooled is None):
            raise SettingsError("prompt_embeds and pooled_prompt_embeds belong together; give both.")
        if not takes_pooled and pooled is not None:
            raise SettingsError(f"{self.backbone.name} takes no pooled_prompt_embeds; leave them out.")
        return TextConditioning(embeds, pooled, negative, negative_pooled)

    def _pass(
        self,
        enlarged: Tensor,
        text: TextConditioning,
        settings: RestoreSettings,
        noise: Tensor | None,
        generators: list[torch.Generator],
        progress: Progress | None,
        alpha: Tensor | None = None,
        mask: Tensor | None = None,
        attention: PromptAttention | None = None,
    ) -> Tensor:
        """Restore images of their final size, (B, 3, H, W) in [0, 1] on the CPU; `mask` is (B, 1, H, W)."""
        latent_mask = needed = None
        if mask is not None:
            if not mask.any():
                return enlarged
            latent_mask = at_latent_size(mask)
            needed = around(latent_mask, settings.tile)
        padded = hdr_effect(pad_to_multiple(enlarged, VAE_SCALE_FACTOR), settings.hdr) * 2 - 1
        batch, _, height, width = padded.shape
        shape = (self.base.unet.config.in_channels, height // VAE_SCALE_FACTOR, width // VAE_SCALE_FACTOR)
        if noise is None:
            noise = torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])
        elif tuple(noise.shape) != (batch, *shape):
            raise SettingsError(
                f"noise must have the shape {(batch, *shape)} of the padded result, got {tuple(noise.shape)}."
            )
        features = None
        if settings.strength:
            tiles = (settings.encoder_tile, settings.encoder_overlap)
            features = self.encode_lq(padded, *tiles, progress, needed)
        lq_latent = None
        if settings.start == StartPoint.LR or latent_mask is not None:
            lq_latent = self.encode_latent(padded, settings.vae_tile)
        latent = self.sample(
            features,
            text,
            noise,
            settings,
            lq_latent=lq_latent,
            generators=generators,
            mask=latent_mask,
            progress=progress,
            attention=attention,
        )
        decoded = self.decode(latent, settings.vae_tile, progress)
        restored = crop_to(decoded, *enlarged.shape[-2:])
        return fix_and_composite(restored, enlarged, settings.color_fix, alpha, mask)


def _captions_of(
    images: Sequence[Tensor], captions: TileCaptions | Sequence[TileCaptions | None]
) -> list[TileCaptions | None]:
    """The captions of each image's parts, checked against the image."""
    each: list[TileCaptions | None] = [captions] * len(images) if isinstance(captions, TileCaptions) else list(captions)
    if len(each) != len(images):
        raise SettingsError(f"tile_captions: expected one entry for each image, {len(images)}, got {len(each)}.")
    for image, of_image in zip(images, each, strict=True):
        if of_image is not None:
            of_image.check_fits(*image.shape[-2:])
    return each
