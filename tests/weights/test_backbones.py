"""Files for SD 2.1 and SD 1.5: recognised by their layers and marks, converted, and never mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models.backbones import CONTEXT, TinyModel
from tiny_models.checkpoints import single_file_unet_key

from faithdiff_core import SettingsError, WeightsError, convert, read_faithdiff
from faithdiff_core.backbone import BACKBONES, NOISE, SD15, SD21, SDXL, Backbone, V
from faithdiff_core.cli import main
from faithdiff_core.weights.merging import UNetSource, merge
from faithdiff_core.weights.unet_names import CHECKPOINT_PREFIX, checkpoint_names, diffusers_names
from faithdiff_core.weights.unet_shapes import UNetConfig

FULL_SIZE: dict[Backbone, dict[str, Any]] = {
    SD21: {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    SD15: {"attention_head_dim": 8, "cross_attention_dim": 768},
}


@pytest.mark.parametrize("backbone", FULL_SIZE, ids=lambda b: b.key)
def test_layers_are_those_of_diffusers(backbone: Backbone) -> None:
    """The published sizes, and both spellings of the names."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=backbone.block_out_channels,
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            **FULL_SIZE[backbone],
        )
    shapes = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    config = UNetConfig.from_shapes(shapes)
    assert config == UNetConfig.of(backbone)
    assert config.backbone is backbone
    assert config.shapes() == shapes
    names = checkpoint_names(config)
    assert names == {name: single_file_unet_key(name, 2, {1, 2, 3}) for name in shapes}
    assert diffusers_names({CHECKPOINT_PREFIX + key for key in names.values()}) == {
        name: CHECKPOINT_PREFIX + key for name, key in names.items()
    }


def test_files_are_recognised(tiny_backbones: dict[Backbone, TinyModel], capsys: pytest.CaptureFixture[str]) -> None:
    for backbone, words in ((SD21, "SD 2.1; predicts v"), (SD15, "SD 1.5; predicts noise")):
        weights = read_faithdiff(tiny_backbones[backbone].faithdiff)
        assert (weights.kind, weights.backbone, weights.prediction) == (
            "full",
            backbone,
            tiny_backbones[backbone].prediction,
        )
        assert main(["info", str(tiny_backbones[backbone].faithdiff)]) == 0
        assert f"backbone: {words}\n" in capsys.readouterr().out
        assert main(["info", "--json", str(tiny_backbones[backbone].faithdiff)]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["backbone"], facts["prediction"]) == (backbone.name, tiny_backbones[backbone].prediction)


def test_converted_files_keep_their_backbone(tiny_backbones: dict[Backbone, TinyModel], tmp_path: Path) -> None:
    for backbone, model in tiny_backbones.items():
        source = load_file(model.faithdiff)
        paths = convert(model.faithdiff, tmp_path / backbone.key, "fp32")
        parts = [load_file(path) for path in paths]
        assert parts[0].keys() | parts[1].keys() == source.keys()
        assert all(torch.equal(value, source[key]) for part in parts for key, value in part.items())
        for path, kind in zip(paths, ("unet", "adapter"), strict=True):
            read = read_faithdiff(path)
            assert (read.kind, read.backbone, read.prediction) == (kind, backbone, model.prediction)


def test_what_a_pickle_predicts_has_to_be_said(tiny_backbones: dict[Backbone, TinyModel], tmp_path: Path) -> None:
    """A pickle has no metadata, and models of SD 2.1 predict noise or v."""
    path = tmp_path / "FaithDiff.bin"
    torch.save(load_file(tiny_backbones[SD21].faithdiff), path)
    with pytest.raises(WeightsError, match=r"FaithDiff.bin is made for SD 2.1, .* noise or v, .*--prediction"):
        convert(path)
    assert main(["convert", str(path), "--prediction", "epsilon", "--quiet"]) == 0
    assert read_faithdiff(tmp_path / "FaithDiff_adapter.safetensors").prediction == NOISE
    with pytest.raises(SettingsError, match="says that its U-Net predicts v_prediction, and prediction is epsilon"):
        convert(tiny_backbones[SD21].faithdiff, tmp_path, prediction=NOISE)
    with pytest.raises(SettingsError, match="prediction must be one of epsilon, v_prediction, got x"):
        convert(path, prediction="x")
    torch.save(load_file(tiny_backbones[SD15].faithdiff), path)
    assert read_faithdiff(path).prediction == NOISE  # SD 1.5 has one kind


