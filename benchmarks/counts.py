"""What a restoration costs at least, counted from shapes on torch's meta device: nothing is computed."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import models
from .measure import Work
from .settings import SCALE
from .shared import shared

_META = torch.device("meta")


def count(work: Work) -> int:
    """Floating point operations of matrix products, convolutions and attention; a multiply-add counts as two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@shared("counts")
def unet_call(size: int, batch: int = 2) -> int:
    """A U-Net call for a batch of latents of size x size pixels. Defaults to a guided pair."""
    unet = _unet()
    return count(lambda: unet(**models.unet_inputs(batch, size // SCALE, _META, torch.float32)))


@shared("counts")
def _unet() -> nn.Module:
    unet: nn.Module = models.unet(_META, torch.float32)
    return unet


@shared("counts")
def alignment_call(size: int) -> int:
    """Our alignment for a guided pair: computed once, added to both."""
    module, (h, _, condition) = models.alignment(_META, torch.float32), _tensors(size)
    return count(lambda: module.residual(h[:1], condition))


@shared("counts")
def embedding(size: int) -> int:
    """Embedding the condition of a tile."""
    module, (_, features, _) = models.alignment(_META, torch.float32), _tensors(size)
    return count(lambda: module.embed(features[:1]))


@shared("counts")
def published_alignment_call(size: int) -> int:
    """The published formulation for a guided pair, embedding included."""
    module, (h, features, _) = models.published_alignment(_META, torch.float32), _tensors(size)
    return count(lambda: module(h, features))


@shared("counts")
def lq_encode(size: int) -> int:
    """The LQ encoder on size x size pixels in one piece; the VAE's encoder costs the same."""
    module = models.lq_encoder(_META, torch.float32)
    return count(lambda: module(torch.empty(1, 3, size, size, device=_META)))


@shared("counts")
def vae_decode(size: int) -> int:
    """The VAE's decoder on size x size pixels in one piece."""
    vae = models.vae(_META, torch.float32)
    return count(lambda: vae.decode(torch.empty(1, 4, size // SCALE, size // SCALE, device=_META)))


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(value.numel() for value in module.parameters())


@shared("counts")
def parameter_counts() -> dict[str, int]:
    """Parameters of each part in the published sizes."""
    return {
        "U-Net": parameters(_unet()),
        "LQ encoder": parameters(models.lq_encoder(_META, torch.float32)),
        "alignment": parameters(models.alignment(_META, torch.float32)),
        "VAE": parameters(models.vae(_META, torch.float32)),
    }


def _tensors(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    side = size // SCALE
    config = models.ALIGNMENT
    made = [(2, config.unet_channels), (2, config.feature_channels), (1, config.condition_channels)]
    h, features, condition = (torch.empty(*shape, side, side, device=_META) for shape in made)
    return h, features, condition
