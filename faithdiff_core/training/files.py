"""The finished files of a stage: full, adapter and LoRA, of averaged or raw weights."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPES
from ..errors import NotFiniteError
from ..finite import is_finite
from ..weights.marks import marks
from .averages import AveragedWeights, full_precision
from .checkpoints import saving
from .config import TrainConfig
from .model import TrainableModel, base_unet_state, lora_state


def finished_names(config: TrainConfig, stage: int) -> list[str]:
    """Names of the files that a stage leaves, in the order in which they are written."""
    names = [f"stage{stage}{suffix}.safetensors" for suffix in _suffixes(config)]
    if config.lora is not None and stage == 2:
        names.append(f"stage{stage}_lora.safetensors")
    return names


def _suffixes(config: TrainConfig) -> list[str]:
    suffixes = ["", "_adapter"]
    return [*suffixes, "_raw", "_raw_adapter"] if config.weights == "both" and config.ema else suffixes


def finished_files(config: TrainConfig, checkpoints: list[Path]) -> list[Path] | None:
    """The files of a run that has nothing left to do, or None."""
    if not checkpoints:
        return None
    place = json.loads((checkpoints[0] / "place.json").read_text())
    last = len(config.stages) - 1
    files = [config.output / name for stage in config.stages for name in finished_names(config, stage.stage)]
    done = place["stage"] == last and place["step"] == config.stages[last].steps
    return files if done and all(f.is_file() for f in files) else None


def gathered_state(accelerator: Any, model: TrainableModel, wrapped: Any) -> dict[str, Tensor]:
    """The whole model's state dict in the parameters' full precision; all processes call this.

    Under FSDP the main process alone gets the values.
    """
    if accelerator.distributed_type.value == "FSDP":
        whole: dict[str, Tensor] = accelerator.get_state_dict(wrapped)
        return whole
    state = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state[name] = full_precision(parameter)
    return state


def write_files(
    model: TrainableModel,
    config: TrainConfig,
    stage: int,
    state: dict[str, Tensor],
    averages: AveragedWeights | None,
) -> list[Path]:
    """Write the files of a stage.

    Args:
        model: for its sizes and names.
        config: says which weights are written, and in which precision.
        stage: 1 or 2.
        state: the whole model's raw weights, under the model's names.
        averages: of the parameters that learn, in the model's order; None to write the raw ones.

    Returns:
        stageN.safetensors and stageN_adapter.safetensors in the output folder; with `weights: both` the raw ones too;
        with LoRA stage2_lora.safetensors.

    Raises:
        NotFiniteError: a weight is not finite, or is not in the precision it would be written in.
        SaveError: a file cannot be written.
    """
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    averaged = state if averages is None else state | dict(zip(learning, averages.shadows, strict=True))
    if model.lora is not None and model.frozen_dtype != torch.float32:
        original = {f"unet.{key}": value for key, value in base_unet_state(config.base, config.init).items()}
        state, averaged = (_with_original(weights, original) for weights in (state, averaged))
    dtype = COMPUTE_DTYPES[config.save_precision]
    own_marks = marks(model.backbone, model.prediction)
    paths = []
    for suffix in _suffixes(config):
        weights = state if suffix.startswith("_raw") else averaged
        tensors = model.published(adapter_only=suffix.endswith("_adapter"), dtype=dtype, state=weights)
        path = config.output / f"stage{stage}{suffix}.safetensors"
        paths.append(_write(path, tensors, config.save_precision, own_marks))
    if model.lora is not None and stage == 2:
        unet = {key.removeprefix("unet."): value for key, value in averaged.items() if key.startswith("unet.")}
        tensors = lora_state(unet, model.lora, dtype)
        path = config.output / f"stage{stage}_lora.safetensors"
        paths.append(_write(path, tensors, config.save_precision, own_marks))
    return paths


def _with_original(state: dict[str, Tensor], original: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state whose frozen U-Net weights are those of the base, which training keeps in half precision."""
    return {key: original.get(key.replace(".base_layer.", "."), value) for key, value in state.items()}


def _write(path: Path, tensors: dict[str, Tensor], precision: str, own_marks: dict[str, str]) -> Path:
    from safetensors.torch import save_file

    broken = first_not_finite(list(tensors.items()))
    if broken is not None:
        raise NotFiniteError(
            f"{path.name} is not written: {broken} has values that are NaN or infinite in {precision}. If the run's "
            "weights are finite, choose another `save_precision`."
        )
    unfinished = path.with_name(f".{path.name}.unfinished")
    with saving(path, sum(t.numel() * t.element_size() for t in tensors.values())):
        try:
            save_file(tensors, str(unfinished), metadata={"format": "pt", **own_marks})
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path


def first_not_finite(named: Sequence[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a value that is NaN or infinite, or None."""
    return next((name for name, tensor in named if not is_finite(tensor)), None)
