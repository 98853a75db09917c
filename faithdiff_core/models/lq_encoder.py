"""The LQ encoder: the part of FaithDiff that reads the low-quality image.

It has the architecture of the SDXL VAE's encoder up to and including the mid block (paper, section 3.2): without the
output norm, the output convolution and the quantization, so its output is the 512 channels that the alignment needs and
not a latent. Parameter names are those of diffusers, as in the published file after `denoise_encoder.`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import NotFiniteError, SettingsError
from ..finite import is_finite
from ..tiling.blend import Span, composite, composite_spans
from .shapes import Shape, block_count, check_channels, shapes_of

NORM_GROUPS = 32
"""Groups of every GroupNorm; a checkpoint's shapes do not tell it, and SDXL's VAE never uses another number."""

NORM_EPS = 1e-6
"""Epsilon of every GroupNorm in SDXL's VAE."""

ENCODER_TILE = 1024
"""Tile side in pixels that the published code encodes large images with."""

ENCODER_OVERLAP = 0.25
"""Overlap of encoder tiles as a fraction of the tile (stride 768 px at 1024 px)."""

MAX_LEVELS = 8
"""Most levels, and most residual blocks of a level, that a file can have."""

Progress = Callable[[int, int], None]
"""Called as progress(done, total) after each unit of work; it may raise to cancel."""


@dataclass(frozen=True)
class LQEncoderConfig:
    """Sizes of an LQ encoder, as its state dict shows them.

    Attributes:
        block_out_channels: channels of each level, finest first (published: 128, 256, 512, 512).
        layers_per_block: residual blocks of each level (published: 2).
        in_channels: channels of the image (3).
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    in_channels: int = 3

    @property
    def feature_channels(self) -> int:
        """Channels of the features that come out."""
        return self.block_out_channels[-1]

    @property
    def scale(self) -> int:
        """Pixels per feature along each side (published: 8)."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self) -> None:
        check_channels(NORM_GROUPS, block_out_channels=self.block_out_channels)
        check_channels(in_channels=self.in_channels)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> LQEncoderConfig:
        """Read the sizes off the shapes of a state dict with diffusers' names.

        Raises:
            KeyError: a name that the sizes hang on is missing.
            SettingsError: there is no encoder of these sizes.
        """
        levels = block_count(shapes, "down_blocks.", MAX_LEVELS)
        layers = block_count(shapes, "down_blocks.0.resnets.", MAX_LEVELS)
        if not layers:
            raise KeyError("down_blocks.0.resnets.0.conv1.weight")
        channels = tuple(shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels))
        return cls(channels, layers, shapes["conv_in.weight"][1])

    def shapes(self) -> dict[str, Shape]:
        """Names and shapes of all tensors of an encoder with these sizes."""
        return shapes_of(LQEncoder(self, device="meta"))


class _ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, operations: Any, **kw: Any) -> None:
        super().__init__()
        self.norm1 = operations.GroupNorm(NORM_GROUPS, in_channels, eps=NORM_EPS, affine=True, **kw)
        self.conv1 = operations.Conv2d(in_channels, out_channels, 3, padding=1, **kw)
        self.norm2 = operations.GroupNorm(NORM_GROUPS, out_channels, eps=NORM_EPS, affine=True, **kw)
        self.conv2 = operations.Conv2d(out_channels, out_channels, 3, padding=1, **kw)
        if in_channels != out_channels:
            self.conv_shortcut = operations.Conv2d(in_channels, out_channels, 1, **kw)
        else:
            self.conv_shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h


