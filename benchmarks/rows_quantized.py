"""The row of the quantized formats: what rounding a U-Net's weights does to its results.

On the golden model it is the error of whole restorations. The published U-Net is too large for that on a CPU: it is
called once, in fp32, layer by layer, with random weights that are made when a layer is reached and let go of after it.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from comfy_host import REPO
from torch import Tensor, nn

from faithdiff_core.backbone import SDXL
from faithdiff_core.dtypes import DTYPES
from faithdiff_core.errors import MissingPackageError
from faithdiff_core.weights.faithdiff_file import read_faithdiff
from faithdiff_core.weights.quantization import INT8, QUANTIZED_DTYPES, dequantize, quantize, quantized_weights
from faithdiff_core.weights.unet_shapes import UNetConfig

from . import models
from .measure import Spread
from .results import Result, missing
from .settings import Settings

PLAIN = ("fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2")
"""Dtypes without scales."""

PEER = "fp8_e4m3fn"
"""What every format is compared with: fp8 without scales, which is the smallest that `convert` wrote before."""

CONVERTED = (*PLAIN, *QUANTIZED_DTYPES)
"""What `convert` writes."""

GGUF = ("GGUF Q8_0", "GGUF Q5_0", "GGUF Q4_0")
"""Formats of the pack ComfyUI-GGUF that its Python package can write, for the same layers as the others."""

GOLDEN_CASE = "one_tile_lr_20"

SIDE = 16
"""Side of the latent at which the published U-Net is called."""

Rounding = Callable[[str, Tensor], Tensor]
"""Gives a weight, by diffusers' name, as a format keeps it."""


def error(found: Tensor, expected: Tensor) -> float:
    """Length of the difference as a part of the expected values' length, in percent."""
    return 100 * float((found.double() - expected.double()).norm() / expected.double().norm())


def roundings(config: UNetConfig) -> dict[str, Rounding]:
    """How each format keeps the weights of a U-Net, as `convert` decides it."""

    def plain(dtype: torch.dtype) -> Rounding:
        return lambda _, value: value.to(dtype if dtype.itemsize > 1 or value.ndim > 1 else torch.float16).float()

    def quantized(name: str) -> Rounding:
        form = QUANTIZED_DTYPES[name]
        chosen = quantized_weights(config, form)

        def rounded(key: str, value: Tensor) -> Tensor:
            return dequantize(quantize(value, form), form) if key in chosen else value.half().float()

        return rounded

    kinds = {name: plain(DTYPES[name]) for name in PLAIN} | {name: quantized(name) for name in QUANTIZED_DTYPES}
    return kinds | {name: _gguf(name.removeprefix("GGUF "), config) for name in GGUF}


def _gguf(kind: str, config: UNetConfig) -> Rounding:
    """A GGUF format, whose blocks are 32 values of a row."""
    chosen = quantized_weights(config, INT8)

    def rounded(key: str, value: Tensor) -> Tensor:
        if key not in chosen:
            return value.half().float()
        try:
            import gguf
        except ImportError as missed:
            raise MissingPackageError("needs the package gguf") from missed
        form = getattr(gguf.GGMLQuantizationType, kind)
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), form), form))

    return rounded


def rows(settings: Settings) -> Iterator[Result]:
    """Errors of restorations with the golden model, and of one call of the published U-Net."""
    settings.say("the golden model")
    _, golden, _ = _golden()
    case = f"golden model, {GOLDEN_CASE}: error of the final latent"
    rounded, absent = _available(read_faithdiff(golden.model).parts["unet"].config)
    yield from _results(case, {name: _golden_error(rounding) for name, rounding in rounded.items()}, absent)
    case = f"published U-Net, random weights, one call at {8 * SIDE} px: error of the output"
    if settings.quick:
        yield missing("quantized", case, "takes minutes; run without --quick")
        return
    settings.say("the published U-Net, a layer at a time")
    published = UNetConfig.of(SDXL)
    rounded, absent = _available(published)
    outputs = StreamedUNet(models.UNET, rounded).outputs()
    yield from _results(case, {name: error(outputs[name], outputs["fp32"]) for name in rounded}, absent)
    for name in CONVERTED:
        size = Spread((_size(published, name),))
        yield Result("quantized", f"published U-Net, {name}: size of the file", "GB", size, kind="counted")


def _available(config: UNetConfig) -> tuple[dict[str, Rounding], dict[str, str]]:
    """The formats that can be had here, and for the others what they need."""
    rounded, absent = roundings(config), {}
    layer = next(iter(quantized_weights(config, INT8)))
    for name, rounding in list(rounded.items()):
        try:
            rounding(layer, torch.ones(32, 32))
        except MissingPackageError as missed:
            absent[name] = str(missed)
            del rounded[name]
    return rounded, absent


def _results(case: str, errors: dict[str, float], absent: dict[str, str]) -> Iterator[Result]:
    """A line for each format, beside fp8 without scales."""
    peer = Spread((errors[PEER],))
    for name in (*CONVERTED, *GGUF):
        if name in absent:
            yield missing("quantized", f"{case}, {name}", absent[name])
            continue
        found = Spread((errors[name],))
        yield Result("quantized", f"{case}, {name}", "%", found, peer, PEER, found.over(peer), "error")


