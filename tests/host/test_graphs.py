"""Whole graphs in the host's executor: batches, caching, branches, the ends of an image, and errors."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from comfy_host import Graph, Host, Node, Runner
from support.host_sampling import GivenNoise, Setup, gaussian, images, load, relative
from support.server_prompts import SAMPLER
from torch import Tensor

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return load(host)


def image(graph: Graph, **kw: Any) -> Node:
    """An image. Defaults to a random one of 128 x 128."""
    return graph.add("TestImage", **({"kind": "random", "width": 128, "height": 128, "batch": 1, "seed": 0} | kw))


def restoration(graph: Graph, photo: Node, **sampler: Any) -> dict[str, Node]:
    """The nodes of a whole restoration."""
    base = graph.add("TestModel", weights="golden", seed=0)
    vae = graph.add("TestVAE")
    loader = graph.add(
        "FaithDiffModelLoader", faithdiff_name="faithdiff_tiny.safetensors", weight_dtype="default", model=base[0]
    )
    prepare = graph.add("FaithDiffPrepareImage", image=photo[0], scale_by=2.0, longest_side=0, multiple=8)
    encode = graph.add("VAEEncode", pixels=prepare[0], vae=vae[0])
    features = graph.add("FaithDiffLQEncode", faithdiff=loader[1], pixels=prepare[0], tile_size=1024, overlap=0.25)
    text = {"seed": 0, "width": 64, "pooled_width": 64, "tokens": 77}
    positive = graph.add("TestConditioning", which="positive", **text)
    negative = graph.add("TestConditioning", which="negative", **text)
    sample = graph.add(
        "FaithDiffSampler",
        model=loader[0],
        positive=positive[0],
        negative=negative[0],
        lq_features=features[0],
        latent_image=encode[0],
        **(SAMPLER | sampler),
    )
    decode = graph.add("FaithDiffTiledVAEDecode", samples=sample[0], vae=vae[0], tile_size=64, overlap=0.25)
    finish = graph.add("FaithDiffFinishImage", image=decode[0], frame=prepare[1], color_fix="adain")
    return {
        "loader": loader,
        "prepare": prepare,
        "features": features,
        "sample": sample,
        "decode": decode,
        "finish": finish,
    }


def test_a_whole_restoration(host: Host) -> None:
    """Any size: 61 x 43 becomes 122 x 86 exactly, with the colours' mean of the enlarged original."""
    graph = Graph()
    photo = image(graph, kind="photograph", width=61, height=43)
    nodes = restoration(graph, photo)
    result = host.run(graph, {"image": nodes["finish"][0], "mask": nodes["finish"][1], "prepared": nodes["prepare"][0]})
    restored = result.outputs["image"]
    assert tuple(restored.shape) == (1, 86, 122, 3)
    assert tuple(result.outputs["mask"].shape) == (1, 86, 122)
    assert tuple(result.outputs["prepared"].shape) == (1, 88, 128, 3)
    assert float(restored.min()) >= 0
    assert float(restored.max()) <= 1
    means = restored.mean(dim=(0, 1, 2)) - result.outputs["prepared"][:, :86, :122].mean(dim=(0, 1, 2))
    assert float(means.abs().max()) < 0.02  # clamping moves it a little


def test_a_changed_seed_does_not_encode_again(host: Host) -> None:
    runner = Runner()
    seen = []
    for seed in (1, 2):
        graph = Graph()
        nodes = restoration(graph, image(graph, width=64, height=64), seed=seed)
        result = host.run(graph, {"image": nodes["finish"][0]}, runner=runner)
        seen.append(result)
    assert not torch.equal(seen[0].outputs["image"], seen[1].outputs["image"])
    again = set(seen[1].executed)
    assert {nodes["features"].id, nodes["loader"].id, nodes["prepare"].id}.isdisjoint(again)
    assert nodes["sample"].id in again


def test_queueing_again_gives_the_same(host: Host) -> None:
    """The second run of a graph whose models are still there."""
    runner = Runner()
    results = []
    for seed in (5, 6, 5):
        graph = Graph()
        nodes = restoration(graph, image(graph, width=64, height=48), seed=seed)
        results.append(host.run(graph, {"latent": nodes["sample"][0]}, runner=runner).outputs["latent"]["samples"])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_two_branches_do_not_disturb_each_other(host: Host) -> None:
    """Two restorations of different images from one loader, against each on its own."""

    def branches(names: tuple[str, ...]) -> dict[str, Tensor]:
        graph = Graph()
        wanted = {}
        for name in names:
            seed = {"a": 1, "b": 2}[name]
            nodes = restoration(graph, image(graph, width=64, height=48, seed=seed), seed=seed)
            wanted[name] = nodes["sample"][0]
        return {name: out["samples"] for name, out in host.run(graph, wanted).outputs.items()}

    both = branches(("a", "b"))
    assert torch.equal(both["a"], branches(("a",))["a"])
    assert torch.equal(both["b"], branches(("b",))["b"])


