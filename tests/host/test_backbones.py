"""SD 2.1 (v-prediction) and SD 1.5 in ComfyUI, with files that our trainer wrote: the engine's images, and no mixing of
families."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_host import Host
from PIL import Image
from safetensors.torch import load_file
from support.host_sampling import GivenNoise, Setup, load, relative
from tiny_models.backbones import TinyModel
from tiny_models.comfyui_configs import TINY_SD15_UNET, TINY_SD21_UNET, TINY_SD_VAE
from torch import Tensor

from faithdiff_core import convert, read_faithdiff, sampling_sigmas
from faithdiff_core.backbone import SD15, SD21, Backbone
from faithdiff_core.cli import main
from faithdiff_core.engine import FaithDiffPipeline
from faithdiff_core.training.config import DataConfig, StageConfig, TrainConfig
from faithdiff_core.training.degradation import DegradationConfig
from faithdiff_core.training.start import train
from faithdiff_core.weights.marks import IN_WORDS
from faithdiff_core.weights.unet_shapes import UNetConfig

HEIGHT, WIDTH = 136, 200
KINDS = {SD21: ("SD20", TINY_SD21_UNET), SD15: ("SD15", TINY_SD15_UNET)}
"""ComfyUI's names of the families, and the tiny models' sizes."""


def tiny_model(backbone: Backbone, state: dict[str, Tensor]) -> Any:
    """A MODEL of a family with a U-Net given under diffusers' names."""
    kind, sizes = KINDS[backbone]
    supported = getattr(importlib.import_module("comfy.supported_models"), kind)(dict(sizes))
    supported.set_inference_dtype(torch.float32, None)
    model = supported.get_model({}, "", device=torch.device("cpu"))
    names = importlib.import_module("comfy.utils").unet_to_diffusers(supported.unet_config)
    model.diffusion_model.load_state_dict({names[key]: value.float() for key, value in state.items()})
    cpu = torch.device("cpu")
    return importlib.import_module("comfy.model_patcher").CoreModelPatcher(model, load_device=cpu, offload_device=cpu)


def tiny_vae(folder: Path) -> Any:
    """The folder's VAE."""
    state = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    config = {"params": {"ddconfig": dict(TINY_SD_VAE), "embed_dim": 4}}
    return importlib.import_module("comfy.sd").VAE(sd=state, config=config, dtype=torch.float32)


@dataclass
class Loaded:
    """A tiny model in the host."""

    tiny: TinyModel
    name: str
    base: Any
    setup: Setup


