"""The alignment: how the LQ features join the U-Net.

The condition embedding turns the LQ encoder's features into as many channels as the U-Net's conv_in gives;
it depends on the image alone, so one result serves all steps. Two residual blocks then look at the U-Net's channels
and the condition together, pixel by pixel, and what they find is added to the U-Net's features before its first block.

The published code writes the blocks with an attention layer whose sequence axis is the batch. At inference the rows
of that batch are the guidance halves of one image, which are identical at this place, and attention over identical
rows returns their common value: what remains of the layer is its value and output projection, for each pixel on its
own. That is what is computed here. Queries and keys play no part, the cost grows linearly with the pixels, and no
image can leak into another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes import widened
from ..errors import SettingsError
from .lq_encoder import NORM_EPS, NORM_GROUPS
from .shapes import Shape, block_count, check_channels

LAYERS_PREFIX = "information_transformer_layes."
"""Where the published file keeps the residual blocks; the spelling is the file's."""

MAX_LAYERS = 32
"""Most residual blocks that a file can have."""

QUICK_GELU = 1.702
"""Slope of the sigmoid in QuickGELU, the activation of the blocks' MLP."""


@dataclass(frozen=True)
class AlignmentConfig:
    """Sizes of an alignment, as its state dict shows them.

    Attributes:
        feature_channels: channels of the LQ features (published: 512).
        condition_channels: channels of the embedded condition (320).
        unet_channels: channels of the U-Net's conv_in (320).
        mlp_channels: hidden width of the blocks' MLP (1280).
        layers: number of residual blocks (2).
    """

    feature_channels: int
    condition_channels: int
    unet_channels: int
    mlp_channels: int
    layers: int

    @property
    def width(self) -> int:
        """Channels that the blocks see: the U-Net's and the condition's together."""
        return self.unet_channels + self.condition_channels

    def __post_init__(self) -> None:
        check_channels(NORM_GROUPS, feature_channels=self.feature_channels)
        check_channels(
            condition_channels=self.condition_channels, unet_channels=self.unet_channels, mlp_channels=self.mlp_channels
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> AlignmentConfig:
        """Read the sizes off the shapes of a state dict with the published names.

        Raises:
            KeyError: a name that the sizes hang on is missing.
            SettingsError: there is no alignment of these sizes.
        """
        return cls(
            feature_channels=shapes["condition_embedding.norm_in.weight"][0],
            condition_channels=shapes["condition_embedding.conv_out.weight"][0],
            unet_channels=shapes["spatial_ch_projs.weight"][0],
            mlp_channels=shapes[f"{LAYERS_PREFIX}0.mlp.c_fc.weight"][0],
            layers=block_count(shapes, LAYERS_PREFIX, MAX_LAYERS),
        )

    def published_shapes(self) -> dict[str, Shape]:
        """Names and shapes of the published state dict with these sizes, queries and keys included."""
        published = to_published(Alignment(self, device="meta", folded=False))
        return {name: tuple(value.shape) for name, value in published.items()}


class _ConditionEmbedding(nn.Module):
    def __init__(self, channels: int, out_channels: int, operations: Any, **kw: Any) -> None:
        super().__init__()
        self.norm_in = operations.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS, affine=True, **kw)
        self.conv_in = operations.Conv2d(channels, channels, 3, padding=1, **kw)
        self.conv_out = operations.Conv2d(channels, out_channels, 3, padding=1, **kw)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_in(self.norm_in(features))))


class _Projections(nn.Module):
    """Value and output projection as two layers, the form in which they are trained."""

    def __init__(self, width: int, operations: Any, **kw: Any) -> None:
        super().__init__()
        self.v_proj = operations.Linear(width, width, **kw)
        self.out_proj = operations.Linear(width, width, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.v_proj(x))