@pytest.mark.parametrize("tile", [64, 1024])
def test_batches_equal_single_runs(setup: Setup, tile: int) -> None:
    """N images give N results, each equal to its own run with its row of the noise."""
    batch = images(96, 80, batch=3, seed=4)
    latents = gaussian(3, 4, 12, 10, seed=8)
    noise = gaussian(3, 4, 12, 10, seed=9)
    settings: dict[str, Any] = {"start_point": "lr", "tile_size": tile, "tile_batch": 2}
    together = setup.restore(
        setup.features(batch), latent_image={"samples": latents}, noise=GivenNoise(noise), **settings
    )
    for i in range(3):
        alone = setup.restore(
            setup.features(batch[i : i + 1]),
            latent_image={"samples": latents[i : i + 1]},
            noise=GivenNoise(noise[i : i + 1]),
            **settings,
        )
        assert relative(together[i : i + 1], alone) < TOLERANCE


def test_one_image_many_seeds(setup: Setup) -> None:
    """LQ features of one image serve a batch of latents; the host's batch_index picks a row's noise."""
    features = setup.features(images(64, 64))
    latents = torch.zeros(3, 4, 8, 8)
    together = setup.restore(features, latent_image={"samples": latents})
    alone = setup.restore(features, latent_image={"samples": latents[:1], "batch_index": [2]})
    assert relative(together[2:], alone) < TOLERANCE


def test_images_of_different_sizes_in_a_list(host: Host) -> None:
    graph = Graph()
    first = image(graph, width=64, height=48)
    second = image(graph, width=40, height=56)
    both = graph.add("TestList", first=first[0], second=second[0])
    nodes = restoration(graph, both)
    collected = graph.add("TestCollect", values=nodes["finish"][0])
    shapes = [tuple(one.shape) for one in host.run(graph, {"all": collected[0]}).outputs["all"]]
    assert shapes == [(1, 96, 128, 3), (1, 112, 80, 3)]


def test_denoise(setup: Setup) -> None:
    """denoise 0 gives the latent back; a half runs the last half of twice the steps from the noised latent."""
    features = setup.features(images(64, 64))
    latent = {"samples": gaussian(1, 4, 8, 8, seed=2)}
    assert torch.equal(setup.restore(features, denoise=0.0, latent_image=latent), latent["samples"])
    noise = gaussian(1, 4, 8, 8, seed=3)
    half = setup.restore(features, denoise=0.5, steps=3, latent_image=latent, noise=GivenNoise(noise))
    sigmas = setup.host.pack_module("nodes.bridge.restoration").restoration_sigmas(setup.model, "faithdiff", 6, 1.0)[3:]
    positive, negative = setup.conditioned(features)
    model = setup.tiled(setup.model, 1024)
    by_hand = setup.guided(setup.cfg_guider(model, positive, negative, 5.0), noise, latent, sigmas)
    assert relative(half, by_hand) < TOLERANCE


def test_alpha_travels_to_the_end(host: Host) -> None:
    """A mask, and the fourth channel of an image, come out enlarged to the exact size."""
    photo = images(30, 50)
    mask = torch.zeros(1, 30, 50)
    mask[:, :, 25:] = 1.0
    prepare = host.call("FaithDiffPrepareImage", image=photo, mask=mask, scale_by=2.0, longest_side=0, multiple=8)
    out, out_mask = host.call("FaithDiffFinishImage", image=prepare[0], frame=prepare[1], color_fix="none")
    assert tuple(out_mask.shape) == (1, 60, 100)
    assert torch.equal(out_mask[:, :, :44], torch.zeros(1, 60, 44))
    assert torch.equal(out_mask[:, :, 56:], torch.ones(1, 60, 44))
    assert torch.equal(out, prepare[1].image)
    rgba = torch.cat([photo, 1.0 - mask.unsqueeze(-1)], dim=-1)
    from_channel = host.call("FaithDiffPrepareImage", image=rgba, scale_by=2.0, longest_side=0, multiple=8)
    assert from_channel[0].shape[-1] == 3
    assert torch.allclose(from_channel[1].mask, out_mask, atol=1e-6)


