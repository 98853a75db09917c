"""The tools of the server and page tests, tried with the host's own nodes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_host import Graph, GraphError, Page, PromptRejectedError, Server
from PIL import Image

CONDITIONING = {"seed": 0, "width": 64, "pooled_width": 64, "tokens": 77}


def sampling(size: int = 64, steps: int = 2, seed: int = 0) -> Graph:
    """A stock graph around the tiny model."""
    graph = Graph()
    sampled = graph.add(
        "KSampler",
        model=graph.add("TestModel", weights="golden", seed=0)[0],
        positive=graph.add("TestConditioning", which="positive", **CONDITIONING)[0],
        negative=graph.add("TestConditioning", which="negative", **CONDITIONING)[0],
        latent_image=graph.add("EmptyLatentImage", width=size, height=size, batch_size=1)[0],
        seed=seed, steps=steps, cfg=4.0, sampler_name="euler", scheduler="normal", denoise=1.0,
    )  # fmt: skip
    decoded = graph.add("VAEDecode", samples=sampled[0], vae=graph.add("TestVAE")[0])
    graph.add("SaveImage", images=decoded[0], filename_prefix="tiny")
    return graph


def test_a_prompt_runs_to_an_image(server: Server) -> None:
    result = server.run(sampling())
    (image,) = result.images
    assert Image.open(io.BytesIO(server.view(image))).size == (64, 64)
    assert {"execution_start", "executing", "executed", "execution_success"} <= {kind for kind, _ in result.messages}
    assert server.history(result.prompt_id)["status"]["status_str"] == "success"
    assert server.resident_bytes() > 100e6


def test_nodes_of_both_packs_are_listed(server: Server) -> None:
    assert server.object_info("TestModel")["category"] == "tests"
    assert server.object_info("FaithDiffModelLoader")["category"] == "FaithDiff"


def test_upload_comes_back_pixel_for_pixel(server: Server, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "up.png")
    graph = Graph()
    loaded = graph.add("LoadImage", image=server.upload(tmp_path / "up.png"))
    graph.add("SaveImage", images=loaded[0], filename_prefix="back")
    (image,) = server.run(graph).images
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(server.view(image)))), pixels)


def test_bad_values_are_rejected_and_failures_are_told(server: Server) -> None:
    with pytest.raises(PromptRejectedError) as rejected:
        server.run(sampling(steps=0))
    assert rejected.value.status == 400
    assert any(entry["class_type"] == "KSampler" for entry in rejected.value.body["node_errors"].values())
    graph = sampling()
    wide = {**CONDITIONING, "width": 48}
    graph.prompt["2"]["inputs"].update({"which": "random", **wide})
    with pytest.raises(GraphError, match="execution_error"):
        server.run(graph)


def test_interrupting_and_running_again(server: Server) -> None:
    with server.submit(sampling(size=256, steps=200, seed=1)) as job:
        job.wait_for(lambda kind, data: kind == "progress" and data["value"] >= 2)
        server.interrupt()
        assert job.wait(60).status == "execution_interrupted"
    assert server.run(sampling(seed=2)).status == "execution_success"


def link(number: int, source: int, target: int, slot: int, kind: str) -> list[Any]:
    """A link of a workflow file."""
    return [number, source, 0, target, slot, kind]


def workflow(path: Path, save: str = "SaveImage") -> Path:
    """Write a workflow file as the page saves them: an empty image, saved."""
    ports = {"localized_name": "image", "name": "IMAGE", "type": "IMAGE"}
    nodes = [
        {
            "id": 1, "type": "EmptyImage", "pos": [50, 50], "size": [300, 150], "flags": {}, "order": 0, "mode": 0,
            "inputs": [], "outputs": [{**ports, "links": [1]}], "properties": {}, "widgets_values": [48, 32, 1, 255],
        },
        {
            "id": 2, "type": save, "pos": [450, 50], "size": [300, 250], "flags": {}, "order": 1, "mode": 0,
            "inputs": [{"name": "images", "type": "IMAGE", "link": 1}], "outputs": [], "properties": {},
            "widgets_values": ["dropped"],
        },
    ]  # fmt: skip
    links = [link(1, 1, 2, 0, "IMAGE")]
    sizes = {"last_node_id": 2, "last_link_id": 1, "version": 0.4}
    path.write_text(json.dumps({**sizes, "nodes": nodes, "links": links, "groups": [], "config": {}, "extra": {}}))
    return path


def test_a_dropped_workflow_runs_to_an_image(browser: Page, server: Server, tmp_path: Path) -> None:
    browser.drop(workflow(tmp_path / "stock.json"))
    assert sorted(browser.node_types()) == ["EmptyImage", "SaveImage"]
    assert browser.missing_types() == []
    assert browser.error_overlays() == []
    result = browser.queue()
    assert result.node_errors == {}
    assert result.execution_error is None
    (shown,) = result.outputs.values()
    assert Image.open(io.BytesIO(server.view(shown["images"][0]))).size == (48, 32)
    browser.screenshot(tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").size[0] >= 1200


def test_a_missing_node_is_seen(browser: Page, tmp_path: Path) -> None:
    browser.clear()
    browser.drop(workflow(tmp_path / "missing.json", save="NoSuchNode"))
    assert browser.missing_types() == ["NoSuchNode"]
    assert browser.error_overlays()
