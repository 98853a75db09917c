"""What FaithDiff's golden U-Net was trained from, for tests of LoRAs: the files, and LoRAs added by hand."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models.checkpoints import single_file_unet_key
from torch import Tensor

from faithdiff_core import read_faithdiff
from faithdiff_core.weights.unet_names import CHECKPOINT_PREFIX

from .golden import GOLDEN

State = dict[str, Tensor]

LAYERS, LEVELS_WITH_ATTENTION = 1, {0, 1}
"""Of the golden U-Net: residual blocks of a level, and levels of the way up with attention."""


@cache
def golden_unet() -> State:
    """FaithDiff's golden U-Net under diffusers' names, in single precision. Do not write into the tensors."""
    return {
        key: value.float()
        for key, value in read_faithdiff(GOLDEN / "faithdiff_tiny.safetensors").parts["unet"].state.items()
    }


@cache
def trained_from(size: float = 0.1, decay: float = 0.8) -> State:
    """The golden U-Net without a difference whose singular values decay: each is `decay` times the one before.

    Do not write into the tensors.
    """
    generator = torch.Generator().manual_seed(0)
    out = {}
    for key, value in sorted(golden_unet().items()):
        change = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
            change = (left * (values[0] * decay ** torch.arange(len(values))) @ right).reshape(value.shape)
        out[key] = value - size * value.std(correction=0) * change
    return out


def checkpoint_key(name: str) -> str:
    """The name in a single-file checkpoint, without prefix, of a tensor of the golden U-Net."""
    return single_file_unet_key(name, LAYERS, LEVELS_WITH_ATTENTION)


def write_checkpoint(state: State, path: Path) -> Path:
    """Write a U-Net as a single-file checkpoint does, with nothing else in it."""
    save_file({CHECKPOINT_PREFIX + checkpoint_key(name): value.contiguous() for name, value in state.items()}, path)
    return path


def add_by_hand(base: State, path: Path) -> State:
    """A U-Net with a LoRA file added, computed from what its layers do to their inputs. Every tensor must have a place.

    Args:
        base: under diffusers' names.
        path: the LoRA.
    """
    lora, out = load_file(path), dict(base)
    for name in base:
        kind = name.rpartition(".")[2]
        stem = "lora_unet_" + checkpoint_key(name).rpartition(".")[0].replace(".", "_")
        change = lora.pop(f"{stem}.diff_b" if kind == "bias" else f"{stem}.diff", None)
        up = lora.pop(f"{stem}.lora_up.weight", None) if kind == "weight" else None
        if up is not None:
            down = lora.pop(f"{stem}.lora_down.weight").float()
            scale = float(lora.pop(f"{stem}.alpha")) / down.shape[0]
            # Two convolutions one after the other are one with this kernel.
            change = scale * (
                F.conv2d(down.movedim(0, 1), up.float()).movedim(0, 1) if up.ndim == 4 else up.float() @ down
            )
        if change is not None:
            out[name] = base[name] + change.float()
    assert not [key for key in lora if key.startswith("lora_unet_")]
    return out


def factor_of(key: str, blocks: Mapping[str, float]) -> float:
    """The factor for a U-Net's tensor, as ComfyUI's ModelMergeBlocks sorts tensors.

    Args:
        key: in a single-file checkpoint, without prefix.
        blocks: `input_blocks`, `middle_block` and `output_blocks`; 1 where one is missing.
    """
    if key.startswith("middle_block."):
        return blocks.get("middle_block", 1.0)
    return blocks.get("output_blocks" if key.startswith("out") else "input_blocks", 1.0)
