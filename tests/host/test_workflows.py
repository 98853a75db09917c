"""The example workflows: as built, in API mode, and dropped into the real page."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import REPO, Host, Page, Server
from PIL import Image
from reduced import write_published_faithdiff, write_reduced_sdxl_checkpoint

WORKFLOWS = REPO / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
sys.path.append(str(REPO / "scripts"))


def test_files_are_what_the_graphs_give(host: Host) -> None:
    """The nodes and the files cannot drift apart; run scripts/build_workflows.py after a change."""
    import build_workflows

    texts = build_workflows.texts({name: host.node_class(name) for name in host.node_ids})
    assert {path: path.read_text(encoding="utf-8") for path in texts if path.exists()} == texts
    folders = ("workflows", "workflows/api", "subgraphs")
    assert {path for folder in folders for path in (REPO / folder).glob("*.json")} == set(texts)


@pytest.fixture(scope="module")
def server(host: Host, host_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose folders have the names that the workflows use.

    FaithDiff.bin is in its published shape, and the checkpoint has full text encoders and VAE; all weights are random.
    The other models are only there to be listed. The U-Net is kept in bf16: 5 GB.
    """
    server = Server(host_path, tmp_path_factory.mktemp("full"), ("--bf16-unet",))
    models, inputs = server.base / "models", server.base / "input"
    write_published_faithdiff(models / "faithdiff" / "FaithDiff.bin")
    write_reduced_sdxl_checkpoint(models / "checkpoints" / "RealVisXL_V4.0.safetensors", safetensors=True)
    for name in (
        "checkpoints/your_sdxl_checkpoint.safetensors",
        "loras/your_sdxl_lora.safetensors",
        "loras/sdxl_lightning_8step_lora.safetensors",
        "controlnet/controlnet-canny-sdxl-1.0.safetensors",
        "text_encoders/qwen_3_4b.safetensors",
    ):
        (models / name).parent.mkdir(exist_ok=True)
        (models / name).touch()
    (inputs / "restore").mkdir()
    Image.new("RGB", (32, 24), (200, 120, 40)).save(inputs / "example.png")
    yield server
    server.stop()


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_opens_in_the_page(browser: Page, name: str) -> None:
    """No node is missing and no error is shown."""
    browser.drop(WORKFLOWS / f"{name}.json")
    assert browser.missing_types() == []
    assert browser.error_overlays() == []
    twin = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    queued = browser.prompt()
    assert without_titles(queued) == without_titles(twin)


def without_titles(prompt: dict[str, Any]) -> dict[str, Any]:
    """What the server runs of a prompt."""
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in prompt.items()}


def test_the_blueprint_opens_and_unfolds(browser: Page) -> None:
    """FaithDiff Restore is one node on the canvas and the whole graph in the queue."""
    browser.clear()
    browser.load(REPO / "subgraphs" / "FaithDiff Restore.json")
    assert len(browser.node_types()) == 1
    assert browser.error_overlays() == []
    kinds = sorted(node["class_type"] for node in browser.prompt().values())
    expected = json.loads((WORKFLOWS / "api" / "faithdiff_2x.json").read_text(encoding="utf-8"))
    assert kinds == sorted(
        node["class_type"] for node in expected.values() if node["class_type"] not in ("LoadImage", "SaveImage")
    )


def test_faithdiff_2x_runs_in_the_page(server: Server, browser: Page) -> None:
    """Dropped in and queued as it is, but for the number of steps; the picture has twice the size."""
    browser.drop(WORKFLOWS / "faithdiff_2x.json")
    assert browser.missing_types() == []
    assert browser.error_overlays() == []
    browser.set_widget("FaithDiffSampler", "steps", 1)
    result = browser.queue(timeout=500)
    assert result.node_errors == {}
    assert result.execution_error is None
    (image,) = [image for shown in result.outputs.values() for image in shown["images"]]
    assert Image.open(io.BytesIO(server.view(image))).size == (64, 48)
    assert browser.error_overlays() == []
