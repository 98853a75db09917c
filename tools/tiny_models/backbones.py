"""Tiny models of every backbone: their real structure (levels, attention heads, projections) with few channels.

Each comes as a folder in diffusers' format and, with random FaithDiff parts, as a FaithDiff file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faithdiff_core import Alignment, AlignmentConfig
from faithdiff_core.backbone import NOISE, SD15, SD21, Backbone
from faithdiff_core.models.alignment import to_published
from faithdiff_core.training.model import lq_encoder_from_vae
from faithdiff_core.weights.faithdiff_file import ENCODER_PREFIX
from faithdiff_core.weights.marks import marks

from .text_encoders import byte_tokenizer, text_encoder

CONTEXT = {SD21: 64, SD15: 48}
"""Widths of the text embeddings; they differ, as the real ones do."""

_UNET: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}

UNETS: dict[Backbone, dict[str, Any]] = {
    # Heads of 64 channels: as many as the level has room for.
    SD21: {
        **_UNET,
        "block_out_channels": (64, 64, 64, 64),
        "attention_head_dim": [1, 1, 1, 1],
        "cross_attention_dim": CONTEXT[SD21],
        "use_linear_projection": True,
    },
    # Eight heads, whatever the channels.
    SD15: {
        **_UNET,
        "block_out_channels": (32, 64, 64, 64),
        "attention_head_dim": 8,
        "cross_attention_dim": CONTEXT[SD15],
    },
}
"""U-Nets in diffusers' words; its `attention_head_dim` is the number of heads."""

VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 128,
    "force_upcast": False,
}


@dataclass(frozen=True)
class TinyModel:
    """A tiny model on disk.

    Attributes:
        backbone: its family.
        prediction: what its U-Net predicts.
        folder: the model in diffusers' format.
        faithdiff: a full FaithDiff file for it, whose U-Net is another one.
    """

    backbone: Backbone
    prediction: str
    folder: Path
    faithdiff: Path


def write_tiny_model(folder: Path, backbone: Backbone, prediction: str = NOISE, seed: int = 0) -> TinyModel:
    """Write a tiny model and a FaithDiff file for it, with random weights.

    Args:
        folder: where to; it is made.
        backbone: SD 2.1 or SD 1.5.
        prediction: what the U-Net predicts.
        seed: of all weights.
    """
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from safetensors.torch import save_file

    from faithdiff_core.engine import make_scheduler
    from faithdiff_core.engine.prediction import Prediction, with_prediction

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(**VAE, scaling_factor=backbone.vae_scaling_factor).eval()
        base, faithdiff = (_unet(backbone) for _ in range(2))
        text = text_encoder(CONTEXT[backbone], CONTEXT[backbone], projected=False)
        parts = _random_parts(vae.state_dict(), base.config.block_out_channels[0])
    model, file = folder / "model", folder / "faithdiff.safetensors"
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=byte_tokenizer(folder / "tokenizer", "<|endoftext|>" if backbone is SD15 else "!"),
        unet=base,
        scheduler=with_prediction(make_scheduler(), Prediction(prediction)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(model)
    state = {key: value.contiguous() for key, value in (faithdiff.state_dict() | parts).items()}
    save_file(state, file, {"format": "pt", **marks(backbone, prediction)})
    return TinyModel(backbone, prediction, model, file)


def _unet(backbone: Backbone) -> Any:
    """A U-Net whose output is of its input's size, as a trained one's; without that, rounding errors would grow."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**UNETS[backbone]).eval()
    for name, value in unet.state_dict().items():
        if value.ndim == 1 and name.endswith(".bias"):
            value.normal_(std=0.02)
    return unet


def _random_parts(vae: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The VAE's encoder as LQ encoder, and an alignment that acts."""
    encoder = lq_encoder_from_vae(vae)
    features = encoder.config.feature_channels
    alignment = Alignment(AlignmentConfig(features, channels, channels, 4 * channels, 2), folded=False)
    state = {ENCODER_PREFIX + key: value for key, value in encoder.state_dict().items()}
    return state | {key: value.detach() for key, value in to_published(alignment).items()}
