"""SD 2.1 (v-prediction) and SD 1.5 in the engine, against diffusers' own pipeline and the definitions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models.backbones import CONTEXT, UNETS, TinyModel
from tiny_models.checkpoints import make_lora, make_single_file_sd
from torch import Tensor

from faithdiff_core import SettingsError, WeightsError, convert, read_faithdiff
from faithdiff_core.backbone import NOISE, SD15, SD21, Backbone
from faithdiff_core.engine import FaithDiffPipeline, RestoreSettings, make_scheduler
from faithdiff_core.engine.prediction import Prediction, with_prediction
from faithdiff_core.sampling.schedule import alphas_cumprod, sampling_sigmas

QUICK: dict[str, Any] = {"steps": 2, "tile": 128, "prompt": "a stone wall", "seed": 3}

TinyBackbones = dict[Backbone, TinyModel]


def load(model: TinyModel, faithdiff: Path | None = None, **more: Any) -> FaithDiffPipeline:
    return FaithDiffPipeline.from_files(
        model.folder, faithdiff or model.faithdiff, **{"dtype": "fp32", "device": "cpu", **more}
    )


def photo(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module", params=[SD21, SD15], ids=lambda b: b.key)
def tiny(request: pytest.FixtureRequest, tiny_backbones: TinyBackbones) -> TinyModel:
    return tiny_backbones[request.param]


@pytest.fixture(scope="module")
def pipeline(tiny: TinyModel) -> FaithDiffPipeline:
    return load(tiny)


def test_without_the_alignment_it_is_diffusers_pipeline(tiny: TinyModel, pipeline: FaithDiffPipeline) -> None:
    """Text, U-Net, prediction type, schedule, scaling factor and VAE, from a prompt to an image."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    assert pipeline.backbone is tiny.backbone
    part = read_faithdiff(tiny.faithdiff).unet
    assert part is not None
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tiny.folder / "unet"))
    unet.load_state_dict(part.state)
    plain = StableDiffusionPipeline.from_pretrained(
        tiny.folder, unet=unet.eval(), safety_checker=None, local_files_only=True
    )
    plain.scheduler = with_prediction(make_scheduler(), Prediction(tiny.prediction))
    plain.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    expected = plain(
        "a stone wall",
        negative_prompt="rain",
        latents=noise,
        num_inference_steps=3,
        guidance_scale=4.0,
        height=96,
        width=128,
        output_type="pt",
    ).images
    got = pipeline(
        photo(96, 128),
        RestoreSettings(scale=1, steps=3, cfg=4.0, start="noise", tile=128, strength=0, color_fix="none"),
        prompt="a stone wall",
        negative_prompt="rain",
        noise=noise,
    )
    assert relative(got, expected) < 1e-4


@torch.no_grad()
def test_the_alignment_and_tiles_by_hand(tiny: TinyModel, pipeline: FaithDiffPipeline) -> None:
    """One step from the LQ image in two tiles: what the U-Net predicts turned into noise by its definition, merged."""
    image = photo(64, 96) * 2 - 1
    features, z = pipeline.encode_lq(image), pipeline.encode_latent(image)
    mean = pipeline.base.vae.encode(image).latent_dist.mean
    assert relative(z, mean * 0.18215) < 1e-6
    text = pipeline.encode_text(["a wall"], guided=False)
    assert text.pooled is None
    assert text.embeds.shape[-1] == CONTEXT[tiny.backbone]
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    got = pipeline.sample(features, text, noise, lq_latent=z, steps=1, cfg=1.0, tile=64, overlap=0.5)

    sigma, abar = sampling_sigmas(1)[0], alphas_cumprod()
    x = abar[-1].sqrt() * z + (1 - abar[-1]).sqrt() * noise * (sigma**2 + 1).sqrt()
    seen = x / (sigma**2 + 1).sqrt()
    unet, alignment = pipeline.base.unet, pipeline.alignment
    total, weight = torch.zeros_like(x), torch.zeros_like(x)
    for left in (0, 4):
        part = (..., slice(left, left + 8))
        condition = alignment.embed(features[part])
        handle = unet.conv_in.register_forward_hook(lambda _m, _i, h, c=condition: alignment(h, c))
        try:
            output = unet(seen[part], 1, encoder_hidden_states=text.embeds).sample
        finally:
            handle.remove()
        if tiny.prediction == NOISE:
            clean = x[part] - sigma * output
        else:  # v = sqrt(abar) noise - sqrt(1 - abar) z, so z = sqrt(abar) x_t - sqrt(1 - abar) v
            clean = (seen[part] - sigma * output) / (sigma**2 + 1).sqrt()
        across = torch.exp(-(((torch.arange(8.0) - 3.5) / 8) ** 2) / 0.02)
        down = torch.exp(-(((torch.arange(8.0) - 4.0) / 8) ** 2) / 0.02)
        total[part] += clean * down[:, None] * across
        weight[part] += down[:, None] * across
    assert relative(got, total / weight) < 1e-4


def test_converted_files_restore_the_same(tiny: TinyModel, pipeline: FaithDiffPipeline, tmp_path: Path) -> None:
    unet, adapter = convert(tiny.faithdiff, tmp_path, "fp32")
    expected = pipeline(photo(48, 64), **QUICK)
    assert relative(load(tiny, adapter, unet=unet)(photo(48, 64), **QUICK), expected) < 1e-3
    own = load(tiny, adapter)  # the folder's own U-Net, which is another one
    assert own.base.scheduler.config.prediction_type == tiny.prediction
    assert relative(own(photo(48, 64), **QUICK), expected) > 1e-2


