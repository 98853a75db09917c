"""Tiled VAE decode with a ComfyUI VAE, compared with its `decode` and its `decode_tiled`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_host import Host
from support.golden import Golden
from torch import Tensor

from faithdiff_core.vae.decoder_stages import NormAffine, parts_from_ldm, stored_affine
from faithdiff_core.vae.tiled_decode import decode_tiled


@pytest.fixture(scope="module")
def vae(host: Host) -> Any:
    return host.testpack.models.tiny_vae()


@pytest.fixture(scope="module")
def latent(golden: Golden) -> Tensor:
    return golden.tensors["vae.latent"]


@pytest.fixture(scope="module")
def norm_affine(host: Host) -> NormAffine:
    function: NormAffine = host.pack_module("nodes.bridge.vae_tiles").norm_affine
    return function


def shared_decode(vae: Any, latents: Tensor, affine: NormAffine = stored_affine, **settings: Any) -> Tensor:
    """ComfyUI's layout: (B, H, W, 3) in [0, 1]."""
    parts = parts_from_ldm(vae.first_stage_model, affine)
    image = decode_tiled(parts, latents, device=vae.device, dtype=vae.vae_dtype, **settings)
    return vae.process_output(image).movedim(1, -1)


@pytest.mark.parametrize(("tile", "overlap"), [(128, 0.25), (192, 0.5), (256, 0.25)])
def test_within_two_steps_of_the_hosts_untiled_decode(vae: Any, latent: Tensor, tile: int, overlap: float) -> None:
    with torch.inference_mode():
        expected = vae.decode(latent)
        got = shared_decode(vae, latent, tile=tile, overlap=overlap)
    assert float((got - expected).abs().max()) < 2 / 255


def test_one_tile_is_the_hosts_decode(vae: Any, latent: Tensor) -> None:
    with torch.inference_mode():
        assert torch.equal(shared_decode(vae, latent, tile=512), vae.decode(latent))


def test_layers_that_cast_their_weights(vae: Any, latent: Tensor, norm_affine: NormAffine) -> None:
    """With the weights stored in bfloat16 and cast when a layer is called."""
    import comfy.ops

    model = vae.first_stage_model
    norms = [module for module in model.decoder.modules() if isinstance(module, torch.nn.GroupNorm)]
    casting = [module for module in model.modules() if isinstance(module, comfy.ops.CastWeightBiasOp)]
    assert norms
    assert all(isinstance(norm, comfy.ops.CastWeightBiasOp) for norm in norms)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        model.to(torch.bfloat16)
        for module in casting:
            module.comfy_cast_weights = True
        for norm in norms:
            weight, bias = norm_affine(norm, torch.device("cpu"))
            torch.testing.assert_close(weight, norm.weight.float(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(bias, norm.bias.float(), rtol=1e-5, atol=1e-6)
        with torch.inference_mode():
            part = latent[..., :24, :32]
            expected = vae.process_output(model.decode(part)).movedim(1, -1)
            got = shared_decode(vae, part, norm_affine, tile=128)
        assert float((got - expected).abs().max()) < 2 / 255
    finally:
        for module in casting:
            del module.comfy_cast_weights
        model.to(torch.float32)
        model.load_state_dict(weights)


def test_more_exact_than_the_hosts_tiled_decode(vae: Any, latent: Tensor) -> None:
    tile, overlap = 128, 0.25
    latents = latent[..., :40, :40]
    with torch.inference_mode():
        whole = vae.decode(latents)
        host = vae.decode_tiled(latents, tile_x=tile // 8, tile_y=tile // 8, overlap=int(tile // 8 * overlap))
        shared = shared_decode(vae, latents, tile=tile, overlap=overlap)
    error_host, error_shared = (float((result - whole).abs().max()) * 255 for result in (host, shared))
    assert error_shared < 2
    assert error_shared < error_host


def test_patched_norms(vae: Any, norm_affine: NormAffine) -> None:
    """A weight function, as ComfyUI sets it on layers that it patches on the fly, changes the weight that is read."""
    norm: Any = next(
        module for module in vae.first_stage_model.decoder.modules() if isinstance(module, torch.nn.GroupNorm)
    )
    before = norm.weight.detach().float()
    norm.weight_function = [lambda weight: 3 * weight]
    try:
        weight, _ = norm_affine(norm, torch.device("cpu"))
    finally:
        norm.weight_function = []
    torch.testing.assert_close(weight, 3 * before, rtol=1e-4, atol=1e-5)
