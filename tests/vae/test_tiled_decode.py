"""Tiled VAE decode: compared with the golden image and with diffusers' untiled decode."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.golden import Golden
from torch import Tensor, nn

from faithdiff_core.errors import NotFiniteError, SettingsError
from faithdiff_core.vae import tiled_decode
from faithdiff_core.vae.decoder_stages import DecoderParts, parts_from_diffusers, parts_from_ldm
from faithdiff_core.vae.statistics import Moments
from faithdiff_core.vae.tiled_decode import decode_tiled

STEPS = 127.5
"""Steps of 8 bits per unit of an image in [-1, 1]."""


@pytest.fixture(scope="module")
def vae(golden: Golden) -> Any:
    diffusers = pytest.importorskip("diffusers")
    config = golden.manifest["vae"]
    model = diffusers.AutoencoderKL(**{key: value for key, value in config.items() if not key.startswith("_")})
    model.load_state_dict({key: value.float() for key, value in load_file(golden.vae).items()})
    return model.eval()


@pytest.fixture(scope="module")
def parts(vae: Any) -> DecoderParts:
    return parts_from_diffusers(vae)


@pytest.fixture(scope="module")
def latent(golden: Golden) -> Tensor:
    return golden.tensors["vae.latent"]


@pytest.fixture(scope="module")
def decoded(golden: Golden) -> Tensor:
    return golden.tensors["vae.decoded"]


def random_vae(channels: tuple[int, ...], layers: int, seed: int) -> Any:
    """An `AutoencoderKL` with random weights; its norms get random weights and biases too."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=4,
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.add_(torch.randn_like(module.weight), alpha=0.3)
                module.bias.add_(torch.randn_like(module.bias), alpha=0.3)
    return model.eval()


def smooth_latents(height: int, width: int, cells: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(1, 4, cells, cells, generator=generator), size=(height, width), mode="bicubic")


def steps(got: Tensor, expected: Tensor) -> float:
    """Largest difference of two images in [-1, 1], in steps of 1/255 of their range."""
    return float((got - expected).abs().max()) * STEPS


@torch.no_grad()
def ordinary(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents).sample


@pytest.mark.parametrize(("tile", "overlap"), [(64, 0.0), (128, 0.25), (192, 0.5), (256, 0.25)])
def test_tiles_give_the_golden_image(
    parts: DecoderParts, latent: Tensor, decoded: Tensor, tile: int, overlap: float
) -> None:
    image = decode_tiled(parts, latent, tile=tile, overlap=overlap)
    assert image.dtype == torch.float32
    assert image.shape == decoded.shape
    assert steps(image, decoded) < 1


def test_every_norm_shared_by_iteration_is_still_close(
    parts: DecoderParts, latent: Tensor, decoded: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for an image so large that only the mid block runs on the whole of it."""
    monkeypatch.setattr(tiled_decode._Decode, "split", lambda self, pixels: 3)
    assert steps(decode_tiled(parts, latent, tile=192), decoded) < 1


def test_a_deeper_vae_with_random_weights() -> None:
    vae = random_vae((32, 32, 64, 64), 2, seed=3)
    latents = smooth_latents(40, 33, 12, seed=4)
    image = decode_tiled(parts_from_diffusers(vae), latents, tile=128)
    assert steps(image, ordinary(vae, latents)) < 1


def test_given_exact_statistics_tiles_are_exact(
    vae: Any, parts: DecoderParts, latent: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What remains of the error is in the statistics: with a small tolerance hardly anything is left."""
    monkeypatch.setattr(tiled_decode, "TOLERANCE", 1e-6)
    monkeypatch.setattr(tiled_decode, "MAX_PASSES", 12)
    latents = latent[..., :24, :40]
    torch.testing.assert_close(decode_tiled(parts, latents, tile=128), ordinary(vae, latents), rtol=0, atol=2e-4)


def test_tiles_do_not_differ_in_tone(vae: Any, parts: DecoderParts) -> None:
    """An image whose left is flat and whose right is rough: tiles with separate statistics differ in tone."""
    ramp = torch.linspace(-1, 1, 48).expand(1, 4, 32, 48)
    rough = torch.randn(1, 4, 32, 48, generator=torch.Generator().manual_seed(0))
    latents = 0.5 * ramp + rough * (torch.arange(48) >= 24)
    expected = ordinary(vae, latents)
    difference = decode_tiled(parts, latents, tile=128, overlap=0.0) - expected
    tone = F.avg_pool2d(difference, 128).abs().max() * STEPS
    alone = torch.cat([ordinary(vae, part) for part in latents.split(16, dim=-1)], dim=-1) - expected
    assert tone < 0.25
    assert F.avg_pool2d(alone, 128).abs().max() * STEPS > 2


def test_an_image_no_larger_than_the_tile_is_decoded_in_the_ordinary_way(
    vae: Any, parts: DecoderParts, latent: Tensor
) -> None:
    assert torch.equal(decode_tiled(parts, latent, tile=448), ordinary(vae, latent))


def test_a_small_image_of_more_than_one_tile_is_exact(vae: Any, parts: DecoderParts) -> None:
    """Its features take no more memory than one tile's, so all of it runs on the whole image, in bands."""
    latents = smooth_latents(10, 40, 6, seed=5)
    torch.testing.assert_close(decode_tiled(parts, latents, tile=256), ordinary(vae, latents), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 40), (40, 2), (17, 31)])
