"""Loading for the engine: SDXL from a single file or a folder, FaithDiff's U-Net, VAEs and LoRAs, through diffusers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPES
from ..errors import MissingPackageError, SettingsError, WeightsError, install_extra

DEFAULT_CONFIG = "stabilityai/stable-diffusion-xl-base-1.0"
"""Where the configuration of single-file checkpoints is looked up unless a folder is given."""

Offload = Literal["none", "model", "sequential"]

_DTYPES = COMPUTE_DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTE_DTYPES.values()}
"""Dtypes by the project's names and by torch's."""

_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError)
"""What diffusers raises for files it cannot make sense of."""


def require_diffusers() -> None:
    """Check that the packages of the extra `engine` are there.

    Raises:
        MissingPackageError: one is not; the text names the extra.
    """
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"Restoring images outside ComfyUI needs the package {error.name}; {install_extra('engine')}."
        ) from error


def choose_device(device: torch.device | str | None) -> torch.device:
    """The given device. Defaults to CUDA, MPS or the CPU, whichever is available first."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The given dtype, itself or by name. Defaults to float16 on accelerators and float32 on the CPU.

    Raises:
        SettingsError: not one of float32, bfloat16 and float16.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        raise SettingsError(f"dtype must be one of fp32, bf16 and fp16, got {dtype!r}.")
    return chosen


def check_offload(offload: str, device: torch.device) -> None:
    """Check how models are to be kept off a device while they are not at work.

    Raises:
        SettingsError: an unknown way, or a device without separate memory.
    """
    if offload not in get_args(Offload):
        raise SettingsError(f"offload must be one of {list(get_args(Offload))}, got {offload!r}.")
    if offload != "none" and device.type == "cpu":
        raise SettingsError(f"offload={offload!r} needs an accelerator to offload from; on the CPU take 'none'.")


def load_sdxl(
    model: str | Path,
    *,
    config: str | Path | None,
    vae: str | Path | None,
    unet_state: Mapping[str, Tensor] | None,
    dtype: torch.dtype,
) -> Any:
    """Make diffusers' `StableDiffusionXLPipeline` on the CPU.

    Where FaithDiff brings a U-Net, the checkpoint's own is never built.

    Args:
        model: a single-file checkpoint or a folder in diffusers' format.
        config: for a single file, a folder (or hub name) in diffusers' format whose configuration and tokenizers are
            used. Defaults to `DEFAULT_CONFIG` from the hub or its cache.
        vae: another VAE, a file or a folder.
        unet_state: a U-Net in diffusers' format to take instead of the checkpoint's.
        dtype: of all models.

    Raises:
        WeightsError: the checkpoint is not SDXL or cannot be read, or the U-Net does not fit it.
    """
    from diffusers import StableDiffusionXLPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    path = Path(model)
    if not path.exists():
        raise WeightsError(f"There is no SDXL checkpoint {path}. Check the name and the folder.")
    folder = path if path.is_dir() else _config_folder(config)
    _check_index(folder)
    parts: dict[str, Any] = {}
    if unet_state is not None:
        parts["unet"] = _build_unet(folder, unet_state, dtype)
    if vae is not None:
        parts["vae"] = _load_vae(Path(vae), folder, dtype)
    try:
        with _quiet_libraries():
            if path.is_dir():
                return StableDiffusionXLPipeline.from_pretrained(
                    str(path), torch_dtype=dtype, variant=_variant(path), local_files_only=True, **parts
                )
            return StableDiffusionXLPipeline.from_single_file(
                str(path), config=str(folder), torch_dtype=dtype, local_files_only=True, **parts
            )
    except (*_LOAD_ERRORS, SingleFileComponentError) as error:
        raise WeightsError(
            f"{path.name} could not be read as an SDXL checkpoint ({_first_line(error)}). Give a "
            f"single-file SDXL checkpoint such as RealVisXL_V4.0.safetensors, or a folder in diffusers' format."
        ) from error


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Loading without the libraries' own progress bars, and without word of a keyword that only new ones rename."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        for library in (diffusers_logging, transformers_logging):
            # Older versions cannot be asked; their bars stay.
            if getattr(library, "is_progress_bar_enabled", bool)():
                library.disable_progress_bar()
                stack.callback(library.enable_progress_bar)
        yield


