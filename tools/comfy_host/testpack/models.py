"""Tiny objects of the host's own classes, and nodes that hand them out."""

from __future__ import annotations

import copy

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy_api.latest import io
from tiny_models.comfyui_configs import GOLDEN_UNET, GOLDEN_VAE
from torch import Tensor, nn

from . import golden

CATEGORY = "tests"

TEXT_CONFIG = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3}
"""One text encoder whose width is both the golden U-Net's context and its pooled width."""

LORA_TARGETS = ("attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_out.0", "ff.net.2")
LORA_RANK = 4


def golden_unet() -> dict[str, Tensor]:
    """The golden U-Net's tensors under the host's names, single precision."""
    names = comfy.utils.unet_to_diffusers(GOLDEN_UNET)
    return {names[key]: value.float() for key, value in golden.faithdiff_tiny().items() if key in names}


def other_unet(seed: int) -> dict[str, Tensor]:
    """A U-Net of the same sizes and similar statistics with weights of its own, as a user's checkpoint would be."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, value in sorted(golden_unet().items()):
        spread, centre = value.std(correction=0), value.mean()
        out[key] = torch.randn(value.shape, generator=generator) * spread + centre
    return out


def tiny_model(
    state: dict[str, Tensor], marks: tuple[str, ...] = (), dtype: torch.dtype = torch.float32
) -> comfy.model_patcher.ModelPatcher:
    """An SDXL MODEL that computes in single precision, around a U-Net of `GOLDEN_UNET`'s sizes.

    Args:
        state: the U-Net's tensors under the host's names.
        marks: entries by which checkpoints tell what they predict, such as `v_pred`, `ztsnr`, `edm_mean`, `edm_std`.
        dtype: of the weights.

    Raises:
        ValueError: tensors are missing or unknown.
    """
    config = comfy.supported_models.SDXL(dict(GOLDEN_UNET))
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    marked = {mark: torch.ones(1, 4, 1, 1) * (mark == "edm_std") for mark in marks}
    model = config.get_model(marked, "", device=offload_device)
    load_exactly(model.diffusion_model, state)
    return comfy.model_patcher.CoreModelPatcher(model, load_device=load_device, offload_device=offload_device)


def quantized_model(state: dict[str, Tensor]) -> comfy.model_patcher.ModelPatcher:
    """An SDXL MODEL around a quantized U-Net of `GOLDEN_UNET`'s sizes, as ComfyUI's loader makes one.

    Args:
        state: the U-Net's tensors as a file has them, under the host's names.

    Raises:
        ValueError: tensors are missing or unknown.
    """
    config = comfy.supported_models.SDXL(dict(GOLDEN_UNET))
    config.quant_config = comfy.utils.detect_layer_quantization(state, "")
    config.set_inference_dtype(torch.float32, torch.float32)
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model({}, "", device=offload_device)
    load_exactly(model.diffusion_model, dict(state))
    return comfy.model_patcher.CoreModelPatcher(model, load_device=load_device, offload_device=offload_device)


def load_exactly(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights into one of the host's modules, which begin with uninitialised memory.

    Raises:
        ValueError: tensors are missing or unknown.
    """
    missing, unexpected = module.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"missing: {missing[:5]}, unexpected: {unexpected[:5]}")


def tiny_vae() -> comfy.sd.VAE:
    """The golden VAE."""
    state = {key: value.float() for key, value in golden.vae_tiny().items()}
    vae = comfy.sd.VAE(sd=state, config={"params": {"ddconfig": dict(GOLDEN_VAE), "embed_dim": 4}}, dtype=torch.float32)
    vae.throw_exception_if_invalid()
    return vae


