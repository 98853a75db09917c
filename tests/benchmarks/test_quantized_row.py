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
def test_a_streamed_unet_is_a_unet() -> None:
    streamed = StreamedUNet(TINY, lambda line: None)
    unet = UNet2DConditionModel(**TINY)
    unet.load_state_dict({key: streamed.weight(key, tuple(value.shape)) for key, value in unet.state_dict().items()})
    expected = unet(**streamed.inputs, return_dict=False)[0]
    for _ in range(2):
        assert torch.equal(streamed.call("fp32", lambda _, value: value), expected)
    assert all(parameter.is_meta for parameter in streamed.unet.parameters())


def test_errors_are_those_of_the_formats() -> None:
    streamed = StreamedUNet(TINY, lambda line: None)
    shapes = {key: tuple(value.shape) for key, value in streamed.unet.state_dict().items()}
    rounded = roundings(UNetConfig.from_shapes(shapes))
    found = {name: streamed.error(name, rounded[name]) for name in ("fp16", "int8", "fp8_scaled", "fp8_e5m2")}
    assert list(found) == sorted(found, key=lambda name: found[name])
    assert found["fp16"] < 0.1
    assert 0.5 < found["fp8_scaled"] < 10
    assert streamed.error("fp32", lambda _, value: value) == pytest.approx(0, abs=1e-9)
    assert error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(100 / 34**0.5)
