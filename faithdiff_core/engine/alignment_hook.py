"""The alignment as a forward hook on a diffusers U-Net."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..models.alignment import Alignment


class AlignmentHook:
    """Joins the alignment to a U-Net: a forward hook on `conv_in` replaces its output by the aligned one.

    Attributes:
        condition: the embedded condition of the coming U-Net call, one row for each latent; a call may hold several
            copies of the latents (the guidance halves), one after the other.
    """

    def __init__(self, alignment: Alignment, strength: float) -> None:
        self.alignment = alignment
        self.strength = strength
        self.condition: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> Tensor:
        assert self.condition is not None
        aligned: Tensor = self.alignment(h, self.condition, self.strength, h.shape[0] // self.condition.shape[0])
        return aligned

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
