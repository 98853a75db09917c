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
    rounded = roundings(read_faithdiff(golden.model).parts["unet"].config)
    case = f"golden model, {GOLDEN_CASE}: error of the final latent"
    yield from _results(case, lambda name: _golden_error(rounded[name]))
    case = f"published U-Net, random weights, one call at {8 * SIDE} px: error of the output"
    if settings.quick:
        yield missing("quantized", case, "takes minutes; run without --quick")
    else:
        published = UNetConfig.of(SDXL)
        call = StreamedUNet(models.UNET, settings.say)
        yield from _results(case, lambda name: call.error(name, roundings(published)[name]))
        for name in CONVERTED:
            size = Spread((_size(published, name),))
            yield Result("quantized", f"published U-Net, {name}: size of the file", "GB", size, kind="counted")


def _results(case: str, measure: Callable[[str], float]) -> Iterator[Result]:
    """A line for each format, beside fp8 without scales."""
    peer = Spread((measure(PEER),))
    for name in (*CONVERTED, *GGUF):
        try:
            found = peer if name == PEER else Spread((measure(name),))
        except MissingPackageError as missed:
            yield missing("quantized", f"{case}, {name}", str(missed))
        else:
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
    """A U-Net of any size in little memory: a layer's weights are made when it is called, and let go of after it.

    They are normal numbers that keep the variance, from a seed that hangs on the layer's name: the same in every call.
    """

    def __init__(self, config: dict[str, Any], say: Callable[[str], None]) -> None:
        from accelerate import init_empty_weights
        from diffusers import UNet2DConditionModel

        with init_empty_weights():
            self.unet = UNet2DConditionModel(**config).eval()
        self._say = say
        self._rounding: Rounding = lambda _, value: value
        self._name = ""
        for name, module in self.unet.named_modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_pre_hook(self._before(name))
                module.register_forward_hook(self._after)
        torch.manual_seed(0)
        self.inputs = models.unet_inputs(1, SIDE, torch.device("cpu"), torch.float32)
        self._expected: Tensor | None = None

    def error(self, name: str, rounding: Rounding) -> float:
        """The output's error where a format keeps the weights."""
        if self._expected is None:
            self._expected = self.call("fp32", lambda _, value: value)
        return error(self.call(name, rounding), self._expected)

    @torch.no_grad()
    def call(self, name: str, rounding: Rounding) -> Tensor:
        """The output with weights in a format."""
        self._say(f"the published U-Net in {name}")
        self._name, self._rounding = name, rounding
        output: Tensor = self.unet(**self.inputs, return_dict=False)[0]
        return output

    def _before(self, layer: str) -> Callable[[nn.Module, Any], Any]:
        def make(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            for kind, parameter in list(module.named_parameters(recurse=False)):
                key = f"{layer}.{kind}"
                value = self._rounding(key, self.weight(key, tuple(parameter.shape)))
                module.register_parameter(kind, nn.Parameter(value, requires_grad=False))
            if self._name == "int8" and INT8.fits(tuple(module.weight.shape)) and ".attentions." in layer:
                # ComfyUI multiplies int8 by int8: what comes in is rounded to a grid for each row, too.
                rows = args[0].flatten(0, -2)
                return (dequantize(quantize(rows, INT8), INT8).view_as(args[0]), *args[1:])
            return None

        return make

    @staticmethod
    def _after(module: nn.Module, args: Any, output: Any) -> None:
        for kind, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(kind, nn.Parameter(parameter.to("meta"), requires_grad=False))

    @staticmethod
    def weight(key: str, shape: tuple[int, ...]) -> Tensor:
        """A weight in full precision."""
        if len(shape) < 2:
            return torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
        generator = torch.Generator().manual_seed(crc32(key.encode()))
        return torch.randn(shape, generator=generator).mul_(math.prod(shape[1:]) ** -0.5)
