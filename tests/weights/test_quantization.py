"""Quantized U-Nets in ComfyUI's formats: what `convert` writes, what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from faithdiff_core import read_faithdiff
from faithdiff_core.cli import main
from faithdiff_core.errors import FaithDiffError, WeightsError
from faithdiff_core.weights.conversion import convert
from faithdiff_core.weights.lora_extraction import ExtractionSettings, extract_lora
from faithdiff_core.weights.merging import merge
from faithdiff_core.weights.quantization import FP8_SCALED, INT8, QuantizedFormat, dequantize, quantize
from faithdiff_core.weights.unet_names import CHECKPOINT_PREFIX, checkpoint_names

if TYPE_CHECKING:
    from conftest import Golden

State = dict[str, Tensor]

PREFIX = CHECKPOINT_PREFIX
LAYER = PREFIX + "middle_block.1.transformer_blocks.0.ff.net.2"


def bytes_of(facts: object) -> Tensor:
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def files(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden model in both formats, each in one file."""
    folder = tmp_path_factory.mktemp("quantized")
    return {name: convert(golden.model, folder, name, one_file=True)[0] for name in ("fp8_scaled", "int8")}


@pytest.fixture(scope="module")
def original(golden: Golden) -> State:
    return {key: value.float() for key, value in read_faithdiff(golden.model).parts["unet"].state.items()}


class TestOneLayer:
    def test_fp8_is_the_nearest_value(self) -> None:
        """Against a search among all values that the format has."""
        weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * 0.01
        weight[0, 0] = 0.02499
        entries = quantize(weight, FP8_SCALED)
        scale = float(entries["weight_scale"])
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = values[values.isfinite()] * scale
        nearest = (weight.flatten()[:, None] - values).abs().amin(1)
        error = (dequantize(entries, FP8_SCALED) - weight).abs().flatten()
        assert torch.equal(error, nearest)
        # The scale is a power of two that half precision holds, and no finer one would do.
        assert scale == 2.0 ** round(torch.log2(torch.tensor(scale)).item())
        assert 224 < float(weight.abs().max()) / scale <= 448

    @pytest.mark.parametrize("spread", [1e-4, 1e-2, 3.0])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_fp8_is_the_same_in_every_dtype_that_computes(self, spread: float, dtype: torch.dtype) -> None:
        """ComfyUI multiplies weights and scale in the dtype in which it computes."""
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * spread
        entries = quantize(weight, FP8_SCALED)
        exact = dequantize(entries, FP8_SCALED)
        rounded = (entries["weight"].to(dtype) * entries["weight_scale"].to(dtype)).float()
        # Below the smallest normal number half precision has fewer digits: 2**-25 is half its finest step.
        assert float((rounded - exact).abs().max()) <= (2.0**-25 if dtype == torch.float16 else 0.0)

    def test_int8_rounds_to_a_grid_in_each_row(self) -> None:
        weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 2, 16)[:, None]
        weight[3] = 0
        entries = quantize(weight, INT8)
        assert entries["weight_scale"].shape == (16, 1)
        error = (dequantize(entries, INT8) - weight).abs()
        assert bool((error <= weight.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).all())
        assert int(entries["weight"].abs().amax()) == 127

    @pytest.mark.parametrize("form", [FP8_SCALED, INT8])
    @pytest.mark.parametrize("value", [0.0, 1e-30, 3e38])
    def test_extremes(self, form: QuantizedFormat, value: float) -> None:
        weight = torch.full((4, 8), value)
        result = dequantize(quantize(weight, form), form)
        assert torch.allclose(result, weight, rtol=0.05, atol=2.0**-30)


