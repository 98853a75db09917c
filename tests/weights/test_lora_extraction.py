"""Extracting a LoRA: against the weights, exact decompositions, and extractions that were not interrupted."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.full_disk import full_disk
from support.lora import State, add_by_hand, golden_unet, trained_from, write_checkpoint

from faithdiff_core import SettingsError, WeightsError, read_faithdiff
from faithdiff_core.cli import main
from faithdiff_core.weights.lora_extraction import ExtractionSettings, extract_lora
from faithdiff_core.weights.low_rank import decompose

FULL = ExtractionSettings(rank=4096, dtype="fp32", differences="comfyui")
SMALL = ExtractionSettings(rank=4, ranks=(4,))


@pytest.fixture(scope="module")
def base() -> State:
    return trained_from()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, golden: Any, base: State) -> tuple[Path, Path]:
    """FaithDiff, and what it was trained from as a single-file checkpoint."""
    folder = tmp_path_factory.mktemp("extraction")
    return golden.model, write_checkpoint(base, folder / "base.safetensors")


class TestDecompose:
    @pytest.mark.parametrize("shape", [(300, 220), (220, 300)])
    def test_randomised_against_exact(self, shape: tuple[int, int]) -> None:
        """Singular values that decay, with noise: within half a per cent of the best error of that rank."""
        generator = torch.Generator().manual_seed(0)
        left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        matrix = left * 10 * 0.9 ** torch.arange(220) @ right + 0.01 * torch.randn(shape, generator=generator)
        found = decompose(matrix, 24, seed=1)
        exact = torch.linalg.svdvals(matrix)
        assert torch.allclose(found.values, exact[:24], rtol=2e-3)
        for rank in (4, 24):
            up, down = found.factors(rank)
            best = float(exact[rank:].square().sum() ** 0.5)
            assert best <= float((matrix - up @ down).norm()) * (1 + 1e-5) < best * 1.005
        assert found.energy == pytest.approx(float(matrix.double().square().sum()))
        again = decompose(matrix, 24, seed=1)
        assert torch.equal(found.left, again.left)

    def test_few_values(self) -> None:
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(90, 3, generator=generator) @ torch.randn(3, 80, generator=generator)
        found = decompose(matrix, 16)
        assert float((matrix - torch.mm(*found.factors(16))).norm()) < 1e-5 * float(matrix.norm())
        assert len(decompose(torch.zeros(40, 30), 8).values) == 0
        kept = found.values.double().square().cumsum(0) / found.energy
        for rank in (1, 2):
            assert found.rank_for(float(kept[rank - 1]) - 1e-6) == rank
            assert found.rank_for(float(kept[rank - 1]) + 1e-6) == rank + 1


def test_full_rank_is_faithdiff(files: tuple[Path, Path], base: State, tmp_path: Path) -> None:
    report = extract_lora(*files, tmp_path / "lora.safetensors", FULL)
    expected, got = golden_unet(), add_by_hand(base, report.path)
    for name, value in expected.items():
        assert float((got[name] - value).abs().max()) < 2e-6 * float(value.abs().max()), name
    assert report.error < 2e-6
    assert not list(tmp_path.glob(".*"))


def test_errors_by_rank(
    files: tuple[Path, Path], base: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table, the CSV and the files against exact decompositions."""
    out = tmp_path / "lora.safetensors"
    words = ["extract-lora", *map(str, (files[0], "--base", files[1], "-o", out))]
    words += [
        "--rank",
        "8",
        "--ranks",
        "2,8,16",
        "--report",
        str(tmp_path / "layers.csv"),
        "--plot",
        str(tmp_path / "e.png"),
    ]
    assert main(words) == 0
    table = capsys.readouterr().out.splitlines()
    faithdiff = golden_unet()
    matrices = {name: (faithdiff[name] - base[name]).flatten(1) for name in base if base[name].ndim > 1}
    spectra = {name: torch.linalg.svdvals(value.double()).square() for name, value in matrices.items()}
    energy = sum(float(values.sum()) for values in spectra.values())
    best = [(sum(float(x[rank:].sum()) for x in spectra.values()) / energy) ** 0.5 for rank in (2, 8, 16)]
    shown = [float(word) for word in next(line for line in table if line.startswith("all ")).split()[3:]]
    assert shown == [pytest.approx(value, abs=6e-5) for value in [*best, best[1]]]
    assert shown[0] > shown[1] > shown[2] > 0
    with (tmp_path / "layers.csv").open() as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {name.removesuffix(".weight") for name in matrices}
    for name, values in spectra.items():
        row = rows[name.removesuffix(".weight")]
        for rank in (2, 8):
            assert float(row[f"error_rank_{rank}"]) == pytest.approx(
                float((values[rank:].sum() / values.sum()) ** 0.5), rel=0.01
            )
        assert int(row["rank"]) == min(8, len(values))
    got = add_by_hand(base, out)
    wrong = sum(float((faithdiff[name] - got[name]).square().sum()) for name in matrices)
    assert (wrong / energy) ** 0.5 == pytest.approx(shown[3], abs=6e-5)
    assert all(torch.equal(got[name], base[name]) for name in base if name not in matrices)
    sizes = [float(word) for word in next(line for line in table if line.startswith("file ")).split()[1::2]]
    assert sizes[1] == sizes[3] == pytest.approx(out.stat().st_size / 1e6, abs=0.051)
    assert sizes[0] < sizes[1] < sizes[2]
    assert (tmp_path / "e.png").read_bytes()[:4] == b"\x89PNG"


