"""Texts for parts of an image: what a tile of the sampler is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingsError
from ..tiling.grid import Tile
from ..tiling.layout import TileLayout

TILE_MIX = 0.7
"""Default share of the parts' texts; the rest is the whole image's, which keeps tiles in one style."""


@dataclass(frozen=True, eq=False)
class TileTexts:
    """The encoded texts of an image's parts.

    Attributes:
        layout: where the parts are.
        embeds: of each part, (1, tokens, width).
        pooled: of each part, (1, pooled width), or None where the model takes none.
        mix: share of the parts' texts, 0 to 1; the rest is the whole image's.
    """

    layout: TileLayout
    embeds: tuple[Tensor, ...]
    pooled: tuple[Tensor | None, ...]
    mix: float = TILE_MIX

    def __post_init__(self) -> None:
        count = len(self.layout.boxes)
        if len(self.embeds) != count or len(self.pooled) != count:
            raise SettingsError(f"There are {len(self.embeds)} texts for {count} parts; give one for each, in order.")
        if not 0.0 <= self.mix <= 1.0:
            raise SettingsError(f"mix must lie between 0 and 1, got {self.mix}.")

    def for_tile(
        self, tile: Tile, height: int, width: int, embeds: Tensor, pooled: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The text of a tile: the parts that it overlaps, mixed by area, beside the whole image's.

        Embeddings are mixed, as for a blend of prompts, so a tile costs what it did. Texts of several lengths are
        repeated to one that all divide: attention over tokens that are there twice is the same.

        Args:
            tile: a part of a latent.
            height, width: of the whole latent.
            embeds: of the whole image's text, (B, tokens, width).
            pooled: (B, pooled width), or None.

        Returns:
            Both, on the device and in the dtype of the whole image's.
        """
        if self.mix == 0.0:
            return embeds, pooled
        acting = [(i, share) for i, share in enumerate(self.layout.shares(tile, height, width)) if share > 0]
        weights = [1.0 - self.mix, *(self.mix * share for _, share in acting)]
        mixed = _weighted([embeds, *(self.embeds[i] for i, _ in acting)], weights)
        parts = [self.pooled[i] for i, _ in acting]
        if pooled is None or any(part is None for part in parts):
            return mixed, pooled
        return mixed, _weighted([pooled, *(part for part in parts if part is not None)], weights)


def same_length(embeds: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings of one length: each is repeated as a whole, which leaves attention over it as it is."""
    length = math.lcm(*(x.shape[1] for x in embeds))
    return [x.repeat(1, length // x.shape[1], 1) for x in embeds]


def _weighted(texts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of texts, (B, ..., width); those that count for nothing are left out."""
    first = texts[0]
    used = [(text, weight) for text, weight in zip(texts, weights, strict=True) if weight]
    same = same_length([text for text, _ in used]) if first.ndim == 3 else [text for text, _ in used]
    total = torch.zeros((), device=first.device)
    for text, (_, weight) in zip(same, used, strict=True):
        total = total + text.to(first.device, torch.float32) * weight
    return total.to(first.dtype).expand(first.shape[0], *total.shape[1:])
