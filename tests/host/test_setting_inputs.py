"""The nodes' inputs have the types, ranges and defaults of the core's one description of the settings."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest

from faithdiff_core.engine import RestoreSettings
from faithdiff_core.engine.description import default_of, described
from faithdiff_core.vae.tiled_decode import decode_tiled

if TYPE_CHECKING:
    from comfy_host import Host

INPUTS = {
    "FaithDiffPrepareImage": {"scale_by": "scale", "hdr": "hdr"},
    "FaithDiffLQEncode": {"tile_size": "encoder_tile", "overlap": "encoder_overlap"},
    "FaithDiffConditioning": {"strength": "strength"},
    "FaithDiffTiledDiffusion": {
        "tile_size": "tile",
        "overlap": "overlap",
        "tile_batch": "tile_batch",
        "tile_grid": "tile_grid",
    },
    "FaithDiffSampler": {
        "steps": "steps",
        "cfg": "cfg",
        "start_point": "start",
        "tile_size": "tile",
        "overlap": "overlap",
        "tile_batch": "tile_batch",
        "strength": "strength",
        "tile_grid": "tile_grid",
    },
    "FaithDiffTiledVAEDecode": {"tile_size": "vae_tile", "overlap": "encoder_overlap"},
    "FaithDiffFinishImage": {"color_fix": "color_fix"},
    "FaithDiffRestoreFolder": {
        "scale_by": "scale",
        "passes": "passes",
        "steps": "steps",
        "cfg": "cfg",
        "start_point": "start",
        "tile_size": "tile",
        "overlap": "overlap",
        "tile_batch": "tile_batch",
        "color_fix": "color_fix",
        "strength": "strength",
        "tile_grid": "tile_grid",
        "encoder_tile": "encoder_tile",
        "vae_tile": "vae_tile",
    },
}
"""Inputs of the nodes by the setting that they are."""


@pytest.mark.parametrize("node", INPUTS)
def test_inputs_are_the_settings(host: Host, node: str) -> None:
    inputs = {entry.id: entry for entry in host.node_class(node).define_schema().inputs}
    for name, setting in INPUTS[node].items():
        what, entry = described(RestoreSettings)[setting], inputs[name]
        default = default_of(RestoreSettings, setting) if what.host_default is None else what.host_default
        assert entry.default == default, name
        if what.choices:
            assert (entry.get_io_type(), entry.options) == ("COMBO", what.choices), name
        else:
            assert entry.get_io_type() == {int: "INT", float: "FLOAT"}[what.kind], name
            assert (entry.min, entry.max) == (what.host_range or (what.minimum, what.maximum)), name
            # What the engine accepts is offered, as far as a widget can.
            assert what.minimum is None or what.host_range is not None or entry.min >= what.minimum, name


def test_the_decoders_overlap_is_the_nodes(host: Host) -> None:
    inputs = {entry.id: entry for entry in host.node_class("FaithDiffTiledVAEDecode").define_schema().inputs}
    assert inputs["overlap"].default == inspect.signature(decode_tiled).parameters["overlap"].default


def test_no_setting_is_missing_from_the_nodes() -> None:
    """All settings have an input but one: ComfyUI encodes long prompts in chunks. Passes have one for folders."""
    assert {setting for settings in INPUTS.values() for setting in settings.values()} == (
        set(described(RestoreSettings)) - {"long_prompt"}
    )
