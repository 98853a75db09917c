"""FaithDiff onto a MODEL as a LoRA, as weight patches of ComfyUI's own kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.lora
import comfy.utils

from ...faithdiff_core.errors import WeightsError
from ...faithdiff_core.models.shapes import Shape
from ...faithdiff_core.weights.block_strengths import BlockStrengths
from ...faithdiff_core.weights.faithdiff_file import FaithDiffWeights, Part
from ...faithdiff_core.weights.lora_names import BIAS_DIFFERENCE, LoRASizes, changed_shape
from ...faithdiff_core.weights.marks import IN_WORDS
from .difference_patches import by_strength
from .prediction_type import check_mixable

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def add_lora_patches(
    model: ModelPatcher, weights: FaithDiffWeights, lora: Part[LoRASizes], strengths: BlockStrengths
) -> None:
    """Add a LoRA to a MODEL's U-Net, in place.

    ComfyUI leaves out tensors that fit nowhere, and only logs those of another shape: here both are errors.

    Args:
        model: the user's MODEL.
        weights: the LoRA's file.
        lora: its tensors.
        strengths: factors on what it adds.

    Raises:
        WeightsError: the MODEL predicts something else than FaithDiff, or has no weights that the LoRA fits.
    """
    name, predicts = weights.backbone.name, IN_WORDS[weights.prediction]
    remedy = f"Connect an {name} checkpoint that predicts {predicts}, or set unet_strength to 0."
    check_mixable(model, "model", remedy, weights.prediction)
    places: dict[str, str] = comfy.lora.model_lora_keys_unet(model.model, {})
    own = model.model.state_dict().keys()
    found: dict[str, dict[str, Shape]] = {}
    for key, value in lora.state.items():
        layer, _, kind = key.partition(".")
        target = places.get(layer, layer)
        if kind == BIAS_DIFFERENCE:
            target = target.removesuffix(".weight") + ".bias"
        found.setdefault(target, {})[kind] = tuple(value.shape)
    for target, shapes in found.items():
        given = changed_shape(shapes)
        if target not in own or tuple(comfy.utils.get_attr(model.model, target).shape) != given:
            raise WeightsError(
                f"`model` has no U-Net weight {target} of the shape {given} that the LoRA of {weights.path.name} "
                f"changes: it is no {name} model of the same build. Connect an ordinary {name} checkpoint, or set "
                f"unet_strength to 0."
            )
    patches = comfy.lora.load_lora(dict(lora.state), places, log_missing=False)
    for strength, keys in by_strength(patches, strengths).items():
        model.add_patches({key: patches[key] for key in keys}, strength_patch=strength)
