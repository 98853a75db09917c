"""LQ features on ComfyUI's CONDITIONINGs."""

from __future__ import annotations

from typing import Any

import node_helpers

from ...faithdiff_core.errors import SettingsError
from .graph_types import CONDITION_KEY, LQCondition, LQFeatures

Conditioning = list[list[Any]]


def with_lq(conditioning: Conditioning, condition: LQCondition) -> Conditioning:
    """A CONDITIONING whose entries carry LQ features; the given one stays as it is."""
    return node_helpers.conditioning_set_values(conditioning, {CONDITION_KEY: condition})


def add_lq(
    conditionings: tuple[Conditioning, ...],
    features: LQFeatures,
    strength: float,
    start_percent: float,
    end_percent: float,
) -> tuple[Conditioning, ...]:
    """CONDITIONINGs with the same LQ condition.

    Args:
        conditionings: stay as they are.
        features: of the low-quality images.
        strength: factor on what the alignment adds.
        start_percent, end_percent: part of the sampling, 0 to 1, in which the image acts.

    Raises:
        SettingsError: the part ends before it begins.
    """
    if start_percent > end_percent:
        raise SettingsError(
            f"start_percent must not be larger than end_percent, got {start_percent} and {end_percent}. "
            f"Exchange the two, or set strength to 0 to switch the image off."
        )
    condition = LQCondition(features, strength, start_percent, end_percent)
    return tuple(with_lq(conditioning, condition) for conditioning in conditionings)
