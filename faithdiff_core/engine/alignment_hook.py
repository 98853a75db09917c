"""The alignment as a forward hook on a diffusers U-Net."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..models.alignment import Alignment


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
