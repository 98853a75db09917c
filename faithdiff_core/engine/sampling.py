"""What the engine's sampling loop is made of: schedulers, the start, the text's embeddings, the alignment's hook."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment import Alignment
from ..errors import SettingsError
from ..schedule import BETA_END, BETA_START, TRAIN_STEPS, StartPoint, start_latent

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
    """A new scheduler of the same settings, so that no run finds what an earlier, perhaps cancelled one left behind.

    Args:
        scheduler: any diffusers scheduler for a noise-predicting latent model.
        seeds: one for each picture, for the one scheduler that makes its noise without torch's generators (SDE).

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
                f"{type(scheduler).__name__} begins at time step {int(first)}, one past its table; take fewer steps."
            )
        abar = float(scheduler.alphas_cumprod[int(first)])
        sigma = ((1 - abar) / abar) ** 0.5
    x = start_latent(start, noise, sigma, lq_latent)
    # How the scheduler scales the U-Net's input tells its space. The loop's first call is the same one.
    scale = float(scheduler.scale_model_input(torch.ones(1), first))
    return x if scale != 1.0 else x / (sigma**2 + 1) ** 0.5


@dataclass(frozen=True)
class TextConditioning:
    """The text's embeddings, one row for each picture.

    Attributes:
        embeds: (B, tokens, width) of the prompts.
        pooled: (B, pooled width) of the prompts.
        negative_embeds, negative_pooled: the same of the negative prompts; needed for guidance (cfg above 1).
    """

    embeds: Tensor
    pooled: Tensor
    negative_embeds: Tensor | None = None
    negative_pooled: Tensor | None = None

    def rows(self, batch: int, guided: bool, device: torch.device, dtype: torch.dtype) -> TextConditioning:
        """The same with one row for each of `batch` pictures, on a device and in a dtype.

        Raises:
            SettingsError: neither one row nor one for each picture, or no negative text where guidance needs it.
        """
        negative_embeds, negative_pooled = self.negative_embeds, self.negative_pooled
        if guided and (negative_embeds is None or negative_pooled is None):
            raise SettingsError("cfg above 1 needs both of the negative prompt's embeddings; give them or take cfg 1.")

        def fit(x: Tensor) -> Tensor:
            if x.shape[0] not in (1, batch):
                raise SettingsError(f"Text embeddings: expected 1 or {batch} rows, got {tuple(x.shape)}.")
            return x.to(device=device, dtype=dtype).expand(batch, *x.shape[1:])

        return TextConditioning(
            fit(self.embeds),
            fit(self.pooled),
            fit(negative_embeds) if guided and negative_embeds is not None else None,
            fit(negative_pooled) if guided and negative_pooled is not None else None,
        )

    def select(self, pictures: Sequence[int]) -> TextConditioning:
        """The rows of some pictures; a text of one row serves all."""

        def pick(x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 else x[list(pictures)]

        return TextConditioning(
            pick(self.embeds),
            pick(self.pooled),
            None if self.negative_embeds is None else pick(self.negative_embeds),
            None if self.negative_pooled is None else pick(self.negative_pooled),
        )

    def guided_rows(self, pictures: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Embeddings and pooled embeddings for a U-Net call: all negative rows first, where there are any."""
        index = list(pictures)
        if self.negative_embeds is None or self.negative_pooled is None:
            return self.embeds[index], self.pooled[index]
        return (
            torch.cat([self.negative_embeds[index], self.embeds[index]]),
            torch.cat([self.negative_pooled[index], self.pooled[index]]),
        )


class AlignmentHook:
    """Joins the alignment to a U-Net: a forward hook on `conv_in` replaces its output by the aligned one.

    The rows of a call are one or two copies (the guidance halves, one after the other) of the same latents. They are
    identical at this place, so one half is aligned and repeated.

    Attributes:
        condition: the embedded condition of the coming U-Net call, one row for each latent.
    """

    def __init__(self, alignment: Alignment, strength: float) -> None:
        self.alignment = alignment
        self.strength = strength
        self.condition: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> Tensor:
        assert self.condition is not None
        latents = self.condition.shape[0]
        aligned = self.alignment(h[:latents], self.condition, self.strength)
        return aligned.repeat(h.shape[0] // latents, 1, 1, 1)

    @contextmanager
    def on(self, unet: Any) -> Iterator[None]:
        """Keep the hook on a U-Net within a `with` block; strength 0 leaves the U-Net alone."""
        if self.strength == 0:
            yield
            return
        handle = unet.conv_in.register_forward_hook(self)
        try:
            yield
        finally:
            handle.remove()
            self.condition = None
