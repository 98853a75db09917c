"""The schedulers of diffusers that the engine offers, in the published configuration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backbone import BETA_END, BETA_START, TRAIN_STEPS
from ..errors import SettingsError
from ..sampling.schedule import StartPoint, start_latent

PUBLISHED_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": TRAIN_STEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
"""The noise schedule FaithDiff was trained and published with, in diffusers' words.

The last three concern single schedulers, whose defaults are those of pixel models; they are what SDXL sets.
"""

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Samplers by short name: diffusers' class, and what it needs beside the published schedule."""


def make_scheduler(name: str = "euler") -> Any:
    """A diffusers scheduler with the published noise schedule.

    Args:
        name: one of `SCHEDULERS`, or the name of a scheduler class of diffusers; `euler` is the published one.

    Raises:
        SettingsError: an unknown name.
    """
    import diffusers

    class_name, extra = SCHEDULERS.get(name, (name, {}))
    scheduler = getattr(diffusers, class_name, None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise SettingsError(
            f"scheduler must be one of {sorted(SCHEDULERS)} or a scheduler class of diffusers, got {name!r}."
        )
    known = inspect.signature(scheduler).parameters
    return scheduler(**{key: value for key, value in {**PUBLISHED_SCHEDULE, **extra}.items() if key in known})


def fresh_scheduler(scheduler: Any, seeds: Sequence[int] | None = None) -> Any:
    """A fresh scheduler with the same config, so that no state leaks from a previous or cancelled run.

    Args:
        scheduler: any diffusers scheduler for a noise-predicting latent model.
        seeds: one for each image, for the one scheduler that makes its noise without torch's generators (SDE).

    Raises:
        SettingsError: a scheduler for another kind of model (flow matching, EDM).
    """
    if not hasattr(scheduler, "alphas_cumprod") or getattr(scheduler.config, "use_flow_sigmas", False):
        raise SettingsError(
            f"{type(scheduler).__name__} is not made for SDXL's noise schedule; choose one of {sorted(SCHEDULERS)}."
        )
    fresh = type(scheduler).from_config(scheduler.config)
    if seeds is not None and hasattr(fresh, "noise_sampler_seed"):
        fresh.noise_sampler_seed = list(seeds)
    return fresh


def initial_latent(scheduler: Any, start: StartPoint | str, noise: Tensor, lq_latent: Tensor | None) -> Tensor:
    """The start in the space that a scheduler works in; its `set_timesteps` has been called.

    There are two such spaces. Euler, Heun and their kind keep x = z + sigma * noise and divide by sqrt(sigma^2 + 1)
    before the U-Net sees it; DDIM, DPM-Solver and theirs keep what the U-Net sees, sqrt(abar) * z + sqrt(1 - abar) *
    noise. As abar = 1 / (sigma^2 + 1), the second is the first times sqrt(abar). The start is worked out in the sigma
    space and brought over, so with every scheduler the U-Net's first input is the published one.

    Args:
        scheduler: any diffusers scheduler for SDXL.
        start, noise, lq_latent: as in `start_latent`.
    """
    first = scheduler.timesteps[0]
    if hasattr(scheduler, "sigmas"):
        sigma = float(scheduler.sigmas[0])
    else:
        if int(first) >= len(scheduler.alphas_cumprod):
            raise SettingsError(
                f"{type(scheduler).__name__} begins at timestep {int(first)}, one past its table; take fewer steps."
            )
        abar = float(scheduler.alphas_cumprod[int(first)])
        sigma = ((1 - abar) / abar) ** 0.5
    x = start_latent(start, noise, sigma, lq_latent)
    return x if in_sigma_space(scheduler) else x / (sigma**2 + 1) ** 0.5


def in_sigma_space(scheduler: Any) -> bool:
    """Whether a scheduler keeps x = z + sigma * noise; see `initial_latent`. Its `set_timesteps` has been called."""
    # How it scales the U-Net's input tells. The loop's first call is the same one.
    return float(scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])) != 1.0


def noise_level(scheduler: Any, t: Tensor) -> float:
    """The noise level sigma of a timestep, interpolated between those of the training timesteps.

    Args:
        scheduler: any diffusers scheduler for SDXL.
        t: timestep, whole or not; values past the table count as its last entry.
    """
    abar = scheduler.alphas_cumprod
    at = min(max(float(t), 0.0), len(abar) - 1.0)
    below = math.floor(at)
    ends = [float(abar[i]) for i in (below, min(below + 1, len(abar) - 1))]
    low, high = (0.5 * math.log((1 - value) / value) for value in ends)
    return math.exp(low + (at - below) * (high - low))


def run_scheduler(
    scheduler: Any,
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    before_step: Callable[[Tensor, Any, int], Tensor] | None = None,
    **extra: Any,
) -> Tensor:
    """The sampling loop.

    Args:
        scheduler: its `set_timesteps` has been called.
        denoise: called as denoise(model input, t); predicts what the scheduler expects of a model.
        x: from `initial_latent`.
        before_step: called as before_step(x, scheduler, number of the step); gives the x that the step begins with.
        **extra: further arguments of the scheduler's `step`, such as a generator.

    Returns:
        The sampled latent, of x's shape.
    """
    for step, t in enumerate(scheduler.timesteps):
        if before_step is not None:
            x = before_step(x, scheduler, step)
        prediction = denoise(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
    return x
