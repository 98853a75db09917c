"""What can be checked of Apple's GPUs without one: no float64 and no unsupported operator on the way to the device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_mps import MPS, FakeMPS, OnDevice, move
from support.golden import Golden

from faithdiff_core import read_faithdiff
from faithdiff_core.models.condition import ConditionEmbedder
from faithdiff_core.tiling.grid import TileGrid
from faithdiff_core.vae.decoder_stages import parts_from_diffusers
from faithdiff_core.vae.tiled_decode import decode_tiled


def test_the_fake_device_refuses() -> None:
    with FakeMPS():
        x = torch.ones(2, 3, device=MPS)
        assert isinstance(x, OnDevice)
        assert x.device.type == MPS.type
        assert float((x * 2).sum()) == 12.0
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            torch.ones(2, dtype=torch.float64).to(MPS)
        with pytest.raises(NotImplementedError, match="linalg_eig"):
            torch.linalg.eigvals(x[:, :2])
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.ones(2, 3)


@torch.no_grad()
def test_tiles_encoder_alignment_and_decode(tiny_sdxl: Path, golden: Golden) -> None:
    """The same numbers as on the CPU, and no refusal."""
    from diffusers import AutoencoderKL

    weights = read_faithdiff(golden.model)
    encoder, alignment = weights.build_lq_encoder(torch.float32), weights.build_alignment(torch.float32)
    vae = AutoencoderKL.from_pretrained(tiny_sdxl / "vae")
    pixels = torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latent = torch.randn(1, 4, 24, 20, generator=torch.Generator().manual_seed(2))

    def compute(device: torch.device) -> list[torch.Tensor]:
        parts: list[Any] = [encoder, alignment, vae]
        if device.type != "cpu":
            parts = [move(copy.deepcopy(module)) for module in parts]
        features = parts[0].encode(pixels, 64, 0.25, device=device)
        grid = TileGrid(12, 20, 64, 0.5)
        embedder = ConditionEmbedder(parts[1], 2**20)
        merged = torch.zeros(1, 1, 12, 20, device=device)
        rows = []
        for tile in grid.tiles:
            condition = embedder(features, [(0, tile)], device, torch.float32)
            h = parts[1](torch.ones_like(condition), condition, 1.0, 1)
            grid.merge(merged, tile, h[:, :1])
            rows.append(h.mean())
        decoded = decode_tiled(parts_from_diffusers(parts[2]), latent, tile=64, overlap=0.25, device=device)
        results = [features, merged, torch.stack(rows), decoded]
        return [result.cpu() for result in results]

    expected = compute(torch.device("cpu"))
    with FakeMPS():
        got = compute(MPS)
    for one, other in zip(got, expected, strict=True):
        plain = one.held if isinstance(one, OnDevice) else one
        assert torch.allclose(plain, other, atol=1e-5)
