"""What the engine takes: settings, images, texts and seeds, checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..backbone import TRAIN_STEPS
from ..errors import SettingsError
from ..images.color import ColorFix
from ..images.hdr import MAX_HDR
from ..images.sizes import target_size
from ..models.lq_encoder import ENCODER_OVERLAP, ENCODER_TILE
from ..sampling.schedule import DEFAULT_CFG, DEFAULT_STEPS, StartPoint
from ..tiling.grid import MIN_TILE, TILE_OVERLAP, TILE_SIZE
from ..tiling.moving import MOVING_OVERLAP, TileGridKind
from .description import choice, described, factor, overlap_fraction, plain, real, tile_side, whole
from .long_prompts import LongPrompt

DEFAULT_SCALE = 2.0
"""Enlargement of the published code."""

MAX_CFG = 20.0
"""Largest guidance scale; output quality degrades well below it."""

MAX_PASSES = 8
"""Most enlargements in a row; more make the result no better."""

LARGEST_HOST_TILE = 16384
"""Largest tile side that nodes offer, in pixels; their inputs need a limit, the engine does not."""


@dataclass(frozen=True)
class RestoreSettings:
    """How images are restored; the defaults are the published ones.

    This is the one description of the settings: `FaithDiffPipeline` takes them by these names, and the options of the
    command line, the inputs of the nodes and a result's metadata are made from it.

    Attributes:
        size: (height, width) of the result in pixels. Defaults to None: `scale` decides.
        scale: factor on both sides, above 0.
        steps: sampling steps, 1 to 1000.
        cfg: guidance scale, 1 (no guidance, half the work) to 20. Nodes allow 0 to 100, as their host does everywhere.
        start: what sampling starts from, `lr` or `noise`.
        color_fix: `adain`, `wavelet` or `none`.
        tile, overlap: side of the sampler's tiles in pixels, and the fraction of it that neighbours share, 0 to 0.9.
        tile_batch: tiles in one U-Net call, those of several images counted together. More is faster where
            there is memory, and changes no result. In nodes, 0 stands for as many as fit.
        encoder_tile, encoder_overlap: the same for the LQ encoder's tiles; None encodes in one piece.
        tile_grid: `fixed` as published, or `moving`: the sampler's tiles lie at other places in every step, and an
            overlap of 0.125 suffices.
        vae_tile: tile side of the VAE in pixels; images no larger, and all with None, go through in one piece.
        strength: factor on what the LQ image adds to the U-Net; 0 is the U-Net alone.
        long_prompt: prompts of more than 75 tokens are encoded in `chunks`, as hosts do, or `cut`, as published.
        hdr: the published demo's HDR effect on the input, 0 (off) to 2; with several passes on the first one's.
        passes: the enlargement is made in this many equal parts, each a whole restoration (4x = 2x, then 2x).

    Raises:
        SettingsError: a value is out of range.
    """

    size: tuple[int, int] | None = None
    scale: float = factor(DEFAULT_SCALE, "enlargement of both sides", group="size", host_range=(0.05, 16.0))
    steps: int = whole(DEFAULT_STEPS, "sampling steps, 1 to 1000", maximum=TRAIN_STEPS, group="method")
    cfg: float = real(
        DEFAULT_CFG,
        "guidance scale, 1 (off) to 20",
        minimum=1.0,
        maximum=MAX_CFG,
        group="method",
        host_range=(0.0, 100.0),
    )
    start: StartPoint | str = choice(  # noqa: RUF009
        StartPoint.LR, "what sampling starts from: lr is noise with a trace of the input", group="method"
    )
    color_fix: ColorFix | str = choice(  # noqa: RUF009
        ColorFix.ADAIN, "colour correction towards the input", group="method"
    )
    tile: int = tile_side(TILE_SIZE, "side of a tile, a multiple of 8", host_range=(MIN_TILE, LARGEST_HOST_TILE))
    overlap: float = overlap_fraction(TILE_OVERLAP, "fraction of a tile, 0 to 0.9")
    tile_batch: int = whole(1, "tiles in one U-Net call", group="tiles", host_range=(0, 64), host_default=0)
    encoder_tile: int | None = tile_side(
        ENCODER_TILE, "side of the LQ encoder's tiles", optional=True, host_range=(MIN_TILE, LARGEST_HOST_TILE)
    )
    encoder_overlap: float = overlap_fraction(ENCODER_OVERLAP, "overlap of the LQ encoder's tiles")
    vae_tile: int | None = tile_side(
        TILE_SIZE, "side of the VAE's tiles", optional=True, host_range=(MIN_TILE, LARGEST_HOST_TILE)
    )
    strength: float = real(
        1.0, "LQ conditioning strength; 0 disables it", minimum=0.0, group="method", host_range=(0.0, 10.0)
    )
    passes: int = whole(1, "reach the size in N equal enlargements, 1 to 8", maximum=MAX_PASSES, group="method")
    tile_grid: TileGridKind | str = choice(  # noqa: RUF009
        TileGridKind.FIXED,
        f"moving: tiles move from step to step, and --overlap {MOVING_OVERLAP:g} suffices, for half the time",
        group="tiles",
    )
    long_prompt: LongPrompt | str = choice(  # noqa: RUF009
        LongPrompt.CHUNKS, "prompts of more than 75 tokens; cut is as published", group="method"
    )
    hdr: float = real(0.0, "contrast in dark and bright parts of the input, 0 to 2", maximum=MAX_HDR, group="method")

    def __post_init__(self) -> None:
        for name, what in described(self).items():
            # The class is frozen for its users; here its values are brought into their one form.
            object.__setattr__(self, name, what.check(getattr(self, name), what=name))
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise SettingsError(f"size must be (height, width) in pixels, got {self.size}.")

    def changed(self, **changes: Any) -> RestoreSettings:
        """The same settings with some replaced.

        Raises:
            TypeError: there is no setting of a name; the text names all.
            SettingsError: a value is out of range.
        """
        names = [item.name for item in fields(self)]
        unknown = sorted(changes.keys() - set(names))
        if unknown:
            raise TypeError(f"There is no setting {', '.join(unknown)}; there are {', '.join(names)}.")
        return replace(self, **changes)

    def method(self) -> dict[str, Any]:
        """All settings but the size as plain data, for a result's metadata."""
        return {name: plain(getattr(self, name)) for name in described(self) if name != "scale"}

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
