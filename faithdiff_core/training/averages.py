"""Averaged weights: exponential moving averages in float32, whatever the parameters' dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Reader = Callable[[nn.Parameter], Tensor]
"""Gives a parameter's value in float32."""


def full_precision(parameter: nn.Parameter) -> Tensor:
    """A parameter's value in float32: DeepSpeed's master copy where there is one, else the parameter itself."""
    if hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        master: Tensor = safe_get_full_fp32_param(parameter)
        return master
    return parameter.detach().float()


class AveragedWeights:
    """Exponential moving averages of parameters.

    The decay rises as (1 + n) / (10 + n) with the number n of updates, up to `decay`, so that early values are
    forgotten. The averages are float32: in bfloat16, updates of one ten-thousandth would be rounded away.

    Args:
        parameters: what is averaged; always given in the same order.
        decay: from 0 to below 1.
        read: gives a parameter's value in float32.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, read: Reader = full_precision) -> None:
        self.decay, self.read = decay, read
        self.updates = 0
        self.shadows = [read(p).clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the parameters' present values into the averages."""
        self.updates += 1
        count = self.updates - 1
        decay = min(self.decay, (1 + count) / (10 + count)) if count > 0 else 0.0
        for shadow, parameter in zip(self.shadows, parameters, strict=True):
            shadow.sub_((1 - decay) * (shadow - self.read(parameter)))

    @torch.no_grad()
    def copy_to(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the averages in the parameters' place."""
        for shadow, parameter in zip(self.shadows, parameters, strict=True):
            parameter.copy_(shadow.to(parameter.dtype))

    @contextmanager
    def in_place_of(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """The averages in the parameters' place for as long as the context lasts."""
        kept = [p.detach().cpu().clone() for p in parameters]
        self.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for value, parameter in zip(kept, parameters, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, with the names that diffusers' EMAModel uses."""
        return {"decay": self.decay, "optimization_step": self.updates, "shadow_params": self.shadows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` (or diffusers' EMAModel) gave."""
        self.updates = int(state["optimization_step"])
        for shadow, saved in zip(self.shadows, state["shadow_params"], strict=True):
            shadow.copy_(saved)
