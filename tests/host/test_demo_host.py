"""The demo model in the host: its text encoders against diffusers', its restoration against the engine's."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from comfy_host import REPO, Host, Runner
from PIL import Image
from torch import Tensor

DEMO = REPO / "demo" / "model"
API = REPO / "workflows" / "api" / "faithdiff_demo.json"

CAPTIONS = ("", "A photograph.", "A drawing.", "two grey cats, 3 dogs & a naïve café at night")

SIDES = (104, 84)
"""Height and width of the low-quality image: enlarged, several tiles, and one side is padded."""


@pytest.fixture(scope="module")
def engine() -> Any:
    """The demo model in the engine."""
    from faithdiff_core.engine import FaithDiffPipeline

    return FaithDiffPipeline.from_files(DEMO, DEMO / "faithdiff.safetensors", dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def models(host: Host) -> tuple[Any, ...]:
    """MODEL, CLIP, VAE and FAITHDIFF."""
    return host.call("FaithDiffDemoModels")


@pytest.fixture(scope="module")
def demo_module(host: Host) -> ModuleType:
    """The module that loads the demo model, as the host has it."""
    return host.pack_module("nodes.bridge.demo_model")


@pytest.fixture(scope="module")
def low_quality() -> Tensor:
    """A part of a photograph, small and noisy, (1, 3, H, W) in [0, 1] and in bytes' steps."""
    import skimage

    height, width = SIDES
    photograph = Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png").convert("RGB")
    part = photograph.crop((120, 60, 120 + 2 * width, 60 + 2 * height)).resize((width, height), Image.Resampling.BOX)
    noise = np.random.default_rng(0).normal(0, 25, (height, width, 3))
    pixels = (np.asarray(part) + noise).round().clip(0, 255).astype(np.float32) / 255
    return torch.from_numpy(pixels).movedim(-1, 0)[None]


