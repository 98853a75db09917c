"""Inputs made from the core's one description of the settings, and their checks."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..faithdiff_core.engine.description import default_of, described
from ..faithdiff_core.engine.settings import LARGEST_HOST_TILE, RestoreSettings
from ..faithdiff_core.images.region import FEATHER
from ..faithdiff_core.tiling.grid import check_tile_size
from .errors import complaint

CATEGORY = "FaithDiff"
"""Where the page lists the nodes."""

_STEPS: dict[str, dict[str, float]] = {
    "scale": {"step": 0.05},
    "cfg": {"step": 0.1, "round": 0.01},
    "strength": {"step": 0.01},
    "hdr": {"step": 0.1, "round": 0.01},
    "px": {"step": 8},
    "overlap": {"step": 0.05, "round": 0.001},
    "encoder_overlap": {"step": 0.05, "round": 0.001},
}
"""Steps of the inputs' arrows and the places they are rounded to, by setting or unit."""


def setting_input(setting: str, tooltip: str, name: str | None = None, **more: Any) -> Any:
    """An input with the type, range and default of a setting of `RestoreSettings`.

    Args:
        setting: its name there.
        tooltip: what the input does.
        name: the input's id. Defaults to the setting's name.
        **more: further arguments of the input (`optional`, `advanced`).
    """
    what, default = described(RestoreSettings)[setting], default_of(RestoreSettings, setting)
    name = name or setting
    if what.choices:
        return io.Combo.Input(name, options=what.choices, default=default, tooltip=tooltip, **more)
    minimum, maximum = what.host_range or (what.minimum, what.maximum)
    limits = {
        "default": default if what.host_default is None else what.host_default,
        "min": minimum,
        "max": maximum,
        **_STEPS.get(what.unit, {}),
        **_STEPS.get(setting, {}),
    }
    kind = io.Int if what.kind is int else io.Float
    return kind.Input(name, tooltip=tooltip, **limits, **more)


def mask_inputs() -> list[io.Input]:
    """The inputs of nodes that put a restored part back into its image."""
    return [
        io.Mask.Input(
            "restore_mask",
            optional=True,
            tooltip="White is restored; the rest of the image stays as it was.",
        ),
        io.Int.Input(
            "feather",
            default=FEATHER,
            min=0,
            max=1024,
            optional=True,
            advanced=True,
            tooltip="Pixels. Width of the soft edge around restore_mask.",
        ),
    ]


def check_tile(tile_size: int | None) -> bool | str:
    """For `validate_inputs`: the core's own check.

    ComfyUI shows what it says at every input that `validate_inputs` takes, so that takes the tile size alone. A value
    that arrives through a link is None here, and is checked when the node runs.
    """
    if tile_size is not None and (message := complaint(check_tile_size, tile_size)):
        return message
    if tile_size is not None and tile_size > LARGEST_HOST_TILE:
        return f"tile_size must be at most {LARGEST_HOST_TILE} pixels, got {tile_size}."
    return True
