"""What arrives at a node's inputs: the right kind of value, with what was expected in words where it is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...faithdiff_core.errors import ImageError, SettingsError
from ...faithdiff_core.finite import is_finite
from ...faithdiff_core.images.region import mask_for
from ...faithdiff_core.tiling.layout import TileLayout
from .graph_types import AdapterModels, ImageSource, LQFeatures, LQFrame

_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "IMAGE": ("an IMAGE (such as Load Image gives)", lambda x: isinstance(x, Tensor)),
    "MASK": ("a MASK", lambda x: isinstance(x, Tensor)),
    "LATENT": (
        "a LATENT (such as VAE Encode gives)",
        lambda x: isinstance(x, dict) and isinstance(x.get("samples"), Tensor),
    ),
    "MODEL": ("a MODEL", lambda x: hasattr(x, "model_options") and hasattr(x, "clone")),
    "VAE": ("a VAE", lambda x: hasattr(x, "first_stage_model")),
    "CONDITIONING": (
        "CONDITIONING (such as CLIP Text Encode gives)",
        lambda x: isinstance(x, list) and all(_is_conditioning_entry(entry) for entry in x),
    ),
    "CLIP": ("a CLIP", lambda x: hasattr(x, "tokenize") and hasattr(x, "encode_from_tokens")),
    "NOISE": ("NOISE", lambda x: hasattr(x, "generate_noise")),
    "FAITHDIFF": ("FAITHDIFF from FaithDiff Model Loader", lambda x: isinstance(x, AdapterModels)),
    "LQ_FEATURES": ("LQ_FEATURES from FaithDiff LQ Encode", lambda x: isinstance(x, LQFeatures)),
    "TILE_LAYOUT": ("the layout from FaithDiff Tile Captions", lambda x: isinstance(x, TileLayout)),
    "LQ_FRAME": ("the frame from FaithDiff Prepare Image", lambda x: isinstance(x, LQFrame)),
    "IMAGE_SOURCE": ("the source from FaithDiff Load Image", lambda x: isinstance(x, ImageSource)),
    "FAITHDIFF_ATTRIBUTION": (
        "the record from FaithDiff Attribution Record",
        lambda x: hasattr(x, "recorder") and hasattr(x, "check_latent"),
    ),
    "INT": ("a whole number", lambda x: isinstance(x, Integral)),
    "FLOAT": ("a number", lambda x: isinstance(x, Real)),
    "STRING": ("a text", lambda x: isinstance(x, str)),
    "BOOLEAN": ("true or false", lambda x: isinstance(x, Integral)),
    "COMBO": ("the name of a choice", lambda x: isinstance(x, str)),
}
"""Types of inputs, what to call them, and how to know them; numbers and texts may come through links, too."""

_FILES = ("faithdiff_name", "base_name")
"""Inputs that name a file; the nodes look for it, and say in which folders they did."""

_MOST_CHOICES = 12
"""Longer lists of choices are not written out in messages."""


def _is_conditioning_entry(entry: Any) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        return False
    return isinstance(entry[0], Tensor) and isinstance(entry[1], dict)


def check_inputs(schema: io.Schema, values: Mapping[str, Any], validated: Collection[str] = ()) -> None:
    """Look at a node's values before it works with them; ComfyUI lets some wrong ones through.

    Args:
        schema: of the node.
        values: its arguments by name.
        validated: inputs whose choices the node looks at by itself.

    Raises:
        SettingsError: a link carries another type or nothing, leads to no input of the node, a number is not finite, or
            a text is none of the choices.
        ImageError: an image or mask is empty, or an image, mask or latent has values that are not finite.
    """
    known = [entry.id for entry in schema.inputs or []]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise SettingsError(f"There is no input {', '.join(unknown)}; there are {', '.join(known)}.")
    for entry in schema.inputs or []:
        given = values.get(entry.id)
        if given is None and (entry.optional or entry.id not in values):
            continue
        for value in given if schema.is_input_list and isinstance(given, list) else [given]:
            _check_value(entry.id, str(entry.get_io_type()), value)
            if isinstance(entry, io.Combo.Input) and entry.id not in (*_FILES, *validated):
                _check_choice(entry.id, list(entry.options or []), value)


def _check_value(name: str, kind: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{name} must be a finite number, got {value}.")
    if kind not in _TYPES:
        return
    expected, fits = _TYPES[kind]
    if value is None or not fits(value):
        got = "nothing" if value is None else f"a value of the type {type(value).__name__}"
        raise SettingsError(f"{name}: expected {expected}, got {got}. Check the link to this input.")
    if kind in ("IMAGE", "MASK"):
        _check_pixels(value, name)
    elif kind == "LATENT" and not is_finite(value["samples"]):
        raise ImageError(
            f"{name} has values that are NaN or infinite. The node that it comes from went wrong; a VAE that overflows "
            "in half precision does so."
        )


def _check_choice(name: str, options: list[Any], value: Any) -> None:
    if value not in options:
        choices = f"one of {', '.join(map(str, options))}" if len(options) <= _MOST_CHOICES else "one of its choices"
        raise SettingsError(f"{name}: expected {choices}, got {value!r}. Check the link to this input.")


def _check_pixels(values: Tensor, name: str) -> None:
    if not values.numel():
        raise ImageError(f"{name} is empty: it has the shape {tuple(values.shape)}. Check what it comes from.")
    if not values.is_floating_point():
        raise ImageError(f"{name} must have floating-point values from 0 to 1, got {values.dtype}.")
    if not is_finite(values):
        raise ImageError(f"{name} has values that are NaN or infinite. The node that it comes from went wrong.")


def check_image(image: Tensor, name: str) -> Tensor:
    """An IMAGE with 3 or 4 channels.

    Args:
        image: (B, H, W, C); grey of one channel is repeated, a second channel is alpha.
        name: of the input.

    Returns:
        (B, H, W, 3 or 4).

    Raises:
        ImageError: another shape.
    """
    if image.ndim != 4 or not 1 <= image.shape[-1] <= 4:
        raise ImageError(
            f"{name} must have the shape (batch, height, width, channels) with 1 to 4 channels, got "
            f"{tuple(image.shape)}."
        )
    if image.shape[-1] > 2:
        return image
    colors = image[..., :1].expand(*image.shape[:-1], 3)
    return torch.cat([colors, image[..., 1:]], dim=-1)


def mask_of_images(mask: Tensor, images: Tensor) -> Tensor:
    """A MASK at the size of IMAGEs.

    Args:
        mask: (B or 1, h, w) or (h, w), of any size.
        images: (B, H, W, C).

    Returns:
        (B or 1, 1, H, W), in [0, 1].

    Raises:
        ImageError: another shape, or neither one mask nor one for each image.
    """
    if mask.ndim not in (2, 3):
        raise ImageError(f"restore_mask must be a MASK of shape (batch, height, width), got {tuple(mask.shape)}.")
    whole = mask if mask.ndim == 3 else mask.unsqueeze(0)
    return mask_for(whole.unsqueeze(1), images.shape[1], images.shape[2], images.shape[0])
