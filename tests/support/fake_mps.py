"""A device that computes on the CPU and refuses what Apple's cannot do.

Tensors on it hold a CPU tensor. Float64, and operators that PyTorch has no Metal kernel for, raise an error, as they do
on the device without PYTORCH_ENABLE_MPS_FALLBACK.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

MPS = torch.device("lazy", 0)
"""It stands for the device: PyTorch without Metal refuses a tensor on `mps` before anybody is asked."""


@cache
def _entries() -> dict[str, dict[str, Any]]:
    """PyTorch's own description of its operators, which comes with it, by name and overload."""
    source = Path(torch.__file__).parents[1] / "torchgen" / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.load(source.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {entry["func"].partition("(")[0]: entry for entry in entries}


@cache
def has_kernel(name: str) -> bool:
    """Whether an operator (`add.Tensor`) has a Metal kernel, or is made of others on every device."""
    entry = _entries().get(name)
    if entry is None:
        return False
    if "structured_delegate" in entry:
        return has_kernel(entry["structured_delegate"])
    keys = [key.strip() for keys in entry.get("dispatch", {"CompositeImplicitAutograd": ""}) for key in keys.split(",")]
    return any(key == "MPS" or key.startswith("Composite") for key in keys)


class OnDevice(Tensor):
    """A tensor on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[OnDevice], inner: Tensor) -> OnDevice:
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        out: OnDevice = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=MPS, requires_grad=False
        )
        out.held = inner
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operator on the CPU; the result is where it would be."""
    flat = tree_flatten((args, kwargs))[0]
    tensors = [x for x in flat if isinstance(x, Tensor)]
    asked = kwargs.get("device")
    ours = any(isinstance(x, OnDevice) for x in tensors)
    if asked is not None:
        on_device = torch.device(asked).type == MPS.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    else:
        on_device = ours
    if on_device and not has_kernel(str(func).removeprefix("aten.").removesuffix(".default")):
        raise NotImplementedError(
            f"The operator '{func._schema.name}' is not currently implemented for the MPS device."
        )
    if ours and func._schema.name not in ("aten::copy_", "aten::_to_copy", "aten::to"):
        stray = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim]
        if stray:
            raise RuntimeError(f"{func._schema.name}: expected all tensors on one device, got one on the CPU.")
    plain = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, kwargs))
    result = func(*plain[0], **plain[1])
    if func._schema.name.endswith("_") and args and isinstance(args[0], OnDevice):
        return args[0]
    if not on_device:
        return result
    return tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, result)


class FakeMPS(TorchDispatchMode):
    """While it lasts, there is such a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def move(module: torch.nn.Module) -> torch.nn.Module:
    """A module whose parameters and buffers are on the device."""
    for child in module.modules():
        for name, value in list(child._parameters.items()):
            if value is not None:
                child._parameters[name] = torch.nn.Parameter(OnDevice(value.detach()), requires_grad=False)
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                setattr(child, name, OnDevice(buffer))
    return module
