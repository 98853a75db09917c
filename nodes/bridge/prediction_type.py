"""What a U-Net predicts, and on which noise schedule: properties of a MODEL that belong to its weights.

FaithDiff's U-Net predicts noise (a file for another backbone than SDXL may say v) on the schedule that all backbones
share. Where its weights replace those of a MODEL that predicts something else, has a schedule with zero terminal SNR,
or is an EDM model, these properties must change with them; otherwise ComfyUI would read noise as something else, and
the image would be mud. It also guesses what a U-Net of SD 2.1 predicts, by its weights' spread, where a file says it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import comfy.model_base
import comfy.model_sampling
import torch

from ...faithdiff_core.backbone import NOISE, Backbone, V
from ...faithdiff_core.errors import WeightsError
from ...faithdiff_core.weights.marks import IN_WORDS
from .backbones import LATENT_FORMATS

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ...faithdiff_core.weights.faithdiff_file import FaithDiffWeights

TOLERANCE = 0.01
"""How far a sampling object may be from the published one. Distilled samplings (LCM) are within it."""

MAX_STEPS_OFF = 25
"""How many of the 1000 timesteps it may be off; distilled samplings know every twentieth only."""


class PublishedSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """Noise prediction on the published schedule: ComfyUI's defaults."""


class VSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    """V-prediction on the published schedule."""


SAMPLINGS: dict[str, Any] = {NOISE: PublishedSampling, V: VSampling}
"""How ComfyUI samples a U-Net by what it predicts."""


SAMPLING_NAMES = {NOISE: "eps", V: "v_prediction"}
"""What the node ModelSamplingDiscrete calls them."""


def samples_as(sampling: Any, prediction: str) -> bool:
    """Whether a sampling object reads a U-Net's output as noise, or as v, on the published schedule.

    Asked of its results and not of its class, so that those of other packs are known by what they do.
    """
    published = SAMPLINGS[prediction]()
    x, output = torch.tensor([[[[0.7]]]]), torch.tensor([[[[-0.4]]]])
    if abs(float(sampling.sigma_max) / float(published.sigma_max) - 1.0) > TOLERANCE:
        return False
    for step in (100, 500, 900):
        sigma = published.sigmas[step : step + 1].clone()
        pairs = (
            (sampling.calculate_input(sigma, x), published.calculate_input(sigma, x)),
            (sampling.calculate_denoised(sigma, output, x), published.calculate_denoised(sigma, output, x)),
        )
        if any(not torch.allclose(a.float(), b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in pairs):
            return False
        if abs(float(sampling.timestep(sigma)) - step) > MAX_STEPS_OFF:
            return False
    return True


def describe(sampling: Any) -> str:
    """What kind of model a sampling object is for, in words."""
    if samples_as(sampling, NOISE):
        return "a model that predicts noise"
    kinds = (
        ("EDM", "an EDM model"),
        ("V_PREDICTION", "a v-prediction model"),
        ("X0", "a model that predicts the image"),
        ("EPS", "a model with another noise schedule than SDXL's"),
    )
    for name, words in kinds:
        if isinstance(sampling, getattr(comfy.model_sampling, name)):
            return words
    return f"a model of another kind ({type(sampling).__name__})"


def check_mixable(model: ModelPatcher, name: str, remedy: str, prediction: str = NOISE) -> None:
    """Refuse to mix the weights of U-Nets that predict different things.

    Args:
        model: the MODEL.
        name: of the input that it came by.
        remedy: what to do instead.
        prediction: what FaithDiff's U-Net predicts.

    Raises:
        WeightsError: it predicts something else than FaithDiff's U-Net.
    """
    sampling = model.get_model_object("model_sampling")
    if not samples_as(sampling, prediction):
        raise WeightsError(
            f"`{name}` is {describe(sampling)}, but FaithDiff's U-Net predicts {IN_WORDS[prediction]} on SDXL's "
            f"schedule: weights of the two cannot be mixed. {remedy}"
        )


def check_guess(model: ModelPatcher, weights: FaithDiffWeights) -> None:
    """Compare ComfyUI's guess at what a MODEL predicts with what FaithDiff's adapter was trained with.

    Only models of SD 2.1 are guessed at; what a checkpoint of the other backbones predicts, it says itself.

    Raises:
        WeightsError: they differ.
    """
    prediction = weights.marked
    sampling = model.get_model_object("model_sampling")
    if prediction is None or weights.backbone.prediction is not None or samples_as(sampling, prediction):
        return
    raise WeightsError(
        f"ComfyUI takes `model` for {describe(sampling)}, but {weights.path.name} was trained with a U-Net that "
        f"predicts {IN_WORDS[prediction]}. If this is that U-Net, put ModelSamplingDiscrete with "
        f"`{SAMPLING_NAMES[prediction]}` in front; else connect the MODEL that it was trained with."
    )


def warn_of_mark(model: ModelPatcher, weights: FaithDiffWeights) -> None:
    """Warn where ComfyUI would save a MODEL, whose U-Net FaithDiff's replaces, under the mark of the old one.

    Its saving nodes ask the base model what it predicts, which all clones of a MODEL share, and not the patches. A base
    model of its own would set that right, but what was put onto the MODEL before may hold on to the old one, as
    torch.compile does: it would run the U-Net that was to be replaced.
    """
    if weights.prediction == NOISE and model.model.model_type == comfy.model_base.ModelType.V_PREDICTION:
        logging.warning(
            f"FaithDiff Model Loader: `model` is still marked as a v-prediction model, but the U-Net of "
            f"{weights.path.name}, which replaces its own, predicts noise. It restores as it should, but Save "
            f"Checkpoint writes the old mark. To save it, disconnect `model` (the U-Net is the same), or put "
            f"ModelSamplingDiscrete with `eps` behind the Load Checkpoint that loads the saved file."
        )


def take_sampling(model: ModelPatcher, backbone: Backbone, prediction: str) -> None:
    """Make a MODEL, in place, sample as FaithDiff's weights need it; what does so already stays as it is.

    Args:
        model: the MODEL.
        backbone: its family.
        prediction: what FaithDiff's U-Net predicts.
    """
    if not samples_as(model.get_model_object("model_sampling"), prediction):
        model.add_object_patch("model_sampling", SAMPLINGS[prediction]())
    latent_format = LATENT_FORMATS[backbone]
    if not isinstance(model.get_model_object("latent_format"), latent_format):
        model.add_object_patch("latent_format", latent_format())