def test_odd_and_narrow_images(vae: Any, parts: DecoderParts, shape: tuple[int, int]) -> None:
    latents = smooth_latents(*shape, 5, seed=6)
    assert steps(decode_tiled(parts, latents, tile=64), ordinary(vae, latents)) < 2


def test_images_of_a_batch_equal_their_single_runs(parts: DecoderParts) -> None:
    latents = torch.cat([smooth_latents(24, 24, cells, seed=cells) for cells in (4, 12)])
    together = decode_tiled(parts, latents, tile=128)
    for image in range(2):
        assert torch.equal(together[image : image + 1], decode_tiled(parts, latents[image : image + 1], tile=128))


def test_bfloat16(vae: Any, latent: Tensor) -> None:
    """No further from the full-precision image than the ordinary decode in bfloat16 is, up to a small margin."""
    half = copy.deepcopy(vae).bfloat16()
    latents = latent[..., :18, :20]
    expected = ordinary(vae, latents)
    error = decode_tiled(parts_from_diffusers(half), latents, tile=128, dtype=torch.bfloat16) - expected
    error_of_ordinary = ordinary(half, latents.bfloat16()).float() - expected
    assert error.square().mean().sqrt() < 1.25 * error_of_ordinary.square().mean().sqrt()


def test_nothing_is_left_behind_by_cancelling(vae: Any, parts: DecoderParts, latent: Tensor) -> None:
    latents = latent[..., :24, :24]
    before = ordinary(vae, latents)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in vae.modules())

    class CancelledError(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        if done > total // 2:
            raise CancelledError

    with pytest.raises(CancelledError):
        decode_tiled(parts, latents, tile=128, progress=cancel)
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in vae.modules())
    assert not any("forward" in vars(module) for module in vae.modules())
    assert torch.equal(before, ordinary(vae, latents))


def test_progress_counts_up_to_its_total(parts: DecoderParts) -> None:
    seen: list[tuple[int, int]] = []
    latents = torch.cat([smooth_latents(24, 24, 4, seed=7)] * 2)
    decode_tiled(parts, latents, tile=128, progress=lambda done, total: seen.append((done, total)))
    done = [count for count, _ in seen]
    assert done == sorted(done)
    assert all(count <= total for count, total in seen)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 100}, "nearest size that works is 96"),
        ({"tile": 32}, "at least 64"),
        ({"overlap": 0.95}, "between 0 and 0.9"),
    ],
)
def test_settings_out_of_range(parts: DecoderParts, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        decode_tiled(parts, torch.zeros(1, 4, 8, 8), **settings)


def test_latents_of_another_kind(parts: DecoderParts) -> None:
    with pytest.raises(SettingsError, match=r"\(batch, 4, height, width\), got \(1, 16, 8, 8\)"):
        decode_tiled(parts, torch.zeros(1, 16, 8, 8))
    with pytest.raises(SettingsError, match="not finite"):
        decode_tiled(parts, torch.full((1, 4, 8, 8), math.nan))


@pytest.mark.parametrize("tile", [128, 1024])
def test_a_result_that_is_not_finite(vae: Any, tile: int) -> None:
    broken = copy.deepcopy(vae)
    with torch.no_grad():
        broken.decoder.conv_norm_out.weight[0] = math.inf
    with pytest.raises(NotFiniteError, match=r"not finite .* in float32"):
        decode_tiled(parts_from_diffusers(broken), smooth_latents(20, 20, 4, seed=8), tile=tile)


def test_other_models_are_refused(vae: Any) -> None:
    with pytest.raises(SettingsError, match="expects the VAE of SDXL"):
        parts_from_ldm(vae)
    with pytest.raises(SettingsError, match="expects the VAE of SDXL"):
        parts_from_diffusers(nn.Linear(1, 1))
    changed = copy.deepcopy(vae)
    changed.decoder.up_blocks[1].resnets[0].time_mixer = nn.Linear(1, 1)
    with pytest.raises(SettingsError, match="time_mixer"):
        parts_from_diffusers(changed)


def test_moments_of_chunks_combine_to_those_of_the_whole() -> None:
    """Also where the mean is far larger than the deviation, which a difference of squares does not survive."""
    x = torch.randn(1, 8, 12, 10, generator=torch.Generator().manual_seed(9)) + 1000
    norm = nn.GroupNorm(4, 8)
    parts = [(part.shape[-1] * part.shape[-2], Moments.of(norm, part)) for part in x.split([3, 9], dim=-2)]
    combined = Moments.combine(parts)
    groups = x.double().reshape(4, -1)
    torch.testing.assert_close(combined.mean, groups.mean(1).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(combined.var, groups.var(1, correction=0).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        Moments.of(norm, (x - 1000).bfloat16()).mean, groups.mean(1).float() - 1000, rtol=0, atol=2e-3
    )
