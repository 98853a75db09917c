"""Training on Hugging Face accelerate: one device or many, by accelerate's own configuration."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..dtypes import COMPUTE_DTYPES
from ..errors import MissingPackageError, SettingsError, install_extra
from ..sampling.schedule import alphas_cumprod, leading_timesteps, sampling_sigmas
from .config import StageConfig, TrainConfig
from .data import SampleSettings, StepBatches, TrainingSet, collate, open_source, usable_entries, validation_pairs
from .degradation import to_image
from .model import FrozenModels, TrainableModel, add_lora, load_models, time_ids, trainable

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in the output folder."""

RESUME_MUTABLE_FIELDS = (
    "output",
    "workers",
    "checkpoint_every",
    "keep",
    "resume",
    "log_every",
    "tensorboard",
    "validation",
)
"""Settings that may differ between a checkpoint and the run that goes on from it."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class TrainState:
    """Where a run is: the stage's index in the configuration, and the steps done in it."""

    stage: int = 0
    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stage, self.step = state["stage"], state["step"]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What came of a run.

    Attributes:
        finished: False if it was stopped.
        steps: optimiser steps done in this run, over all stages.
        losses: mean loss of each of them.
        files: the finished files.
    """

    finished: bool
    steps: int
    losses: list[float]
    files: list[Path]


class _Stop:
    """Notes Ctrl-C or a termination request, so that the step at work is finished and saved first."""

    def __init__(self) -> None:
        self.asked = False

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def train(config: TrainConfig) -> TrainResult:
    """Run a configuration's stages, from the newest checkpoint if there is one.

    Files `stage1.safetensors`, `stage1_adapter.safetensors` and so on are written to the output folder at the end of
    each stage, with the averaged weights; the next stage goes on from these.

    Raises:
        FaithDiffError: bad settings, data or weights; before any training.
    """
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
    source = open_source(config.data)
    entries = usable_entries(source, config.data)
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        log_with="tensorboard" if config.tensorboard else None,
        project_config=ProjectConfiguration(str(config.output), logging_dir=str(config.output / "logs")),
    )
    if config.ema and accelerator.distributed_type.value == "FSDP":
        raise SettingsError("FSDP keeps each parameter in pieces, which averaging cannot follow: set `ema: 0`.")
    set_seed(config.seed)
    model, frozen = load_models(config.base, config.init)
    frozen.to(accelerator.device)
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if config.lora is not None:
        add_lora(model.unet, config.lora)
    settings = SampleSettings(
        config.seed, config.text_dropout, config.noise_offset, frozen.latent_channels, frozen.latent_scale, config.draws
    )
    dataset = TrainingSet(source, entries, config.data, settings)
    if accelerator.is_main_process:
        config.output.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    run = _Run(config, accelerator, model, frozen, dataset)
    accelerator.init_trackers("train")
    try:
        with run.stop.listening():
            finished = run.all_stages()
    finally:
        accelerator.end_training()
    return TrainResult(finished, len(run.losses), run.losses, run.files)


class _StageState:
    """What a stage brings besides its optimiser, for accelerate's checkpoints."""

    schedule: Any = None
    ema: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": self.schedule.state_dict(), "ema": None if self.ema is None else self.ema.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


