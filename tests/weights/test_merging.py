"""Merging FaithDiff into a checkpoint as a difference, in both formats and spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.full_disk import full_disk
from support.lora import factor_of
from tiny_models.checkpoints import single_file_unet_key
from torch import Tensor

from faithdiff_core import SettingsError, WeightsError, read_faithdiff
from faithdiff_core.cli import main
from faithdiff_core.weights.merging import merge
from faithdiff_core.weights.unet_names import CHECKPOINT_PREFIX, checkpoint_names, diffusers_names
from faithdiff_core.weights.unet_shapes import UNetConfig

if TYPE_CHECKING:
    from conftest import Golden

State = dict[str, Tensor]
SDXL = UNetConfig((320, 640, 1280), 2, (0, 2, 10), 10, 2048, 2816)


@pytest.mark.parametrize("config", [SDXL, UNetConfig((32, 64, 64), 1, (0, 1, 2), 2, 64, 1600)], ids=["SDXL", "golden"])
def test_the_two_spellings(config: UNetConfig) -> None:
    """Against the tests' own converter, whose files diffusers loads; and back again."""
    levels = len(config.block_out_channels)
    attended = {level for level in range(levels) if config.transformer_depths[levels - 1 - level]}
    names = checkpoint_names(config)
    assert names == {name: single_file_unet_key(name, config.layers_per_block, attended) for name in config.shapes()}
    for prefix in ("", CHECKPOINT_PREFIX, "diffusion_model."):
        found = diffusers_names({prefix + key for key in names.values()} | {"first_stage_model.x"})
        assert found == {name: prefix + key for name, key in names.items()}


@pytest.fixture(scope="module")
def unets(golden: Golden) -> tuple[State, State, State, UNetConfig]:
    """FaithDiff's U-Net, what it was trained from, and another one of the same sizes."""
    part = read_faithdiff(golden.model).unet
    assert part is not None
    generator = torch.Generator().manual_seed(0)
    faithdiff = {key: value.float() for key, value in part.state.items()}
    base = {
        key: value + 0.1 * value.std(correction=0) * torch.randn(value.shape, generator=generator)
        for key, value in faithdiff.items()
    }
    mine = {
        key: torch.randn(value.shape, generator=generator) * value.std(correction=0) for key, value in faithdiff.items()
    }
    return faithdiff, base, mine, part.config


@pytest.fixture
def files(tmp_path: Path, unets: tuple[State, State, State, UNetConfig]) -> tuple[Path, Path, Path]:
    """FaithDiff as a pickle with more in it, the base as a single file, the user's checkpoint as a single file."""
    faithdiff, base, mine, config = unets
    names = checkpoint_names(config)
    paths = tmp_path / "FaithDiff.bin", tmp_path / "base.safetensors", tmp_path / "mine.safetensors"
    torch.save({"state_dict": {**faithdiff, "denoise_encoder.x": torch.zeros(3)}}, paths[0])
    save_file({CHECKPOINT_PREFIX + names[key]: value for key, value in base.items()}, paths[1])
    checkpoint = {CHECKPOINT_PREFIX + names[key]: value.half() for key, value in mine.items()}
    checkpoint |= {"first_stage_model.x": torch.arange(3.0), "conditioner.position_ids": torch.arange(5)}
    save_file(checkpoint, paths[2], {"mine": "yes"})
    return paths


