"""Decoding large latents with the SDXL VAE, in tiles that share their normalisation statistics.

Every GroupNorm of the decoder averages over the whole image. A tile that is decoded on its own uses its own averages
and so differs in tone from its neighbours; blending hides the seam, not the difference. Here all tiles use the
statistics of the whole image, and each is computed with as much surrounding as the convolutions reach, so the result
is the untiled decode up to a small error in the statistics, which is measured and held below `TOLERANCE`.

The decoder is a chain of stages (residual blocks, attention, upsampling, output), and works in two parts.

1. *Whole.* The first stages run on the whole latent, one convolution after the other, in bands of rows: their
   statistics are exact. Attention attends to all pixels, with the queries in portions. This goes on while the features
   stay small (`WHOLE_VALUES`); for SDXL that is the mid block and the lowest level.
2. *Tiles.* The remaining stages run tile by tile. They need statistics that are known only when every tile is done, so
   the statistics s are the solution of s = F(s): what the image has when it is decoded with s. A sample of small
   crops, decoded together so that it is its own exact solution, gives the first s. A pass over all tiles gives F(s).
   The sample then gives the correction: the moments of each norm in turn are F(s) plus what the sample's moments
   change by when the norms before it take their new moments. This is first order in the error of s and needs no pass
   over the image. The next pass measures what is left; the third one mostly finds nothing, and its pixels are the
   result.

The modules are only called, never changed, so nothing has to be restored when a decode is cancelled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingsError
from ..models.lq_encoder import ENCODER_OVERLAP, ENCODER_TILE, Progress
from ..tiling.grid import check_overlap, check_tile_size, tile_stride
from .decoder_stages import Attention, DecoderParts, Output, Resnet, Stage, Upsample
from .pieces import (
    Interval,
    Piece,
    SampledCrops,
    Statistics,
    _finite,
    activations_of,
    halo_of,
    not_finite,
    split_into_cores,
)
from .statistics import Moments, affine

_LOG = logging.getLogger(__name__)

WHOLE_VALUES = 24
"""Feature values per output pixel up to which stages run on the whole image: 48 bytes in half precision."""

MIN_CORE = 128
"""Smallest core of a tile in pixels; below it the surroundings cost many times what the tile itself does."""

TOLERANCE = 2e-3
"""Largest accepted error of a shared mean or standard deviation, in standard deviations of its group."""

MAX_PASSES = 6
"""Passes over all tiles after which the last result is taken, with a warning; three are usual."""

SAMPLE_SIDE = 4
"""Side of the crops that stand for the image, in features. Many small ones say more than few large ones."""

_ATTENTION_BYTES = 2**28
"""Size of the score matrix that one portion of attention queries may have, where a device makes one at all."""


class _Decode:
    """One image's decode: settings and what is looked up only once."""

    def __init__(
        self, parts: DecoderParts, tile: int, overlap: float, device: torch.device, tick: Callable[[int], None]
    ) -> None:
        self.parts = parts
        self.tile = tile
        self.core = max(MIN_CORE, tile_stride(tile, overlap))
        self.device = device
        self.tick = tick
        self.affine: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def split(self, pixels: int) -> int:
        """Number of stages that run on the whole image of so many pixels."""
        stages, scale = self.parts.stages, self.parts.scale
        area = scale**2
        per_pixel: list[float] = []
        for stage in stages:
            per_pixel.append(activations_of(stage) / area)
            area //= 4 if isinstance(stage, Upsample) else 1
        # A tile that is decoded in the ordinary way takes this much, so a small image may take it too.
        allowed = max(WHOLE_VALUES * pixels, max(per_pixel) * self.tile**2)
        first = 1 + max((i for i, stage in enumerate(stages) if isinstance(stage, Attention)), default=-1)
        for i in range(first, len(stages)):
            if per_pixel[i] * pixels > allowed:
                return i
        return len(stages)

    def units(self, height: int, width: int) -> int:
        """Units of progress of an image of height x width latent units, if two passes suffice."""
        scale = self.parts.scale
        split = self.split(height * width * scale**2)
        tiles = len(split_into_cores(height * scale, self.core)) * len(split_into_cores(width * scale, self.core))
        return split + (2 * tiles if split < len(self.parts.stages) else 0)

    def normalise(self, norm: Any, x: Tensor, moments: Moments) -> Tensor:
        """x, (B, C, H, W), normalised with given moments, in x's dtype."""
        if norm not in self.affine:
            self.affine[norm] = affine(norm, self.device)
        repeat = norm.num_channels // norm.num_groups
        mean, var = (value.repeat_interleave(repeat) for value in (moments.mean, moments.var))
        weight, bias = self.affine[norm]
        # In evaluation this is the affine map in one step, computed in full precision.
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=norm.eps)

    # --- the whole image ---

    def band_rows(self, x: Tensor, scale: int) -> int:
        """Rows of a band of x that has as many pixels as a tile; `scale` is pixels per feature."""
        return max(4, (self.tile // scale) ** 2 // x.shape[-1])

    def bands(self, x: Tensor, scale: int, compute: Callable[[Piece], Piece], out: Tensor, *, add: bool) -> None:
        """Write (or add) what `compute` makes of x into `out`, band by band of rows, with a reach of one row."""
        height, width = x.shape[-2:]
        factor = out.shape[-2] // height
        for core in split_into_cores(height, self.band_rows(x, scale)):
            rows = Interval.around(core, height, 1)
            piece = compute(Piece(x[..., rows.extent, :], rows, Interval(0, width, width, 0, width)))
            part = out[..., core[0] * factor : core[1] * factor, :]
            if add:
                part += piece.core
            else:
                part.copy_(piece.core)
            self.tick(0)

    def moments(self, norm: nn.Module, x: Tensor, scale: int) -> Moments:
        parts = x.split(self.band_rows(x, scale), dim=-2)
        return Moments.combine([(part.shape[-2] * part.shape[-1], Moments.of(norm, part)) for part in parts])

    def conv_whole(self, norm: nn.Module, conv: Any, x: Tensor, scale: int, out: Tensor | None = None) -> Tensor:
        """conv(silu(norm(x))) of the whole image, added to `out` if given."""
        moments = self.moments(norm, x, scale)
        result = x.new_empty((1, conv.out_channels, *x.shape[-2:])) if out is None else out

        def compute(piece: Piece) -> Piece:
            return piece.conv(conv, F.silu(self.normalise(norm, piece.x, moments), inplace=True))

        self.bands(x, scale, compute, result, add=out is not None)
        return result

    def stage_whole(self, stage: Stage, x: Tensor, scale: int) -> Tensor:
        """A stage on the whole image, exactly; x, (1, C, H, W), may be overwritten."""
        if isinstance(stage, Attention):
            return self.attention(stage, x, scale)
        if isinstance(stage, Output):
            return self.conv_whole(stage.norm, stage.conv, x, scale)
        if isinstance(stage, Upsample):
            out = x.new_empty((1, stage.conv.out_channels, 2 * x.shape[-2], 2 * x.shape[-1]))  # type: ignore[arg-type]
            self.bands(x, scale, lambda piece: piece.upsampled(stage.conv), out, add=False)
            return out
        h = self.conv_whole(stage.norm1, stage.conv1, x, scale)
        if stage.shortcut is not None:
            x = stage.shortcut(x)
        return self.conv_whole(stage.norm2, stage.conv2, h, scale, out=x)

    def attention(self, stage: Attention, x: Tensor, scale: int) -> Tensor:
        """x + attention(x) in place, with the queries in portions of rows."""
        moments = self.moments(stage.norm, x, scale)

        def project(module: nn.Module, rows: Tensor) -> Tensor:
            """(1, C, rows, columns) to tokens (1, 1, rows * columns, C)."""
            if isinstance(module, nn.Linear):
                return module(rows.flatten(2).transpose(1, 2)).unsqueeze(1)
            return module(rows).flatten(2).transpose(1, 2).unsqueeze(1)

        height, width = x.shape[-2:]
        tokens = height * width
        key = x.new_empty((1, 1, tokens, x.shape[1]))
        value = torch.empty_like(key)
        for start, stop in split_into_cores(height, self.band_rows(x, scale)):
            normed = self.normalise(stage.norm, x[..., start:stop, :], moments)
            key[:, :, start * width : stop * width] = project(stage.key, normed)
            value[:, :, start * width : stop * width] = project(stage.value, normed)
        for start, stop in split_into_cores(height, max(1, _ATTENTION_BYTES // (4 * tokens * width))):
            rows = x[..., start:stop, :]
            query = project(stage.query, self.normalise(stage.norm, rows, moments))
            mixed = F.scaled_dot_product_attention(query, key, value)[0]
            if isinstance(stage.out, nn.Linear):
                rows += stage.out(mixed).transpose(1, 2).view_as(rows)
            else:
                rows += stage.out(mixed.transpose(1, 2).reshape(rows.shape))
            self.tick(0)
        return x

    # --- tiles ---

    def stages_on(self, stages: Sequence[Stage], piece: Piece, statistics: Statistics) -> Piece:
        """Stages on a piece; what lacks its surroundings is dropped on the way."""

        def activated(norm: nn.Module, piece: Piece) -> Tensor:
            return F.silu(self.normalise(norm, piece.x, statistics(norm, piece)), inplace=True)

        for stage in stages:
            if isinstance(stage, Resnet):
                h = piece.conv(stage.conv1, activated(stage.norm1, piece))
                h = h.conv(stage.conv2, activated(stage.norm2, h))
                x = piece.cropped_to(h)
                h.x.add_(x if stage.shortcut is None else stage.shortcut(x))
                piece = h
            elif isinstance(stage, Upsample):
                piece = piece.upsampled(stage.conv)
            elif isinstance(stage, Output):
                piece = piece.conv(stage.conv, activated(stage.norm, piece))
            else:
                raise TypeError("attention cannot run on a piece of an image")
        return piece

    def sample(self, x: Tensor, halo: int, scale: int) -> SampledCrops:
        """Crops of x, (1, C, H, W), spread evenly over it.

        Together they have as many pixels as a tile with its surroundings, and at most a quarter of the image's: more
        would cost more time than it saves passes.
        """
        count = (self.core // scale + 2 * halo) // SAMPLE_SIDE
        sides: list[Interval] = []
        starts: list[list[int]] = []
        for length in x.shape[-2:]:
            size = min(length, SAMPLE_SIDE)
            crops = max(1, min(count, length // (2 * size)))
            sides.append(Interval(0, size, size, 0, size))
            starts.append([round((i + 0.5) * (length - crops * size) / crops) + i * size for i in range(crops)])
        rows, columns = sides
        crops_of_x = [
            x[0, :, top : top + rows.stop, left : left + columns.stop] for top in starts[0] for left in starts[1]
        ]
        return SampledCrops(torch.stack(crops_of_x), rows, columns)

    def tiles(self, stages: Sequence[Stage], x: Tensor, scale: int, out: Tensor) -> None:
        """Run the last stages on x, (1, C, H, W), tile by tile into `out`, (3, H * scale, W * scale)."""
        height, width = x.shape[-2:]
        halo = halo_of(stages)
        core = self.core // scale
        sample = self.sample(x, halo, scale)
        sampled: dict[nn.Module, Moments] = {}

        def own(norm: nn.Module, piece: Piece) -> Moments:
            sampled[norm] = Moments.of(norm, piece.core)
            return sampled[norm]

        self.stages_on(stages, sample, own)
        shared = dict(sampled)
        for number in range(MAX_PASSES):
            found: dict[nn.Module, list[tuple[int, Moments]]] = {norm: [] for norm in shared}

            def measured(norm: nn.Module, piece: Piece) -> Moments:
                part = piece.core
                found[norm].append((part.shape[-2] * part.shape[-1], Moments.of(norm, part)))  # noqa: B023
                return shared[norm]

            for rows in split_into_cores(height, core):
                for columns in split_into_cores(width, core):
                    row, column = Interval.around(rows, height, halo), Interval.around(columns, width, halo)
                    piece = self.stages_on(stages, Piece(x[..., row.extent, column.extent], row, column), measured)
                    out[:, rows[0] * scale : rows[1] * scale, columns[0] * scale : columns[1] * scale] = piece.core[
                        0
                    ].to(out)
                    self.tick(1)
            totals = {norm: Moments.combine(parts) for norm, parts in found.items()}
            error = max(totals[norm].distance(shared[norm], norm.eps) for norm in shared)  # type: ignore[arg-type]
            if error <= TOLERANCE:
                return
            if not error < float("inf"):
                raise not_finite(x.dtype)
            if number + 1 == MAX_PASSES:
                _LOG.warning(
                    "Tiled VAE decode: the shared statistics are still off by %.1e standard deviations after %d passes "
                    "(expected at most %.1e); a larger tile gives a more exact image.",
                    error,
                    MAX_PASSES,
                    TOLERANCE,
                )
                return
            before = dict(sampled)

            def corrected(norm: Any, piece: Piece) -> Moments:
                shared[norm] = totals[norm].corrected(before[norm], own(norm, piece), norm.eps)  # noqa: B023
                return shared[norm]

            self.stages_on(stages, sample, corrected)

    def __call__(self, z: Tensor, out: Tensor) -> None:
        """Decode z, (1, Z, h, w), into `out`, (3, scale * h, scale * w)."""
        parts = self.parts
        split = self.split(out.shape[-2] * out.shape[-1])
        x = parts.first(z)
        scale = parts.scale
        for stage in parts.stages[:split]:
            x = self.stage_whole(stage, x, scale)
            scale //= 2 if isinstance(stage, Upsample) else 1
            self.tick(1)
        if split < len(parts.stages):
            self.tiles(parts.stages[split:], x, scale, out)
        else:
            out.copy_(x[0])


@torch.no_grad()
def decode_tiled(
    parts: DecoderParts,
    latents: Tensor,
    *,
    tile: int = ENCODER_TILE,
    overlap: float = ENCODER_OVERLAP,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Tensor:
    """Decode latents of any size with memory bounded by the tile.

    An image no larger than the tile goes through the VAE's ordinary decode. Larger ones are computed as the module's
    text says. Images of a batch are decoded one by one, each as if it were alone.

    The surroundings that exactness needs (24 or 56 pixels on each side for SDXL) are taken whatever the overlap is.
    The overlap says how much of the tile is left to them: tiles advance by tile * (1 - overlap) pixels, at least by
    `MIN_CORE`. A larger overlap means smaller pieces: less memory, more time, the same image.

    Args:
        parts: the decoder, from `parts_from_ldm` or `parts_from_diffusers`.
        latents: (B, Z, h, w) as the VAE takes them (the sampler's divided by the scaling factor), on any device.
        tile: tile side in pixels, a multiple of 8 from 64.
        overlap: 0 to 0.9.
        device: where to compute; the latents' device unless told. The VAE's parameters must be usable there.
        dtype: what to compute in; the VAE's own dtype.
        progress: called as progress(done, total) after each step of work, and with an unchanged `done` within long
            ones; may raise to cancel. The total grows if the statistics need more than two passes.

    Returns:
        RGB in [-1, 1], not clamped, (B, 3, scale * h, scale * w), float32, on the latents' device.

    Raises:
        SettingsError: a tile or an overlap out of range, or latents that are no latents of this VAE.
        NotFiniteError: the VAE overflowed.
    """
    check_tile_size(tile)
    check_overlap(overlap)
    if latents.ndim != 4 or latents.shape[1] != parts.latent_channels or not latents.numel():
        raise SettingsError(
            f"Expected latents of shape (batch, {parts.latent_channels}, height, width), got {tuple(latents.shape)}."
        )
    if not _finite(latents):
        raise SettingsError(
            "The latents have values that are not finite (NaN or infinite), so there is no image to decode. "
            "They come from the sampler: run the model in another precision (bfloat16 or float32)."
        )
    device = latents.device if device is None else torch.device(device)
    batch, _, height, width = latents.shape
    scale = parts.scale
    whole = max(height, width) * scale <= tile
    done = total = 0

    def tick(units: int) -> None:
        nonlocal done, total
        done += units
        total = max(total, done)
        if progress is not None:
            progress(done, total)

    decode = _Decode(parts, tile, overlap, device, tick)
    total = batch * (1 if whole else decode.units(height, width))
    out = torch.empty((batch, 3, height * scale, width * scale), device=latents.device, dtype=torch.float32)
    for image in range(batch):
        z = latents[image : image + 1].to(device=device, dtype=dtype)
        if whole:
            out[image].copy_(parts.decode(z)[0])
            tick(1)
        else:
            decode(z, out[image])
        if not _finite(out[image]):
            raise not_finite(dtype)
    return out
