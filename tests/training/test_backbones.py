"""Training on SD 2.1 (v-prediction) and SD 1.5, from the folder to a restored image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.golden import Golden
from support.training import Make
from tiny_models.backbones import CONTEXT, TinyModel

from faithdiff_core import WeightsError, convert, read_faithdiff
from faithdiff_core.backbone import NOISE, SD15, SD21, Backbone
from faithdiff_core.engine import FaithDiffPipeline
from faithdiff_core.sampling.schedule import alphas_cumprod
from faithdiff_core.training.config import LoraConfig, StageConfig
from faithdiff_core.training.data import open_source
from faithdiff_core.training.model import load_models
from faithdiff_core.training.samples import SampleSettings, TrainingSet, collate
from faithdiff_core.training.start import train
from faithdiff_core.training.validation import sample

ONE_STEP_EACH = (StageConfig(1, 1, 1e-3, 1e-3, 0), StageConfig(2, 1, 1e-3, 1e-3, 0))

TinyBackbones = dict[Backbone, TinyModel]


@pytest.fixture(scope="module", params=[SD21, SD15], ids=lambda b: b.key)
def tiny(request: pytest.FixtureRequest, tiny_backbones: TinyBackbones) -> TinyModel:
    return tiny_backbones[request.param]


@torch.no_grad()
def test_both_stages_convert_and_restore(tiny: TinyModel, make: Make, tmp_path: Path) -> None:
    """The first loss is the definition's, and what comes out is a FaithDiff file of the base's backbone."""
    config = make(base=tiny.folder, stages=ONE_STEP_EACH)
    with torch.enable_grad():
        result = train(config)
    assert result.finished
    assert [file.name for file in result.files] == [
        "stage1.safetensors",
        "stage1_adapter.safetensors",
        "stage2.safetensors",
        "stage2_adapter.safetensors",
    ]

    # The alignment begins with zeros, so the first prediction is the base's own.
    model, frozen = load_models(tiny.folder, None)
    source = open_source(config.data)
    settings = SampleSettings(config.seed, config.text_dropout, config.noise_offset, 4, 8)
    batch = collate([TrainingSet(source, list(range(len(source))), config.data, settings)[i] for i in range(2)])
    posterior = frozen.vae.encode(batch["hq"]).latent_dist
    z = 0.18215 * (posterior.mean + posterior.std * batch["posterior"])
    noise, steps = batch["noise"][:, 0], batch["timestep"][:, 0]
    abar = alphas_cumprod()[steps].view(-1, 1, 1, 1)
    context = torch.cat([frozen.pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in batch["caption"]])
    assert context.shape[-1] == CONTEXT[tiny.backbone]
    noisy = abar**0.5 * z + (1 - abar) ** 0.5 * noise
    output = model.unet(noisy, steps, encoder_hidden_states=context).sample
    target = noise if tiny.prediction == NOISE else abar**0.5 * noise - (1 - abar) ** 0.5 * z
    assert result.losses[0] == pytest.approx(float((output - target).abs().mean()), rel=1e-5)

    before = model.state_dict()
    after, _ = load_models(tiny.folder, result.files[2])
    changed = {key.split(".")[0] for key, value in after.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"unet", "lq_encoder", "alignment"}
    for file in result.files:
        weights = read_faithdiff(file)
        assert (weights.backbone, weights.prediction) == (tiny.backbone, tiny.prediction)
    unet, adapter = convert(result.files[2], tmp_path / "converted", "fp32")
    image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    engine = FaithDiffPipeline.from_files(tiny.folder, adapter, unet=unet, dtype="fp32", device="cpu")
    assert torch.isfinite(engine(image, steps=2, seed=1, tile=64)).all()


@torch.no_grad()
def test_sample_images_are_the_engines(tiny: TinyModel) -> None:
    """Validation samples by its own short loop; the engine by diffusers' scheduler."""
    model, frozen = load_models(tiny.folder, tiny.faithdiff)
    assert (model.backbone, model.prediction) == (tiny.backbone, tiny.prediction)
    lq = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    got = sample(model.eval(), frozen, lq, 3, 1, torch.device("cpu"), model.prediction)
    engine = FaithDiffPipeline.from_files(tiny.folder, tiny.faithdiff, dtype="fp32", device="cpu")
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    text = engine.encode_text([""], guided=False)
    latent = engine.sample(engine.encode_lq(lq), text, noise, start="noise", steps=3, cfg=1.0, tile=128)
    assert float((got / 2 + 0.5 - engine.decode(latent)).abs().max()) < 1e-3


def test_a_lora_on_convolutions(tiny_backbones: TinyBackbones, make: Make) -> None:
    """SD 1.5's transformers end with convolutions; the full file holds the update, the LoRA file its parts."""
    lora = LoraConfig(rank=2, alpha=2.0, targets=("to_q", "proj_in"))
    config = make(base=tiny_backbones[SD15].folder, lora=lora, ema=0.0, stages=ONE_STEP_EACH[1:])
    files = {file.name: file for file in train(config).files}
    parts = load_file(files["stage2_lora.safetensors"])
    before, after = load_models(config.base, None)[0], load_models(config.base, files["stage2.safetensors"])[0]
    name = "mid_block.attentions.0.proj_in"
    down, up = (parts[f"lora_unet_{name.replace('.', '_')}.lora_{end}.weight"] for end in ("down", "up"))
    assert down.ndim == 4
    with torch.no_grad():
        update = torch.nn.functional.conv2d(down.transpose(0, 1), up).transpose(0, 1)
    moved = after.unet.state_dict()[f"{name}.weight"] - before.unet.state_dict()[f"{name}.weight"]
    assert float(update.abs().max()) > 1e-5
    assert torch.allclose(moved, update, atol=1e-6)


def test_what_cannot_be_trained(tiny_backbones: TinyBackbones, golden: Golden, tmp_path: Path) -> None:
    sd21, sd15 = tiny_backbones[SD21], tiny_backbones[SD15]
    for init, message in (
        (sd21.faithdiff, "faithdiff.safetensors is made for SD 2.1, but .*model is a model of SD 1.5"),
        (golden.model, "faithdiff_tiny.safetensors is made for SDXL, but .*model is a model of SD 1.5"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_models(sd15.folder, init)
    folder = tmp_path / "zero"
    shutil.copytree(sd21.folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(WeightsError, match="ends in pure noise"):
        load_models(folder, None)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "PixArtAlphaPipeline"}))
    with pytest.raises(WeightsError, match=r"does not work on. Give one of SDXL, SD 2.1, SD 1.5"):
        load_models(folder, None)