@pytest.mark.parametrize(("strength", "dtype"), [(1.0, None), (0.25, "fp32"), (0.0, None)])
def test_single_files(
    files: tuple[Path, Path, Path],
    unets: tuple[State, State, State, UNetConfig],
    tmp_path: Path,
    strength: float,
    dtype: str | None,
) -> None:
    faithdiff, base, mine, config = unets
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out" / "merged.safetensors"
    merge(files[2], files[0], files[1], out, strength=strength, dtype=dtype, progress=lambda *at: seen.append(at))
    merged, names = load_file(out), checkpoint_names(config)
    before = load_file(files[2])
    assert merged.keys() == before.keys()
    for key, name in names.items():
        expected = mine[key].half().double() + strength * (faithdiff[key].double() - base[key].double())
        got = merged[CHECKPOINT_PREFIX + name]
        assert got.dtype == (torch.float32 if dtype else torch.float16)
        assert torch.allclose(got.double(), expected, rtol=1e-3 if dtype is None else 1e-6, atol=1e-6), key
    for key in ("first_stage_model.x", "conditioner.position_ids"):
        assert merged[key].dtype == before[key].dtype
        assert torch.equal(merged[key], before[key])
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["mine"] == "yes"
    assert json.loads(metadata["faithdiff.merge"]) == {
        "checkpoint": "mine.safetensors",
        "faithdiff": "FaithDiff.bin",
        "base": "base.safetensors",
        "strength": strength,
    }
    assert seen[-1][0] == seen[-1][1]


def test_blocks_apart(
    files: tuple[Path, Path, Path], unets: tuple[State, State, State, UNetConfig], tmp_path: Path
) -> None:
    faithdiff, base, mine, config = unets
    out = tmp_path / "merged.safetensors"
    words = [
        "merge",
        str(files[2]),
        str(files[0]),
        "--base",
        str(files[1]),
        "-o",
        str(out),
        "--dtype",
        "fp32",
        "--quiet",
    ]
    words += ["--strength", "1.5", "--input-blocks", "0.5", "--output-blocks", "0"]
    assert main(words) == 0
    merged, blocks = load_file(out), {"input_blocks": 0.5, "output_blocks": 0.0}
    for key, name in checkpoint_names(config).items():
        change = 1.5 * factor_of(name, blocks) * (faithdiff[key] - base[key])
        assert torch.allclose(merged[CHECKPOINT_PREFIX + name], mine[key].half() + change, rtol=1e-5, atol=1e-6), key
    with safe_open(out, "pt") as file:
        made = json.loads(file.metadata()["faithdiff.merge"])
    assert [made[name] for name in ("strength", "input", "middle", "output")] == [1.5, 0.5, 1.0, 0.0]
    for value in ("-0.1", "1.1", "nan"):
        assert main([*words, "--force", "--middle-block", value]) == 2


def test_the_base_itself_becomes_faithdiff(
    files: tuple[Path, Path, Path], unets: tuple[State, State, State, UNetConfig], tmp_path: Path
) -> None:
    faithdiff, _, _, config = unets
    merged = load_file(merge(files[1], files[0], files[1], tmp_path / "merged.safetensors"))
    for key, name in checkpoint_names(config).items():
        assert torch.allclose(merged[CHECKPOINT_PREFIX + name], faithdiff[key], rtol=1e-6, atol=1e-7), key


