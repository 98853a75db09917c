"""The example workflows: as built, in API mode, and dropped into the real page."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_host import REPO, Host, Page, Server
from PIL import Image
from tiny_models.captioners import LLAVA_TEMPLATE, make_llava
from tiny_models.reduced_sdxl import (
    write_lora,
    write_published_faithdiff,
    write_reduced_adapter,
    write_reduced_sdxl_checkpoint,
    write_small_controlnet,
)

WORKFLOWS = REPO / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))


ADAPTER = "reduced_adapter.bin"


def test_files_are_what_the_graphs_give(host: Host) -> None:
    """The nodes and the files cannot drift apart; run scripts/build_workflows.py after a change."""
    import build_workflows

    texts = build_workflows.texts({name: host.node_class(name) for name in host.node_ids})
    assert {path: path.read_text(encoding="utf-8") for path in texts if path.exists()} == texts
    folders = ("workflows", "workflows/api", "subgraphs")
    assert {path for folder in folders for path in (REPO / folder).glob("*.json")} == set(texts)


def test_every_workflow_has_a_thumbnail(server: Server) -> None:
    """Square, small, with words of its own, and shown by the template browser."""
    import build_thumbnails

    assert set(build_thumbnails.THUMBNAILS) == set(NAMES)
    assert len({words for _, words in build_thumbnails.THUMBNAILS.values()}) == len(NAMES)
    for name in NAMES:
        path = WORKFLOWS / f"{name}.jpg"
        with Image.open(path) as image:
            assert image.size == (build_thumbnails.SIDE, build_thumbnails.SIDE)
        assert path.stat().st_size < 100_000
        assert server.download(f"/api/workflow_templates/faithdiff/{name}.jpg") == path.read_bytes()


@pytest.fixture(scope="module")
def server(host: Host, host_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose folders have the names that the workflows use.

    FaithDiff.bin is in its published shape, and the checkpoint has full text encoders and VAE; all weights are random.
    The U-Net is kept in bf16: 5 GB. The user's own checkpoint is a U-Net of reduced depth, which fits an adapter alone.
    The language model is only there to be listed.
    """
    server = Server(host_path, tmp_path_factory.mktemp("full"), ("--bf16-unet",))
    models, inputs = server.base / "models", server.base / "input"
    for folder in ("controlnet", "text_encoders"):
        (models / folder).mkdir(exist_ok=True)
    write_published_faithdiff(models / "faithdiff" / "FaithDiff.bin")
    write_reduced_adapter(models / "faithdiff" / ADAPTER)
    checkpoint = models / "checkpoints" / "RealVisXL_V4.0.safetensors"
    write_reduced_sdxl_checkpoint(checkpoint, safetensors=True)
    (models / "checkpoints" / "your_sdxl_checkpoint.safetensors").hardlink_to(checkpoint)
    write_lora(models / "loras" / "your_sdxl_lora.safetensors", 320)
    write_lora(models / "loras" / "sdxl_lightning_8step_lora.safetensors", 640)
    write_small_controlnet(models / "controlnet" / "controlnet-canny-sdxl-1.0.safetensors")
    make_llava(models / "LLM" / "llava-1.5-7b-hf", LLAVA_TEMPLATE)
    (models / "text_encoders" / "qwen3vl_4b_fp8_scaled.safetensors").touch()
    (inputs / "restore").mkdir()
    for path, size in ((inputs / "example.png", (32, 24)), (inputs / "restore" / "other.png", (24, 32))):
        Image.effect_noise(size, 60).convert("RGB").save(path)
        shutil.copy(inputs / "example.png", inputs / "restore")
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
    if not any(node["class_type"] == "FaithDiffCompare" for node in twin.values()):  # shows something, in the page only
        queued = {key: node for key, node in queued.items() if node["class_type"] != "FaithDiffCompare"}
    if name == "faithdiff_demo":  # in the page it restores the model's own sample
        (image,) = [key for key, node in twin.items() if node["class_type"] == "LoadImage"]
        assert {node["class_type"] for node in queued.values()} == {
            node["class_type"] for key, node in twin.items() if key != image
        }
        return
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


RUNS: dict[str, list[tuple[int, int]]] = {
    "faithdiff_2x": [(64, 48)],
    "faithdiff_photograph": [(64, 48)],
    "faithdiff_4x_progressive": [(128, 96)],
    "faithdiff_8k": [(128, 96)],
    "faithdiff_few_steps": [(64, 48)],
    "faithdiff_controlnet": [(64, 48)],
    "faithdiff_auto_caption": [(64, 48)],
    "faithdiff_batch_folder": [(64, 48), (48, 64)],
    "faithdiff_low_vram": [(64, 48)],
    "faithdiff_own_checkpoint_lora": [(64, 48)],
    "faithdiff_tile_captions": [(64, 48)],
    "faithdiff_masked": [(32, 24)],
    "faithdiff_demo": [(600, 400)],
}
"""Sizes of what each workflow saves here. Those that share models follow each other, so that they are loaded once."""

WITHOUT_MODELS = {"faithdiff_other_captioner"}
"""Needs a vision-language model of ComfyUI's own format, which cannot be made small."""


def test_all_workflows_are_run() -> None:
    assert {*RUNS, *WITHOUT_MODELS} == set(NAMES)


@pytest.mark.parametrize("name", RUNS)
def test_workflows_run_in_the_page(server: Server, browser: Page, name: str) -> None:
    """Dropped in and queued as they are, but for the number of steps."""
    browser.drop(WORKFLOWS / f"{name}.json")
    assert browser.missing_types() == []
    assert browser.error_overlays() == []
    sampler = "FaithDiffRestoreFolder" if name == "faithdiff_batch_folder" else "FaithDiffSampler"
    browser.set_widget(sampler, "steps", 1)
    if name == "faithdiff_own_checkpoint_lora":
        browser.set_widget("FaithDiffModelLoader", "faithdiff_name", ADAPTER)
    said_before = len(server.log.read_bytes())
    result = browser.queue(timeout=500)
    assert result.node_errors == {}
    assert result.execution_error is None
    assert b"key not loaded" not in server.log.read_bytes()[said_before:]  # a LoRA for another U-Net is only warned of
    shown = [image for output in result.outputs.values() for image in output.get("images", [])]
    images = [image for image in shown if image["type"] == "output"]
    assert [Image.open(io.BytesIO(server.view(image))).size for image in images] == RUNS[name]
    assert browser.error_overlays() == []
