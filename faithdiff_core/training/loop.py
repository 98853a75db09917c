"""Training on Hugging Face accelerate: one device or many, by accelerate's own configuration."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import FaithDiffError, ImageError, NotFiniteError, SaveError, SettingsError
from ..sampling.schedule import alphas_cumprod, prediction_target
from .averages import AveragedWeights
from .checkpoints import RunIdentity, TrainState, save_checkpoint, usable
from .config import StageConfig, TrainConfig
from .data import named_problems
from .files import first_not_finite, gathered_state, write_files
from .model import FrozenModels, TrainableModel, trainable
from .samples import GuardedSamples, StepBatches, TrainingSet, collate
from .setup import Setup
from .stopping import STOP_FILE, Stop
from .validation import SAMPLES, psnr, sample, write_sheet

MAX_SKIPPED_STEPS = 40
"""Steps in a row that fp16's loss scaler may skip: by then it has fallen by 2^40, and the gradients are broken."""

TIMED_STEPS = 20
"""After so many steps the time that a step takes is said."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        finished: False if it was stopped.
        steps: optimizer steps done in this run, over all stages.
        losses: mean loss of each of them.
        files: the finished files.
    """

    finished: bool
    steps: int
    losses: list[float]
    files: list[Path]


class _StageState:
    """What a stage has besides its optimizer, for accelerate's checkpoints."""

    schedule: Any = None
    ema: AveragedWeights | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": self.schedule.state_dict(), "ema": None if self.ema is None else self.ema.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


