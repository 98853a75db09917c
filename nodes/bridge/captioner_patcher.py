"""Captioners managed by ComfyUI (ModelPatcher): loaded, kept and unloaded like its models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ...faithdiff_core.captions.captioner import Captioner, load_captioner
from ...faithdiff_core.dtypes import COMPUTE_DTYPES
from .folders import captioner_folders
from .step_progress import show_text

CAPTION_DTYPES: dict[str, torch.dtype | None] = {
    "default": None,
    **{name: COMPUTE_DTYPES[name] for name in ("fp16", "bf16", "fp32")},
}
"""What a captioner's weights can be kept in."""

WORKING_MEMORY = 1 << 30
"""Bytes beside the weights: a 7B model's keys and values for 1000 tokens (0.5 GB in half precision), and its vision."""

UNLIMITED = 1e32
"""More bytes than any model has."""


class _CaptionerPatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI's patcher for modules that are not its own.

    These work on one device, so they are loaded whole or not at all. Unloaded, they leave RAM, too: the device for what
    is not in use is "meta", which keeps nothing. (Dropping the patcher itself must wait: ComfyUI walks through its
    list of models while it unloads, and would lose its place.)

    Attributes:
        freed: the weights are gone; a new one must be made.
    """

    freed = False

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, *args: Any, **kw: Any) -> Any:
        return super().partially_load(device_to, UNLIMITED, *args, **kw)

    def partially_unload(self, *args: Any, **kw: Any) -> int:
        return 0  # nothing was freed: ComfyUI unloads the whole model then

    def detach(self, unpatch_all: bool = True) -> Any:
        self.freed = self.freed or unpatch_all  # else it is only moved within ComfyUI's list
        return super().detach(unpatch_all)


class _CaptionerModule(nn.Module):
    """What the patcher manages. Unlike transformers' models, it lets ComfyUI set its `device`."""

    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.captioner = captioner
        self.model = captioner.model


_kept: dict[tuple[str, str], _CaptionerPatcher] = {}
"""The last captioner, by name and precision, as long as ComfyUI keeps it loaded."""


def captioner_for(model: str, dtype: str, allow_download: bool) -> _CaptionerPatcher:
    """The patcher of a captioner: the last one if it is the same, or a new one.

    It is kept for as long as ComfyUI keeps it loaded. When ComfyUI makes room for other models, or is told to free
    its memory, it is gone from RAM, too.
    """
    key = (model, dtype)
    if key not in _kept or _kept[key].freed:
        _kept.clear()  # before the next one is read, so that never two of them are in memory
        _kept[key] = _load(resolve_model(model), dtype, allow_download)
    return _kept[key]


def _load(source: str, dtype: str, allow_download: bool) -> _CaptionerPatcher:
    device = comfy.model_management.text_encoder_device()
    chosen = CAPTION_DTYPES[dtype]
    if chosen is None and not (
        comfy.model_management.should_use_fp16(device, prioritize_performance=False)
        or comfy.model_management.should_use_bf16(device)
    ):
        chosen = torch.float32
    module = _CaptionerModule(load_captioner(source, chosen, allow_download))
    needed = comfy.model_management.module_size(module) + WORKING_MEMORY
    if needed > comfy.model_management.get_total_memory(device):
        logging.warning(
            f"FaithDiff Caption: {source} needs {needed / 1e9:.1f} GB, more than {device} has, and works on the "
            f"CPU (slow). A smaller model, or dtype fp16 or bf16, may fit."
        )
        device = torch.device("cpu")
    return _CaptionerPatcher(
        module,
        load_device=device,
        offload_device=torch.device("meta"),
    )


def resolve_model(name: str) -> str:
    """The folder that is meant by a name, or the name itself (an absolute path or a hub id).

    In the model folders, a hub id's files may lie in `owner/name` or in `name`.
    """
    name = name.strip()
    if not Path(name).is_absolute():
        for root in captioner_folders():
            for relative in dict.fromkeys((name, name.rpartition("/")[2])):
                if relative and (folder := Path(root) / relative).is_dir():
                    return str(folder)
    return name


def caption_images(
    patcher: _CaptionerPatcher, images: Tensor, prompt: str, max_new_tokens: int, temperature: float, seed: int
) -> list[str]:
    """Describe images one by one with ComfyUI's memory management, progress and cancel.

    Args:
        patcher: from `captioner_for`.
        images: (B, H, W, 3 or more) in [0, 1]; channels beyond three are left out.
        prompt, max_new_tokens, temperature, seed: as in `Captioner.caption`; every image gets the same seed.
    """
    comfy.model_management.load_models_gpu([patcher], memory_required=WORKING_MEMORY)
    bar = comfy.utils.ProgressBar(images.shape[0] * max_new_tokens)
    captions: list[str] = []

    def on_token(count: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(len(captions) * max_new_tokens + count)

    for image in images[..., :3].movedim(-1, 1):
        captions.append(patcher.model.captioner.caption(image, prompt, max_new_tokens, temperature, seed, on_token))
        bar.update_absolute(len(captions) * max_new_tokens)
        show_text(captions[-1])
    return captions