@pytest.fixture(scope="module")
def trained(
    tiny_backbones: dict[Backbone, TinyModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[Backbone, TinyModel]:
    """A step of each stage, from files whose alignment is random: that of a new one would do too little to be seen."""
    folder = tmp_path_factory.mktemp("trained")
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    (folder / "images").mkdir()
    for name in "ab":
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        (folder / "images" / f"{name}.txt").write_text("noise")
    out = {}
    for backbone, tiny in tiny_backbones.items():
        config = TrainConfig(
            base=tiny.folder,
            init=tiny.faithdiff,
            output=folder / backbone.key,
            data=DataConfig(folder=folder / "images", size=64, degradation=DegradationConfig(scale=2)),
            stages=(StageConfig(1, 1, 1e-3, 1e-3, 0), StageConfig(2, 1, 1e-3, 1e-3, 0)),
            batch=2,
            workers=0,
            save_precision="fp32",
            tensorboard=False,
        )
        # accelerate holds one precision for a process's life.
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
        with torch.enable_grad():
            result = train(config)
        out[backbone] = replace(tiny, faithdiff=next(f for f in result.files if f.name == "stage2.safetensors"))
    return out


@pytest.fixture(scope="module")
def loaded(host: Host, trained: dict[Backbone, TinyModel]) -> dict[Backbone, Loaded]:
    """MODELs of the folders' own U-Nets, moved to FaithDiff's by the loader."""
    out = {}
    for backbone, tiny in trained.items():
        name = f"{backbone.key}.safetensors"
        shutil.copyfile(tiny.faithdiff, host.base / "models" / "faithdiff" / name)
        base = tiny_model(backbone, load_file(tiny.folder / "unet" / "diffusion_pytorch_model.safetensors"))
        out[backbone] = Loaded(tiny, name, base, load(host, name, model=base))
    return out


@pytest.fixture(scope="module", params=[SD21, SD15], ids=lambda b: b.key)
def model(request: pytest.FixtureRequest, loaded: dict[Backbone, Loaded]) -> Loaded:
    return loaded[request.param]


def test_what_was_trained(
    tiny_backbones: dict[Backbone, TinyModel], model: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file says for which backbone and prediction it is, and all that is trained has moved."""
    tiny = model.tiny
    assert main(["info", str(tiny.faithdiff)]) == 0
    assert f"backbone: {tiny.backbone.name}; predicts {IN_WORDS[tiny.prediction]}" in capsys.readouterr().out
    before, after = (read_faithdiff(t.faithdiff) for t in (tiny_backbones[tiny.backbone], tiny))
    assert after.parts.keys() == before.parts.keys()
    for name, part in after.parts.items():
        old = before.parts[name].state
        assert any(not torch.equal(value, old[key]) for key, value in part.state.items()), name


@torch.no_grad()
def test_the_hosts_images_are_the_engines(host: Host, model: Loaded) -> None:
    """In tiles and whole, from the LQ image and from noise, with the node's sampler and a stock one."""
    setup, tiny = model.setup, model.tiny
    engine = FaithDiffPipeline.from_files(tiny.folder, tiny.faithdiff, dtype="fp32", device="cpu")
    text = engine.encode_text(["a stone wall"])
    assert text.negative_embeds is not None
    # CLIP Text Encode gives a pooled embedding for every family; these have no use for it.
    pooled = {"pooled_output": torch.ones(1, text.embeds.shape[-1])}
    setup.positive, setup.negative = ([[embeds, dict(pooled)]] for embeds in (text.embeds, text.negative_embeds))
    image = torch.rand(1, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0))
    pixels = image.movedim(-1, 1) * 2 - 1
    noise = torch.randn(1, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    features, vae = setup.features(image), tiny_vae(tiny.folder)
    lq_features, lq_latent = engine.encode_lq(pixels), engine.encode_latent(pixels)
    assert relative(features.tensor, lq_features) < 1e-4
    latent = host.call("VAEEncode", pixels=image, vae=vae)[0]
    assert relative(latent["samples"] * 0.18215, lq_latent) < 1e-4
    for start, tile in (("lr", 128), ("noise", 256)):
        expected = engine.sample(
            lq_features, text, noise, lq_latent=lq_latent, start=start, tile=tile, steps=2, cfg=3.0, overlap=0.25
        )
        got = setup.restore(
            features,
            start_point=start,
            tile_size=tile,
            steps=2,
            cfg=3.0,
            overlap=0.25,
            latent_image=latent if start == "lr" else None,
            noise=GivenNoise(noise),
        )
        assert relative(got * 0.18215, expected) < 1e-4
        decoded = host.call("FaithDiffTiledVAEDecode", samples={"samples": got}, vae=vae, tile_size=128, overlap=0.25)[
            0
        ]
        assert float((decoded.movedim(-1, 1) - engine.decode(expected, 128)).abs().max()) < 1e-3
    # With a stock sampler, which is given the finished start and no noise.
    conds = setup.conditioned(features)
    sigmas = sampling_sigmas(2)
    guider = setup.cfg_guider(setup.tiled(setup.model, 128, 0.25), *conds, 3.0)
    zeros = torch.zeros_like(noise)
    x = noise * (sigmas[0] ** 2 + 1) ** 0.5
    got = setup.guided(guider, zeros, {"samples": x / 0.18215}, sigmas)
    expected = engine.sample(lq_features, text, noise, start="noise", tile=128, steps=2, cfg=3.0, overlap=0.25)
    assert relative(got * 0.18215, expected) < 1e-4


@torch.no_grad()
def test_other_u_nets_keep_their_own_prediction(host: Host, loaded: dict[Backbone, Loaded]) -> None:
    """FaithDiff's U-Net brings v along; what mixes has to predict the same."""
    model = loaded[SD21]
    assert samples_v(host, model.setup.model)
    assert not samples_v(host, model.base)
    kept = load(host, model.name, model=model.base, unet_strength=0.0)
    assert not samples_v(host, kept.model)
    words = "`model` is a model that predicts noise, but FaithDiff's U-Net predicts v"
    with pytest.raises(ValueError, match=words):
        load(host, model.name, model=model.base, unet_strength=0.5)
    v_base = host.call("ModelSamplingDiscrete", model=model.base, sampling="v_prediction", zsnr=False)[0]
    half = load(host, model.name, model=v_base, unet_strength=0.5)
    assert samples_v(host, half.model)
    # An adapter leaves the MODEL's U-Net, and what that of SD 2.1 predicts is ComfyUI's guess.
    folder = host.base / "models" / "faithdiff"
    adapter = convert(folder / model.name, folder, "fp32")[1].name
    with pytest.raises(ValueError, match=r"takes `model` for a model that predicts noise, .* ModelSamplingDiscrete"):
        load(host, adapter, model=model.base)
    assert samples_v(host, load(host, adapter, model=v_base).model)


def samples_v(host: Host, model: Any) -> bool:
    sampling = model.get_model_object("model_sampling")
    return bool(host.pack_module("nodes.bridge.prediction_type").samples_as(sampling, "v_prediction"))


@torch.no_grad()
def test_a_difference_is_added(host: Host, loaded: dict[Backbone, Loaded]) -> None:
    """The MODEL that FaithDiff was trained from, as `model` and `base_model`, becomes FaithDiff."""
    model = loaded[SD15]
    part = read_faithdiff(model.tiny.faithdiff).unet
    assert part is not None
    torch.manual_seed(0)
    before = {key: value + 0.1 * value.std(correction=0) * torch.randn_like(value) for key, value in part.state.items()}
    base = tiny_model(SD15, before)
    setup = load(host, model.name, model=base, base_model=base)
    for each in (setup, model.setup):
        each.positive = each.negative = [[torch.ones(1, 77, 48), {}]]
    features = model.setup.features(torch.rand(1, 64, 64, 3))
    assert relative(setup.restore(features, steps=2), model.setup.restore(features, steps=2)) < 1e-4
    with pytest.raises(ValueError, match=r"`base_model` is a model of SD 2.1, but with sd15.* works with SD 1.5"):
        load(host, model.name, model=base, base_model=loaded[SD21].base)


def test_another_backbones_model_is_refused(host: Host, loaded: dict[Backbone, Loaded]) -> None:
    sd21, sd15 = loaded[SD21], loaded[SD15]
    for name, base, message in (
        (sd21.name, sd15.base, r"`model` is a model of SD 1.5, but with sd21.* FaithDiff works with SD 2.1"),
        (sd15.name, host.call("TestModel")[0], r"`model` is a model of SDXL, but with sd15.* works with SD 1.5"),
        ("faithdiff_tiny.safetensors", sd21.base, r"`model` is a model of SD 2.1, but .* FaithDiff works with SDXL"),
    ):
        with pytest.raises(ValueError, match=message):
            load(host, name, model=base)
    features = sd15.setup.features(torch.rand(1, 64, 64, 3))
    with pytest.raises(ValueError, match=r"come from a FaithDiff file for SD 1.5, but the MODEL is one of SD 2.1"):
        sd21.setup.restore(features)


def test_an_adapter_knows_its_backbone(host: Host, loaded: dict[Backbone, Loaded]) -> None:
    model = loaded[SD15]
    folder = host.base / "models" / "faithdiff"
    adapter = convert(folder / model.name, folder, "fp32")[1].name
    load(host, adapter, model=model.base)
    with pytest.raises(ValueError, match=r"`model` is a model of SD 2.1, but with sd15_adapter.* works with SD 1.5"):
        load(host, adapter, model=loaded[SD21].base)
    with pytest.raises(ValueError, match=r"Connect a MODEL to `model`: .* or an SD 1.5 checkpoint of your own"):
        load(host, adapter, model=None)


def test_comfyui_knows_the_published_sizes(host: Host) -> None:
    """A FaithDiff file's own U-Net is recognised by ComfyUI as its backbone, and every tensor finds its place."""
    detection = importlib.import_module("comfy.model_detection")
    utils = importlib.import_module("comfy.utils")
    backbones = host.pack_module("nodes.bridge.backbones")
    for backbone, (kind, _) in KINDS.items():
        shapes = UNetConfig.of(backbone).shapes()
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        config = detection.model_config_from_diffusers_unet(state)
        assert type(config).__name__ == kind
        assert shapes.keys() <= utils.unet_to_diffusers(config.unet_config).keys()
        scale = backbones.LATENT_FORMATS[getattr(backbones, backbone.key.upper())]().scale_factor
        assert config.latent_format.scale_factor == scale == backbone.vae_scaling_factor


def test_models_of_other_kinds_are_refused(host: Host, loaded: dict[Backbone, Loaded]) -> None:
    """unCLIP has SD 2.1's layers and takes images as a condition."""
    supported = importlib.import_module("comfy.supported_models").SD21UnclipH(
        {**TINY_SD21_UNET, "adm_in_channels": 2048, "num_classes": "sequential"}
    )
    supported.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    patcher = importlib.import_module("comfy.model_patcher").CoreModelPatcher(
        supported.get_model({}, "", device=cpu), load_device=cpu, offload_device=cpu
    )
    with pytest.raises(ValueError, match=r"`model` is of type \w+, but FaithDiff works with SDXL, SD 2.1, SD 1.5"):
        load(host, loaded[SD21].name, model=patcher)
