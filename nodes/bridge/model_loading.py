"""FaithDiff's weights managed by ComfyUI (ModelPatcher): loaded, offloaded and cast like its models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.sd
import comfy.utils
import torch
from torch import nn

from ...faithdiff_core.backbone import VAE_SCALE_FACTOR
from ...faithdiff_core.dtypes import DTYPES
from ...faithdiff_core.errors import ImageError, WeightsError
from ...faithdiff_core.images.region import around, at_latent_size
from ...faithdiff_core.models.alignment import AlignmentConfig
from ...faithdiff_core.tiling.blend import complete, composite_spans
from ...faithdiff_core.tiling.grid import check_tile_size
from ...faithdiff_core.weights.block_strengths import BlockStrengths
from ...faithdiff_core.weights.faithdiff_file import FaithDiffWeights, Part, read_faithdiff
from ...faithdiff_core.weights.unet_names import checkpoint_names
from ...faithdiff_core.weights.unet_shapes import UNetConfig
from .alignment_patch import AlignmentPatch, set_patch
from .backbones import check_backbone
from .checks import mask_of_images
from .difference_patches import UNET_KEY_PREFIX, add_difference, by_strength
from .graph_types import AdapterModels, LQFeatures
from .lora_patches import add_lora_patches
from .prediction_type import check_guess, check_mixable, take_sampling, warn_of_mark
from .step_progress import work_progress
from .tiled_prediction import add_sampling_wrappers

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "default": None,
    **{name: DTYPES[name] for name in ("fp16", "bf16", "fp32", "fp8_e4m3fn", "fp8_e5m2")},
}
"""What the U-Net's weights can be kept in."""


def load_unet(path: str, weight_dtype: str, disable_dynamic: bool = False) -> ModelPatcher:
    """Make a MODEL of a FaithDiff file's U-Net with ComfyUI's loader.

    Also what ComfyUI calls again when it needs the same MODEL in another form (`cached_patcher_init`).

    Args:
        path: a file with a U-Net.
        weight_dtype: a key of `WEIGHT_DTYPES`.
        disable_dynamic: ComfyUI's argument: make a MODEL without dynamic video memory.

    Raises:
        WeightsError: the U-Net is not one that ComfyUI knows, or a quantized one in another dtype.
    """
    weights = read_faithdiff(path)
    if weights.unet is None:
        raise WeightsError(f"{weights.path.name} holds no U-Net.")
    return _unet_model(weights, weights.unet, weight_dtype, disable_dynamic)


def _unet_model(
    weights: FaithDiffWeights, unet: Part[UNetConfig], weight_dtype: str, disable_dynamic: bool = False
) -> ModelPatcher:
    """A MODEL of a U-Net that has been read."""
    path, prediction = weights.path, weights.prediction
    if weights.quantization is not None and weight_dtype != "default":
        raise WeightsError(
            f"{path.name} holds a quantized U-Net ({weights.quantization}), whose weights cannot be kept in "
            f"{weight_dtype}. Set weight_dtype to default, or choose the file that it was made from."
        )
    model_options: dict[str, Any] = {}
    dtype = WEIGHT_DTYPES[weight_dtype]
    if dtype is not None:
        model_options["dtype"] = dtype
        if dtype == torch.float8_e4m3fn:
            model_options["fp8_optimizations"] = True
    tensors = unet_tensors(unet)
    # For quantized tensors of unknown sizes ComfyUI's loader fails with an error of Python's.
    model = None
    if unet.quantized is None or _is_known(tensors):
        model = comfy.sd.load_diffusion_model_state_dict(
            tensors, model_options=model_options, disable_dynamic=disable_dynamic
        )
    if model is None:
        raise WeightsError(
            f"{path.name}: ComfyUI does not know a U-Net of these sizes ({unet.config}); the published "
            f"file has SDXL's. Connect an {weights.backbone.name} MODEL to `model`, or use the published file."
        )
    take_sampling(model, weights.backbone, prediction)
    model.cached_patcher_init = (load_unet, (str(path), weight_dtype))
    return model


