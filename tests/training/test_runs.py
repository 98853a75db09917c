"""A run is itself: what stops it, what goes on from it, what is refused, and that nothing broken is called finished."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.full_disk import full_disk
from support.training import SIZE, Make, same_files

from faithdiff_core.cli import main
from faithdiff_core.errors import ImageError, NotFiniteError, SaveError, SettingsError
from faithdiff_core.training import loop
from faithdiff_core.training.averages import AveragedWeights
from faithdiff_core.training.checkpoints import EARLIER, named_checkpoints
from faithdiff_core.training.config import LoraConfig, StageConfig, TrainConfig, ValidationConfig
from faithdiff_core.training.files import write_files
from faithdiff_core.training.loop import TrainResult
from faithdiff_core.training.model import load_models
from faithdiff_core.training.setup import check_accelerator, reconcile
from faithdiff_core.training.start import train


def _names(output: Path) -> list[str]:
    return [checkpoint.name for checkpoint in named_checkpoints(output)]


def _stop_after(steps: int, config: TrainConfig) -> TrainResult:
    """Run some steps and stop as on Ctrl-C."""
    original = loop.Run._after_step

    def stop(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        self.stop.asked = len(self.losses) >= steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "_after_step", stop)
        result = train(config)
    assert not result.finished
    assert result.steps == steps
    return result


# -- nothing broken is called finished --------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make()
    values = {
        "base": str(config.base),
        "output": "out",
        "data": {"folder": str(config.data.folder), "size": SIZE, "degradation": {"scale": 2}},
        "stages": [{"stage": 2, "steps": 12, "learning_rate": 1e5, "warmup": 0}],
        "batch": 2,
        "workers": 0,
        "tensorboard": False,
        "checkpoint_every": 1,
        "keep": 2,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "c.yaml")]) == 1
    said = capsys.readouterr().err
    assert "stopped" in said
    assert "step" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob("stage*.safetensors"))
    for checkpoint in named_checkpoints(tmp_path / "out"):
        for file in checkpoint.glob("*.safetensors"):
            assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values())


def test_files_never_hold_weights_that_are_not_finite(make: Make) -> None:
    config = make(save_precision="fp16")
    model, _ = load_models(config.base, None)
    config.output.mkdir()
    state = dict(model.state_dict())
    name = "lq_encoder.conv_in.weight"
    for value in (float("nan"), 1e6):  # the second is finite, but not in fp16
        with pytest.raises(NotFiniteError, match=r"conv_in.*fp16"):
            write_files(model, config, 1, state | {name: torch.full_like(state[name], value)}, None)
    assert not list(config.output.iterdir())


# -- identity ---------------------------------------------------------------------------------------------------------


def test_another_run_in_the_folder_is_kept_apart(make: Make) -> None:
    first = make(seed=7, stages=(StageConfig(1, 1, 1e-3, 1e-3, 0), StageConfig(2, 9, 1e-3, 1e-3, 0)))
    _stop_after(3, first)
    assert _names(first.output) == ["stage00-00000001", "stage01-00000002"]
    again = dataclasses.replace(first, seed=9, resume=False, checkpoint_every=1, keep=2)
    _stop_after(1, again)
    # The new run's only checkpoint, in an earlier stage than the old run's, is there.
    assert _names(first.output) == ["stage00-00000001"]
    (apart,) = (first.output / EARLIER).iterdir()
    assert _names(apart) == ["stage00-00000001", "stage01-00000002"]
    with pytest.raises(SettingsError, match=r"other settings.*seed"):
        train(first)
    gone_on = _stop_after(1, dataclasses.replace(again, resume=True))
    assert gone_on.steps == 1
    assert _names(first.output)[-1] == "stage01-00000001"


def test_a_run_can_be_moved_lengthened_and_shared_out_otherwise(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = (StageConfig(1, 1, 1e-3, 1e-3, 0), StageConfig(2, 3, 1e-3, 1e-3, 0))
    config = make(stages=stages, checkpoint_every=1, keep=3)
    whole = train(config)
    assert (whole.finished, whole.steps) == (True, 4)
    before = {p.name: p.stat().st_mtime_ns for p in config.output.glob("*.safetensors")}
    # Finished: nothing is trained, and nothing written.
    again = train(config)
    assert (again.finished, again.steps) == (True, 0)
    assert [p.name for p in again.files] == [p.name for p in whole.files]
    assert before == {p.name: p.stat().st_mtime_ns for p in config.output.glob("*.safetensors")}

    # Moved with everything that belongs to it, and cut to its next to last checkpoint; the last one is truncated.
    there = tmp_path / "there"
    assert config.data.folder is not None
    for source, name in ((config.base, "base"), (config.data.folder, "images"), (config.output, "out")):
        shutil.copytree(source, there / name)
    for file in (there / "out").glob("stage2*.safetensors"):
        file.unlink()
    broken = there / "out" / "checkpoints" / "stage01-00000003" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    (there / "out" / "checkpoints" / ".stage01-00000002.unfinished").mkdir()
    moved = dataclasses.replace(
        config,
        base=there / "base",
        output=there / "out",
        data=dataclasses.replace(config.data, folder=there / "images"),
        batch=1,
        accumulate=2,
    )
    with caplog.at_level(logging.WARNING):
        result = train(moved)
    assert "stage01-00000003" in caplog.text
    assert "the one before it is tried" in caplog.text
    assert result.steps == 1
    assert result.losses == pytest.approx(whole.losses[-1:], rel=1e-5)
    assert not list((there / "out" / "checkpoints").glob(".*.unfinished"))

    # More steps: the finished run goes on.
    longer = dataclasses.replace(config, stages=(stages[0], dataclasses.replace(stages[1], steps=5)))
    result = train(longer)
    assert (result.finished, result.steps) == (True, 2)
    with pytest.raises(SettingsError, match="stages"):
        train(dataclasses.replace(config, stages=(dataclasses.replace(stages[0], steps=2), stages[1])))

    # A checkpoint of other sizes is refused by name.
    with pytest.raises(SettingsError, match=r"1 process\(es\) with batch 2 and accumulate 1, 2 samples a step"):
        train(dataclasses.replace(longer, batch=3))
    record = config.output / "checkpoints" / "stage01-00000005" / "run.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps(values | {"processes": 2}))
    with pytest.raises(SettingsError, match=r"2 process\(es\).*4 samples a step"):
        train(longer)


# -- whatever ends it, the last step is saved -------------------------------------------------------------------------


def test_interruptions_of_every_kind_change_nothing(make: Make, images: Path, tmp_path: Path) -> None:
    """A missing image, a full disk, a request to stop."""
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    config = make(checkpoint_every=2, data={"check": False})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, folder=folder))
    whole = train(dataclasses.replace(config, output=tmp_path / "whole"))

    missing = folder / "3.png"
    original = loop.Run._after_step

    def remove(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        for file in folder.glob("*.png"):
            file.rename(file.with_suffix(".away"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "_after_step", remove)
        with pytest.raises(ImageError, match=r"png"):
            train(config)
    assert _names(config.output) == ["stage00-00000001"]  # no step is lost, though none was due
    for file in folder.glob("*.away"):
        file.rename(file.with_suffix(".png"))
    assert missing.is_file()

    with full_disk(2**20), pytest.raises(SaveError, match=r"cannot be written.*stage00-00000001 are whole"):
        train(config)
    assert _names(config.output) == ["stage00-00000001"]
    assert not list((config.output / "checkpoints").glob(".*"))
    _stop_after(3, config)
    result = train(config)
    assert result.finished
    assert result.losses == whole.losses[-result.steps :]
    for file in whole.files:
        assert same_files(file, config.output / file.name)


def test_bad_images_are_skipped_at_run_time_within_a_limit(
    make: Make, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "2.png").write_bytes(b"")
    config = make(stages=(StageConfig(1, 3, 1e-3, 1e-3, 1),))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, folder=folder, check=False, on_bad="skip")
    )
    with caplog.at_level(logging.WARNING):
        assert train(config).finished
    assert caplog.text.count("skipped image") == 1
    assert "2.png" in caplog.text
    (folder / "4.png").write_bytes(b"")
    fresh = dataclasses.replace(config, output=tmp_path / "fresh")
    with pytest.raises(ImageError, match=r"2 of 6 images turned out bad.*max_bad"):
        train(fresh)
    # Without skipping, the message is the image's, and no worker's traceback.
    strict = dataclasses.replace(
        config, output=tmp_path / "strict", workers=1, data=dataclasses.replace(config.data, on_bad="raise")
    )
    with pytest.raises(ImageError) as caught:
        train(strict)
    assert "Traceback" not in str(caught.value)


# -- everything that can be known is known before the first step ------------------------------------------------------


def test_validation_images_are_looked_at_first(make: Make, tmp_path: Path) -> None:
    config = make(validation=ValidationConfig(folder=tmp_path / "nowhere"))
    with pytest.raises(ImageError, match="nowhere"):
        train(config)
    assert not (config.output / "run.json").exists()


def test_the_set_up_is_said_and_written(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    config = make(stages=(StageConfig(2, 1, 1e-3, 1e-3, 0),), ema=0.9)
    with caplog.at_level(logging.INFO):
        train(config)
    assert "batch 2 x accumulate 1 x processes 1 = 2 samples a step" in caplog.text
    setup = json.loads((config.output / "run.json").read_text())["setup"]
    assert (setup["precision"], setup["steps"], setup["images"]) == ("no", [1], 6)
    (checkpoint,) = named_checkpoints(config.output)
    written = sum(p.stat().st_size for p in checkpoint.iterdir())
    assert setup["checkpoint"] == pytest.approx(written, rel=0.02)
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"].values()
    moments = sum(s[name].numel() * 4 for s in optimizer for name in ("exp_avg", "exp_avg_sq"))
    assert setup["memory"]["optimizer"] == moments


def test_a_file_stops_a_run_once(make: Make) -> None:
    config = make(checkpoint_every=100)
    original = loop.Run._after_step

    def ask(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        (config.output / "stop").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "_after_step", ask)
        stopped = train(config)
    assert not stopped.finished
    assert _names(config.output) == ["stage00-00000001"]
    assert train(config).finished  # the file of before does not stop it again


def test_fsdp_takes_a_stage_a_run_without_averages(make: Make) -> None:
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"), gradient_accumulation_steps=1)
    with pytest.raises(SettingsError, match="set `ema: 0`"):
        check_accelerator(accelerator, make(ema=0.9), {})
    with pytest.raises(SettingsError, match="each stage a run of its own"):
        check_accelerator(accelerator, make(ema=0), {})
    one = make(ema=0, accumulate=1)
    check_accelerator(accelerator, dataclasses.replace(one, stages=one.stages[:1]), {})


def test_precision_and_accumulation_have_one_source(make: Make) -> None:
    from accelerate import Accelerator

    plain = make()
    launched = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    settled = reconcile(plain, launched)
    assert (settled.precision, settled.accumulate) == ("bf16", 4)
    settled = reconcile(make(precision="bf16", accumulate=2), {"ACCELERATE_MIXED_PRECISION": "no"})
    assert (settled.precision, settled.accumulate) == ("bf16", 2)
    with pytest.raises(SettingsError, match="precision is fp16 here and bf16"):
        reconcile(make(precision="fp16"), launched)
    with pytest.raises(SettingsError, match="accumulate is 2 here and gradient_accumulation_steps 4"):
        reconcile(make(accumulate=2), launched)
    with pytest.raises(SettingsError, match="fp8"):
        reconcile(plain, {"ACCELERATE_MIXED_PRECISION": "fp8"})
    accelerator = Accelerator()
    check_accelerator(accelerator, reconcile(plain, {}), {})
    with pytest.raises(SettingsError, match=r"DEEPSPEED.*made NO of it"):
        check_accelerator(accelerator, reconcile(plain, {}), {"ACCELERATE_USE_DEEPSPEED": "true"})


# -- weights ----------------------------------------------------------------------------------------------------------


def test_averages_are_kept_in_full_precision() -> None:
    """In bf16 a step of one ten-thousandth of the way is no step at all."""
    half = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    averages = AveragedWeights([half], 0.999)
    for _ in range(3):
        averages.update([half])
    with torch.no_grad():
        half.fill_(2.0)
    exact = averages.shadows[0].double().clone()
    for count in range(3, 203):
        averages.update([half])
        decay = min(0.999, (1 + count) / (10 + count))
        exact = decay * exact + (1 - decay) * 2.0
    assert averages.shadows[0].dtype == torch.float32
    assert torch.allclose(averages.shadows[0].double(), exact, atol=1e-5)
    with averages.in_place_of([half]):
        assert float(half[0]) < 2.0 or exact[0] > 1.99
    assert float(half[0]) == 2.0
    again = AveragedWeights([half], 0.999)
    again.load_state_dict(averages.state_dict())
    assert torch.equal(again.shadows[0], averages.shadows[0])
    assert again.updates == averages.updates


def test_half_precision_parameters_take_full_precision_inputs(make: Make) -> None:
    """As under DeepSpeed in bf16, which casts the module and autocasts nothing."""
    model, _ = load_models(make().base, None)
    model.to(torch.bfloat16)
    width = model.unet.config.cross_attention_dim
    pooled = torch.randn(1, model.unet.config.projection_class_embeddings_input_dim - 6 * 256)
    ids = torch.zeros(1, 6)
    out = model(
        torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, width), pooled, ids, torch.randn(1, 3, 64, 64)
    )
    assert out.dtype == torch.bfloat16


def test_raw_and_averaged_weights_and_the_lora_are_files(make: Make) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    lora = LoraConfig(rank=2, alpha=6)
    config = make(stages=(StageConfig(2, 2, 1e-2, 1e-3, 0),), lora=lora, weights="both", precision="bf16")
    outcome = train(config)
    names = ["stage2", "stage2_adapter", "stage2_raw", "stage2_raw_adapter", "stage2_lora"]
    assert [p.stem for p in outcome.files] == names
    averaged, raw = (load_file(config.output / f"{name}.safetensors") for name in ("stage2", "stage2_raw"))
    assert any(not torch.equal(averaged[key], raw[key]) for key in averaged)
    # The frozen weights are the base's own, though training kept them in half precision.
    unet = UNet2DConditionModel.from_pretrained(config.base / "unet")
    frozen = "conv_in.weight"
    assert torch.equal(averaged[frozen], unet.state_dict()[frozen])
    # diffusers reads the LoRA, and with it the base is the full file.
    state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        load_file(config.output / "stage2_lora.safetensors"), unet_config=unet.config
    )
    StableDiffusionXLLoraLoaderMixin.load_lora_into_unet(state, alphas, unet)
    unet.fuse_lora()
    fused = {key.replace(".base_layer.", "."): value for key, value in unet.state_dict().items() if "lora_" not in key}
    changed = [key for key in fused if key.endswith("to_q.weight")]
    assert changed
    for key in changed:
        assert torch.allclose(fused[key], averaged[key], atol=1e-6)


def test_the_next_stage_begins_with_the_weights_that_are_finished(make: Make) -> None:
    """With raw weights no average is kept, and stage 2 goes on from what stage 1 wrote."""
    stages = (StageConfig(1, 3, 1e-3, 1e-3, 0), StageConfig(2, 1, 0.0, 0.0, 0))
    outcome = train(make(stages=stages, weights="raw"))
    first, second = (load_file(path) for path in outcome.files[::2])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)  # a learning rate of 0 moves nothing
    averaged = train(make(stages=stages[:1], output=outcome.files[0].parent / "averaged"))
    other = load_file(averaged.files[0])
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_checkpointing_the_lq_encoder_saves_activations_and_keeps_gradients(make: Make) -> None:
    model, _ = load_models(make().base, None)
    pixels = torch.randn(1, 3, SIZE, SIZE)
    kept, gradients = [], []
    for on in (False, True):
        model.lq_encoder.gradient_checkpointing = on
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model.lq_encoder(pixels)
        kept.append(sum(sizes.values()))
        out.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.lq_encoder.parameters() if p.grad is not None])
    assert kept[1] < 0.3 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_check_is_remembered_until_a_file_changes(make: Make, images: Path, tmp_path: Path) -> None:
    from faithdiff_core.training.data import open_source
    from faithdiff_core.training.data_check import DataMemory, usable_entries

    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    config = dataclasses.replace(make().data, folder=folder)
    memory = DataMemory()
    assert len(usable_entries(open_source(config), config, memory)) == 6
    memory.write(tmp_path)
    # Other content under the same name, size and time is not looked at again; another time is.
    file = folder / "0.png"
    found = file.stat()
    file.write_bytes(bytes(found.st_size))
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    memory = DataMemory.read(tmp_path)
    assert len(usable_entries(open_source(config), config, memory)) == 6
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))
    with pytest.raises(ImageError, match=r"0\.png"):
        usable_entries(open_source(config), config, memory)
