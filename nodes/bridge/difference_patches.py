"""FaithDiff onto a MODEL as a difference: mine + strength * (FaithDiff - base), as weight patches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import comfy.utils
import torch

from ...faithdiff_core.errors import WeightsError
from ...faithdiff_core.weights.block_strengths import BlockStrengths
from ...faithdiff_core.weights.faithdiff_file import FaithDiffWeights, Part
from ...faithdiff_core.weights.merging import LEAST_SIMILARITY, cosine, sample_of
from ...faithdiff_core.weights.quantization import MARK
from ...faithdiff_core.weights.unet_shapes import UNetConfig
from .backbones import check_backbone
from .prediction_type import check_mixable

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

UNET_KEY_PREFIX = "diffusion_model."
"""How the names of a MODEL's U-Net weights begin."""

_REMEDY = "Without `base_model`, unet_strength 1 takes FaithDiff's U-Net as it is."


def add_difference(
    model: ModelPatcher,
    base: ModelPatcher,
    weights: FaithDiffWeights,
    unet: Part[UNetConfig],
    strengths: BlockStrengths,
) -> None:
    """Add what FaithDiff learned to a MODEL's U-Net, in place.

    The patches only add, so LoRAs and merges before and after them act as they do without. They refer to the base's
    weights and to the file's mapped ones; nothing is copied.

    Args:
        model: the user's MODEL.
        base: the MODEL that FaithDiff was trained from.
        weights: FaithDiff's file.
        unet: its U-Net.
        strengths: factors on the difference.

    Raises:
        WeightsError: the three do not belong together.
    """
    path, backbone = weights.path, weights.backbone
    for name, patcher in (("model", model), ("base_model", base)):
        check_backbone(patcher, name, path, backbone)
        check_mixable(patcher, name, _REMEDY, weights.prediction)
    if any(key.endswith(f".{MARK}") for key in base.model.state_dict()):
        # `get_key_patches` fails for such a MODEL, in ComfyUI's own merges, too.
        raise WeightsError(
            f"`base_model` is quantized, and ComfyUI cannot subtract quantized weights. Load the file that it was made "
            f"from, in fp16, bf16 or fp8 without scales. {_REMEDY}"
        )
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    base_weights = base.get_key_patches(UNET_KEY_PREFIX)
    own = model.model.state_dict().keys()
    patches: dict[str, tuple[torch.Tensor]] = {}
    for name, weight in unet.state.items():
        key = UNET_KEY_PREFIX + names.get(name, name)
        for owner, keys, patcher in (("model", own, model), ("base_model", base_weights.keys(), base)):
            if key not in keys or comfy.utils.get_attr(patcher.model, key).shape != weight.shape:
                raise WeightsError(
                    f"`{owner}` has no U-Net weight like {name} of {path.name} {tuple(weight.shape)}: it is no "
                    f"{backbone.name} model of the same build."
                )
        patches[key] = (weight,)
    similarity = cosine(
        (unet.state[name], comfy.utils.get_attr(base.model, UNET_KEY_PREFIX + names[name]).detach().cpu())
        for name in sample_of({name: tuple(weight.shape) for name, weight in unet.state.items()})
    )
    if similarity < LEAST_SIMILARITY:
        raise WeightsError(
            f"`base_model` is not what {path.name} was trained from: their weights have hardly anything in common "
            f"(cosine {similarity:.2f}). The published FaithDiff was trained from RealVisXL_V4.0. {_REMEDY}"
        )
    for strength, keys in by_strength(patches, strengths).items():
        model.add_patches({key: patches[key] for key in keys}, strength_patch=strength, strength_model=1.0)
        model.add_patches({key: base_weights[key] for key in keys}, strength_patch=-strength, strength_model=1.0)


def by_strength(keys: Iterable[str], strengths: BlockStrengths) -> dict[float, list[str]]:
    """Names of a MODEL's U-Net weights, grouped by the strength at which they change; those that do not are left out.

    Args:
        keys: names in the MODEL, with its prefix.
        strengths: of the U-Net's parts.
    """
    groups: dict[float, list[str]] = {}
    for key in keys:
        strength = strengths.at(key.removeprefix(UNET_KEY_PREFIX))
        if strength != 0.0:
            groups.setdefault(strength, []).append(key)
    return groups