def test_energy(files: tuple[Path, Path], base: State, tmp_path: Path) -> None:
    """Each layer has the smallest rank that keeps the share."""
    report = extract_lora(*files, tmp_path / "lora.safetensors", ExtractionSettings(rank=32, energy=0.95, dtype="fp32"))
    ranks = set()
    for layer in report.layers:
        if len(layer.shape) > 1:
            change = (golden_unet()[f"{layer.name}.weight"] - base[f"{layer.name}.weight"]).flatten(1)
            values = torch.linalg.svdvals(change.double()).square()
            wanted = int((values.cumsum(0) < 0.95 * values.sum()).sum()) + 1
            assert layer.rank == min(32, wanted), layer.name
            ranks.add(layer.rank)
    assert len(ranks) > 1
    with safe_open(report.path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["faithdiff.lora"]) == {
        "base": "base.safetensors",
        "rank": 32,
        "energy": 0.95,
        "differences": False,
    }
    assert (metadata["faithdiff.part"], metadata["faithdiff.source"]) == ("lora", "faithdiff_tiny.safetensors")


class StoppedError(Exception):
    pass


class Stop:
    """Progress that ends the work after some calls."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, done: int, total: int) -> None:
        self.calls -= 1
        if not self.calls:
            raise StoppedError


def test_going_on(files: tuple[Path, Path], tmp_path: Path) -> None:
    settings = SMALL
    whole = extract_lora(*files, tmp_path / "whole.safetensors", settings).path.read_bytes()
    out = tmp_path / "lora.safetensors"
    for calls in (7, 30):
        with pytest.raises(StoppedError):
            extract_lora(*files, out, settings, progress=Stop(calls))
        assert not out.exists()
    (folder,) = tmp_path.glob(".lora*")
    assert len(list(folder.glob("*.safetensors"))) == 30
    with pytest.raises(SettingsError, match="finished layers of an extraction with other files or settings"):
        extract_lora(*files, out, ExtractionSettings(rank=5, ranks=(4,)))
    seen: list[tuple[int, int]] = []
    touched = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    marked = folder / "conv_out.safetensors"
    assert marked not in touched

    def look(done: int, total: int) -> None:
        seen.append((done, total))
        assert all(path.stat().st_mtime_ns == time for path, time in touched.items())

    extract_lora(*files, out, settings, progress=look)
    assert out.read_bytes() == whole
    assert seen[-1] == (sum(value.numel() for value in golden_unet().values()),) * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors", "whole.safetensors"]
    out.unlink()
    with pytest.raises(StoppedError):
        extract_lora(*files, out, settings, progress=Stop(3))
    extract_lora(*files, out, ExtractionSettings(rank=2, ranks=(2,)), force=True)
    assert len(out.read_bytes()) < len(whole)


def test_adapter_and_lora_in_one_file(
    files: tuple[Path, Path], golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny_faithdiff_lora.safetensors"
    extract_lora(*files, path, SMALL, adapter=golden.model)
    weights, source = read_faithdiff(path), read_faithdiff(golden.model)
    assert weights.kind == "lora"
    assert weights.lora is not None
    assert (weights.lora.config.smallest_rank, weights.lora.config.largest_rank) == (4, 4)
    norms_and_biases = sum(value.ndim == 1 for value in golden_unet().values())
    assert weights.lora.config.differences == norms_and_biases
    for name in ("lq_encoder", "alignment"):
        one, other = weights.parts[name], source.parts[name]
        assert one.config == other.config
        assert all(torch.equal(one.state[key], other.state[key].half()) for key in other.state)
    assert main(["info", str(path)]) == 0
    assert "is a FaithDiff adapter with a LoRA" in capsys.readouterr().out
    state = load_file(path)
    key = "lora_unet_out_2.lora_up.weight"
    for change, message in (
        ({key: None}, "layer lora_unet_out_2 has alpha, diff_b, lora_down.weight; expected"),
        ({key: torch.zeros(4, 3, 1, 1)}, r"lora_up.weight \(4, 3, 1, 1\) and .* do not go together"),
        ({"lora_unet_out_2.hada_w1_a": torch.zeros(1)}, "another kind of LoRA"),
        ({key: torch.zeros(4, 4, 1, 1, dtype=torch.int32)}, "stored as int32"),
        ({"conv_in.weight": torch.zeros(32, 4, 3, 3)}, "the U-Net is incomplete"),
    ):
        changed = {k: v for k, v in (state | change).items() if v is not None}
        save_file(changed, tmp_path / "bad.safetensors")
        with pytest.raises(WeightsError, match=message):
            read_faithdiff(tmp_path / "bad.safetensors")


class TestRefusals:
    def test_files_that_do_not_belong_together(
        self, files: tuple[Path, Path], base: State, tmp_path: Path, golden: Any
    ) -> None:
        faithdiff, checkpoint = files
        lora, cut, other, small, same = (
            tmp_path / f"{name}.safetensors" for name in ("lora", "cut", "other", "small", "same")
        )
        save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, lora)
        cut.write_bytes(checkpoint.read_bytes()[:-1000])
        generator = torch.Generator().manual_seed(1)
        write_checkpoint({k: torch.randn(v.shape, generator=generator) for k, v in base.items()}, other)
        write_checkpoint(base | {"conv_out.bias": torch.zeros(7)}, small)
        write_checkpoint(golden_unet(), same)
        out = tmp_path / "out" / "lora.safetensors"
        adapter = tmp_path / "adapter.safetensors"
        save_file({k: v for k, v in load_file(golden.model).items() if "blocks" not in k and "denoise" in k}, adapter)
        for arguments, message in (
            ((faithdiff, lora), "lora.safetensors is a LoRA. Give an SDXL checkpoint"),
            ((faithdiff, cut), "cut.safetensors is truncated"),
            (
                (faithdiff, other),
                "other.safetensors is not what faithdiff_tiny.safetensors was trained from.*RealVisXL",
            ),
            ((faithdiff, small), r"conv_out.bias has the shape \(4,\) in faithdiff_tiny.safetensors, but \(7,\)"),
            ((faithdiff, same), "have the same weights: there is nothing to extract"),
            ((faithdiff, tmp_path / "none.bin"), "There is no file"),
            ((lora, checkpoint), "lora.safetensors is a LoRA"),
        ):
            with pytest.raises(WeightsError, match=message):
                extract_lora(*arguments, out, ExtractionSettings(rank=1, ranks=(1,)))
            assert not out.parent.exists() or not list(out.parent.iterdir())
        with pytest.raises(WeightsError, match=r"base.safetensors is an SDXL U-Net"):
            extract_lora(*files, out, adapter=checkpoint)
        assert not out.parent.exists() or not list(out.parent.iterdir())

    def test_settings(self, files: tuple[Path, Path], tmp_path: Path) -> None:
        for values, message in (
            ({"rank": 0}, "rank must lie between 1 and 4096, got 0"),
            ({"ranks": (8, 5000)}, "rank must lie between 1 and 4096, got 5000"),
            ({"energy": 0.0}, "energy must be over 0 and at most 1"),
            ({"energy": float("nan")}, "energy must be over 0"),
            ({"dtype": "fp8_e4m3fn"}, "dtype must be one of fp32, fp16, bf16"),
            ({"differences": "some"}, "differences must be one of none, comfyui"),
        ):
            with pytest.raises(SettingsError, match=message):
                ExtractionSettings(**values)
        with pytest.raises(SettingsError, match=r"must be named .safetensors"):
            extract_lora(*files, tmp_path / "lora")
        out = tmp_path / "lora.safetensors"
        out.touch()
        with pytest.raises(SettingsError, match="exists already"):
            extract_lora(*files, out)
        copy = tmp_path / "copy.safetensors"
        shutil.copy(files[1], copy)
        with pytest.raises(SettingsError, match="is one of the files to be read"):
            extract_lora(files[0], copy, copy, force=True)

    def test_a_full_disk(self, files: tuple[Path, Path], tmp_path: Path) -> None:
        """What was finished is used afterwards."""
        out = tmp_path / "lora.safetensors"
        settings = ExtractionSettings(rank=16, ranks=(16,))
        with full_disk(400_000), pytest.raises(SettingsError, match=r"cannot be written to: .*too large"):
            extract_lora(*files, out, settings)
        assert [path.name for path in tmp_path.iterdir()] == [".lora.safetensors.layers"]
        extract_lora(*files, out, settings)
        assert [path.name for path in tmp_path.iterdir()] == [out.name]
