"""U-Net and VAE configurations in ComfyUI's terms: SDXL's, and smaller ones of each backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def unet_config(
    model_channels: int,
    channel_mult: Sequence[int],
    layers: int,
    depths: Sequence[int],
    output_depths: Sequence[int],
    middle_depth: int,
    context_dim: int,
    adm_in_channels: int | None,
    *,
    linear: bool = True,
    num_heads: int = -1,
) -> dict[str, Any]:
    """A U-Net, as ComfyUI's supported models take it.

    Args:
        model_channels: channels of the finest level.
        channel_mult: channels of each level, in units of `model_channels`.
        layers: residual blocks of each level on the input side; the output side has one more.
        depths: transformer blocks behind each residual block of the input side.
        output_depths: the same for the output side.
        middle_depth: transformer blocks of the mid block.
        context_dim: width of the text embeddings.
        adm_in_channels: width of the added conditions (y); None for a U-Net without.
        linear: whether transformers begin and end with linear layers.
        num_heads: of every attention. Defaults to as many as have 64 channels each.
    """
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": model_channels,
        "num_res_blocks": [layers] * len(channel_mult),
        "channel_mult": list(channel_mult),
        "transformer_depth": list(depths),
        "transformer_depth_output": list(output_depths),
        "transformer_depth_middle": middle_depth,
        "use_linear_in_transformer": linear,
        "context_dim": context_dim,
        "adm_in_channels": adm_in_channels,
        "num_classes": None if adm_in_channels is None else "sequential",
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
        "num_head_channels": 64 if num_heads == -1 else -1,
        "num_heads": num_heads,
    }


def vae_config(channels: int, channel_mult: Sequence[int], layers: int) -> dict[str, Any]:
    """A VAE of SDXL's kind: the `ddconfig` of `comfy.sd.VAE`.

    Args:
        channels: channels of the finest level.
        channel_mult: channels of each level, in units of `channels`.
        layers: residual blocks of each level of the encoder.
    """
    return {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels,
        "ch_mult": list(channel_mult),
        "num_res_blocks": layers,
        "attn_resolutions": [],
        "dropout": 0.0,
    }


SDXL_UNET = unet_config(320, (1, 2, 4), 2, (0, 0, 2, 2, 10, 10), (0, 0, 0, 2, 2, 2, 10, 10, 10), 10, 2048, 2816)
"""SDXL's U-Net."""

REDUCED_UNET = unet_config(320, (1, 1, 1), 2, (0, 0, 2, 2, 10, 10), (0,) * 9, 1, 2048, 2816)
"""A U-Net with 140 million parameters that ComfyUI detects as SDXL's."""

GOLDEN_UNET = unet_config(32, (1, 2, 2), 1, (0, 1, 2), (0, 0, 1, 1, 2, 2), 2, 64, 1600)
"""The golden U-Net."""

TINY_SD21_UNET = unet_config(64, (1, 1, 1, 1), 1, (1, 1, 1, 0), (1,) * 6 + (0, 0), 1, 64, None)
TINY_SD15_UNET = unet_config(
    32, (1, 2, 2, 2), 1, (1, 1, 1, 0), (1,) * 6 + (0, 0), 1, 48, None, linear=False, num_heads=8
)
"""The U-Nets of `backbones`."""

SDXL_VAE = vae_config(128, (1, 2, 4, 4), 2)
"""SDXL's VAE."""

GOLDEN_VAE = vae_config(32, (1, 1, 1, 1), 1)
"""The golden VAE."""

TINY_SD_VAE = vae_config(32, (1, 1, 2, 2), 1)
"""The VAE of `backbones`."""
