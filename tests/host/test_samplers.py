"""Every sampler works, tiled or not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from comfy_host import Host
from support.host_sampling import Setup, gaussian, images, load, relative, sized
from torch import Tensor

from faithdiff_core.tiling.grid import TileGrid

SAMPLERS = (
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "lms",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "ddpm",
    "lcm",
    "res_multistep",
    "er_sde",
    "ddim",
    "uni_pc",
)
BY_HAND = ("euler_ancestral", "heun", "dpm_2", "lms", "dpmpp_2m", "dpmpp_2m_sde", "res_multistep", "er_sde", "lcm")
SCHEDULERS = ("faithdiff", "karras", "normal", "sgm_uniform")
SIZE, TILE, STEPS, CFG = 96, 64, 3, 3.0


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return load(host)


@pytest.fixture(scope="module")
def features(setup: Setup) -> Any:
    return setup.features(images(SIZE, SIZE))


def sigmas_of(setup: Setup, scheduler: str, denoise: float = 1.0) -> Tensor:
    if scheduler == "faithdiff":
        module = setup.host.pack_module("nodes.bridge.restoration")
        return cast("Tensor", module.restoration_sigmas(setup.model, scheduler, STEPS, denoise))
    call = setup.host.call("BasicScheduler", model=setup.model, scheduler=scheduler, steps=STEPS, denoise=denoise)
    return cast("Tensor", call[0])


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [*((sampler, "karras") for sampler in SAMPLERS), *(("euler", scheduler) for scheduler in SCHEDULERS)],
)
def test_one_tile_equals_no_tiles(setup: Setup, features: Any, sampler: str, scheduler: str) -> None:
    positive, negative = setup.conditioned(features)
    noise = gaussian(1, 4, SIZE // 8, SIZE // 8)

    def run(model: Any) -> Tensor:
        guider = setup.cfg_guider(model, positive, negative, CFG)
        return setup.guided(guider, noise, {"samples": torch.zeros_like(noise)}, sigmas_of(setup, scheduler), sampler)

    plain = run(setup.model)
    assert torch.isfinite(plain).all()
    assert relative(run(setup.tiled(setup.model, SIZE)), plain) < 1e-5


class TilesByHand:
    """What a sampler calls: denoised = f(x, sigma), each tile denoised alone by one untiled Euler step to 0.

    Attributes:
        inner_model: what some samplers ask for the kind of model.
    """

    def __init__(self, setup: Setup, features: Any) -> None:
        self.setup, self.features = setup, features
        self.grid = TileGrid(SIZE // 8, SIZE // 8, TILE, 0.5)
        guider = setup.cfg_guider(setup.model, *setup.conditioned(features), CFG)
        self.inner_model = SimpleNamespace(inner_model=setup.model.model, model_patcher=guider.model_patcher)

    def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        denoised = torch.zeros_like(x)
        level = float(sigma.flatten()[0])
        for tile in self.grid.tiles:
            cut = type(self.features)(tile.crop(self.features.tensor))
            positive, negative = (sized(cond, tile, (SIZE, SIZE), TILE) for cond in self.setup.conditioned(cut))
            noise = tile.crop(x) / level
            result = self.setup.guided(
                self.setup.cfg_guider(self.setup.model, positive, negative, CFG),
                noise,
                {"samples": torch.zeros_like(noise)},
                torch.tensor([level, 0.0]),
            )
            # The model's latent space is the scaled one; the node's is the VAE's.
            result = self.setup.model.model.process_latent_in(result)
            tile.crop(denoised).add_(result * self.grid.weights(tile))
        return denoised


@pytest.mark.parametrize("sampler", BY_HAND)
def test_a_sampler_over_tiles_by_hand(setup: Setup, features: Any, sampler: str) -> None:
    """The same sampler, called as a function on tiles that are denoised one by one at each of its calls."""
    from comfy.k_diffusion import sampling

    noise, sigmas = gaussian(1, 4, SIZE // 8, SIZE // 8), sigmas_of(setup, "karras", denoise=0.7)
    guider = setup.cfg_guider(setup.tiled(setup.model, TILE), *setup.conditioned(features), CFG)
    got = setup.guided(guider, noise, {"samples": torch.zeros_like(noise)}, sigmas, sampler)
    by_hand = TilesByHand(setup, features)
    result = getattr(sampling, f"sample_{sampler}")(
        by_hand, noise * sigmas[0], sigmas, extra_args={"seed": 0, "model_options": {}}, disable=True
    )
    expected = setup.model.model.process_latent_out(result)
    assert relative(got, expected) < 1e-4


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "uni_pc"])
def test_tile_batch_changes_nothing(setup: Setup, features: Any, sampler: str) -> None:
    single, *others = (
        setup.restore(features, sampler_name=sampler, tile_size=64, tile_batch=batch) for batch in (1, 2, 4, 64)
    )
    for other in others:
        assert relative(other, single) < 1e-5


def test_ksampler_and_advanced_agree(setup: Setup, features: Any) -> None:
    """The stock KSampler and KSamplerAdvanced, tiled, against SamplerCustomAdvanced."""
    positive, negative = setup.conditioned(features)
    model = setup.tiled(setup.model, TILE)
    latent = {"samples": torch.zeros(1, 4, SIZE // 8, SIZE // 8)}
    common = {"model": model, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
    first = setup.host.call(
        "KSampler", seed=7, positive=positive, negative=negative, latent_image=latent, denoise=1.0, **common
    )[0]["samples"]
    second = setup.host.call(
        "KSamplerAdvanced",
        add_noise="enable",
        noise_seed=7,
        positive=positive,
        negative=negative,
        latent_image=latent,
        start_at_step=0,
        end_at_step=10000,
        return_with_leftover_noise="disable",
        **common,
    )[0]["samples"]
    sigmas = setup.host.call("BasicScheduler", model=model, scheduler="normal", steps=4, denoise=1.0)[0]
    noise = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=torch.manual_seed(7))
    third = setup.guided(setup.cfg_guider(model, positive, negative, 3.0), noise, latent, sigmas)
    assert relative(first, third) < 1e-5
    assert relative(second, third) < 1e-5