def test_longest_side_and_multiple(host: Host) -> None:
    photo = images(30, 50)
    prepared, frame = host.call("FaithDiffPrepareImage", image=photo, scale_by=2.0, longest_side=130, multiple=64)
    assert frame.size == (78, 130)
    assert tuple(prepared.shape) == (1, 128, 192, 3)
    assert torch.equal(prepared[:, :78, :130], frame.image)
    assert torch.equal(prepared[:, 100, 150], prepared[:, 77, 129])  # the border is repeated


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tile_size": 60}, "at least 64, got 60"),
        ({"tile_size": 101}, "nearest size that works is 104"),
        ({"overlap": 0.95}, "bigger than max of 0.9: overlap"),
        ({"overlap": -0.1}, "smaller than min of 0.0: overlap"),
        ({"tile_size": 20000}, "at most 16384"),
        ({"steps": 0}, "smaller than min"),
        ({"sampler_name": "nonsense"}, "not in list"),
    ],
)
def test_bad_values_are_refused_before_running(host: Host, inputs: dict[str, Any], message: str) -> None:
    graph = Graph()
    nodes = restoration(graph, image(graph), **inputs)
    result = host.run(graph, {"latent": nodes["sample"][0]}, check=False)
    assert result.status == "invalid"
    assert message in result.message


def expect(host: Host, text: str, class_type: str, **inputs: Any) -> None:
    """The node raises one of our errors, which begins with the node's name and holds the text."""
    base = host.pack_module("faithdiff_core.errors").FaithDiffError
    with pytest.raises(base, match=r"^FaithDiff ") as caught:
        host.call(class_type, **inputs)
    assert text in str(caught.value)


def test_errors_say_what_to_do(host: Host, setup: Setup) -> None:
    features = setup.features(images(64, 96))
    sampler: dict[str, Any] = SAMPLER | {
        "model": setup.model,
        "positive": setup.positive,
        "negative": setup.negative,
        "lq_features": features,
        "seed": 0,
    }
    latent = {"samples": torch.zeros(1, 4, 8, 12)}
    plain = host.call("TestModel")[0]
    name = "FaithDiffSampler"
    expect(host, "Connect the MODEL that FaithDiff Model Loader gives", name, **(sampler | {"model": plain}))
    expect(host, "Connect the prepared image through VAE Encode", name, **sampler)
    small = {"latent_image": {"samples": torch.zeros(1, 4, 8, 8)}}
    expect(host, "must be 96 x 64 pixels", name, **(sampler | small))
    sd3 = {"samples": torch.rand(1, 16, 8, 12)}
    expect(
        host, "expected latents of 4 channels, as the MODEL has them, got 16", name, **(sampler | {"latent_image": sd3})
    )
    two_features = setup.features(images(64, 96, batch=2))
    three = {"lq_features": two_features, "latent_image": {"samples": torch.zeros(3, 4, 8, 12)}}
    expect(host, "holds 3 images, the LQ features 2", name, **(sampler | three))
    expect(host, "nearest size that works is 104", name, **(sampler | {"tile_size": 101, "latent_image": latent}))
    expect(host, "steps / denoise", name, **(sampler | {"steps": 600, "denoise": 0.5, "latent_image": latent}))
    broken = {"samples": torch.full((1, 4, 8, 12), float("nan"))}
    expect(host, "latent_image has values that are NaN", name, **(sampler | {"latent_image": broken}))
    broken = {"samples": torch.full((1, 4, 8, 12), 1e38)}  # overflows in the U-Net
    expect(host, "weight_dtype bf16 or fp32", name, **(sampler | {"latent_image": broken}))
    odd = images(60, 64)
    expect(
        host,
        "FaithDiff Prepare Image",
        "FaithDiffLQEncode",
        faithdiff=setup.faithdiff,
        pixels=odd,
        tile_size=64,
        overlap=0.0,
    )
    expect(
        host,
        "start_percent must not be larger",
        "FaithDiffConditioning",
        positive=setup.positive,
        negative=setup.negative,
        lq_features=features,
        strength=1.0,
        start_percent=0.7,
        end_percent=0.3,
    )
    expect(host, "between 0 and 0.9", "FaithDiffTiledDiffusion", model=plain, tile_size=64, overlap=2.0, tile_batch=0)
    frame = host.call("FaithDiffPrepareImage", image=images(40, 40), scale_by=2.0, longest_side=0, multiple=8)[1]
    expect(
        host, "smaller than the 80 x 80", "FaithDiffFinishImage", image=images(64, 64), frame=frame, color_fix="adain"
    )
    video = {"samples": torch.zeros(1, 4, 2, 8, 8)}
    vae = host.call("TestVAE")[0]
    decode = {"vae": vae, "tile_size": 64, "overlap": 0.0}
    expect(host, "expected image latents", "FaithDiffTiledVAEDecode", samples=video, **decode)
    expect(
        host, "shape (batch, 4, height, width), got (1, 16, 8, 12)", "FaithDiffTiledVAEDecode", samples=sd3, **decode
    )
    with torch.inference_mode():
        vae.first_stage_model.decoder.conv_out.bias.fill_(float("inf"))
    expect(
        host,
        "produced NaN or infinity in float32. Use the fp16-fix VAE",
        "FaithDiffTiledVAEDecode",
        samples=latent,
        **decode,
    )


