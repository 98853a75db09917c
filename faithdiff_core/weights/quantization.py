"""The quantized formats of ComfyUI's files: how the weights of a linear layer are stored in 8 bits or fewer.

ComfyUI describes them in its QUANTIZATION.md and reads them in comfy/ops.py (`_load_quantized_module`). Beside the
weights, a layer has their scales and an entry `comfy_quant` that names the format, as JSON in bytes.

Scaled fp8 and int8 need torch alone. NVFP4, whose scales lie in the order of the cards' registers, is computed by
ComfyUI's own package for it, comfy-kitchen, which its requirements list.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dtypes import dtype_name
from ..errors import MissingPackageError, WeightsError
from ..finite import is_finite
from ..models.shapes import Shape
from .unet_shapes import UNetConfig

MARK = "comfy_quant"
"""A quantized layer's entry with its format."""

FP8_MAX = 448.0
"""Largest value of float8_e4m3fn."""

FP4_MAX = 6.0
"""Largest value of 4 bits (E2M1)."""

INT8_MAX = 127.0

Entries = dict[str, Tensor]
"""Stored tensors of a layer by the ends of their names: `weight`, `weight_scale`, ..."""


@dataclass(frozen=True)
class QuantizedFormat:
    """A format of a linear layer's weights.

    Attributes:
        key: its name in files, ComfyUI's.
        dtype: of the stored weights.
        about: what it is, for people.
        values: how many weights a stored value of `dtype` holds.
        multiple: what both sides of a layer must be multiples of.
        scales: dtype and shape of each of its scales for a layer of N rows and K columns.
        weights_only: whether ComfyUI is told to compute with the dequantized weights. Otherwise it quantizes what comes
            into a layer, too, on cards that multiply in this format. For fp8 it does so with a fixed scale of 1, unless
            the file brings one that was calibrated on a model's own activations, and cuts off what is above 448.
    """

    key: str
    dtype: torch.dtype
    about: str
    scales: Callable[[int, int], dict[str, tuple[torch.dtype, Shape]]]
    values: int = 1
    multiple: int = 1
    weights_only: bool = False

    def fits(self, shape: Shape) -> bool:
        """Whether a layer of this shape can be stored in the format."""
        return len(shape) == 2 and all(side % self.multiple == 0 for side in shape)

    def entries(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        """Dtype and shape of what is stored for a layer of this shape, without the mark."""
        rows, columns = shape
        return {"weight": (self.dtype, (rows, columns // self.values)), **self.scales(rows, columns)}

    def mark(self) -> Tensor:
        """The entry that names the format, as bytes."""
        facts: dict[str, Any] = {"format": self.key}
        if self.weights_only:
            facts["full_precision_matrix_mult"] = True
        return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _one_scale(_rows: int, _columns: int) -> dict[str, tuple[torch.dtype, Shape]]:
    return {"weight_scale": (torch.float32, ())}


def _row_scales(rows: int, _columns: int) -> dict[str, tuple[torch.dtype, Shape]]:
    return {"weight_scale": (torch.float32, (rows, 1))}


def _nv_scales(rows: int, columns: int) -> dict[str, tuple[torch.dtype, Shape]]:
    return {
        # in tiles of 128 x 4, the order in which tensor cores read them
        "weight_scale": (torch.float8_e4m3fn, (_padded(rows, 128), _padded(columns // 16, 4))),
        "weight_scale_2": (torch.float32, ()),
    }


FP8_SCALED = QuantizedFormat(
    "float8_e4m3fn", torch.float8_e4m3fn, "scaled fp8, one scale a layer", _one_scale, weights_only=True
)
FP8_E5M2_SCALED = QuantizedFormat(
    "float8_e5m2", torch.float8_e5m2, "scaled fp8 with 2 bits of mantissa, one scale a layer", _one_scale
)
INT8 = QuantizedFormat("int8_tensorwise", torch.int8, "int8, one scale a row", _row_scales)
NVFP4 = QuantizedFormat(
    "nvfp4", torch.uint8, "4 bits, one scale for 16 values", _nv_scales, values=2, multiple=16, weights_only=True
)

QUANTIZED_DTYPES = {"fp8_scaled": FP8_SCALED, "int8": INT8, "nvfp4": NVFP4}
"""Formats that `convert` writes, by the names that ComfyUI's users know."""

FORMATS = {form.key: form for form in (*QUANTIZED_DTYPES.values(), FP8_E5M2_SCALED)}
"""Formats that can be read."""


def format_name(form: QuantizedFormat) -> str:
    """What people call a format."""
    return next((name for name, known in QUANTIZED_DTYPES.items() if known is form), form.key)


def quantized_weights(config: UNetConfig, form: QuantizedFormat) -> dict[str, Shape]:
    """The weights of a U-Net that are quantized, by diffusers' names: those of its transformers' linear layers.

    ComfyUI has no quantized convolutions, and the few linear layers that embed time, size and text stay as they are:
    every other layer depends on them.
    """
    shapes = config.shapes().items()
    chosen = {name: shape for name, shape in shapes if ".attentions." in name and form.fits(shape)}
    if form.values > 1:
        # ComfyUI reads the width of the text embeddings off this layer's stored shape.
        level = next(level for level, depth in enumerate(config.transformer_depths) if depth)
        del chosen[f"down_blocks.{level}.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    return chosen


def quantize(value: Tensor, form: QuantizedFormat) -> Entries:
    """Quantize a linear layer's weights, rounding to nearest.

    Args:
        value: (N, K), any float dtype, finite.
        form: the format.

    Returns:
        What is stored, without the mark.

    Raises:
        MissingPackageError: the format needs comfy-kitchen, which is not installed.
    """
    weight = value.float()
    if form.dtype == torch.int8:
        # A row of zeros has any scale.
        scale = (weight.abs().amax(1, keepdim=True) / INT8_MAX).clamp_min(1e-30)
        return {"weight": (weight / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), "weight_scale": scale}
    if form is NVFP4:
        scale = (weight.abs().amax() / (FP8_MAX * FP4_MAX)).clamp_min(1e-30)
        packed, scales = _kitchen(form).quantize_nvfp4(weight, scale)
        return {"weight": packed, "weight_scale": scales, "weight_scale_2": scale}
    limit = torch.finfo(form.dtype).max
    scale = _power_of_two(weight.abs().amax() / limit)
    return {"weight": (weight / scale).to(form.dtype), "weight_scale": scale}


def _power_of_two(value: Tensor) -> Tensor:
    """The smallest power of two that is not below a value, and that half precision can hold.

    Such a scale changes no digit: the weights come out the same in fp16, bf16 and fp32, in which ComfyUI multiplies
    them. Most others are rounded in fp16, by up to several percent where a layer's weights are small.
    """
    mantissa, exponent = torch.frexp(value)
    exponent = exponent - (mantissa == 0.5).int()
    return torch.ldexp(torch.ones_like(value), exponent).clamp_min(2.0**-24)


def dequantize(entries: Mapping[str, Tensor], form: QuantizedFormat) -> Tensor:
    """A linear layer's weights in float32.

    Raises:
        MissingPackageError: the format needs comfy-kitchen, which is not installed.
    """
    weight, scale = entries["weight"], entries["weight_scale"]
    if form is NVFP4:
        value: Tensor = _kitchen(form).dequantize_nvfp4(weight, entries["weight_scale_2"], scale, torch.float32)
        return value
    return weight.float() * scale.float()


def check_layer(file: str, layer: str, entries: Mapping[str, Tensor], form: QuantizedFormat) -> Shape:
    """Check what a file stores for a quantized layer, and find the shape of its weights.

    Args:
        file: name of the file, for errors.
        layer: name of the layer.
        entries: the stored tensors, without the mark.
        form: the format that the mark names.

    Raises:
        WeightsError: something is missing, or of another dtype or shape than the format has.
    """
    said = f"{file}: {layer} is marked as {form.key} ({form.about}), but"
    weight = entries.get("weight")
    if weight is None:
        raise WeightsError(f"{said} its weight is missing. The file is corrupted; convert the model again.")
    if weight.dtype != form.dtype or weight.ndim != 2:
        raise WeightsError(
            f"{said} its weight is stored as {dtype_name(weight.dtype)} {tuple(weight.shape)} instead of a matrix of "
            f"{dtype_name(form.dtype)}. Convert the model again."
        )
    shape = (weight.shape[0], weight.shape[1] * form.values)
    for name, (dtype, expected) in form.scales(*shape).items():
        scale = entries.get(name)
        if scale is None:
            raise WeightsError(
                f"{said} its {name} is missing: without it the weights mean nothing. Convert the model again."
            )
        # One scale for all is allowed where there may be one a row, and may be written with any number of dimensions.
        single = scale.numel() == 1 and dtype == torch.float32
        if not single and tuple(scale.shape) != expected:
            raise WeightsError(
                f"{said} its {name} has the shape {tuple(scale.shape)} instead of {expected}. Convert the model again."
            )
        # Other programs may write the bytes of 8-bit floats, or single scales in half precision.
        if scale.dtype.itemsize != dtype.itemsize and not (dtype == torch.float32 and scale.is_floating_point()):
            raise WeightsError(
                f"{said} its {name} is stored as {dtype_name(scale.dtype)} instead of {dtype_name(dtype)}. Convert the "
                f"model again."
            )
        if dtype == torch.float32 and not bool((scale > 0).all()):
            raise WeightsError(f"{said} its {name} is zero, negative or NaN. Convert the model again.")
    return shape


def is_layer_finite(entries: Mapping[str, Tensor], form: QuantizedFormat) -> bool:
    """Whether a quantized layer's weights are free of NaN and infinite values."""
    stored = (value for name, value in entries.items() if name.startswith("weight"))
    return all(is_finite(value) for value in stored if value.dtype not in (torch.int8, torch.uint8))


def _kitchen(form: QuantizedFormat) -> Any:
    try:
        import comfy_kitchen
    except ImportError as error:
        raise MissingPackageError(
            f"The format {format_name(form)} needs ComfyUI's package comfy-kitchen, which is not installed here. Run "
            f"this in ComfyUI's Python, or `pip install comfy-kitchen`. fp8_scaled and int8 need no package."
        ) from error
    return comfy_kitchen
