"""Quantized U-Nets in ComfyUI: they stay quantized, give what their weights give, and take LoRAs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import GOLDEN, Host
from safetensors.torch import load_file, save_file
from support.host_sampling import GOLDEN_FILE, images, load, random_restoration, relative
from support.lora import State
from tiny_models.reduced_sdxl import write_narrow_faithdiff
from torch import Tensor

from faithdiff_core import read_faithdiff
from faithdiff_core.weights.conversion import convert
from faithdiff_core.weights.quantization import QUANTIZED_DTYPES, dequantize, quantize
from faithdiff_core.weights.unet_names import checkpoint_names

STEPS = 2

ERRORS = {"fp8_scaled": (0.01, 0.06), "int8": (0.001, 0.02), "nvfp4": (0.05, 0.2)}
"""Between which the largest error of a latent lies that comes from rounding the weights, relative to the largest value.

Measured were 0.04 for fp8_scaled and 0.13 for nvfp4.
"""


@dataclass
class Quantized:
    """The golden model in a format, and in the host.

    Attributes:
        stored: its U-Net's tensors as ComfyUI's loader takes them.
        weights: the same, dequantized.
    """

    stored: State
    weights: State


@pytest.fixture(scope="module", params=QUANTIZED_DTYPES)
def format_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def quantized(host: Host, format_name: str, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    folder = tmp_path_factory.mktemp("quantized")
    (path,) = convert(GOLDEN / GOLDEN_FILE, folder, format_name, one_file=True)
    unet = host.pack_module("faithdiff_core").read_faithdiff(path).unet
    names = checkpoint_names(read_faithdiff(path).parts["unet"].config)
    stored = host.pack_module("nodes.bridge.model_loading").unet_tensors(unet)
    return Quantized(stored, {names[key]: value.float() for key, value in unet.state.items()})


def quantized_layers(model: Any) -> list[str]:
    """Names of the layers whose weights are quantized in memory."""
    kind = type_of_quantized()
    modules = model.model.diffusion_model.named_modules()
    return [name for name, module in modules if isinstance(getattr(module, "weight", None), kind)]


def type_of_quantized() -> type:
    from comfy.quant_ops import QuantizedTensor

    kind: type = QuantizedTensor
    return kind


def restored(host: Host, model: Any, lora: float = 0.0, unet_strength: float = 0.0) -> Tensor:
    """The latent that a MODEL restores with the golden adapter."""
    setup = load(host, model=model, unet_strength=unet_strength)
    if lora:
        setup.model = host.call("TestLoRA", model=setup.model, seed=3, strength=lora)[0]
    return setup.restore(setup.features(images(64, 64)), steps=STEPS)


@torch.inference_mode()
def test_as_its_weights(host: Host, quantized: Quantized, format_name: str) -> None:
    """In memory as in the file, and the same latent as from the dequantized weights; near that of the original."""
    models = host.testpack.models
    model = models.quantized_model(quantized.stored)
    layers = [key.removesuffix(".comfy_quant") for key in quantized.stored if key.endswith(".comfy_quant")]
    assert sorted(quantized_layers(model)) == sorted(layers)
    found = restored(host, model)
    assert sorted(quantized_layers(model)) == sorted(layers)
    by_weights = restored(host, models.tiny_model(quantized.weights))
    # int8 is multiplied by activations that ComfyUI rounds to int8, too.
    assert relative(found, by_weights) < (0.02 if format_name == "int8" else 1e-5)
    low, high = ERRORS[format_name]
    assert low < relative(found, restored(host, models.tiny_model(models.golden_unet()))) < high


@torch.inference_mode()
def test_a_lora_acts_on_it(host: Host, quantized: Quantized, format_name: str) -> None:
    models = host.testpack.models
    model = models.quantized_model(quantized.stored)
    expected = restored(host, models.tiny_model(quantized.weights), lora=0.5)
    plain = restored(host, models.tiny_model(quantized.weights))
    found = restored(host, model, lora=0.5)
    # ComfyUI quantizes the sum of weights and LoRA, which rounds once more, at random: for 4 bits it is a lot.
    part = 0.8 if format_name == "nvfp4" else 0.5
    assert relative(found, expected) < min(2 * ERRORS[format_name][1], part * relative(plain, expected))
    assert relative(restored(host, model), restored(host, models.quantized_model(quantized.stored))) < 1e-6


@torch.inference_mode()
def test_a_quantized_model_of_the_users(host: Host, quantized: Quantized, format_name: str) -> None:
    """FaithDiff's U-Net in full precision moves one; ComfyUI rounds the result to the format."""
    models = host.testpack.models
    expected = restored(host, models.tiny_model(quantized.weights), unet_strength=0.5)
    found = restored(host, models.quantized_model(quantized.stored), unet_strength=0.5)
    assert relative(found, expected) < 2 * ERRORS[format_name][1]


def test_a_quantized_base(host: Host, quantized: Quantized) -> None:
    """ComfyUI cannot subtract one, in its own merges either."""
    models = host.testpack.models
    own, base = models.tiny_model(models.other_unet(1)), models.quantized_model(quantized.stored)
    with pytest.raises(ValueError, match="`base_model` is quantized, and ComfyUI cannot subtract quantized weights"):
        load(host, model=own, base_model=base)