class _Downsample(nn.Module):
    def __init__(self, channels: int, operations: Any, **kw: Any) -> None:
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, stride=2, padding=0, **kw)

    def forward(self, x: Tensor) -> Tensor:
        # SDXL's VAE pads on the right and at the bottom only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _DownBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, layers: int, downsample: bool, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _ResnetBlock(in_channels if i == 0 else out_channels, out_channels, ops, **kw) for i in range(layers)
        )
        self.downsamplers = nn.ModuleList([_Downsample(out_channels, ops, **kw)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
        return x


class _Attention(nn.Module):
    """One-head attention over all pixels."""

    def __init__(self, channels: int, operations: Any, **kw: Any) -> None:
        super().__init__()
        self.group_norm = operations.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS, affine=True, **kw)
        self.to_q = operations.Linear(channels, channels, **kw)
        self.to_k = operations.Linear(channels, channels, **kw)
        self.to_v = operations.Linear(channels, channels, **kw)
        self.to_out = nn.ModuleList([operations.Linear(channels, channels, **kw)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (proj(tokens).unsqueeze(1) for proj in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + out.transpose(1, 2).reshape(batch, channels, height, width)


class _MidBlock(nn.Module):
    def __init__(self, channels: int, operations: Any, **kw: Any) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_ResnetBlock(channels, channels, operations, **kw) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(channels, operations, **kw)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class LQEncoder(nn.Module):
    """Low-quality image to features.

    Attributes:
        gradient_checkpointing: in training, compute each block's activations twice instead of keeping them: 0.1 GiB
            instead of 1.5 for an image of 512 px in bf16.

    Args:
        config: the sizes; `LQEncoderConfig.from_shapes` reads them off a file.
        dtype: parameter dtype.
        device: parameter device.
        operations: a namespace with `Conv2d`, `Linear` and `GroupNorm`; `torch.nn`, or a host's casting layers.
    """

    def __init__(
        self,
        config: LQEncoderConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
    ) -> None:
        super().__init__()
        kw = {"dtype": dtype, "device": device}
        channels = config.block_out_channels
        self.config = config
        self.conv_in = operations.Conv2d(config.in_channels, channels[0], 3, padding=1, **kw)
        self.down_blocks = nn.ModuleList(
            _DownBlock(
                channels[max(i - 1, 0)], channels[i], config.layers_per_block, i < len(channels) - 1, operations, **kw
            )
            for i in range(len(channels))
        )
        self.mid_block = _MidBlock(channels[-1], operations, **kw)
        self.gradient_checkpointing = False

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode in one piece.

        Args:
            pixels: RGB in [-1, 1], (B, 3, H, W), H and W multiples of `config.scale`.

        Returns:
            Features, (B, C, H / scale, W / scale).
        """
        h = self.conv_in(pixels)
        for block in (*self.down_blocks, self.mid_block):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, use_reentrant=False)
            else:
                h = block(h)
        return h

    @torch.no_grad()
    def encode(
        self,
        pixels: Tensor,
        tile: int | None = ENCODER_TILE,
        overlap: float = ENCODER_OVERLAP,
        progress: Progress | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        needed: Tensor | None = None,
    ) -> Tensor:
        """Encode images of any size with bounded memory.

        Images go through one by one, tile by tile; only the tile at work is on `device`. An image no larger than
        the tile is encoded in one piece. Larger ones are cut as the published code does: tiles start every
        tile * (1 - overlap) pixels, the last one ends at the border, and each is faded in linearly over the overlap
        with what is there. (Unlike the published code, no tile is made that lies wholly within its predecessor.)

        Args:
            pixels: RGB in [-1, 1], (B, 3, H, W), on any device.
            tile: tile side in pixels, a multiple of `config.scale`; None encodes in one piece.
            overlap: overlap of neighbours as a fraction of the tile, 0 to 0.9.
            progress: called as progress(done, total) after each tile; may raise to cancel.
            device: device to compute on. Defaults to the parameters' device.
            dtype: dtype to compute in. Defaults to the parameters' dtype.
            needed: where features are needed, (H / scale, W / scale), bool, on the CPU. Tiles without any are not
                computed, and the features are zero there; `tiling.blend.complete` says where they are as usual.
                Defaults to everywhere.

        Returns:
            Features, (B, C, H / scale, W / scale), on the device of `pixels`, in `dtype`.

        Raises:
            SettingsError: H or W is not a multiple of `config.scale`, or the image has the wrong layout.
            NotFiniteError: the encoder overflowed.
        """
        first = next(self.parameters())
        device = first.device if device is None else torch.device(device)
        dtype = first.dtype if dtype is None else dtype
        scale, channels = self.config.scale, self.config.feature_channels
        if pixels.ndim != 4 or pixels.shape[1] != self.config.in_channels:
            raise SettingsError(
                f"LQ encoder: expected pixels of shape (batch, {self.config.in_channels}, height, width), "
                f"got {tuple(pixels.shape)}."
            )
        batch, _, height, width = pixels.shape
        if height % scale or width % scale or not height or not width:
            raise SettingsError(
                f"LQ encoder: height and width must be multiples of {scale} pixels, got {width} x {height}. "
                f"Pad the image first."
            )
        side = max(height, width) if tile is None else tile
        rows = composite_spans(height // scale, side, overlap, scale)
        columns = composite_spans(width // scale, side, overlap, scale)
        asked = [(row, column) for row in rows for column in columns if _is_needed(needed, row, column)]
        total, done = batch * len(asked), 0
        out = torch.empty((batch, channels, height // scale, width // scale), dtype=dtype, device=pixels.device)

        for image in range(batch):

            def encode_tile(row: Span, column: Span, image: int = image) -> Tensor:
                nonlocal done
                if not _is_needed(needed, row, column):
                    return out.new_zeros((channels, row.size, column.size))
                crop = pixels[
                    image : image + 1,
                    :,
                    row.start * scale : row.stop * scale,
                    column.start * scale : column.stop * scale,
                ]
                features = self(crop.to(device=device, dtype=dtype))[0].to(out.device)
                done += 1
                if progress is not None:
                    progress(done, total)
                return features

            composite(rows, columns, encode_tile, out[image])
            # Published in fp16, where features of the golden and the demo model are off by 0.1 % (bf16: 1 %) and the
            # largest activation is a thousandth of the limit. Other weights may overflow, which must not go unnoticed.
            if not is_finite(out[image]):
                raise NotFiniteError(
                    f"The LQ encoder's features are not finite (NaN or infinite) in {str(dtype).removeprefix('torch.')}"
                    f". Compute in bf16 or fp32."
                )
        return out


def _is_needed(needed: Tensor | None, row: Span, column: Span) -> bool:
    return needed is None or bool(column.of(row.of(needed, -2), -1).any())
