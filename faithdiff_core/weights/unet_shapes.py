"""Which tensors a U-Net in diffusers' format has, worked out from the sizes that it shows.

Used to tell a complete U-Net from a broken one without importing diffusers and without building a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..backbone import Backbone, backbone_of
from ..models.shapes import Shape, block_count, check_channels

MAX_LEVELS = 8
"""Most levels, and most residual blocks of a level, that a file can have."""

MAX_DEPTH = 40
"""Most transformer blocks of an attention; SDXL has up to 10."""


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net with a backbone's architecture.

    Attributes:
        block_out_channels: channels of each level, finest first (SDXL: 320, 640, 1280).
        layers_per_block: residual blocks of each level (2).
        transformer_depths: transformer blocks per attention of each level; 0 for a level without (0, 2, 10).
        mid_depth: transformer blocks in the middle (10).
        cross_attention_dim: width of the text embeddings (2048).
        add_embedding_dim: width of the pooled text and size conditioning (2816); None for a U-Net that takes neither.
        in_channels, out_channels: latent channels (4).
        linear_projections: whether transformers begin and end with linear layers instead of 1x1 convolutions.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    transformer_depths: tuple[int, ...]
    mid_depth: int
    cross_attention_dim: int
    add_embedding_dim: int | None
    in_channels: int = 4
    out_channels: int = 4
    linear_projections: bool = True

    def __post_init__(self) -> None:
        check_channels(
            block_out_channels=self.block_out_channels,
            cross_attention_dim=self.cross_attention_dim,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
        )
        if self.add_embedding_dim is not None:
            check_channels(add_embedding_dim=self.add_embedding_dim)

    @classmethod
    def of(cls, backbone: Backbone) -> UNetConfig:
        """The sizes of a backbone's own U-Net."""
        return cls(
            block_out_channels=backbone.block_out_channels,
            layers_per_block=2,
            transformer_depths=backbone.transformer_depths,
            mid_depth=backbone.mid_depth,
            cross_attention_dim=backbone.context_width,
            add_embedding_dim=backbone.added_width,
            linear_projections=backbone.linear_projections,
        )

    @property
    def backbone(self) -> Backbone:
        """The family that the layers belong to, whatever their sizes."""
        return backbone_of(self.add_embedding_dim is not None, self.linear_projections)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> UNetConfig:
        """Read the sizes off the shapes of a state dict.

        Raises:
            KeyError: a tensor that the sizes hang on is missing.
            SettingsError: there is no U-Net of these sizes.
        """
        levels = block_count(shapes, "down_blocks.", MAX_LEVELS)
        if not levels:
            raise KeyError("down_blocks.0.resnets.0.conv1.weight")
        context = next((s for k, s in shapes.items() if k.endswith("transformer_blocks.0.attn2.to_k.weight")), None)
        if context is None:
            raise KeyError("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")
        backbone = family_of(shapes)
        added = backbone is None or backbone.size_conditioning
        return cls(
            block_out_channels=tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)),
            layers_per_block=block_count(shapes, "down_blocks.0.resnets.", MAX_LEVELS),
            transformer_depths=tuple(
                block_count(shapes, f"down_blocks.{i}.attentions.0.transformer_blocks.", MAX_DEPTH)
                for i in range(levels)
            ),
            mid_depth=block_count(shapes, "mid_block.attentions.0.transformer_blocks.", MAX_DEPTH),
            cross_attention_dim=context[1],
            add_embedding_dim=shapes["add_embedding.linear_1.weight"][1] if added else None,
            in_channels=shapes["conv_in.weight"][1],
            out_channels=shapes["conv_out.weight"][0],
            linear_projections=backbone is None or backbone.linear_projections,
        )

    def shapes(self) -> dict[str, Shape]:
        """Names and shapes of all tensors of this U-Net."""
        out: dict[str, Shape] = {}
        channels = self.block_out_channels
        time = channels[0] * 4

        def linear(name: str, n_out: int, n_in: int, bias: bool = True) -> None:
            out[name + ".weight"] = (n_out, n_in)
            if bias:
                out[name + ".bias"] = (n_out,)

        def conv(name: str, n_out: int, n_in: int, size: int = 3) -> None:
            out[name + ".weight"] = (n_out, n_in, size, size)
            out[name + ".bias"] = (n_out,)

        def norm(name: str, n: int) -> None:
            out[name + ".weight"] = (n,)
            out[name + ".bias"] = (n,)

        def resnet(name: str, n_in: int, n_out: int) -> None:
            norm(name + ".norm1", n_in)
            conv(name + ".conv1", n_out, n_in)
            linear(name + ".time_emb_proj", n_out, time)
            norm(name + ".norm2", n_out)
            conv(name + ".conv2", n_out, n_out)
            if n_in != n_out:
                conv(name + ".conv_shortcut", n_out, n_in, 1)

        def transformer(name: str, n: int, depth: int) -> None:
            norm(name + ".norm", n)
            for end in ("proj_in", "proj_out"):
                if self.linear_projections:
                    linear(f"{name}.{end}", n, n)
                else:
                    conv(f"{name}.{end}", n, n, 1)
            for i in range(depth):
                block = f"{name}.transformer_blocks.{i}"
                for k in (1, 2, 3):
                    norm(f"{block}.norm{k}", n)
                for attn, width in (("attn1", n), ("attn2", self.cross_attention_dim)):
                    linear(f"{block}.{attn}.to_q", n, n, bias=False)
                    linear(f"{block}.{attn}.to_k", n, width, bias=False)
                    linear(f"{block}.{attn}.to_v", n, width, bias=False)
                    linear(f"{block}.{attn}.to_out.0", n, n)
                linear(f"{block}.ff.net.0.proj", n * 8, n)
                linear(f"{block}.ff.net.2", n, n * 4)

        conv("conv_in", channels[0], self.in_channels)
        linear("time_embedding.linear_1", time, channels[0])
        linear("time_embedding.linear_2", time, time)
        if self.add_embedding_dim is not None:
            linear("add_embedding.linear_1", time, self.add_embedding_dim)
            linear("add_embedding.linear_2", time, time)
        skips = [channels[0]]
        last = len(channels) - 1
        for i, n in enumerate(channels):
            for j in range(self.layers_per_block):
                resnet(f"down_blocks.{i}.resnets.{j}", skips[-1], n)
                if self.transformer_depths[i]:
                    transformer(f"down_blocks.{i}.attentions.{j}", n, self.transformer_depths[i])
                skips.append(n)
            if i < last:
                conv(f"down_blocks.{i}.downsamplers.0.conv", n, n)
                skips.append(n)
        n = channels[-1]
        resnet("mid_block.resnets.0", n, n)
        resnet("mid_block.resnets.1", n, n)
        if self.mid_depth:
            transformer("mid_block.attentions.0", n, self.mid_depth)
        current = n
        for i, n in enumerate(reversed(channels)):
            for j in range(self.layers_per_block + 1):
                resnet(f"up_blocks.{i}.resnets.{j}", current + skips.pop(), n)
                current = n
                if self.transformer_depths[last - i]:
                    transformer(f"up_blocks.{i}.attentions.{j}", n, self.transformer_depths[last - i])
            if i < last:
                conv(f"up_blocks.{i}.upsamplers.0.conv", n, n)
        norm("conv_norm_out", channels[0])
        conv("conv_out", self.out_channels, channels[0])
        return out


def family_of(shapes: Mapping[str, Shape]) -> Backbone | None:
    """The backbone that a U-Net's layers belong to.

    Args:
        shapes: of its tensors, under diffusers' names.

    Returns:
        None where the layers belong to none: transformers or SDXL's added conditions are missing.
    """
    if any(name.startswith("add_embedding.") for name in shapes):
        return backbone_of(True, True)
    projection = next((shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")), None)
    # SD 1 and 2 have one transformer block in each attention.
    if projection is None or any(".transformer_blocks.1." in name for name in shapes):
        return None
    return backbone_of(False, len(projection) == 2)
