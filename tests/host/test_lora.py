"""LoRAs of FaithDiff in ComfyUI: through its own LoRA loader, and as part of FaithDiff's file."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import GOLDEN, Graph, Host
from safetensors.torch import load_file, save_file
from support.host_sampling import GOLDEN_FILE, GivenNoise, Setup, images, load, relative
from support.lora import State, add_by_hand, checkpoint_key, factor_of, trained_from, write_checkpoint
from torch import Tensor

from faithdiff_core.backbone import SDXL
from faithdiff_core.weights.lora_extraction import ExtractionSettings, extract_lora

COMBINED = "tiny_faithdiff_lora.safetensors"
CASE = next(
    case for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"] if case["name"] == "side_below_tile"
)


def host_names(state: State) -> State:
    return {checkpoint_key(name): value for name, value in state.items()}


@pytest.fixture(scope="module")
def base_file(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(trained_from(), tmp_path_factory.mktemp("lora") / "base.safetensors")


def extract(host: Host, base_file: Path, name: str, folder: str = "loras", **kw: Any) -> Path:
    """Extract a LoRA into one of the host's model folders."""
    adapter = kw.pop("adapter", None)
    path = host.base / "models" / folder / name
    settings = ExtractionSettings(**({"ranks": (8,), "dtype": "fp32"} | kw))
    return extract_lora(GOLDEN / GOLDEN_FILE, base_file, path, settings, adapter=adapter, force=True).path


@pytest.fixture(scope="module")
def combined(host: Host, base_file: Path) -> Path:
    return extract(host, base_file, COMBINED, "faithdiff", rank=4096, adapter=GOLDEN / GOLDEN_FILE)


def golden_latent(setup: Setup) -> Tensor:
    """The latent of a golden case."""
    tensors = load_file(GOLDEN / "expected.safetensors")
    image = (tensors["side_below_tile.image"].movedim(1, -1) + 1) / 2
    samples = setup.restore(
        setup.features(image),
        steps=CASE["steps"],
        cfg=CASE["cfg"],
        start_point=CASE["start"],
        tile_size=CASE["tile"],
        overlap=1 - CASE["overlap"],
        latent_image={"samples": tensors["side_below_tile.lr_latent"] / SDXL.vae_scaling_factor},
        noise=GivenNoise(tensors["side_below_tile.noise"]),
    )
    return samples * SDXL.vae_scaling_factor