def test_folders(files: tuple[Path, Path, Path], unets: tuple[State, State, State, UNetConfig], tmp_path: Path) -> None:
    """A folder of diffusers, its U-Net in two pieces, becomes one with the U-Net in one file; all else is copied."""
    faithdiff, base, mine, _ = unets
    folder = tmp_path / "model"
    for name in ("unet", "vae"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    (folder / "model_index.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    half = len(mine) // 2
    for number, part in enumerate((list(mine.items())[:half], list(mine.items())[half:])):
        save_file(dict(part), folder / "unet" / f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    words = ["merge", str(folder), str(files[0]), "--base", str(files[1]), "-o", str(tmp_path / "merged"), "--quiet"]
    assert main(words) == 0
    assert sorted(str(path.relative_to(tmp_path / "merged")) for path in (tmp_path / "merged").rglob("*.*")) == [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    merged = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    for key in mine:
        assert torch.allclose(merged[key], mine[key] + faithdiff[key] - base[key], rtol=1e-5, atol=1e-6), key
    assert main(words) == 2  # it is there already
    assert main([*words, "--force"]) == 0
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    with pytest.raises(WeightsError, match="model predicts something else than noise"):
        merge(folder, files[0], files[1], tmp_path / "other")
    assert not (tmp_path / "other").exists()


class TestRefusals:
    def test_files_that_do_not_belong_together(self, files: tuple[Path, Path, Path], tmp_path: Path) -> None:
        faithdiff, base, mine = files
        out = tmp_path / "out" / "merged.safetensors"
        lora, small, vae = (tmp_path / f"{name}.safetensors" for name in ("lora", "small", "vae"))
        save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, lora)
        save_file({"encoder.x": torch.zeros(2), "decoder.x": torch.zeros(2)}, vae)
        state = load_file(base)
        state[f"{CHECKPOINT_PREFIX}out.2.bias"] = torch.zeros(7)
        save_file(state, small)
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(base.read_bytes()[:-1000])
        for arguments, message in (
            ((mine, faithdiff, lora), "lora.safetensors is a LoRA. Give an SDXL checkpoint"),
            ((mine, faithdiff, vae), "vae.safetensors is a VAE"),
            ((mine, faithdiff, small), r"conv_out.bias has the shape \(4,\) in FaithDiff.bin, but \(7,\) in small"),
            ((mine, faithdiff, cut), "cut.safetensors is truncated"),
            ((mine, faithdiff, mine), r"mine.safetensors is not what FaithDiff.bin was trained from.*RealVisXL"),
            ((lora, faithdiff, base), "lora.safetensors is a LoRA"),
            ((mine, base.with_name("none.bin"), base), "There is no file"),
        ):
            with pytest.raises(WeightsError, match=message):
                merge(*arguments, out)
            assert not out.parent.exists() or not list(out.parent.iterdir())

    def test_values_and_marks(self, files: tuple[Path, Path, Path], tmp_path: Path) -> None:
        faithdiff, base, mine = files
        out = tmp_path / "out" / "merged.safetensors"
        state = load_file(mine)
        save_file(state | {"v_pred": torch.tensor([])}, mine)
        with pytest.raises(WeightsError, match=r"predicts something else than noise \(v-prediction or EDM\)"):
            merge(mine, faithdiff, base, out)
        state[f"{CHECKPOINT_PREFIX}out.2.bias"] = torch.tensor([1, 2, torch.nan, 4])
        save_file(state, mine)
        with pytest.raises(WeightsError, match=r"out.2.bias holds NaN or infinite values"):
            merge(mine, faithdiff, base, out)
        assert not list(out.parent.iterdir())

    def test_settings(self, files: tuple[Path, Path, Path], tmp_path: Path) -> None:
        faithdiff, base, mine = files
        out = tmp_path / "merged.safetensors"
        for strength in (-0.1, 2.1, float("nan")):
            with pytest.raises(SettingsError, match="strength must lie between 0 and 2"):
                merge(mine, faithdiff, base, out, strength=strength)
        with pytest.raises(SettingsError, match="is the checkpoint itself"):
            merge(mine, faithdiff, base, mine, force=True)
        with pytest.raises(SettingsError, match=r"must be named .safetensors"):
            merge(mine, faithdiff, base, tmp_path / "merged")
        out.touch()
        with pytest.raises(SettingsError, match="exists already"):
            merge(mine, faithdiff, base, out)

    def test_a_full_disk(self, files: tuple[Path, Path, Path], tmp_path: Path) -> None:
        """Nothing is left behind, of a file or of a folder; what is there already stays."""
        faithdiff, base, mine = files
        folder, out = tmp_path / "model" / "unet", tmp_path / "out"
        folder.mkdir(parents=True)
        save_file(dict(load_file(base)), folder / "diffusion_pytorch_model.safetensors")
        out.mkdir()
        for source, name in ((mine, "merged.safetensors"), (folder.parent, "merged")):
            with full_disk(400_000), pytest.raises(SettingsError, match=r"cannot be written.*too large"):
                merge(source, faithdiff, base, out / name)
            assert not list(out.iterdir())
        kept = out / "merged.safetensors"
        kept.write_bytes(b"before")
        with full_disk(400_000), pytest.raises(SettingsError):
            merge(mine, faithdiff, base, kept, force=True)
        assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [(kept.name, b"before")]
