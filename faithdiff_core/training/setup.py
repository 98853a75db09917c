"""How a run is really set up: accelerate's surroundings and the configuration made one, and memory and disk counted."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..dtypes import COMPUTE_DTYPES
from ..errors import SaveError, SettingsError
from .checkpoints import own_checkpoints
from .config import StageConfig, TrainConfig
from .model import FrozenModels, TrainableModel

GRACE_SECONDS = 30
"""How long `accelerate launch` waits after Ctrl-C before it kills its processes."""

DISK_SPEED = 500e6
"""Bytes per second of a usual disk, for a warning about long writes."""

logger = logging.getLogger(__name__)


def reconcile(config: TrainConfig, environment: Mapping[str, str]) -> TrainConfig:
    """Settle precision and accumulation between a configuration and `accelerate launch`, which says them too.

    A configuration that does not name them takes accelerate's. accelerate's own defaults (`no`, which it gives where
    nobody asked for anything) give way to the configuration.

    Args:
        config: the run's.
        environment: what accelerate has set.

    Raises:
        SettingsError: both name them, and differ.
    """
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if config.precision is not None and precision not in ("no", config.precision):
        raise SettingsError(
            f"precision is {config.precision} here and {precision} in accelerate's configuration. Name it in one "
            "place, or the same in both."
        )
    chosen = config.precision or precision
    known: tuple[Literal["no", "fp16", "bf16"], ...] = ("no", "fp16", "bf16")
    if chosen not in known:
        raise SettingsError(f"accelerate's configuration asks for {chosen}; supported are no, fp16 and bf16.")
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    given = int(steps) if steps.isdigit() else None
    if config.accumulate is not None and given is not None and given != config.accumulate:
        raise SettingsError(
            f"accumulate is {config.accumulate} here and gradient_accumulation_steps {given} in accelerate's "
            "configuration. Name it in one place, or the same in both."
        )
    return dataclasses.replace(config, precision=known[known.index(chosen)], accumulate=config.accumulate or given or 1)


def check_accelerator(accelerator: Any, config: TrainConfig, environment: Mapping[str, str]) -> None:
    """Compare what accelerate made with what was asked for, before anything is loaded.

    Raises:
        SettingsError: it made something else without a word, or something that training does not support.
    """
    kind = accelerator.distributed_type.value
    for variable, wanted in (("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if environment.get(variable, "").lower() in ("true", "1") and kind != wanted:
            raise SettingsError(
                f"accelerate's configuration asks for {wanted}, and accelerate made {kind} of it. With `use_cpu: true` "
                f"it does so without a word: set it to false, or leave {wanted} out."
            )
    if config.weights != "raw" and config.ema and kind == "FSDP":
        raise SettingsError("FSDP keeps each parameter in pieces, which averaging cannot follow: set `ema: 0`.")
    if kind == "FSDP" and len(config.stages) > 1:
        raise SettingsError(
            "FSDP takes a model apart once: give each stage a run of its own, and let `init` name the file of the one "
            "before."
        )
    if accelerator.gradient_accumulation_steps != config.accumulate:
        raise SettingsError(
            f"accelerate accumulates {accelerator.gradient_accumulation_steps} batches, and accumulate is "
            f"{config.accumulate}. Name it in one place, or the same in both."
        )
    if kind == "DEEPSPEED":
        _check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, config)


def _check_deepspeed(settings: dict[str, Any], config: TrainConfig) -> None:
    """Compare DeepSpeed's own configuration, and fill in what it leaves open."""
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage == 3:
        raise SettingsError("ZeRO-3 keeps each parameter in pieces, which is not supported; use ZeRO-2, or FSDP.")
    for theirs, ours in (("gradient_accumulation_steps", config.accumulate), ("gradient_clipping", config.clip)):
        value = settings.get(theirs, "auto")
        if value not in ("auto", None) and float(value) != float(ours or 0):
            raise SettingsError(
                f"DeepSpeed's {theirs} is {value}, and the run's is {ours}. Name it in one place, or the same in both."
            )
        settings[theirs] = ours
    # accelerate reads the batch size off a prepared loader; this one shares out its samples itself.
    settings["train_micro_batch_size_per_gpu"] = config.batch


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters of a run, counted.

    Attributes:
        weights: bytes of the module that learns, frozen parts of it included.
        frozen: bytes of text encoders and VAE.
        learning: the most parameters that learn in one of the stages.
    """

    weights: int
    frozen: int
    learning: int


def count(model: TrainableModel, frozen: FrozenModels, stages: tuple[StageConfig, ...]) -> Counts:
    """Count the parameters of a run; selects what learns for each stage on the way."""
    learning = 0
    for stage in stages:
        groups = model.select(stage, model.lora is not None)
        learning = max(learning, sum(p.numel() for group in groups for p in group["params"]))
    return Counts(sum(p.numel() * p.element_size() for p in model.parameters()), frozen.bytes, learning)


def memory(
    counts: Counts, *, averages: bool, distributed: str = "NO", processes: int = 1, half: bool = False
) -> dict[str, int]:
    """Bytes on each device by what they are for, without activations.

    Args:
        counts: the run's parameters.
        averages: whether averaged weights are kept.
        distributed: accelerate's word; DEEPSPEED means ZeRO-2 (gradients, optimizer and master weights shared out),
            FSDP that the weights are shared out too.
        processes: how many share.
        half: whether DeepSpeed keeps half-precision weights with float32 masters.
    """
    share = processes if distributed in ("DEEPSPEED", "FSDP") else 1
    masters = distributed == "DEEPSPEED" and half
    return {
        "weights": (counts.weights // 2 if masters else counts.weights) // (share if distributed == "FSDP" else 1),
        "gradients": (2 if masters else 4) * counts.learning // share,
        "optimizer": (12 if masters else 8) * counts.learning // share,
        "averages": 4 * counts.learning if averages else 0,
        "text encoders and VAE": counts.frozen,
    }


@dataclasses.dataclass(frozen=True)
class Setup:
    """The set-up of a run as it is, for people and for `run.json`.

    Attributes:
        processes: how many take part; `distributed` is how, in accelerate's words.
        device: kind of the devices.
        precision: of the computation.
        batch, accumulate: as configured; `samples_per_step` is their product with the processes.
        steps: of each stage.
        images: in the training set.
        memory: bytes on each device by what they are for, without activations.
        checkpoint: bytes of a checkpoint, and `keep` how many stay.
        free: bytes on the output folder's disk.
    """

    processes: int
    distributed: str
    device: str
    precision: str
    batch: int
    accumulate: int
    samples_per_step: int
    steps: list[int]
    images: int
    memory: dict[str, int]
    checkpoint: int
    keep: int
    free: int

    def lines(self) -> list[str]:
        """The set-up in a few lines."""
        shares = ", ".join(f"{name} {_gb(size)}" for name, size in self.memory.items() if size)
        return [
            f"{self.processes} process(es) on {self.device} ({self.distributed}), precision {self.precision}; batch "
            f"{self.batch} x accumulate {self.accumulate} x processes {self.processes} = {self.samples_per_step} "
            "samples a step",
            f"steps: {' + '.join(map(str, self.steps))}; {self.images} images",
            f"memory on each device: {_gb(sum(self.memory.values()))} without activations ({shares})",
            f"checkpoint: {_gb(self.checkpoint)}; {self.keep} are kept and one more is written, "
            f"{_gb(self.checkpoint * (self.keep + 1))}; {_gb(self.free)} are free",
        ]


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def describe(config: TrainConfig, accelerator: Any, counts: Counts, images: int) -> Setup:
    """The set-up of a run."""
    assert config.precision is not None
    assert config.accumulate is not None
    kind, processes = accelerator.distributed_type.value, accelerator.num_processes
    averages = bool(config.ema) and config.weights != "raw"
    output = next(p for p in (config.output, *config.output.parents) if p.exists())
    state = counts.weights + 8 * counts.learning + (4 * counts.learning if averages else 0)
    return Setup(
        processes=processes,
        distributed=kind,
        device=accelerator.device.type,
        precision=config.precision,
        batch=config.batch,
        accumulate=config.accumulate,
        samples_per_step=config.batch * config.accumulate * processes,
        steps=[stage.steps for stage in config.stages],
        images=images,
        memory=memory(
            counts, averages=averages, distributed=kind, processes=processes, half=config.precision in COMPUTE_DTYPES
        ),
        checkpoint=state,
        keep=config.keep,
        free=shutil.disk_usage(output).free,
    )


def check_disk(setup: Setup, output: Path, run: str, launched: bool) -> None:
    """Say what the checkpoints need, before the first step.

    Args:
        setup: the run's.
        output: its folder.
        run: its name; checkpoints of its own that are there already will be replaced.
        launched: whether `accelerate launch` started the process.

    Raises:
        SaveError: there is not room for a single checkpoint.
    """
    if setup.free < setup.checkpoint:
        raise SaveError(
            f"{output}: a checkpoint takes {_gb(setup.checkpoint)}, and {_gb(setup.free)} are free. Make space, or "
            "choose an output folder on another disk."
        )
    missing = setup.checkpoint * (setup.keep + 1 - min(setup.keep, len(own_checkpoints(output, run)))) - setup.free
    if missing > 0:
        logger.warning(
            "%s: with `keep: %d` the checkpoints will need %s more than is free", output, setup.keep, _gb(missing)
        )
    if launched and setup.checkpoint / DISK_SPEED > GRACE_SECONDS:
        logger.warning(
            "a checkpoint of %s may take longer than the %d s after which `accelerate launch` kills its processes on "
            "Ctrl-C; to stop without a limit of time, make an empty file %s",
            _gb(setup.checkpoint),
            GRACE_SECONDS,
            output / "stop",
        )
