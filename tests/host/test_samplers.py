"""Every sampler works, tiled or not."""

from __future__ import annotations

import pytest
import torch
from comfy_host import Host
from support.host_sampling import Setup, gaussian, images, load, relative

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
SCHEDULERS = ("faithdiff", "karras", "normal", "sgm_uniform")
SIZE, TILE, STEPS = 96, 64, 3


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return load(host)


@pytest.fixture(scope="module")
def features(setup: Setup) -> object:
    return setup.features(images(SIZE, SIZE))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_tiled_and_untiled(setup: Setup, features: object, sampler: str, scheduler: str) -> None:
    """One tile equals no tiles; several tiles give another, finite image of the same kind."""
    positive, negative = setup.conditioned(features)
    noise = gaussian(1, 4, SIZE // 8, SIZE // 8)
    if scheduler == "faithdiff":
        sigmas = setup.host.pack_module("nodes.bridge.restoration").restoration_sigmas(
            setup.model, scheduler, STEPS, 1.0
        )
    else:
        sigmas = setup.host.call("BasicScheduler", model=setup.model, scheduler=scheduler, steps=STEPS, denoise=1.0)[0]

    def run(model: object) -> torch.Tensor:
        guider = setup.cfg_guider(model, positive, negative, 3.0)
        return setup.guided(guider, noise, {"samples": torch.zeros_like(noise)}, sigmas, sampler)

    plain = run(setup.model)
    one = run(setup.tiled(setup.model, SIZE))
    tiled = run(setup.tiled(setup.model, TILE))
    assert torch.isfinite(plain).all()
    assert torch.isfinite(tiled).all()
    assert relative(one, plain) < 1e-5
    assert relative(tiled, plain) > 1e-4


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "uni_pc"])
def test_tile_batch_changes_nothing(setup: Setup, features: object, sampler: str) -> None:
    single, *others = (
        setup.restore(features, sampler_name=sampler, tile_size=64, tile_batch=batch) for batch in (1, 2, 4, 64)
    )
    for other in others:
        assert relative(other, single) < 1e-5


def test_ksampler_and_advanced_agree(setup: Setup, features: object) -> None:
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
