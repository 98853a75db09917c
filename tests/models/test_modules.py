"""LQ encoder and alignment against diffusers and torch's own layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faithdiff_core import Alignment, AlignmentConfig, LQEncoder, LQEncoderConfig, SettingsError
from faithdiff_core.models.alignment import from_published, to_published
from faithdiff_core.models.condition import ConditionCache

SMALL = AlignmentConfig(feature_channels=64, condition_channels=32, unet_channels=32, mlp_channels=96, layers=2)


def random_published(config: AlignmentConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5
        for name, shape in config.published_shapes().items()
    }


def build(config: AlignmentConfig, published: dict[str, Tensor], folded: bool) -> Alignment:
    module = Alignment(config, folded=folded)
    module.load_state_dict(from_published(published, config, folded=folded))
    return module.eval()


def published_residual(published: dict[str, Tensor], config: AlignmentConfig, h: Tensor, condition: Tensor) -> Tensor:
    """The blocks as they were published: torch's attention, whose sequence is the batch."""
    x = torch.cat([h, condition], dim=1).flatten(2).transpose(1, 2)
    for layer in range(config.layers):
        part = {
            key.removeprefix(f"information_transformer_layes.{layer}."): value
            for key, value in published.items()
            if key.startswith(f"information_transformer_layes.{layer}.")
        }
        attention = nn.MultiheadAttention(config.width, 8)
        attention.load_state_dict({k.removeprefix("attn."): v for k, v in part.items() if k.startswith("attn.")})
        normed = F.layer_norm(x, (config.width,), part["ln_1.weight"], part["ln_1.bias"])
        x = x + attention(normed, normed, normed, need_weights=False)[0]
        hidden = F.layer_norm(x, (config.width,), part["ln_2.weight"], part["ln_2.bias"])
        hidden = F.linear(hidden, part["mlp.c_fc.weight"], part["mlp.c_fc.bias"])
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + F.linear(hidden, part["mlp.c_proj.weight"], part["mlp.c_proj.bias"])
    x = F.linear(x, published["spatial_ch_projs.weight"], published["spatial_ch_projs.bias"])
    return x.transpose(1, 2).reshape(h.shape)


