"""FaithDiff's backbones in ComfyUI's terms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.latent_formats
import comfy.model_base
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...faithdiff_core.backbone import BACKBONES, SD15, SD21, SDXL, Backbone, backbone_of
from ...faithdiff_core.errors import WeightsError

if TYPE_CHECKING:
    from pathlib import Path

    from comfy.model_patcher import ModelPatcher

LATENT_FORMATS: dict[Backbone, type[comfy.latent_formats.LatentFormat]] = {
    SDXL: comfy.latent_formats.SDXL,
    SD21: comfy.latent_formats.SD15,
    SD15: comfy.latent_formats.SD15,
}
"""How each backbone's latents are scaled."""


def backbone_of_model(model: ModelPatcher) -> Backbone | None:
    """The family of a MODEL; None for one that FaithDiff does not work on.

    Asked of its layers, so that models of few channels and those that other packs build are known, too.
    """
    base = model.model
    if isinstance(base, comfy.model_base.SDXL):
        return SDXL
    config = base.model_config.unet_config
    plain = type(base) is comfy.model_base.BaseModel and isinstance(base.diffusion_model, UNetModel)
    if not plain or config.get("adm_in_channels") is not None or config.get("use_temporal_attention"):
        return None
    return backbone_of(False, bool(config.get("use_linear_in_transformer")))


def check_backbone(model: ModelPatcher, name: str, path: Path, backbone: Backbone) -> None:
    """Refuse a MODEL of another family than a FaithDiff file's.

    Args:
        model: the MODEL.
        name: of the input that it came by.
        path: the FaithDiff file.
        backbone: what the file is made for.

    Raises:
        WeightsError: they are of different families, or FaithDiff does not work on the MODEL's at all.
    """
    found = backbone_of_model(model)
    if found is backbone:
        return
    if found is None:
        kind = type(model.model).__name__
        known = ", ".join(each.name for each in BACKBONES)
        raise WeightsError(
            f"`{name}` is of type {kind}, but FaithDiff works with {known}, and {path.name} with {backbone.name}. "
            f"Connect an {backbone.name} checkpoint."
        )
    raise WeightsError(
        f"`{name}` is a model of {found.name}, but with {path.name} FaithDiff works with {backbone.name}. Connect an "
        f"{backbone.name} checkpoint, or choose a FaithDiff file that was trained on {found.name}."
    )
