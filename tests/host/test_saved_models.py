"""FaithDiff MODELs that ComfyUI's own nodes save come back: with the adapter alone they restore to the same image.

Everything goes over HTTP, through the stock loaders, with models that ComfyUI recognizes as SDXL by their sizes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_host import Graph, GraphError, Host, Node, Server
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from support.host_sampling import relative
from tiny_models.reduced_sdxl import SMALLEST_UNET, RandomWeights, small_adapter, write_smallest_checkpoint
from torch import Tensor

from faithdiff_core.cli import main
from faithdiff_core.weights.lora_names import lora_layers
from faithdiff_core.weights.unet_names import checkpoint_names

SAVED = "saved_00001_.safetensors"
CHECKPOINT, BASE, LORA = "mine.ckpt", "trained_from.pt", "style.safetensors"
FAITHDIFF, ADAPTER = "FaithDiff_small.bin", "FaithDiff_small_adapter.bin"


@pytest.fixture(scope="module")
def files(host: Host, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models folder with a checkpoint, what FaithDiff was trained from, FaithDiff, its adapter, and a LoRA."""
    models = server.base / "models"
    (models / "diffusion_models").mkdir(exist_ok=True)
    write_smallest_checkpoint(models / "checkpoints" / CHECKPOINT, seed=1)
    shapes = SMALLEST_UNET.shapes()
    base = RandomWeights(2).state(shapes)
    names = checkpoint_names(SMALLEST_UNET)
    torch.save({names[key]: value for key, value in base.items()}, models / "diffusion_models" / BASE)
    # FaithDiff differs where it is cheap to store: in the projections of the transformers.
    generator = torch.Generator().manual_seed(3)
    changed = {
        key: value + (0.8 * value.std() * torch.randn(value.shape, generator=generator)).half()
        for key, value in base.items()
        if key.endswith(("to_v.weight", "proj_out.weight"))
    }
    torch.save({**base, **changed, **small_adapter()}, models / "faithdiff" / FAITHDIFF)
    torch.save(small_adapter(), models / "faithdiff" / ADAPTER)
    lora = {}
    for layer, name in lora_layers(SMALLEST_UNET).items():
        if layer.endswith(("to_out.0", "ff.net.2")):
            rows, columns = shapes[f"{layer}.weight"]
            lora[f"{name}.lora_up.weight"] = torch.randn((rows, 4), generator=generator).half()
            lora[f"{name}.lora_down.weight"] = (torch.randn((4, columns), generator=generator) / columns**0.5).half()
    save_file(lora, models / "loras" / LORA)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(server.base / "input/x.png")
    return models


def restoration(graph: Graph, model: list[Any], faithdiff: list[Any], vae: list[Any], name: str) -> None:
    """A restoration of the input to an image and a latent under a name."""
    texts = [
        graph.add("TestConditioning", which="random", seed=seed, width=2048, pooled_width=1280, tokens=8)
        for seed in (1, 2)
    ]
    pixels = graph.add("LoadImage", image="x.png")
    features = graph.add("FaithDiffLQEncode", faithdiff=faithdiff, pixels=pixels[0], tile_size=1024, overlap=0.25)
    samples = graph.add(
        "FaithDiffSampler",
        model=model,
        positive=texts[0][0],
        negative=texts[1][0],
        lq_features=features[0],
        latent_image=graph.add("VAEEncode", pixels=pixels[0], vae=vae)[0],
        seed=1,
        steps=2,
        cfg=2.0,
        sampler_name="euler",
        scheduler="faithdiff",
        start_point="lr",
        denoise=1.0,
        tile_size=1024,
        overlap=0.5,
        tile_batch=0,
    )
    graph.add("SaveLatent", samples=samples[0], filename_prefix=name)
    graph.add("SaveImage", images=graph.add("VAEDecode", samples=samples[0], vae=vae)[0], filename_prefix=name)


def with_faithdiff(graph: Graph, faithdiff_name: str, model: Node, **kw: Any) -> Node:
    return graph.add(
        "FaithDiffModelLoader", faithdiff_name=faithdiff_name, weight_dtype="default", model=model[0], **kw
    )


@dataclass(frozen=True)
class Results:
    """Latents and images that prompts left in the output folder."""

    folder: Path

    def latent(self, name: str) -> Tensor:
        (path,) = self.folder.glob(f"{name}_0*.latent")
        return load_file(path)["latent_tensor"]

    def image(self, name: str) -> NDArray[np.int16]:
        (path,) = self.folder.glob(f"{name}_0*.png")
        return np.asarray(Image.open(path)).astype(np.int16)


