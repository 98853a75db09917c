"""Maps of single attention heads, enlarged to the latent's size and clamped at 0, in parts that fit a given memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingsError
from ..tiling.grid import Tile

_LARGEST, _SMALLEST = 128, 8
"""Sides of the parts that are enlarged at once, in latent units."""

_REACH = 3
"""Positions of the smaller map beyond a part that its enlargement needs: bicubic takes two, and one for rounding."""


@lru_cache(maxsize=64)
def enlargement(small: int, large: int, device: torch.device) -> Tensor:
    """Bicubic enlarging along one side as a matrix, (large, small): torch's own, of the identity."""
    unit = torch.eye(small)[None, :, :, None]
    one_side = F.interpolate(unit, (large, 1), mode="bicubic", align_corners=False)
    return one_side[0, :, :, 0].T.contiguous().to(device)


def head_sums(
    q: Tensor, k: Tensor, heads: int, size: tuple[int, int], target: tuple[int, int], memory: int
) -> Iterator[tuple[Tile, Tensor]]:
    """softmax(q k^T / sqrt(d)) of each head, enlarged (bicubic), clamped at 0, and summed over the heads.

    Args:
        q: of one row, (height * width, heads * d).
        k: of the same row, (tokens, heads * d).
        heads: number of them.
        size: (height, width) of the layer.
        target: (height, width) of the maps.
        memory: bytes that may be taken at once.

    Yields:
        Parts of the maps, which cover them once: where they lie, and their values, (tokens, height, width), float32.

    Raises:
        SettingsError: the memory does not suffice for the smallest part.
    """
    tokens, channels = k.shape
    keys = k.unflatten(1, (heads, -1)).permute(1, 2, 0) * (1 / math.sqrt(channels // heads))
    queries = q.unflatten(0, size).unflatten(2, (heads, -1)).permute(2, 0, 1, 3)
    side, at_once = _part(tokens, heads, memory)
    for rows in _spans(target[0], side):
        for columns in _spans(target[1], side):
            y, vertical = _enlarged_span(rows, size[0], target[0], q.device)
            x, horizontal = _enlarged_span(columns, size[1], target[1], q.device)
            part = queries[:, y, x].flatten(1, 2)
            total: Tensor | None = None
            for first in range(0, heads, at_once):
                some = slice(first, first + at_once)
                maps = torch.softmax(part[some] @ keys[some], dim=-1, dtype=torch.float32)
                maps = _enlarge(maps, vertical, horizontal, (y.stop - y.start, x.stop - x.start))
                total = maps.sum(0) if total is None else total.add_(maps.sum(0))
            assert total is not None
            place = Tile(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
            yield place, total.permute(2, 0, 1)


def _enlarge(maps: Tensor, vertical: Tensor | None, horizontal: Tensor | None, size: tuple[int, int]) -> Tensor:
    """(heads, h * w, tokens) enlarged and clamped at 0, (heads, rows, columns, tokens); None along a side of full size.

    Tokens stay the last axis, so that both sides are products of plain matrices and nothing is transposed.
    """
    if vertical is None and horizontal is None:
        return maps.unflatten(1, size)
    heads, _, tokens = maps.shape
    maps = maps.view(heads, size[0], -1)
    if vertical is not None:
        maps = vertical @ maps
    rows = maps.shape[1]
    maps = maps.view(heads * rows, size[1], tokens)
    if horizontal is not None:
        maps = horizontal @ maps
    return maps.clamp_(min=0).unflatten(0, (heads, rows))


def _spans(length: int, side: int) -> Iterator[slice]:
    for start in range(0, length, side):
        yield slice(start, min(start + side, length))


def _enlarged_span(span: slice, small: int, large: int, device: torch.device) -> tuple[slice, Tensor | None]:
    """The positions of a side's smaller map that a part of the larger one needs, and their enlargement to it."""
    if small == large:
        return span, None
    first = max(0, span.start * small // large - _REACH)
    last = min(small, -(-span.stop * small // large) + _REACH)
    return slice(first, last), enlargement(small, large, device)[span, first:last]


def _part(tokens: int, heads: int, memory: int) -> tuple[int, int]:
    """Side of the parts, and number of heads at once.

    Raises:
        SettingsError: the memory does not suffice.
    """
    side = _LARGEST
    while _bytes(tokens, side) > memory:
        side //= 2
        if side < _SMALLEST:
            raise SettingsError(
                f"Attribution maps of {tokens} tokens need at least {4 * _bytes(tokens, _SMALLEST) / 2**20:.1f} MiB, "
                f"more than the {4 * memory / 2**20:.1f} MiB allowed."
            )
    return side, min(heads, memory // _bytes(tokens, side))


def _bytes(tokens: int, side: int) -> int:
    """An upper bound of what a head takes: its logits and probabilities at half the size, and both enlargements."""
    return 16 * tokens * (side + _REACH) ** 2
