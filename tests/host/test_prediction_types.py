"""A MODEL's prediction type and schedule go with its weights, and what predicts different things does not mix."""

from __future__ import annotations

import importlib
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host
from safetensors.torch import load_file
from support.host_sampling import images, load, relative

MARKS = {"v": ("v_pred",), "zero SNR": ("v_pred", "ztsnr"), "EDM": ("edm_mean", "edm_std")}
"""Checkpoint entries of models that do not predict noise on SDXL's schedule."""


def base(host: Host, kind: str, weights: str = "golden_unet") -> Any:
    models = host.testpack.models
    state = models.golden_unet() if weights == "golden_unet" else models.other_unet(1)
    return models.tiny_model(state, MARKS.get(kind, ()))


@pytest.mark.parametrize("kind", MARKS)
@torch.no_grad()
def test_faithdiffs_weights_bring_their_own(host: Host, kind: str) -> None:
    """Whatever the MODEL was, with FaithDiff's U-Net it restores like one that always predicted noise."""
    right = load(host)
    features = right.features(images(64, 64))
    other = base(host, kind, "other")
    setup = load(host, model=other, unet_strength=1.0)
    assert relative(setup.restore(features, steps=2), right.restore(features, steps=2)) < 1e-5
    # The user's own MODEL stays what it was.
    assert not isinstance(
        other.get_model_object("model_sampling"), type(right.model.get_model_object("model_sampling"))
    )


def saved(model: Any, folder: Path) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """What ComfyUI's saving nodes write: the U-Net's tensors, and the marks of what a checkpoint predicts."""
    saving = importlib.import_module("comfy_extras.nodes_model_merging")
    saving.save_checkpoint(model, filename_prefix="saved", output_dir=str(folder))
    (path,) = folder.iterdir()
    state, prefix = load_file(path), "model.diffusion_model."
    marks = tuple(key for key in state if not key.startswith(prefix))
    return {key.removeprefix(prefix): value for key, value in state.items() if key not in marks}, marks


@pytest.mark.parametrize("kind", MARKS)
@torch.no_grad()
def test_a_saved_replacement_and_its_mark(
    host: Host, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A saved file restores to the same image unless ComfyUI keeps an old mark, which a warning says."""
    with caplog.at_level(logging.WARNING):
        setup = load(host, model=base(host, kind, "other"))
    warned = "still marked as a v-prediction model" in caplog.text
    features = setup.features(images(64, 64))
    expected = setup.restore(features, steps=2)
    state, marks = saved(setup.model, tmp_path)
    loaded = host.testpack.models.tiny_model(state, marks)
    as_marked = load(host, model=loaded, unet_strength=0.0).restore(features, steps=2)
    assert (relative(as_marked, expected) > 1e-2) == warned
    corrected = host.call("ModelSamplingDiscrete", model=loaded, sampling="eps", zsnr=False)[0]
    restored = load(host, model=corrected, unet_strength=0.0).restore(features, steps=2)
    assert relative(restored, expected) < 1e-5


@torch.no_grad()
def test_a_u_net_that_stays_keeps_its_own(host: Host) -> None:
    """The first step by hand: Euler on v from the maximum sigma, x0 = c_skip x - c_out v."""
    setup = load(host, model=base(host, "v"), unet_strength=0.0)
    noise_setup = load(host, model=base(host, "eps"), unet_strength=0.0)
    features = setup.features(images(64, 64))
    v, eps = (each.restore(features, steps=1, cfg=1.0, scheduler="normal") for each in (setup, noise_setup))
    # One step ends at sigma 0, at x0. With the same network output o: eps gives x - s o, v gives x / (s^2 + 1) - c o.
    scaling = setup.model.get_model_object("latent_format").scale_factor
    sampling = setup.model.get_model_object("model_sampling")
    sigma = float(host.call("BasicScheduler", model=setup.model, scheduler="normal", steps=1, denoise=1.0)[0][0])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(42)) * math.sqrt(sigma**2 + 1)
    output = (x - eps * scaling) / sigma
    expected = (x / (sigma**2 + 1) - output * sigma / math.sqrt(sigma**2 + 1)) / scaling
    assert float(sampling.sigma_max) == pytest.approx(sigma, rel=1e-3)
    assert relative(v, expected) < 1e-3


@pytest.mark.parametrize("kind", MARKS)
def test_a_mix_is_refused(host: Host, kind: str) -> None:
    words = "an EDM model" if kind == "EDM" else "a v-prediction model"
    with pytest.raises(ValueError, match=f"`model` is {words}, but FaithDiff's U-Net predicts noise .* be mixed"):
        load(host, model=base(host, kind), unet_strength=0.5)


def test_samplings_for_noise_stay(host: Host) -> None:
    """LCM reads the output as noise on SDXL's schedule, at every twentieth step: a choice of the user."""
    lcm = host.call("ModelSamplingDiscrete", model=base(host, "eps"), sampling="lcm", zsnr=False)[0]
    for strength in (0.5, 1.0):
        setup = load(host, model=lcm, unet_strength=strength)
        assert setup.model.get_model_object("model_sampling") is lcm.get_model_object("model_sampling")
    # Zero terminal SNR is another schedule, whatever is predicted.
    zsnr = host.call("ModelSamplingDiscrete", model=base(host, "eps"), sampling="eps", zsnr=True)[0]
    with pytest.raises(ValueError, match="is a model with another noise schedule than SDXL's"):
        load(host, model=zsnr, unet_strength=0.5)
    assert float(load(host, model=zsnr).model.get_model_object("model_sampling").sigma_max) < 15
