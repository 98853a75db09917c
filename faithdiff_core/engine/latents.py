"""Images to latents and back, with diffusers' VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..backbone import SDXL, VAE_SCALE_FACTOR
from ..errors import NotFiniteError
from ..finite import is_finite
from ..vae.decoder_stages import parts_from_diffusers
from ..vae.tiled_decode import decode_tiled

Progress = Callable[[int, int], None]


@torch.no_grad()
def encode_latent(vae: Any, pixels: Tensor, tile: int | None, device: torch.device) -> Tensor:
    """Encode images, one by one: the mean of the distribution times the scaling factor, so nothing random is in it.

    Args:
        vae: diffusers' `AutoencoderKL`.
        pixels: RGB in [-1, 1], (B, 3, H, W), sides multiples of 8.
        tile: tile side in pixels; None encodes in one piece.
        device: where to compute.

    Returns:
        (B, 4, H / 8, W / 8), float32, on `device`.

    Raises:
        NotFiniteError: the VAE overflowed.
    """
    latents = []
    with _encoding_in_tiles(vae, tile):
        for image in pixels.split(1):
            mean = vae.encode(image.to(device, vae.dtype)).latent_dist.mean
            latents.append(_finite(vae, mean.float(), "encoding"))
    return torch.cat(latents) * vae.config.scaling_factor


@torch.no_grad()
def decode_latent(
    vae: Any, latent: Tensor, tile: int | None, device: torch.device, progress: Progress | None = None
) -> Tensor:
    """Decode latents, one by one.

    Args:
        vae: diffusers' `AutoencoderKL`.
        latent: (B, 4, h, w), as a sampler gives it, on any device.
        tile: tile side in pixels; None decodes in one piece. Tiles share their statistics, so they cause neither seams
            nor shifts of colour.
        device: where to compute.
        progress: called as progress(done, total) over the whole batch.

    Returns:
        RGB in [-1, 1], not clamped, (B, 3, 8 h, 8 w), float32, on the CPU.

    Raises:
        NotFiniteError: the VAE overflowed.
    """
    z = latent.cpu() / vae.config.scaling_factor
    if tile is None:
        decoded = []
        for image in z.split(1):
            pixels = vae.decode(image.to(device, vae.dtype), return_dict=False)[0]
            decoded.append(_finite(vae, pixels.float().cpu(), "decoding"))
            if progress is not None:
                progress(len(decoded), len(z))
        return torch.cat(decoded)
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None:
        # The decoder's layers are called one by one, past the VAE's own entrance, where offloading would move it.
        hook.pre_forward(vae)
    try:
        return decode_tiled(parts_from_diffusers(vae), z, tile=tile, device=device, dtype=vae.dtype, progress=progress)
    except NotFiniteError as error:
        raise _overflow(vae, "decoding") from error


def _finite(vae: Any, x: Tensor, what: str) -> Tensor:
    if is_finite(x):
        return x
    raise _overflow(vae, what)


def _overflow(vae: Any, what: str) -> NotFiniteError:
    remedy = "Choose dtype bf16 or fp32."
    if vae.config.scaling_factor == SDXL.vae_scaling_factor:
        remedy = (
            "SDXL's own VAE overflows in half precision: give `vae` the fp16-fix VAE (sdxl-vae-fp16-fix), or choose "
            "dtype bf16 or fp32."
        )
    return NotFiniteError(f"The VAE gave values that are not finite while {what} in {vae.dtype}. {remedy}")


@contextmanager
def _encoding_in_tiles(vae: Any, tile: int | None) -> Iterator[None]:
    """Let diffusers encode in tiles within a `with` block; the VAE's settings are as before afterwards."""
    if tile is None:
        yield
        return
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")
    before = [getattr(vae, name) for name in names]
    try:
        for name, value in zip(names, (True, tile, tile // VAE_SCALE_FACTOR), strict=True):
            setattr(vae, name, value)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(vae, name, value)
