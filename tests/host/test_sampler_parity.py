"""The published model's numbers, through the nodes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from comfy_host import GOLDEN, Host
from safetensors.torch import load_file
from support.host_sampling import GivenNoise, Setup, load, relative

from faithdiff_core.backbone import SDXL

MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
CASES = {case["name"]: case for case in MANIFEST["cases"]}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return load(host)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def lq_features(setup: Setup, expected: dict[str, torch.Tensor], name: str) -> Any:
    case = CASES[name]
    image = (expected[f"{name}.image"].movedim(1, -1) + 1) / 2
    return setup.features(image, case.get("encoder_tile", 1024), case.get("encoder_overlap", 0.25))


@pytest.mark.parametrize("name", CASES)
def test_lq_encode(setup: Setup, expected: dict[str, torch.Tensor], name: str) -> None:
    features = lq_features(setup, expected, name)
    assert relative(features.tensor, expected[f"{name}.lq_features"]) < TOLERANCE


@pytest.mark.parametrize("tile_batch", [0, 4])
@pytest.mark.parametrize("name", CASES)
def test_faithdiff_sampler(setup: Setup, expected: dict[str, torch.Tensor], name: str, tile_batch: int) -> None:
    case = CASES[name]
    latent = expected.get(f"{name}.lr_latent")
    samples = setup.restore(
        lq_features(setup, expected, name),
        steps=case["steps"],
        cfg=case["cfg"],
        start_point=case["start"],
        tile_size=case["tile"],
        overlap=1 - case["overlap"],
        tile_batch=tile_batch,
        latent_image=None if latent is None else {"samples": latent / SDXL.vae_scaling_factor},
        noise=GivenNoise(expected[f"{name}.noise"]),
    )
    assert relative(samples * SDXL.vae_scaling_factor, expected[f"{name}.latent"]) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_stock_sampler(setup: Setup, expected: dict[str, torch.Tensor], name: str) -> None:
    """SamplerCustomAdvanced with FaithDiff Conditioning and Tiled Diffusion, given the finished start and no noise."""
    case = CASES[name]
    positive, negative = setup.conditioned(lq_features(setup, expected, name))
    model = setup.tiled(setup.model, case["tile"], 1 - case["overlap"])
    noise, sigmas = expected[f"{name}.noise"], torch.tensor(case["sigmas"])
    start = noise * (sigmas[0] ** 2 + 1) ** 0.5
    if case["start"] == "lr":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        abar = float(torch.cumprod(1 - betas, 0)[-1])
        start = abar**0.5 * expected[f"{name}.lr_latent"] + (1 - abar) ** 0.5 * start
    samples = setup.guided(
        setup.cfg_guider(model, positive, negative, case["cfg"]),
        torch.zeros_like(noise),
        {"samples": start / SDXL.vae_scaling_factor},
        sigmas,
    )
    assert relative(samples * SDXL.vae_scaling_factor, expected[f"{name}.latent"]) < TOLERANCE


def test_own_checkpoint_at_full_strength(host: Host, expected: dict[str, torch.Tensor]) -> None:
    """unet_strength 1 makes any SDXL model FaithDiff's."""
    other = load(host, model=host.call("TestModel", weights="other", seed=3)[0])
    name = "tiles_lr"
    samples = other.restore(
        lq_features(other, expected, name),
        steps=5,
        start_point="lr",
        tile_size=128,
        latent_image={"samples": expected[f"{name}.lr_latent"] / SDXL.vae_scaling_factor},
        noise=GivenNoise(expected[f"{name}.noise"]),
    )
    assert relative(samples * SDXL.vae_scaling_factor, expected[f"{name}.latent"]) < TOLERANCE


@pytest.mark.parametrize("steps", [1, 7, 20, 25, 30, 35, 50])
def test_published_schedule(host: Host, setup: Setup, steps: int) -> None:
    """The noise levels are diffusers' own for every step count, on the host's sigma table."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(steps)
    sigmas = host.pack_module("nodes.bridge.restoration").restoration_sigmas(setup.model, "faithdiff", steps, 1.0)
    assert torch.allclose(sigmas, scheduler.sigmas, rtol=1e-5, atol=0)
