"""Decoding large latents with the SDXL VAE, in tiles that share their normalisation statistics.

Every GroupNorm of the decoder averages over the whole picture. A tile that is decoded on its own uses its own averages
and so differs in tone from its neighbours; blending hides the seam, not the difference. Here all tiles use the
statistics of the whole picture, and each is computed with as much surrounding as the convolutions reach, so the result
is the untiled decode up to a small error in the statistics, which is measured and held below `TOLERANCE`.

The decoder is a chain of stages (residual blocks, attention, upsampling, output), and works in two parts.

1. *Whole.* The first stages run on the whole latent, one convolution after the other, in bands of rows: their
   statistics are exact. Attention attends to all pixels, with the queries in portions. This goes on while the features
   stay small (`WHOLE_VALUES`); for SDXL that is the mid block and the lowest level.
2. *Tiles.* The remaining stages run tile by tile. They need statistics that are known only when every tile is done, so
   the statistics s are the solution of s = F(s): what the picture has when it is decoded with s. A sample of small
   crops, decoded together so that it is its own exact solution, gives the first s. A pass over all tiles gives F(s).
   The sample then gives the correction: the moments of each norm in turn are F(s) plus what the sample's moments
   change by when the norms before it take their new moments. This is first order in the error of s and needs no pass
   over the picture. The next pass measures what is left; the third one mostly finds nothing, and its pixels are the
   result.

The modules are only called, never changed, so nothing has to be restored when a decode is cancelled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import NotFiniteError, SettingsError
from .lq_encoder import DEFAULT_OVERLAP, DEFAULT_TILE, Progress
from .tiles import check_overlap, check_tile_size, tile_stride

_LOG = logging.getLogger(__name__)

WHOLE_VALUES = 24
"""Feature values per output pixel up to which stages run on the whole picture: 48 bytes in half precision."""

MIN_CORE = 128
"""Smallest core of a tile in pixels; below it the surroundings cost many times what the tile itself does."""

TOLERANCE = 2e-3
"""Largest accepted error of a shared mean or standard deviation, in standard deviations of its group."""

MAX_PASSES = 6
"""Passes over all tiles after which the last result is taken, with a warning; three are usual."""

SAMPLE_SIDE = 4
"""Side of the crops that stand for the picture, in features. Many small ones say more than few large ones."""

_ATTENTION_BYTES = 2**28
"""Size of the score matrix that one portion of attention queries may have, where a device makes one at all."""


@dataclass(frozen=True)
class Resnet:
    """A residual block: x + conv2(silu(norm2(conv1(silu(norm1(x)))))), x through `shortcut` where there is one."""

    norm1: nn.Module
    conv1: nn.Module
    norm2: nn.Module
    conv2: nn.Module
    shortcut: nn.Module | None


@dataclass(frozen=True)
class Attention:
    """One-head attention over all pixels; the projections are 1x1 convolutions or linear layers."""

    norm: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module


@dataclass(frozen=True)
class Upsample:
    """Nearest-neighbour upsampling by 2 and a convolution."""

    conv: nn.Module


@dataclass(frozen=True)
class Output:
    """The last norm and the convolution to RGB."""

    norm: nn.Module
    conv: nn.Module


Stage = Resnet | Attention | Upsample | Output


@dataclass(frozen=True)
class DecoderParts:
    """A VAE decoder taken apart.

    Attributes:
        first: what comes before the first stage: latent (1, Z, h, w) to features (1, C, h, w), with a reach of one.
        stages: the rest of the decoder, in order.
        decode: the ordinary decode, (B, Z, h, w) to (B, 3, scale * h, scale * w).
        latent_channels: Z.
    """

    first: Callable[[Tensor], Tensor]
    stages: tuple[Stage, ...]
    decode: Callable[[Tensor], Tensor]
    latent_channels: int

    @property
    def scale(self) -> int:
        """Pixels per latent unit along each side."""
        return 2 ** sum(isinstance(stage, Upsample) for stage in self.stages)


def parts_from_ldm(model: Any) -> DecoderParts:
    """Take a VAE with the original latent diffusion names apart (ComfyUI's `vae.first_stage_model`).

    Raises:
        SettingsError: the model has another decoder than SDXL's.
    """
    decoder = _only(getattr(model, "decoder", None), "decoder", {"conv_in", "mid", "up", "norm_out", "conv_out"})
    if getattr(model, "bn", None) is not None:
        raise _other_vae("it normalises its latents")
    if getattr(decoder, "tanh_out", False) or getattr(decoder, "carried", False):
        raise _other_vae("its output is a tanh or a video")
    mid = _only(decoder.mid, "decoder.mid", {"block_1", "attn_1", "block_2"})
    attention = _only(mid.attn_1, "decoder.mid.attn_1", {"norm", "q", "k", "v", "proj_out"})
    stages: list[Stage] = [
        _resnet(mid.block_1, "decoder.mid.block_1"),
        Attention(attention.norm, attention.q, attention.k, attention.v, attention.proj_out),
        _resnet(mid.block_2, "decoder.mid.block_2"),
    ]
    for i in reversed(range(len(decoder.up))):
        level = _only(decoder.up[i], f"decoder.up.{i}", {"block", "attn", "upsample"})
        if len(level.attn):
            raise _other_vae(f"decoder.up.{i} has attention")
        stages += [_resnet(block, f"decoder.up.{i}.block.{j}") for j, block in enumerate(level.block)]
        if i:
            stages.append(Upsample(_only(level.upsample, f"decoder.up.{i}.upsample", {"conv"}).conv))
    stages.append(Output(decoder.norm_out, decoder.conv_out))
    return _parts(getattr(model, "post_quant_conv", None), decoder, stages)


def parts_from_diffusers(vae: Any) -> DecoderParts:
    """Take a diffusers `AutoencoderKL` apart.

    Raises:
        SettingsError: the model has another decoder than SDXL's.
    """
    decoder = _only(
        getattr(vae, "decoder", None),
        "decoder",
        {"conv_in", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out"},
    )
    mid = _only(decoder.mid_block, "decoder.mid_block", {"resnets", "attentions"})
    if len(mid.resnets) != 2 or len(mid.attentions) != 1 or mid.attentions[0] is None:
        raise _other_vae("its mid block is not residual block, attention, residual block")
    attention = mid.attentions[0]
    if attention.heads != 1:
        raise _other_vae(f"its attention has {attention.heads} heads, expected 1")
    stages: list[Stage] = [
        _resnet(mid.resnets[0], "decoder.mid_block.resnets.0"),
        Attention(attention.group_norm, attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]),
        _resnet(mid.resnets[1], "decoder.mid_block.resnets.1"),
    ]
    for i, level in enumerate(decoder.up_blocks):
        name = f"decoder.up_blocks.{i}"
        _only(level, name, {"resnets", "upsamplers"})
        stages += [_resnet(block, f"{name}.resnets.{j}") for j, block in enumerate(level.resnets)]
        stages += [Upsample(_only(up, f"{name}.upsamplers", {"conv"}).conv) for up in level.upsamplers or ()]
    stages.append(Output(decoder.conv_norm_out, decoder.conv_out))
    return _parts(getattr(vae, "post_quant_conv", None), decoder, stages)


def _parts(post_quant: nn.Module | None, decoder: Any, stages: list[Stage]) -> DecoderParts:
    def unquantised(z: Tensor) -> Tensor:
        return z if post_quant is None else post_quant(z)

    first: Any = decoder.conv_in if post_quant is None else post_quant
    convolutions = [decoder.conv_in, decoder.conv_out]
    for stage in stages:
        if isinstance(stage, Resnet):
            convolutions += [stage.conv1, stage.conv2]
        elif isinstance(stage, Upsample):
            convolutions.append(stage.conv)
    if not all(isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) for conv in convolutions):
        raise _other_vae("its convolutions are not all 2D ones with a 3x3 kernel")
    return DecoderParts(
        lambda z: decoder.conv_in(unquantised(z)), tuple(stages), lambda z: decoder(unquantised(z)), first.in_channels
    )


def _resnet(block: Any, name: str) -> Resnet:
    modules = {"norm1", "conv1", "norm2", "conv2", "nin_shortcut", "conv_shortcut"}
    _only(block, name, modules | {"swish", "nonlinearity", "dropout"})
    if getattr(block, "output_scale_factor", 1.0) != 1.0:
        raise _other_vae(f"{name} scales its output")
    if not isinstance(getattr(block, "nonlinearity", getattr(block, "swish", None)), nn.SiLU):
        raise _other_vae(f"{name} has another activation than SiLU")
    shortcut = getattr(block, "nin_shortcut", None) or getattr(block, "conv_shortcut", None)
    if shortcut is not None and shortcut.kernel_size != (1, 1):
        raise _other_vae(f"{name} has a shortcut that is not a 1x1 convolution")
    return Resnet(block.norm1, block.conv1, block.norm2, block.conv2, shortcut)


def _only(module: Any, name: str, children: set[str]) -> Any:
    """Give `module` back if it has no parts but `children`: anything else would be left out of the decode."""
    found = {child for child, _ in module.named_children()} if isinstance(module, nn.Module) else set()
    if not found or found - children:
        raise _other_vae(f"{name} has the parts {sorted(found)}, expected {sorted(children)}")
    return module


def _other_vae(why: str) -> SettingsError:
    return SettingsError(
        f"The tiled decode expects the VAE of SDXL (or one built like it), got another kind: {why}. "
        f"Decode with the VAE's own decode instead."
    )


@dataclass(frozen=True)
class _Moments:
    """Mean and variance of each group of a norm's input, (groups,), float32, on the device that computes."""

    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, norm: Any, x: Tensor) -> _Moments:
        """Moments over the batch and all pixels of x, (B, C, H, W)."""
        groups = x.unflatten(1, (norm.num_groups, -1))
        if x.dtype == torch.float32:
            var, mean = torch.var_mean(groups, dim=(0, 2, 3, 4), correction=0)
            return cls(mean, var)
        # Half precision rounds the results too. Some groups at a time, so that the copy in full precision stays small.
        pairs = [torch.var_mean(part.float(), dim=(0, 2, 3, 4), correction=0) for part in groups.split(4, dim=1)]
        return cls(torch.cat([mean for _, mean in pairs]), torch.cat([var for var, _ in pairs]))

    @classmethod
    def combine(cls, parts: Sequence[tuple[int, _Moments]]) -> _Moments:
        """Moments of a union from (number of pixels, moments) of its parts, summed in double precision."""
        device = parts[0][1].mean.device
        weight = torch.tensor([count for count, _ in parts], dtype=torch.float64)[:, None]
        weight = weight / weight.sum()
        means = torch.stack([part.mean for _, part in parts]).cpu().double()
        variances = torch.stack([part.var for _, part in parts]).cpu().double()
        mean = (weight * means).sum(0)
        var = (weight * (variances + (means - mean) ** 2)).sum(0)
        return cls(mean.float().to(device), var.float().to(device))

    def corrected(self, before: _Moments, after: _Moments, eps: float) -> _Moments:
        """These moments changed as a sample's moments changed from `before` to `after`."""
        ratio = (after.var + eps) / (before.var + eps)
        return _Moments(self.mean + after.mean - before.mean, self.var * ratio)

    def distance(self, other: _Moments, eps: float) -> float:
        """Largest difference of a mean or a standard deviation, in standard deviations of the group."""
        deviation = (self.var + eps).sqrt()
        mean = (self.mean - other.mean).abs() / deviation
        return float(torch.maximum(mean, ((other.var + eps).sqrt() / deviation - 1).abs()).max())


