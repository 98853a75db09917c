"""Attention maps of the tokens of a prompt over whole latents, summed over steps and tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingsError
from ..tiling.grid import Tile

COARSEST = 64
"""Largest factor by which maps are kept smaller than the latent."""


class TokenMaps:
    """For each image and token, the mean of its attention at every position of the latent.

    Tiles add their maps with their merge weights, and the sums are divided by the sum of the weights, so that every
    position counts each of its steps once, whatever the tiles of a step are.

    Args:
        images, tokens: numbers of them.
        height, width: of the latents.
        memory: bytes that the maps may take. If maps of the latent's size need more, each position stands for the mean
            over 2 x 2, 4 x 4, ... of the latent's.
        device: where they are kept.
        gaps: parts of the images are not sampled; their attention counts as 0.

    Raises:
        SettingsError: they do not fit even then.
    """

    def __init__(
        self,
        images: int,
        tokens: int,
        height: int,
        width: int,
        *,
        memory: int,
        device: torch.device | str = "cpu",
        gaps: bool = False,
    ) -> None:
        self.height, self.width, self.gaps = height, width, gaps
        self.factor = 1
        while self._bytes(images, tokens) > memory:
            self.factor *= 2
            if self.factor > COARSEST:
                raise SettingsError(
                    f"Attribution maps of {tokens} tokens for {images} latents of {width} x {height} need at least "
                    f"{self._bytes(images, tokens) / 2**20:.1f} MiB, more than the {memory / 2**20:.1f} MiB allowed."
                )
        rows, columns = -(-height // self.factor), -(-width // self.factor)
        self.sums = torch.zeros(images, tokens, rows, columns, device=device)
        self.weights = torch.zeros(images, rows, columns, device=device)

    def _bytes(self, images: int, tokens: int) -> int:
        return 4 * images * (tokens + 1) * -(-self.height // self.factor) * -(-self.width // self.factor)

    def add(self, image: int, tile: Tile, maps: Tensor, weights: Tensor | None = None) -> None:
        """Add maps of the first tokens, which may be sums of several.

        Args:
            image: index of the image.
            tile: where they lie.
            maps: (tokens, tile.height, tile.width).
            weights: merge weights of the tile, (tile.height, tile.width). Default to 1.
        """
        weighted = maps if weights is None else maps * weights.to(maps)
        self._add_pooled(self.sums[image, : len(maps)], tile, weighted)

    def add_weights(self, image: int, tile: Tile, weights: Tensor | None = None, count: int = 1) -> None:
        """Count a tile whose maps have been added, as often as they are sums of; once for all tokens."""
        if weights is None:
            weights = self.sums.new_ones(tile.height, tile.width)
        self._add_pooled(self.weights[image][None], tile, weights[None] * count)

    def _add_pooled(self, sums: Tensor, tile: Tile, values: Tensor) -> None:
        """Add (n, tile.height, tile.width) to (n, rows, columns), each of which is the sum over factor x factor."""
        f = self.factor
        values = values.to(sums)
        if f > 1:
            before_y, before_x = tile.top % f, tile.left % f
            after_y, after_x = -(tile.top + tile.height) % f, -(tile.left + tile.width) % f
            padded = F.pad(values, (before_x, after_x, before_y, after_y))
            values = F.avg_pool2d(padded[None], f)[0] * f**2
        top, left = tile.top // f, tile.left // f
        sums[:, top : top + values.shape[-2], left : left + values.shape[-1]] += values

    def mean(self, positions: Sequence[int]) -> Tensor:
        """The mean over some tokens, (images, height, width) of the latents.

        Raises:
            SettingsError: nothing was recorded for a part of an image.
        """
        nowhere = self.weights <= 0
        if not self.gaps and bool(nowhere.any()):
            raise SettingsError(
                "No attention was recorded for a part of the image. A node that answers U-Net calls from a cache, or "
                "a compiled model, hides the attention; take it out."
            )
        maps = self.sums[:, list(positions)].mean(dim=1) / self.weights.masked_fill(nowhere, 1.0)
        if self.factor == 1:
            return maps
        # Bicubic enlarging overshoots; attention is never negative.
        whole = (maps.shape[-2] * self.factor, maps.shape[-1] * self.factor)
        large = F.interpolate(maps[:, None], whole, mode="bicubic", align_corners=False)[:, 0].clamp_(0)
        return large[:, : self.height, : self.width]