class TestFiles:
    @pytest.mark.parametrize(("name", "bound"), [("fp8_scaled", 0.028), ("int8", 0.0075)])
    def test_what_is_quantized(
        self, files: dict[str, Path], original: State, golden: Golden, name: str, bound: float
    ) -> None:
        """The transformers' linear layers; all else as in an fp16 file, and everything under ComfyUI's names."""
        stored = load_file(files[name])
        config = read_faithdiff(golden.model).parts["unet"].config
        names = checkpoint_names(config)
        weights = read_faithdiff(files[name])
        assert weights.kind == "full"
        state = weights.parts["unet"].state
        assert set(state) == set(original)
        linear = {key for key in original if ".attentions." in key and original[key].ndim == 2}
        for key, value in original.items():
            own = PREFIX + names[key]
            assert state[key].shape == value.shape
            if key not in linear:
                assert stored[own].dtype == torch.float16
                assert torch.equal(stored[own].float(), value.half().float())
                continue
            assert stored[own].element_size() == 1
            error = float((state[key] - value).norm() / value.norm())
            assert 0 < error < bound, (key, error)
        adapter = {key for key in stored if not key.startswith(PREFIX)}
        published = load_file(golden.model)
        assert adapter == {key for key in published if key not in original}
        assert all(torch.equal(stored[key], published[key].half()) for key in adapter)

    def test_two_files_hold_what_one_does(self, files: dict[str, Path], golden: Golden, tmp_path: Path) -> None:
        unet, adapter = convert(golden.model, tmp_path, "fp8_scaled")
        assert (read_faithdiff(unet).kind, read_faithdiff(adapter).kind) == ("unet", "adapter")
        both, one = load_file(unet) | load_file(adapter), load_file(files["fp8_scaled"])
        assert both.keys() == one.keys()
        assert all(torch.equal(one[key].float(), both[key].float()) for key in one)
        with safe_open(unet, "pt") as file:
            assert file.metadata()["faithdiff.dtype"] == "fp8_scaled"

    def test_a_plain_dtype_in_one_file(self, golden: Golden, tmp_path: Path) -> None:
        (path,) = convert(golden.model, tmp_path, "bf16", one_file=True)
        assert path.name == "faithdiff_tiny_bf16.safetensors"
        stored, published = load_file(path), load_file(golden.model)
        assert stored.keys() == published.keys()
        assert all(torch.equal(stored[key], published[key].bfloat16()) for key in stored)

    def test_a_backbone_with_convolutions_around_its_transformers(
        self, tiny_backbones: dict[Any, Any], tmp_path: Path
    ) -> None:
        for backbone, tiny in tiny_backbones.items():
            (path,) = convert(tiny.faithdiff, tmp_path / backbone.key, "fp8_scaled", one_file=True)
            read = read_faithdiff(path)
            assert (read.backbone, read.kind, read.quantization) == (backbone, "full", "fp8_scaled")

    def test_info_names_the_format(self, files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", str(files["int8"])]) == 0
        text = capsys.readouterr().out
        assert "quantized: 124 layers in int8 (int8, one scale a row)" in text
        assert main(["info", "--json", str(files["fp8_scaled"])]) == 0
        unet = json.loads(capsys.readouterr().out)["parts"]["unet"]
        assert unet["quantized"] == {"fp8_scaled (scaled fp8, one scale a layer)": 124}
        assert unet["dtypes"] == ["fp16", "fp8_e4m3fn"]

    def test_the_command(self, golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["convert", str(golden.model), "-o", str(tmp_path), "--dtype", "fp8_scaled", "--one-file", "--quiet"]
        assert main(words) == 0
        assert "faithdiff_tiny_fp8_scaled.safetensors" in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir()] == ["faithdiff_tiny_fp8_scaled.safetensors"]


class TestOtherMarks:
    """The same weights in the ways that other programs write them."""

    def rewritten(self, path: Path, target: Path, edit: Callable[[State, list[str]], dict[str, str]]) -> Path:
        state = load_file(path)
        layers = [key.removesuffix(".comfy_quant") for key in state if key.endswith(".comfy_quant")]
        for layer in layers:
            del state[f"{layer}.comfy_quant"]
        metadata = edit(state, layers)
        save_file(state, target, metadata)
        return target

    def check(self, path: Path, files: dict[str, Path]) -> None:
        one, other = (read_faithdiff(each).parts["unet"] for each in (files["fp8_scaled"], path))
        assert one.quantized is not None
        assert other.quantized is not None
        assert one.quantized.layers.keys() == other.quantized.layers.keys()
        assert all(torch.equal(one.state[key], other.state[key]) for key in one.state)

    def test_a_scaled_fp8_entry(self, files: dict[str, Path], tmp_path: Path) -> None:
        def older(state: State, layers: list[str]) -> dict[str, str]:
            state[PREFIX + "scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
            for layer in layers:
                state[f"{layer}.scale_weight"] = state.pop(f"{layer}.weight_scale")
                state[f"{layer}.scale_input"] = torch.ones(())
            return {}

        path = self.rewritten(files["fp8_scaled"], tmp_path / "older.safetensors", older)
        self.check(path, files)
        layer = next(iter(read_faithdiff(path).parts["unet"].state.layers.values()))  # type: ignore[attr-defined]
        facts = json.loads(bytes(layer.mark.tolist()))
        assert facts == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        assert set(layer.entries) == {"weight", "weight_scale"}  # an input scale of 1 stands for none

    @pytest.mark.parametrize("prefix", ["", PREFIX])
    def test_a_table_in_the_metadata(self, files: dict[str, Path], tmp_path: Path, prefix: str) -> None:
        def table(state: State, layers: list[str]) -> dict[str, str]:
            for layer in layers:  # single scales of other shapes and dtypes
                state[f"{layer}.weight_scale"] = state[f"{layer}.weight_scale"].reshape(1).bfloat16()
                state[f"{layer}.input_scale"] = torch.tensor(0.5)
            named = {prefix + layer.removeprefix(PREFIX): {"format": "float8_e4m3fn"} for layer in layers}
            return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": named})}

        self.check(self.rewritten(files["fp8_scaled"], tmp_path / "table.safetensors", table), files)

    def test_diffusers_names(self, files: dict[str, Path], golden: Golden, tmp_path: Path) -> None:
        names = checkpoint_names(read_faithdiff(golden.model).parts["unet"].config)
        layers = {PREFIX + own.rpartition(".")[0]: name.rpartition(".")[0] for name, own in names.items()}
        state = load_file(files["fp8_scaled"])
        renamed = {".".join((layers.get(k.rpartition(".")[0], k.rpartition(".")[0]), k.rpartition(".")[2])): v
                   for k, v in state.items()}  # fmt: skip
        path = tmp_path / "diffusers.safetensors"
        save_file(renamed, path)
        self.check(path, files)


Edit = Callable[[State], object]


def put(end: str, value: Tensor) -> Edit:
    """Writes an entry of one layer."""
    return lambda state: state.update({f"{LAYER}.{end}": value})


def drop(*ends: str) -> Edit:
    """Removes entries of one layer."""
    return lambda state: [state.pop(f"{LAYER}.{end}") for end in ends]


def mark(facts: object) -> Edit:
    """Marks one layer."""
    return put("comfy_quant", bytes_of(facts))


def quantize_alignment(state: State) -> None:
    key = "spatial_ch_projs"
    state[f"{key}.weight"] = state[f"{key}.weight"].to(torch.float8_e4m3fn)
    state |= {f"{key}.weight_scale": torch.ones(()), f"{key}.comfy_quant": FP8_SCALED.mark()}


ROTATED = {"format": "int8_tensorwise", "convrot": True}
BROKEN: dict[str, tuple[Edit, str]] = {
    "no scale": (drop("weight_scale"), r"ff\.net\.2 is marked as float8_e4m3fn .* its weight_scale is missing"),
    "scale of a wrong shape": (put("weight_scale", torch.ones(7)), r"has the shape \(7,\) instead of \(\)"),
    "scale in bytes": (put("weight_scale", torch.ones((), dtype=torch.uint8)), "stored as uint8 instead of fp32"),
    "scale of zero": (put("weight_scale", torch.zeros(())), "is zero, negative or NaN"),
    "NaN as scale": (put("weight_scale", torch.tensor(float("nan"))), "is zero, negative or NaN"),
    "no mark": (drop("comfy_quant"), r"1 scale\(s\), such as .*ff\.net\.2\.weight_scale, belong to no layer"),
    "fp8 without scale": (drop("comfy_quant", "weight_scale"), r"1 matrices, such as .*net\.2\.weight, .* no scale"),
    "no weight": (drop("weight"), "but its weight is missing"),
    "weight in fp16": (put("weight", torch.ones(8, 8).half()), r"stored as fp16 \(8, 8\) instead of a matrix of fp8"),
    "unknown format": (mark({"format": "int3"}), "quantized as 'int3', which is not supported"),
    "rotated": (mark(ROTATED), "'int8_tensorwise' with rotation, which is not supported"),
    "no JSON": (put("comfy_quant", torch.zeros(9, dtype=torch.uint8)), "does not name a format"),
    "a list as mark": (mark([1]), "does not name a format"),
    "a number as format": (mark({"format": {}}), "does not name a format"),
    "a long mark": (put("comfy_quant", torch.zeros(9999)), "does not name a format"),
    "quantized alignment": (quantize_alignment, r"spatial_ch_projs\.weight of the alignment is quantized"),
    "smoothing": (put("pre_quant_scale", torch.ones(8)), r"1 tensor\(s\) .* such as .*\.pre_quant_scale"),
}


@pytest.mark.parametrize(("edit", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files(files: dict[str, Path], tmp_path: Path, edit: Edit, message: str) -> None:
    state = load_file(files["fp8_scaled"])
    edit(state)
    path = tmp_path / "broken.safetensors"
    save_file(state, path)
    with pytest.raises(WeightsError, match=message) as caught:
        read_faithdiff(path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("table", ["[", "[]", '{"layers": 3}', '{"layers": [["a"]]}'])
def test_a_broken_table(files: dict[str, Path], tmp_path: Path, table: str) -> None:
    path = tmp_path / "broken.safetensors"
    save_file(load_file(files["fp8_scaled"]), path, {"_quantization_metadata": table})
    with pytest.raises(WeightsError, match="is no table of layers"):
        read_faithdiff(path)


def test_nan_among_quantized_weights(files: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(files["fp8_scaled"])
    state[f"{LAYER}.weight"].view(torch.uint8)[0, 0] = 0x7F
    path = tmp_path / "nan.safetensors"
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"1 of 408 tensors of the U-Net hold NaN .*ff.net.2.weight"):
        read_faithdiff(path).check_finite()
    assert main(["info", str(path)]) == 1


def test_values_that_no_format_holds(golden: Golden, tmp_path: Path) -> None:
    state = load_file(golden.model)
    state["mid_block.attentions.0.proj_in.weight"][0, 0] = float("inf")
    path = tmp_path / "inf.safetensors"
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"proj_in\.weight holds NaN or infinite values"):
        convert(path, tmp_path / "out", "fp8_scaled")
    assert list((tmp_path / "out").iterdir()) == []


def test_where_weights_are_needed_as_they_are(files: dict[str, Path], golden: Golden, tmp_path: Path) -> None:
    """Merging, extracting and converting again would take the weights without their scales."""
    path = files["fp8_scaled"]
    plain = shutil.copy(golden.model, tmp_path / "base.safetensors")
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: convert(path, tmp_path / "out"), "is quantized already"),
        (lambda: merge(plain, path, golden.model, tmp_path / "merged.safetensors"), "is quantized"),
        (
            lambda: extract_lora(path, plain, tmp_path / "lora.safetensors", ExtractionSettings(rank=2, ranks=(2,))),
            "is quantized",
        ),
    ]
    for call, message in calls:
        with pytest.raises(FaithDiffError, match=message) as caught:
            call()
        assert path.name in str(caught.value)
    assert not (tmp_path / "merged.safetensors").exists()
