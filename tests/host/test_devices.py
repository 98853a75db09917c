"""FaithDiff where ComfyUI computes on several devices, each call in a thread of its own."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import torch
from comfy_host import Host
from support.host_sampling import Setup, images, load
from torch import Tensor

from faithdiff_core.tiling.grid import Tile


@pytest.fixture(scope="module")
def setup(host: Host) -> Setup:
    return load(host)


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of the devices as far as it decides what is kept: torch knows none of `meta`."""
    import comfy.model_management

    sizes = {"cpu": 2**20, "meta": 0}
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device, *_: sizes[device.type])


def test_every_device_has_its_own_budget(host: Host, setup: Setup) -> None:
    """What the first device can keep does not decide for the second."""
    patching = host.pack_module("nodes.bridge.alignment_patch")
    alignment = patching.find_patch(setup.model).alignment
    condition = host.pack_module("nodes.bridge.sampling_run").CallCondition(
        setup.features(images(64, 64, seed=1)), (Tile(0, 0, 8, 8),), 1.0
    )
    seen: list[str] = []
    embedding = alignment.model.condition_embedding
    handle = embedding.register_forward_hook(lambda _, __, out: seen.append(out.device.type))
    try:
        patch = patching.AlignmentPatch(alignment)
        for device in ("meta", "cpu", "meta", "cpu"):
            with torch.inference_mode():
                patch.parts([condition], True, 1, torch.device(device), torch.float32)
    finally:
        handle.remove()
    assert seen == ["meta", "cpu", "meta"]


def test_two_devices_in_two_threads(host: Host, setup: Setup) -> None:
    """Both U-Net calls run at the same time; each gets its own tile and strength, and nothing stays behind.

    The second device is torch's `meta`, which computes shapes only: its tile has another size, so that the other's
    condition would not fit.
    """
    patching = host.pack_module("nodes.bridge.alignment_patch")
    running = host.pack_module("nodes.bridge.sampling_run")
    wrapper = host.pack_module("nodes.bridge.tiled_prediction").apply_model
    patch = patching.find_patch(setup.model)
    alignment = patch.alignment.model
    features = setup.features(images(64, 96, seed=1))
    block = {"block": ("input", 0)}
    inside = threading.Barrier(2, timeout=60)
    results: dict[str, Tensor] = {}
    errors: list[BaseException] = []

    def call(name: str, device: str, tile: Tile, strength: float) -> None:
        uuid = uuid4()
        options: dict[str, Any] = {
            **setup.model.model_options["transformer_options"],
            "uuids": [uuid, uuid],
            "faithdiff": running.SamplingRun(conditions={uuid: running.CallCondition(features, (tile,), strength)}),
        }

        def unet(x: Tensor, *_: Any, **__: Any) -> Tensor:
            inside.wait()  # both are within their calls
            out = patch(x, block)
            inside.wait()
            return out

        unet.class_obj = SimpleNamespace(get_dtype_inference=lambda: torch.float32)  # type: ignore[attr-defined]
        try:
            with torch.inference_mode():
                x = torch.ones(2, 32, tile.height, tile.width, device=device)
                results[name] = wrapper(unet, x, None, None, None, None, options)
        except BaseException as error:
            errors.append(error)
            inside.abort()

    small, large = Tile(0, 0, 8, 8), Tile(0, 2, 8, 10)
    arguments = [("first", "cpu", small, 0.5), ("second", "meta", large, 1.0)]
    threads = [threading.Thread(target=call, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    crop = small.crop(features.tensor)
    expected = alignment(torch.ones(2, 32, 8, 8), alignment.embed(crop), 0.5)
    torch.testing.assert_close(results["first"], expected)
    assert float((expected - 1).abs().max()) > 1e-3
    assert (results["second"].device.type, results["second"].shape) == ("meta", (2, 32, 8, 10))
    assert patching._running == {}
