"""Sample images during training: a few fixed ones, restored with the weights as they are."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..backbone import NOISE
from ..sampling.schedule import leading_timesteps, predicted_noise, sampling_sigmas
from .degradation import to_image
from .model import FrozenModels, TrainableModel, time_ids

SAMPLES = "samples"
"""Folder of the sample images in the output folder."""


@torch.no_grad()
def sample(
    model: TrainableModel,
    frozen: FrozenModels,
    lq: Tensor,
    steps: int,
    seed: int,
    device: torch.device,
    prediction: str = NOISE,
) -> Tensor:
    """Restore images in one piece with Euler steps from noise, without guidance and with the empty caption.

    Args:
        model: in evaluation mode.
        frozen: VAE and text encoders.
        lq: (B, 3, H, W) in [-1, 1].
        steps: Euler steps.
        seed: of the noise.
        device: where to compute.
        prediction: what the model predicts.

    Returns:
        (B, 3, H, W) in [-1, 1].
    """
    lq = lq.to(device)
    batch, scale = len(lq), frozen.latent_scale
    shape = (batch, frozen.latent_channels, lq.shape[2] // scale, lq.shape[3] // scale)
    sigmas = sampling_sigmas(steps).to(device)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device) * (sigmas[0] ** 2 + 1) ** 0.5
    context, pooled = frozen.encode_texts([""] * batch, device)
    ids = time_ids(batch, lq.shape[2], device)
    for index, timestep in enumerate(leading_timesteps(steps)):
        abar = 1 / (sigmas[index] ** 2 + 1)
        scaled = x * abar.sqrt()
        output = model(scaled, timestep.expand(batch).to(device), context, pooled, ids, lq)
        noise = predicted_noise(prediction, output, scaled, abar)
        x = x + (sigmas[index + 1] - sigmas[index]) * noise
    return frozen.decode(x)


def psnr(restored: Tensor, hq: Tensor) -> float:
    """PSNR in dB of images in [-1, 1]."""
    return float(10 * torch.log10(4 / (restored - hq).square().mean().clamp(min=1e-12)))


def write_sheet(path: Path, lq: Tensor, restored: Tensor, hq: Tensor) -> None:
    """Write low quality, restored and high quality side by side; each (3, H, W) in [-1, 1]."""
    path.parent.mkdir(exist_ok=True)
    to_image(torch.cat([lq, restored, hq], dim=2) / 2 + 0.5).save(path)
