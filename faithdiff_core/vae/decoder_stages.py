"""A VAE decoder taken apart into stages, from ComfyUI's module or diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError


@dataclass(frozen=True)
class Resnet:
    """A residual block: shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))).

    Without a `shortcut`, x is added as it is.
    """

    norm1: nn.GroupNorm
    conv1: nn.Conv2d
    norm2: nn.GroupNorm
    conv2: nn.Conv2d
    shortcut: nn.Conv2d | None


@dataclass(frozen=True)
class Attention:
    """One-head attention over all pixels; the projections are 1x1 convolutions or linear layers."""

    norm: nn.GroupNorm
    query: nn.Conv2d | nn.Linear
    key: nn.Conv2d | nn.Linear
    value: nn.Conv2d | nn.Linear
    out: nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Upsample:
    """Nearest-neighbour upsampling by 2, then a convolution."""

    conv: nn.Conv2d


@dataclass(frozen=True)
class Output:
    """The last norm and the convolution to RGB."""

    norm: nn.GroupNorm
    conv: nn.Conv2d


Stage = Resnet | Attention | Upsample | Output

NormAffine = Callable[[nn.GroupNorm, torch.device], tuple[Tensor, Tensor]]
"""Reads a norm's weight and bias, each (channels,), float32, on a device."""


def stored_affine(norm: nn.GroupNorm, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm whose parameters are ordinary tensors, (channels,), float32, on `device`."""
    return norm.weight.detach().to(device).float(), norm.bias.detach().to(device).float()


@dataclass(frozen=True)
class DecoderParts:
    """A VAE decoder as a chain of stages.

    Attributes:
        conv_in: quantization and input convolution: latent (1, Z, h, w) to features (1, C, h, w).
        stages: the rest of the decoder, in order.
        decode: the ordinary decode, (B, Z, h, w) to (B, 3, scale * h, scale * w).
        latent_channels: Z.
        affine: reads the weight and bias of this decoder's norms.
    """

    conv_in: Callable[[Tensor], Tensor]
    stages: tuple[Stage, ...]
    decode: Callable[[Tensor], Tensor]
    latent_channels: int
    affine: NormAffine = stored_affine

    @property
    def scale(self) -> int:
        """Pixels per latent unit along each side."""
        return 2 ** sum(isinstance(stage, Upsample) for stage in self.stages)


def parts_from_ldm(model: Any, affine: NormAffine = stored_affine) -> DecoderParts:
    """Take apart a VAE that has the module names of the original latent diffusion code.

    Args:
        model: the VAE.
        affine: reads a norm's weight and bias; a host whose layers cast or keep their parameters elsewhere gives its
            own function.

    Raises:
        SettingsError: the decoder is not built like SDXL's.
    """
    decoder = _only(getattr(model, "decoder", None), "decoder", {"conv_in", "mid", "up", "norm_out", "conv_out"})
    if getattr(model, "bn", None) is not None:
        raise _other_vae("it normalizes its latents")
    if getattr(decoder, "tanh_out", False) or getattr(decoder, "carried", False):
        raise _other_vae("it ends in a tanh or makes a video")
    mid = _only(decoder.mid, "decoder.mid", {"block_1", "attn_1", "block_2"})
    attention = _only(mid.attn_1, "decoder.mid.attn_1", {"norm", "q", "k", "v", "proj_out"})
    stages: list[Stage] = [
        _resnet(mid.block_1, "decoder.mid.block_1"),
        _attention(attention.norm, attention.q, attention.k, attention.v, attention.proj_out),
        _resnet(mid.block_2, "decoder.mid.block_2"),
    ]
    for i in reversed(range(len(decoder.up))):
        level = _only(decoder.up[i], f"decoder.up.{i}", {"block", "attn", "upsample"})
        if len(level.attn):
            raise _other_vae(f"decoder.up.{i} has attention")
        stages += [_resnet(block, f"decoder.up.{i}.block.{j}") for j, block in enumerate(level.block)]
        if i:
            stages.append(_upsample(level.upsample, f"decoder.up.{i}.upsample"))
    stages.append(Output(_norm(decoder.norm_out, "decoder.norm_out"), _conv3x3(decoder.conv_out, "decoder.conv_out")))
    return _parts(getattr(model, "post_quant_conv", None), decoder, stages, affine)


def parts_from_diffusers(vae: Any) -> DecoderParts:
    """Take apart a diffusers `AutoencoderKL`.

    Raises:
        SettingsError: the decoder is not built like SDXL's.
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
        _attention(attention.group_norm, attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]),
        _resnet(mid.resnets[1], "decoder.mid_block.resnets.1"),
    ]
    for i, level in enumerate(decoder.up_blocks):
        name = f"decoder.up_blocks.{i}"
        _only(level, name, {"resnets", "upsamplers"})
        stages += [_resnet(block, f"{name}.resnets.{j}") for j, block in enumerate(level.resnets)]
        stages += [_upsample(up, f"{name}.upsamplers") for up in level.upsamplers or ()]
    norm_out = _norm(decoder.conv_norm_out, "decoder.conv_norm_out")
    stages.append(Output(norm_out, _conv3x3(decoder.conv_out, "decoder.conv_out")))
    return _parts(getattr(vae, "post_quant_conv", None), decoder, stages, stored_affine)