def _affine(norm: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight and bias of a GroupNorm, float32, on `device`.

    A host's casting layer keeps its parameters elsewhere or in another form and brings them along when it is called.
    Such a layer is asked: for +1 and -1 in every channel it answers bias + weight and bias - weight.
    """
    if not getattr(norm, "comfy_cast_weights", False):
        return norm.weight.to(device, torch.float32), norm.bias.to(device, torch.float32)
    probe = torch.tensor([1.0, -1.0], device=device).expand(1, norm.num_channels, 2)
    plus, minus = norm(probe)[0].unbind(-1)
    # The probe's variance is 1, to which the norm adds its epsilon.
    return (plus - minus) / 2 * (1 + norm.eps) ** 0.5, (plus + minus) / 2


@dataclass(frozen=True)
class _Side:
    """The stretch of one side of a picture that a piece holds, at the resolution of its features.

    Attributes:
        start, stop: the stretch.
        length: the picture's side.
        core_start, core_stop: the part of the stretch that counts; the rest is surroundings.
    """

    start: int
    stop: int
    length: int
    core_start: int
    core_stop: int

    @classmethod
    def around(cls, core: tuple[int, int], length: int, halo: int) -> _Side:
        start, stop = core
        return cls(max(0, start - halo), min(length, stop + halo), length, start, stop)

    @property
    def extent(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def core(self) -> slice:
        """The core within the piece."""
        return slice(self.core_start - self.start, self.core_stop - self.start)

    def narrowed(self) -> _Side:
        """After a 3x3 convolution: what it computed from missing neighbours is gone; at the border nothing is."""
        return replace(self, start=self.start + (self.start > 0), stop=self.stop - (self.stop < self.length))

    def within(self, other: _Side) -> slice:
        """This stretch as a slice of `other`."""
        return slice(self.start - other.start, self.stop - other.start)

    def doubled(self) -> _Side:
        return _Side(*(2 * n for n in (self.start, self.stop, self.length, self.core_start, self.core_stop)))


@dataclass(frozen=True)
class _Piece:
    """Features (B, C, rows, columns) and where they lie."""

    x: Tensor
    rows: _Side
    columns: _Side

    @property
    def core(self) -> Tensor:
        return self.x[..., self.rows.core, self.columns.core]

    def conv(self, module: nn.Module, x: Tensor) -> _Piece:
        """The piece after a 3x3 convolution of x, which lies where this piece does."""
        rows, columns = self.rows.narrowed(), self.columns.narrowed()
        return _Piece(module(x)[..., rows.within(self.rows), columns.within(self.columns)], rows, columns)

    def cropped_to(self, other: _Piece) -> Tensor:
        return self.x[..., other.rows.within(self.rows), other.columns.within(self.columns)]

    def upsampled(self, conv: nn.Module) -> _Piece:
        x = F.interpolate(self.x, scale_factor=2.0, mode="nearest")
        return replace(self, x=x, rows=self.rows.doubled(), columns=self.columns.doubled()).conv(conv, x)


@dataclass(frozen=True)
class _Sample(_Piece):
    """Crops from all over a picture, (crops, C, rows, columns), that stand for the whole.

    They have no surroundings, so that many small ones fit into little memory. What a convolution computes at their
    border is replaced by what it computed beside it.
    """

    def conv(self, module: nn.Module, x: Tensor) -> _Sample:
        x = module(x)
        top, left = (1 if side > 2 else 0 for side in x.shape[-2:])
        inner = x[..., top : x.shape[-2] - top, left : x.shape[-1] - left]
        return replace(self, x=F.pad(inner, (left, left, top, top), mode="replicate"))


Statistics = Callable[[nn.Module, _Piece], _Moments]
"""Says with which moments a norm is to normalise a piece."""


def _halo(stages: Sequence[Stage]) -> int:
    """Surroundings that exactness needs in front of `stages`, in features."""
    halo = 0
    for stage in reversed(stages):
        if isinstance(stage, Upsample):
            halo = (halo + 2) // 2
        elif isinstance(stage, Resnet):
            halo += 2
        else:
            halo += 1
    return halo


def _values(stage: Stage) -> int:
    """Feature values per input feature position that are held while a stage runs on the whole picture."""
    if isinstance(stage, Resnet):
        inputs, outputs = _channels(stage.conv1)
        return inputs + outputs * (1 if stage.shortcut is None else 2)
    if isinstance(stage, Upsample):
        inputs, outputs = _channels(stage.conv)
        return inputs + 4 * outputs
    if isinstance(stage, Attention):
        return 3 * stage.norm.num_channels  # type: ignore[return-value, operator]
    return sum(_channels(stage.conv))


def _channels(conv: Any) -> tuple[int, int]:
    return conv.in_channels, conv.out_channels


def _cores(length: int, core: int) -> list[tuple[int, int]]:
    """Cut a side into parts of nearly one size, none longer than `core`."""
    count = -(-length // core)
    return [(i * length // count, (i + 1) * length // count) for i in range(count)]


class _Decode:
    """One picture's decode: settings and what is looked up only once."""

    def __init__(
        self, parts: DecoderParts, tile: int, overlap: float, device: torch.device, tick: Callable[[int], None]
    ) -> None:
        self.parts = parts
        self.tile = tile
        self.core = max(MIN_CORE, tile_stride(tile, overlap))
        self.device = device
        self.tick = tick
        self._affine: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def split(self, pixels: int) -> int:
        """Number of stages that run on the whole picture of so many pixels."""
        stages, scale = self.parts.stages, self.parts.scale
        area = scale**2
        per_pixel: list[float] = []
        for stage in stages:
            per_pixel.append(_values(stage) / area)
            area //= 4 if isinstance(stage, Upsample) else 1
        # A tile that is decoded in the ordinary way takes this much, so a small picture may take it too.
        allowed = max(WHOLE_VALUES * pixels, max(per_pixel) * self.tile**2)
        first = 1 + max((i for i, stage in enumerate(stages) if isinstance(stage, Attention)), default=-1)
        for i in range(first, len(stages)):
            if per_pixel[i] * pixels > allowed:
                return i
        return len(stages)

    def units(self, height: int, width: int) -> int:
        """Units of progress of a picture of height x width latent units, if two passes suffice."""
        scale = self.parts.scale
        split = self.split(height * width * scale**2)
        tiles = len(_cores(height * scale, self.core)) * len(_cores(width * scale, self.core))
        return split + (2 * tiles if split < len(self.parts.stages) else 0)

    def normalise(self, norm: Any, x: Tensor, moments: _Moments) -> Tensor:
        """x, (B, C, H, W), normalised with given moments, in x's dtype."""
        if norm not in self._affine:
            self._affine[norm] = _affine(norm, self.device)
        repeat = norm.num_channels // norm.num_groups
        mean, var = (value.repeat_interleave(repeat) for value in (moments.mean, moments.var))
        weight, bias = self._affine[norm]
        # In evaluation this is the affine map in one step, computed in full precision.
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=norm.eps)

    # --- the whole picture ---

    def band_rows(self, x: Tensor, scale: int) -> int:
        """Rows of a band of x that has as many pixels as a tile; `scale` is pixels per feature."""
        return max(4, (self.tile // scale) ** 2 // x.shape[-1])

    def bands(self, x: Tensor, scale: int, compute: Callable[[_Piece], _Piece], out: Tensor, *, add: bool) -> None:
        """Write (or add) what `compute` makes of x into `out`, band by band of rows, with a reach of one row."""
        height, width = x.shape[-2:]
        factor = out.shape[-2] // height
        for core in _cores(height, self.band_rows(x, scale)):
            rows = _Side.around(core, height, 1)
            piece = compute(_Piece(x[..., rows.extent, :], rows, _Side(0, width, width, 0, width)))
            part = out[..., core[0] * factor : core[1] * factor, :]
            if add:
                part += piece.core
            else:
                part.copy_(piece.core)
            self.tick(0)

    def moments(self, norm: nn.Module, x: Tensor, scale: int) -> _Moments:
        parts = x.split(self.band_rows(x, scale), dim=-2)
        return _Moments.combine([(part.shape[-2] * part.shape[-1], _Moments.of(norm, part)) for part in parts])

    def conv_whole(self, norm: nn.Module, conv: Any, x: Tensor, scale: int, out: Tensor | None = None) -> Tensor:
        """conv(silu(norm(x))) of the whole picture, added to `out` if given."""
        moments = self.moments(norm, x, scale)
        result = x.new_empty((1, conv.out_channels, *x.shape[-2:])) if out is None else out

        def compute(piece: _Piece) -> _Piece:
            return piece.conv(conv, F.silu(self.normalise(norm, piece.x, moments), inplace=True))

        self.bands(x, scale, compute, result, add=out is not None)
        return result

    def stage_whole(self, stage: Stage, x: Tensor, scale: int) -> Tensor:
        """A stage on the whole picture, exactly; x, (1, C, H, W), may be overwritten."""
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
        for start, stop in _cores(height, self.band_rows(x, scale)):
            normed = self.normalise(stage.norm, x[..., start:stop, :], moments)
            key[:, :, start * width : stop * width] = project(stage.key, normed)
            value[:, :, start * width : stop * width] = project(stage.value, normed)
        for start, stop in _cores(height, max(1, _ATTENTION_BYTES // (4 * tokens * width))):
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

    def stages_on(self, stages: Sequence[Stage], piece: _Piece, statistics: Statistics) -> _Piece:
        """Stages on a piece; what lacks its surroundings is dropped on the way."""

        def activated(norm: nn.Module, piece: _Piece) -> Tensor:
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
                raise TypeError("attention cannot run on a piece of a picture")
        return piece

    def sample(self, x: Tensor, halo: int, scale: int) -> _Sample:
        """Crops of x, (1, C, H, W), spread evenly over it.

        Together they have as many pixels as a tile with its surroundings, and at most a quarter of the picture's: more
        would cost more time than it saves passes.
        """
        count = (self.core // scale + 2 * halo) // SAMPLE_SIDE
        sides: list[_Side] = []
        starts: list[list[int]] = []
        for length in x.shape[-2:]:
            size = min(length, SAMPLE_SIDE)
            crops = max(1, min(count, length // (2 * size)))
            sides.append(_Side(0, size, size, 0, size))
            starts.append([round((i + 0.5) * (length - crops * size) / crops) + i * size for i in range(crops)])
        rows, columns = sides
        crops_of_x = [
            x[0, :, top : top + rows.stop, left : left + columns.stop] for top in starts[0] for left in starts[1]
        ]
        return _Sample(torch.stack(crops_of_x), rows, columns)

    def tiles(self, stages: Sequence[Stage], x: Tensor, scale: int, out: Tensor) -> None:
        """Run the last stages on x, (1, C, H, W), tile by tile into `out`, (3, H * scale, W * scale)."""
        height, width = x.shape[-2:]
        halo = _halo(stages)
        core = self.core // scale
        sample = self.sample(x, halo, scale)
        sampled: dict[nn.Module, _Moments] = {}

        def own(norm: nn.Module, piece: _Piece) -> _Moments:
            sampled[norm] = _Moments.of(norm, piece.core)
            return sampled[norm]

        self.stages_on(stages, sample, own)
        shared = dict(sampled)
        for number in range(MAX_PASSES):
            found: dict[nn.Module, list[tuple[int, _Moments]]] = {norm: [] for norm in shared}

            def measured(norm: nn.Module, piece: _Piece) -> _Moments:
                part = piece.core
                found[norm].append((part.shape[-2] * part.shape[-1], _Moments.of(norm, part)))  # noqa: B023
                return shared[norm]

            for rows in _cores(height, core):
                for columns in _cores(width, core):
                    row, column = _Side.around(rows, height, halo), _Side.around(columns, width, halo)
                    piece = self.stages_on(stages, _Piece(x[..., row.extent, column.extent], row, column), measured)
                    out[:, rows[0] * scale : rows[1] * scale, columns[0] * scale : columns[1] * scale] = piece.core[
                        0
                    ].to(out)
                    self.tick(1)
            totals = {norm: _Moments.combine(parts) for norm, parts in found.items()}
            error = max(totals[norm].distance(shared[norm], norm.eps) for norm in shared)  # type: ignore[arg-type]
            if error <= TOLERANCE:
                return
            if not error < float("inf"):
                raise _not_finite(x.dtype)
            if number + 1 == MAX_PASSES:
                _LOG.warning(
                    "Tiled VAE decode: the shared statistics are still off by %.1e standard deviations after %d passes "
                    "(expected at most %.1e); a larger tile gives a more exact picture.",
                    error,
                    MAX_PASSES,
                    TOLERANCE,
                )
                return
            before = dict(sampled)

            def corrected(norm: Any, piece: _Piece) -> _Moments:
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


def _finite(x: Tensor) -> bool:
    """Whether all of x is finite, without a copy of it: NaN passes through minimum and maximum."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def _not_finite(dtype: torch.dtype) -> NotFiniteError:
    name = str(dtype).removeprefix("torch.")
    return NotFiniteError(
        f"The VAE's result is not finite (NaN or infinite) in {name}. Run the VAE in bfloat16 or float32, "
        f"or use a VAE that was made for float16 (sdxl-vae-fp16-fix)."
    )


@torch.no_grad()
def decode_tiled(
    parts: DecoderParts,
    latents: Tensor,
    *,
    tile: int = DEFAULT_TILE,
    overlap: float = DEFAULT_OVERLAP,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Tensor:
    """Decode latents of any size with memory bounded by the tile.

    A picture no larger than the tile goes through the VAE's ordinary decode. Larger ones are computed as the module's
    text says. Images of a batch are decoded one by one, each as if it were alone.

    The surroundings that exactness needs (24 or 56 pixels on each side for SDXL) are taken whatever the overlap is.
    The overlap says how much of the tile is left to them: tiles advance by tile * (1 - overlap) pixels, at least by
    `MIN_CORE`. A larger overlap means smaller pieces: less memory, more time, the same picture.

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
            "The latents have values that are not finite (NaN or infinite), so there is no picture to decode. "
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
            raise _not_finite(dtype)
    return out