@pytest.fixture(scope="module")
def prompt(host: Host, low_quality: Tensor) -> dict[str, Any]:
    """The demo workflow with the low-quality image in the input folder, few steps, and tiles so small that several
    are needed.
    """
    pixels = (low_quality[0].movedim(0, -1) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(host.base / "input" / "example.png")
    prompt: dict[str, Any] = json.loads(API.read_text(encoding="utf-8"))
    node_of(prompt, "FaithDiffSampler")["inputs"].update(tile_size=128, steps=3)
    return prompt


def node_of(prompt: dict[str, Any], class_type: str) -> dict[str, Any]:
    """The only node of a type."""
    (node,) = [node for node in prompt.values() if node["class_type"] == class_type]
    return dict(node)


def link_to(prompt: dict[str, Any], class_type: str) -> list[Any]:
    """The first output of the only node of a type."""
    (key,) = [key for key, node in prompt.items() if node["class_type"] == class_type]
    return [key, 0]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_text_encoders_equal_those_of_diffusers(host: Host, models: tuple[Any, ...], engine: Any, caption: str) -> None:
    conditioning = host.call("CLIPTextEncode", clip=models[1], text=caption)[0]
    embeds, _, pooled, _ = engine.base.encode_prompt(prompt=caption, do_classifier_free_guidance=False)
    assert conditioning[0][0].shape == embeds.shape
    assert conditioning[0][1]["pooled_output"].shape == pooled.shape
    assert (conditioning[0][0] - embeds).abs().max() < 1e-4
    assert (conditioning[0][1]["pooled_output"] - pooled).abs().max() < 1e-4
    # Captions are told apart by more than that.
    other = engine.base.encode_prompt(prompt=caption + " x", do_classifier_free_guidance=False)
    assert (other[0] - embeds).abs().max() > 1e-2


def test_weighted_words_are_weighed_against_the_right_empty_text(host: Host, models: tuple[Any, ...]) -> None:
    """The host weighs words by their distance from an empty text, so weight 0 of all words must give that one."""
    empty, none = (host.call("CLIPTextEncode", clip=models[1], text=text)[0][0][0] for text in ("", "(a cat:0.0)"))
    words = slice(1, 1 + len("acat"))
    assert torch.allclose(none[:, words], empty[:, words], atol=1e-5)


def test_the_vae_equals_that_of_diffusers(
    host: Host, models: tuple[Any, ...], engine: Any, low_quality: Tensor
) -> None:
    pixels = low_quality[..., :80, :80]
    latent = host.call("VAEEncode", pixels=pixels.movedim(1, -1), vae=models[2])[0]["samples"]
    expected = engine.encode_latent(pixels * 2 - 1) / engine.base.vae.config.scaling_factor
    assert (latent - expected).abs().max() < 1e-3 * expected.abs().max()
    decoded = host.call("VAEDecode", samples={"samples": latent}, vae=models[2])[0]
    again = engine.decode(expected * engine.base.vae.config.scaling_factor)
    assert (decoded.movedim(-1, 1) - again).abs().max() < 1e-3


def test_the_workflow_restores_as_the_engine_does(
    host: Host, engine: Any, prompt: dict[str, Any], low_quality: Tensor
) -> None:
    """From the image to the image: both draw the same noise from a seed."""
    settings = node_of(prompt, "FaithDiffSampler")["inputs"]
    finish = link_to(prompt, "FaithDiffFinishImage")
    result = host.run(prompt, {"image": finish})
    image = result.outputs["image"].movedim(-1, 1)
    expected = engine(
        low_quality,
        scale=node_of(prompt, "FaithDiffPrepareImage")["inputs"]["scale_by"],
        steps=settings["steps"],
        cfg=settings["cfg"],
        start=settings["start_point"],
        tile=settings["tile_size"],
        overlap=settings["overlap"],
        seed=settings["seed"],
        color_fix=node_of(prompt, "FaithDiffFinishImage")["inputs"]["color_fix"],
    )
    assert image.shape == expected.shape == (1, 3, *(2 * side for side in SIDES))
    assert (image - expected).abs().max() < 2 / 255
    enlarged = torch.nn.functional.interpolate(low_quality, scale_factor=2)
    assert (image - enlarged).abs().max() > 10 / 255, "nothing was done"
    (saved,) = next(iter(result.ui.values()))["images"]
    with Image.open(host.base / "output" / saved["subfolder"] / saved["filename"]) as opened:
        assert opened.size == image.shape[:1:-1]


def test_the_workflow_has_the_settings_of_the_demo(prompt: dict[str, Any]) -> None:
    import yaml

    settings = yaml.safe_load((REPO / "demo" / "restore.yaml").read_text(encoding="utf-8"))
    written = json.loads(API.read_text(encoding="utf-8"))
    sampler = node_of(written, "FaithDiffSampler")["inputs"]
    assert node_of(written, "FaithDiffPrepareImage")["inputs"]["scale_by"] == settings["scale"]
    assert node_of(written, "FaithDiffFinishImage")["inputs"]["color_fix"] == settings["color_fix"]
    names = {"steps": "steps", "cfg": "cfg", "start": "start_point", "tile": "tile_size", "overlap": "overlap"}
    assert {name: sampler[inner] for name, inner in names.items()} == {name: settings[name] for name in names}
    assert sampler["seed"] == settings["seed"]
    assert not any("safetensors" in str(value) for node in written.values() for value in node["inputs"].values())


def test_the_workflow_needs_no_upload() -> None:
    """Its image is the model's own."""
    written = json.loads((REPO / "workflows" / "faithdiff_demo.json").read_text(encoding="utf-8"))
    assert not any(node["type"].startswith("LoadImage") for node in written["nodes"])
    (models,) = [node for node in written["nodes"] if node["type"] == "FaithDiffDemoModels"]
    assert len(models["outputs"][4]["links"]) == 2  # to prepare, and to compare


def test_the_sample_is_the_image_of_the_readme(models: tuple[Any, ...]) -> None:
    with Image.open(REPO / "assets" / "noisy_coffee.png") as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert models[4].shape == (1, *expected.shape)
    assert models[4].dtype == torch.float32
    assert np.array_equal((models[4][0] * 255).round().numpy(), expected)


def test_the_alignment_is_on_the_model(host: Host, prompt: dict[str, Any]) -> None:
    runner, want = Runner(), {"latent": link_to(prompt, "FaithDiffSampler")}
    with_it = host.run(prompt, want, runner=runner).outputs["latent"]["samples"]
    node_of(prompt, "FaithDiffSampler")["inputs"]["strength"] = 0.0
    without = host.run(prompt, want, runner=runner).outputs["latent"]["samples"]
    node_of(prompt, "FaithDiffSampler")["inputs"]["strength"] = 1.0
    assert (with_it - without).abs().max() > 0.05 * with_it.abs().max()


def test_the_node_is_for_development(host: Host) -> None:
    info = host.node_class("FaithDiffDemoModels").GET_NODE_INFO_V1()
    assert info["dev_only"] is True
    others = [name for name in host.node_ids if name.startswith("FaithDiff") and name != "FaithDiffDemoModels"]
    assert not any(host.node_class(name).GET_SCHEMA().is_dev_only for name in others)


def test_the_host_can_make_the_model_again(models: tuple[Any, ...]) -> None:
    """As it does for several cards and for hooks."""
    make, arguments = models[0].cached_patcher_init
    again = make(*arguments, disable_dynamic=True)
    state, expected = again.model.state_dict(), models[0].model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_missing_files_are_named(demo_module: ModuleType, host: Host, tmp_path: Path) -> None:
    error = host.pack_module("faithdiff_core.errors").WeightsError
    for file in DEMO.rglob("*.json"):
        (tmp_path / file.relative_to(DEMO)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.relative_to(DEMO)).write_bytes(file.read_bytes())
    with pytest.raises(error, match=r"lacks faithdiff\.safetensors, vae/diffusion_pytorch_model\.safetensors"):
        demo_module.load_demo(tmp_path)


def test_heads_of_several_widths_are_refused(demo_module: ModuleType, host: Host) -> None:
    sizes = host.pack_module("faithdiff_core.weights.unet_shapes").UNetConfig((32, 64, 128), 1, (0, 1, 1), 1, 64, 1600)
    assert demo_module.unet_config(sizes, [1, 1, 2])["num_head_channels"] == 64
    with pytest.raises(host.pack_module("faithdiff_core.errors").WeightsError, match=r"\[64, 128\]"):
        demo_module.unet_config(sizes, 1)
