"""A tiny SDXL model as a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .text_encoders import byte_tokenizer, text_encoder


def write_tiny_sdxl(folder: Path, unet: Any, vae: Any) -> None:
    """Write a U-Net and a VAE of diffusers, with random tiny text encoders that fit them, as an SDXL model."""
    from diffusers import StableDiffusionXLPipeline

    from faithdiff_core.engine import make_scheduler

    hidden_size = unet.config.cross_attention_dim // 2
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder(hidden_size, pooled, projected=False),
        text_encoder_2=text_encoder(hidden_size, pooled, projected=True),
        tokenizer=byte_tokenizer(folder / "tokenizer", "<|endoftext|>"),
        tokenizer_2=byte_tokenizer(folder / "tokenizer_2", "!"),
        unet=unet,
        scheduler=make_scheduler(),
        add_watermarker=False,
        force_zeros_for_empty_prompt=False,
    ).save_pretrained(folder)
