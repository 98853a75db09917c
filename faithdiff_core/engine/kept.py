"""What a mask keeps of a latent while the rest is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .schedulers import in_sigma_space, noise_level


@dataclass(frozen=True)
class Kept:
    """The part of a latent that stays, at every noise level of a run.

    Outside the mask, sampling sees the low-quality image's latent with the noise that it began with, less of it at
    every level, so that what is sampled inside goes on across the mask's border.

    Attributes:
        sampled: where the latent is sampled, (B or 1, 1, h, w), bool.
        latent: what stays elsewhere, (B, 4, h, w).
        noise: in units of the noise level, (B, 4, h, w).
        sigma_space: whether the scheduler keeps x = z + sigma * noise, and not that divided by sqrt(sigma^2 + 1).
    """

    sampled: Tensor
    latent: Tensor
    noise: Tensor
    sigma_space: bool

    @classmethod
    def of(cls, scheduler: Any, start: Tensor, latent: Tensor, mask: Tensor) -> Kept:
        """From a run's start.

        Args:
            scheduler: its `set_timesteps` has been called.
            start: from `initial_latent`.
            latent: of the low-quality image, of the start's shape.
            mask: above 0 where the latent is sampled, (B or 1, 1, h, w).
        """
        sigma_space = in_sigma_space(scheduler)
        sigma = _level(scheduler, 0)
        x = start if sigma_space else start * (sigma**2 + 1) ** 0.5
        return cls((mask > 0).to(start.device), latent, (x - latent) / sigma, sigma_space)

    def put_back(self, x: Tensor, scheduler: Any, step: int) -> Tensor:
        """x with what stays, at the noise level before a step of the scheduler."""
        sigma = _level(scheduler, step)
        outside = self.latent + sigma * self.noise
        return torch.where(self.sampled, x, outside if self.sigma_space else outside / (sigma**2 + 1) ** 0.5)

    def finish(self, x: Tensor) -> Tensor:
        """The sampled latent with what stays, exactly as it was."""
        return torch.where(self.sampled, x, self.latent)


def _level(scheduler: Any, step: int) -> float:
    """The noise level of a step's input."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(scheduler.timesteps) + 1 and not hasattr(scheduler, "sigmas_interpol"):
        return float(sigmas[step])
    return noise_level(scheduler, scheduler.timesteps[step])