def _size(config: UNetConfig, name: str) -> float:
    """Bytes of a U-Net in a format, in units of 10^9."""
    form = QUANTIZED_DTYPES.get(name)
    chosen = {} if form is None else quantized_weights(config, form)
    total = 0
    for key, shape in config.shapes().items():
        if form is not None and key in chosen:
            total += sum(dtype.itemsize * math.prod(sides) for dtype, sides in form.entries(shape).values())
        else:
            narrow = form is not None or (DTYPES[name].itemsize == 1 and len(shape) < 2)
            total += (torch.float16 if narrow else DTYPES[name]).itemsize * math.prod(shape)
    return total / 1e9


def _golden_error(rounding: Rounding) -> float:
    """The error of a golden case in the engine, in fp32."""
    pipeline, golden, case = _golden()
    weights = read_faithdiff(golden.model).parts["unet"].state
    pipeline.base.unet.load_state_dict({key: rounding(key, value.float()) for key, value in weights.items()})
    with torch.no_grad():
        return error(case(pipeline, golden, GOLDEN_CASE), golden.tensors[f"{GOLDEN_CASE}.latent"])


@cache
def _golden() -> tuple[Any, Any, Callable[..., Tensor]]:
    """The engine with the golden model in fp32, its data, and the function that runs a case."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from tiny_models.diffusers_folder import write_tiny_sdxl

    from faithdiff_core.engine import FaithDiffPipeline

    sys.path.append(str(REPO / "tests"))
    from support.golden import golden_case, read_golden

    golden = read_golden()
    with tempfile.TemporaryDirectory() as folder:
        unet, vae = UNet2DConditionModel(**golden.manifest["unet"]), AutoencoderKL(**golden.manifest["vae"])
        write_tiny_sdxl(Path(folder), unet, vae)
        pipeline = FaithDiffPipeline.from_files(folder, golden.model, dtype="fp32", device="cpu")
    return pipeline, golden, golden_case


class StreamedUNet:
    """A U-Net of any size in little memory, in several formats at once.

    A layer's weights are made when it is called, and let go of after it: normal numbers that keep the variance, from a
    seed that hangs on the layer's name. The batch has a row for each format, and each layer takes each row with the
    weights that this format keeps.
    """

    def __init__(self, config: dict[str, Any], rounded: dict[str, Rounding], side: int = SIDE) -> None:
        """Build it without weights.

        Args:
            config: of diffusers' U-Net.
            rounded: what the formats make of the weights, by name.
            side: of the latent.
        """
        from accelerate import init_empty_weights
        from diffusers import UNet2DConditionModel

        with init_empty_weights():
            self.unet = UNet2DConditionModel(**config).eval()
        self._rounded = {"fp32": lambda _, value: value} | rounded
        for name, module in self.unet.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.forward = self._forward(name, module)  # type: ignore[method-assign]
            else:
                for kind, parameter in list(module.named_parameters(recurse=False)):
                    value = self.weight(f"{name}.{kind}", tuple(parameter.shape))
                    module.register_parameter(kind, nn.Parameter(value, requires_grad=False))
        torch.manual_seed(0)
        self.inputs = models.unet_inputs(1, side, torch.device("cpu"), torch.float32)

    @torch.no_grad()
    def outputs(self) -> dict[str, Tensor]:
        """The output of one call by the format's name; `fp32` is that of the weights as they are."""
        rows = len(self._rounded)
        given = self.inputs
        repeated = given | {
            "sample": given["sample"].repeat(rows, 1, 1, 1),
            "encoder_hidden_states": given["encoder_hidden_states"].repeat(rows, 1, 1),
            "added_cond_kwargs": {key: value.repeat(rows, 1) for key, value in given["added_cond_kwargs"].items()},
        }
        output = self.unet(**repeated, return_dict=False)[0]
        return dict(zip(self._rounded, output.split(1), strict=True))

    def _forward(self, name: str, module: nn.Linear | nn.Conv2d) -> Callable[..., Tensor]:
        """What a layer computes, each row of its input with another format's weights."""
        key, shape = f"{name}.weight", tuple(module.weight.shape)
        bias = None if module.bias is None else self.weight(f"{name}.bias", tuple(module.bias.shape))

        def forward(x: Tensor, *_: Any) -> Tensor:
            weight = self.weight(key, shape)
            out = []
            for (kind, rounding), row in zip(self._rounded.items(), x.split(1), strict=True):
                kept = rounding(key, weight)
                if isinstance(module, nn.Conv2d):
                    out.append(F.conv2d(row, kept, bias, module.stride, module.padding))
                    continue
                if kind == "int8" and ".attentions." in name:
                    # ComfyUI multiplies int8 by int8: what comes in is rounded to a grid for each token, too.
                    row = dequantize(quantize(row.flatten(0, -2), INT8), INT8).view_as(row)
                out.append(F.linear(row, kept, bias))
            return torch.cat(out)

        return forward

    @staticmethod
    def weight(key: str, shape: tuple[int, ...]) -> Tensor:
        """A weight in full precision."""
        if len(shape) < 2:
            return torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
        generator = torch.Generator().manual_seed(crc32(key.encode()))
        return torch.randn(shape, generator=generator).mul_(math.prod(shape[1:]) ** -0.5)
