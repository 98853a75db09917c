"""Text embeddings of a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingsError


@dataclass(frozen=True)
class TextConditioning:
    """The text's embeddings, one row for each image.

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
        """The same with one row for each of `batch` images, on a device and in a dtype.

        Raises:
            SettingsError: neither one row nor one for each image, or no negative text where guidance needs it.
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

    def select(self, images: Sequence[int]) -> TextConditioning:
        """The rows of some images; a text of one row serves all."""

        def pick(x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 else x[list(images)]

        return TextConditioning(
            pick(self.embeds),
            pick(self.pooled),
            None if self.negative_embeds is None else pick(self.negative_embeds),
            None if self.negative_pooled is None else pick(self.negative_pooled),
        )

    def guided_rows(self, images: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Embeddings and pooled embeddings for a U-Net call: all negative rows first, where there are any."""
        index = list(images)
        if self.negative_embeds is None or self.negative_pooled is None:
            return self.embeds[index], self.pooled[index]
        return (
            torch.cat([self.negative_embeds[index], self.embeds[index]]),
            torch.cat([self.negative_pooled[index], self.pooled[index]]),
        )
