"""What a U-Net predicts, and whether its noise schedule ends in pure noise: properties that go with its weights.

FaithDiff's file says what its U-Net predicts; the published one predicts noise. With an adapter alone the checkpoint's
own U-Net stays, and what that one predicts, its file or folder tells.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbone import SDXL, Backbone
from ..errors import SettingsError, WeightsError
from ..weights.checkpoint_file import open_tensors

_SUPPORTED = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Prediction:
    """What a U-Net was trained for.

    Attributes:
        type: `epsilon` (noise) or `v_prediction`, in diffusers' words.
        zero_snr: the schedule was rescaled to end in pure noise.
    """

    type: str = "epsilon"
    zero_snr: bool = False


def prediction_of(
    model: str | Path, scheduler: Any, backbone: Backbone = SDXL, config: str | Path | None = None
) -> Prediction:
    """What the U-Net of a checkpoint predicts.

    Args:
        model: a single file, whose marks are read, or a folder in diffusers' format.
        scheduler: the folder's.
        backbone: the checkpoint's family.
        config: the folder that was named as the single file's configuration.

    Raises:
        WeightsError: it needs a kind of sampling that the engine does not have, or nothing tells what it predicts.
    """
    path = Path(model)
    if path.is_file():
        marks = open_tensors(path)[0].keys()
        if {"edm_mean", "edm_vpred.sigma_max"} & marks:
            raise _unsupported(path, "an EDM model")
        if "v_pred" in marks:
            return Prediction("v_prediction", "ztsnr" in marks)
        if backbone.prediction is None and config is None:
            raise WeightsError(
                f"{path.name} does not say what its U-Net predicts, and models of {backbone.name} predict noise or v. "
                f"Give `config` the folder of the model that it belongs to, whose scheduler says it."
            )
    kind = type(scheduler).__name__
    if not hasattr(scheduler, "alphas_cumprod") or kind.startswith("EDM"):
        raise _unsupported(path, f"a model for {kind}")
    settings = scheduler.config
    found = str(settings.get("prediction_type", "epsilon"))
    if found not in _SUPPORTED:
        raise _unsupported(path, f"a model that predicts {found!r}")
    return Prediction(found, bool(settings.get("rescale_betas_zero_snr", False)))


def with_prediction(scheduler: Any, prediction: Prediction) -> Any:
    """A scheduler, of the same kind and settings, for what a U-Net predicts.

    Raises:
        SettingsError: this kind of scheduler cannot do that.
    """
    kind = type(scheduler)
    known = inspect.signature(kind).parameters
    wanted = {"prediction_type": prediction.type, "rescale_betas_zero_snr": prediction.zero_snr}
    defaults = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    for name, value in wanted.items():
        if name not in known and value != defaults[name]:
            raise SettingsError(
                f"{kind.__name__} cannot sample a model with {name} = {value}; choose another scheduler, such as euler."
            )
    changed = {
        name: value
        for name, value in wanted.items()
        if name in known and scheduler.config.get(name, defaults[name]) != value
    }
    return kind.from_config(scheduler.config, **changed) if changed else scheduler


def _unsupported(path: Path, kind: str) -> WeightsError:
    return WeightsError(
        f"{path.name} is {kind}, which the engine cannot sample with its own U-Net. Give a full FaithDiff file, whose "
        f"U-Net replaces it, or an SDXL checkpoint that predicts noise or v."
    )