class _Mlp(nn.Module):
    """Two layers with QuickGELU, x * sigmoid(1.702 x), between them.

    Folded, the first layer gives 1.702 x and the second takes that factor out again, so that the activation is SiLU:
    one kernel that works in place, where QuickGELU takes three with a copy each.
    """

    def __init__(self, width: int, hidden: int, folded: bool, operations: Any, **kw: Any) -> None:
        super().__init__()
        self.folded = folded
        self.c_fc = operations.Linear(width, hidden, **kw)
        self.c_proj = operations.Linear(hidden, width, **kw)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(F.silu(x, inplace=True) if self.folded else x * torch.sigmoid(QUICK_GELU * x))


class _AlignmentBlock(nn.Module):
    def __init__(self, width: int, hidden: int, folded: bool, operations: Any, **kw: Any) -> None:
        super().__init__()
        self.ln_1 = operations.LayerNorm(width, **kw)
        self.attn = operations.Linear(width, width, **kw) if folded else _Projections(width, operations, **kw)
        self.ln_2 = operations.LayerNorm(width, **kw)
        self.mlp = _Mlp(width, hidden, folded, operations, **kw)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Alignment(nn.Module):
    """LQ features into the U-Net's first features.

    Args:
        config: the sizes; `AlignmentConfig.from_shapes` reads them off a file.
        dtype: parameter dtype.
        device: parameter device.
        operations: a namespace with `Conv2d`, `Linear`, `GroupNorm` and `LayerNorm`; `torch.nn`, or a host's own.
        folded: value and output projection as one matrix and the activation's slope within the MLP's weights (for
            inference), or as published (for training). The results are equal.
    """

    def __init__(
        self,
        config: AlignmentConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
        folded: bool = True,
    ) -> None:
        super().__init__()
        kw = {"dtype": dtype, "device": device}
        self.config = config
        self.folded = folded
        self.condition_embedding = _ConditionEmbedding(
            config.feature_channels, config.condition_channels, operations, **kw
        )
        self.blocks = nn.ModuleList(
            _AlignmentBlock(config.width, config.mlp_channels, folded, operations, **kw) for _ in range(config.layers)
        )
        self.proj = operations.Linear(config.width, config.unet_channels, **kw)

    def embed(self, features: Tensor) -> Tensor:
        """Embed LQ features; the result serves every step.

        Args:
            features: (B, feature_channels, h, w), the crop of one tile: the norm sees all that it is given, and the
                published code embeds tile by tile.

        Returns:
            The condition, (B, condition_channels, h, w).
        """
        return self.condition_embedding(features)

    def residual(self, h: Tensor, condition: Tensor) -> Tensor:
        """What `forward` adds to `h` at strength 1.

        Args:
            h: (B, unet_channels, height, width), the output of the U-Net's conv_in.
            condition: (B, condition_channels, height, width), or one row for all.

        Raises:
            SettingsError: sizes or rows of the two do not match.
        """
        rows, _, height, width = h.shape
        if condition.shape[-2:] != h.shape[-2:] or condition.shape[0] not in (1, rows):
            raise SettingsError(
                f"The LQ condition does not fit the U-Net's features: expected ({rows} or 1, "
                f"{self.config.condition_channels}, {height}, {width}), got {tuple(condition.shape)}."
            )
        # Tokens are laid out one after the other here, once: every later step would else work across the layout.
        parts = (h, condition.to(h).expand(rows, -1, -1, -1))
        x = torch.cat([part.flatten(2).transpose(1, 2) for part in parts], dim=2)
        for block in self.blocks:
            x = block(x)
        return self.proj(x).transpose(1, 2).reshape(rows, self.config.unet_channels, height, width)

    def forward(self, h: Tensor, condition: Tensor, strength: float | Tensor = 1.0, copies: int = 1) -> Tensor:
        """Add the LQ-conditioned residual to `h`.

        Guidance sends the same latents through the U-Net several times in one batch, with different texts. Text enters
        later, so these copies are equal here: one residual is computed and serves all of them.

        Args:
            h: (copies * B, unet_channels, height, width), what the output of the U-Net's conv_in; copies of the
                whole batch follow one another.
            condition: from `embed`, (B or 1, condition_channels, height, width).
            strength: factor on the residual, a number or one for each row of the batch; the number 0 is exactly off.
            copies: how many times h holds the same batch.

        Returns:
            The new h, of h's shape.

        Raises:
            SettingsError: sizes or rows of h and condition do not match.
        """
        if not isinstance(strength, Tensor) and strength == 0:
            return h
        residual = self.residual(h[: h.shape[0] // copies], condition)
        batches = h.view(copies, *residual.shape)
        if isinstance(strength, Tensor):
            return torch.addcmul(batches, residual, strength.to(h).view(-1, 1, 1, 1)).view_as(h)
        return torch.add(batches, residual.unsqueeze(0), alpha=strength).view_as(h)


def from_published(
    published: Mapping[str, Tensor], config: AlignmentConfig, *, folded: bool, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Turn a published state dict into one for `Alignment`.

    Args:
        published: tensors under the published names, complete.
        config: their sizes.
        folded: see `Alignment`. What is folded is computed in float32 at least, and rounded once.
        dtype: dtype of the result. Defaults to the file's.
    """
    state: dict[str, Tensor] = {}
    width = config.width
    for key, value in published.items():
        if key.startswith("spatial_ch_projs."):
            state["proj." + key.split(".")[1]] = value
        elif not key.startswith(LAYERS_PREFIX):
            state[key] = value
        elif ".attn." not in key:
            state["blocks." + key.removeprefix(LAYERS_PREFIX)] = value
    for layer in range(config.layers):
        source, target = f"{LAYERS_PREFIX}{layer}.attn.", f"blocks.{layer}.attn."
        # torch's attention stacks query, key and value; the values come last.
        v_weight = published[source + "in_proj_weight"][2 * width :]
        v_bias = published[source + "in_proj_bias"][2 * width :]
        out_weight, out_bias = published[source + "out_proj.weight"], published[source + "out_proj.bias"]
        if folded:
            wide = widened(out_weight.dtype)
            out_wide = out_weight.to(wide)
            state[target + "weight"] = (out_wide @ v_weight.to(wide)).to(dtype or out_weight.dtype)
            state[target + "bias"] = (out_wide @ v_bias.to(wide) + out_bias.to(wide)).to(dtype or out_bias.dtype)
            for name, factor in (
                ("c_fc.weight", QUICK_GELU),
                ("c_fc.bias", QUICK_GELU),
                ("c_proj.weight", 1 / QUICK_GELU),
            ):
                key = f"blocks.{layer}.mlp.{name}"
                state[key] = (state[key].to(wide) * factor).to(dtype or state[key].dtype)
        else:
            state |= {
                target + "v_proj.weight": v_weight,
                target + "v_proj.bias": v_bias,
                target + "out_proj.weight": out_weight,
                target + "out_proj.bias": out_bias,
            }
    return {key: value.to(dtype) for key, value in state.items()} if dtype is not None else state


def to_published(alignment: Alignment) -> dict[str, Tensor]:
    """The state dict of an unfolded `Alignment` under the published names.

    Queries and keys, which never had an effect, are written as zeros, so that the file has the published shapes.

    Raises:
        SettingsError: the alignment is folded; its two projections cannot be told apart any more.
    """
    if alignment.folded:
        raise SettingsError("A folded alignment cannot be written back; build it with folded=False.")
    state: dict[str, Tensor] = {}
    for key, value in alignment.state_dict().items():
        if key.startswith("proj."):
            state["spatial_ch_projs." + key.removeprefix("proj.")] = value
        elif key.startswith("blocks."):
            state[LAYERS_PREFIX + key.removeprefix("blocks.")] = value
        else:
            state[key] = value
    for layer in range(alignment.config.layers):
        attn = f"{LAYERS_PREFIX}{layer}.attn."
        for name in ("weight", "bias"):
            value = state.pop(f"{attn}v_proj.{name}")
            state[f"{attn}in_proj_{name}"] = torch.cat([torch.zeros_like(value), torch.zeros_like(value), value])
    return state
