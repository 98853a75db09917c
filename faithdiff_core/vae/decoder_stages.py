"""A VAE decoder taken apart into stages, from ComfyUI's module or diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import SettingsError


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