def random_state(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights for a module: norms are the identity, biases small, all else keeps the variance."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, value in sorted(module.state_dict().items()):
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            out[key] = noise / value[0].numel() ** 0.5
        elif key.endswith(".weight"):
            out[key] = torch.ones(value.shape)
        elif key.endswith("logit_scale"):
            out[key] = torch.tensor(4.6055)
        else:
            out[key] = noise * 0.02
    return out


def tiny_clip(seed: int) -> comfy.sd.CLIP:
    """A CLIP of the SDXL refiner's kind (one text encoder) with 64 channels, for the golden U-Net."""
    target = comfy.supported_models.SDXLRefiner({}).clip_target()
    clip = comfy.sd.CLIP(target, model_options={"clip_g_model_config": dict(TEXT_CONFIG), "dtype": torch.float32})
    load_exactly(clip.cond_stage_model, random_state(clip.cond_stage_model, seed))
    return clip


def tiny_controlnet(seed: int) -> comfy.controlnet.ControlNet:
    """A ControlNet for the golden U-Net; its output layers are random, not zero, so that it acts."""
    offload_device = comfy.model_management.unet_offload_device()
    config = {key: value for key, value in copy.deepcopy(GOLDEN_UNET).items() if key != "out_channels"}
    model = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, dtype=torch.float32, device=offload_device, operations=comfy.ops.disable_weight_init
    )
    load_exactly(model, random_state(model, seed))
    return comfy.controlnet.ControlNet(model, load_device=comfy.model_management.get_torch_device())


def lora_state(seed: int) -> dict[str, Tensor]:
    """A LoRA file's tensors for the golden U-Net, under the host's names; strong enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, value in sorted(golden_unet().items()):
        name = key.removesuffix(".weight")
        if not (key.endswith(".weight") and name.endswith(LORA_TARGETS)):
            continue
        prefix = "lora_unet_" + name.replace(".", "_")
        spread = float(value.std()) ** 0.5
        out[f"{prefix}.lora_up.weight"] = torch.randn(value.shape[0], LORA_RANK, generator=generator) * spread
        out[f"{prefix}.lora_down.weight"] = torch.randn(LORA_RANK, value.shape[1], generator=generator) * spread
        out[f"{prefix}.alpha"] = torch.tensor(float(LORA_RANK) / 2)
    return out


def seed_input() -> io.Int.Input:
    """A seed for random weights or images."""
    return io.Int.Input("seed", default=0, min=0, max=2**63 - 1)


class TestModel(io.ComfyNode):
    """The golden U-Net, or another one of its sizes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestModel",
            category=CATEGORY,
            inputs=[io.Combo.Input("weights", options=["golden", "other"], default="golden"), seed_input()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, weights: str = "golden", seed: int = 0) -> io.NodeOutput:
        return io.NodeOutput(tiny_model(golden_unet() if weights == "golden" else other_unet(seed)))


class TestVAE(io.ComfyNode):
    """The golden VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="TestVAE", category=CATEGORY, inputs=[], outputs=[io.Vae.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(tiny_vae())


class TestCLIP(io.ComfyNode):
    """A tiny text encoder with random weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="TestCLIP", category=CATEGORY, inputs=[seed_input()], outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls, seed: int = 0) -> io.NodeOutput:
        return io.NodeOutput(tiny_clip(seed))


class TestControlNet(io.ComfyNode):
    """A tiny ControlNet with random weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestControlNet", category=CATEGORY, inputs=[seed_input()], outputs=[io.ControlNet.Output()]
        )

    @classmethod
    def execute(cls, seed: int = 0) -> io.NodeOutput:
        return io.NodeOutput(tiny_controlnet(seed))


class TestLoRA(io.ComfyNode):
    """Puts a random LoRA onto the tiny model, with the function that the host's LoRA loader calls."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestLoRA",
            category=CATEGORY,
            inputs=[
                io.Model.Input("model"),
                seed_input(),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: comfy.model_patcher.ModelPatcher, seed: int = 0, strength: float = 1.0) -> io.NodeOutput:
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora_state(seed), strength, 0.0)
        return io.NodeOutput(patched)