class _Run:
    def __init__(
        self, config: TrainConfig, accelerator: Any, model: TrainableModel, frozen: FrozenModels, dataset: TrainingSet
    ) -> None:
        self.config, self.accelerator, self.model, self.frozen = config, accelerator, model, frozen
        self.dataset = dataset
        self.place = TrainState()
        self.stop = _Stop()
        self.losses: list[float] = []
        self.files: list[Path] = []
        self.abar = alphas_cumprod().to(accelerator.device)
        self.state = _StageState()
        accelerator.register_for_checkpointing(self.state)

    # -- stages ---------------------------------------------------------------------------------------------------

    def all_stages(self) -> bool:
        """Run what is left of the stages; False if stopped on the way."""
        resume = latest_checkpoint(self.config.output) if self.config.resume else None
        if resume is not None:
            check_same_run(resume, self.config)
            self.place.load_state_dict(json.loads((resume / "place.json").read_text()))
            logger.info("going on from %s", resume)
        while self.place.stage < len(self.config.stages):
            if not self._stage(self.config.stages[self.place.stage], resume):
                return False
            resume = None
            self.place.stage, self.place.step = self.place.stage + 1, 0
        return True

    def _stage(self, stage: StageConfig, resume: Path | None) -> bool:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel
        from tqdm.auto import tqdm

        accelerator, config = self.accelerator, self.config
        groups = self.model.select(stage, config.lora is not None)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=config.weight_decay)
        # Not prepared by accelerate, which would step it once for every process.
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=stage.warmup, num_training_steps=stage.steps)
        if accelerator.distributed_type.value == "DEEPSPEED":
            # accelerate reads the batch size off a prepared loader; this one shares out its samples itself.
            accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch
        model, prepared = accelerator.prepare(self.model, optimizer)
        self.state.schedule, self.state.ema = schedule, None
        if config.ema:
            self.state.ema = EMAModel(list(trainable(self.model)), decay=config.ema)
            self.state.ema.to(accelerator.device)
        if resume is not None:
            accelerator.load_state(str(resume))
        loader = self._loader(stage)
        first = self.place.step
        bar = tqdm(
            total=stage.steps, initial=first, desc=f"stage {stage.stage}", disable=not accelerator.is_main_process
        )
        model.train()
        batches = iter(loader)
        stopped = False
        for step in range(first, stage.steps):
            loss = torch.zeros((), device=accelerator.device)
            for _ in range(config.accumulate):
                with accelerator.accumulate(model):
                    part = self._loss(model, next(batches))
                    accelerator.backward(part)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(list(trainable(self.model)), config.clip)
                    prepared.step()
                    prepared.zero_grad()
                    loss += part.detach() / config.accumulate
            schedule.step()
            if self.state.ema is not None:
                self.state.ema.step(list(trainable(self.model)))
            self.place.step = step + 1
            mean = float(accelerator.reduce(loss, reduction="mean"))
            self.losses.append(mean)
            bar.update()
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            self._after_step(stage, mean, schedule)
            if self._stopping():
                stopped = True
                break
        bar.close()
        if stopped and self.place.step < stage.steps:
            self._save_checkpoint()
            logger.warning("stopped at step %d of stage %d; the state is saved", self.place.step, stage.stage)
            return False
        self._finish_stage(stage)
        accelerator.free_memory()  # the next stage brings an optimiser of its own
        return not stopped or self.place.stage + 1 == len(config.stages)

    def _loader(self, stage: StageConfig) -> DataLoader[dict[str, Any]]:
        before = sum(s.steps for s in self.config.stages[: self.place.stage])
        numbers = StepBatches(
            before + self.place.step,
            before + stage.steps,
            self.config.batch,
            self.config.accumulate,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return DataLoader(
            self.dataset,
            batch_sampler=numbers,
            collate_fn=collate,
            # Its own, because starting workers draws a number, and resuming must not shift what torch draws.
            generator=torch.Generator(),
            num_workers=self.config.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Mean absolute error on the noise (Algorithm 1)."""
        device = self.accelerator.device
        hq, lq, noise, posterior, steps = (
            batch[k].to(device, non_blocking=True) for k in ("hq", "lq", "noise", "posterior", "timestep")
        )
        latents = self.frozen.latents(hq, posterior)
        context, pooled = self.frozen.encode_texts(batch["caption"], device)
        ids = time_ids(len(hq), self.config.data.size, device)
        # Rows of the U-Net: the draws of the first image, then those of the second, and so on.
        latents, context, pooled, ids = (
            part.repeat_interleave(self.config.draws, dim=0) for part in (latents, context, pooled, ids)
        )
        noise, steps = noise.flatten(0, 1), steps.flatten()
        abar = self.abar[steps].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        with self.accelerator.autocast():
            predicted = model(noisy, steps, context, pooled, ids, lq)
        return (predicted.float() - noise).abs().mean()

    # -- between steps --------------------------------------------------------------------------------------------

    def _after_step(self, stage: StageConfig, loss: float, schedule: Any) -> None:
        config, step = self.config, self.place.step
        if step % config.log_every == 0 or step == stage.steps:
            rates = schedule.get_last_lr()
            values = {f"stage{stage.stage}/loss": loss} | {
                f"stage{stage.stage}/{name}": rate
                for name, rate in zip(("learning_rate", "lq_learning_rate"), rates, strict=False)
            }
            self.accelerator.log(values, step=step)
        if config.validation is not None and (step % config.validation.every == 0 or step == stage.steps):
            self._sample(stage)
        if step % config.checkpoint_every == 0 and step < stage.steps:
            self._save_checkpoint()

    def _stopping(self) -> bool:
        """Whether any process was asked to stop; all must agree, or they would wait for each other."""
        if self.accelerator.num_processes == 1:
            return self.stop.asked
        asked = torch.tensor(float(self.stop.asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, reduction="sum") > 0)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place."""
        if self.state.ema is None:
            yield
            return
        parameters = list(trainable(self.model))
        self.state.ema.store(parameters)
        self.state.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.state.ema.restore(parameters)

    def _sample(self, stage: StageConfig) -> None:
        """Write sample images (low quality | restored | high quality) and log their PSNR."""
        assert self.config.validation is not None
        if not self.accelerator.is_main_process:
            return
        validation = self.config.validation
        folder = self.config.output / "samples"
        folder.mkdir(exist_ok=True)
        self.model.eval()
        scores = []
        with self._averaged():
            pairs = validation_pairs(validation.folder, validation.count, self.config.data, self.config.seed)
            for index, (hq, lq) in enumerate(pairs):
                restored = sample(
                    self.model, self.frozen, lq[None], validation.steps, self.config.seed, self.accelerator.device
                )[0].cpu()
                scores.append(float(10 * torch.log10(4 / (restored - hq).square().mean().clamp(min=1e-12))))
                sheet = torch.cat([lq, restored, hq], dim=2) / 2 + 0.5
                to_image(sheet).save(folder / f"stage{stage.stage}-{self.place.step:08d}-{index}.png")
        self.model.train()
        self.accelerator.log({f"stage{stage.stage}/psnr": sum(scores) / len(scores)}, step=self.place.step)

    # -- files ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """Write a checkpoint beside the others and give it its name last, so that a named one is whole."""
        accelerator = self.accelerator
        folder = self.config.output / CHECKPOINTS
        name = f"stage{self.place.stage:02d}-{self.place.step:08d}"
        unfinished = folder / f".{name}.unfinished"
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (unfinished / "place.json").write_text(json.dumps(self.place.state_dict()))
            (unfinished / "config.json").write_text(json.dumps(as_plain(self.config), indent=1))
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(unfinished, folder / name)
            for old in named_checkpoints(self.config.output)[: -self.config.keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def _finish_stage(self, stage: StageConfig) -> None:
        """Go on from the averaged weights, and write the stage's files."""
        if self.state.ema is not None:
            self.state.ema.copy_to(list(trainable(self.model)))
        if self.accelerator.is_main_process:
            self.files += write_files(self.model, self.config, f"stage{stage.stage}")
        self.accelerator.wait_for_everyone()


def write_files(model: TrainableModel, config: TrainConfig, name: str) -> list[Path]:
    """Write the full and the adapter-only file of a model.

    Returns:
        NAME.safetensors and NAME_adapter.safetensors in the output folder.
    """
    from safetensors.torch import save_file

    paths = []
    for suffix, adapter_only in (("", False), ("_adapter", True)):
        path = config.output / f"{name}{suffix}.safetensors"
        state = model.published(adapter_only=adapter_only, dtype=COMPUTE_DTYPES[config.save_precision])
        unfinished = path.with_name(f".{path.name}.unfinished")
        save_file(state, str(unfinished), metadata={"format": "pt"})
        os.replace(unfinished, path)
        paths.append(path)
    return paths


@torch.no_grad()
def sample(
    model: TrainableModel, frozen: FrozenModels, lq: Tensor, steps: int, seed: int, device: torch.device
) -> Tensor:
    """Restore images in one piece with Euler steps from noise, without guidance and with the empty caption.

    Args:
        model: in evaluation mode.
        frozen: VAE and text encoders.
        lq: (B, 3, H, W) in [-1, 1].
        steps: Euler steps.
        seed: of the noise.
        device: where to compute.

    Returns:
        (B, 3, H, W) in [-1, 1].
    """
    lq = lq.to(device)
    batch, scale = len(lq), frozen.latent_scale
    shape = (batch, frozen.latent_channels, lq.shape[2] // scale, lq.shape[3] // scale)
    sigmas = sampling_sigmas(steps).to(device)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device) * (sigmas[0] ** 2 + 1) ** 0.5
    context, pooled = frozen.encode_texts([""] * batch, device)
    ids = time_ids(batch, lq.shape[2], device)
    for index, timestep in enumerate(leading_timesteps(steps)):
        scaled = x / (sigmas[index] ** 2 + 1) ** 0.5
        noise = model(scaled, timestep.expand(batch).to(device), context, pooled, ids, lq)
        x = x + (sigmas[index + 1] - sigmas[index]) * noise
    return frozen.decode(x)


def named_checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of an output folder, oldest first."""
    return sorted(p for p in (output / CHECKPOINTS).glob("stage*") if p.is_dir())


def latest_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = named_checkpoints(output)
    return found[-1] if found else None


def as_plain(config: TrainConfig) -> dict[str, Any]:
    """A configuration as JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return plain


def check_same_run(checkpoint: Path, config: TrainConfig) -> None:
    """Compare a checkpoint's configuration with the one at hand.

    Raises:
        SettingsError: they differ in something that changes what is learned.
    """
    then, now = json.loads((checkpoint / "config.json").read_text()), as_plain(config)
    different = [k for k in now if k not in RESUME_MUTABLE_FIELDS and then.get(k) != now[k]]
    if different:
        raise SettingsError(
            f"{checkpoint} was made with other settings ({', '.join(different)}). Restore them, choose another output "
            f"folder, or set `resume: false` to begin again."
        )
