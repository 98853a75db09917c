"""Recording the cross-attention of U-Net calls.

As in the published tool, the map of each layer, head and token is enlarged to the size of what the U-Net call sees
(bicubic) and clamped at 0, and all of them are averaged; the coarsest layers, at an eighth of the latent's sides, are
left out. Each layer's maps are added as soon as its queries and keys are known, in parts, so none of them is kept.

Queries and keys are taken from the outputs of the layers `to_q` and `to_k`, which U-Nets of diffusers and of hosts have
alike. So LoRAs are in them, and other patches of the attention do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..tiling.grid import Tile
from .head_maps import head_sums
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
    """One U-Net call."""

    def __init__(self, rows: Sequence[RecordedRow], batch: int) -> None:
        self.rows, self.batch = rows, batch
        # A layer's size by its number of queries; each level halves the sides, rounding up.
        self.sizes: dict[int, tuple[int, int, int]] = {}
        height, width = rows[0].tile.height, rows[0].tile.width
        for factor in _FACTORS:
            self.sizes.setdefault(height * width, (height, width, factor))
            height, width = -(-height // 2), -(-width // 2)
        self.heads = 0
        self.pending: dict[int, Tensor] = {}


class CrossAttentionRecorder:
    """Records the cross-attention of a sampling run.

    Use: `begin` for a run, `watching` around it, and `call` around each U-Net call. Only calls within `call` are
    recorded. One run at a time.

    Args:
        memory: bytes that a recording may take, without which it is stored more coarsely; see `TokenMaps`. Half of it
            is for the maps, a quarter for a layer's heads.

    Attributes:
        maps: what was recorded; None before the first call of a run.
    """

    def __init__(self, memory: int = DEFAULT_MEMORY) -> None:
        if memory < 2**20:
            raise SettingsError(f"The memory for attribution must be at least 1 MiB, got {memory} bytes.")
        self.memory = memory
        self.maps: TokenMaps | None = None
        self._tokens = 0
        self._gaps = False
        self._call: _Call | None = None

    def begin(self, tokens: int, *, gaps: bool = False) -> None:
        """Forget an earlier run.

        Args:
            tokens: of the longest prompt of the coming run.
            gaps: parts of the latents are not sampled in the coming run; their attention counts as 0.
        """
        self.maps, self._tokens, self._gaps = None, tokens, gaps

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
        """Record the U-Net call within the context; one that raises ends the recording: nothing of it is left.

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
        if self.maps is None:
            self.maps = TokenMaps(
                images, self._tokens, *latent, memory=self.memory // 2, device=device, gaps=self._gaps
            )
        if max(row.tokens for row in rows) > self._tokens or (self.maps.height, self.maps.width) != latent:
            raise SettingsError("Attribution: the prompt or the latent changed its length or size within a run.")
        self._call = call = _Call(rows, batch)
        try:
            yield
            for row in rows if call.heads else ():  # without heads, the call was answered without the U-Net
                self.maps.add_weights(row.image, row.tile, row.weights, call.heads)
        except BaseException:
            self.maps = None  # some layers' maps are in it
            raise
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
        """Add a layer's maps; q and k are (batch, length, heads * channels)."""
        length = q.shape[1]
        if q.shape[0] != call.batch or k.shape[0] != call.batch or length not in call.sizes:
            raise SettingsError(
                f"Attribution: expected cross-attention of {call.batch} rows with one of {sorted(call.sizes)} "
                f"positions, got {tuple(q.shape[:2])}. A node changes the U-Net's sizes or rows (deep shrink, "
                f"normalized attention guidance, ...); take it out."
            )
        height, width, factor = call.sizes[length]
        if factor == LEFT_OUT:
            return
        assert self.maps is not None
        for row in call.rows:
            if k.shape[1] % row.tokens:
                raise SettingsError(
                    f"Attribution: the prompt has {row.tokens} tokens, but attention goes over {k.shape[1]}. A node "
                    f"adds tokens of its own; take it out."
                )
            tile = row.tile
            for part, values in head_sums(
                q[row.row],
                k[row.row, : row.tokens],
                heads,
                (height, width),
                (tile.height, tile.width),
                self.memory // 4,
            ):
                weights = None if row.weights is None else part.crop(row.weights)
                within = Tile(tile.top + part.top, tile.left + part.left, part.height, part.width)
                self.maps.add(row.image, within, values, weights)
        call.heads += heads
