"""Quantized U-Nets in the engine, which dequantizes them: the golden case from rounded weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.golden import golden_case

from faithdiff_core import WeightsError, read_faithdiff
from faithdiff_core.engine import FaithDiffPipeline
from faithdiff_core.weights.conversion import convert
from faithdiff_core.weights.unet_names import CHECKPOINT_PREFIX, checkpoint_names

if TYPE_CHECKING:
    from conftest import Golden

CASE = "side_below_tile"


@pytest.mark.parametrize(("dtype", "low", "high"), [("fp8_scaled", 0.005, 0.03), ("int8", 0.001, 0.01)])
@torch.no_grad()
def test_error_of_a_golden_case(
    golden: Golden, tiny_sdxl: Path, tmp_path: Path, dtype: str, low: float, high: float
) -> None:
    """The final latent's error against the published code's in full precision; the same from one file and from two."""
    expected = golden.tensors[f"{CASE}.latent"]
    unet, adapter = convert(golden.model, tmp_path, dtype)
    (whole,) = convert(golden.model, tmp_path, dtype, one_file=True)
    latents = []
    for faithdiff, other in ((adapter, unet), (whole, None)):
        pipeline = FaithDiffPipeline.from_files(tiny_sdxl, faithdiff, unet=other, dtype="fp32", device="cpu")
        latents.append(golden_case(pipeline, golden, CASE))
    assert torch.equal(*latents)
    assert low < float((latents[0] - expected).norm() / expected.norm()) < high


def test_the_unet_has_the_dequantized_weights(golden: Golden, tiny_sdxl: Path, tmp_path: Path) -> None:
    (path,) = convert(golden.model, tmp_path, "fp8_scaled", one_file=True)
    stored = load_file(path)
    unet = FaithDiffPipeline.from_files(tiny_sdxl, path, dtype="bf16", device="cpu").base.unet.state_dict()
    names = checkpoint_names(read_faithdiff(golden.model).parts["unet"].config)
    for key, own in names.items():
        value, scale = stored[CHECKPOINT_PREFIX + own], stored.get(f"{CHECKPOINT_PREFIX}{own}_scale")
        by_hand = value.float() if scale is None else value.float() * scale
        assert torch.equal(unet[key], by_hand.bfloat16()), key


def test_a_quantized_base_is_refused(golden: Golden, tiny_sdxl: Path, tmp_path: Path) -> None:
    """diffusers would read its weights without their scales."""
    (quantized,) = convert(golden.model, tmp_path, "fp8_scaled", one_file=True)
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_file({key: value for key, value in load_file(quantized).items() if key.startswith("model.")}, checkpoint)
    with pytest.raises(WeightsError, match=r"checkpoint\.safetensors is quantized .* in fp16, bf16 or fp32"):
        FaithDiffPipeline.from_files(checkpoint, golden.model, dtype="fp32", device="cpu", config=tiny_sdxl)
