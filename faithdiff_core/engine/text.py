"""Text embeddings of a batch of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..captions.tile_texts import TileTexts, same_length
from ..errors import SettingsError
from ..tiling.grid import Tile, TileGrid


@dataclass(frozen=True)
class TextConditioning:
    """The text's embeddings, one row for each image.

    Attributes:
        embeds: (B, tokens, width) of the prompts.
        pooled: (B, pooled width) of the prompts; None for a backbone that takes none.
        negative_embeds, negative_pooled: the same of the negative prompts; needed for guidance (cfg above 1).
        tiles: texts of the images' parts, one for each image or one for all, or None: what the prompts of tiles are
            mixed with. Without tiles they have no effect.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    negative_embeds: Tensor | None = None
    negative_pooled: Tensor | None = None
    tiles: tuple[TileTexts | None, ...] | None = field(default=None, kw_only=True)

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

        tiles = self.tiles
        if tiles is not None:
            if len(tiles) not in (1, batch):
                raise SettingsError(f"Texts of tiles: expected 1 or {batch}, one for each image, got {len(tiles)}.")
            tiles = tiles if len(tiles) == batch else tiles * batch
        return replace(self._each(lambda x, negative: fit(x) if guided or not negative else None), tiles=tiles)

    def select(self, images: Sequence[int]) -> TextConditioning:
        """The rows of some images; a text of one row serves all."""

        tiles = self.tiles
        if tiles is not None and len(tiles) > 1:
            tiles = tuple(tiles[i] for i in images)
        return replace(self._each(lambda x, _: x if x is None or x.shape[0] == 1 else x[list(images)]), tiles=tiles)

    def _each(self, change: Callable[[Tensor | None, bool], Tensor | None]) -> TextConditioning:
        """The same with each tensor changed; the second argument tells whether it is of the negative prompts."""
        embeds = change(self.embeds, False)
        assert embeds is not None
        return TextConditioning(
            embeds,
            change(self.pooled, False),
            change(self.negative_embeds, True),
            change(self.negative_pooled, True),
            tiles=self.tiles,
        )

    def guided_rows(
        self, places: Sequence[tuple[int, Tile]], grids: Sequence[TileGrid]
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings and pooled embeddings for a U-Net call: all negative rows first, where there are any.

        Args:
            places: image and tile of each row.
            grids: of each image, in this step.
        """
        index = [image for image, _ in places]
        embeds, pooled = self.embeds[index], None if self.pooled is None else self.pooled[index]
        if self.tiles is not None:
            own = [self._of_tile(image, tile, grids[image]) for image, tile in places]
            embeds = torch.cat(same_length([text for text, _ in own]))
            pooled = None if pooled is None else torch.cat([vector for _, vector in own if vector is not None])
        if self.negative_embeds is None:
            return embeds, pooled
        embeds = torch.cat(same_length([self.negative_embeds[index], embeds]))
        if pooled is None:
            return embeds, None
        assert self.negative_pooled is not None
        return embeds, torch.cat([self.negative_pooled[index], pooled])

    def _of_tile(self, image: int, tile: Tile, grid: TileGrid) -> tuple[Tensor, Tensor | None]:
        """The text of one image's tile, one row; that of the whole image where it is the only tile."""
        row = slice(image, image + 1)
        embeds, pooled = self.embeds[row], None if self.pooled is None else self.pooled[row]
        texts = None if self.tiles is None else self.tiles[image]
        if texts is None or len(grid) == 1:
            return embeds, pooled
        return texts.for_tile(tile, grid.height, grid.width, embeds, pooled)
