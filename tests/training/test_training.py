"""Training: stages, resuming, several processes, data, and the files that come out."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import operator
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from support.training import ROOT, SIZE, Make

from faithdiff_core import read_faithdiff
from faithdiff_core.cli import train as command
from faithdiff_core.cli.train import read_config
from faithdiff_core.errors import ImageError, SaveError, SettingsError, WeightsError
from faithdiff_core.training.checkpoints import named_checkpoints
from faithdiff_core.training.config import DataConfig, LoraConfig, StageConfig, TrainConfig, ValidationConfig
from faithdiff_core.training.data import open_source
from faithdiff_core.training.data_check import usable_entries
from faithdiff_core.training.degradation import DegradationConfig
from faithdiff_core.training.model import FrozenModels, TrainableModel, load_models, time_ids
from faithdiff_core.training.samples import SampleSettings, StepBatches, TrainingSet, collate
from faithdiff_core.training.start import train


def _fixed_loss(model: TrainableModel, frozen: FrozenModels, config: TrainConfig) -> float:
    """Mean loss on samples that training does not draw, always the same."""
    source = open_source(config.data)
    dataset = TrainingSet(source, range(len(source)), config.data, SampleSettings(99, 0.0, 0.02, 4, 8))
    from faithdiff_core.sampling.schedule import alphas_cumprod

    batch = collate([dataset[i] for i in range(12)])
    with torch.no_grad():
        latents = frozen.latents(batch["hq"], batch["posterior"])
        batch["timestep"], batch["noise"] = batch["timestep"].flatten(), batch["noise"].flatten(0, 1)
        abar = alphas_cumprod()[batch["timestep"]].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * batch["noise"]
        context, pooled = frozen.encode_texts(batch["caption"], torch.device("cpu"))
        predicted = model(noisy, batch["timestep"], context, pooled, time_ids(12, SIZE, noisy.device), batch["lq"])
    return float((predicted - batch["noise"]).abs().mean())


def _changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key], after[key])}


def _part(key: str) -> str:
    if key.startswith("denoise_encoder."):
        return "lq_encoder"
    if key.startswith(("condition_embedding.", "information_transformer_layes.", "spatial_ch_projs.")):
        return "alignment"
    return "unet"


def test_two_stages_lower_the_loss_and_move_only_what_they_should(make: Make) -> None:
    config = make(stages=(StageConfig(1, 12, 2e-3, 0, 2), StageConfig(2, 12, 2e-3, 1e-3, 2)), batch=4, text_dropout=0.5)
    model, frozen = load_models(config.base, None)
    start = model.published(adapter_only=False, dtype=torch.float32)
    # Algorithm 1: the LQ encoder is the VAE's, and the new alignment changes nothing.
    vae = frozen.vae.state_dict()
    assert torch.equal(start["denoise_encoder.conv_in.weight"], vae["encoder.conv_in.weight"])
    losses = [_fixed_loss(model, frozen, config)]

    outcome = train(config)
    assert outcome.finished
    assert outcome.steps == 24
    assert [p.name for p in outcome.files] == [
        "stage1.safetensors",
        "stage1_adapter.safetensors",
        "stage2.safetensors",
        "stage2_adapter.safetensors",
    ]
    states = [load_file(p) for p in outcome.files]
    assert {_part(k) for k in _changed(start, states[0])} == {"alignment"}
    assert {_part(k) for k in _changed(states[0], states[2])} == {"alignment", "lq_encoder", "unet"}
    for path in outcome.files[::2]:
        trained, _ = load_models(config.base, path)
        losses.append(_fixed_loss(trained, frozen, config))
    assert losses[0] - losses[1] > 0.01, losses
    assert losses[1] - losses[2] > 0.05, losses

    full, adapter = read_faithdiff(outcome.files[2]), read_faithdiff(outcome.files[3])
    assert (full.kind, adapter.kind) == ("full", "adapter")
    assert {k: v for k, v in states[2].items() if _part(k) != "unet"}.keys() == states[3].keys()
    alignment = full.build_alignment()
    h, condition = torch.randn(1, 32, 8, 8), torch.randn(1, 32, 8, 8)
    assert not torch.equal(alignment(h, condition), h)


def _run_state(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "stage2.safetensors")


def test_resuming_equals_never_having_stopped(make: Make, tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, alpha=2, dropout=0.3)  # its dropout draws from torch's own state
    settings: dict[str, Any] = {"checkpoint_every": 2, "keep": 4, "lora": lora, "accumulate": 2}
    whole = train(make(output=tmp_path / "whole", **settings))
    names = ["stage00-00000002", "stage00-00000003", "stage01-00000002", "stage01-00000003"]
    assert [p.name for p in named_checkpoints(tmp_path / "whole")] == names

    broken = make(output=tmp_path / "broken", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "broken" / "checkpoints")
    for name in ("stage01-00000002", "stage00-00000002"):
        # From the second stage, then (with the later checkpoints gone) from the first.
        for checkpoint in named_checkpoints(tmp_path / "broken"):
            if checkpoint.name > name:
                shutil.rmtree(checkpoint)
        resumed = train(broken)
        assert resumed.losses == whole.losses[-resumed.steps :]
        assert resumed.steps == (1 if name.startswith("stage01") else 4)
        assert not _changed(_run_state(tmp_path / "whole"), _run_state(tmp_path / "broken"))

    with pytest.raises(SettingsError, match=r"other settings.*seed"):
        train(dataclasses.replace(broken, seed=1))


def test_ctrl_c_saves_and_stops(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from faithdiff_core.training import loop

    config = make(stages=(StageConfig(1, 5, 1e-3, 1e-3, 1),))
    before = signal.getsignal(signal.SIGINT)
    original = loop.Run._after_step

    def interrupt(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        if self.place.step == 2 and len(self.losses) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_after_step", interrupt)
        first = train(config)
    assert not first.finished
    assert first.steps == 2
    assert not first.files
    latest = named_checkpoints(config.output)[-1]
    assert latest.name == "stage00-00000002"
    second = train(config)
    assert second.finished
    assert second.steps == 3
    whole = train(dataclasses.replace(config, output=config.output.parent / "whole"))
    assert whole.losses == first.losses + second.losses
    assert signal.getsignal(signal.SIGINT) is before  # the handler that was there is back


def test_a_killed_checkpoint_is_not_taken_for_a_whole_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from faithdiff_core.training import checkpoints

    config = make(stages=(StageConfig(1, 4, 1e-3, 1e-3, 1),), checkpoint_every=1)

    def killed(*names: Any) -> None:
        if str(names[1]).endswith("stage00-00000002"):
            raise OSError("the machine went away")
        os.rename(*names)

    monkeypatch.setattr(checkpoints.os, "replace", killed)
    with pytest.raises(SaveError, match="went away"):
        train(config)
    assert [p.name for p in named_checkpoints(config.output)] == ["stage00-00000001"]


@pytest.mark.parametrize("batch", [2])
def test_two_processes_begin_with_the_loss_of_one(make: Make, tmp_path: Path, batch: int) -> None:
    one = train(make(stages=(StageConfig(2, 2, 1e-4, 1e-4, 0),), batch=2 * batch))
    config = tmp_path / "two.yaml"
    values = {
        "base": str(make().base),
        "output": str(tmp_path / "two"),
        "data": {"folder": str(make().data.folder), "size": SIZE, "degradation": {"scale": 2}},
        "stages": [{"stage": 2, "steps": 2, "learning_rate": 1e-4, "lq_learning_rate": 1e-4, "warmup": 0}],
        "batch": batch,
        "workers": 0,
        "ema": 0.9,
        "save_precision": "fp32",
        "tensorboard": False,
    }
    config.write_text(yaml.safe_dump(values))
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys, torch\nfrom pathlib import Path\nfrom faithdiff_core.cli.train import read_config\n"
        "from faithdiff_core.training.start import train\ntorch.set_num_threads(1)\n"
        "outcome = train(read_config(Path(sys.argv[1])))\n"
        "if outcome.files: Path(sys.argv[2]).write_text(json.dumps(outcome.losses))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    # `--cpu` would start the processes through MPI, or one alone without it; `--multi_gpu` means torch's launcher.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(script), str(config), str(tmp_path / "losses.json")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "losses.json").read_text())
    assert two[0] == pytest.approx(one.losses[0], rel=1e-5)
    assert two[1] == pytest.approx(one.losses[1], rel=1e-3)
    together, apart = _run_state(tmp_path / "out"), _run_state(tmp_path / "two")
    # Adam's first steps have the learning rate's size whatever the gradient's, so tiny differences can turn a sign.
    assert max(float((together[k] - apart[k]).abs().max()) for k in together) < 5e-4


def test_lora_trains_in_the_unets_place_and_is_merged(make: Make) -> None:
    config = make(stages=(StageConfig(2, 3, 1e-2, 1e-3, 0),), lora=LoraConfig(rank=4, alpha=8))
    before = load_file(config.base / "unet" / "diffusion_pytorch_model.safetensors")
    outcome = train(config)
    after = read_faithdiff(outcome.files[0])
    assert after.kind == "full"
    assert after.unet is not None
    changed = {k for k in before if not torch.equal(before[k], after.unet.state[k])}
    assert changed
    assert all(k.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")) for k in changed)
    some = next(k for k in changed if k.endswith("attn1.to_q.weight"))
    assert torch.linalg.matrix_rank(after.unet.state[some] - before[some], rtol=1e-4) <= 4


def test_reading_back_what_was_written_gives_the_same_prediction(make: Make) -> None:
    config = make(stages=(StageConfig(2, 2, 1e-3, 1e-3, 0),), ema=0.0, lora=LoraConfig(rank=2))
    from faithdiff_core.training import loop

    kept: list[TrainableModel] = []
    original = loop.write_files

    def keep(model: TrainableModel, *arguments: Any) -> list[Path]:
        kept.append(model)
        return original(model, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_files", keep)
        outcome = train(config)
    again, frozen = load_models(config.base, outcome.files[0])
    assert _fixed_loss(again.eval(), frozen, config) == pytest.approx(
        _fixed_loss(kept[0].eval(), frozen, config), abs=1e-6
    )


def test_checkpointed_gradients_and_bf16_run(make: Make) -> None:
    from accelerate.state import AcceleratorState

    plain = train(make(stages=(StageConfig(2, 2, 1e-4, 1e-4, 0),)))
    saving = train(make(stages=(StageConfig(2, 2, 1e-4, 1e-4, 0),), gradient_checkpointing=True, resume=False))
    assert saving.losses == pytest.approx(plain.losses, rel=1e-5)
    AcceleratorState._reset_state(True)  # it holds one precision for a process's life
    half = train(make(stages=(StageConfig(2, 2, 1e-4, 1e-4, 0),), precision="bf16", resume=False))
    AcceleratorState._reset_state(True)
    assert half.losses == pytest.approx(plain.losses, rel=0.03)
    assert half.losses != plain.losses


def test_samples_and_logs_are_written(make: Make, images: Path) -> None:
    config = make(
        stages=(StageConfig(1, 2, 1e-3, 1e-3, 0),),
        validation=ValidationConfig(folder=images, every=1, count=2, steps=2),
        tensorboard=True,
        log_every=1,
        workers=1,
    )
    train(config)
    samples = sorted(p.name for p in (config.output / "samples").iterdir())
    assert samples == [f"stage1-0000000{step}-{i}.png" for step in (1, 2) for i in (0, 1)]
    assert Image.open(config.output / "samples" / samples[0]).size == (3 * SIZE, SIZE)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {p.parent for p in (config.output / "logs").rglob("events*")}
    scalars = EventAccumulator(str(events))
    scalars.Reload()
    assert {"stage1/loss", "stage1/learning_rate", "stage1/psnr"} <= set(scalars.Tags()["scalars"])
    assert [e.step for e in scalars.Scalars("stage1/loss")] == [1, 2]


# -- data -------------------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_number_alone(make: Make) -> None:
    config = make()
    source = open_source(config.data)
    settings = SampleSettings(3, 0.3, 0.02, 4, 8)
    first, second = (TrainingSet(source, range(6), config.data, settings) for _ in range(2))
    late = second[40]
    for key, value in first[40].items():
        assert torch.equal(value, late[key]) if isinstance(value, torch.Tensor) else value == late[key]
    assert not torch.equal(first[40]["noise"], first[46]["noise"])
    # Every image comes once in an epoch.
    names = {f"Photograph {i}." for i in range(6)}
    plain = TrainingSet(source, range(6), config.data, dataclasses.replace(settings, text_dropout=0.0))
    assert {plain[i]["caption"] for i in range(6, 12)} == names
    dropped = sum(first[i]["caption"] == "" for i in range(200)) / 200
    assert 0.2 < dropped < 0.4
    steps = np.array([int(first[i]["timestep"]) for i in range(200)])
    assert steps.min() >= 0
    assert steps.max() <= 999
    assert 430 < steps.mean() < 570


def test_noise_has_the_offset_of_the_paper(make: Make) -> None:
    config = make()
    settings = SampleSettings(0, 0.2, 0.5, 4, 8)
    dataset = TrainingSet(open_source(config.data), range(6), config.data, settings)
    noise = torch.cat([dataset[i]["noise"] for i in range(60)])
    # A constant of deviation 0.5 on each channel, over 64 values of deviation 1.
    assert float(noise.mean((2, 3)).std()) == pytest.approx((0.25 + 1 / 64) ** 0.5, rel=0.15)


def test_several_draws_share_an_image_and_spread_over_the_schedule(make: Make) -> None:
    config = make()
    settings = SampleSettings(0, 0.2, 0.02, 4, 8, draws=4)
    dataset = TrainingSet(open_source(config.data), range(6), config.data, settings)
    batch = collate([dataset[i] for i in range(3)])
    assert batch["noise"].shape == (3, 4, 4, 8, 8)
    assert all(sorted(int(t) // 250 for t in row) == [0, 1, 2, 3] for row in batch["timestep"])
    # An image's rows get its own features: with the alignment at work, they differ from another's.
    model, frozen = load_models(config.base, None)
    torch.nn.init.normal_(model.alignment.proj.weight, std=0.1)
    torch.nn.init.normal_(model.alignment.condition_embedding.conv_out.weight, std=0.1)
    context, pooled = frozen.encode_texts([""] * 6, torch.device("cpu"))
    noisy, steps = torch.randn(6, 4, 8, 8), torch.arange(6) * 100
    with torch.no_grad():
        together = model(noisy, steps, context, pooled, time_ids(6, SIZE, noisy.device), batch["lq"])
        rows = torch.tensor([0, 0, 1, 1, 2, 2])
        apart = model(noisy, steps, context, pooled, time_ids(6, SIZE, noisy.device), batch["lq"][rows])
        swapped = model(noisy, steps, context, pooled, time_ids(6, SIZE, noisy.device), batch["lq"][rows.flip(0)])
    assert torch.allclose(together, apart, atol=1e-5)
    assert not torch.allclose(together[:2], swapped[:2], atol=1e-3)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_out_the_same_samples(processes: int) -> None:
    batches = [list(StepBatches(3, 5, 8 // processes, 2, p, processes)) for p in range(processes)]
    for call, numbers in enumerate(zip(*batches, strict=True)):
        assert sorted(functools.reduce(operator.iadd, numbers, [])) == list(range((6 + call) * 8, (7 + call) * 8))


def test_given_pairs_are_cut_at_the_same_place(tmp_path: Path) -> None:
    hq, lq = tmp_path / "hq", tmp_path / "lq"
    for folder in (hq, lq):
        folder.mkdir()
    ramp = np.indices((128, 160)).sum(0).astype(np.uint8)
    Image.fromarray(np.stack([ramp] * 3, -1)).save(hq / "a.png")
    Image.fromarray(np.stack([ramp[::4, ::4]] * 3, -1)).save(lq / "a.jpg", quality=100)
    config = DataConfig(folder=hq, lq_folder=lq, captions="none", size=64)
    dataset = TrainingSet(open_source(config), [0], config, SampleSettings(0, 0, 0, 4, 8))
    for number in range(6):
        sample = dataset[number]
        inner = (slice(None), slice(8, -8), slice(8, -8))
        assert float((sample["hq"] - sample["lq"])[inner].abs().max()) < 0.1
    large = TrainingSet(dataset.source, [0], dataclasses.replace(config, size=136), dataset.settings)
    with pytest.raises(ImageError, match="scale 4"):
        large[0]


@pytest.fixture
def spoilt(images: Path, tmp_path: Path) -> Path:
    """The images with one cut, one without caption, one with a broken caption and one too small."""
    folder = tmp_path / "spoilt"
    shutil.copytree(images, folder)
    content = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(content[: len(content) // 2])
    (folder / "1.json").unlink()
    (folder / "3.json").write_text('{"text": "no caption"}')
    Image.new("RGB", (SIZE - 1, 200)).save(folder / "2.png")
    return folder


def test_bad_entries_are_named_before_training(make: Make, spoilt: Path) -> None:
    config = dataclasses.replace(make(), data=DataConfig(folder=spoilt, size=SIZE))
    with pytest.raises(ImageError, match="4 of 6") as caught:
        train(config)
    text = str(caught.value)
    assert all(name in text for name in ("0.png", "1.png has no caption", "3.json", "2.png of 63 x 200"))
    assert not config.output.exists()


def test_bad_entries_are_skipped_and_counted(spoilt: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(folder=spoilt, size=SIZE, on_bad="skip")
    with caplog.at_level(logging.WARNING):
        assert usable_entries(open_source(config), config) == [4, 5]
    assert "skipped 4 of 6" in caplog.text
    assert "0.png" in caplog.text
    unchecked = dataclasses.replace(config, check=False)
    assert usable_entries(open_source(unchecked), unchecked) == [0, 2, 4, 5]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("5.txt", b"gr\xfc\xdfe", "5.txt is not UTF-8 text"),
        ("5.txt", "ein Käse".encode("utf-16"), "5.txt is not UTF-8 text"),
        ("5.json", b'{"caption": "gr\xfc\xdfe"}', "5.json is not UTF-8 text"),
        ("5.json", b"[" * 100_000, "5.json has no caption"),
    ],
)
def test_captions_that_cannot_be_read_are_named(
    images: Path, tmp_path: Path, name: str, content: bytes, said: str, check: bool
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    for ending in ("txt", "json"):
        (folder / f"5.{ending}").unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    config = DataConfig(folder=folder, size=SIZE, check=check)
    with pytest.raises(ImageError, match=said):
        usable_entries(open_source(config), config)
    skipping = dataclasses.replace(config, on_bad="skip")
    assert usable_entries(open_source(skipping), skipping) == [0, 1, 2, 3, 4]


def test_pairs_that_do_not_match_are_named(images: Path, tmp_path: Path) -> None:
    partners = tmp_path / "lq"
    partners.mkdir()
    for index in range(4):
        size = (60, 50) if index else (61, 50)
        Image.new("RGB", size).save(partners / f"{index}.png")
    config = DataConfig(folder=images, lq_folder=partners, size=SIZE)
    with pytest.raises(ImageError) as caught:
        usable_entries(open_source(config), config)
    text = str(caught.value)
    assert "3 of 6" in text
    assert "4.png has no partner" in text
    assert "61 x 50 do not match" in text
    Image.new("RGB", (60, 50)).save(partners / "lonely.png")
    with pytest.raises(ImageError, match=r"lonely.png has no partner"):
        open_source(config)
    Image.new("RGB", (60, 50)).save(partners / "1.webp")
    with pytest.raises(ImageError, match=r"1.png and .*1.webp have the same name"):
        open_source(config)


def test_empty_and_missing_folders_are_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, said in (("empty", "no images"), ("missing", "no folder")):
        config = dataclasses.replace(make(), data=DataConfig(folder=tmp_path / folder, size=SIZE))
        with pytest.raises(ImageError, match=said):
            train(config)


def test_a_data_set_of_the_datasets_library(images: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = sorted(images.glob("*.png"))
    rows = {"image": [str(f) for f in files], "caption": ["a", "b", None, "d", "e", "f"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    config = DataConfig(huggingface=str(tmp_path / "set"), size=SIZE, on_bad="skip")
    source = open_source(config)
    assert usable_entries(source, config) == [0, 1, 3, 4, 5]
    sample = source.read(3)
    assert sample.caption == "d"
    assert np.array_equal(np.asarray(sample.hq), np.asarray(Image.open(files[3])))
    with pytest.raises(SettingsError, match="no column text"):
        open_source(dataclasses.replace(config, caption_column="text"))


# -- configuration ----------------------------------------------------------------------------------------------------


def test_a_configuration_without_figures_is_the_papers(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("base: sdxl\noutput: out\ndata: {folder: images}\n")
    config = read_config(tmp_path / "c.yaml")
    assert config.base == tmp_path / "sdxl"
    assert config.data.folder == tmp_path / "images"
    first, second = config.stages
    assert (first.stage, first.steps, first.learning_rate, first.warmup) == (1, 6000, 5e-5, 300)
    assert (second.stage, second.steps, second.learning_rate, second.lq_learning_rate) == (2, 40000, 5e-5, 5e-6)
    assert (config.noise_offset, config.text_dropout, config.weight_decay, config.clip) == (0.02, 0.2, 1e-2, 1.0)
    assert config.data.size == 512
    assert config.data.degradation == DegradationConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: a\noutput: b\n", "data.*missing"),
        ("base: a\noutput: b\ndata: {folder: c}\nbatchsize: 3\n", "batchsize"),
        ("base: a\noutput: b\ndata: {}\n", "folder"),
        ("base: a\noutput: b\ndata: {folder: c}\nstages: [{stage: 3, steps: 1}]\n", "stage: expected one of 1, 2"),
        ("base: a\noutput: b\ndata: {folder: c}\nstages: [{stage: 1, steps: 5.5}]\n", "steps: expected a whole number"),
        ("base: a\noutput: b\ndata: {folder: c}\nprecision: fp8\n", "precision"),
        ("base: a\noutput: b\ndata: {folder: c}\nstages: [{stage: true, steps: 1}]\n", "stage: expected one of 1, 2"),
        ("base: a\noutput: b\ndata: {folder: c}\nseed: -1\n", "seed must be"),
        (f"base: a\noutput: b\ndata: {{folder: c}}\nseed: {2**70}\n", "seed must be"),
        ("base: a\noutput: b\ndata: {folder: c}\nclip: .nan\n", "clip: expected a finite number"),
        ("base: a\noutput: b\ndata: {folder: c}\nclip: -1\n", "clip must be"),
        ("base: a\noutput: b\ndata: {folder: c}\nnoise_offset: -1\n", "noise_offset must be"),
        ("base: a\noutput: b\ndata: {folder: c}\nnoise_offset: .inf\n", "noise_offset: expected a finite number"),
        ("base: a\noutput: b\ndata: {folder: c}\nstages: [{stage: 1, steps: 1, learning_rate: -1}]\n", "learning_rate"),
        ("base: a\noutput: b\ndata: {folder: c}\nbatch: 1\nseed: 3\nbatch: 2\n", "`batch` is set twice.*4.*6"),
        ("base: a\noutput: b\ndata:\n  folder: c\n  folder: d\n", "`folder` is set twice"),
        ("base: a\noutput: ~nosuchuser/x\ndata: {folder: c}\n", "output: ~nosuchuser/x: .*Write the whole path"),
        (f"base: a\noutput: b\ndata: {{folder: c}}\nseed: {'9' * 5000}\n", "more digits than are read"),
        (f"base: a\noutput: b\ndata: {{folder: c}}\nseed: 0x{'f' * 5000}\n", "seed: expected .* at most 38 digits"),
        (f"base: a\noutput: b\ndata: {{folder: c}}\nclip: 0x{'f' * 5000}\n", "clip: expected a finite number"),
        (
            "base: a\noutput: b\ndata: {folder: c, degradation: {first: {resize_weights: [.nan, 0, 1]}}}\n",
            r"resize_weights\[0\]: expected a finite number, got nan",
        ),
        ("- base\n", "name: value"),
        ("base: [\n", "not a YAML file"),
    ],
)
def test_wrong_configurations_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SettingsError, match=said):
        read_config(tmp_path / "c.yaml")


def test_an_unquoted_no_is_a_precision(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("base: a\noutput: b\ndata: {folder: c}\nprecision: no\n")
    assert read_config(tmp_path / "c.yaml").precision == "no"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["clip", "noise_offset", "weight_decay", "learning_rate", "lq_learning_rate"])
def test_numbers_that_are_not_finite_or_negative_are_refused(make: Make, name: str, value: float) -> None:
    changed: dict[str, Any] = {name: value}
    with pytest.raises(SettingsError, match=name):
        StageConfig(1, 1, **changed) if name.endswith("rate") else make(**changed)


def test_the_command_trains(make: Make, tmp_path: Path) -> None:
    config = make()
    values = {
        "base": str(config.base),
        "output": "made",
        "data": {"folder": str(config.data.folder), "size": SIZE, "degradation": {"scale": 2}},
        "stages": [{"stage": 1, "steps": 1, "warmup": 0}],
        "batch": 1,
        "workers": 0,
        "tensorboard": False,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(tmp_path / "c.yaml")])) == 0
    assert read_faithdiff(tmp_path / "made" / "stage1.safetensors").kind == "full"


def test_wrong_base_models_are_named(make: Make, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model_index.json"):
        train(make(base=tmp_path))
    golden = ROOT / "tests" / "golden" / "faithdiff_tiny.safetensors"
    with pytest.raises(WeightsError, match="does not fit"):
        train(make(init=golden))
