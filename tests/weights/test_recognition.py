"""`info` and errors on files that are not FaithDiff's: what they are, for which backbone, and what to do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.lora import golden_unet, trained_from, write_checkpoint

from faithdiff_core import WeightsError, read_faithdiff
from faithdiff_core.cli import main
from faithdiff_core.weights.conversion import convert
from faithdiff_core.weights.lora_extraction import ExtractionSettings, extract_lora
from faithdiff_core.weights.merging import merge
from faithdiff_core.weights.recognition import Recognized, recognize

if TYPE_CHECKING:
    from conftest import Golden


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """What FaithDiff was trained from, a U-Net in one file."""
    return write_checkpoint(trained_from(), tmp_path / "base.safetensors")


@pytest.fixture
def lora(tmp_path: Path, golden: Golden, base: Path) -> Path:
    """A LoRA of FaithDiff."""
    return extract_lora(golden.model, base, tmp_path / "lora.safetensors", ExtractionSettings(2, ranks=(2,))).path


def info(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """What the command says, as text and as JSON."""
    assert main(["info", str(path)]) == 0
    text = capsys.readouterr().out
    assert main(["info", "--json", str(path)]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert text.startswith(f"{path.name} is {facts['what']}.\n")
    return text, facts


def test_a_lora_of_faithdiff(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, facts = info(lora, capsys)
    assert (facts["kind"], facts["what"], facts["backbone"]) == ("lora", "a LoRA of FaithDiff for SDXL", "SDXL")
    assert facts["history"] == "It was extracted from faithdiff_tiny.safetensors minus base.safetensors."
    assert "with Load LoRA" in facts["use"]
    assert "`_adapter` file" in facts["use"]
    matrices = sum(value.ndim > 1 for value in golden_unet().values())
    assert facts["parts"]["lora"]["sizes"] == {
        "layers": matrices,
        "smallest_rank": 2,
        "largest_rank": 2,
        "differences": 0,
    }
    assert "predicts" not in text


def test_a_merged_checkpoint(base: Path, golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = merge(base, golden.model, base, tmp_path / "merged.safetensors", strength=0.5)
    text, facts = info(path, capsys)
    assert (facts["kind"], facts["backbone"], facts["prediction"]) == ("unet", "SDXL", "epsilon")
    assert facts["history"] == (
        "`merge` added the difference of faithdiff_tiny.safetensors and base.safetensors, times 0.5, to "
        "base.safetensors."
    )
    assert "the `_adapter` file" in facts["use"]
    assert "backbone: SDXL; predicts noise" in text
    _, plain = info(base, capsys)
    assert plain["history"] == ""
    assert "with a FaithDiff file for SDXL there" in plain["use"]


def test_marks_and_broken_values(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, path = load_file(base), tmp_path / "v.safetensors"
    state |= {"v_pred": torch.tensor([]), "first_stage_model.x": torch.tensor([1.0, torch.nan])}
    save_file(state, path, {"prompt": "[" * 100_000, "workflow": "x" * 5000, "note": "\x1b[2J"})
    assert main(["info", str(path)]) == 1
    text = capsys.readouterr().out
    assert text.startswith("v.safetensors is an SDXL checkpoint.\n  backbone: SDXL; predicts v\n")
    assert "vae: 1 tensors, 0.0 M parameters, fp32\n    NOT USABLE: 1 of 1 tensors hold NaN" in text
    assert f"workflow: {'x' * 200}... (5,000 characters)\n" in text
    assert "\x1b" not in text


def test_the_graph_that_saved_a_model(base: Path) -> None:
    """Also where the U-Net was replaced and the mark of what it predicted stayed, which is said."""
    unet = {key: tuple(value.shape) for key, value in load_file(base).items() if "model.diffusion_model." in key}
    unet["v_pred"] = (0,)
    shapes = unet | {"first_stage_model.quant_conv.weight": (8, 8, 1, 1)}

    def found(**inputs: Any) -> Recognized | None:
        nodes = {"1": {"class_type": "KSampler"}, "2": {"class_type": "FaithDiffModelLoader", "inputs": inputs}, "3": 4}
        return recognize(shapes, {"prompt": json.dumps(nodes)})

    for inputs, history, sampling in (
        (
            {"faithdiff_name": "F.bin", "unet_strength": 1, "model": ["4", 0]},
            "F.bin, `model`, unet_strength 1.",
            True,
        ),
        ({"faithdiff_name": "F.bin", "unet_strength": ["5", 0]}, "F.bin, unet_strength connected.", False),
        (
            {"faithdiff_name": "F.bin", "model": ["4", 0], "base_model": ["6", 0]},
            "F.bin, `model`, `base_model`, unet_strength 1.",
            False,
        ),
    ):
        what = found(**inputs)
        assert what is not None
        assert what.history == f"The graph that saved it had FaithDiff Model Loader with {history}"
        assert ("ModelSamplingDiscrete with `eps`" in what.use) == sampling
    saved_alone = recognize(unet, {})
    assert saved_alone is not None
    assert "ModelSamplingDiscrete with `v_prediction`" in saved_alone.use


@pytest.mark.parametrize(
    ("layer", "width", "backbone"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", 768, "SD 1.5"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight", 1024, "SD 2.1"),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.diff", 2048, "SDXL"),
        ("diffusion_model.middle_block.1.transformer_blocks.1.attn1.to_k.diff", 64, "SDXL"),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k.diff", 64, None),
    ],
)
def test_the_backbone_of_a_lora(layer: str, width: int, backbone: str | None) -> None:
    found = recognize({layer: (4, width)})
    assert found is not None
    assert found.words.startswith(f"a LoRA for {backbone}" if backbone else "a LoRA as ComfyUI's")
    assert (found.backbone.name if found.backbone else None) == backbone


def test_a_lora_in_place_of_another_file(lora: Path, base: Path, golden: Golden, tmp_path: Path) -> None:
    from faithdiff_core.engine import FaithDiffPipeline

    words = r"lora.safetensors is a LoRA of FaithDiff for SDXL"
    out = tmp_path / "out"
    for call in (
        lambda: read_faithdiff(lora),
        lambda: convert(lora, out),
        lambda: merge(lora, golden.model, base, out / "x.safetensors"),
        lambda: merge(base, lora, base, out / "x.safetensors"),
        lambda: extract_lora(golden.model, lora, out / "x.safetensors"),
        lambda: FaithDiffPipeline.from_files(lora, golden.model),
        lambda: FaithDiffPipeline.from_files(base, lora),
    ):
        with pytest.raises(WeightsError, match=words):
            call()
    assert not out.exists() or not list(out.iterdir())


def test_another_file_in_place_of_a_lora(base: Path, golden: Golden) -> None:
    from faithdiff_core.backbone import SDXL
    from faithdiff_core.weights.recognition import check_lora

    with pytest.raises(WeightsError, match=r"base.safetensors is an SDXL U-Net as ComfyUI saves it, not a LoRA"):
        check_lora(base, 64, SDXL)
    with pytest.raises(WeightsError, match="is a VAE, not a LoRA"):
        check_lora(golden.vae, 64, SDXL)
