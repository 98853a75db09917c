"""Other packs in the in-process host, and tiny versions of what their nodes need."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from comfy_host import FOLDER_VARIABLE, Host
from torch import Tensor, nn

NO_PACKS = (
    f"{FOLDER_VARIABLE} IS NOT SET: the tests with other packs are SKIPPED. Clone the packs that docs/compatibility.md "
    "names into a folder, install their requirements, and set the variable to that folder."
)


def module_of(end: str) -> ModuleType:
    """A module of a pack by the end of its name; the host's name for it begins with the folder."""
    return next(module for name, module in sys.modules.items() if name.endswith(end))


def defaults(host: Host, name: str) -> dict[str, Any]:
    """Default values of a node's inputs, required and optional."""
    out: dict[str, Any] = {}
    listed = host.node_class(name).INPUT_TYPES()
    for part in ("required", "optional"):
        for key, entry in listed.get(part, {}).items():
            options = entry[1] if len(entry) > 1 and isinstance(entry[1], dict) else {}
            choices = entry[0] if isinstance(entry[0], (list, tuple)) else options.get("options")
            if "default" in options:
                out[key] = options["default"]
            elif choices:
                out[key] = choices[0]
    return out


class TinyIPAdapter(nn.Module):
    """Key and value projections of an IP-Adapter for the golden U-Net's cross attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        projections = {f"{i}_to_{x}_ip": nn.Linear(64, 64, bias=False) for i in range(1, 60) for x in "kv"}
        self.ip_layers = nn.Module()
        self.ip_layers.to_kvs = nn.ModuleDict(projections)
        self.requires_grad_(False)

    def get_multigpu_clone(self, device: torch.device) -> TinyIPAdapter:
        return self


GOLDEN_ATTENTION = (
    ("input", 3, 0), ("input", 5, 0), ("input", 5, 1), ("middle", 1, 0), ("middle", 1, 1), ("output", 0, 0),
    ("output", 0, 1), ("output", 1, 0), ("output", 1, 1), ("output", 2, 0), ("output", 3, 0),
)  # fmt: skip
"""Places of the golden U-Net's transformers in the host's terms."""


def with_ipadapter(model: Any, adapter: TinyIPAdapter, mask: Tensor | None) -> Any:
    """A MODEL with IPAdapter Plus' own attention patch, as its nodes leave it behind."""
    pack = module_of("IPAdapterPlus")
    tokens = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))
    model = model.clone()
    for number, key in enumerate(GOLDEN_ATTENTION):
        settings = {
            "ipadapter": adapter,
            "weight": 3.0,
            "cond": tokens,
            "cond_alt": None,
            "uncond": torch.zeros_like(tokens),
            "weight_type": "linear",
            "mask": mask,
            "sigma_start": 1e9,
            "sigma_end": 0.0,
            "unfold_batch": False,
            "embeds_scaling": "V only",
            "module_key": str(number * 2 + 1),
        }
        pack.set_model_patch_replace(model, settings, key)
    return model


def gguf_model(host: Host, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A MODEL quantised to Q8_0 as ComfyUI-GGUF loads it, and its weights dequantised."""
    ops, patcher = module_of("ComfyUI-GGUF.ops"), module_of("ComfyUI-GGUF.nodes").GGUFModelPatcher
    gguf = importlib.import_module("gguf")
    kinds = gguf.GGMLQuantizationType
    packed, plain = {}, {}
    for key, value in state.items():
        if value.ndim == 2 and value.shape[-1] % 32 == 0:
            blocks = gguf.quants.quantize(value.numpy().astype(np.float32), kinds.Q8_0)
            packed[key] = ops.GGMLTensor(
                torch.from_numpy(blocks.copy()), tensor_type=kinds.Q8_0, tensor_shape=value.shape
            )
            plain[key] = torch.from_numpy(gguf.quants.dequantize(blocks, kinds.Q8_0))
        else:
            packed[key] = ops.GGMLTensor(value.clone(), tensor_type=kinds.F32, tensor_shape=value.shape)
            plain[key] = value
    config = importlib.import_module("comfy.supported_models").SDXL(dict(host.testpack.models.GOLDEN_UNET))
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = ops.GGMLOps()
    model = config.get_model({}, "", device=torch.device("cpu"))
    model.diffusion_model.load_state_dict(packed, strict=False)
    device = importlib.import_module("comfy.model_management").get_torch_device()
    base = importlib.import_module("comfy.model_patcher").ModelPatcher
    return patcher.clone(base(model, load_device=device, offload_device=torch.device("cpu"))), plain


def write_gguf(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write a U-Net of SDXL as a GGUF file, its matrices in Q8_0.

    Returns:
        The weights in it, dequantised.
    """
    gguf = importlib.import_module("gguf")
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, arch="sdxl")
    plain = {}
    for key, value in state.items():
        data = value.float().numpy()
        kind = kinds.F32 if value.ndim == 1 else kinds.F16
        if value.ndim == 2 and value.shape[-1] % 32 == 0:
            kind = kinds.Q8_0
        blocks = gguf.quants.quantize(data, kind)
        writer.add_tensor(key, blocks, raw_dtype=kind)
        plain[key] = torch.from_numpy(gguf.quants.dequantize(blocks, kind).reshape(data.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plain


def face(left: int, top: int, right: int, bottom: int) -> Any:
    """What Impact Pack's detectors give for a box."""
    seg = importlib.import_module("impact.core").SEG
    mask = np.ones((bottom - top, right - left), dtype=np.float32)
    box = (left, top, right, bottom)
    return seg(None, mask, 0.9, box, box, "face", None)
