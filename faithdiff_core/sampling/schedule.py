"""The published noise schedule, its timesteps, and where sampling starts.

Everything is in the sigma space of k-diffusion, x = z + sigma * noise, which ComfyUI's samplers and diffusers' Euler
scheduler share.
"""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor

from ..backbone import BETA_END, BETA_START, NOISE, TRAIN_STEPS
from ..errors import SettingsError

DEFAULT_STEPS = 20
"""The authors' choice between quality and fidelity (supplement, table 10)."""

DEFAULT_CFG = 5.0
"""Guidance scale; the authors' choice (supplement, table 10)."""


class StartPoint(str, Enum):
    """What sampling starts from (the paper's inference strategy, supplement B.6)."""

    LR = "lr"
    """The LQ latent diffused to the last training timestep."""

    NOISE = "noise"
    """Noise alone."""


def prediction_target(prediction: str, z: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """What a U-Net is to predict: the noise, or v = sqrt(abar) * noise - sqrt(1 - abar) * z (arXiv 2202.00512).

    Args:
        prediction: `epsilon` or `v_prediction`.
        z: clean latents.
        noise: of z's shape.
        abar: of the timesteps, broadcast to z.
    """
    return noise if prediction == NOISE else abar.sqrt() * noise - (1 - abar).sqrt() * z


def predicted_noise(prediction: str, output: Tensor, noisy: Tensor, abar: Tensor) -> Tensor:
    """The noise by what a U-Net predicted: its output, or sqrt(abar) * v + sqrt(1 - abar) * noisy.

    Args:
        prediction: `epsilon` or `v_prediction`.
        output: of the U-Net.
        noisy: its input, sqrt(abar) * z + sqrt(1 - abar) * noise.
        abar: of the timesteps, broadcast to the input.
    """
    return output if prediction == NOISE else abar.sqrt() * output + (1 - abar).sqrt() * noisy


def leading_timesteps(steps: int) -> Tensor:
    """The published timesteps, from noise to image: `leading` spacing with offset 1.

    20 steps are 951, 901, ..., 1.

    Args:
        steps: 1 to 1000.

    Returns:
        (steps,), int64. With 1000 steps the first one is 1000, one past the table: see `sigmas_at`.

    Raises:
        SettingsError: a number of steps out of range.
    """
    if isinstance(steps, bool) or int(steps) != steps or not 1 <= steps <= TRAIN_STEPS:
        raise SettingsError(f"steps must be a whole number from 1 to {TRAIN_STEPS}, got {steps}.")
    return torch.arange(int(steps) - 1, -1, -1) * (TRAIN_STEPS // int(steps)) + 1


def alphas_cumprod() -> Tensor:
    """Cumulative products of 1 - beta over the training timesteps, (1000,), float32 as the published code has them."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def sigmas_at(timesteps: Tensor, table: Tensor | None = None) -> Tensor:
    """Noise levels at whole timesteps.

    Args:
        timesteps: int64, any shape; values past the table count as its last entry, as diffusers has it.
        table: sigma of each training timestep, (1000,). Defaults to SDXL's.
    """
    if table is None:
        abar = alphas_cumprod()
        table = ((1 - abar) / abar) ** 0.5
    return table[timesteps.clamp(max=len(table) - 1).to(table.device)]


def sampling_sigmas(steps: int, table: Tensor | None = None) -> Tensor:
    """Noise levels of the published schedule with the final 0, (steps + 1,).

    Args:
        steps: 1 to 1000.
        table: sigma of each training timestep, for a model with another schedule. Defaults to SDXL's.

    Raises:
        SettingsError: a number of steps out of range.
    """
    sigmas = sigmas_at(leading_timesteps(steps), table)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def start_latent(
    start: StartPoint | str, noise: Tensor, sigma: float | Tensor, lq_latent: Tensor | None = None
) -> Tensor:
    """The noisy latent that sampling starts from.

    `noise`: x = sqrt(sigma^2 + 1) * noise. `lr`: x = sqrt(abar) * z + sqrt(1 - abar) * sqrt(sigma^2 + 1) * noise with
    abar of the last training step, 0.0683 * z + 0.9977 * ... for SDXL.

    Args:
        start: `lr` or `noise`.
        noise: standard normal, (B, 4, h, w).
        sigma: noise level of the first step.
        lq_latent: z, the low-quality image's VAE latent times 0.13025, of noise's shape or one row; for `lr`.

    Returns:
        x, (B, 4, h, w).

    Raises:
        SettingsError: an unknown start, or `lr` without a latent or with one of another size.
    """
    try:
        start = StartPoint(start)
    except ValueError:
        raise SettingsError(f"start must be one of {[s.value for s in StartPoint]}, got {start!r}.") from None
    scale = (torch.as_tensor(sigma, dtype=torch.float32, device=noise.device) ** 2 + 1) ** 0.5
    if start is StartPoint.NOISE:
        return noise * scale
    if lq_latent is None:
        raise SettingsError("start `lr` needs the VAE latent of the low-quality image; give it, or start from `noise`.")
    if lq_latent.shape[1:] != noise.shape[1:] or lq_latent.shape[0] not in (1, noise.shape[0]):
        raise SettingsError(
            f"start `lr`: the low-quality image's latent must have the noise's shape {tuple(noise.shape)}, "
            f"got {tuple(lq_latent.shape)}."
        )
    abar = float(alphas_cumprod()[-1])
    return math.sqrt(abar) * lq_latent + math.sqrt(1 - abar) * (noise * scale)
