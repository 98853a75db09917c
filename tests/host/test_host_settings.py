"""ComfyUI started with the settings that people start it with: each gives the default's image.

Every setting is a server of its own, so most of them are `slow`; one that changes the most is in each run.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import comfy_host
import pytest
import torch
from comfy_host import Graph, Host, Server
from safetensors.torch import load_file
from support.host_sampling import relative
from tiny_models.reduced_sdxl import write_reduced_adapter, write_reduced_sdxl_checkpoint
from torch import Tensor

EXACT = 1e-4
SETTINGS: dict[str, tuple[tuple[str, ...], float]] = {
    "fp16-unet": (("--fp16-unet",), EXACT),  # the reduced checkpoint is fp16, so nothing is lost
    "bf16-unet": (("--bf16-unet",), 2e-2),
    "fast": (("--fast",), EXACT),
    "cache-none": (("--cache-none",), EXACT),
    "cache-lru": (("--cache-lru", "5"), EXACT),
    "split attention": (("--use-split-cross-attention",), EXACT),
    "quad attention": (("--use-quad-cross-attention",), EXACT),
    "no smart memory": (("--disable-smart-memory",), EXACT),
    "no dynamic VRAM": (("--disable-dynamic-vram",), EXACT),
}
"""Settings, and how far a latent may be from the default's, relative to its largest value: the precision in use."""

IN_EACH_RUN = ("no dynamic VRAM",)
"""Tried by default; the others are slow."""


@dataclass(frozen=True)
class Outcome:
    """What a server made.

    Attributes:
        latents: of the SDXL-shaped graph: FaithDiff Sampler in tiles, and KSampler without.
        demo: the demo workflow's image, in 0..1.
    """

    latents: dict[str, Tensor]
    demo: Tensor


@pytest.fixture(scope="module")
def files(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that ComfyUI takes for SDXL, and an adapter of the published sizes."""
    folder = tmp_path_factory.mktemp("reduced")
    write_reduced_sdxl_checkpoint(folder / "reduced.ckpt", text_encoders=False)
    write_reduced_adapter(folder / "adapter.bin")
    return folder


def graph() -> Graph:
    """96 x 64 pixels: FaithDiff Sampler in tiles of 64, and KSampler without."""
    graph = Graph()
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name="reduced.ckpt")
    loader = graph.add(
        "FaithDiffModelLoader",
        faithdiff_name="adapter.bin",
        weight_dtype="default",
        model=checkpoint[0],
        unet_strength=1.0,
    )
    image = graph.add("TestImage", kind="random", width=96, height=64, batch=1, seed=1)
    lq = graph.add("FaithDiffLQEncode", faithdiff=loader[1], pixels=image[0], tile_size=1024, overlap=0.25)
    texts: list[Any] = [
        graph.add("TestConditioning", which="random", seed=seed, width=2048, pooled_width=1280, tokens=77)
        for seed in (1, 2)
    ]
    common = {"seed": 42, "steps": 2, "cfg": 3.0, "sampler_name": "euler"}
    tiles = {"tile_size": 64, "overlap": 0.5, "tile_batch": 0}
    tiled = graph.add(
        "FaithDiffSampler",
        model=loader[0],
        positive=texts[0][0],
        negative=texts[1][0],
        lq_features=lq[0],
        scheduler="faithdiff",
        start_point="noise",
        denoise=1.0,
        **common,
        **tiles,
    )
    conds = graph.add(
        "FaithDiffConditioning",
        positive=texts[0][0],
        negative=texts[1][0],
        lq_features=lq[0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    empty = graph.add("EmptyLatentImage", width=96, height=64, batch_size=1)
    untiled = graph.add(
        "KSampler",
        model=loader[0],
        positive=conds[0],
        negative=conds[1],
        latent_image=empty[0],
        scheduler="normal",
        denoise=1.0,
        **common,
    )
    graph.add("SaveLatent", samples=tiled[0], filename_prefix="tiled")
    graph.add("SaveLatent", samples=untiled[0], filename_prefix="untiled")
    return graph


def run(host_path: Path, base: Path, files: Path, arguments: tuple[str, ...]) -> Outcome:
    """Start a server, run both graphs twice (what is kept from the first run must not change the second), and stop."""
    server = Server(host_path, base, arguments)
    try:
        (base / "models" / "checkpoints" / "reduced.ckpt").symlink_to(files / "reduced.ckpt")
        (base / "models" / "faithdiff" / "adapter.bin").symlink_to(files / "adapter.bin")
        demo = comfy_host.quick_demo(base)
        for _ in range(2):
            latents_run = server.run(graph())
            demo_run = server.run(demo)
        assert latents_run.status == demo_run.status == "execution_success"
        latents = {}
        for name in ("tiled", "untiled"):
            newest = max((base / "output").glob(f"{name}_*.latent"))
            latents[name] = load_file(newest)["latent_tensor"].float()
        saved = sorted((base / "output").rglob("*.png"))[-1]
        return Outcome(latents, pixels(saved.read_bytes()))
    finally:
        server.stop()
        shutil.rmtree(base / "output", ignore_errors=True)


def pixels(png: bytes) -> Tensor:
    """An image file's colours, (height, width, 3) in 0..1."""
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.asarray(Image.open(BytesIO(png)).convert("RGB"), dtype=np.float32) / 255.0)


@pytest.fixture(scope="module")
def default(host_path: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What a server without settings makes."""
    return run(host_path, tmp_path_factory.mktemp("default"), files, ())


@pytest.mark.parametrize(
    "name", [name if name in IN_EACH_RUN else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_setting(host_path: Path, files: Path, default: Outcome, tmp_path: Path, name: str) -> None:
    arguments, tolerance = SETTINGS[name]
    compare(run(host_path, tmp_path, files, arguments), default, tolerance, name)


def compare(outcome: Outcome, default: Outcome, tolerance: float, name: str) -> None:
    apart = {key: relative(value, default.latents[key]) for key, value in outcome.latents.items()}
    apart["demo image"] = float((outcome.demo - default.demo).abs().max())
    sys.stdout.write(f"{name}: " + ", ".join(f"{key} {value:.1e}" for key, value in apart.items()) + "\n")
    assert all(torch.isfinite(value).all() for value in outcome.latents.values())
    assert apart["tiled"] <= tolerance
    assert apart["untiled"] <= tolerance
    assert apart["demo image"] <= tolerance + 1 / 255


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--lowvram", "--novram"])
def test_little_vram(host_path: Path, files: Path, request: pytest.FixtureRequest, tmp_path: Path, flag: str) -> None:
    """On a GPU settings like the others; ComfyUI takes neither with --cpu, which a machine without one needs."""
    if torch.cuda.is_available():
        compare(run(host_path, tmp_path, files, (flag,)), request.getfixturevalue("default"), EXACT, flag)
    else:
        with pytest.raises(comfy_host.HostError, match="not allowed with argument"):
            Server(host_path, tmp_path, (flag,))
