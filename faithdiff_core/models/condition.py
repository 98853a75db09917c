"""The embedded LQ condition of tiles, kept across sampling steps.

A tile's condition depends on the LQ image alone, so one embedding serves all steps. Images of many tiles would fill
the memory with them; conditions over the budget are recomputed each time they are needed, which costs about a percent
of a U-Net call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ..tiling.grid import Tile
from .alignment import Alignment


class ConditionCache:
    """Keeps tensors by key until a budget is full.

    Nothing is ever thrown out for something else: tiles come round in the same order at every step, and replacing the
    oldest would then throw out each one just before it is needed.

    Args:
        budget_bytes: how much may be kept; 0 keeps nothing.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._kept: dict[Hashable, Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor of `key`: kept, or computed and kept if it fits.

        Args:
            key: everything the result depends on.
            compute: makes the tensor.
        """
        kept = self._kept.get(key)
        if kept is None:
            kept = compute()
            size = kept.numel() * kept.element_size()
            if self.used_bytes + size <= self.budget_bytes:
                self._kept[key] = kept
                self.used_bytes += size
        return kept

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.used_bytes = 0


class ConditionEmbedder:
    """Crops LQ features to tiles, embeds the crops, and keeps the results within a budget.

    Each tile of each image is embedded by itself, so its condition does not depend on what is batched with it. Every
    device has its own budget; threads may share an embedder if each computes on its own device.

    Args:
        alignment: whose condition embedding is used; its weights must not change while results are kept.
        budget: bytes that may be kept on a device, or a function that tells them for a device.
    """

    def __init__(self, alignment: Alignment, budget: int | Callable[[torch.device], int]) -> None:
        self.alignment = alignment
        self._budget = budget
        self._caches: dict[torch.device, ConditionCache] = {}
        self._grids: dict[torch.device, Hashable] = {}

    def __call__(
        self, features: Tensor, places: Sequence[tuple[int, Tile]], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Embed the features at some places.

        Args:
            features: of whole images, (B, C, h, w), on any device. What is kept belongs to this very tensor, which
                must not be changed in place.
            places: index of the image, and the part of it in latent units; one for each row of the result.
            device, dtype: of the result.

        Returns:
            The conditions, (places, condition channels, tile height, tile width).
        """
        cache = self._caches.get(device)
        if cache is None:
            budget = self._budget if isinstance(self._budget, int) else self._budget(device)
            cache = self._caches[device] = ConditionCache(budget)

        def embedded(image: int, tile: Tile) -> Tensor:
            def embed() -> Tensor:
                crop = tile.crop(features[image : image + 1])
                return self.alignment.embed(crop.to(device=device, dtype=dtype))

            # A tensor as a key is compared by identity, and lives as long as what was made of it.
            return cache.get((features, image, tile.top, tile.left, tile.height, tile.width, dtype), embed)

        conditions = [embedded(image, tile) for image, tile in places]
        return conditions[0] if len(conditions) == 1 else torch.cat(conditions)

    def keep_for(self, grid: Hashable, device: torch.device) -> None:
        """Forget a device's conditions if the tiles have moved: those of another grid would fill the budget unused.

        Args:
            grid: where the tiles of the coming calls lie.
            device: of the coming calls.
        """
        if self._grids.get(device) != grid:
            self._caches.pop(device, None)
            self._grids[device] = grid

    def clear(self) -> None:
        """Forget all conditions, on all devices."""
        self._caches.clear()
        self._grids.clear()
