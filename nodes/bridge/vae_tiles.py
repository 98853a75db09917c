"""Tiled decoding with a ComfyUI VAE: its memory management, progress and casting layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management
import torch
from torch import Tensor, nn

from ...faithdiff_core.backbone import VAE_SCALE_FACTOR
from ...faithdiff_core.errors import NotFiniteError, SettingsError
from ...faithdiff_core.images.region import composite, feathered
from ...faithdiff_core.tiling.grid import check_tile_size
from ...faithdiff_core.vae.decoder_stages import parts_from_ldm, stored_affine
from ...faithdiff_core.vae.tiled_decode import decode_tiled
from .checks import check_image, mask_of_images
from .step_progress import work_progress

if TYPE_CHECKING:
    from comfy.sd import VAE


def decode_in_tiles(vae: VAE, latents: Tensor, tile_size: int, overlap: float) -> Tensor:
    """Decode latents in tiles with shared statistics.

    Args:
        vae: ComfyUI's VAE.
        latents: (B, C, h, w), as a sampler returns them.
        tile_size: tile side in pixels, a multiple of 8 from 64.
        overlap: overlap as a fraction of the tile, 0 to 0.9.

    Returns:
        IMAGE, (B, 8 * h, 8 * w, 3) in [0, 1], on ComfyUI's intermediate device.

    Raises:
        SettingsError: latents that are not images', a tile or overlap out of range, or a VAE unlike SDXL's.
        NotFiniteError: the VAE overflowed.
    """
    if latents.ndim != 4:
        raise SettingsError(
            f"expected image latents of shape (batch, channels, height, width), got {tuple(latents.shape)}."
        )
    parts = parts_from_ldm(vae.first_stage_model, norm_affine)
    tile = check_tile_size(tile_size)
    height, width = (min(side, tile) for side in latents.shape[-2:])
    memory = vae.memory_used_decode((1, latents.shape[1], height, width), vae.vae_dtype)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=memory)
    try:
        pixels = decode_tiled(
            parts,
            latents,
            tile=tile_size,
            overlap=overlap,
            device=vae.device,
            dtype=vae.vae_dtype,
            progress=work_progress(),
        )
    except NotFiniteError as error:
        dtype = str(vae.vae_dtype).removeprefix("torch.")
        raise NotFiniteError(
            f"the VAE produced NaN or infinity in {dtype}. Use the fp16-fix VAE (sdxl-vae-fp16-fix), or start ComfyUI "
            f"with --bf16-vae or --fp32-vae."
        ) from error
    image = vae.process_output(pixels).movedim(1, -1).contiguous()
    return image.to(comfy.model_management.intermediate_device())


def decode_part(
    vae: VAE,
    latents: Tensor,
    tile_size: int,
    overlap: float,
    restore_mask: Tensor | None,
    feather: int,
    original: Tensor | None,
) -> Tensor:
    """Decode what was restored, and put it into the image that it was a part of.

    Decoded are whole images: a decode of the masked part alone would have statistics of its own, and another tone.
    Images that the mask leaves out altogether are not decoded.

    Args:
        vae, latents, tile_size, overlap: as for `decode_in_tiles`.
        restore_mask: MASK, 1 where the image is restored.
        feather: width of the mask's soft edge in pixels.
        original: IMAGE that the latents' size is of.

    Returns:
        IMAGE, exactly the original outside the mask and its edge.

    Raises:
        SettingsError: only one of mask and original, or they do not fit the latents.
    """
    if restore_mask is None or original is None:
        missing = "restore_mask" if restore_mask is None else "original"
        raise SettingsError(
            f"{missing} is not connected. To put a restored part back into its image, connect both restore_mask and "
            f"original; to decode the whole image, neither."
        )
    image = check_image(original, "original")[..., :3]
    height, width = (side * VAE_SCALE_FACTOR for side in latents.shape[-2:])
    if image.shape[1:3] != (height, width) or image.shape[0] not in (1, latents.shape[0]):
        raise SettingsError(
            f"original must be the image that the latents are of, {latents.shape[0]} x {width} x {height}, got "
            f"{image.shape[0]} x {image.shape[2]} x {image.shape[1]}."
        )
    out = image.to(comfy.model_management.intermediate_device(), torch.float32)
    out = out.expand(latents.shape[0], -1, -1, -1).clone()
    mask = feathered(mask_of_images(restore_mask, out), feather).to(out.device).movedim(1, -1)
    mask = mask.expand(out.shape[0], -1, -1, -1)
    chosen = [i for i in range(out.shape[0]) if mask[i].any()]
    if chosen:
        decoded = decode_in_tiles(vae, latents[chosen], tile_size, overlap).to(out)
        out[chosen] = composite(out[chosen], decoded, mask[chosen])
    return out


def norm_affine(norm: nn.GroupNorm, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight and bias of a GroupNorm of ComfyUI, (channels,), float32, on `device`.

    A layer that casts its parameters may hold them elsewhere, in another dtype or unpatched, so its result is measured:
    for +1 and -1 in every channel it returns bias + weight and bias - weight.
    """
    casts = getattr(norm, "comfy_cast_weights", False)
    if not (casts or getattr(norm, "weight_function", ()) or getattr(norm, "bias_function", ())):
        return stored_affine(norm, device)
    probe = torch.tensor([1.0, -1.0], device=device).expand(1, norm.num_channels, 2)
    plus, minus = norm(probe)[0].unbind(-1)
    # The probe's variance is 1, to which the norm adds its epsilon.
    return (plus - minus) / 2 * (1 + norm.eps) ** 0.5, (plus + minus) / 2