def test_marks_that_are_wrong(tiny_backbones: dict[Backbone, TinyModel], tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    for metadata, message in (
        ({"faithdiff.backbone": "sd15"}, "says that it is made for SD 1.5, but its U-Net is one of SD 2.1"),
        ({"faithdiff.backbone": "sd9"}, "is made for the backbone 'sd9', but known are sdxl, sd21, sd15"),
        (
            {"faithdiff.prediction": "x0"},
            "says that its U-Net predicts 'x0', but supported are epsilon and v_prediction",
        ),
    ):
        save_file(load_file(tiny_backbones[SD21].faithdiff), path, metadata)
        with pytest.raises(WeightsError, match=message):
            read_faithdiff(path)


def test_a_layer_too_few_is_no_other_backbone(golden: Any, tmp_path: Path) -> None:
    """An SDXL file without its added conditions is a broken one, not one of SD 2.1."""
    path = tmp_path / "file.safetensors"
    save_file({key: v for key, v in load_file(golden.model).items() if not key.startswith("add_embedding.")}, path)
    with pytest.raises(WeightsError, match=r"U-Net is incomplete; it lacks a tensor such as add_embedding.linear_1"):
        read_faithdiff(path)
    assert read_faithdiff(golden.model).backbone is SDXL


def single_file(model: TinyModel, path: Path, noise: float = 0.0) -> Path:
    """FaithDiff's U-Net, moved a little, as a single file."""
    part = read_faithdiff(model.faithdiff).unet
    assert part is not None
    torch.manual_seed(1)
    names = checkpoint_names(part.config)
    moved = {
        key: value + noise * value.std(correction=0) * torch.randn_like(value) for key, value in part.state.items()
    }
    save_file({CHECKPOINT_PREFIX + names[key]: value for key, value in moved.items()}, path)
    return path


def test_merging(tiny_backbones: dict[Backbone, TinyModel], tmp_path: Path) -> None:
    base = single_file(tiny_backbones[SD15], tmp_path / "base.safetensors", 0.1)
    assert UNetSource(base).backbone is SD15
    merged = load_file(merge(base, tiny_backbones[SD15].faithdiff, base, tmp_path / "merged.safetensors"))
    faithdiff = load_file(single_file(tiny_backbones[SD15], tmp_path / "faithdiff.safetensors"))
    assert all(torch.allclose(value, merged[key], atol=1e-6) for key, value in faithdiff.items())
    with pytest.raises(WeightsError, match=r"base.safetensors is a model of SD 1.5, and faithdiff.* one of SD 2.1"):
        merge(base, tiny_backbones[SD21].faithdiff, base, tmp_path / "other.safetensors")
    # A single file of SD 2.1 does not say what it predicts; a folder does.
    base = single_file(tiny_backbones[SD21], tmp_path / "base21.safetensors", 0.1)
    with pytest.raises(WeightsError, match=r"base21.safetensors does not say what .* Give a folder"):
        merge(base, tiny_backbones[SD21].faithdiff, base, tmp_path / "other.safetensors")
    save_file(load_file(base), base, {"faithdiff.prediction": NOISE})
    with pytest.raises(WeightsError, match=r"base21.safetensors predicts something else than v \(noise or EDM\)"):
        merge(base, tiny_backbones[SD21].faithdiff, base, tmp_path / "other.safetensors")
    save_file(load_file(base), base, {"faithdiff.prediction": V})
    merge(base, tiny_backbones[SD21].faithdiff, base, tmp_path / "other.safetensors")


def test_every_backbone_has_its_own_key() -> None:
    assert len({backbone.key for backbone in BACKBONES}) == len({backbone.name for backbone in BACKBONES}) == 3
    assert len(set(CONTEXT.values())) == 2


def test_sdxl_files_carry_no_marks(golden: Any, tmp_path: Path) -> None:
    for path in convert(golden.model, tmp_path):
        with safe_open(path, "pt") as file:
            assert not {"faithdiff.backbone", "faithdiff.prediction"} & file.metadata().keys()
