"""A tile's text by hand: shares by counted positions of a fine raster, repeated to one length, added up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from faithdiff_core.tiling.grid import Tile
from faithdiff_core.tiling.layout import Box

FINE = 20000
"""Counted positions along a latent position."""

Text = tuple[Tensor, Tensor]
"""Embeddings, (1, tokens, width), and pooled ones."""


def text_by_hand(
    boxes: Sequence[Box], parts: Sequence[Text], whole: Text, tile: Tile, size: tuple[int, int], mix: float
) -> Text:
    """What a tile is told.

    Args:
        boxes, parts: of the image's parts.
        whole: of the whole image.
        size: (height, width) of the latent.
        mix: share of the parts' texts.
    """
    areas = [
        _inside(tile.top, tile.height, size[0], top, bottom) * _inside(tile.left, tile.width, size[1], left, right)
        for top, left, bottom, right in boxes
    ]
    shares = [area / sum(areas) for area in areas]
    longest = max(text[0].shape[1] for text, share in zip((whole, *parts), (1, *shares), strict=True) if share)

    def longer(text: Tensor) -> Tensor:
        return torch.cat([text] * (longest // text.shape[1]), dim=1)

    embeds, pooled = longer(whole[0]) * (1 - mix), whole[1] * (1 - mix)
    for share, (part, part_pooled) in zip(shares, parts, strict=True):
        if share:
            embeds, pooled = embeds + longer(part) * (mix * share), pooled + part_pooled * (mix * share)
    return embeds, pooled


@cache
def _inside(start: int, length: int, whole: int, first: float, last: float) -> float:
    """How many fine positions of a side of a tile lie in a side of a part."""
    positions = (torch.arange(length * FINE) + 0.5) / FINE + start
    return float(((positions >= first * whole) & (positions < last * whole)).sum())
