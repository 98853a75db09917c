"""Which LQ features act on which conditioning in a step, and how strongly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

import torch
from torch import Tensor

from ...faithdiff_core.backbone import VAE_SCALE_FACTOR, Backbone
from ...faithdiff_core.errors import SettingsError
from ...faithdiff_core.tiling.grid import Tile
from .graph_types import CONDITION_KEY, LQCondition
from .sampling_run import CallCondition

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

Conds = Sequence[list[dict[str, Any]] | None]
"""ComfyUI's: the conditionings of each prompt (positive, negative, ...); None for a prompt that is left out."""

Active = dict[UUID, tuple[LQCondition, float]]
"""The LQ condition of each conditioning that has one, and its strength in this step."""


def without_lq(conds: Conds) -> list[list[dict[str, Any]] | None]:
    """The conditionings as a U-Net call takes them: LQ features reach it in another way."""
    out: list[list[dict[str, Any]] | None] = []
    for group in conds:
        out.append(None if group is None else [_without_lq(cond) for cond in group])
    return out


def _without_lq(cond: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in cond["model_conds"].items() if name != CONDITION_KEY}
    return {**cond, "model_conds": kept}


def carries_lq(conds: Conds) -> bool:
    """Whether a conditioning has LQ features, in whatever part of the sampling."""
    return any(CONDITION_KEY in cond for group in conds for cond in group or ())


def active_conditions(conds: Conds, prompts: Conds, timestep: Tensor, model_sampling: Any) -> Active:
    """Which LQ features act on which conditioning in this step, and how strongly.

    LQ features tell of the image, not of a prompt, and guidance compares predictions, which must be about the same
    image. So where all features of a step are the same ones, they hold for the conditionings without any, too (a plain
    negative, the empty one of perpendicular guidance), with the strength of the first that carries them. But a prompt
    that carries them in one part of the sampling, and in this step acts by conditionings that do not, has switched
    the image off: it is off for all then.

    Args:
        conds: of the call.
        prompts: all of the run, which a call may have a part of (guidance 1, perturbed attention).
        timestep: noise levels of the step.
        model_sampling: the MODEL's, which turns parts of the sampling into noise levels.
    """
    groups = [*prompts, *conds]
    if not carries_lq(groups):
        return {}
    # Asking the device waits for it, so only where a part of the sampling is meant.
    sigma = float(timestep[0]) if any(map(_in_part, _each(groups))) else 0.0
    acting = [[cond for cond in group or () if _acts(cond, sigma)] for group in groups]
    for group, now in zip(groups, acting, strict=True):
        scheduled = any(CONDITION_KEY in cond for cond in group or ())
        if scheduled and now and not any(CONDITION_KEY in cond for cond in now):
            return {}
    carrying = [cond[CONDITION_KEY] for now in acting for cond in now if CONDITION_KEY in cond]
    if not carrying:
        return {}
    first = carrying[0]
    same = all(_same(condition, first) for condition in carrying)
    active: Active = {}
    for now in acting[len(prompts) :]:
        for cond in now:
            condition = cond.get(CONDITION_KEY, first if same else None)
            if condition is not None:
                active[cond["uuid"]] = condition, condition.strength_at(sigma, model_sampling)
    return active


def other_tiler(seen: Tile, got: tuple[int, int]) -> str:
    """The message for a U-Net call that sees less than it was cut for, (height, width) in latent units."""
    part, call = (f"{w * VAE_SCALE_FACTOR} x {h * VAE_SCALE_FACTOR}" for h, w in ((seen.height, seen.width), got))
    return (
        f"FaithDiff: a U-Net call was made for a part of {part} pixels with LQ features, but it sees {call}: another "
        f"node cuts the latent within the call (another tiled diffusion). Take that node out; FaithDiff Tiled "
        f"Diffusion or FaithDiff Sampler samples in tiles."
    )


def _acts(cond: dict[str, Any], sigma: float) -> bool:
    """Whether ComfyUI uses a conditioning at a noise level (`get_area_and_mult`)."""
    if "timestep_start" in cond and sigma > cond["timestep_start"]:
        return False
    return not ("timestep_end" in cond and sigma < cond["timestep_end"])


def _in_part(cond: dict[str, Any]) -> bool:
    """Whether a conditioning, or the image on it, acts in a part of the sampling only."""
    ranged = CONDITION_KEY in cond and cond[CONDITION_KEY].ranged
    return bool(ranged or "timestep_start" in cond or "timestep_end" in cond)


def _same(one: LQCondition, other: LQCondition) -> bool:
    a, b = one.features.tensor, other.features.tensor
    return a is b or (a.shape == b.shape and a.device == b.device and torch.equal(a, b))


