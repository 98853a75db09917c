"""Embedded conditions, kept across sampling steps.

A tile's condition depends on the LQ image alone, so one embedding serves all steps. Images of many tiles would fill
the memory with them; what does not fit a budget is embedded anew each time it is needed, which costs about a percent of
a U-Net call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor


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
