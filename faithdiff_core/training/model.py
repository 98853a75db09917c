"""The model in training: U-Net, LQ encoder and alignment as one module, and the frozen parts around them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import BACKBONES, NOISE, Backbone
from ..engine.alignment_hook import AlignmentHook
from ..engine.loading import backbone_of_folder, backbone_of_unet, without_checkers
from ..engine.prediction import prediction_of
from ..errors import MissingPackageError, SettingsError, WeightsError, install_extra
from ..models.alignment import Alignment, AlignmentConfig, to_published
from ..models.lq_encoder import LQEncoder, LQEncoderConfig
from ..weights.faithdiff_file import ENCODER_PREFIX, read_faithdiff
from .config import LoraConfig, StageConfig

CAPTIONS_KEPT = 4096
"""How many encoded captions are kept; a data set with more of them encodes the others each time."""

logger = logging.getLogger(__name__)


class TrainableModel(nn.Module):
    """Everything that learns, as one module, so that any wrapper of distributed training sees one forward pass.

    Args:
        unet: a diffusers U-Net of one of the backbones.
        lq_encoder: reads the low-quality image.
        alignment: unfolded, joins the two.
        prediction: what the U-Net predicts, `epsilon` (noise) or `v_prediction`.

    Attributes:
        backbone: the U-Net's family.
    """

    unet: Any

    def __init__(self, unet: Any, lq_encoder: LQEncoder, alignment: Alignment, prediction: str = NOISE) -> None:
        super().__init__()
        self.backbone, self.prediction = backbone_of_unet(unet.config), prediction
        if alignment.folded:
            raise SettingsError("Training needs an alignment built with folded=False.")
        self.unet, self.lq_encoder, self.alignment = unet, lq_encoder, alignment
        self.lora: LoraConfig | None = None
        self.frozen_dtype = torch.float32

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor | None,
        time_ids: Tensor,
        lq: Tensor | None,
    ) -> Tensor:
        """Predict the noise, or v.

        Args:
            noisy: latents with noise, scaled to unit variance as the U-Net takes them, (B, 4, h, w).
            timesteps: (B,), 0 to 999.
            context: text embeddings, (B, tokens, cross_attention_dim).
            pooled: pooled text embeddings, (B, width); None for a backbone that takes none.
            time_ids: SDXL's six numbers on size and crop, (B, 6), which other backbones do not look at.
            lq: low-quality images in [-1, 1], (B, 3, 8 h, 8 w), or one for every few rows of the others; None leaves
                the alignment out.

        Returns:
            (B, 4, h, w).
        """
        dtype = self.alignment.condition_embedding.conv_in.weight.dtype
        if dtype != torch.float32:  # DeepSpeed turns parameters into half precision, and autocasts nothing
            noisy, context = noisy.to(dtype), context.to(dtype)
            pooled, lq = (None if part is None else part.to(dtype) for part in (pooled, lq))
        hook = AlignmentHook(self.alignment, strength=0.0 if lq is None else 1.0)
        added: dict[str, Any] = {}
        if self.backbone.size_conditioning:
            added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
        with hook.on(self.unet):
            if lq is not None:
                condition = self.alignment.embed(self.lq_encoder(lq))
                hook.condition = condition.repeat_interleave(len(noisy) // len(lq), dim=0)
            predicted: Tensor = self.unet(noisy, timesteps, encoder_hidden_states=context, **added).sample
        return predicted

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations of the U-Net and of the LQ encoder twice instead of keeping them."""
        self.unet.enable_gradient_checkpointing()
        self.lq_encoder.gradient_checkpointing = True

    def add_lora(self, config: LoraConfig, frozen_dtype: torch.dtype) -> None:
        """Put LoRA layers into the U-Net, whose own weights then never learn.

        Args:
            config: the layers' sizes and places.
            frozen_dtype: of the U-Net's own weights; those of the LoRA are float32.

        Raises:
            MissingPackageError: peft is not installed.
            SettingsError: no layer's name ends as configured.
        """
        add_lora(self.unet, config)
        self.lora, self.frozen_dtype = config, frozen_dtype
        for name, parameter in self.unet.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "lora_" in name else frozen_dtype)

    def select(self, stage: StageConfig, lora: bool) -> list[dict[str, Any]]:
        """Set `requires_grad` for a stage and return the optimizer's parameter groups.

        Args:
            stage: 1 trains the alignment; 2 also the LQ encoder and the U-Net (or its LoRA).
            lora: whether the U-Net's own weights stay frozen.
        """
        self.requires_grad_(False)
        self.alignment.requires_grad_(True)
        if stage.stage == 1:
            return [{"params": list(self.alignment.parameters()), "lr": stage.learning_rate}]
        self.lq_encoder.requires_grad_(True)
        if lora:
            for name, parameter in self.unet.named_parameters():
                parameter.requires_grad_("lora_" in name)
        else:
            self.unet.requires_grad_(True)
        unet = [p for p in self.unet.parameters() if p.requires_grad]
        return [
            {"params": [*self.alignment.parameters(), *unet], "lr": stage.learning_rate},
            {"params": list(self.lq_encoder.parameters()), "lr": stage.lq_learning_rate},
        ]

    def published(
        self, *, adapter_only: bool, dtype: torch.dtype, state: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The state dict of a FaithDiff file; a LoRA is added to the weights that it belongs to.

        Args:
            adapter_only: leave the U-Net out.
            dtype: of the tensors.
            state: of the whole module, under the module's names. Defaults to the module's own.
        """
        state = self.state_dict() if state is None else state
        # On the meta device an alignment takes any state as its own without copying it.
        with torch.device("meta"):
            alignment = Alignment(self.alignment.config, folded=False)
        alignment.load_state_dict(_below(state, "alignment."), assign=True)
        published = {} if adapter_only else merged_unet_state(_below(state, "unet."), self.lora)
        published |= {ENCODER_PREFIX + key: value for key, value in _below(state, "lq_encoder.").items()}
        published |= to_published(alignment)
        return {key: value.detach().to("cpu", dtype).contiguous() for key, value in published.items()}


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


LORA_DOWN, LORA_UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""How peft names the two matrices of a layer's LoRA."""


def merged_unet_state(state: Mapping[str, Tensor], lora: LoraConfig | None) -> dict[str, Tensor]:
    """A U-Net's state dict under diffusers' names, LoRA updates added in.

    Args:
        state: the U-Net's, with peft's names where it has a LoRA.
        lora: its configuration.
    """
    merged = {key.replace(".base_layer.", "."): value for key, value in state.items() if "lora_" not in key}
    for key, down in state.items():
        if lora is not None and key.endswith(LORA_DOWN):
            layer = key.removesuffix(LORA_DOWN)
            weight = merged[f"{layer}.weight"]
            # Of a convolution, the second matrix is 1 x 1, so their product is the first with other channels.
            update = (state[layer + LORA_UP].float().flatten(1) @ down.float().flatten(1)) * (lora.alpha / lora.rank)
            merged[f"{layer}.weight"] = (weight.float() + update.view(weight.shape)).to(down.dtype)
    return merged


def lora_state(state: Mapping[str, Tensor], lora: LoraConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """A LoRA as a file of its own, with the names that ComfyUI and diffusers read (`lora_unet_*`).

    Args:
        state: the U-Net's, with peft's names.
        lora: its configuration.
        dtype: of the tensors.
    """
    names = {LORA_DOWN: ".lora_down.weight", LORA_UP: ".lora_up.weight"}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        for ours, theirs in names.items():
            if key.endswith(ours):
                name = "lora_unet_" + key.removesuffix(ours).replace(".", "_")
                found[name + theirs] = value.detach().to("cpu", dtype).contiguous()
                found[name + ".alpha"] = torch.tensor(lora.alpha, dtype=dtype)
    return found


def add_lora(unet: Any, config: LoraConfig) -> None:
    """Put LoRA layers into a diffusers U-Net.

    Raises:
        MissingPackageError: peft is not installed.
        SettingsError: no layer's name ends as configured.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError(f"LoRA needs peft; {install_extra('train')}.") from error
    try:
        unet.add_adapter(
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=list(config.targets),
                init_lora_weights="gaussian",
            )
        )
    except ValueError as error:
        raise SettingsError(f"lora.targets: {error}") from error


def lq_encoder_from_vae(vae_state: Mapping[str, Tensor]) -> LQEncoder:
    """An LQ encoder that starts as a copy of a VAE's encoder (Algorithm 1).

    Args:
        vae_state: a diffusers VAE's state dict.

    Raises:
        WeightsError: it is not a VAE of SDXL's architecture, which SD 2.1's and SD 1.5's have, too.
    """
    prefix = "encoder."
    state = {
        key.removeprefix(prefix): value
        for key, value in vae_state.items()
        if key.startswith(prefix) and not key.startswith(("encoder.conv_norm_out.", "encoder.conv_out."))
    }
    try:
        module = LQEncoder(LQEncoderConfig.from_shapes({key: tuple(value.shape) for key, value in state.items()}))
        module.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"The LQ encoder cannot start from this VAE; its encoder is not SDXL's: {error}") from error
    return module


def new_alignment(feature_channels: int, unet_channels: int) -> Alignment:
    """A zero-initialized alignment: the last layers of the embedding and of the whole are zero.

    Args:
        feature_channels: of the LQ encoder.
        unet_channels: channels of the U-Net's conv_in.
    """
    config = AlignmentConfig(
        feature_channels=feature_channels,
        condition_channels=unet_channels,
        unet_channels=unet_channels,
        mlp_channels=4 * unet_channels,
        layers=2,
    )
    alignment = Alignment(config, folded=False)
    for layer in (alignment.condition_embedding.conv_out, alignment.proj):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return alignment


@dataclass
class FrozenModels:
    """The parts of the base model that never learn.

    Attributes:
        pipeline: a diffusers pipeline of the backbone, for its text encoders.
        vae: its VAE.
    """

    pipeline: Any
    vae: Any

    def __post_init__(self) -> None:
        self._texts: dict[str, tuple[Tensor, Tensor | None]] = {}
        for module in (self.vae, *self.text_encoders):
            module.requires_grad_(False).eval()

    @property
    def text_encoders(self) -> list[Any]:
        """All that the backbone has."""
        found = (getattr(self.pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
        return [module for module in found if module is not None]

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Move everything to a device and into a precision.

        A VAE that overflows in fp16, as its configuration says (`force_upcast`), stays in float32 there.
        """
        for module in self.text_encoders:
            module.to(device, dtype)
        overflows = dtype == torch.float16 and self.vae.config.get("force_upcast", True)
        self.vae.to(device, torch.float32 if overflows else dtype)

    @property
    def bytes(self) -> int:
        """Memory of all weights."""
        modules = (self.vae, *self.text_encoders)
        return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.latent_channels)

    @property
    def latent_scale(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def latents(self, pixels: Tensor, posterior: Tensor) -> Tensor:
        """Sample VAE latents, times the scaling factor.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
            posterior: standard normal numbers of the latents' shape.
        """
        distribution = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        sample = distribution.mean.float() + distribution.std.float() * posterior
        return sample * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to pixels in [-1, 1]."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(latents).sample.float().clamp(-1, 1)

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Text embeddings of captions, (B, tokens, dim), and pooled ones, (B, width), where the backbone takes them."""
        fresh = dict(self._texts)
        for caption in dict.fromkeys(captions):
            # One by one: in a batch, the last digits would depend on what else is in it, and so on where a run was
            # resumed.
            if caption not in fresh:
                encoded = self.pipeline.encode_prompt(
                    caption, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )
                context, _, pooled = (*encoded, None)[:3]
                fresh[caption] = (context[0].float().cpu(), None if pooled is None else pooled[0].float().cpu())
        if len(fresh) <= CAPTIONS_KEPT:
            self._texts = fresh
        contexts = torch.stack([fresh[c][0] for c in captions]).to(device)
        pooled_rows = [row for c in captions if (row := fresh[c][1]) is not None]
        return contexts, torch.stack(pooled_rows).to(device) if pooled_rows else None


def load_models(base: Path, init: Path | None) -> tuple[TrainableModel, FrozenModels]:
    """Read the base model and what training starts from.

    Args:
        base: a model of a known backbone as a diffusers folder.
        init: a FaithDiff file to start from, or None for the start of Algorithm 1.

    Raises:
        MissingPackageError: diffusers or transformers are not installed.
        WeightsError: the folder or the file is not what it should be, or they are of different backbones.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingPackageError(f"Training needs diffusers and transformers; {install_extra('train')}.") from error
    if not (base / "model_index.json").is_file():
        raise WeightsError(
            f"{base} is not a diffusers folder (it has no model_index.json). Give the folder of an SDXL model, or of "
            f"one of SD 2.1 or SD 1.5."
        )
    backbone = backbone_of_folder(base)
    if backbone is None:
        raise WeightsError(
            f"{base} holds a model that FaithDiff does not work on. Give one of "
            f"{', '.join(known.name for known in BACKBONES)}."
        )
    try:
        pipeline = getattr(diffusers, backbone.pipeline).from_pretrained(
            str(base), torch_dtype=torch.float32, local_files_only=True, **without_checkers(backbone)
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{base} cannot be loaded as an {backbone.name} model: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    lq_encoder = lq_encoder_from_vae(pipeline.vae.state_dict())
    unet = pipeline.unet
    alignment = new_alignment(lq_encoder.config.feature_channels, unet.config.block_out_channels[0])
    prediction: str | None = None
    if init is not None:
        weights = read_faithdiff(init)
        if weights.quantization is not None:
            raise WeightsError(
                f"{init} holds a quantized U-Net ({weights.quantization}), whose rounding training would keep. Give "
                f"the file that it was made from."
            )
        weights.check_finite()
        if weights.backbone is not backbone:
            raise WeightsError(
                f"{init} is made for {weights.backbone.name}, but {base} is a model of {backbone.name}. Give `base` "
                f"and `init` of the same kind."
            )
        lq_encoder = weights.build_lq_encoder(torch.float32)
        alignment = weights.build_alignment(torch.float32, folded=False)
        if weights.unet is not None:
            prediction = weights.prediction
            try:
                unet.load_state_dict(weights.unet.state)
            except RuntimeError as error:
                raise WeightsError(f"{init}: its U-Net does not fit the one in {base}: {error}") from error
    if prediction is None:
        prediction = _prediction_of_base(base, pipeline.scheduler, backbone)
    pipeline.unet = None
    model = TrainableModel(unet.train(), lq_encoder.train(), alignment.train(), prediction)
    return model, FrozenModels(pipeline, pipeline.vae)


def _prediction_of_base(base: Path, scheduler: Any, backbone: Backbone) -> str:
    """What the base's own U-Net predicts, which is what training goes on with."""
    found = prediction_of(base, scheduler, backbone)
    if found.zero_snr:
        raise WeightsError(
            f"The noise schedule of {base} ends in pure noise (rescale_betas_zero_snr), which training does not "
            f"support. Give a model with the usual schedule."
        )
    return found.type


def base_unet_state(base: Path, init: Path | None) -> dict[str, Tensor]:
    """The U-Net that a LoRA is trained on, as its file has it: that of `init` if it has one, else that of `base`."""
    from diffusers import UNet2DConditionModel

    weights = None if init is None else read_faithdiff(init).unet
    if weights is not None:
        return dict(weights.state)
    return dict(UNet2DConditionModel.from_pretrained(base / "unet", local_files_only=True).state_dict())


def time_ids(batch: int, size: int, device: torch.device) -> Tensor:
    """SDXL's micro-conditioning of square crops: original size, crop position 0, target size; (batch, 6)."""
    return torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device=device).expand(batch, -1)


def trainable(module: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters that learn."""
    return (p for p in module.parameters() if p.requires_grad)
