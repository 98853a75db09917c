"""Files with the published names, widths and shapes, random weights and few bytes.

`write_reduced_sdxl_checkpoint` makes a checkpoint that ComfyUI detects as SDXL: it looks at the channels of conv_in,
the depths of the input transformers, and the widths of context and y. With one width for all levels and hardly any
transformers behind the input side, a U-Net with these marks has 140 million parameters instead of 2.6 billion. VAE and
text encoders have their full sizes, because their shapes are fixed in ComfyUI.

The files stay small: all large tensors are overlapping views into a few blocks of random numbers, as pickles can store.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from faithdiff_core import AlignmentConfig, LQEncoder, LQEncoderConfig
from faithdiff_core.backbone import SDXL
from faithdiff_core.weights.faithdiff_file import ENCODER_PREFIX
from faithdiff_core.weights.unet_names import CHECKPOINT_PREFIX, checkpoint_names
from faithdiff_core.weights.unet_shapes import UNetConfig

from .comfyui_configs import REDUCED_UNET, SDXL_VAE

SMALLEST_UNET = UNetConfig((320, 320, 320), 2, (0, 1, 2), 1, SDXL.context_width, SDXL.added_width)
"""A U-Net with 110 million parameters that ComfyUI detects as one of SDXL's family (Segmind Vega's depths)."""

_POOL = 2**19
_STEP = 7  # elements by which each row of a matrix begins later than the one before


class RandomWeights:
    """Gives random tensors in half precision whose memory overlaps; none equals another."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._pools: dict[int, Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Norms are the identity, biases small, all else keeps the variance to a factor of two."""
        if len(shape) < 2:
            value = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
            return value.half()
        inner = math.prod(shape[1:])
        exponent = round(-0.5 * math.log2(inner))
        if exponent not in self._pools:
            self._pools[exponent] = (torch.randn(_POOL, generator=self._generator) * 2.0**exponent).half()
        strides = (_STEP, *torch.empty(shape[1:], device="meta").stride())
        room = _POOL - (shape[0] - 1) * _STEP - inner
        offset = int(torch.randint(room + 1, (), generator=self._generator))
        return torch.as_strided(self._pools[exponent], shape, strides, offset)

    def state(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Tensors of several shapes."""
        return {name: self.tensor(name, shape) for name, shape in shapes.items()}


def write_smallest_checkpoint(path: Path, *, seed: int = 0) -> None:
    """Write a checkpoint with `SMALLEST_UNET`, TAESD as its VAE, and no text encoders. Needs the host in this process.

    Args:
        path: ends in .ckpt.
        seed: of the weights.
    """
    weights = RandomWeights(seed)
    names = checkpoint_names(SMALLEST_UNET)
    state = {CHECKPOINT_PREFIX + names[name]: value for name, value in weights.state(SMALLEST_UNET.shapes()).items()}
    vae = importlib.import_module("comfy.taesd.taesd").TAESD(latent_channels=4).state_dict()
    own = {key: weights.tensor(key, tuple(value.shape)) if value.ndim else value for key, value in vae.items()}
    state |= {f"first_stage_model.{key}": value for key, value in own.items()}
    torch.save({"state_dict": state}, path)


def small_adapter(*, seed: int = 1) -> dict[str, Tensor]:
    """A small LQ encoder and alignment for U-Nets that begin with 320 channels, under the published names.

    Args:
        seed: of the weights.
    """
    encoder = LQEncoder(LQEncoderConfig((32, 32, 64, 64), 1), device="meta")
    alignment = AlignmentConfig(
        feature_channels=64, condition_channels=64, unet_channels=320, mlp_channels=64, layers=2
    )
    shapes = {ENCODER_PREFIX + key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    return RandomWeights(seed).state(shapes | alignment.published_shapes())


def write_reduced_sdxl_checkpoint(
    path: Path, *, text_encoders: bool = True, safetensors: bool = False, seed: int = 0
) -> None:
    """Write a checkpoint for the stock CheckpointLoaderSimple. Needs the host in this process.

    Args:
        path: ends in .ckpt, or in .safetensors.
        safetensors: write that format, which cannot share memory: 2 GB on disk with text encoders.
        text_encoders: with CLIP-L and CLIP-G, whose 818 million parameters cost the loader 1.6 GB of memory; without
            them its CLIP is None.
        seed: of the weights.
    """
    weights = RandomWeights(seed)
    ops = importlib.import_module("comfy.ops").disable_weight_init
    unet = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel").UNetModel
    autoencoder = importlib.import_module("comfy.ldm.models.autoencoder").AutoencoderKL
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        parts = {
            "model.diffusion_model.": unet(**REDUCED_UNET, device="meta", dtype=torch.float16, operations=ops),
            "first_stage_model.": autoencoder(embed_dim=4, ddconfig=dict(SDXL_VAE)),
        }
        for prefix, module in parts.items():
            shapes |= {prefix + key: tuple(value.shape) for key, value in module.state_dict().items()}
        if text_encoders:
            sdxl = importlib.import_module("comfy.supported_models").SDXL(dict(REDUCED_UNET))
            clip = importlib.import_module("comfy.sdxl_clip").SDXLClipModel(device="meta", dtype=torch.float16)
            published = sdxl.process_clip_state_dict_for_saving(clip.state_dict())
            shapes |= {key: tuple(value.shape) for key, value in published.items() if "position_ids" not in key}
    state = weights.state(shapes)
    if safetensors:
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({"state_dict": state}, path)


def write_reduced_adapter(path: Path, *, seed: int = 1) -> None:
    """Write an adapter (LQ encoder and alignment) of the published sizes, for the checkpoint above.

    Args:
        path: ends in .bin.
        seed: of the weights.
    """
    weights = RandomWeights(seed)
    torch.save(weights.state(_adapter_shapes()), path)


def _adapter_shapes() -> dict[str, tuple[int, ...]]:
    """The published LQ encoder and alignment."""
    encoder = LQEncoder(LQEncoderConfig((128, 256, 512, 512), 2), device="meta")
    alignment = AlignmentConfig(
        feature_channels=512, condition_channels=320, unet_channels=320, mlp_channels=1280, layers=2
    )
    shapes = {ENCODER_PREFIX + key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    return shapes | alignment.published_shapes()


def write_lora(path: Path, width: int, *, rank: int = 4, seed: int = 3) -> None:
    """Write a LoRA, with the names of kohya's trainer, for one projection of a U-Net's second level.

    Args:
        path: ends in .safetensors.
        width: channels of that level.
        rank: of the LoRA.
        seed: of the weights.
    """
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    weights = RandomWeights(seed)
    shapes = {f"{name}.lora_down.weight": (rank, width), f"{name}.lora_up.weight": (width, rank)}
    save_file({key: weights.tensor(key, shape).contiguous() for key, shape in shapes.items()}, path)


def write_small_controlnet(path: Path, *, seed: int = 4) -> None:
    """Write a ControlNet for SDXL without transformers, the smallest kind that is published (diffusers' `small`).

    Args:
        path: ends in .safetensors; 320 MB.
        seed: of the weights.
    """
    from diffusers import ControlNetModel

    with torch.device("meta"):
        network = ControlNetModel(
            down_block_types=("DownBlock2D",) * 3,
            mid_block_type="UNetMidBlock2D",
            block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
        )
    weights = RandomWeights(seed)
    state = {key: weights.tensor(key, tuple(value.shape)) for key, value in network.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, path)


def write_narrow_faithdiff(path: Path, *, seed: int = 2) -> None:
    """Write a FaithDiff file whose U-Net ComfyUI detects as SDXL: as deep, but with 320 channels on all levels.

    Args:
        path: ends in .bin. The U-Net has 240 million parameters.
        seed: of the weights.
    """
    _write_faithdiff(path, replace(UNetConfig.of(SDXL), block_out_channels=(320, 320, 320), mid_depth=1), seed)


def write_published_faithdiff(path: Path, *, seed: int = 2) -> None:
    """Write a file with all tensors of FaithDiff.bin in their published shapes, a few megabytes on disk.

    Args:
        path: ends in .bin.
        seed: of the weights.
    """
    _write_faithdiff(path, UNetConfig.of(SDXL), seed)


def _write_faithdiff(path: Path, unet: UNetConfig, seed: int) -> None:
    weights = RandomWeights(seed)
    shapes = {**_adapter_shapes(), **unet.shapes()}
    torch.save(weights.state(shapes), path)
