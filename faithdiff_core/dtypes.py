"""The number formats of weights by the names that people give them: one table for the whole project."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Dtypes in which weights are stored, by the names that ComfyUI's users know."""

COMPUTE_DTYPES: dict[str, torch.dtype] = {name: dtype for name, dtype in DTYPES.items() if dtype.itemsize > 1}
"""Those that modules compute in."""

READABLE_DTYPES = (*DTYPES.values(), torch.float64)
"""Dtypes of the weights in files that can be read."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in `DTYPES`, or else torch's, without its `torch.`."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of this dtype are computed with: float32, or float64 for float64.

    `torch.promote_types` has no answer for 8-bit floats.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
