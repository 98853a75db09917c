"""The golden data: the published code's inputs, intermediate tensors and results, made with a tiny model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from faithdiff_core.engine import FaithDiffPipeline

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@dataclass(frozen=True)
class Golden:
    """The published code's inputs, intermediate tensors and results, made with a tiny model.

    Attributes:
        manifest: how the cases were made, and the models' configurations.
        tensors: by name, as in `expected.safetensors`.
        folder: where the files are.
    """

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path

    @property
    def model(self) -> Path:
        """The tiny FaithDiff file, with the published file's names."""
        return self.folder / "faithdiff_tiny.safetensors"

    @property
    def vae(self) -> Path:
        """The tiny VAE, with diffusers' names."""
        return self.folder / "vae_tiny.safetensors"


def read_golden() -> Golden:
    """Read manifest and tensors."""
    from safetensors.torch import load_file

    manifest = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
    return Golden(manifest, load_file(GOLDEN / "expected.safetensors"), GOLDEN)


def golden_case(pipeline: FaithDiffPipeline, golden: Golden, name: str) -> Tensor:
    """The final latent that the engine gives for a golden case; the expected one is the tensor `<name>.latent`."""
    from faithdiff_core.engine import TextConditioning

    case = next(case for case in golden.manifest["cases"] if case["name"] == name)
    tensors = golden.tensors
    return pipeline.sample(
        tensors[f"{name}.lq_features"],
        TextConditioning(*(tensors[key] for key in ("pos", "pos_pooled", "neg", "neg_pooled"))),
        tensors[f"{name}.noise"],
        lq_latent=tensors.get(f"{name}.lr_latent"),
        steps=case["steps"],
        cfg=case["cfg"],
        start=case["start"],
        tile=case["tile"],
        overlap=1 - case["overlap"],
    )
