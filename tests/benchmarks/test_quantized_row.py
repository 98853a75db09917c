"""The row of the quantized formats: the U-Net whose weights come and go is the U-Net, and formats are told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import models
from benchmarks.rows_quantized import StreamedUNet, error, roundings
from faithdiff_core.weights.unet_shapes import UNetConfig

TINY: dict[str, Any] = models.UNET | {
    "block_out_channels": [32, 64, 64],
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 2],
}


@torch.no_grad()
def test_a_streamed_unet_is_a_unet_in_each_format() -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in UNet2DConditionModel(**TINY).state_dict().items()}
    rounded = roundings(UNetConfig.from_shapes(shapes))
    names = ("fp16", "fp8_scaled", "fp8_e5m2")
    streamed = StreamedUNet(TINY, {name: rounded[name] for name in names}, side=8)
    outputs = streamed.outputs()
    errors = {name: error(outputs[name], outputs["fp32"]) for name in names}
    assert list(errors) == sorted(errors, key=lambda name: errors[name])
    assert 0.5 < errors["fp8_scaled"] < 10
    unet = UNet2DConditionModel(**TINY)
    for name, rounding in {"fp32": lambda _, value: value, "fp8_scaled": rounded["fp8_scaled"]}.items():
        unet.load_state_dict({key: rounding(key, streamed.weight(key, shape)) for key, shape in shapes.items()})
        assert error(outputs[name], unet(**streamed.inputs, return_dict=False)[0]) < 1e-3


def test_int8_rounds_what_comes_in_too() -> None:
    shapes = {key: tuple(value.shape) for key, value in UNet2DConditionModel(**TINY).state_dict().items()}
    rounding = roundings(UNetConfig.from_shapes(shapes))["int8"]
    outputs = StreamedUNet(TINY, {"weights": rounding, "int8": rounding}, side=8).outputs()
    weights, both = (error(outputs[name], outputs["fp32"]) for name in ("weights", "int8"))
    assert weights < both < 4 * weights


def test_error_is_a_part_of_the_length() -> None:
    assert error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(100 / 34**0.5)
