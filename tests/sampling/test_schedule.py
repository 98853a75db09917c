"""Time steps, sigmas and the start against diffusers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from faithdiff_core import SettingsError, StartPoint, leading_timesteps, sampling_sigmas, start_latent
from faithdiff_core.engine.schedulers import make_scheduler
from faithdiff_core.sampling.schedule import alphas_cumprod, sigmas_at


@pytest.fixture(scope="module")
def euler() -> Any:
    return make_scheduler("euler")


def test_every_number_of_steps(euler: Any) -> None:
    for steps in range(1, 1001):
        euler.set_timesteps(steps)
        assert leading_timesteps(steps).tolist() == euler.timesteps.tolist(), steps
        torch.testing.assert_close(sampling_sigmas(steps), euler.sigmas, rtol=1e-6, atol=0, msg=f"{steps} steps")


def test_published_default() -> None:
    assert leading_timesteps(20).tolist() == list(range(951, 0, -50))
    assert leading_timesteps(1).tolist() == [1]
    assert leading_timesteps(1000)[0] == 1000
    assert sigmas_at(torch.tensor([1000])) == sigmas_at(torch.tensor([999]))


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
def test_bad_steps(steps: Any) -> None:
    with pytest.raises(SettingsError, match=f"from 1 to 1000, got {steps}"):
        leading_timesteps(steps)


def test_alphas(euler: Any) -> None:
    assert torch.equal(alphas_cumprod(), euler.alphas_cumprod)
    table = torch.linspace(0.1, 5, 1000)
    assert sampling_sigmas(3, table).tolist() == [*table[[667, 334, 1]].tolist(), 0.0]


def test_starts() -> None:
    noise, z = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    euler = make_scheduler("euler")
    euler.set_timesteps(20)
    sigma = float(euler.sigmas[0])
    torch.testing.assert_close(start_latent("noise", noise, sigma), noise * euler.init_noise_sigma)
    # diffusers' own forward process, at the last training step, on noise of the sampler's first level.
    ddpm = make_scheduler("DDPMScheduler")
    expected = ddpm.add_noise(z, noise * euler.init_noise_sigma, torch.tensor([999, 999]))
    torch.testing.assert_close(start_latent(StartPoint.LR, noise, sigma, z), expected)
    one = start_latent("lr", noise, sigma, z[:1])
    torch.testing.assert_close(one, start_latent("lr", noise, sigma, z[:1].expand(2, -1, -1, -1)))


def test_bad_starts() -> None:
    noise = torch.zeros(2, 4, 3, 3)
    with pytest.raises(SettingsError, match=r"\['lr', 'noise'\], got 'middle'"):
        start_latent("middle", noise, 1.0)
    with pytest.raises(SettingsError, match="needs the VAE latent"):
        start_latent("lr", noise, 1.0)
    with pytest.raises(SettingsError, match=r"\(2, 4, 3, 3\), got \(2, 4, 3, 4\)"):
        start_latent("lr", noise, 1.0, torch.zeros(2, 4, 3, 4))
    with pytest.raises(SettingsError, match=r"got \(3, 4, 3, 3\)"):
        start_latent("lr", noise, 1.0, torch.zeros(3, 4, 3, 3))


def test_schedulers_are_made_without_complaint(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("euler", "ddim", "pndm", "dpmpp_2m_karras", "LCMScheduler"):
            scheduler = make_scheduler(name)
            assert torch.equal(scheduler.alphas_cumprod, alphas_cumprod())
            assert scheduler.config.steps_offset == 1
    assert not caplog.records
    assert make_scheduler("dpmpp_2m_karras").config.use_karras_sigmas
    for bad in ("eule", "StableDiffusionXLPipeline"):
        with pytest.raises(SettingsError, match=f"scheduler class of diffusers, got '{bad}'"):
            make_scheduler(bad)