def test_quantized_as_comfyui_does(host: Host) -> None:
    """Beside ComfyUI's own layouts: no worse, and the same numbers out of the same stored values."""
    from comfy_kitchen.tensor import QuantizedTensor

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    layouts: dict[str, tuple[str, dict[str, Any]]] = {
        "fp8_scaled": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
        "int8": ("TensorWiseINT8Layout", {"per_channel": True}),
        "nvfp4": ("TensorCoreNVFP4Layout", {}),
    }
    assert layouts.keys() == QUANTIZED_DTYPES.keys()
    for name, (layout, settings) in layouts.items():
        form = QUANTIZED_DTYPES[name]
        theirs = QuantizedTensor.from_float(weight, layout, **settings)
        entries = {f"weight{end}": value for end, value in theirs.layout_cls.state_dict_tensors(
            theirs._qdata, theirs._params).items()}  # fmt: skip
        kinds = {key: (value.dtype, tuple(value.shape)) for key, value in entries.items()}
        assert kinds == form.entries((64, 128)), name
        value = theirs.dequantize()
        torch.testing.assert_close(dequantize(entries, form), value, rtol=1e-6, atol=1e-9)
        errors = [float((other - weight).norm()) for other in (dequantize(quantize(weight, form), form), value)]
        assert errors[0] < 1.02 * errors[1], name


@pytest.fixture(scope="module")
def narrow(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in scaled fp8 whose U-Net ComfyUI's loader knows, in FaithDiff's folder and in ComfyUI's."""
    folder = tmp_path_factory.mktemp("narrow")
    source = folder / "narrow.bin"
    write_narrow_faithdiff(source)
    models = host.base / "models"
    (path,) = convert(source, models / "faithdiff", "fp8_scaled", one_file=True)
    (models / "diffusion_models").mkdir(exist_ok=True)
    (models / "diffusion_models" / path.name).hardlink_to(path)
    generator = torch.Generator().manual_seed(3)
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_v"
    shapes = {f"{layer}.lora_down.weight": (4, 320), f"{layer}.lora_up.weight": (320, 4)}
    lora = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    save_file(lora, models / "loras" / "narrow_lora.safetensors")
    return path


@torch.inference_mode()
def test_the_loaders(host: Host, narrow: Path) -> None:
    """FaithDiff Model Loader and ComfyUI's own give the same MODEL from the same file, quantized in memory."""
    stored = load_file(narrow)
    layers = sorted(
        key.removesuffix(".comfy_quant").removeprefix("model.diffusion_model.")
        for key in stored
        if key.endswith(".comfy_quant")
    )
    ours, faithdiff = host.call("FaithDiffModelLoader", faithdiff_name=narrow.name, weight_dtype="default")
    (theirs,) = host.call("UNETLoader", unet_name=narrow.name, weight_dtype="default")
    for model in (ours, theirs):
        assert sorted(quantized_layers(model)) == layers
        assert model.model_size() < 1.1 * sum(
            value.nbytes for key, value in stored.items() if key.startswith("model.diffusion_model.")
        ) * (1 if model.model.get_dtype() == torch.float16 else 2)
    attached, _ = host.call(
        "FaithDiffModelLoader", faithdiff_name=narrow.name, weight_dtype="default", model=theirs, unet_strength=0.0
    )
    (patched,) = host.call("LoraLoaderModelOnly", model=ours, lora_name="narrow_lora.safetensors", strength_model=1.0)
    plain, same, with_lora = (random_restoration(host, model, faithdiff) for model in (ours, attached, patched))
    assert relative(same, plain) < 1e-5
    assert relative(with_lora, plain) > 1e-4


def test_what_is_refused(host: Host, narrow: Path) -> None:
    own = host.testpack.models.tiny_model(host.testpack.models.golden_unet())
    (golden,) = convert(GOLDEN / GOLDEN_FILE, narrow.parent, "fp8_scaled", one_file=True)
    for name, settings, message in (
        (
            narrow.name,
            {"weight_dtype": "fp16"},
            r"\(fp8_scaled\), whose weights cannot be kept in fp16. Set weight",
        ),
        (golden.name, {"model": own}, r"\(fp8_scaled\), which cannot be mixed into `model`. Disconnect"),
        (golden.name, {"model": own, "base_model": own}, r"which cannot be mixed into `model`"),
        (golden.name, {}, "ComfyUI does not know a U-Net of these sizes"),
    ):
        arguments: dict[str, Any] = {"weight_dtype": "default", "model": None} | settings
        with pytest.raises(ValueError, match=message):
            host.call("FaithDiffModelLoader", faithdiff_name=name, **arguments)
    load(host, name=golden.name, model=own, unet_strength=0.0)  # the adapter alone
    broken = load_file(golden)
    del broken[next(key for key in broken if key.endswith(".weight_scale"))]
    save_file(broken, golden.with_name("broken.safetensors"))
    with pytest.raises(ValueError, match="its weight_scale is missing"):
        load(host, name="broken.safetensors", model=own, unet_strength=0.0)
