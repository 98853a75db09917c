"""A restoration with ComfyUI's samplers: the published schedule and start, tiles and LQ features, in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...faithdiff_core.backbone import VAE_SCALE_FACTOR
from ...faithdiff_core.errors import NotFiniteError, SettingsError
from ...faithdiff_core.finite import is_finite
from ...faithdiff_core.sampling.schedule import StartPoint, sampling_sigmas, start_latent
from ...faithdiff_core.tiling.grid import Tile
from .active_conditions import check_channels
from .alignment_patch import find_patch
from .graph_types import LQCondition, LQFeatures
from .lq_conditioning import Conditioning, with_lq
from .sampling_run import Tiling, set_up_run
from .step_progress import TileProgress
from .tiled_prediction import tiled

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

PUBLISHED_SCHEDULE = "faithdiff"

SAMPLERS: list[str] = comfy.samplers.SAMPLER_NAMES

SCHEDULES: list[str] = [PUBLISHED_SCHEDULE, *comfy.samplers.SCHEDULER_NAMES]
"""The published schedule and ComfyUI's."""


def restore(
    model: ModelPatcher,
    positive: Conditioning,
    negative: Conditioning,
    lq_features: LQFeatures,
    *,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    start_point: str,
    denoise: float,
    tiling: Tiling,
    latent_image: dict[str, Any] | None,
    noise: Any,
    strength: float,
    preview_tile: int = -1,
) -> dict[str, Any]:
    """Sample a restored LATENT; the arguments are FaithDiff Sampler's inputs.

    Raises:
        SettingsError: the MODEL has no alignment, or the inputs do not go together.
        NotFiniteError: the U-Net overflowed.
    """
    if find_patch(model) is None:
        raise SettingsError(
            "this MODEL has no alignment. Connect the MODEL that FaithDiff Model Loader gives; LoRAs and other "
            "patches can stand between."
        )
    start = StartPoint(start_point)
    latent = _latent(model, lq_features, latent_image, start, denoise)
    sigmas = restoration_sigmas(model, scheduler, steps, denoise)
    if len(sigmas) < 2:  # denoise 0: nothing is to be changed
        return latent
    tiled_model = tiled(model, tiling)
    only, denoise_mask = None, latent.get("noise_mask")
    if preview_tile >= 0:
        if latent_image is None:
            raise SettingsError("preview_tile needs latent_image: the tile is placed into it.")
        only = tiling.preview(preview_tile, *lq_features.size)
        denoise_mask = _within(only, latent["samples"], denoise_mask)
    progress = TileProgress(len(sigmas) - 1, 1 if only else len(tiling.grids(*lq_features.size)))
    set_up_run(tiled_model, progress=progress, only=only)
    condition = LQCondition(lq_features, strength)
    guider = comfy.samplers.CFGGuider(tiled_model)
    guider.set_conds(with_lq(positive, condition), with_lq(negative, condition))
    guider.set_cfg(cfg)
    if noise is None:
        drawn = comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))
    else:
        drawn, seed = noise.generate_noise(latent), noise.seed
    if denoise >= 1.0:
        drawn = _starting_noise(model, start, latent["samples"], drawn, sigmas)
    samples = guider.sample(
        drawn,
        latent["samples"],
        comfy.samplers.sampler_object(sampler_name),
        sigmas,
        denoise_mask=denoise_mask,
        callback=progress.callback(latent_preview.prepare_callback(tiled_model, len(sigmas) - 1)),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    _check_finite(tiled_model, samples)
    return {**latent, "samples": samples.to(comfy.model_management.intermediate_device())}


def _within(tile: Tile, samples: Tensor, noise_mask: Tensor | None) -> Tensor:
    """A noise mask, (B or 1, 1 or C, h, w), that leaves out what lies outside a tile."""
    inside = torch.zeros(1, 1, *samples.shape[-2:])
    tile.crop(inside).fill_(1.0)
    if noise_mask is None:
        return inside
    return comfy.sampler_helpers.prepare_mask(noise_mask, samples.shape, torch.device("cpu")) * inside


def _latent(
    model: ModelPatcher,
    lq_features: LQFeatures,
    latent_image: dict[str, Any] | None,
    start: StartPoint,
    denoise: float,
) -> dict[str, Any]:
    """The LATENT that sampling works on: the one given, or zeros of the features' size."""
    height, width = lq_features.size
    if latent_image is None:
        if denoise < 1.0 or start is StartPoint.LR:
            why = "start_point `lr` begins" if denoise >= 1.0 else "a denoise below 1 begins"
            raise SettingsError(
                f"{why} from the low-quality image's latent. Connect the prepared image through VAE Encode to "
                f"latent_image, or choose start_point `noise` with denoise 1."
            )
        channels = model.get_model_object("latent_format").latent_channels
        device = comfy.model_management.intermediate_device()
        return {"samples": torch.zeros(lq_features.tensor.shape[0], channels, height, width, device=device)}
    samples = latent_image["samples"]
    if samples.ndim == 4:
        check_channels(samples, model.model)
    if samples.ndim != 4 or tuple(samples.shape[-2:]) != (height, width):
        raise SettingsError(
            f"latent_image must be {width * VAE_SCALE_FACTOR} x {height * VAE_SCALE_FACTOR} pixels like the image of "
            f"the LQ features, got a latent of shape {tuple(samples.shape)}. Encode the same prepared image with both."
        )
    if samples.shape[0] != lq_features.tensor.shape[0] and lq_features.tensor.shape[0] != 1:
        raise SettingsError(
            f"latent_image holds {samples.shape[0]} images, the LQ features {lq_features.tensor.shape[0]}. Encode "
            "the same batch with both."
        )
    return latent_image.copy()


def restoration_sigmas(model: ModelPatcher, scheduler: str, steps: int, denoise: float) -> Tensor:
    """Noise levels; with denoise below 1 the last `steps` of a longer schedule, as ComfyUI has it."""
    if denoise <= 0.0:
        return torch.zeros(0)
    total = steps if denoise >= 1.0 else int(steps / denoise)
    model_sampling = model.get_model_object("model_sampling")
    if scheduler == PUBLISHED_SCHEDULE:
        if total > len(model_sampling.sigmas):
            raise SettingsError(
                f"steps / denoise must be at most {len(model_sampling.sigmas)} with the published schedule, got "
                f"{total}. Take fewer steps, or another scheduler."
            )
        sigmas = sampling_sigmas(total, model_sampling.sigmas)
    else:
        sigmas = comfy.samplers.calculate_sigmas(model_sampling, scheduler, total)
    return sigmas.cpu()[-(steps + 1) :]


def _starting_noise(model: ModelPatcher, start: StartPoint, samples: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """The noise with which ComfyUI, which starts from latent + scale * noise, arrives at the published start.

    This way the latent stays the clean one, which inpainting masks need.
    """
    sampling = model.get_model_object("model_sampling")
    sigma = sigmas[0]
    latent_format = model.get_model_object("latent_format")
    empty = not torch.count_nonzero(samples)
    clean = samples if empty else latent_format.process_in(samples)
    clean = clean.to(noise)
    x = start_latent(start, noise, sigma, clean)
    most = float(sampling.sigma_max)
    at_most = bool(torch.isclose(sigma, torch.tensor(most), rtol=1e-5)) or float(sigma) > most
    one = torch.ones(1, 1, 1, 1)
    scale = sampling.noise_scaling(sigma.view(1, 1, 1, 1), one.clone(), torch.zeros_like(one), at_most)
    return (x - clean) / scale.to(x)


def _check_finite(model: ModelPatcher, samples: Tensor) -> None:
    if not is_finite(samples):
        dtype = str(model.model.get_dtype_inference()).removeprefix("torch.")
        raise NotFiniteError(
            f"the U-Net produced NaN or infinity in {dtype}. Start ComfyUI with --bf16-unet "
            f"or --fp32-unet, or choose weight_dtype bf16 or fp32 in FaithDiff Model Loader; a LoRA or a cfg that is "
            f"far too strong does it too."
        )
