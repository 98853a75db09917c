"""LoRAs of FaithDiff in the engine: loaded by diffusers, and as part of FaithDiff's file."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.golden import golden_case
from support.lora import add_by_hand, trained_from, write_checkpoint
from torch import Tensor

from faithdiff_core import SettingsError, WeightsError
from faithdiff_core.engine import FaithDiffPipeline
from faithdiff_core.weights.lora_extraction import ExtractionSettings, extract_lora

if TYPE_CHECKING:
    from conftest import Golden


CASE = "side_below_tile"


@pytest.fixture(scope="module")
def base_folder(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL model with the U-Net that FaithDiff's was trained from."""
    folder = tmp_path_factory.mktemp("lora_base") / "base"
    shutil.copytree(tiny_sdxl, folder)
    save_file(trained_from(), folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def combined(base_folder: Path, golden: Golden) -> Path:
    path = base_folder.parent / "tiny_faithdiff_lora.safetensors"
    settings = ExtractionSettings(rank=4096, ranks=(8,), dtype="fp32")
    return extract_lora(golden.model, base_folder, path, settings, adapter=golden.model).path


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def test_adapter_and_lora_at_full_rank_are_golden(base_folder: Path, combined: Path, golden: Golden) -> None:
    pipeline = FaithDiffPipeline.from_files(base_folder, combined, dtype="fp32", device="cpu")
    expected = golden.tensors[f"{CASE}.latent"]
    assert relative(golden_case(pipeline, golden, CASE), expected) < 1e-4


def test_diffusers_uses_every_tensor(
    base_folder: Path, golden: Golden, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its loader says nothing, and its U-Net becomes what the file's tensors add up to, by hand."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import logging as diffusers_logging

    path = tmp_path / "lora.safetensors"
    extract_lora(golden.model, base_folder, path, ExtractionSettings(rank=8, energy=0.9, ranks=(8,), dtype="fp32"))
    sdxl = StableDiffusionXLPipeline.from_pretrained(base_folder, local_files_only=True)
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            sdxl.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="faithdiff")
    finally:
        diffusers_logging.disable_propagation()
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    # That a LoRA changes no text encoder, diffusers says of every one that does not.
    assert not [text for text in said if not text.startswith("No LoRA keys associated to CLIPTextModel")]
    loaded = [name for name, _ in sdxl.unet.named_parameters() if "lora_" in name]
    stored = [key for key in load_file(path) if not key.endswith(".alpha")]
    assert len(loaded) == len(stored)
    sdxl.fuse_lora()
    sdxl.unload_lora_weights()
    expected = add_by_hand(trained_from(), path)
    changed = 0
    for name, value in sdxl.unet.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-6), name
        changed += not torch.equal(value, trained_from()[name])
    assert changed == len(stored) // 2


def test_refusals(base_folder: Path, combined: Path, golden: Golden, tmp_path: Path) -> None:
    def load(folder: Path, file: Path, **kw: Any) -> None:
        FaithDiffPipeline.from_files(folder, file, dtype="fp32", device="cpu", **kw)

    with pytest.raises(SettingsError, match=r"holds a LoRA for the checkpoint's U-Net, which .* would replace"):
        load(base_folder, combined, unet=golden.model)
    state = load_file(combined)
    other = tmp_path / "other.safetensors"
    save_file(state | {"lora_unet_out_2.diff_b": torch.zeros(7)}, other)
    with pytest.raises(WeightsError, match=r"the shape \(7,\), but conv_out.bias of this U-Net has \(4,\)"):
        load(base_folder, other)
    save_file(state | {"lora_unet_elsewhere.diff_b": torch.zeros(7)}, other)
    with pytest.raises(WeightsError, match=r"lora_unet_elsewhere.diff_b has no place in this U-Net"):
        load(base_folder, other)
    shutil.copytree(base_folder, tmp_path / "v")
    config = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(WeightsError, match="v predicts something else than noise"):
        load(tmp_path / "v", combined)
    single = write_checkpoint(trained_from(), tmp_path / "unet_alone.safetensors")
    with pytest.raises(WeightsError):
        load(single, combined, config=base_folder)
