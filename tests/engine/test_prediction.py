"""What the U-Net predicts: FaithDiff's noise, a checkpoint's own what its file or folder tells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from faithdiff_core import SettingsError, WeightsError
from faithdiff_core.engine import FaithDiffPipeline, TextConditioning, make_scheduler
from faithdiff_core.engine.prediction import Prediction, prediction_of, with_prediction

if TYPE_CHECKING:
    from conftest import Golden


def folder_with(tiny_sdxl: Path, target: Path, **scheduler: object) -> Path:
    """The tiny SDXL folder with another scheduler configuration."""
    shutil.copytree(tiny_sdxl, target)
    config = target / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | scheduler))
    return target


@pytest.fixture(scope="module")
def adapter(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    prefixes = ("denoise_encoder.", "condition_embedding.", "information_transformer_layes.", "spatial_ch_projs.")
    save_file({key: value for key, value in load_file(golden.model).items() if key.startswith(prefixes)}, path)
    return path


def latent(pipeline: FaithDiffPipeline, golden: Golden, strength: float) -> torch.Tensor:
    text = TextConditioning(*(golden.tensors[name] for name in ("pos", "pos_pooled", "neg", "neg_pooled")))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    features = torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(1))
    return pipeline.sample(features, text, noise, start="noise", steps=3, tile=64, cfg=2.0, strength=strength)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_an_adapter_leaves_the_folders_prediction(
    tiny_sdxl: Path, golden: Golden, adapter: Path, tmp_path: Path, zero_snr: bool
) -> None:
    """With the alignment off, the engine samples as diffusers does by itself with the folder's scheduler."""
    from diffusers import StableDiffusionXLPipeline

    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    folder = folder_with(tiny_sdxl, tmp_path / "v", **settings)
    pipeline = FaithDiffPipeline.from_files(folder, adapter, dtype="fp32", device="cpu")
    got = latent(pipeline, golden, 0.0)
    plain = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    plain.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = plain(
        prompt_embeds=golden.tensors["pos"],
        pooled_prompt_embeds=golden.tensors["pos_pooled"],
        negative_prompt_embeds=golden.tensors["neg"],
        negative_pooled_prompt_embeds=golden.tensors["neg_pooled"],
        latents=noise,
        num_inference_steps=3,
        guidance_scale=2.0,
        height=64,
        width=64,
        output_type="latent",
    ).images
    assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    eps = latent(FaithDiffPipeline.from_files(tiny_sdxl, adapter, dtype="fp32", device="cpu"), golden, 0.0)
    assert float((got - eps).abs().max()) > 0.1 * float(expected.abs().max())


def test_faithdiffs_u_net_predicts_noise_in_any_folder(tiny_sdxl: Path, golden: Golden, tmp_path: Path) -> None:
    folder = folder_with(tiny_sdxl, tmp_path / "v", prediction_type="v_prediction")
    own = make_scheduler("euler").from_config(make_scheduler("euler").config, prediction_type="v_prediction")
    results = [
        latent(
            FaithDiffPipeline.from_files(model, golden.model, dtype="fp32", device="cpu", scheduler=given), golden, 1.0
        )
        for model, given in ((tiny_sdxl, None), (folder, None), (folder, own))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([], Prediction()),
        (["v_pred"], Prediction("v_prediction")),
        (["v_pred", "ztsnr"], Prediction("v_prediction", zero_snr=True)),
    ],
)
def test_marks_in_single_files(tmp_path: Path, marks: list[str], expected: Prediction) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_file({"model.diffusion_model.x": torch.ones(1)} | {mark: torch.tensor([]) for mark in marks}, path)
    assert prediction_of(path, make_scheduler()) == expected


def test_what_the_engine_cannot_sample(tmp_path: Path) -> None:
    import diffusers

    path = tmp_path / "checkpoint.safetensors"
    save_file({"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, path)
    with pytest.raises(WeightsError, match="is an EDM model, which the engine cannot sample"):
        prediction_of(path, make_scheduler())
    for scheduler, words in (
        (diffusers.EDMEulerScheduler(), "a model for EDMEulerScheduler"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "a model for FlowMatchEulerDiscreteScheduler"),
        (diffusers.EulerDiscreteScheduler(prediction_type="sample"), "a model that predicts 'sample'"),
    ):
        with pytest.raises(WeightsError, match=words):
            prediction_of(tmp_path, scheduler)
    with pytest.raises(SettingsError, match="HeunDiscreteScheduler cannot sample a model with rescale_betas_zero_snr"):
        with_prediction(make_scheduler("heun"), Prediction("v_prediction", zero_snr=True))
