"""Every number that the published code was recorded with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.golden import Golden
from torch import Tensor

from faithdiff_core import Alignment, TileGrid, adain, gaussian_weights, leading_timesteps, sampling_sigmas, wavelet
from faithdiff_core.backbone import tile_time_ids
from faithdiff_core.engine import FaithDiffPipeline, TextConditioning

CASES = ("one_tile_noise", "one_tile_lr_20", "tiles_lr", "tiles_encoder_tiled", "side_below_tile")


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference as a part of the largest absolute value."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, golden: Golden) -> dict[str, Any]:
    found = next(c for c in golden.manifest["cases"] if c["name"] == request.param)
    prefix = request.param + "."
    tensors = {key.removeprefix(prefix): v for key, v in golden.tensors.items() if key.startswith(prefix)}
    # The recorded "overlap" is the published stride fraction; the fraction that tiles share is 1 minus that.
    return found | {"real_overlap": 1 - found["overlap"], "tensors": tensors}


def test_all_cases_are_listed(golden: Golden) -> None:
    assert [case["name"] for case in golden.manifest["cases"]] == list(CASES)


def test_lq_features(case: dict[str, Any], pipeline: FaithDiffPipeline) -> None:
    tile, overlap = case.get("encoder_tile"), case.get("encoder_overlap", 0.25)
    features = pipeline.encode_lq(case["tensors"]["image"], tile, overlap)
    assert difference(features, case["tensors"]["lq_features"]) < 1e-5


def test_condition_and_residual(case: dict[str, Any], pipeline: FaithDiffPipeline, golden: Golden) -> None:
    tensors = case["tensors"]
    height, width = tensors["noise"].shape[-2:]
    grid = TileGrid(height, width, case["tile"], case["real_overlap"])
    with torch.no_grad():
        condition = pipeline.alignment.embed(grid.tiles[0].crop(tensors["lq_features"]))
        residual = pipeline.alignment.residual(tensors["first_call.conv_in"], condition)
    for row in tensors["first_call.condition"].split(1):
        assert difference(condition, row) < 1e-5
    assert difference(residual.flatten(2).transpose(1, 2), tensors["first_call.residual_tokens"]) < 1e-5


def test_first_call_and_final_latent(
    case: dict[str, Any], pipeline: FaithDiffPipeline, text: TextConditioning, golden: Golden
) -> None:
    tensors = case["tensors"]
    first: dict[str, Tensor] = {}
    time_ids: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first.setdefault("model_input", args[0])
        first.setdefault("eps", output[0])
        time_ids.append(kwargs["added_cond_kwargs"]["time_ids"])

    handle = pipeline.base.unet.register_forward_hook(look, with_kwargs=True)
    try:
        latent = pipeline.sample(
            tensors["lq_features"],
            text,
            tensors["noise"],
            lq_latent=tensors.get("lr_latent"),
            steps=case["steps"],
            cfg=case["cfg"],
            start=case["start"],
            tile=case["tile"],
            overlap=case["real_overlap"],
        )
    finally:
        handle.remove()
    assert difference(first["model_input"], tensors["first_call.model_input"]) < 1e-5
    # The recording has the negative half first, as here.
    assert difference(first["eps"], tensors["first_call.eps"]) < 1e-4
    assert len(time_ids) == case["steps"] * case["tiles"]
    for half in range(2):
        assert torch.equal(torch.stack([ids[half] for ids in time_ids[: case["tiles"]]]), tensors["time_ids"])
    assert difference(latent, tensors["latent"]) < 1e-4


def test_start_latent_comes_from_the_vaes_mean(golden: Golden, pipeline: FaithDiffPipeline) -> None:
    for name in ("one_tile_lr_20", "side_below_tile"):
        z = pipeline.encode_latent(golden.tensors[f"{name}.image"])
        assert difference(z, golden.tensors[f"{name}.lr_latent"]) < 1e-4


def test_decode(golden: Golden, pipeline: FaithDiffPipeline) -> None:
    factor = pipeline.base.vae.config.scaling_factor
    pixels = pipeline.decode(golden.tensors["vae.latent"] * factor)
    assert difference(pixels, (golden.tensors["vae.decoded"] / 2 + 0.5).clamp(0, 1)) < 1e-4


def test_timesteps_and_sigmas(case: dict[str, Any]) -> None:
    assert leading_timesteps(case["steps"]).tolist() == case["timesteps"]
    torch.testing.assert_close(sampling_sigmas(case["steps"]), torch.tensor(case["sigmas"]), rtol=1e-6, atol=0)


def test_tile_time_ids(case: dict[str, Any]) -> None:
    tensors = case["tensors"]
    height, width = tensors["noise"].shape[-2:]
    grid = TileGrid(height, width, case["tile"], case["real_overlap"])
    assert len(grid) == case["tiles"]
    got = [tile_time_ids(height, width, tile.top, tile.left, grid.tile_pixels) for tile in grid.tiles]
    assert torch.equal(torch.tensor(got).float(), tensors["time_ids"])


@pytest.mark.parametrize("name", ["color0", "color1"])
def test_colors(golden: Golden, name: str) -> None:
    content, style = golden.tensors[f"{name}.content"], golden.tensors[f"{name}.style"]
    for function in (adain, wavelet):
        error = function(content, style) - golden.tensors[f"{name}.{function.__name__}"]
        assert float(error.abs().max()) < 1e-5


def test_gaussian_weights(golden: Golden) -> None:
    for name, size in (("gaussian_16x16", (16, 16)), ("gaussian_w24_h16", (16, 24))):
        torch.testing.assert_close(gaussian_weights(*size).float(), golden.tensors[name], rtol=1e-6, atol=0)


def test_alignment_is_folded(pipeline: FaithDiffPipeline) -> None:
    """The parity above is that of the form which inference uses."""
    assert isinstance(pipeline.alignment, Alignment)
    assert pipeline.alignment.folded