def _first_line(error: Exception) -> str:
    """What another library says, without the instructions that it addresses to programmers."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _config_folder(config: str | Path | None) -> Path:
    if config is not None and Path(config).is_dir():
        return Path(config)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(config or DEFAULT_CONFIG), allow_patterns=["*.json", "*.txt"]))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"The configuration of {config or DEFAULT_CONFIG} could not be fetched ({type(error).__name__}). To work "
            f"offline, give `config` a folder with an SDXL model's configuration and tokenizers in diffusers' format."
        ) from error


def _check_index(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise WeightsError(
            f"{folder} is not a model in diffusers' format: it has no model_index.json. Give the folder that holds it, "
            f"or a single-file checkpoint."
        )
    kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
    if not kind.startswith("StableDiffusionXL"):
        raise WeightsError(f"{folder} holds a {kind or 'model of unknown kind'}; FaithDiff works on SDXL alone.")


def _variant(folder: Path) -> str | None:
    """`fp16` for folders that hold half-precision files only, as many SDXL models on the hub do."""
    files = {file.name for file in folder.glob("*/*.safetensors")}
    return "fp16" if files and all(".fp16" in name for name in files) else None


def _build_unet(folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A U-Net made on the meta device, which then takes over the given tensors one by one."""
    from accelerate import init_empty_weights
    from accelerate.utils import set_module_tensor_to_device
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(str(folder), subfolder="unet")
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(config)
    wanted = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    wrong = [name for name in wanted if name not in state or tuple(state[name].shape) != wanted[name]]
    wrong += sorted(state.keys() - wanted.keys())
    if wrong:
        got = tuple(state[wrong[0]].shape) if wrong[0] in state else "nothing"
        raise WeightsError(
            f"FaithDiff's U-Net does not fit the SDXL model: {len(wrong)} tensor(s) differ, such as {wrong[0]}, which "
            f"should be {wanted.get(wrong[0], 'absent')} and is {got}. Use both with the same kind of SDXL."
        )
    for name in wanted:
        # `clone` lets go of the file's mapping where the dtype does not change.
        value = state[name].to(dtype) if state[name].dtype != dtype else state[name].clone()
        set_module_tensor_to_device(unet, name, "cpu", value=value, dtype=dtype)
    return unet.eval()


def _load_vae(path: Path, folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    if not path.exists():
        raise WeightsError(f"There is no VAE {path}. Check the name and the folder.")
    try:
        with _quiet_libraries():
            if path.is_dir():
                return AutoencoderKL.from_pretrained(str(path), torch_dtype=dtype, local_files_only=True)
            return AutoencoderKL.from_single_file(
                str(path), config=str(folder), subfolder="vae", torch_dtype=dtype, local_files_only=True
            )
    except _LOAD_ERRORS as error:
        raise WeightsError(f"{path.name} could not be read as an SDXL VAE ({_first_line(error)}).") from error


def load_lora(sdxl: Any, path: str | Path, name: str) -> None:
    """Load a LoRA file into a pipeline through diffusers' own loader, under an adapter name.

    Raises:
        WeightsError: no such file, or nothing in it that belongs to this model.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"There is no LoRA file {path}. Check the name and the folder.")
    try:
        sdxl.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, local_files_only=True)
    except _LOAD_ERRORS as error:
        raise WeightsError(f"{path.name} could not be read as a LoRA for SDXL ({_first_line(error)}).") from error
    if not any(name in names for names in sdxl.get_list_adapters().values()):
        raise WeightsError(f"{path.name} has nothing in it for this SDXL model. Is it a LoRA, and made for SDXL?")
