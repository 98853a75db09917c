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

from . import models
from .settings import Settings

REPO = Path(__file__).resolve().parents[1]

ADAPTER = "published_adapter.safetensors"
"""Name of the adapter file in the host's models/faithdiff."""

UNET_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
    "num_head_channels": 64,
    "num_heads": -1,
}
"""SDXL's U-Net in the host's terms."""

VAE_CONFIG: dict[str, Any] = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
"""SDXL's VAE in the host's terms."""


def _comfy_host() -> Any:
    """The package that runs ComfyUI for tests and benchmarks."""
    folder = str(REPO / "tools")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("comfy_host")


def find_host() -> Path | None:
    """The ComfyUI folder, or None: $COMFYUI_PATH, ~/comfy/ComfyUI, or the one that this pack lies in."""
    path: Path | None = _comfy_host().find_host()
    return path


def _base() -> Path:
    """A base directory of the host's own, removed at the end of the process."""
    path = Path(mkdtemp(prefix="benchmarks-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def start_host() -> Any:
    """The host in this process, once; `call` runs its nodes.

    Raises:
        FileNotFoundError: there is none.
    """
    from .rows_files import write_faithdiff

    path = find_host()
    if path is None:
        raise FileNotFoundError("No ComfyUI found; set COMFYUI_PATH.")
    host = _comfy_host().Host(path, _base())
    _module("comfy.utils").set_progress_bar_enabled(False)
    write_faithdiff(host.base / "models" / "faithdiff" / ADAPTER, None)
    return host


def _module(name: str) -> Any:
    return importlib.import_module(name)


def patcher(module: torch.nn.Module) -> Any:
    """A module in the host's care."""
    management = _module("comfy.model_management")
    return _module("comfy.model_patcher").CoreModelPatcher(
        module, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


@cache
def sdxl_model(dtype: torch.dtype) -> Any:
    """A MODEL of SDXL's size: 5 GB in half precision."""
    config = _module("comfy.supported_models").SDXL(dict(UNET_CONFIG))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=_module("comfy.model_management").unet_offload_device())
    models.randomize(model.diffusion_model, 3)
    return patcher(model.eval().requires_grad_(False))


def sdxl_vae(dtype: torch.dtype, channels: int = VAE_CONFIG["ch"]) -> Any:
    """A VAE of SDXL's kind; `channels` at the finest level, 128 for SDXL's own."""
    config = VAE_CONFIG | {"ch": channels}
    autoencoder = _module("comfy.ldm.models.autoencoder").AutoencoderKL(embed_dim=4, ddconfig=dict(config))
    models.randomize(autoencoder, 4)
    # Within the range of images; the host clamps what lies outside, and differences would vanish or saturate there.
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight.mul_(0.1)
    return _module("comfy.sd").VAE(
        sd=autoencoder.state_dict(), config={"params": {"ddconfig": config, "embed_dim": 4}}, dtype=dtype
    )


def supir_patch(dtype: torch.dtype) -> Any:
    """The host's own SUPIR as a MODEL_PATCH."""
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
