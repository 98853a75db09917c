"""From a configuration to a run: everything that can be known is checked before the first step."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import torch

from ..dtypes import COMPUTE_DTYPES
from ..errors import FaithDiffError, MissingPackageError, install_extra
from .checkpoints import claim, going_on, new_identity, remove_leftovers, saving, set_apart
from .config import TrainConfig
from .data import Source, open_source
from .data_check import REMEMBER_FAILED_FROM, DataMemory, run_entries
from .files import finished_files
from .loop import Run, TrainResult
from .model import FrozenModels, TrainableModel, load_models
from .samples import SampleSettings, TrainingSet, validation_pairs
from .setup import check_accelerator, check_disk, count, describe, reconcile

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> TrainResult:
    """Run a configuration's stages, from the newest checkpoint if there is one.

    Files `stage1.safetensors`, `stage1_adapter.safetensors` and so on are written to the output folder at the end of
    each stage. A run that has finished before is not trained again.

    Raises:
        FaithDiffError: bad settings, data or weights, before any training; weights or gradients that are not finite;
            a checkpoint that cannot be written.
    """
    config = reconcile(config, os.environ)
    accelerator = _accelerator(config)
    check_accelerator(accelerator, config, os.environ)
    now = new_identity(config, accelerator.num_processes, accelerator.distributed_type.value)
    identity, checkpoints = _on_main(accelerator, lambda: going_on(config.output, now, config.resume))
    source, entries = _entries(accelerator, config, bool(checkpoints))
    files = finished_files(config, checkpoints)
    if files is not None:
        logger.info("%s has finished; its files are %s", config.output, ", ".join(f.name for f in files))
        return TrainResult(True, 0, [], files)
    validation = (
        []
        if config.validation is None
        else validation_pairs(config.validation.folder, config.validation.count, config.data, config.seed)
    )
    model, frozen = _models(config, accelerator.device)
    settings = SampleSettings(
        config.seed, config.text_dropout, config.noise_offset, frozen.latent_channels, frozen.latent_scale, config.draws
    )
    dataset = TrainingSet(source, entries, config.data, settings)
    setup = describe(config, accelerator, count(model, frozen, config.stages), len(entries))

    def prepare_folder() -> None:
        if not config.resume:
            set_apart(config.output)
        remove_leftovers(config.output)
        for line in setup.lines():
            logger.info("%s", line)
        check_disk(setup, config.output, identity.run, "TORCHELASTIC_RUN_ID" in os.environ)
        claim(config.output, identity, dataclasses.asdict(setup))

    _on_main(accelerator, prepare_folder)
    run = Run(config, accelerator, model, frozen, dataset, identity, setup, validation)
    accelerator.init_trackers("train")
    try:
        with run.stop.listening():
            finished = run.all_stages(checkpoints)
    finally:
        accelerator.end_training()
    return TrainResult(finished, len(run.losses), run.losses, run.files)


def _accelerator(config: TrainConfig) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration, set_seed
    except ImportError as error:
        raise MissingPackageError(f"Training needs accelerate; {install_extra('train')}.") from error
    if config.tensorboard:
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise MissingPackageError(
                f"`tensorboard: true` needs tensorboard; {install_extra('train')}, or set it to false."
            ) from error
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        log_with="tensorboard" if config.tensorboard else None,
        project_config=ProjectConfiguration(str(config.output), logging_dir=str(config.output / "logs")),
    )
    set_seed(config.seed)
    return accelerator


def _on_main(accelerator: Any, work: Any) -> Any:
    """Do something in the main process; its result, or its error, is that of all processes."""
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except FaithDiffError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _entries(accelerator: Any, config: TrainConfig, begun: bool) -> tuple[Source, list[int]]:
    """Open the images, and look at them in the main process."""
    source = open_source(config.data)

    def look() -> list[str]:
        memory = DataMemory.read(config.output)
        try:
            run_entries(source, config.data, memory, begun)
        except FaithDiffError:
            if len(source) >= REMEMBER_FAILED_FROM:
                memory.write(config.output)
            raise
        with saving(config.output):
            memory.write(config.output)
        return memory.order

    return source, source.pin(_on_main(accelerator, look))[0]


def _models(config: TrainConfig, device: torch.device) -> tuple[TrainableModel, FrozenModels]:
    model, frozen = load_models(config.base, config.init)
    half = config.frozen_precision == "run" and config.precision in COMPUTE_DTYPES
    dtype = COMPUTE_DTYPES[str(config.precision)] if half else torch.float32
    frozen.to(device, dtype)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.lora is not None:
        model.add_lora(config.lora, dtype)
    return model, frozen
