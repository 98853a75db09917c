"""The tools of the host tests, tried with the host's own nodes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import comfy_host
import pytest
import torch
from comfy_host import Graph, GraphError, Host, Runner
from tiny_models import reduced_sdxl as reduced

from faithdiff_core import read_faithdiff

CONDITIONING = {"which": "positive", "seed": 0, "width": 64, "pooled_width": 64, "tokens": 77}
SAMPLER = {"seed": 3, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def text_to_image(size: int = 64, **changes: Any) -> tuple[Graph, dict[str, list[Any]]]:
    """A stock graph around the tiny model, and links to its latent and image."""
    graph = Graph()
    model = graph.add("TestModel", weights="golden", seed=0)
    positive = graph.add("TestConditioning", which="positive", seed=0, width=64, pooled_width=64, tokens=77)
    negative = graph.add("TestConditioning", which="negative", seed=0, width=64, pooled_width=64, tokens=77)
    latent = graph.add("EmptyLatentImage", width=size, height=size, batch_size=1)
    inputs = {"model": model[0], "positive": positive[0], "negative": negative[0], "latent_image": latent[0]}
    sampled = graph.add("KSampler", **{**inputs, **SAMPLER, **changes})
    decoded = graph.add("VAEDecode", samples=sampled[0], vae=graph.add("TestVAE")[0])
    graph.add("SaveImage", images=decoded[0], filename_prefix="tiny")
    return graph, {"latent": sampled[0], "image": decoded[0]}


def test_nodes_is_the_hosts_module_and_the_core_is_importable(host: Host, host_path: Path) -> None:
    import faithdiff_core
    import nodes

    assert Path(str(nodes.__file__)).resolve() == host_path / "nodes.py"
    assert Path(str(faithdiff_core.__file__)).resolve().parent == comfy_host.REPO / "faithdiff_core"
    assert host.pack_module("faithdiff_core").__name__ != "faithdiff_core"


def test_graph_gives_the_values_asked_for(host: Host) -> None:
    graph, want = text_to_image()
    result = host.run(graph, want)
    assert result.outputs["latent"]["samples"].shape == (1, 4, 8, 8)
    assert result.outputs["image"].shape == (1, 64, 64, 3)
    assert len(result.ui["8"]["images"]) == 1
    assert (host.base / "output" / result.ui["8"]["images"][0]["filename"]).is_file()
    assert result.progress[-1] == (2, 2)


def test_sampling_is_repeatable_and_depends_on_the_weights(host: Host) -> None:
    graph, want = text_to_image()
    other = Graph({key: {**node, "inputs": dict(node["inputs"])} for key, node in graph.prompt.items()})
    other.prompt["1"]["inputs"]["weights"] = "other"
    first, second, third = (host.run(g, want).outputs["latent"]["samples"] for g in (graph, graph, other))
    assert torch.equal(first, second)
    assert (first - third).abs().max() > 0.1
    assert torch.isfinite(third).all()


def test_a_runner_keeps_results_and_a_fresh_one_does_not(host: Host) -> None:
    graph, _ = text_to_image()
    again, _ = text_to_image(seed=4)
    runner = Runner()
    first = host.run(graph, runner=runner)
    second = host.run(again, runner=runner)
    assert sorted(first.executed) == sorted(graph.prompt)
    assert not first.cached
    assert sorted(second.executed) == ["5", "7", "8"]
    assert set(second.cached) >= {"1", "2", "3", "4", "6"}
    assert sorted(host.run(again).executed) == sorted(graph.prompt)


def test_refused_and_failed_graphs_say_why(host: Host) -> None:
    graph, _ = text_to_image(steps=0)
    refused = host.run(graph, check=False)
    assert refused.status == "invalid"
    assert any(error.get("node_id") == "5" and "steps" in str(error) for error in refused.errors)
    with pytest.raises(GraphError, match="steps"):
        host.run(graph)

    graph = Graph()
    image = graph.add("TestImage", kind="random", width=64, height=64, batch=1, seed=0)
    noise = graph.add("TestNoise", which="one_tile_noise", seed=0)
    encoded = graph.add("VAEEncode", pixels=image[0], vae=graph.add("TestVAE")[0])
    model = graph.add("TestModel", weights="golden", seed=0)
    guider = graph.add("BasicGuider", model=model[0], conditioning=graph.add("TestConditioning", **CONDITIONING)[0])
    sampler = graph.add("KSamplerSelect", sampler_name="euler")
    sigmas = graph.add("BasicScheduler", model=model[0], scheduler="simple", steps=1, denoise=1.0)
    sampled = graph.add(
        "SamplerCustomAdvanced",
        noise=noise[0], guider=guider[0], sampler=sampler[0], sigmas=sigmas[0], latent_image=encoded[0],
    )  # fmt: skip
    failed = host.run(graph, {"latent": sampled[0]}, check=False)
    assert failed.status == "error"
    assert failed.errors[0]["node_type"] == "SamplerCustomAdvanced"
    assert "the noise is (1, 4, 16, 16), the latent (1, 4, 8, 8)" in failed.message


def test_a_run_can_be_interrupted(host: Host) -> None:
    graph, want = text_to_image(size=256, steps=50)
    timer = threading.Timer(1.0, host.interrupt)
    timer.start()
    began = time.monotonic()
    result = host.run(graph, want, check=False)
    timer.join()
    assert result.status == "interrupted"
    assert time.monotonic() - began < 6
    assert "latent" not in result.outputs
    graph, want = text_to_image()
    assert host.run(graph, want).status == "success"


def test_the_vae_is_the_golden_one(host: Host) -> None:
    data = host.testpack.golden.expected()
    (vae,) = host.call("TestVAE")
    (image,) = host.call("VAEDecode", samples={"samples": data["vae.latent"]}, vae=vae)
    golden = ((data["vae.decoded"] + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert (image - golden).abs().max() < 1e-5
    for case in host.testpack.golden.case_names():
        pixels, latent, noise, sigmas = host.call("TestGoldenCase", case=case)
        assert torch.equal(noise.generate_noise(latent), data[f"{case}.noise"])
        assert sigmas[-1] == 0
        assert sigmas[0] > 5
        (encoded,) = host.call("VAEEncode", pixels=pixels, vae=vae)
        if f"{case}.lr_latent" in data:
            assert (encoded["samples"] - latent["samples"]).abs().max() < 1e-4
        else:
            assert latent["samples"].shape == encoded["samples"].shape
            assert not latent["samples"].any()


def test_the_text_encoder_makes_conditioning_for_the_tiny_model(host: Host) -> None:
    (clip,) = host.call("TestCLIP", seed=1)
    (one,) = host.call("CLIPTextEncode", clip=clip, text="a photograph of a cat")
    (two,) = host.call("CLIPTextEncode", clip=clip, text="")
    context, pooled = one[0][0], one[0][1]["pooled_output"]
    assert context.shape == (1, 77, 64)
    assert pooled.shape == (1, 64)
    assert torch.isfinite(context).all()
    assert (context - two[0][0]).abs().max() > 0.1
    graph, want = text_to_image()
    graph.prompt["2"] = {
        "class_type": "CLIPTextEncode",
        "inputs": {"text": "a cat", "clip": graph.add("TestCLIP", seed=1)[0]},
    }
    assert torch.isfinite(host.run(graph, want).outputs["latent"]["samples"]).all()


def test_lora_and_controlnet_act(host: Host) -> None:
    (model,) = host.call("TestModel")
    (patched,) = host.call("TestLoRA", model=model, seed=2, strength=1.0)
    state = host.testpack.models.lora_state(2)
    assert len(patched.patches) == sum(key.endswith(".alpha") for key in state) > 10
    graph, want = text_to_image()
    plain = host.run(graph, want).outputs["latent"]["samples"]
    lora = graph.add("TestLoRA", model=["1", 0], seed=2, strength=1.0)
    graph.prompt["5"]["inputs"]["model"] = lora[0]
    with_lora = host.run(graph, want).outputs["latent"]["samples"]
    assert (with_lora - plain).abs().max() > 0.05

    graph, want = text_to_image()
    hint = graph.add("TestImage", kind="photograph", width=64, height=64, batch=1, seed=0)
    control = graph.add(
        "ControlNetApplyAdvanced",
        positive=["2", 0], negative=["3", 0], control_net=graph.add("TestControlNet", seed=0)[0], image=hint[0],
        strength=1.0, start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    graph.prompt["5"]["inputs"].update(positive=control[0], negative=control[1])
    with_control = host.run(graph, want).outputs["latent"]["samples"]
    assert torch.isfinite(with_control).all()
    assert (with_control - plain).abs().max() > 0.05


def test_a_reduced_checkpoint_loads_as_sdxl(host: Host) -> None:
    path = host.base / "models" / "checkpoints" / "reduced.ckpt"
    reduced.write_reduced_sdxl_checkpoint(path, text_encoders=False)
    assert path.stat().st_size < 32e6
    model, clip, _ = host.call("CheckpointLoaderSimple", ckpt_name=path.name)
    assert type(model.model).__name__ == "SDXL"
    assert clip is None
    config = model.model.model_config.unet_config
    assert (config["model_channels"], config["context_dim"], config["adm_in_channels"]) == (320, 2048, 2816)
    weights = torch.load(path, weights_only=True)["state_dict"]
    key = "input_blocks.4.1.proj_in.weight"
    loaded = model.model.diffusion_model.state_dict()[key]
    assert torch.equal(weights[f"model.diffusion_model.{key}"].float(), loaded.float())
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_reduced_adapter_has_the_published_shape(tmp_path: Path) -> None:
    path = tmp_path / "adapter.bin"
    reduced.write_reduced_adapter(path)
    read = read_faithdiff(path)
    assert read.kind == "adapter"
    assert read.lq_encoder is not None
    assert read.lq_encoder.config.block_out_channels == (128, 256, 512, 512)
    assert read.alignment is not None
    assert (read.alignment.config.feature_channels, read.alignment.config.unet_channels) == (512, 320)