def test_errors_inside_sampling(host: Host, setup: Setup) -> None:
    """What only the sampler can notice still names FaithDiff, both sizes, and the remedy."""
    errors = host.pack_module("faithdiff_core.errors")
    conds = setup.conditioned(setup.features(images(64, 96)))
    sigmas = torch.tensor([2.0, 0.0])

    def run(model: Any, height: int, width: int, batch: int = 1, channels: int = 4) -> None:
        noise = torch.ones(batch, channels, height, width)
        setup.guided(setup.cfg_guider(model, *conds, 5.0), noise, {"samples": noise}, sigmas)

    with pytest.raises(errors.SettingsError, match=r"FaithDiff: .* 96 x 64 pixels, but the latent is one of 64 x 64"):
        run(setup.model, 8, 8)
    with pytest.raises(errors.SettingsError, match="latents of 4 channels, as the MODEL has them, got 16"):
        run(setup.model, 8, 12, channels=16)
    conds = setup.conditioned(setup.features(images(64, 64, batch=2)))
    with pytest.raises(errors.SettingsError, match="LQ features of 2 images, but 3 latents"):
        run(setup.model, 8, 8, batch=3)
    unpatched = setup.tiled(host.call("TestModel")[0], 64)
    with pytest.raises(errors.SettingsError, match="no alignment"):
        run(unpatched, 8, 8)


def test_not_an_sdxl_model(host: Host) -> None:
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(
        {**host.testpack.models.GOLDEN_UNET, "adm_in_channels": None, "num_classes": None}
    )
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_patcher.CoreModelPatcher(
        config.get_model({}, ""), load_device=torch.device("cpu"), offload_device=torch.device("cpu")
    )
    expect(
        host,
        "FaithDiff works with SDXL",
        "FaithDiffModelLoader",
        faithdiff_name="faithdiff_tiny.safetensors",
        weight_dtype="default",
        model=model,
        unet_strength=1.0,
    )


def test_cancel_inside_a_tile(host: Host) -> None:
    """A cancelled run ends at once, leaves nothing behind, and the next one runs."""
    runner = Runner()

    def graph(steps: int) -> tuple[Graph, Node]:
        out = Graph()
        nodes = restoration(out, image(out, width=128, height=128), steps=steps, seed=steps)
        return out, nodes["sample"]

    timer = threading.Timer(2.0, host.interrupt)
    long, sample = graph(900)
    began = time.monotonic()
    timer.start()
    result = host.run(long, {"latent": sample[0]}, runner=runner, check=False)
    assert result.status == "interrupted"
    assert time.monotonic() - began < 30
    short, sample = graph(2)
    after = host.run(short, {"latent": sample[0]}, runner=runner).outputs["latent"]["samples"]
    fresh = host.run(short, {"latent": sample[0]}).outputs["latent"]["samples"]
    assert torch.equal(after, fresh)


def test_trim_caption(host: Host) -> None:
    caption = "The image features a red boat on a lake. It is calm. The sky is blue."
    trimmed = host.call("FaithDiffTrimCaption", caption=caption, sentences=2, skip_words=3)[0]
    assert trimmed == "A red boat on a lake. It is calm."
    assert host.call("FaithDiffTrimCaption", caption="", sentences=2, skip_words=3)[0] == ""


def test_every_input_has_a_tooltip(host: Host) -> None:
    for name in sorted(n for n in host.node_ids if n.startswith("FaithDiff")):
        schema = host.node_class(name).define_schema()
        assert schema.category.split("/")[0] == "FaithDiff"
        assert schema.description, name
        assert schema.search_aliases, name
        for entry in schema.inputs:
            if entry.get_io_type() == "IMAGECOMPARE":
                continue  # not a setting but the place where the page draws
            assert entry.tooltip, f"{name}.{entry.id}"