def _is_known(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether ComfyUI knows a U-Net with these tensors, under its own names."""
    config = comfy.model_detection.detect_unet_config(tensors, "")
    return config is not None and comfy.model_detection.model_config_from_unet_config(config, tensors) is not None


def unet_tensors(unet: Part[UNetConfig]) -> dict[str, torch.Tensor]:
    """A U-Net's tensors as ComfyUI's loader takes them.

    Quantized layers stay so: ComfyUI reads them under its own names, and a U-Net in diffusers' format without them.

    Raises:
        WeightsError: this ComfyUI is older than their format.
    """
    if unet.quantized is None:
        return dict(unet.state)
    unknown = {layer.form.key for layer in unet.quantized.layers.values()} - comfy.quant_ops.QUANT_ALGOS.keys()
    if unknown:
        raise WeightsError(
            f"this ComfyUI does not know the quantized format {', '.join(sorted(unknown))} (int8 came with 0.27). "
            f"Update ComfyUI, or convert the model to fp8_scaled."
        )
    names = checkpoint_names(unet.config)
    tensors = {names[key]: value for key, value in unet.quantized.plain.items()}
    for name, layer in unet.quantized.layers.items():
        own = names[f"{name}.weight"].removesuffix(".weight")
        tensors |= {f"{own}.{end}": value for end, value in layer.stored().items()}
    return tensors


def load_faithdiff(
    path: str,
    weight_dtype: str,
    base: ModelPatcher | None,
    unet_strength: float,
    trained_from: ModelPatcher | None = None,
    factors: BlockStrengths | None = None,
) -> tuple[ModelPatcher, AdapterModels]:
    """Make the alignment-patched MODEL and its FAITHDIFF.

    Args:
        path: a FaithDiff file: full, an adapter, or an adapter with a LoRA.
        weight_dtype: a key of `WEIGHT_DTYPES`.
        base: the user's own MODEL, or None for the file's U-Net.
        unet_strength: how far a base's U-Net is moved to the file's: 0 not at all, 1 fully; with `trained_from`, the
            factor on the difference; with a LoRA in the file, its strength.
        trained_from: the MODEL that FaithDiff was trained from. With it, what FaithDiff learned is added to the base's
            U-Net instead.
        factors: on `unet_strength`, for parts of the U-Net. Defaults to 1 everywhere.

    Raises:
        WeightsError: the file cannot be used, alone or with this MODEL.
    """
    strengths = (factors or BlockStrengths()).times(unet_strength)
    weights = read_faithdiff(path)
    if weights.lq_encoder is None or weights.alignment is None:
        raise WeightsError(
            f"{weights.path.name} holds only {', '.join(sorted(weights.parts))}; the LQ encoder and the alignment are "
            f"needed. Choose FaithDiff.bin, or the `_adapter` file beside it."
        )
    weights.check_finite()
    if trained_from is not None and (base is None or weights.unet is None):
        raise WeightsError(
            "`base_model` works with your own MODEL at `model` and a full FaithDiff file: what FaithDiff learned is "
            "the difference of the file's U-Net and `base_model`'s, and is added to that of `model`. Connect `model`, "
            "or disconnect `base_model`."
        )
    if base is not None:
        model = base.clone()
        _check_base(model, weights, weights.alignment.config)
        if weights.quantization is not None and strengths.most > 0.0:
            raise WeightsError(
                f"{weights.path.name} holds a quantized U-Net ({weights.quantization}), which cannot be mixed into "
                f"`model`. Disconnect `model` to use FaithDiff's U-Net as it is, set unet_strength to 0, or choose the "
                f"file that it was made from."
            )
        if weights.unet is not None and trained_from is not None:
            if strengths.most > 0.0:
                add_difference(model, trained_from, weights, weights.unet, strengths)
        elif weights.unet is not None and strengths.most > 0.0:
            if strengths.least < 1.0:
                remedy = "Set unet_strength to 1 (FaithDiff's U-Net), for all blocks, or to 0 (your own)."
                check_mixable(model, "model", remedy, weights.prediction)
            take_sampling(model, weights.backbone, weights.prediction)
            warn_of_mark(model, weights)
            _blend_unet(model, weights, weights.unet, strengths)
        elif weights.lora is not None and strengths.most > 0.0:
            add_lora_patches(model, weights, weights.lora, strengths)
        elif weights.unet is None:
            check_guess(model, weights)
    elif weights.unet is None:
        raise WeightsError(
            f"{weights.path.name} holds the LQ encoder and the alignment, but no U-Net. Connect a MODEL to `model`: "
            "the `_unet` file that `python -m faithdiff_core convert` writes, loaded with Load Diffusion Model, or an "
            f"{weights.backbone.name} checkpoint of your own. Or choose the full FaithDiff file."
        )
    else:
        model = _unet_model(weights, weights.unet, weight_dtype)
    return model, attach_alignment(model, weights, weight_dtype)


def attach_alignment(model: ModelPatcher, weights: FaithDiffWeights, weight_dtype: str) -> AdapterModels:
    """Put the alignment onto a MODEL, in place, and make the FAITHDIFF that goes with it.

    Args:
        model: a MODEL that the file's alignment was made for.
        weights: a file with LQ encoder and alignment.
        weight_dtype: a key of `WEIGHT_DTYPES`.
    """
    faithdiff = _adapter(weights, weight_dtype, model)
    set_patch(model, AlignmentPatch(faithdiff.alignment, faithdiff.backbone))
    add_sampling_wrappers(model)
    return faithdiff


def _adapter(weights: FaithDiffWeights, weight_dtype: str, model: ModelPatcher) -> AdapterModels:
    """The LQ encoder and the alignment as patchers."""
    dtype = WEIGHT_DTYPES[weight_dtype]
    if dtype is None or dtype.itemsize == 1:
        # 45 million parameters: eight bits would save little and cost precision where it matters most.
        dtype = model.model.get_dtype_inference()
    place = {
        "device": comfy.model_management.unet_offload_device(),
        "operations": comfy.ops.manual_cast,
        # Whether ComfyUI wants a module's parameters to be the file's tensors, its kind of patcher tells.
        "assign": _patcher(nn.Module()).is_dynamic(),
    }
    return AdapterModels(
        name=weights.path.name,
        lq_encoder=_patcher(weights.build_lq_encoder(dtype, **place)),
        alignment=_patcher(weights.build_alignment(dtype, **place)),
        backbone=weights.backbone,
    )


def _patcher(module: nn.Module) -> ModelPatcher:
    return comfy.model_patcher.CoreModelPatcher(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def _check_base(model: ModelPatcher, weights: FaithDiffWeights, alignment: AlignmentConfig) -> None:
    """Refuse a MODEL that the alignment was not made for."""
    path, backbone = weights.path, weights.backbone
    check_backbone(model, "model", path, backbone)
    config = model.model.model_config.unet_config
    if config["model_channels"] != alignment.unet_channels:
        raise WeightsError(
            f"`model` begins with {config['model_channels']} channels, but the alignment of {path.name} is "
            f"made for {alignment.unet_channels}. They belong to different models."
        )
    if config.get("in_channels", 4) != 4:
        raise WeightsError(
            f"`model` takes {config['in_channels']} channels (an inpainting or editing variant of {backbone.name}), "
            f"but FaithDiff's U-Net takes 4. Connect an ordinary {backbone.name} checkpoint."
        )


def _blend_unet(
    model: ModelPatcher, weights: FaithDiffWeights, unet: Part[UNetConfig], strengths: BlockStrengths
) -> None:
    """Move a MODEL's U-Net towards FaithDiff's: (1 - strength) * own + strength * FaithDiff's, as weight patches.

    Patches act in order, and each scales what is there before it adds. Ours therefore go in front of LoRAs, which act
    on the result in full, whether they were applied before or come later. But a merge of models scales what stands
    before it: it is the user's own checkpoint, with all that was merged into it, and ours go behind it.

    Raises:
        WeightsError: the MODEL's weights are of other sizes or packed, so nothing can be added to them.
    """
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    own = model.model.state_dict().keys()  # names alone: quantised weights have their true shape on the module
    patches: dict[str, tuple[torch.Tensor]] = {}
    for name, weight in unet.state.items():
        key = UNET_KEY_PREFIX + names[name] if name in names else None
        if key is None or key not in own or comfy.utils.get_attr(model.model, key).shape != weight.shape:
            raise WeightsError(
                f"`model` has no U-Net weight like {name} of {weights.path.name} {tuple(weight.shape)}: it is no "
                f"{weights.backbone.name} model of the same build. Connect an ordinary {weights.backbone.name} "
                f"checkpoint, or set unet_strength to 0."
            )
        patches[key] = (weight,)
    groups = by_strength(patches, strengths)
    earlier = {key: model.patches.pop(key) for keys in groups.values() for key in keys if key in model.patches}
    for strength, keys in groups.items():
        model.add_patches({key: patches[key] for key in keys}, strength_patch=strength, strength_model=1.0 - strength)
    for key, others in earlier.items():
        merged = max((i + 1 for i, entry in enumerate(others) if _replaces(entry)), default=0)
        model.patches[key][:0] = others[:merged]
        model.patches[key].extend(others[merged:])


def _replaces(entry: tuple[Any, ...]) -> bool:
    """Whether a weight patch scales or replaces what stands before it, as a merge does and a LoRA does not.

    Entries are ComfyUI's: strength of the patch, what it adds, strength of what is there, and more.
    """
    _, added, strength_model, *_ = entry
    return strength_model != 1.0 or (isinstance(added, tuple) and len(added) == 2 and added[0] == "set")


def encode_lq(
    faithdiff: AdapterModels,
    pixels: torch.Tensor,
    tile_size: int,
    overlap: float,
    restore_mask: torch.Tensor | None = None,
    mask_margin: int = 0,
) -> LQFeatures:
    """Encode images with ComfyUI's memory management, progress and cancel.

    Args:
        faithdiff: the model.
        pixels: (B, H, W, 3) in [0, 1], sides multiples of 8.
        tile_size: tile side in pixels.
        overlap: overlap as a fraction of the tile.
        restore_mask: MASK, (B or 1, H, W), of what is to be restored; tiles far from it are left out.
        mask_margin: how far around the mask features are needed, in pixels.

    Returns:
        Features (B, C, H / 8, W / 8) on ComfyUI's intermediate device.

    Raises:
        SettingsError: a tile size out of range.
        ImageError: sides that are no multiples of 8.
    """
    check_tile_size(tile_size)
    height, width = pixels.shape[1:3]
    if height % VAE_SCALE_FACTOR or width % VAE_SCALE_FACTOR:
        raise ImageError(
            f"the sides of `pixels` must be multiples of {VAE_SCALE_FACTOR}, got {width} x {height}. Send the "
            "image through FaithDiff Prepare Image first: it pads, and FaithDiff Finish Image crops back."
        )
    patcher = faithdiff.lq_encoder
    # What ComfyUI allows its own VAEs, whose encoder has the same architecture: half precision overflows there.
    dtype = comfy.model_management.vae_dtype(patcher.load_device, [torch.bfloat16, torch.float32])
    height, width = (min(side, tile_size) for side in pixels.shape[1:3])
    comfy.model_management.load_models_gpu([patcher], memory_required=_encode_memory(height, width, dtype))
    images = pixels[..., :3].movedim(-1, 1) * 2.0 - 1.0
    needed = encoded = None
    if restore_mask is not None:
        mask = at_latent_size(mask_of_images(restore_mask, pixels))
        needed = around(mask, mask_margin)
        rows, columns = (composite_spans(side, tile_size, overlap) for side in needed.shape)
        encoded = complete(rows, columns, needed)
    features = patcher.model.encode(
        images, tile_size, overlap, work_progress(), device=patcher.load_device, dtype=dtype, needed=needed
    )
    return LQFeatures(features.to(comfy.model_management.intermediate_device()), encoded, faithdiff.backbone)


def _encode_memory(height: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that encoding one tile takes: ComfyUI's estimate for the encoder of SDXL's VAE."""
    return 1767 * height * width * dtype.itemsize