class Run:
    """A run from its first step, or from a checkpoint, to its finished files."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Any,
        model: TrainableModel,
        frozen: FrozenModels,
        dataset: TrainingSet,
        identity: RunIdentity,
        setup: Setup,
        validation: list[tuple[Tensor, Tensor]],
    ) -> None:
        self.config, self.accelerator, self.model, self.frozen = config, accelerator, model, frozen
        self.dataset, self.identity, self.setup, self.validation = dataset, identity, setup, validation
        self.wrapped: Any = model
        self.place = TrainState()
        self.saved: TrainState | None = None
        self.between_steps = True
        self.stop = Stop()
        self.losses: list[float] = []
        self.files: list[Path] = []
        self.skipped_images: dict[str, str] = {}
        self.skipped_steps = 0
        self.abar = alphas_cumprod().to(accelerator.device)
        self.state = _StageState()
        accelerator.register_for_checkpointing(self.state)
        (config.output / STOP_FILE).unlink(missing_ok=True)

    # -- stages ---------------------------------------------------------------------------------------------------

    def all_stages(self, checkpoints: list[Path]) -> bool:
        """Run what is left of the stages; False if stopped on the way.

        Args:
            checkpoints: to go on from, newest first; one that is truncated gives way to the next.
        """
        from accelerate.utils import broadcast_object_list

        chosen = [usable(checkpoints) if self.accelerator.is_main_process else None]
        resume = broadcast_object_list(chosen)[0]
        if resume is not None:
            self.place.load_state_dict(json.loads((resume / "place.json").read_text()))
            self.saved = dataclasses.replace(self.place)
            logger.info("going on from %s", resume)
        while self.place.stage < len(self.config.stages):
            if not self._stage(self.config.stages[self.place.stage], resume):
                return False
            resume = None
            self.place.stage, self.place.step = self.place.stage + 1, 0
        return True

    def _stage(self, stage: StageConfig, resume: Path | None) -> bool:
        from tqdm.auto import tqdm

        optimizer = self._prepare(stage, resume)
        first = self.place.step
        bar = tqdm(
            total=stage.steps,
            initial=first,
            desc=f"stage {stage.stage}",
            disable=not self.accelerator.is_main_process,
        )
        self.wrapped.train()
        batches = iter(self._loader(stage))
        started, stopped = time.monotonic(), False
        try:
            for step in range(first, stage.steps):
                mean = self._step(stage, optimizer, batches)
                self.losses.append(mean)
                bar.update()
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                if step + 1 - first == TIMED_STEPS and stage.steps > step + 1:
                    self._say_time((time.monotonic() - started) / TIMED_STEPS, stage.steps - step - 1)
                self._after_step(stage, mean)
                if self._stopping():
                    stopped = True
                    break
        except Exception as error:
            self._rescue(error)
            raise
        finally:
            bar.close()
        if stopped and self.place.step < stage.steps:
            self._save_checkpoint()
            if self.accelerator.is_main_process:
                logger.warning("stopped at step %d of stage %d; the state is saved", self.place.step, stage.stage)
            return False
        self._finish_stage(stage)
        self.accelerator.free_memory()  # the next stage has an optimizer of its own
        return not stopped or self.place.stage + 1 == len(self.config.stages)

    def _prepare(self, stage: StageConfig, resume: Path | None) -> Any:
        """Make the stage's optimizer, schedule and averages, and load a checkpoint into them; gives the optimizer."""
        from diffusers.optimization import get_scheduler

        accelerator, config = self.accelerator, self.config
        groups = self.model.select(stage, config.lora is not None)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=config.weight_decay)
        # Not prepared by accelerate, which would step it once for every process.
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=stage.warmup, num_training_steps=stage.steps)
        self.wrapped, prepared = accelerator.prepare(self.model, optimizer)
        self.state.schedule, self.state.ema = schedule, None
        if config.ema and config.weights != "raw":
            self.state.ema = AveragedWeights(list(trainable(self.model)), config.ema)
        if resume is not None:
            try:
                accelerator.load_state(str(resume))
            except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
                raise SettingsError(
                    f"{resume} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
                    "Remove it, and the same command goes on from the one before."
                ) from error
            # A stage with more steps than before has other rates from here on; else these are the same.
            for group, base, rate in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = base * rate(schedule.last_epoch)
        return prepared

    def _loader(self, stage: StageConfig) -> DataLoader[dict[str, Any]]:
        before = sum(s.steps for s in self.config.stages[: self.place.stage])
        assert self.config.accumulate is not None
        numbers = StepBatches(
            before + self.place.step,
            before + stage.steps,
            self.config.batch,
            self.config.accumulate,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return DataLoader(
            GuardedSamples(self.dataset),
            batch_sampler=numbers,
            collate_fn=collate,
            # Its own, because starting workers draws a number, and resuming must not shift what torch draws.
            generator=torch.Generator(),
            num_workers=self.config.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    # -- a step ---------------------------------------------------------------------------------------------------

    def _step(self, stage: StageConfig, optimizer: Any, batches: Iterator[dict[str, Any]]) -> float:
        """One optimizer step; gives the mean loss over all processes.

        Raises:
            NotFiniteError: loss or gradients are not finite. The weights are then as before the step.
        """
        accelerator, config = self.accelerator, self.config
        assert config.accumulate is not None
        loss = torch.zeros((), device=accelerator.device)
        mean = math.nan
        for part in range(config.accumulate):
            batch = self._next(batches)
            # What the model draws (a LoRA's dropout) hangs on the step, too, and not on what was drawn before.
            parts = [config.seed, 5, self.place.stage, self.place.step, part, accelerator.process_index]
            torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1)))
            with accelerator.accumulate(self.wrapped):
                one = self._loss(batch)
                accelerator.backward(one)
                loss += one.detach() / config.accumulate
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self._clipped(), config.clip)
                    mean = self._check_finite(stage, loss, norm)
                    self.between_steps = False
                optimizer.step()
                optimizer.zero_grad()
        self.state.schedule.step()
        if self.state.ema is not None and not optimizer.step_was_skipped:
            self.state.ema.update(list(trainable(self.model)))
        self.place.step += 1
        self.between_steps = True
        return mean

    def _clipped(self) -> list[Any]:
        """The parameters to clip; FSDP sums up the norm over the processes for its own whole list only."""
        whole = self.accelerator.distributed_type.value == "FSDP"
        return list(self.wrapped.parameters()) if whole else list(trainable(self.model))

    def _check_finite(self, stage: StageConfig, loss: Tensor, norm: Any) -> float:
        """The mean loss over all processes, if it and the gradients' norm are finite.

        fp16's scaler explains a norm that is not: it skips that step and lowers its scale, within bounds.
        """
        mean = float(self.accelerator.reduce(loss, reduction="mean"))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        total = math.nan if norm is None else float(norm)
        scaler = self.accelerator.scaler
        scaled = (scaler is not None and scaler.is_enabled()) or self.config.precision == "fp16"
        finite = norm is None or math.isfinite(total)
        self.skipped_steps = 0 if finite else self.skipped_steps + 1
        if math.isfinite(mean) and (finite or (scaled and self.skipped_steps <= MAX_SKIPPED_STEPS)):
            return mean
        what = f"the loss is {mean}" if not math.isfinite(mean) else f"the norm of the gradients is {total}"
        raise NotFiniteError(
            f"Training stopped at step {self.place.step + 1} of stage {stage.stage}: {what}. The checkpoints from "
            "before are kept and nothing was written. Lower the learning rate, or use `precision: bf16` instead of "
            "fp16, in another output folder; `init` can start from a finished file."
        )

    def _next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch; a failure in one process is one in all, so that all can save.

        Raises:
            ImageError: an image is bad, and the configuration does not skip it, or too many were skipped.
        """
        batch = next(batches)
        failed = batch.get("failed")
        for key, text in batch.get("skipped", []):
            if key not in self.skipped_images:
                self.skipped_images[key] = text
                logger.warning("skipped image %d of this run: %s", len(self.skipped_images), text)
        limit = max(1, int(self.config.data.max_bad * len(self.dataset)))
        if failed is None and len(self.skipped_images) > limit:
            failed = (
                f"{len(self.skipped_images)} of {len(self.dataset)} images turned out bad, more than `max_bad: "
                f"{self.config.data.max_bad:g}` allows: {named_problems(list(self.skipped_images.values()))}"
            )
        if self.accelerator.num_processes > 1:
            bad = torch.tensor(float(failed is not None), device=self.accelerator.device)
            if float(self.accelerator.reduce(bad, reduction="sum")) > 0 and failed is None:
                failed = "another process met a bad image"
        if failed is not None:
            raise ImageError(failed)
        return batch

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean absolute error on the noise (Algorithm 1), or on v for a U-Net that predicts it."""
        device = self.accelerator.device
        hq, lq, noise, posterior, steps = (
            batch[k].to(device, non_blocking=True) for k in ("hq", "lq", "noise", "posterior", "timestep")
        )
        latents = self.frozen.latents(hq, posterior)
        context, pooled = self.frozen.encode_texts(batch["caption"], device)
        ids = batch["time_ids"].to(device)
        # Rows of the U-Net: the draws of the first image, then those of the second, and so on.
        latents, context, ids = (part.repeat_interleave(self.config.draws, dim=0) for part in (latents, context, ids))
        if pooled is not None:
            pooled = pooled.repeat_interleave(self.config.draws, dim=0)
        noise, steps = noise.flatten(0, 1), steps.flatten()
        abar = self.abar[steps].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        with self.accelerator.autocast():
            predicted = self.wrapped(noisy, steps, context, pooled, ids, lq)
        return (predicted.float() - prediction_target(self.model.prediction, latents, noise, abar)).abs().mean()

    # -- between steps --------------------------------------------------------------------------------------------

    def _after_step(self, stage: StageConfig, loss: float) -> None:
        config, step = self.config, self.place.step
        if step % config.log_every == 0 or step == stage.steps:
            rates = self.state.schedule.get_last_lr()
            values = {f"stage{stage.stage}/loss": loss} | {
                f"stage{stage.stage}/{name}": rate
                for name, rate in zip(("learning_rate", "lq_learning_rate"), rates, strict=False)
            }
            self.accelerator.log(values, step=step)
        if step % config.checkpoint_every == 0 or step == stage.steps:
            self._save_checkpoint()
        if config.validation is not None and (step % config.validation.every == 0 or step == stage.steps):
            self._sample(stage)

    def _say_time(self, seconds: float, left: int) -> None:
        if self.accelerator.is_main_process:
            logger.info("%.2f s a step; about %.1f h for the %d steps left", seconds, seconds * left / 3600, left)

    def _stopping(self) -> bool:
        """Whether any process was asked to stop; all must agree, or they would wait for each other."""
        asked = self.stop.asked
        if self.accelerator.is_main_process:
            asked = asked or (self.config.output / STOP_FILE).exists()
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def _sample(self, stage: StageConfig) -> None:
        """Write sample images (low quality | restored | high quality) and log their PSNR."""
        assert self.config.validation is not None
        # Under FSDP no process has the whole model, so all compute the same.
        sharded = self.accelerator.distributed_type.value == "FSDP"
        if not (sharded or self.accelerator.is_main_process):
            return
        model = self.wrapped if sharded else self.model
        model.eval()
        averages, scores = self.state.ema, []
        weights = nullcontext() if averages is None else averages.in_place_of(list(trainable(self.model)))
        with weights:
            for index, (hq, lq) in enumerate(self.validation):
                restored = sample(
                    model,
                    self.frozen,
                    lq[None],
                    self.config.validation.steps,
                    self.config.seed,
                    self.abar.device,
                    self.model.prediction,
                )[0].cpu()
                scores.append(psnr(restored, hq))
                if self.accelerator.is_main_process:
                    name = f"stage{stage.stage}-{self.place.step:08d}-{index}.png"
                    write_sheet(self.config.output / SAMPLES / name, lq, restored, hq)
        model.train()
        self.accelerator.log({f"stage{stage.stage}/psnr": sum(scores) / len(scores)}, step=self.place.step)

    # -- files ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """Write a checkpoint of the present step, unless there is one.

        Raises:
            NotFiniteError: a weight is not finite; the older checkpoints stay.
            SaveError: it cannot be written.
        """
        if self.saved == self.place:
            return
        self._check_weights()
        save_checkpoint(
            self.accelerator, self.config.output, self.identity, self.place, self.config.keep, self.setup.checkpoint
        )
        self.saved = dataclasses.replace(self.place)

    def _check_weights(self) -> None:
        named = [(name, p.detach()) for name, p in self.model.named_parameters() if p.requires_grad]
        broken = first_not_finite(named)
        if broken is None and self.state.ema is not None:
            broken = first_not_finite([(name, s) for (name, _), s in zip(named, self.state.ema.shadows, strict=True)])
        if broken is not None:
            raise NotFiniteError(
                f"Training stopped after step {self.place.step} of stage {self.place.stage + 1}: {broken} has values "
                "that are NaN or infinite. The checkpoints from before are kept. Lower the learning rate, in another "
                "output folder."
            )

    def _rescue(self, error: Exception) -> None:
        """Save the last finished step before an error ends the run, where that can be done."""
        agreed = isinstance(error, ImageError) or self.accelerator.num_processes == 1
        if not agreed or not self.between_steps or isinstance(error, (NotFiniteError, SaveError)):
            return
        if self.place.step == 0:
            return
        try:
            self._save_checkpoint()
            logger.warning("step %d is saved; the same command goes on from there", self.place.step)
        except (FaithDiffError, OSError, RuntimeError) as failure:
            logger.warning("step %d could not be saved: %s", self.place.step, failure)

    def _finish_stage(self, stage: StageConfig) -> None:
        """Write the stage's files, and go on from the averaged weights if these are what is finished."""
        state = gathered_state(self.accelerator, self.model, self.wrapped)
        if self.accelerator.is_main_process:
            self.files += write_files(self.model, self.config, stage.stage, state, self.state.ema)
        self.accelerator.wait_for_everyone()
        if self.accelerator.distributed_type.value == "DEEPSPEED":
            self.model.float()
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(state[name])
        if self.state.ema is not None:
            self.state.ema.copy_to(list(trainable(self.model)))