@pytest.fixture(scope="module")
def results(server: Server, files: Path) -> Results:
    """One graph that merges, applies a LoRA, restores and saves; and one that restores with what was saved."""
    graph = Graph()
    mine = graph.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    base = graph.add("UNETLoader", unet_name=BASE, weight_dtype="default")
    merged = with_faithdiff(graph, FAITHDIFF, mine, base_model=base[0], unet_strength=0.8)
    styled = graph.add("LoraLoaderModelOnly", model=merged[0], lora_name=LORA, strength_model=0.7)
    restoration(graph, styled[0], merged[1], mine[2], "unsaved")
    restoration(graph, merged[0], merged[1], mine[2], "without_lora")
    graph.add("ModelSave", model=styled[0], filename_prefix="diffusion_models/saved")
    graph.add("CheckpointSave", model=styled[0], clip=mine[1], vae=mine[2], filename_prefix="checkpoints/saved")
    difference = graph.add("ModelMergeSubtract", model1=styled[0], model2=mine[0], multiplier=1.0)
    settings = {"rank": 8, "lora_type": "full_diff", "bias_diff": True, "filename_prefix": "loras/saved"}
    graph.add("LoraSave", model_diff=difference[0], **settings)
    server.run(graph)

    graph = Graph()
    mine = graph.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=SAVED)
    models = {
        "plain": (mine, mine),
        "unet": (graph.add("UNETLoader", unet_name=SAVED, weight_dtype="default"), mine),
        "checkpoint": (checkpoint, checkpoint),
        "lora": (graph.add("LoraLoaderModelOnly", model=mine[0], lora_name=SAVED, strength_model=1.0), mine),
    }
    for name, (model, vae) in models.items():
        loader = with_faithdiff(graph, ADAPTER, model)
        restoration(graph, loader[0], loader[1], vae[2], name)
    server.run(graph)
    assert "not loaded" not in server.log.read_text(errors="replace")
    return Results(server.base / "output")


@pytest.mark.parametrize("name", ["unet", "checkpoint"])
def test_saved_models_restore_to_the_same_image(results: Results, name: str) -> None:
    expected = results.latent("unsaved")
    assert relative(results.latent(name), expected) < 1e-5
    assert np.abs(results.image(name) - results.image("unsaved")).max() <= 1
    # What was merged and the LoRA each make a difference that is seen.
    for other in ("plain", "without_lora"):
        assert relative(results.latent(other), expected) > 0.05
        assert np.abs(results.image(other) - results.image("unsaved")).max() > 10


def test_a_saved_lora_restores_to_the_same_image(results: Results) -> None:
    """ComfyUI stores the difference in half precision."""
    assert relative(results.latent("lora"), results.latent("unsaved")) < 1e-3
    assert np.abs(results.image("lora") - results.image("unsaved")).max() <= 1


@pytest.mark.parametrize(
    ("folder", "what", "node"),
    [
        ("diffusion_models", "an SDXL U-Net as ComfyUI saves it", "Load Diffusion Model"),
        ("checkpoints", "an SDXL checkpoint", "Load Checkpoint"),
        ("loras", "a LoRA for SDXL as ComfyUI's Extract and Save Lora writes it", "Load LoRA"),
    ],
)
def test_info_on_saved_files(
    results: Results, folder: str, what: str, node: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--json", str(results.folder / folder / SAVED)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["what"], facts["backbone"]) == (what, "SDXL")
    assert node in facts["use"]
    assert "`_adapter` file" in facts["use"]
    if folder != "loras":  # ComfyUI writes no graph into those
        assert facts["prediction"] == "epsilon"
        assert facts["history"] == (
            f"The graph that saved it had FaithDiff Model Loader with {FAITHDIFF}, `model`, `base_model`, "
            "unet_strength 0.8."
        )


def test_a_saved_file_in_place_of_faithdiffs(server: Server, results: Results) -> None:
    graph = Graph()
    loader = with_faithdiff(graph, SAVED, graph.add("TestModel", weights="golden", seed=0))
    graph.add("ModelSave", model=loader[0], filename_prefix="x")
    words = f"FaithDiff Model Loader: {SAVED} is an SDXL U-Net as ComfyUI saves it, not a FaithDiff file"
    with pytest.raises(GraphError, match=words):
        server.run(graph)
