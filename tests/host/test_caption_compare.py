"""FaithDiff Caption, FaithDiff Compare and the progress of tiles, in a real ComfyUI."""

from __future__ import annotations

import gc
import importlib
import struct
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_host import Graph, Host, Page, Runner
from PIL import Image
from support.host_sampling import images, load
from tiny_models import captioners as tiny_captioners
from torch import Tensor

from faithdiff_core.backbone import SDXL
from faithdiff_core.captions.captioner import load_captioner
from faithdiff_core.captions.trim import trim_caption

PROMPT = "Describe this image"
TOKENS = 16
CAPTION = {
    "model": "tiny_llava", "prompt": PROMPT, "max_new_tokens": TOKENS, "dtype": "default", "temperature": 0.0,
    "seed": 0, "trim": False, "sentences": 2, "skip_words": 3, "allow_download": False,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def models(host: Host) -> Path:
    folder = host.base / "models" / "LLM"
    tiny_captioners.make_llava(folder / "tiny_llava")
    tiny_captioners.make_blip(folder / "tiny_blip")
    return folder


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, Any]]]:
    """(value, total, preview) of every movement of a progress bar; none is held back for being too soon."""
    utils = importlib.import_module("comfy.utils")
    monkeypatch.setattr(utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    monkeypatch.setattr(utils, "PROGRESS_THROTTLE_MIN_PERCENT", 0.0, raising=False)
    moves: list[tuple[int, int, Any]] = []
    utils.set_progress_bar_global_hook(lambda value, total, preview, **_: moves.append((value, total, preview)))
    yield moves
    utils.set_progress_bar_global_hook(None)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(node, text) of the lines that nodes show, read from the messages that the host's server would send."""
    server = importlib.import_module("server")
    sent: list[tuple[str, str]] = []

    class Listener(server.PromptServer):  # type: ignore[name-defined]
        def __init__(self) -> None:
            pass

        def send_sync(self, event: Any, data: bytes, sid: str | None = None) -> None:
            (length,) = struct.unpack(">I", data[:4])
            sent.append((data[4 : 4 + length].decode(), data[4 + length :].decode()))

    monkeypatch.setattr(server.PromptServer, "instance", Listener(), raising=False)
    return sent


def expected_caption(folder: Path, image: Tensor, **kw: Any) -> str:
    settings: dict[str, Any] = {"prompt": PROMPT, "max_new_tokens": TOKENS} | kw
    return load_captioner(folder).caption(image.movedim(-1, 0), **settings)


# --------------------------------------------------------------------------------------------------------- captions


def test_one_caption_for_each_image(host: Host, models: Path) -> None:
    batch = images(48, 64, batch=3)
    (captions,) = host.call("FaithDiffCaption", image=batch, **CAPTION)
    assert captions == [expected_caption(models / "tiny_llava", image) for image in batch]
    assert len(set(captions)) > 1
    (alone,) = host.call("FaithDiffCaption", image=batch[1:2], **CAPTION)
    assert alone == captions[1:2]
    (drawn,) = host.call("FaithDiffCaption", image=batch, **(CAPTION | {"temperature": 1.0, "seed": 7}))
    assert drawn[2] == expected_caption(models / "tiny_llava", batch[2], temperature=1.0, seed=7)


def test_alpha_is_left_out(host: Host) -> None:
    image = images(48, 64)
    (plain,) = host.call("FaithDiffCaption", image=image, **CAPTION)
    (with_alpha,) = host.call("FaithDiffCaption", image=torch.cat([image, image[..., :1]], dim=-1), **CAPTION)
    assert with_alpha == plain


def test_trimming(host: Host) -> None:
    image = images(48, 64, batch=2)
    (raw,) = host.call("FaithDiffCaption", image=image, **CAPTION)
    for settings in ({}, {"sentences": 0}, {"skip_words": 1}):
        values: dict[str, Any] = CAPTION | {"trim": True} | settings
        (trimmed,) = host.call("FaithDiffCaption", image=image, **values)
        assert trimmed == [trim_caption(text, values["sentences"], values["skip_words"]) for text in raw]
        assert trimmed != raw


def test_names_of_models(host: Host, models: Path, tmp_path: Path) -> None:
    resolve = host.pack_module("nodes.bridge.captioner_patcher").resolve_model
    assert resolve("tiny_llava") == str(models / "tiny_llava")
    assert resolve("somebody/tiny_llava") == str(models / "tiny_llava")
    tiny_captioners.make_blip(models / "somebody" / "tiny_llava")
    assert resolve(" somebody/tiny_llava ") == str(models / "somebody" / "tiny_llava")
    assert resolve("somebody/elsewhere") == "somebody/elsewhere"
    folder = tiny_captioners.make_blip(tmp_path / "own")
    assert resolve(str(folder)) == str(folder)
    image = images(48, 64)
    (captions,) = host.call("FaithDiffCaption", image=image, **(CAPTION | {"model": str(folder), "prompt": ""}))
    assert captions == [expected_caption(folder, image[0], prompt="")]


def test_a_missing_transformers_names_the_extra(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = host.pack_module("faithdiff_core.errors").FaithDiffError
    with pytest.raises(error, match=r"FaithDiff Caption: .*needs transformers.*\.\[engine\]"):
        host.call("FaithDiffCaption", image=images(48, 64), **(CAPTION | {"model": "tiny_blip", "dtype": "bf16"}))


def test_errors_name_the_node(host: Host) -> None:
    image = host.call("TestImage", kind="random", width=64, height=64)[0]
    error = host.pack_module("faithdiff_core.errors").FaithDiffError
    with pytest.raises(error, match="FaithDiff Caption: `nobody/nothing` is not on this machine"):
        host.call("FaithDiffCaption", image=image, **(CAPTION | {"model": "nobody/nothing"}))
    with pytest.raises(error, match="FaithDiff Caption: `model` is empty"):
        host.call("FaithDiffCaption", image=image, **(CAPTION | {"model": " "}))


def test_one_model_is_kept_until_the_host_unloads_it(host: Host) -> None:
    bridge = host.pack_module("nodes.bridge.captioner_patcher")
    management = importlib.import_module("comfy.model_management")
    image = images(48, 64)
    host.call("FaithDiffCaption", image=image, **CAPTION)
    first = weakref.ref(bridge.captioner_for("tiny_llava", "default", False))
    host.call("FaithDiffCaption", image=image, **(CAPTION | {"prompt": ""}))
    assert bridge.captioner_for("tiny_llava", "default", False) is first(), "the same model was loaded twice"
    assert first() in [loaded.model for loaded in management.current_loaded_models]
    host.call("FaithDiffCaption", image=image, **(CAPTION | {"dtype": "bf16"}))
    gc.collect()
    assert first() is None
    second = bridge.captioner_for("tiny_llava", "bf16", False)
    weights = [weakref.ref(weight) for weight in second.model.parameters()]
    assert {weight.dtype for weight in second.model.parameters()} == {torch.bfloat16}
    before = host.call("FaithDiffCaption", image=image, **(CAPTION | {"dtype": "bf16"}))
    management.unload_all_models()
    gc.collect()
    assert all(weight() is None for weight in weights), "the model is still in memory"
    assert second not in [loaded.model for loaded in management.current_loaded_models]
    assert host.call("FaithDiffCaption", image=image, **(CAPTION | {"dtype": "bf16"})) == before


def test_loaded_whole_or_not_at_all(host: Host) -> None:
    """The host may not move a part of a captioner, whatever little memory it finds."""
    bridge = host.pack_module("nodes.bridge.captioner_patcher")
    patcher = bridge.captioner_for("tiny_llava", "fp32", False)
    patcher.partially_load(patcher.load_device, 0.1)
    assert patcher.loaded_size() == patcher.model_size() > 0
    assert patcher.partially_unload(patcher.offload_device, 1) == 0
    assert patcher.loaded_size() == patcher.model_size()


def test_too_large_for_the_card(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, models: Path
) -> None:
    bridge = host.pack_module("nodes.bridge.captioner_patcher")
    management = importlib.import_module("comfy.model_management")
    monkeypatch.setattr(management, "text_encoder_device", lambda: torch.device("cuda:0"))
    memory = 4 << 30
    monkeypatch.setattr(management, "get_total_memory", lambda device: memory)
    assert bridge._load(str(models / "tiny_llava"), "fp32", False).load_device == torch.device("cuda:0")
    memory = 1 << 30
    assert bridge._load(str(models / "tiny_llava"), "fp32", False).load_device == torch.device("cpu")
    assert "more than cuda:0 has" in caplog.text


def test_progress_and_cancel(host: Host, bars: list[tuple[int, int, Any]]) -> None:
    management = importlib.import_module("comfy.model_management")
    utils = importlib.import_module("comfy.utils")
    host.call("FaithDiffCaption", image=images(48, 64, batch=2), **CAPTION)
    values = [value for value, _, _ in bars]
    assert values == sorted(values)
    assert values[-1] == 2 * TOKENS
    assert TOKENS in values
    assert len(values) > TOKENS
    assert {total for _, total, _ in bars} == {2 * TOKENS}

    count = 0

    def cancel(*_: Any, **__: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            management.interrupt_current_processing()

    utils.set_progress_bar_global_hook(cancel)
    with pytest.raises(management.InterruptProcessingException):
        host.call("FaithDiffCaption", image=images(48, 64, batch=2), **CAPTION)
    assert count == 3
    assert not management.processing_interrupted()


def test_in_a_graph(host: Host, texts: list[tuple[str, str]], models: Path) -> None:
    graph = Graph()
    image = graph.add("TestImage", kind="photograph", width=64, height=64, batch=1, seed=0)
    caption = graph.add("FaithDiffCaption", image=image[0], **(CAPTION | {"trim": True}))
    runner = Runner()
    result = host.run(graph, {"caption": caption[0], "image": image[0]}, runner=runner)
    raw = expected_caption(models / "tiny_llava", result.outputs["image"][0])
    assert result.outputs["caption"] == trim_caption(raw)
    assert texts == [(caption.id, raw)]
    assert caption.id in host.run(graph, {"caption": caption[0], "image": image[0]}, runner=runner).cached


# ---------------------------------------------------------------------------------------------------------- compare


def read(host: Host, entry: dict[str, str]) -> np.ndarray:
    return np.asarray(Image.open(host.base / "temp" / entry["subfolder"] / entry["filename"]))


def as_bytes(image: Tensor) -> np.ndarray:
    return (image.numpy() * 255.0).clip(0, 255).astype(np.uint8)


def compare(
    host: Host, mode: str, before: dict[str, Any], after: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the node shows, and the images before, after and side by side."""
    graph = Graph()
    images = {
        name: graph.add("TestImage", **({"kind": "random", "batch": 1} | kw))
        for name, kw in (("before", before), ("after", after))
    }
    node = graph.add("FaithDiffCompare", before=images["before"][0], after=images["after"][0], mode=mode)
    result = host.run(graph, {"before": images["before"][0], "after": images["after"][0], "pair": node[0]})
    return result.ui[node.id], result.outputs


def test_slider(host: Host) -> None:
    size = {"width": 64, "height": 48, "batch": 2}
    shown, out = compare(host, "slider", {**size, "seed": 1}, {**size, "seed": 2})
    assert shown["images"] == [*shown["a_images"], *shown["b_images"]]
    for key, name in (("a_images", "before"), ("b_images", "after")):
        assert [entry["type"] for entry in shown[key]] == ["temp"] * 2
        for entry, image in zip(shown[key], out[name], strict=True):
            np.testing.assert_array_equal(read(host, entry), as_bytes(image))
    assert torch.equal(out["pair"], torch.cat([out["before"], out["after"]], dim=2))


def test_side_by_side_enlarges_before(host: Host) -> None:
    shown, out = compare(
        host, "side_by_side", {"width": 32, "height": 24, "seed": 1}, {"width": 64, "height": 48, "seed": 2}
    )
    (entry,) = shown["images"]
    assert "a_images" not in shown
    pair = out["pair"]
    assert pair.shape == (1, 48, 128, 3)
    assert torch.equal(pair[:, :, 64:], out["after"])
    for channel in range(3):
        plane = Image.fromarray(out["before"][0, ..., channel].numpy()).resize((64, 48), Image.Resampling.LANCZOS)
        np.testing.assert_allclose(pair[0, :, :64, channel], np.asarray(plane).clip(0, 1), atol=1e-6)
    np.testing.assert_array_equal(read(host, entry), as_bytes(pair[0]))


def test_one_image_before_for_all_after(host: Host) -> None:
    before = images(32, 32)
    after = images(32, 32, batch=3, seed=1)
    (pairs,) = host.call(
        "FaithDiffCompare", before=torch.cat([before, before[..., :1]], -1), after=after, mode="slider"
    )
    assert torch.equal(pairs, torch.cat([before.expand(3, -1, -1, -1), after], dim=2))
    error = host.pack_module("faithdiff_core.errors").ImageError
    with pytest.raises(error, match="FaithDiff Compare: there are 3 images before and 1 after"):
        host.call("FaithDiffCompare", before=after, after=before, mode="slider")


NODE = "window.app.graph.nodes.find(n => n.type === 'FaithDiffCompare')"
SLIDER = f"return {NODE}.widgets.find(w => w.type === 'imagecompare').value"
SHOWN = f"""
const node = document.querySelector(`[data-node-id="${{{NODE}.id}}"]`);
return [...(node?.querySelectorAll("img") ?? [])].filter(i => i.naturalWidth).map(i => i.src);
"""


@pytest.fixture
def compare_page(browser: Page) -> Iterator[Page]:
    """The page with two images and FaithDiff Compare, drawn as Nodes 2.0."""
    browser.script("window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    browser.clear()
    browser.script(
        """
        const add = (type) => { const node = LiteGraph.createNode(type); window.app.graph.add(node); return node; };
        const first = add("TestImage"), second = add("TestImage"), compare = add("FaithDiffCompare");
        first.connect(0, compare, 0);
        second.connect(0, compare, 1);
        first.pos = [50, 500];
        second.pos = [450, 500];
        """
    )
    yield browser
    browser.script("window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def shown_in_page(page: Page, count: int) -> list[str]:
    """Addresses of the images in the node, once there are that many."""
    end = time.monotonic() + 20
    while len(shown := page.script(SHOWN)) != count and time.monotonic() < end:
        time.sleep(0.1)
    return list(shown)


def test_modes_in_the_page(compare_page: Page) -> None:
    done = compare_page.queue()
    assert not done.node_errors
    assert done.execution_error is None
    (output,) = done.outputs.values()
    (before,), (after,) = output["a_images"], output["b_images"]
    value = compare_page.script(SLIDER)
    assert [before["filename"] in url for url in value["beforeImages"]] == [True]
    assert [after["filename"] in url for url in value["afterImages"]] == [True]
    sources = shown_in_page(compare_page, 2)
    assert len(sources) == 2
    assert all(any(entry["filename"] in source for source in sources) for entry in (before, after))

    compare_page.script(f"{NODE}.widgets.find(w => w.name === 'mode').value = 'side_by_side'")
    (output,) = compare_page.queue().outputs.values()
    (pair,) = output["images"]
    (source,) = shown_in_page(compare_page, 1)
    assert pair["filename"] in source


# --------------------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize(("tile_batch", "expected"), [(1, [*range(1, 13)]), (3, [3, 4, 7, 8, 11, 12])])
def test_bar_counts_steps_times_tiles(
    host: Host, bars: list[tuple[int, int, Any]], tile_batch: int, expected: list[int]
) -> None:
    setup = load(host)
    features = setup.features(images(96, 96))
    bars.clear()
    setup.restore(features, steps=3, tile_size=64, tile_batch=tile_batch)
    assert [value for value, _, _ in bars] == expected
    assert {total for _, total, _ in bars} == {12}


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "uni_pc", "dpm_fast", "dpm_adaptive", "lcm"])
def test_bar_never_goes_back(host: Host, bars: list[tuple[int, int, Any]], sampler: str) -> None:
    setup = load(host)
    features = setup.features(images(64, 96))
    bars.clear()
    setup.restore(features, steps=4, tile_size=64, tile_batch=1, sampler_name=sampler)
    values = [value for value, _, _ in bars]
    assert values == sorted(values)
    assert values[-1] <= 8
    assert {total for _, total, _ in bars} == {8}
    if sampler not in ("dpm_fast", "dpm_adaptive"):  # these choose their own number of steps
        assert values[-1] == 8


def test_previews_come_at_the_end_of_steps(
    host: Host, bars: list[tuple[int, int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = importlib.import_module("comfy.cli_args")
    monkeypatch.setattr(args.args, "preview_method", args.LatentPreviewMethod.Latent2RGB)
    setup = load(host)
    features = setup.features(images(96, 96))
    bars.clear()
    samples = setup.restore(features, steps=3, tile_size=64, tile_batch=1)
    assert [value for value, _, preview in bars if preview is not None] == [4, 8, 12]
    previewer = importlib.import_module("latent_preview").get_previewer(
        setup.model.load_device, setup.model.model.latent_format
    )
    # The last Euler step ends at the prediction itself.
    _, last, _ = previewer.decode_latent_to_preview_image("JPEG", samples * SDXL.vae_scaling_factor)
    np.testing.assert_allclose(np.asarray(bars[-1][2][1], dtype=int), np.asarray(last, dtype=int), atol=1)


def sampling_graph(stock: bool, size: int = 96) -> tuple[Graph, str]:
    """A restoration with a 64-pixel tile, and the id of its sampler."""
    graph = Graph()
    loader = graph.add(
        "FaithDiffModelLoader", faithdiff_name="faithdiff_tiny.safetensors", weight_dtype="default",
        model=graph.add("TestModel", weights="golden", seed=0)[0], unet_strength=1.0,
    )  # fmt: skip
    positive, negative = (
        graph.add("TestConditioning", which=which, seed=0, width=64, pooled_width=64, tokens=77)[0]
        for which in ("positive", "negative")
    )
    image = graph.add("TestImage", kind="random", width=size, height=size, batch=1, seed=0)
    features = graph.add("FaithDiffLQEncode", faithdiff=loader[1], pixels=image[0], tile_size=1024, overlap=0.25)
    tiles = {"tile_size": 64, "overlap": 0.5, "tile_batch": 3}
    if stock:
        texts = graph.add(
            "FaithDiffConditioning", positive=positive, negative=negative, lq_features=features[0], strength=1.0,
            start_percent=0.0, end_percent=1.0,
        )  # fmt: skip
        latent = graph.add("EmptyLatentImage", width=size, height=size, batch_size=1)
        sampler = graph.add(
            "KSampler", model=graph.add("FaithDiffTiledDiffusion", model=loader[0], **tiles)[0], positive=texts[0],
            negative=texts[1], latent_image=latent[0], seed=1, steps=2, cfg=4.0, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        )  # fmt: skip
    else:
        sampler = graph.add(
            "FaithDiffSampler", model=loader[0], positive=positive, negative=negative, lq_features=features[0], seed=1,
            steps=2, cfg=4.0, sampler_name="euler", scheduler="faithdiff", start_point="noise", denoise=1.0, **tiles,
        )  # fmt: skip
    return graph, sampler.id


def test_node_says_which_tile(host: Host, texts: list[tuple[str, str]]) -> None:
    graph, sampler = sampling_graph(stock=False)
    host.run(graph, {"latent": [sampler, 0]})
    assert texts == [
        (sampler, "Step 1 of 2, tiles 1 to 3 of 4"),
        (sampler, "Step 1 of 2, tile 4 of 4"),
        (sampler, "Step 2 of 2, tiles 1 to 3 of 4"),
        (sampler, "Step 2 of 2, tile 4 of 4"),
    ]


def test_stock_sampler_says_which_tile(host: Host, texts: list[tuple[str, str]]) -> None:
    graph, sampler = sampling_graph(stock=True)
    result = host.run(graph, {"latent": [sampler, 0]})
    assert texts == [(sampler, "Tiles 1 to 3 of 4"), (sampler, "Tile 4 of 4")] * 2
    assert result.progress[-1] == (2, 2)


def test_one_tile_says_nothing(host: Host, texts: list[tuple[str, str]]) -> None:
    graph, sampler = sampling_graph(stock=False, size=64)
    assert host.run(graph, {"latent": [sampler, 0]}).progress[-1] == (2, 2)
    assert not texts
