"""Where ComfyUI and this pack are, and what a run of ComfyUI needs beside them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from .graph import Prompt

REPO = Path(__file__).resolve().parents[2]

TOOLS = Path(__file__).resolve().parents[1]

TESTPACK = Path(__file__).resolve().parent / "testpack"

GOLDEN = REPO / "tests" / "golden"

PACKS: Mapping[str, Path] = {"faithdiff": REPO, "faithdiff_testpack": TESTPACK}

NODES = frozenset(page.stem for page in (REPO / "web" / "docs").glob("*.md"))
"""Ids of the pack's nodes: each has a help page, and no other page is there."""

NO_HOST = (
    "NO COMFYUI FOUND: the tests on the real host are SKIPPED. Install it with `pip install comfy-cli && comfy "
    "install` (to ~/comfy/ComfyUI), or set COMFYUI_PATH to a ComfyUI folder."
)

NO_BROWSER = (
    "NO CHROMIUM FOUND: the tests in the web page are SKIPPED. Install it with `apt-get install chromium "
    "chromium-driver` and `pip install selenium`."
)

READY_SECONDS = 180.0

RUN_SECONDS = 300.0


class HostError(Exception):
    """The host could not be found or started."""


def find_host() -> Path | None:
    """The ComfyUI folder to test on: $COMFYUI_PATH, ~/comfy/ComfyUI, or the one whose custom_nodes this pack lies in.

    Raises:
        HostError: COMFYUI_PATH is set and is no ComfyUI folder.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().resolve()
        if not _is_host(path):
            raise HostError(f"COMFYUI_PATH is {path}, but main.py, nodes.py and comfy/ are not in it.")
        return path
    places = [Path.home() / "comfy" / "ComfyUI"]
    if REPO.parent.name == "custom_nodes":
        places.append(REPO.parent.parent)
    return next((place.resolve() for place in places if _is_host(place)), None)


def _is_host(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "nodes.py").is_file() and (path / "comfy").is_dir()


def prepare_base(base: Path) -> Path:
    """Make a ComfyUI base directory with the tiny FaithDiff model in models/faithdiff, and return it."""
    for folder in ("custom_nodes", "input", "output", "temp", "models/checkpoints", "models/faithdiff", "models/loras"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(GOLDEN / "faithdiff_tiny.safetensors", base / "models" / "faithdiff" / "faithdiff_tiny.safetensors")
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    # Keeps the welcome dialogs of the web page away.
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.49.6"}))
    return base


PLACEHOLDERS = (
    "models/faithdiff/FaithDiff.bin",
    "models/checkpoints/RealVisXL_V4.0.safetensors",
    "models/checkpoints/your_sdxl_checkpoint.safetensors",
    "models/loras/your_sdxl_lora.safetensors",
    "models/loras/sdxl_lightning_8step_lora.safetensors",
    "models/controlnet/controlnet-canny-sdxl-1.0.safetensors",
    "models/text_encoders/qwen3vl_4b_fp8_scaled.safetensors",
    "models/LLM/llava-1.5-7b-hf/config.json",
    "input/restore/image.png",
)


def write_placeholders(base: Path) -> None:
    """Put an image and empty files under the names that the workflows use into a base directory, to be listed only."""
    for name in PLACEHOLDERS:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).touch()
    shutil.copyfile(REPO / "assets" / "noisy_coffee.png", base / "input" / "example.png")


def quick_demo(base: Path) -> Prompt:
    """The demo workflow with one step, and a small image for it in the input folder of a base directory."""
    from PIL import Image

    Image.new("RGB", (40, 32), (200, 120, 40)).save(base / "input" / "example.png")
    prompt: Prompt = json.loads((REPO / "workflows" / "api" / "faithdiff_demo.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        if node["class_type"] == "FaithDiffSampler":
            node["inputs"]["steps"] = 1
    return prompt


def find_browser() -> tuple[Path, Path] | None:
    """Chromium and its driver, or None if one of them, or selenium, is missing."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None or importlib.util.find_spec("selenium") is None:
        return None
    return Path(chromium), Path(driver)