def test_single_file_is_the_folder(tiny: TinyModel, tmp_path: Path) -> None:
    checkpoint, configuration = make_single_file_sd(tiny.folder, tmp_path)
    _, adapter = convert(tiny.faithdiff, tmp_path, "fp32")
    expected = load(tiny, adapter)(photo(48, 64), **QUICK)
    from_file = FaithDiffPipeline.from_files(checkpoint, adapter, config=configuration, dtype="fp32", device="cpu")
    assert relative(from_file(photo(48, 64), **QUICK), expected) < 1e-3


def test_another_backbones_files_are_refused(
    tiny_backbones: TinyBackbones, golden: Any, tiny_sdxl: Path, tmp_path: Path
) -> None:
    sd21, sd15 = tiny_backbones[SD21], tiny_backbones[SD15]
    checkpoint, configuration = make_single_file_sd(sd15.folder, tmp_path)
    unet, adapter = convert(sd21.faithdiff, tmp_path, "fp32")
    for arguments, message in (
        ({"model": sd15.folder, "faithdiff": sd21.faithdiff}, "model is a model of SD 1.5, but .* made for SD 2.1"),
        ({"model": checkpoint, "faithdiff": adapter, "config": configuration}, "of SD 1.5, but .* made for SD 2.1"),
        ({"model": tiny_sdxl, "faithdiff": adapter}, "is a model of SDXL, but .*_adapter.* is made for SD 2.1"),
        ({"model": sd15.folder, "faithdiff": golden.model}, "model of SD 1.5, but faithdiff_tiny.* made for SDXL"),
        (
            {"model": sd15.folder, "faithdiff": sd15.faithdiff, "unet": unet},
            "faithdiff_unet.* is a U-Net of SD 2.1, but faithdiff.* is made for SD 1.5",
        ),
    ):
        with pytest.raises(WeightsError, match=message):
            FaithDiffPipeline.from_files(device="cpu", **arguments)
    index = sd15.folder / "model_index.json"
    assert json.loads(index.read_text())["_class_name"] == "StableDiffusionPipeline"


def test_loras(tiny: TinyModel, pipeline: FaithDiffPipeline, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    other = SD15 if tiny.backbone is SD21 else SD21
    make_lora(pipeline.base.unet, tmp_path / "own.safetensors")
    make_lora(UNet2DConditionModel(**UNETS[other]), tmp_path / "other.safetensors")
    plain = pipeline(photo(48, 64), **QUICK)
    pipeline.load_lora(tmp_path / "own.safetensors")
    assert relative(pipeline(photo(48, 64), **QUICK), plain) > 1e-3
    pipeline.unload_loras()
    words = rf"other.safetensors is a LoRA for models with text embeddings of {CONTEXT[other]} channels"
    with pytest.raises(WeightsError, match=f"{words}, but the model is one of {tiny.backbone.name}"):
        pipeline.load_lora(tmp_path / "other.safetensors")
    for width, name in ((768, "SD 1.5"), (1024, "SD 2.1"), (2048, "SDXL")):
        key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
        save_file({key: torch.zeros(2, width)}, tmp_path / "full.safetensors")
        with pytest.raises(WeightsError, match=f"is a LoRA for {name}, but the model is one of {tiny.backbone.name}"):
            pipeline.load_lora(tmp_path / "full.safetensors")


def test_embeddings_as_they_come(tiny: TinyModel, pipeline: FaithDiffPipeline) -> None:
    text = pipeline.encode_text(["a stone wall"])
    given: dict[str, Any] = {"prompt_embeds": text.embeds, "negative_prompt_embeds": text.negative_embeds}
    settings = {key: value for key, value in QUICK.items() if key != "prompt"}
    expected = pipeline(photo(48, 64), **QUICK)
    assert relative(pipeline(photo(48, 64), **given, **settings), expected) < 1e-3
    with pytest.raises(SettingsError, match=f"{tiny.backbone.name} takes no pooled_prompt_embeds"):
        pipeline(photo(48, 64), **given, pooled_prompt_embeds=torch.zeros(1, 8), **settings)
    with pytest.raises(SettingsError, match="cfg above 1 needs both of the negative"):
        pipeline(photo(48, 64), prompt_embeds=text.embeds, **settings)


def test_what_a_single_file_predicts_has_to_be_known(
    tiny_backbones: TinyBackbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an adapter, the checkpoint's own U-Net stays. A single file of SD 2.1 does not tell what it predicts."""
    model = tiny_backbones[SD21]
    checkpoint, configuration = make_single_file_sd(model.folder, tmp_path)
    _, adapter = convert(model.faithdiff, tmp_path, "fp32")
    monkeypatch.setattr("faithdiff_core.engine.loading._config_folder", lambda *_: configuration)  # the hub's
    with pytest.raises(WeightsError, match=r"does not say what its U-Net predicts, .* Give `config` the folder"):
        FaithDiffPipeline.from_files(checkpoint, adapter, device="cpu")


def test_inpainting_models_are_refused(tiny_backbones: TinyBackbones, tmp_path: Path) -> None:
    model = tiny_backbones[SD15]
    folder = tmp_path / "inpainting"
    shutil.copytree(model.folder, folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file(state | {"conv_in.weight": torch.zeros(32, 9, 3, 3)}, weights, {"format": "pt"})
    _, adapter = convert(model.faithdiff, tmp_path, "fp32")
    with pytest.raises(WeightsError, match=r"SD 1.5 model's U-Net takes 9 channels \(an inpainting"):
        FaithDiffPipeline.from_files(folder, adapter, dtype="fp32", device="cpu")