def check_channels(latents: Tensor, model: BaseModel) -> None:
    """Check that latents are of the kind that a model denoises.

    Raises:
        SettingsError: they have another number of channels.
    """
    expected = model.latent_format.latent_channels
    if latents.shape[1] != expected:
        raise SettingsError(
            f"FaithDiff: expected latents of {expected} channels, as the MODEL has them, got {latents.shape[1]}: "
            f"{tuple(latents.shape)}. Encode the image with the VAE of the MODEL's checkpoint."
        )


def check_features(active: Active, x_in: Tensor, backbone: Backbone | None) -> None:
    """Check that LQ features and latents are of the same images, as far as sizes tell, and for the MODEL's backbone.

    Raises:
        SettingsError: they differ in size or number, or come from an LQ encoder for another backbone.
    """
    for condition, _ in active.values():
        features = condition.features
        if backbone is not None and features.backbone is not backbone:
            raise SettingsError(
                f"FaithDiff: the LQ features come from a FaithDiff file for {features.backbone.name}, but the MODEL is "
                f"one of {backbone.name}. Take FAITHDIFF and MODEL from the same FaithDiff Model Loader."
            )
        height, width = x_in.shape[-2:]
        if features.size != (height, width):
            raise SettingsError(size_mismatch(features.size, (height, width)))
        if features.tensor.shape[0] not in (1, x_in.shape[0]):
            raise SettingsError(
                f"FaithDiff: there are LQ features of {features.tensor.shape[0]} images, but {x_in.shape[0]} "
                "latents. Encode as many images as there are latents, or one for all."
            )


def check_encoded(active: Active, tiles: Sequence[Tile]) -> None:
    """Check that LQ features that were encoded around a mask are complete in the tiles to be computed.

    Raises:
        SettingsError: they are not.
    """
    maps = {id(c.features): c.features.encoded for c, _ in active.values() if c.features.encoded is not None}
    for encoded in maps.values():
        for tile in tiles:
            if not tile.crop(encoded).all():
                raise SettingsError(
                    f"FaithDiff: the LQ features are encoded around a mask only, but the tile at "
                    f"{tile.left * VAE_SCALE_FACTOR}, {tile.top * VAE_SCALE_FACTOR} (pixels from the left and the "
                    f"top) needs others. Give the latent the same mask as its noise mask (Set Latent Noise Mask), set "
                    f"mask_margin of FaithDiff LQ Encode to at least the sampler's tile_size, or take the mask off "
                    f"FaithDiff LQ Encode."
                )


def size_mismatch(features: tuple[int, int], latent: tuple[int, int]) -> str:
    """The message for features and latent of different sizes, (height, width) in latent units."""
    image, sampled = (f"{size[1] * VAE_SCALE_FACTOR} x {size[0] * VAE_SCALE_FACTOR}" for size in (features, latent))
    return (
        f"FaithDiff: the LQ features are of an image of {image} pixels, but the latent is one of {sampled}. Make both "
        f"from the same prepared image. If another node cuts or scales the latent (a detailer, Ultimate SD Upscale, "
        f"another tiled diffusion, context windows or guidance over parts of the image, a latent upscale), take that "
        f"node out: FaithDiff Tiled Diffusion or FaithDiff Sampler samples in tiles, and an image that is cut or "
        f"enlarged on purpose needs LQ features of its own (FaithDiff LQ Encode)."
    )


def call_conditions(active: Active, conds: Conds, tiles: Sequence[Tile]) -> dict[UUID, CallCondition]:
    """The LQ conditions of a U-Net call that sees these tiles.

    Args:
        active: by the uuid that a conditioning has outside of tiles.
        conds: of the call.
        tiles: what it sees.
    """
    conditions = {}
    for cond in _each(conds):
        known = active.get(cond.get(OUTER_UUID, cond["uuid"]))
        if known is not None:
            condition, strength = known
            seen = tuple(_seen(tile, cond.get("area")) for tile in tiles)
            conditions[cond["uuid"]] = CallCondition(condition.features, seen, strength)
    return conditions


OUTER_UUID = "faithdiff_uuid"
"""Where a tile's conditioning carries the uuid of the conditioning that it was made of."""


def _each(conds: Conds) -> Iterator[dict[str, Any]]:
    for group in conds:
        yield from group or ()


def _seen(tile: Tile, area: Sequence[int] | None) -> Tile:
    """What the U-Net sees of a tile: all of it, or an area (height, width, top, left within the tile)."""
    if area is None:
        return tile
    height, width, top, left = area
    size = min(height, tile.height - top), min(width, tile.width - left)
    return Tile(tile.top + top, tile.left + left, *size)