def _parts(post_quant: nn.Conv2d | None, decoder: Any, stages: list[Stage], affine: NormAffine) -> DecoderParts:
    def unquantized(z: Tensor) -> Tensor:
        return z if post_quant is None else post_quant(z)

    conv_in = _conv3x3(decoder.conv_in, "decoder.conv_in")
    first = conv_in if post_quant is None else post_quant
    return DecoderParts(
        lambda z: conv_in(unquantized(z)), tuple(stages), lambda z: decoder(unquantized(z)), first.in_channels, affine
    )


def _resnet(block: Any, name: str) -> Resnet:
    children = {"norm1", "conv1", "norm2", "conv2", "nin_shortcut", "conv_shortcut"}
    _only(block, name, children | {"swish", "nonlinearity", "dropout"})
    if getattr(block, "output_scale_factor", 1.0) != 1.0:
        raise _other_vae(f"{name} scales its output")
    if not isinstance(getattr(block, "nonlinearity", getattr(block, "swish", None)), nn.SiLU):
        raise _other_vae(f"the activation of {name} is not SiLU")
    shortcut = getattr(block, "nin_shortcut", None) or getattr(block, "conv_shortcut", None)
    if shortcut is not None and not (isinstance(shortcut, nn.Conv2d) and shortcut.kernel_size == (1, 1)):
        raise _other_vae(f"{name} has a shortcut that is not a 1x1 convolution")
    return Resnet(
        _norm(block.norm1, f"{name}.norm1"),
        _conv3x3(block.conv1, f"{name}.conv1"),
        _norm(block.norm2, f"{name}.norm2"),
        _conv3x3(block.conv2, f"{name}.conv2"),
        shortcut,
    )


def _attention(norm: Any, *projections: Any) -> Attention:
    if not all(isinstance(projection, nn.Conv2d | nn.Linear) for projection in projections):
        raise _other_vae("its attention's projections are neither convolutions nor linear layers")
    return Attention(_norm(norm, "the attention's norm"), *projections)


def _upsample(module: Any, name: str) -> Upsample:
    return Upsample(_conv3x3(_only(module, name, {"conv"}).conv, f"{name}.conv"))


def _norm(module: Any, name: str) -> nn.GroupNorm:
    if not isinstance(module, nn.GroupNorm):
        raise _other_vae(f"{name} is not a group norm")
    return module


def _conv3x3(module: Any, name: str) -> nn.Conv2d:
    if not isinstance(module, nn.Conv2d) or module.kernel_size != (3, 3):
        raise _other_vae(f"{name} is not a 2D convolution with a 3x3 kernel")
    return module


def _only(module: Any, name: str, children: set[str]) -> Any:
    """Return `module` if it has no other children than `children`: the decode would leave those out."""
    found = {child for child, _ in module.named_children()} if isinstance(module, nn.Module) else set()
    if not found or found - children:
        raise _other_vae(f"{name} has the children {sorted(found)}, expected {sorted(children)}")
    return module


def _other_vae(why: str) -> SettingsError:
    return SettingsError(
        f"The tiled decode expects the VAE of SDXL or one built like it, got another kind: {why}. "
        f"Use the VAE's ordinary decode instead."
    )
