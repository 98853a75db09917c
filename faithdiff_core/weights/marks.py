"""What a file says in its metadata about itself because its tensors do not show it.

An adapter looks the same for every backbone, and a U-Net that predicts v like one that predicts noise. The published
file is SDXL's and predicts noise; files of that kind carry no marks, so theirs are the published form.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..backbone import BACKBONES, NOISE, SDXL, Backbone, V
from ..errors import WeightsError

BACKBONE_KEY = "faithdiff.backbone"
PREDICTION_KEY = "faithdiff.prediction"

PREDICTIONS = (NOISE, V)

IN_WORDS = {NOISE: "noise", V: "v"}
"""What a U-Net predicts, for people."""


def marks(backbone: Backbone, prediction: str) -> dict[str, str]:
    """Metadata of a file for a backbone whose U-Net predicts noise or v; nothing for the published kind."""
    entries = {} if backbone is SDXL else {BACKBONE_KEY: backbone.key}
    if backbone is not SDXL or prediction != NOISE:
        entries[PREDICTION_KEY] = prediction
    return entries


def marked_backbone(path: Path, metadata: Mapping[str, str]) -> Backbone | None:
    """The backbone that a file says it is for; None if it says nothing.

    Raises:
        WeightsError: it names one that is not known.
    """
    key = metadata.get(BACKBONE_KEY)
    if key is None:
        return None
    found = next((backbone for backbone in BACKBONES if backbone.key == key), None)
    if found is None:
        known = ", ".join(backbone.key for backbone in BACKBONES)
        raise WeightsError(
            f"{path.name} is made for the backbone {key!r}, but known are {known}. It comes from a later version of "
            f"FaithDiff than this one."
        )
    return found


def marked_prediction(path: Path, metadata: Mapping[str, str]) -> str | None:
    """What a file says that its U-Net predicts, in diffusers' words; None if it says nothing.

    Raises:
        WeightsError: it names something else than noise or v.
    """
    prediction = metadata.get(PREDICTION_KEY)
    if prediction is not None and prediction not in PREDICTIONS:
        raise WeightsError(
            f"{path.name} says that its U-Net predicts {prediction!r}, but supported are {' and '.join(PREDICTIONS)}."
        )
    return prediction
