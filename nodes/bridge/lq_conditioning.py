"""LQ features on ComfyUI's CONDITIONINGs."""

from __future__ import annotations

from typing import Any

import comfy.conds

from ...faithdiff_core.errors import SettingsError
from .graph_types import CONDITION_KEY, LQCondition, LQFeatures

Conditioning = list[list[Any]]

NO_ALIGNMENT = (
    "FaithDiff: the conditioning carries LQ features, but this MODEL has no alignment to use them. Connect the MODEL "
    "that FaithDiff Model Loader gives (in a merge of models, as the first one), or conditionings that did not pass "
    "through FaithDiff Conditioning. If that is so already, a node behind the loader predicts with a copy of the "
    "MODEL's options (Automatic CFG's attention modifiers do): take it out."
)


class _NeedsAlignment(comfy.conds.CONDConstant):
    """Among a conditioning's `model_conds`: what a MODEL without FaithDiff cannot pass over.

    ComfyUI asks all of `model_conds` for their part of a U-Net call. FaithDiff's wrappers take this one out before; so
    whoever asks it samples with a MODEL that would leave the LQ features aside.
    """

    def process_cond(self, **_: Any) -> Any:
        raise SettingsError(NO_ALIGNMENT)


def with_lq(conditioning: Conditioning, condition: LQCondition) -> Conditioning:
    """A CONDITIONING whose entries carry LQ features; the given one stays as it is."""
    needs = {CONDITION_KEY: _NeedsAlignment(condition)}
    return [
        [entry[0], {**entry[1], CONDITION_KEY: condition, "model_conds": {**entry[1].get("model_conds", {}), **needs}}]
        for entry in conditioning
    ]


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
