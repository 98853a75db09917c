"""What the engine takes: settings, images, texts and seeds, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SettingsError
from ..images.color import ColorFix
from ..images.geometry import target_size
from ..models.lq_encoder import ENCODER_OVERLAP, ENCODER_TILE
from ..sampling.schedule import DEFAULT_CFG, DEFAULT_STEPS, StartPoint, leading_timesteps
from ..tiling.grid import TILE_OVERLAP, TILE_SIZE, check_overlap, check_tile_size

DEFAULT_SCALE = 2.0
"""Enlargement of the published code."""

MAX_CFG = 20.0
"""Largest guidance scale taken; results are long spoilt by then."""


@dataclass(frozen=True)
class RestoreSettings:
    """How images are restored; the defaults are the published ones.

    Attributes:
        size: (height, width) of the result in pixels; `scale` counts without it.
        scale: factor on both sides.
        steps: sampling steps, 1 to 1000.
        cfg: guidance scale, 1 (no guidance, half the work) to 20.
        start: what sampling starts from, `lr` or `noise`.
        color_fix: `adain`, `wavelet` or `none`.
        tile, overlap: side of the sampler's tiles in pixels, and the part of it that neighbours share, 0 to 0.9.
        tile_batch: tiles in one U-Net call, those of several images counted together. More is faster where
            there is memory, and changes no result.
        encoder_tile, encoder_overlap: the same for the LQ encoder's tiles; None encodes in one piece.
        vae_tile: tile side of the VAE in pixels; images no larger, and all with None, go through in one piece.
        strength: factor on what the LQ image adds to the U-Net; 0 is the U-Net alone.
        passes: the enlargement is made in so many equal parts, each a restoration of its own (4x = 2x, then 2x).

    Raises:
        SettingsError: a value out of range.
    """

    size: tuple[int, int] | None = None
    scale: float = DEFAULT_SCALE
    steps: int = DEFAULT_STEPS
    cfg: float = DEFAULT_CFG
    start: StartPoint | str = StartPoint.LR
    color_fix: ColorFix | str = ColorFix.ADAIN
    tile: int = TILE_SIZE
    overlap: float = TILE_OVERLAP
    tile_batch: int = 1
    encoder_tile: int | None = ENCODER_TILE
    encoder_overlap: float = ENCODER_OVERLAP
    vae_tile: int | None = TILE_SIZE
    strength: float = 1.0
    passes: int = 1

    def __post_init__(self) -> None:
        leading_timesteps(self.steps)
        if not 1.0 <= self.cfg <= MAX_CFG:
            raise SettingsError(f"cfg must lie between 1 and {MAX_CFG:g}, got {self.cfg}.")
        for name, choices in (("start", StartPoint), ("color_fix", ColorFix)):
            if getattr(self, name) not in [choice.value for choice in choices]:
                raise SettingsError(
                    f"{name} must be one of {[choice.value for choice in choices]}, got {getattr(self, name)!r}."
                )
        check_tile_size(self.tile)
        check_overlap(self.overlap)
        if self.encoder_tile is not None:
            check_tile_size(self.encoder_tile, what="encoder_tile")
        check_overlap(self.encoder_overlap, what="encoder_overlap")
        if self.vae_tile is not None:
            check_tile_size(self.vae_tile, what="vae_tile")
        for name in ("tile_batch", "passes"):
            if int(getattr(self, name)) != getattr(self, name) or getattr(self, name) < 1:
                raise SettingsError(f"{name} must be a whole number from 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise SettingsError(f"strength must be 0 or more, got {self.strength}.")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise SettingsError(f"size must be (height, width) in pixels, got {self.size}.")

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Size after each pass, (height, width), for an image of the given size; equal factors but for rounding."""
        last = self.size or target_size(height, width, scale=self.scale)
        return [
            (
                max(1, round(height * (last[0] / height) ** (done / self.passes))),
                max(1, round(width * (last[1] / width) ** (done / self.passes))),
            )
            for done in range(1, self.passes)
        ] + [last]


def as_list(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    whole = isinstance(images, Tensor)
    tensors = list(images)
    ndim = 4 if whole else 3
    shapes = [tuple(images.shape)] if isinstance(images, Tensor) else [tuple(p.shape) for p in tensors]
    if not tensors or any(len(s) != ndim or s[-3] != 3 or min(s) < 1 for s in shapes):
        raise SettingsError(
            f"images must be RGB, a tensor (batch, 3, height, width) or a list of (3, height, width), got {shapes}."
        )
    if not all(p.is_floating_point() for p in tensors):
        raise SettingsError(f"images must be floating point in [0, 1], got {tensors[0].dtype}; divide bytes by 255.")
    return tensors


def same_size(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of images, grouped by size."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(tensors):
        groups.setdefault(tuple(image.shape), []).append(i)
    return list(groups.values())


def one_text_each(text: str | Sequence[str], count: int, what: str) -> list[str]:
    texts = [text] * count if isinstance(text, str) else list(text)
    if len(texts) != count:
        raise SettingsError(f"{what}: expected one text or {count}, one for each image, got {len(texts)}.")
    return texts


def one_seed_each(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        return [torch.Generator().seed() for _ in range(count)]
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise SettingsError(f"seed: expected one number or {count}, one for each image, got {len(seeds)}.")
    return seeds
