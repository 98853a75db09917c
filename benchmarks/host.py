"""ComfyUI in this process, with models of the published sizes and random weights."""

from __future__ import annotations

import atexit
import importlib
import shutil
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from comfy_host import Host, find_host
from tiny_models.comfyui_configs import SDXL_UNET, SDXL_VAE

from . import models
from .settings import Settings
from .shared import shared

ADAPTER = "published_adapter.safetensors"
"""Name of the adapter file in the host's models/faithdiff."""


def _base() -> Path:
    """ComfyUI's base directory, removed at the end of the process."""
    path = Path(mkdtemp(prefix="benchmarks-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def start_host() -> Host:
    """The host in this process, once; `call` runs its nodes.

    Raises:
        FileNotFoundError: there is none.
    """
    path = find_host()
    if path is None:
        raise FileNotFoundError("No ComfyUI found; set COMFYUI_PATH.")
    host = Host(path, _base())
    _module("comfy.utils").set_progress_bar_enabled(False)
    models.write_faithdiff(host.base / "models" / "faithdiff" / ADAPTER, None)
    return host


def _module(name: str) -> Any:
    return importlib.import_module(name)


def patcher(module: torch.nn.Module) -> Any:
    """A module managed by ComfyUI (ModelPatcher)."""
    management = _module("comfy.model_management")
    return _module("comfy.model_patcher").CoreModelPatcher(
        module, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


@shared("host")
def sdxl_model(dtype: torch.dtype) -> Any:
    """A MODEL of SDXL's size: 5 GB in half precision."""
    config = _module("comfy.supported_models").SDXL(dict(SDXL_UNET))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=_module("comfy.model_management").unet_offload_device())
    models.randomize(model.diffusion_model, 3)
    return patcher(model.eval().requires_grad_(False))


def sdxl_vae(dtype: torch.dtype, channels: int = SDXL_VAE["ch"]) -> Any:
    """A VAE of SDXL's kind; `channels` at the finest level, 128 for SDXL's own."""
    config = SDXL_VAE | {"ch": channels}
    autoencoder = _module("comfy.ldm.models.autoencoder").AutoencoderKL(embed_dim=4, ddconfig=dict(config))
    models.randomize(autoencoder, 4)
    # Within the range of images; the host clamps what lies outside, and differences would vanish or saturate there.
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight.mul_(0.1)
    return _module("comfy.sd").VAE(
        sd=autoencoder.state_dict(), config={"params": {"ddconfig": config, "embed_dim": 4}}, dtype=dtype
    )


def supir_patch(dtype: torch.dtype) -> Any:
    """ComfyUI's SUPIR as a MODEL_PATCH."""
    management = _module("comfy.model_management")
    module = _module("comfy.ldm.supir.supir_modules").SUPIR(
        device=management.unet_offload_device(), dtype=dtype, operations=_module("comfy.ops").manual_cast
    )
    models.randomize(module, 6)
    return patcher(module.eval().requires_grad_(False))


def conditioning(settings: Settings) -> tuple[list[Any], list[Any]]:
    """Random CONDITIONINGs: positive and negative."""
    inputs = models.unet_inputs(2, 8, torch.device("cpu"), torch.float32)
    embeds, pooled = inputs["encoder_hidden_states"], inputs["added_cond_kwargs"]["text_embeds"]
    positive, negative = ([[embeds[i : i + 1], {"pooled_output": pooled[i : i + 1]}]] for i in range(2))
    return positive, negative


def unload_all() -> None:
    """Have the host take its models off the device."""
    management = sys.modules.get("comfy.model_management")
    if management is not None:
        management.unload_all_models()
        management.soft_empty_cache()
