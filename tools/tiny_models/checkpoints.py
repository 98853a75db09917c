"""Tiny models in forms beside the diffusers folder of `conftest.py`: a single-file checkpoint, and LoRAs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESNET_NAMES = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
"""A residual block's parts: diffusers' name, and the name in single-file checkpoints."""

UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def single_file_unet_key(key: str, layers: int, levels_with_attention: set[int]) -> str:
    """The name that single-file checkpoints have for a U-Net's tensor in diffusers' format."""
    name, kind = key.rsplit(".", 1)
    if name in UNET_TOP:
        return f"{UNET_TOP[name]}.{kind}"
    words = key.split(".")
    if words[0] == "mid_block":
        number, part, rest = 2 * int(words[2]) + (words[1] == "attentions"), words[1], ".".join(words[3:])
        place = f"middle_block.{number}"
    else:
        block, part, index, rest = int(words[1]), words[2], int(words[3]), ".".join(words[4:])
        if words[0] == "down_blocks":
            base, first = 1 + block * (layers + 1), "input_blocks"
        else:
            base, first = block * (layers + 1), "output_blocks"
        if part == "downsamplers":
            return f"input_blocks.{base + layers}.0.op.{kind}"
        if part == "upsamplers":
            return f"output_blocks.{base + layers}.{2 if block in levels_with_attention else 1}.conv.{kind}"
        place = f"{first}.{base + index}.{int(part == 'attentions')}"
    if part == "resnets":
        for ours, theirs in RESNET_NAMES:
            rest = rest.replace(ours, theirs)
    return f"{place}.{rest}"


def single_file_vae(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A VAE's tensors under the names, and with the shapes, of single-file checkpoints."""
    out = {}
    for key, value in state.items():
        words = key.split(".")
        if "up_blocks" in words:
            words[2] = str(levels - 1 - int(words[2]))
        name = ".".join(words)
        if "mid_block.attentions.0" in name:
            for ours, theirs in (
                ("group_norm", "norm"),
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                ("to_out.0", "proj_out"),
            ):
                name = name.replace(ours, theirs)
            value = value[:, :, None, None] if value.ndim == 2 else value
        for ours, theirs in (
            ("mid_block.attentions.0", "mid.attn_1"),
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("down_blocks", "down"),
            ("up_blocks", "up"),
            ("resnets", "block"),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
        ):
            name = name.replace(ours, theirs)
        out[f"first_stage_model.{name}"] = value
    return out


def single_file_open_clip(
    state: dict[str, Tensor], prefix: str = "conditioner.embedders.1.model."
) -> dict[str, Tensor]:
    """A text encoder's tensors as OpenCLIP has them; the prefix is that of SDXL's second one."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        if name == "text_projection.weight":
            out["text_projection"] = value.T.contiguous()
            continue
        if ".self_attn." in name and "out_proj" not in name:
            layer, _, kind = name.split(".self_attn.")[0], None, name.rsplit(".", 1)[1]
            stem = f"{layer.replace('encoder.layers', 'transformer.resblocks')}.attn.in_proj_{kind}"
            if ".q_proj." in name:
                out[stem] = torch.cat([state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            continue
        for ours, theirs in (
            ("encoder.layers", "transformer.resblocks"),
            ("self_attn", "attn"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("final_layer_norm", "ln_final"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("embeddings.token_embedding", "token_embedding"),
        ):
            name = name.replace(ours, theirs)
        out[name] = value
    return {prefix + name: value for name, value in out.items()}


def make_single_file(tiny_sdxl: Path, folder: Path) -> tuple[Path, Path, Path]:
    """The tiny SDXL model as a single-file checkpoint.

    Loaders tell the two text encoders of such a file apart by their widths, so this model has two of different width.

    Returns:
        The checkpoint, a folder with its configuration and no weights, and the same model as a diffusers folder.
    """
    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import save_file
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    pipeline = StableDiffusionXLPipeline.from_pretrained(str(tiny_sdxl))
    torch.manual_seed(1)
    parts: dict[str, Any] = {}
    for name, kind, width in (
        ("text_encoder", CLIPTextModel, 24),
        ("text_encoder_2", CLIPTextModelWithProjection, 40),
    ):
        config = pipeline.components[name].config
        config.hidden_size = width
        parts[name] = kind(config).eval()
    pipeline.register_modules(**parts)
    whole, configuration, checkpoint = folder / "whole", folder / "configuration", folder / "tiny_sdxl.safetensors"
    pipeline.save_pretrained(whole)
    shutil.copytree(whole, configuration, ignore=shutil.ignore_patterns("*.safetensors"))

    unet = pipeline.unet.config
    attended = {i for i, kind in enumerate(unet.up_block_types) if kind.startswith("CrossAttn")}
    state = {
        f"model.diffusion_model.{single_file_unet_key(key, unet.layers_per_block, attended)}": value
        for key, value in pipeline.unet.state_dict().items()
    }
    state |= single_file_vae(pipeline.vae.state_dict(), len(pipeline.vae.config.block_out_channels))
    state |= {
        f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}": value
        for key, value in parts["text_encoder"].state_dict().items()
    }
    state |= single_file_open_clip(parts["text_encoder_2"].state_dict())
    save_file({key: value.contiguous() for key, value in state.items()}, checkpoint)
    return checkpoint, configuration, whole


def make_single_file_sd(model: Path, folder: Path) -> tuple[Path, Path]:
    """A tiny SD 2.1 or SD 1.5 as a single-file checkpoint.

    Args:
        model: its folder in diffusers' format.
        folder: where to write.

    Returns:
        The checkpoint, and a folder with its configuration and no weights.
    """
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    pipeline = StableDiffusionPipeline.from_pretrained(str(model), safety_checker=None, local_files_only=True)
    configuration, checkpoint = folder / "configuration", folder / "checkpoint.safetensors"
    shutil.copytree(model, configuration, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    unet = pipeline.unet.config
    attended = {i for i, kind in enumerate(unet.up_block_types) if kind.startswith("CrossAttn")}
    state = {
        f"model.diffusion_model.{single_file_unet_key(key, unet.layers_per_block, attended)}": value
        for key, value in pipeline.unet.state_dict().items()
    }
    state |= single_file_vae(pipeline.vae.state_dict(), len(pipeline.vae.config.block_out_channels))
    text = {f"text_model.{key.removeprefix('text_model.')}": v for key, v in pipeline.text_encoder.state_dict().items()}
    if unet.use_linear_projection:
        text["text_projection.weight"] = torch.eye(pipeline.text_encoder.config.hidden_size)
        state |= single_file_open_clip(text, "cond_stage_model.model.")
    else:
        state |= {f"cond_stage_model.transformer.{key}": value for key, value in text.items()}
    save_file({key: value.contiguous() for key, value in state.items()}, checkpoint)
    return checkpoint, configuration


def make_lora(unet: Any, path: Path, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA on two attention layers of a U-Net.

    Returns:
        What it adds at weight 1, by the U-Net's parameter names.
    """
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {}
    delta: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if name.endswith(("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "attn2.to_v")):
            down = torch.randn((rank, module.in_features), generator=generator) * 0.5
            up = torch.randn((module.out_features, rank), generator=generator) * 0.5
            state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            delta[f"{name}.weight"] = up @ down
    save_file(state, path)
    return delta