@pytest.mark.parametrize("folded", [True, False])
@torch.no_grad()
def test_alignment_is_attention_over_two_identical_rows(folded: bool) -> None:
    published = random_published(SMALL)
    generator = torch.Generator().manual_seed(1)
    h = torch.randn((1, 32, 6, 5), generator=generator)
    condition = torch.randn((1, 32, 6, 5), generator=generator)
    expected = published_residual(published, SMALL, h.repeat(2, 1, 1, 1), condition.repeat(2, 1, 1, 1))
    got = build(SMALL, published, folded).residual(h, condition)
    torch.testing.assert_close(got.expand(2, -1, -1, -1), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_embedding_is_the_published_one() -> None:
    published = random_published(SMALL)
    part = {k.removeprefix("condition_embedding."): v for k, v in published.items() if k.startswith("condition_emb")}
    features = torch.randn((2, 64, 7, 9), generator=torch.Generator().manual_seed(2))
    x = F.group_norm(features, 32, part["norm_in.weight"], part["norm_in.bias"], eps=1e-6)
    x = F.silu(F.conv2d(x, part["conv_in.weight"], part["conv_in.bias"], padding=1))
    x = F.conv2d(x, part["conv_out.weight"], part["conv_out.bias"], padding=1)
    torch.testing.assert_close(build(SMALL, published, True).embed(features), x, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_do_not_mix() -> None:
    module = build(SMALL, random_published(SMALL), True)
    h, condition = torch.randn(3, 32, 4, 4), torch.randn(3, 32, 4, 4)
    together = module(h, condition)
    order = [2, 0, 1]
    torch.testing.assert_close(module(h[order], condition[order]), together[order], rtol=1e-5, atol=1e-5)
    for i in range(3):
        torch.testing.assert_close(module(h[i : i + 1], condition[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module(h, condition[:1]), module(h, condition[:1].expand(3, -1, -1, -1)))


@torch.no_grad()
def test_strength() -> None:
    module = build(SMALL, random_published(SMALL), True)
    h, condition = torch.randn(2, 32, 4, 4), torch.randn(2, 32, 4, 4)
    assert module(h, condition, 0) is h
    full = module(h, condition) - h
    torch.testing.assert_close(module(h, condition, 0.25) - h, 0.25 * full, rtol=1e-4, atol=1e-5)
    rows = module(h, condition, torch.tensor([0.0, 2.0])) - h
    torch.testing.assert_close(rows, full * torch.tensor([0.0, 2.0]).view(2, 1, 1, 1), rtol=1e-4, atol=1e-5)


def test_alignment_names_what_does_not_fit() -> None:
    module = build(SMALL, random_published(SMALL), True)
    with pytest.raises(SettingsError, match=r"expected \(2 or 1, 32, 4, 4\), got \(3, 32, 4, 4\)"):
        module(torch.zeros(2, 32, 4, 4), torch.zeros(3, 32, 4, 4))
    with pytest.raises(SettingsError, match=r"got \(2, 32, 4, 5\)"):
        module(torch.zeros(2, 32, 4, 4), torch.zeros(2, 32, 4, 5))


@torch.no_grad()
def test_published_state_round_trip() -> None:
    published = random_published(SMALL)
    module = build(SMALL, published, False)
    written = to_published(module)
    assert {k: tuple(v.shape) for k, v in written.items()} == SMALL.published_shapes()
    again = build(SMALL, written, False)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in module.state_dict().items())
    width = SMALL.width
    for key, value in written.items():
        if "in_proj" in key:
            assert torch.equal(value[2 * width :], published[key][2 * width :])
            assert not value[: 2 * width].any()
        else:
            assert torch.equal(value, published[key])
    with pytest.raises(SettingsError, match="folded=False"):
        to_published(build(SMALL, published, True))


def diffusers_features(vae: Any, pixels: Tensor) -> Tensor:
    """What the VAE's own encoder has before its output norm."""
    kept: list[Tensor] = []
    handle = vae.encoder.mid_block.register_forward_hook(lambda _m, _i, output: kept.append(output))
    try:
        vae.encode(pixels)
    finally:
        handle.remove()
    return kept[0]


def vae_and_encoder(channels: tuple[int, ...], layers: int) -> tuple[Any, LQEncoder]:
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
    ).eval()
    state = {
        key.removeprefix("encoder."): value
        for key, value in vae.state_dict().items()
        if key.startswith("encoder.") and "conv_norm_out" not in key and "conv_out" not in key
    }
    encoder = LQEncoder(LQEncoderConfig.from_shapes({key: tuple(value.shape) for key, value in state.items()}))
    encoder.load_state_dict(state)
    return vae, encoder.eval()


@pytest.mark.parametrize(
    ("channels", "layers", "size"),
    [((32, 32, 64, 64), 1, (72, 104)), ((32, 64, 64, 96), 2, (256, 200)), ((128, 256, 512, 512), 2, (64, 64))],
    ids=["small", "two layers", "SDXL's sizes"],
)
@torch.no_grad()
def test_lq_encoder_is_the_vaes_encoder(channels: tuple[int, ...], layers: int, size: tuple[int, int]) -> None:
    vae, encoder = vae_and_encoder(channels, layers)
    pixels = torch.rand((1, 3, *size), generator=torch.Generator().manual_seed(4)) * 2 - 1
    expected = diffusers_features(vae, pixels)
    assert float((encoder(pixels) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert encoder.config.block_out_channels == channels


@torch.no_grad()
def test_tiled_encode_differs_little_and_does_not_mix_images() -> None:
    _, encoder = vae_and_encoder((32, 32, 64, 64), 1)
    pixels = torch.rand((2, 3, 160, 136), generator=torch.Generator().manual_seed(4)) * 2 - 1
    seen: list[tuple[int, int]] = []
    tiled = encoder.encode(pixels, 64, 0.25, lambda done, total: seen.append((done, total)))
    assert tiled.shape == (2, 64, 20, 17)
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    apart = torch.cat([encoder.encode(row, 64, 0.25) for row in pixels.split(1)])
    torch.testing.assert_close(tiled, apart, rtol=1e-5, atol=1e-5)
    assert torch.equal(encoder.encode(pixels, 160, 0.25), encoder.encode(pixels, None))
    assert not torch.equal(tiled, encoder.encode(pixels, None))


def test_encoder_names_what_does_not_fit() -> None:
    _, encoder = vae_and_encoder((32, 32), 1)
    with pytest.raises(SettingsError, match=r"shape \(batch, 3, height, width\), got \(1, 4, 8, 8\)"):
        encoder.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(SettingsError, match="multiples of 2 pixels, got 9 x 8"):
        encoder.encode(torch.zeros(1, 3, 8, 9))
    with pytest.raises(SettingsError, match="multiple of 2 pixels, got 7"):
        encoder.encode(torch.zeros(1, 3, 8, 8), tile=7)


def test_condition_cache_keeps_what_fits() -> None:
    made: list[str] = []

    def compute(name: str) -> Tensor:
        made.append(name)
        return torch.full((10,), float(len(made)))  # 40 bytes

    cache = ConditionCache(100)
    for _ in range(3):
        for name in "abc":
            cache.get(name, partial(compute, name))
    # Two fit; the third is computed again each time, and never drives out another.
    assert made == ["a", "b", "c", "c", "c"]
    assert (len(cache), cache.used_bytes) == (2, 80)
    cache.clear()
    assert (len(cache), cache.used_bytes) == (0, 0)
    cache.get("c", lambda: compute("c"))
    cache.get("c", lambda: compute("c"))
    assert made == ["a", "b", "c", "c", "c", "c"]
    nothing = ConditionCache(0)
    assert torch.equal(nothing.get("a", lambda: torch.ones(1)), torch.ones(1))
    assert len(nothing) == 0
