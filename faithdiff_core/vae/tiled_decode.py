"""Decoding large latents with the SDXL VAE, in tiles that share their normalization statistics.

Every GroupNorm of the decoder averages over the whole image. A tile that is decoded alone uses averages of the tile
and so differs in tone from its neighbours; blending hides the seam, not the difference. Here all tiles use the
statistics of the whole image, and each is computed with a halo as wide as the convolutions reach, so the result is the
untiled decode up to a small error in the statistics, which is measured and held below `TOLERANCE`.

The decoder is a chain of stages (residual blocks, attention, upsampling, output), and works in two parts.

1. *Whole.* The first stages run on the whole latent, one convolution after the other, in bands of rows: their
   statistics are exact. Attention attends to all pixels, with the queries in chunks. This continues while the features
   stay small (`WHOLE_VALUES`); for SDXL that is the mid block and the lowest level.
2. *Tiles.* The remaining stages run tile by tile. They need statistics that are known only when every tile is done:
   `SharedStatistics` starts from a sample, a pass over all tiles measures the error, and the sample gives the
   correction. The second correction is mostly below the tolerance already, and the pixels of that pass are the result.

The modules are only called, never changed, so nothing has to be restored when a decode is cancelled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import NotFiniteError, SettingsError
from ..finite import is_finite
from ..models.lq_encoder import ENCODER_OVERLAP, ENCODER_TILE, Progress
from ..tiling.grid import check_overlap, check_tile_size, tile_stride
from .chunks import Chunk, Interval, SampledCrops, SomeChunk, activations_of, halo_of, split_into_cores
from .decoder_stages import Attention, DecoderParts, Output, Resnet, Stage, Upsample
from .statistics import Moments, MomentsFor, SharedStatistics

_LOG = logging.getLogger(__name__)

WHOLE_VALUES = 24
"""Feature values per output pixel up to which stages run on the whole image: 48 bytes in half precision."""

MIN_CORE = 128
"""Smallest core of a tile in pixels; below it the halo costs many times what the core does."""

TOLERANCE = 2e-3
"""Largest accepted error of a shared mean or standard deviation, in standard deviations of its group."""

MAX_PASSES = 6
"""Passes over all tiles after which the last result is taken, with a warning; three are usual."""

SAMPLE_SIDE = 4
"""Side of the crops that stand for the image, in features. Many small crops represent it better than few large ones."""

_ATTENTION_BYTES = 2**28
"""Largest score matrix of one chunk of attention queries, on devices that materialize the matrix."""


class _Decode:
    """The decode of one image after the other: settings, and the norms' weights, which are read once."""

    def __init__(
        self, parts: DecoderParts, tile: int, overlap: float, device: torch.device, tick: Callable[[int], None]
    ) -> None:
        self.parts = parts
        self.tile = tile
        self.core = max(MIN_CORE, tile_stride(tile, overlap))
        self.device = device
        self.tick = tick
        self.affine: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def split(self, pixels: int) -> int:
        """Number of stages that run on the whole image, for an image of `pixels` pixels."""
        stages, scale = self.parts.stages, self.parts.scale
        area = scale**2
        per_pixel: list[float] = []
        for stage in stages:
            per_pixel.append(activations_of(stage) / area)
            area //= 4 if isinstance(stage, Upsample) else 1
        # An ordinary decode of one tile needs this much memory, so a small image may use it, too.
        allowed = max(WHOLE_VALUES * pixels, max(per_pixel) * self.tile**2)
        first = 1 + max((i for i, stage in enumerate(stages) if isinstance(stage, Attention)), default=-1)
        for i in range(first, len(stages)):
            if per_pixel[i] * pixels > allowed:
                return i
        return len(stages)

    def units(self, height: int, width: int) -> int:
        """Units of progress of an image of height x width latent units when two passes suffice."""
        scale = self.parts.scale
        split = self.split(height * width * scale**2)
        tiles = len(split_into_cores(height * scale, self.core)) * len(split_into_cores(width * scale, self.core))
        return split + (2 * tiles if split < len(self.parts.stages) else 0)

    def normalized(self, norm: nn.GroupNorm, x: Tensor, moments: Moments) -> Tensor:
        """x, (B, C, H, W), normalized with given moments, in x's dtype."""
        if norm not in self.affine:
            self.affine[norm] = self.parts.affine(norm, self.device)
        repeat = norm.num_channels // norm.num_groups
        mean, var = (value.repeat_interleave(repeat) for value in (moments.mean, moments.var))
        weight, bias = self.affine[norm]
        # In evaluation this is the affine map in one step, computed in full precision.
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=norm.eps)

    # --- the whole image ---

    def band_rows(self, x: Tensor, scale: int) -> int:
        """Rows of a band of x that has as many pixels as a tile; `scale` is pixels per feature."""
        return max(4, (self.tile // scale) ** 2 // x.shape[-1])

    def bands(self, x: Tensor, scale: int, compute: Callable[[Chunk], Chunk], out: Tensor, *, add: bool) -> None:
        """Write (or add) the result of `compute` to `out`, in bands of rows of x; `compute` may reach one row far."""
        height, width = x.shape[-2:]
        factor = out.shape[-2] // height
        for core in split_into_cores(height, self.band_rows(x, scale)):
            rows = Interval.around(core, height, 1)
            result = compute(Chunk(x[..., rows.extent, :], rows, Interval.whole(width))).core
            band = out[..., core[0] * factor : core[1] * factor, :]
            if add:
                band += result
            else:
                band.copy_(result)
            self.tick(0)

    def moments(self, norm: nn.GroupNorm, x: Tensor, scale: int) -> Moments:
        bands = x.split(self.band_rows(x, scale), dim=-2)
        return Moments.combine([(band.shape[-2] * band.shape[-1], Moments.of(norm, band)) for band in bands])

    def conv_whole(
        self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, scale: int, out: Tensor | None = None
    ) -> Tensor:
        """conv(silu(norm(x))) of the whole image, added to `out` if given."""
        moments = self.moments(norm, x, scale)
        result = x.new_empty((1, conv.out_channels, *x.shape[-2:])) if out is None else out

        def compute(chunk: Chunk) -> Chunk:
            return chunk.convolved(conv, F.silu(self.normalized(norm, chunk.x, moments), inplace=True))

        self.bands(x, scale, compute, result, add=out is not None)
        return result

    def stage_whole(self, stage: Stage, x: Tensor, scale: int) -> Tensor:
        """A stage on the whole image, exactly; x, (1, C, H, W), may be overwritten."""
        if isinstance(stage, Attention):
            return self.attention(stage, x, scale)
        if isinstance(stage, Output):
            return self.conv_whole(stage.norm, stage.conv, x, scale)
        if isinstance(stage, Upsample):
            out = x.new_empty((1, stage.conv.out_channels, 2 * x.shape[-2], 2 * x.shape[-1]))
            self.bands(x, scale, lambda chunk: chunk.upsampled(stage.conv), out, add=False)
            return out
        h = self.conv_whole(stage.norm1, stage.conv1, x, scale)
        if stage.shortcut is not None:
            x = stage.shortcut(x)
        return self.conv_whole(stage.norm2, stage.conv2, h, scale, out=x)

    def attention(self, stage: Attention, x: Tensor, scale: int) -> Tensor:
        """x + attention(x) in place, with the queries in chunks of rows."""
        moments = self.moments(stage.norm, x, scale)

        def project(module: nn.Conv2d | nn.Linear, rows: Tensor) -> Tensor:
            """(1, C, rows, columns) to tokens (1, 1, rows * columns, C)."""
            if isinstance(module, nn.Linear):
                return module(rows.flatten(2).transpose(1, 2)).unsqueeze(1)
            return module(rows).flatten(2).transpose(1, 2).unsqueeze(1)

        height, width = x.shape[-2:]
        tokens = height * width
        key = x.new_empty((1, 1, tokens, x.shape[1]))
        value = torch.empty_like(key)
        for start, stop in split_into_cores(height, self.band_rows(x, scale)):
            normed = self.normalized(stage.norm, x[..., start:stop, :], moments)
            key[:, :, start * width : stop * width] = project(stage.key, normed)
            value[:, :, start * width : stop * width] = project(stage.value, normed)
        for start, stop in split_into_cores(height, max(1, _ATTENTION_BYTES // (4 * tokens * width))):
            rows = x[..., start:stop, :]
            query = project(stage.query, self.normalized(stage.norm, rows, moments))
            mixed = F.scaled_dot_product_attention(query, key, value)[0]
            if isinstance(stage.out, nn.Linear):
                rows += stage.out(mixed).transpose(1, 2).view_as(rows)
            else:
                rows += stage.out(mixed.transpose(1, 2).reshape(rows.shape))
            self.tick(0)
        return x

    # --- tiles ---

    def run_stages(self, stages: Sequence[Stage], chunk: SomeChunk, moments_for: MomentsFor) -> SomeChunk:
        """Run stages on a chunk; its halo shrinks on the way."""

        def activated(norm: nn.GroupNorm, chunk: SomeChunk) -> Tensor:
            return F.silu(self.normalized(norm, chunk.x, moments_for(norm, chunk)), inplace=True)

        for stage in stages:
            if isinstance(stage, Resnet):
                h = chunk.convolved(stage.conv1, activated(stage.norm1, chunk))
                h = h.convolved(stage.conv2, activated(stage.norm2, h))
                x = chunk.cropped_to(h)
                h.x.add_(x if stage.shortcut is None else stage.shortcut(x))
                chunk = h
            elif isinstance(stage, Upsample):
                chunk = chunk.upsampled(stage.conv)
            elif isinstance(stage, Output):
                chunk = chunk.convolved(stage.conv, activated(stage.norm, chunk))
            else:
                raise TypeError("attention cannot run on a chunk of an image")
        return chunk

    def sample(self, x: Tensor, halo: int, scale: int) -> SampledCrops:
        """Crops of x, (1, C, H, W), spread evenly over it.

        Together they have as many pixels as a tile with its halo, and at most a quarter of the image's: more would
        cost more time than the passes they save.
        """
        count = (self.core // scale + 2 * halo) // SAMPLE_SIDE
        sides: list[Interval] = []
        starts: list[list[int]] = []
        for length in x.shape[-2:]:
            size = min(length, SAMPLE_SIDE)
            crops = max(1, min(count, length // (2 * size)))
            sides.append(Interval.whole(size))
            starts.append([round((i + 0.5) * (length - crops * size) / crops) + i * size for i in range(crops)])
        rows, columns = sides
        crops_of_x = [
            x[0, :, top : top + rows.stop, left : left + columns.stop] for top in starts[0] for left in starts[1]
        ]
        return SampledCrops(torch.stack(crops_of_x), rows, columns)

    def tiles(self, stages: Sequence[Stage], x: Tensor, scale: int, out: Tensor) -> None:
        """Run the last stages on x, (1, C, H, W), tile by tile into `out`, (3, H * scale, W * scale).

        Repeats the pass over all tiles until their shared statistics are those of the result.
        """
        sample = self.sample(x, halo_of(stages), scale)
        statistics = SharedStatistics(sample, lambda chunk, moments_for: self.run_stages(stages, chunk, moments_for))
        for passes in range(1, MAX_PASSES + 1):
            statistics.start_pass()
            self.pass_over_tiles(stages, x, scale, out, statistics.measure)
            error = statistics.error()
            if error <= TOLERANCE:
                return
            if not math.isfinite(error):
                raise _not_finite(x.dtype)
            if passes < MAX_PASSES:
                statistics.correct()
        _LOG.warning(
            "Tiled VAE decode: the shared statistics are still off by %.1e standard deviations after %d passes "
            "(expected at most %.1e); a larger tile gives a more exact image.",
            error,
            MAX_PASSES,
            TOLERANCE,
        )

    def pass_over_tiles(
        self, stages: Sequence[Stage], x: Tensor, scale: int, out: Tensor, moments_for: MomentsFor
    ) -> None:
        """Compute every tile once, with given statistics, and write its core to `out`."""
        height, width = x.shape[-2:]
        halo, core = halo_of(stages), self.core // scale
        for rows in split_into_cores(height, core):
            for columns in split_into_cores(width, core):
                row, column = Interval.around(rows, height, halo), Interval.around(columns, width, halo)
                tile = self.run_stages(stages, Chunk(x[..., row.extent, column.extent], row, column), moments_for)
                place = out[:, rows[0] * scale : rows[1] * scale, columns[0] * scale : columns[1] * scale]
                place.copy_(tile.core[0])
                self.tick(1)

    def __call__(self, z: Tensor, out: Tensor) -> None:
        """Decode z, (1, Z, h, w), into `out`, (3, scale * h, scale * w)."""
        parts = self.parts
        split = self.split(out.shape[-2] * out.shape[-1])
        x = parts.conv_in(z)
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

    An image no larger than the tile goes through the VAE's ordinary decode. Larger ones are computed as described at
    the top of this module. Images of a batch are decoded one by one, with statistics of their own.

    The halo that an exact result needs (24 or 56 pixels on each side for SDXL) does not depend on the overlap. Cores
    advance by tile * (1 - overlap) pixels, at least by `MIN_CORE`: a larger overlap means less memory and more time for
    the same image.

    Args:
        parts: the decoder, from `parts_from_ldm` or `parts_from_diffusers`.
        latents: (B, Z, h, w) as the VAE takes them (the sampler's divided by the scaling factor), on any device.
        tile: tile side in pixels, a multiple of 8 from 64.
        overlap: overlap as a fraction of the tile, 0 to 0.9.
        device: device to compute on. Defaults to the latents' device. The VAE's parameters must be usable there.
        dtype: dtype to compute in; the VAE's dtype.
        progress: called as progress(done, total) after each step of work, and with an unchanged `done` within long
            ones; may raise to cancel. The total grows if the statistics need more than two passes.

    Returns:
        RGB in [-1, 1], not clamped, (B, 3, scale * h, scale * w), float32, on the latents' device.

    Raises:
        SettingsError: a tile or an overlap out of range, or latents of another shape than the VAE's.
        NotFiniteError: the VAE overflowed.
    """
    check_tile_size(tile)
    check_overlap(overlap)
    if latents.ndim != 4 or latents.shape[1] != parts.latent_channels or not latents.numel():
        raise SettingsError(
            f"Expected latents of shape (batch, {parts.latent_channels}, height, width), got {tuple(latents.shape)}."
        )
    if not is_finite(latents):
        raise SettingsError(
            "The latents are not finite (they contain NaN or infinity), so there is no image to decode. "
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
        if not is_finite(out[image]):
            raise _not_finite(dtype)
    return out


def _not_finite(dtype: torch.dtype) -> NotFiniteError:
    name = str(dtype).removeprefix("torch.")
    return NotFiniteError(
        f"The VAE's result is not finite (NaN or infinite) in {name}. Run the VAE in bfloat16 or float32, "
        f"or use a VAE that was made for float16 (sdxl-vae-fp16-fix)."
    )
