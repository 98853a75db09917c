"""The golden data: where it lies, and its tensors by name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[3] / "tests" / "golden"

VAE_SCALING_FACTOR = 0.13025
"""SDXL's latents are the VAE's times this; a LATENT of the host is the VAE's."""


@cache
def manifest() -> dict[str, Any]:
    """How the golden cases were made."""
    out: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())
    return out


def case(name: str) -> dict[str, Any]:
    """The settings of one golden case."""
    return next(entry for entry in manifest()["cases"] if entry["name"] == name)


def case_names() -> list[str]:
    """Names of all golden cases."""
    return [entry["name"] for entry in manifest()["cases"]]


@cache
def expected() -> dict[str, Tensor]:
    """Inputs and results of the golden cases. Do not write into the tensors."""
    return load_file(GOLDEN / "expected.safetensors")


@cache
def faithdiff_tiny() -> dict[str, Tensor]:
    """The tiny model under the published file's names (half precision). Do not write into the tensors."""
    return load_file(GOLDEN / "faithdiff_tiny.safetensors")


@cache
def vae_tiny() -> dict[str, Tensor]:
    """The tiny VAE under diffusers' names (half precision). Do not write into the tensors."""
    return load_file(GOLDEN / "vae_tiny.safetensors")
