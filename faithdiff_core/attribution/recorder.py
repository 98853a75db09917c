"""Recording the cross-attention of U-Net calls.

The published tool keeps a map for every layer and head, enlarges each (bicubic), clamps it at 0 and averages. Enlarging
is linear, so here heads and layers of one size are averaged first, within each U-Net call, and enlarged once: a
hundredth of the work, and the same but for the clamp, which acts on the average. The coarsest layers, at an eighth of
the latent's sides, are left out as there.

Queries and keys are taken from the outputs of the layers `to_q` and `to_k`, which U-Nets of diffusers and of hosts have
alike. So LoRAs are in them, and other patches of the attention do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingsError
from ..tiling.grid import Tile
from .maps import TokenMaps

DEFAULT_MEMORY = 512 * 2**20
"""Bytes that a recording may take: maps of 77 tokens for four images of 4096 px."""

LEFT_OUT = 8
"""Layers that are smaller than the latent by this factor say little about places."""

_FACTORS = (1, 2, 4, LEFT_OUT)


@dataclass(frozen=True)
class RecordedRow:
    """A row of a U-Net call whose attention is recorded.

    Attributes:
        row: its index in the call's batch.
        image: index of its image.
        tile: the part of the latent that it sees.
        tokens: of its prompt. Keys beyond these repeat them, as hosts do to bring prompts to one length.
        weights: merge weights of the tile, (tile.height, tile.width); None for 1 everywhere.
    """

    row: int
    image: int
    tile: Tile
    tokens: int
    weights: Tensor | None = None


class _Call:
    """The sums of one U-Net call over heads and layers, by the number of queries."""

    def __init__(self, rows: Sequence[RecordedRow], batch: int, size: tuple[int, int]) -> None:
        self.rows, self.batch = rows, batch
        self.tokens = max(row.tokens for row in rows)
        self.by_tokens = {n: [i for i, row in enumerate(rows) if row.tokens == n] for n in {r.tokens for r in rows}}
        # A layer's size by its number of queries; each level halves the sides, rounding up.
        self.sizes: dict[int, tuple[int, int, int]] = {}
        height, width = size
        for factor in _FACTORS:
            self.sizes.setdefault(height * width, (height, width, factor))
            height, width = -(-height // 2), -(-width // 2)
        self.sums: dict[int, Tensor] = {}
        self.heads = 0
        self.pending: dict[int, Tensor] = {}


class CrossAttentionRecorder:
    """Records the cross-attention of a sampling run.

    Use: `begin` for a run, `watching` around it, and `call` around each U-Net call. Only calls within `call` are
    recorded. One run at a time.

    Args:
        memory: bytes that a recording may take, without which it is stored more coarsely; see `TokenMaps`. Half of it
            is for the maps, the rest for a call's intermediate results.

    Attributes:
        maps: what was recorded; None before the first call of a run.
    """

    def __init__(self, memory: int = DEFAULT_MEMORY) -> None:
        if memory < 2**20:
            raise SettingsError(f"The memory for attribution must be at least 1 MiB, got {memory} bytes.")
        self.memory = memory
        self.maps: TokenMaps | None = None
        self._gaps = False
        self._call: _Call | None = None

    def begin(self, *, gaps: bool = False) -> None:
        """Forget an earlier run.

        Args:
            gaps: parts of the latents are not sampled in the coming run; their attention counts as 0.
        """
        self.maps, self._gaps = None, gaps

    def recorded(self) -> TokenMaps:
        """What was recorded.

        Raises:
            SettingsError: nothing was.
        """
        if self.maps is None:
            raise SettingsError(
                "No attention was recorded. Sample with the model that is recorded; a compiled one hides its attention."
            )
        return self.maps

    @contextmanager
    def watching(self, unet: nn.Module) -> Iterator[None]:
        """While the context lasts, the cross-attention layers of a U-Net tell their queries and keys.

        Raises:
            SettingsError: the U-Net has no cross-attention.
        """
        handles = []
        for name, module in unet.named_modules():
            if name.rpartition(".")[2] == "attn2" and hasattr(module, "to_q") and hasattr(module, "to_k"):
                handles.append(module.to_q.register_forward_hook(self._hook(module, is_query=True)))
                handles.append(module.to_k.register_forward_hook(self._hook(module, is_query=False)))
        if not handles:
            raise SettingsError("Attribution needs a U-Net with cross-attention, such as SDXL's; this model has none.")
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._call = None

    @contextmanager
    def call(
        self, rows: Sequence[RecordedRow], batch: int, images: int, latent: tuple[int, int], device: torch.device
    ) -> Iterator[None]:
        """Record the U-Net call within the context; one that raises leaves nothing behind.

        Args:
            rows: those to record; their tiles have one size.
            batch: rows of the call in all.
            images: number of images of the run.
            latent: (height, width) of the whole latents.
            device: of the call.

        Raises:
            SettingsError: a layer's attention does not fit the latents or the prompts, or the memory does not suffice.
        """
        if not rows:
            yield
            return
        first = rows[0].tile
        self._call = call = _Call(rows, batch, (first.height, first.width))
        if self.maps is None:
            self.maps = TokenMaps(images, call.tokens, *latent, memory=self.memory // 2, device=device, gaps=self._gaps)
        elif self.maps.sums.shape[1] < call.tokens or (self.maps.height, self.maps.width) != latent:
            raise SettingsError("Attribution: the prompt or the latent changed its length or size within a run.")
        try:
            yield
            self._merge(call, self.maps)
        finally:
            self._call = None

    def _hook(self, attention: nn.Module, *, is_query: bool) -> Callable[[nn.Module, Any, Tensor], None]:
        heads = int(attention.heads)  # type: ignore[arg-type]
        key = id(attention)

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            call = self._call
            if call is None:
                return
            other = call.pending.pop(key, None)
            if other is None:
                call.pending[key] = output
            else:
                self._add(call, *((output, other) if is_query else (other, output)), heads)

        return hook

    def _add(self, call: _Call, q: Tensor, k: Tensor, heads: int) -> None:
        """Add a layer's probabilities; q and k are (batch, length, heads * channels)."""
        length = q.shape[1]
        if q.shape[0] != call.batch or k.shape[0] != call.batch or length not in call.sizes:
            raise SettingsError(
                f"Attribution: expected cross-attention of {call.batch} rows with one of {sorted(call.sizes)} "
                f"positions, got {tuple(q.shape[:2])}. A node changes the U-Net's sizes or rows (deep shrink, "
                f"normalized attention guidance, ...); take it out."
            )
        if call.sizes[length][2] == LEFT_OUT:
            return
        if length not in call.sums:
            wanted = 4 * len(call.rows) * call.tokens * length
            if wanted > self.memory // 4:
                raise SettingsError(
                    f"Attribution: a U-Net call with {length} positions needs {4 * wanted / 2**20:.0f} MiB for its "
                    f"maps, more than the {self.memory / 2**20:.0f} MiB allowed. Allow more, or sample in "
                    f"(smaller) tiles."
                )
            call.sums[length] = torch.zeros(len(call.rows), length, call.tokens, device=q.device)
        for tokens, members in call.by_tokens.items():
            if k.shape[1] % tokens:
                raise SettingsError(
                    f"Attribution: the prompt has {tokens} tokens, but attention goes over {k.shape[1]}. A node adds "
                    f"tokens of its own; take it out."
                )
            index = [call.rows[i].row for i in members]
            added = head_sums(q[index], k[index, :tokens], heads, self.memory // 8)
            whole = len(members) == len(call.rows) and tokens == call.tokens
            if whole:
                call.sums[length] += added
            else:
                call.sums[length][members, :, :tokens] += added
        call.heads += heads

    def _merge(self, call: _Call, maps: TokenMaps) -> None:
        """Enlarge a call's sums to the latent's size and add them to the maps, some tokens at a time."""
        if not call.sums:
            return  # the call was answered without the U-Net; nothing is counted for it
        tile = call.rows[0].tile
        weights = [None if r.weights is None else r.weights.to(maps.sums.device) for r in call.rows]
        step = max(1, self.memory // 8 // (8 * len(call.rows) * tile.height * tile.width))
        for first in range(0, call.tokens, step):
            enlarged: Tensor | float = 0.0
            for length, sums in call.sums.items():
                height, width, _ = call.sizes[length]
                part = sums[:, :, first : first + step].transpose(1, 2).unflatten(2, (height, width))
                if (height, width) != (tile.height, tile.width):
                    part = F.interpolate(part, (tile.height, tile.width), mode="bicubic", align_corners=False)
                enlarged = enlarged + part
            assert isinstance(enlarged, Tensor)
            enlarged = enlarged / call.heads
            for row, of_row, weight in zip(call.rows, enlarged, weights, strict=True):
                maps.add(row.image, row.tile, of_row, first, weight)
        for row, weight in zip(call.rows, weights, strict=True):
            maps.add_weights(row.image, row.tile, weight)


def head_sums(q: Tensor, k: Tensor, heads: int, memory: int) -> Tensor:
    """softmax(q k^T / sqrt(d)), summed over heads.

    Args:
        q: (rows, queries, heads * d).
        k: (rows, tokens, heads * d).
        heads: number of them.
        memory: bytes of probabilities that may exist at once.

    Returns:
        (rows, queries, tokens), float32.
    """
    rows, queries, channels = q.shape
    scale = 1 / math.sqrt(channels // heads)
    keys = k.unflatten(2, (heads, -1)).permute(0, 2, 3, 1) * scale
    split = q.unflatten(2, (heads, -1)).transpose(1, 2)
    step = max(1, memory // (8 * rows * heads * k.shape[1]))
    sums = [
        torch.softmax(split[:, :, first : first + step] @ keys, dim=-1, dtype=torch.float32).sum(dim=1)
        for first in range(0, queries, step)
    ]
    return sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)
