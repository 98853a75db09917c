"""ComfyUI in this process, with models of the published sizes and random weights."""

from __future__ import annotations

import atexit
import importlib
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import torch
from comfy_host import Host, find_host
from tiny_models.comfyui_configs import SDXL_UNET, SDXL_VAE, unet_config

from . import counts, models
from .settings import SCALE, Settings
from .shared import shared

SMALL_UNET = unet_config(320, (1, 1, 2), 2, (0, 0, 1, 1, 1, 1), (0, 0, 0, 1, 1, 1, 1, 1, 1), 1, 2048, 2816)
"""`models.SMALL_UNET` in ComfyUI's terms."""

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


def _random_model(unet: Mapping[str, Any], seed: int, dtype: torch.dtype) -> Any:
    """A MODEL of SDXL's kind with a U-Net of given sizes and random weights."""
    config = _module("comfy.supported_models").SDXL(dict(unet))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=_module("comfy.model_management").unet_offload_device())
    models.randomize(model.diffusion_model, seed)
    return patcher(model.eval().requires_grad_(False))


@shared("host")
def sdxl_model(dtype: torch.dtype) -> Any:
    """A MODEL of SDXL's size: 5 GB in half precision."""
    return _random_model(SDXL_UNET, 3, dtype)


@shared("host")
def small_sdxl_model(dtype: torch.dtype) -> Any:
    """A MODEL with SDXL's conv_in and a tenth of its weights (`models.SMALL_UNET`)."""
    return _random_model(SMALL_UNET, 9, dtype)


def unet_calls(model: Any, work: Callable[[], object]) -> int:
    """How often a MODEL's U-Net is called in a piece of work, guidance halves together."""
    calls: list[int] = []
    handle = model.model.diffusion_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        work()
    finally:
        handle.remove()
    return len(calls)


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


def supir_counts(size: int) -> tuple[int, int]:
    """Operations of a guided U-Net call with ComfyUI's SUPIR at size x size pixels, and parameters of both.

    Nothing is computed: fake tensors stand for a CPU's, because ComfyUI's attention asks the device for free memory.
    SUPIR encodes the image with a second encoder of the VAE's kind, which counts as well: it has the LQ encoder's size.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    unet_module = _module("comfy.ldm.modules.diffusionmodules.openaimodel")
    cpu, side = torch.device("cpu"), size // SCALE
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = _module("comfy.supported_models").SDXL(dict(SDXL_UNET))
        config.set_inference_dtype(torch.float32, None)
        unet = config.get_model({}, "", device=cpu).diffusion_model
        supir = _module("comfy.ldm.supir.supir_modules").SUPIR(
            device=cpu, dtype=torch.float32, operations=_module("comfy.ops").manual_cast
        )
        latent = torch.empty(1, 4, side, side)
        patch = _module("comfy.ldm.supir.supir_patch").SUPIRPatch(
            SimpleNamespace(model=supir), supir.project_modules, latent, 1.0, 1.0
        )
        patches = {
            "middle_block_after_patch": [patch.middle_after],
            "output_block_patch": [patch.output_block],
            "forward_timestep_embed_patch": [(unet_module.Upsample, patch.pre_upsample)],
        }
        inputs = models.unet_inputs(2, side, cpu, torch.float32)
        operations = counts.count(
            lambda: unet(
                inputs["sample"],
                torch.full((2,), 500.0),
                context=inputs["encoder_hidden_states"],
                y=torch.empty(2, SDXL_UNET["adm_in_channels"]),
                transformer_options={"patches": patches},
            )
        )
        parameters = counts.parameters(unet) + counts.parameters(supir)
    return operations, parameters + counts.parameter_counts()["LQ encoder"]


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