def with_lora(host: Host, model: Any, path: Path, caplog: pytest.LogCaptureFixture) -> Any:
    """A MODEL with a LoRA by ComfyUI's own loader, which must have nothing to say."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        loaded = host.call("LoraLoaderModelOnly", model=model, lora_name=path.name, strength_model=1.0)[0]
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return loaded


@torch.no_grad()
def test_stock_loader_at_full_rank_is_golden(host: Host, base_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = extract(host, base_file, "full.safetensors", rank=4096, differences="comfyui")
    model = with_lora(host, host.testpack.models.tiny_model(host_names(trained_from())), path, caplog)
    setup = load(host, model=model, unet_strength=0.0)
    assert relative(golden_latent(setup), load_file(GOLDEN / "expected.safetensors")["side_below_tile.latent"]) < 1e-4


@torch.no_grad()
def test_comfyui_and_diffusers_restore_alike(
    host: Host, base_file: Path, tiny_sdxl: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A small rank in both programs' own loaders; and it matters which rank."""
    from faithdiff_core.engine import FaithDiffPipeline, TextConditioning

    path = extract(host, base_file, "small.safetensors", rank=8)
    model = with_lora(host, host.testpack.models.tiny_model(host_names(trained_from())), path, caplog)
    got = golden_latent(load(host, model=model, unet_strength=0.0))

    tensors = load_file(GOLDEN / "expected.safetensors")
    shutil.copytree(tiny_sdxl, tmp_path / "base")
    save_file(trained_from(), tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    prefixes = ("denoise_encoder.", "condition_embedding.", "information_transformer_layes.", "spatial_ch_projs.")
    adapter = {key: value for key, value in load_file(GOLDEN / GOLDEN_FILE).items() if key.startswith(prefixes)}
    save_file(adapter, tmp_path / "adapter.safetensors")
    pipeline = FaithDiffPipeline.from_files(
        tmp_path / "base", tmp_path / "adapter.safetensors", dtype="fp32", device="cpu"
    )
    pipeline.load_lora(path)
    expected = pipeline.sample(
        tensors["side_below_tile.lq_features"],
        TextConditioning(*(tensors[key] for key in ("pos", "pos_pooled", "neg", "neg_pooled"))),
        tensors["side_below_tile.noise"],
        lq_latent=tensors["side_below_tile.lr_latent"],
        steps=CASE["steps"],
        cfg=CASE["cfg"],
        start=CASE["start"],
        tile=CASE["tile"],
        overlap=1 - CASE["overlap"],
    )
    assert relative(got, expected) < 1e-4
    assert relative(got, tensors["side_below_tile.latent"]) > 1e-3


@torch.no_grad()
def test_adapter_and_lora_in_one_node(host: Host, base_file: Path, combined: Path) -> None:
    """At full rank on its base: golden. On another checkpoint, with a LoRA before it: as by hand at each strength."""
    models = host.testpack.models
    base = models.tiny_model(host_names(trained_from()))
    golden = load_file(GOLDEN / "expected.safetensors")["side_below_tile.latent"]
    assert relative(golden_latent(load(host, COMBINED, model=base)), golden) < 1e-4

    small = extract(
        host, base_file, "small_faithdiff_lora.safetensors", "faithdiff", rank=4, adapter=GOLDEN / GOLDEN_FILE
    )
    mine = models.other_unet(1)
    by_name = {name: mine[checkpoint_key(name)] for name in trained_from()}
    whole = host_names(add_by_hand(by_name, small))
    features = load(host).features(images(64, 64))
    middle = {"input_blocks": 0.5, "middle_block": 1.0, "output_blocks": 0.0}
    for strength, blocks in ((1.0, {}), (0.4, {}), (0.0, {}), (0.8, middle)):
        state = {key: mine[key] + strength * factor_of(key, blocks) * (whole[key] - mine[key]) for key in mine}
        expected, got = (
            load(host, name, model=host.call("TestLoRA", model=models.tiny_model(unet), seed=3, strength=0.5)[0], **kw)
            for name, unet, kw in (
                (GOLDEN_FILE, state, {"unet_strength": 0.0}),
                (small.name, mine, {"unet_strength": strength, **blocks}),
            )
        )
        assert relative(got.restore(features, steps=2), expected.restore(features, steps=2)) < 1e-4


def test_refusals(host: Host, combined: Path) -> None:
    models = host.testpack.models
    base = models.tiny_model(host_names(trained_from()))
    v_pred = models.tiny_model(host_names(trained_from()), ("v_pred",))
    for arguments, message in (
        ({"model": None}, "holds the LQ encoder and the alignment, but no U-Net. Connect a MODEL"),
        ({"model": base, "base_model": base}, "`base_model` works with your own MODEL at `model` and a full FaithDiff"),
        ({"model": v_pred}, "`model` is a v-prediction model, .* set unet_strength to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load(host, COMBINED, **arguments)
    state = load_file(combined)
    for change, message in (
        ({"lora_unet_out_2.diff_b": torch.zeros(7)}, r"no U-Net weight diffusion_model.out.2.bias of the shape \(7,\)"),
        ({"lora_unet_elsewhere.diff": torch.zeros(7)}, r"no U-Net weight lora_unet_elsewhere of the shape \(7,\)"),
    ):
        save_file(state | change, combined.with_name("bad.safetensors"))
        with pytest.raises(ValueError, match=message):
            load(host, "bad.safetensors", model=base)
    combined.with_name("bad.safetensors").unlink()


class TestNode:
    @pytest.fixture
    def graph(self, host: Host, base_file: Path) -> Graph:
        shutil.copy(base_file, host.base / "models" / "checkpoints" / "trained_from.safetensors")
        graph = Graph()
        graph.add(
            "FaithDiffExtractLoRA",
            faithdiff_name=GOLDEN_FILE,
            base_name="trained_from.safetensors",
            contents="lora_and_adapter",
            rank=4096,
            dtype="fp32",
        )
        return graph

    @torch.no_grad()
    def test_saves_what_the_loader_takes(self, host: Host, graph: Graph) -> None:
        """After a run that was interrupted; golden at full rank."""
        import comfy.model_management
        import comfy.utils

        comfy.utils.set_progress_bar_global_hook(lambda *_, **__: host.interrupt())
        try:
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                host.call("FaithDiffExtractLoRA", **graph.prompt["1"]["inputs"])
        finally:
            comfy.utils.set_progress_bar_global_hook(None)
        folder = host.base / "output" / "diffusion_models"
        (layers,) = folder.iterdir()
        assert len(list(layers.glob("*.safetensors"))) == 2
        result = host.run(graph, {"report": ["1", 0]})
        report = result.outputs["report"]
        assert report.startswith("diffusion_models/FaithDiff_faithdiff_lora_00001_.safetensors\nRelative error")
        assert result.progress[-1][0] == result.progress[-1][1]
        assert [path.name for path in folder.iterdir()] == ["FaithDiff_faithdiff_lora_00001_.safetensors"]
        base = host.testpack.models.tiny_model(host_names(trained_from()))
        (path,) = folder.iterdir()
        shutil.copy(path, host.base / "models" / "faithdiff")  # main.py, which is not run here, lists the folder itself
        setup = load(host, path.name, model=base)
        golden = load_file(GOLDEN / "expected.safetensors")["side_below_tile.latent"]
        assert relative(golden_latent(setup), golden) < 1e-4

    def test_what_load_lora_takes(self, host: Host, graph: Graph, caplog: pytest.LogCaptureFixture) -> None:
        inputs = graph.prompt["1"]["inputs"] | {"rank": 4, "energy": 0.9, "dtype": "fp16"}
        for contents, differences in (("lora", False), ("lora_with_differences", True)):
            report = host.call("FaithDiffExtractLoRA", **inputs | {"contents": contents})[0]
            path = host.base / "output" / report.partition("\n")[0]
            assert path.parent.name == "loras"
            assert any(key.endswith((".diff", ".diff_b")) for key in load_file(path)) == differences
            shutil.copy(path, host.base / "models" / "loras")
            with_lora(host, host.call("TestModel")[0], path, caplog)
        with pytest.raises(ValueError, match=r"FaithDiff Extract LoRA: filename_prefix '../../x' cannot be used"):
            host.call("FaithDiffExtractLoRA", **inputs | {"filename_prefix": "../../x"})
        with pytest.raises(
            ValueError, match=r"FaithDiff Extract LoRA: none.safetensors is in none of the model folders"
        ):
            host.call("FaithDiffExtractLoRA", **inputs | {"base_name": "none.safetensors"})
