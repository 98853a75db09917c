"""FaithDiff Tiled Diffusion and FaithDiff Sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..faithdiff_core.errors import NotFiniteError, SettingsError
from ..faithdiff_core.sampling.schedule import StartPoint, sampling_sigmas, start_latent
from ..faithdiff_core.sdxl import VAE_SCALE_FACTOR
from .bridge.alignment_patch import find_patch
from .bridge.graph_types import LQCondition, LQFeatures, LQFeaturesType
from .bridge.sampling_run import Tiling, set_up_run
from .bridge.step_progress import TileProgress
from .bridge.tiled_prediction import set_tiling
from .conditioning import Conditioning, with_lq
from .errors import named_errors
from .inputs import check_tiles, setting_input

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

PUBLISHED_SCHEDULE = "faithdiff"

TILE_TOOLTIP = (
    "Pixels. Larger images are sampled in tiles of this side. 1024 is what SDXL was trained at; smaller tiles need "
    "less memory and see less of the image."
)
OVERLAP_TOOLTIP = (
    "Part of a tile that it shares with its neighbour. 0.5 as published: no seams, about four times the work of 0."
)


TILE_BATCH_TOOLTIP = (
    "Tiles that go through the U-Net at once; 0 for as many as fit (up to 8). The result does not depend on it."
)


def tile_inputs() -> list[io.Input]:
    """The inputs about tiles that both nodes have."""
    return [
        setting_input("tile", TILE_TOOLTIP, "tile_size"),
        setting_input("overlap", OVERLAP_TOOLTIP),
        setting_input("tile_batch", TILE_BATCH_TOOLTIP, advanced=True),
    ]


def tiled(model: ModelPatcher, tiling: Tiling) -> ModelPatcher:
    """A MODEL that samples in tiles; the given one stays as it is."""
    clone = model.clone()
    set_tiling(clone, tiling)
    return clone


class FaithDiffTiledDiffusion(io.ComfyNode):
    """Makes any sampler work in tiles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffTiledDiffusion",
            display_name="FaithDiff Tiled Diffusion",
            category="FaithDiff",
            description="Makes a MODEL sample large images in overlapping tiles, with any sampler. Every tile gets "
            "its part of the LQ features, ControlNet hints, masks and areas, and SDXL's size conditioning as FaithDiff "
            "was published with it.",
            search_aliases=["faithdiff tiles", "tiled diffusion", "multidiffusion", "large image"],
            inputs=[
                io.Model.Input("model", tooltip="From FaithDiff Model Loader, or any SDXL MODEL."),
                *tile_inputs(),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def validate_inputs(cls, tile_size: int | None = None, overlap: float | None = None) -> bool | str:
        return check_tiles(tile_size, overlap)

    @classmethod
    def execute(cls, model: ModelPatcher, tile_size: int, overlap: float, tile_batch: int) -> io.NodeOutput:
        with named_errors("FaithDiff Tiled Diffusion"):
            return io.NodeOutput(tiled(model, Tiling(tile_size, overlap, tile_batch)))


class FaithDiffSampler(io.ComfyNode):
    """Samples as published."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffSampler",
            display_name="FaithDiff Sampler",
            category="FaithDiff",
            description="Restores: FaithDiff Conditioning, FaithDiff Tiled Diffusion and a sampler in one node, with "
            "the published schedule and starting point.",
            search_aliases=["faithdiff", "restore", "upscale", "super resolution", "ksampler"],
            inputs=[
                io.Model.Input("model", tooltip="From FaithDiff Model Loader; LoRAs may follow it."),
                io.Conditioning.Input("positive", tooltip="The caption or prompt: say what is in the image."),
                io.Conditioning.Input("negative", tooltip="Published: the encoded empty text."),
                LQFeaturesType.Input("lq_features", tooltip="From FaithDiff LQ Encode."),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise.",
                ),
                setting_input("steps", "Published: 20. More adds little; 4 to 8 with a few-step LoRA."),
                setting_input(
                    "cfg",
                    "Published: 5. Higher is crisper and less faithful; 1 halves the time (for few-step LoRAs).",
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.SAMPLER_NAMES, default="euler", tooltip="Published: euler."
                ),
                io.Combo.Input(
                    "scheduler",
                    options=[PUBLISHED_SCHEDULE, *comfy.samplers.SCHEDULER_NAMES],
                    default=PUBLISHED_SCHEDULE,
                    tooltip="`faithdiff` is the published schedule (leading spacing); the others are ComfyUI's.",
                ),
                setting_input(
                    "start",
                    "`lr`: noise with a trace of the low-quality image (published; needs latent_image). `noise`: noise "
                    "alone.",
                    "start_point",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1: starts later, from the latent with that much less noise, and changes the image "
                    "less (needs latent_image; start_point has no effect then).",
                ),
                *tile_inputs(),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="The low-quality image through VAE Encode. Its noise mask, if it has one, limits what "
                    "changes.",
                ),
                io.Noise.Input("noise", optional=True, tooltip="Used instead of the seed's noise."),
                setting_input(
                    "strength", "How strongly the image acts. 1 as published, 0 off.", optional=True, advanced=True
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def validate_inputs(cls, tile_size: int | None = None, overlap: float | None = None) -> bool | str:
        return check_tiles(tile_size, overlap)

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Conditioning,
        negative: Conditioning,
        lq_features: LQFeatures,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        start_point: str,
        denoise: float,
        tile_size: int,
        overlap: float,
        tile_batch: int,
        latent_image: dict[str, Any] | None = None,
        noise: Any = None,
        strength: float = 1.0,
    ) -> io.NodeOutput:
        with named_errors("FaithDiff Sampler"):
            if find_patch(model) is None:
                raise SettingsError(
                    "this MODEL has no alignment. Connect the MODEL that FaithDiff Model Loader gives; LoRAs and other "
                    "patches can stand between."
                )
            start = StartPoint(start_point)
            latent = _latent(model, lq_features, latent_image, start, denoise)
            sigmas = _sigmas(model, scheduler, steps, denoise)
            if len(sigmas) < 2:  # denoise 0: nothing is to be changed
                return io.NodeOutput(latent)
            tiling = Tiling(tile_size, overlap, tile_batch)
            tiled_model = tiled(model, tiling)
            progress = TileProgress(len(sigmas) - 1, len(tiling.grid(*lq_features.size)))
            set_up_run(tiled_model, progress=progress)
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
                denoise_mask=latent.get("noise_mask"),
                callback=progress.callback(latent_preview.prepare_callback(tiled_model, len(sigmas) - 1)),
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                seed=seed,
            )
            _check_finite(tiled_model, samples)
            return io.NodeOutput({**latent, "samples": samples.to(comfy.model_management.intermediate_device())})


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


def _sigmas(model: ModelPatcher, scheduler: str, steps: int, denoise: float) -> Tensor:
    """Noise levels; with denoise below 1 the last `steps` of a longer schedule, as the host has it."""
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
    """The noise with which the host, which starts from latent + scale * noise, arrives at the published start.

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
    if not torch.isfinite(samples).all():
        dtype = str(model.model.get_dtype_inference()).removeprefix("torch.")
        raise NotFiniteError(
            f"the result is not a number: the U-Net, computing in {dtype}, overflowed. Start ComfyUI with --bf16-unet "
            f"or --fp32-unet, or choose weight_dtype bf16 or fp32 in FaithDiff Model Loader; a LoRA or a cfg that is "
            f"far too strong does it too."
        )
