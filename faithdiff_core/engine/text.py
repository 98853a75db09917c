"""Text embeddings of a batch of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingsError


@dataclass(frozen=True)
class TextConditioning:
    """The text's embeddings, one row for each image.

    Attributes:
        embeds: (B, tokens, width) of the prompts.
        pooled: (B, pooled width) of the prompts; None for a backbone that takes none.
        negative_embeds, negative_pooled: the same of the negative prompts; needed for guidance (cfg above 1).
    """

    embeds: Tensor
    pooled: Tensor | None = None
    negative_embeds: Tensor | None = None
    negative_pooled: Tensor | None = None

    @classmethod
    def of_prompts(cls, embeds: Sequence[Tensor], pooled: Sequence[Tensor | None], prompts: int) -> TextConditioning:
        """Of single texts: `prompts` prompts, then as many negative ones, or none."""

        def joined(rows: Sequence[Tensor | None]) -> Tensor | None:
            there = [row for row in rows if row is not None]
            return torch.cat(there) if there else None

        return cls(
            torch.cat(list(embeds[:prompts])),
            joined(pooled[:prompts]),
            joined(embeds[prompts:]),
            joined(pooled[prompts:]),
        )

    def rows(self, batch: int, guided: bool, device: torch.device, dtype: torch.dtype) -> TextConditioning:
        """The same with one row for each of `batch` images, on a device and in a dtype.

        Raises:
            SettingsError: neither one row nor one for each image, or no negative text where guidance needs it.
        """
        missing = self.negative_embeds is None or (self.pooled is not None and self.negative_pooled is None)
        if guided and missing:
            raise SettingsError("cfg above 1 needs both of the negative prompt's embeddings; give them or take cfg 1.")

        def fit(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            if x.shape[0] not in (1, batch):
                raise SettingsError(f"Text embeddings: expected 1 or {batch} rows, got {tuple(x.shape)}.")
            return x.to(device=device, dtype=dtype).expand(batch, *x.shape[1:])

        return self._each(lambda x, negative: fit(x) if guided or not negative else None)

    def select(self, images: Sequence[int]) -> TextConditioning:
        """The rows of some images; a text of one row serves all."""

        return self._each(lambda x, _: x if x is None or x.shape[0] == 1 else x[list(images)])

    def _each(self, change: Callable[[Tensor | None, bool], Tensor | None]) -> TextConditioning:
        """The same with each tensor changed; the second argument tells whether it is of the negative prompts."""
        embeds = change(self.embeds, False)
        assert embeds is not None
        return TextConditioning(
            embeds, change(self.pooled, False), change(self.negative_embeds, True), change(self.negative_pooled, True)
        )

    def guided_rows(self, images: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Embeddings and pooled embeddings for a U-Net call: all negative rows first, where there are any."""
        index = list(images)

        def rows(x: Tensor | None, negative: Tensor | None) -> Tensor | None:
            if x is None or self.negative_embeds is None:
                return None if x is None else x[index]
            assert negative is not None
            return torch.cat([negative[index], x[index]])

        embeds = rows(self.embeds, self.negative_embeds)
        assert embeds is not None
        return embeds, rows(self.pooled, self.negative_pooled)
