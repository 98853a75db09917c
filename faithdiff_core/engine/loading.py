"""Loading for the engine: a base model in a file or a folder, FaithDiff's U-Net, VAEs and LoRAs, through diffusers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..backbone import BACKBONES, Backbone, backbone_of
from ..dtypes import COMPUTE_DTYPES
from ..errors import MissingPackageError, SettingsError, WeightsError, install_extra
from ..weights.faithdiff_file import FaithDiffWeights
from ..weights.quantized_state import shapes_of
from ..weights.recognition import CHECKPOINT, UNET, check_lora, recognize
from ..weights.tensor_reader import TensorReader
from ..weights.unet_names import diffusers_names
from ..weights.unet_shapes import family_of

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


def load_base(
    model: str | Path,
    faithdiff: FaithDiffWeights,
    *,
    config: str | Path | None,
    vae: str | Path | None,
    unet_state: Mapping[str, Tensor] | None,
    dtype: torch.dtype,
) -> Any:
    """Make diffusers' pipeline of FaithDiff's backbone on the CPU.

    Where FaithDiff brings a U-Net, the checkpoint's own is never built.

    Args:
        model: a single-file checkpoint or a folder in diffusers' format.
        faithdiff: FaithDiff's file, which says for what backbone it is.
        config: for a single file, a folder (or hub name) in diffusers' format whose configuration and tokenizers are
            used. Defaults to the backbone's from the hub or its cache.
        vae: another VAE, a file or a folder.
        unet_state: a U-Net in diffusers' format to take instead of the checkpoint's.
        dtype: of all models.

    Raises:
        WeightsError: the checkpoint is of another backbone, is quantized or cannot be read, or the U-Net does not fit
            it.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    path, backbone = Path(model), faithdiff.backbone
    if not path.exists():
        raise WeightsError(f"There is no {backbone.name} checkpoint {path}. Check the name and the folder.")
    if path.is_file():
        _check_file(path, faithdiff)
    folder = path if path.is_dir() else _config_folder(config, backbone)
    _check_index(folder, faithdiff)
    parts = without_checkers(backbone)
    if unet_state is not None:
        parts["unet"] = _build_unet(folder, unet_state, dtype, backbone)
    if vae is not None:
        parts["vae"] = _load_vae(Path(vae), folder, dtype, backbone)
    kind = getattr(diffusers, backbone.pipeline)
    try:
        with _quiet_libraries():
            if path.is_dir():
                return kind.from_pretrained(
                    str(path), torch_dtype=dtype, variant=_variant(path), local_files_only=True, **parts
                )
            return kind.from_single_file(
                str(path), config=str(folder), torch_dtype=dtype, local_files_only=True, **parts
            )
    except (*_LOAD_ERRORS, SingleFileComponentError) as error:
        raise WeightsError(
            f"{path.name} could not be read as an {backbone.name} checkpoint ({_first_line(error)}). Give a "
            f"single-file {backbone.name} checkpoint (for SDXL such as RealVisXL_V4.0.safetensors), or a folder in "
            f"diffusers' format."
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


def _config_folder(config: str | Path | None, backbone: Backbone) -> Path:
    if config is not None and Path(config).is_dir():
        return Path(config)
    from huggingface_hub import snapshot_download

    name = str(config or backbone.configuration)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt"]))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"The configuration of {name} could not be fetched ({type(error).__name__}). To work offline, give "
            f"`config` a folder with an {backbone.name} model's configuration and tokenizers in diffusers' format."
        ) from error


def _check_index(folder: Path, faithdiff: FaithDiffWeights) -> None:
    """Check that a folder holds a model of FaithDiff's backbone."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise WeightsError(
            f"{folder} is not a model in diffusers' format: it has no model_index.json. Give the folder that holds it, "
            f"or a single-file checkpoint."
        )
    found = backbone_of_folder(folder)
    if found is None:
        kind = _class_name(folder)
        raise WeightsError(
            f"{folder} holds a {kind or 'model of unknown kind'}; FaithDiff works on "
            f"{', '.join(backbone.name for backbone in BACKBONES)} alone, and {faithdiff.path.name} on "
            f"{faithdiff.backbone.name}."
        )
    _check_backbone(folder, found, faithdiff)


def backbone_of_folder(folder: Path) -> Backbone | None:
    """The family of a model in diffusers' format; None for one that FaithDiff does not work on."""
    unet = folder / "unet" / "config.json"
    if not unet.is_file() or not _class_name(folder).startswith("StableDiffusion"):
        return None
    return backbone_of_unet(json.loads(unet.read_text(encoding="utf-8")))


def _class_name(folder: Path) -> str:
    return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name", ""))


def without_checkers(backbone: Backbone) -> dict[str, Any]:
    """Arguments of a pipeline by which it has no parts that look at its results; they are no part of the method."""
    if backbone.pipeline != "StableDiffusionPipeline":
        return {}
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def backbone_of_unet(config: Mapping[str, Any]) -> Backbone:
    """The family of a U-Net with this configuration of diffusers."""
    return backbone_of(config.get("addition_embed_type") == "text_time", bool(config.get("use_linear_projection")))


def _check_file(path: Path, faithdiff: FaithDiffWeights) -> None:
    """Check that a single file may be a checkpoint of FaithDiff's backbone."""
    try:
        reader = TensorReader(path)
    except WeightsError:
        return  # diffusers reads more kinds of files, and has its own words for those that it cannot read
    reader.check_not_quantized()  # diffusers would take the weights without their scales
    found = recognize(reader.shapes, reader.metadata)
    if found is not None and found.kind not in (CHECKPOINT, UNET):
        raise WeightsError(
            f"{path.name} is {found.words}, but the model must be a checkpoint. {found.use} Give an "
            f"{faithdiff.backbone.name} checkpoint in one file, or a folder in diffusers' format."
        )
    names = diffusers_names(set(reader.kinds))
    _check_backbone(path, family_of({name: reader.kinds[key][1] for name, key in names.items()}), faithdiff)


def _check_backbone(path: Path, backbone: Backbone | None, faithdiff: FaithDiffWeights) -> None:
    if backbone is not None and backbone is not faithdiff.backbone:
        raise WeightsError(
            f"{path.name} is a model of {backbone.name}, but {faithdiff.path.name} is made for "
            f"{faithdiff.backbone.name}. Give a model and a FaithDiff file of the same kind."
        )


def _variant(folder: Path) -> str | None:
    """`fp16` for folders that hold half-precision files only, as many SDXL models on the hub do."""
    files = {file.name for file in folder.glob("*/*.safetensors")}
    return "fp16" if files and all(".fp16" in name for name in files) else None


def _build_unet(folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype, backbone: Backbone) -> Any:
    """A U-Net made on the meta device, which then takes over the given tensors one by one."""
    from accelerate import init_empty_weights
    from accelerate.utils import set_module_tensor_to_device
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(str(folder), subfolder="unet")
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(config)
    wanted = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    given = shapes_of(state)
    wrong = [name for name in wanted if given.get(name) != wanted[name]]
    wrong += sorted(given.keys() - wanted.keys())
    if wrong:
        got = given.get(wrong[0], "nothing")
        raise WeightsError(
            f"FaithDiff's U-Net does not fit the {backbone.name} model: {len(wrong)} tensor(s) differ, such as "
            f"{wrong[0]}, which should be {wanted.get(wrong[0], 'absent')} and is {got}. Use both with the same kind "
            f"of {backbone.name}."
        )
    for name in wanted:
        value = state[name]
        # `clone` lets go of the file's mapping where the dtype does not change.
        value = value.to(dtype) if value.dtype != dtype else value.clone()
        set_module_tensor_to_device(unet, name, "cpu", value=value, dtype=dtype)
    return unet.eval()


def _load_vae(path: Path, folder: Path, dtype: torch.dtype, backbone: Backbone) -> Any:
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
        raise WeightsError(
            f"{path.name} could not be read as an {backbone.name} VAE ({_first_line(error)})."
        ) from error


def load_lora(base: Any, path: str | Path, name: str, backbone: Backbone) -> None:
    """Load a LoRA file into a pipeline through diffusers' own loader, under an adapter name.

    Raises:
        WeightsError: no such file, one for another backbone, or nothing in it that belongs to this model.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"There is no LoRA file {path}. Check the name and the folder.")
    check_lora(path, base.unet.config.cross_attention_dim, backbone)
    try:
        base.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, local_files_only=True)
    except _LOAD_ERRORS as error:
        raise WeightsError(
            f"{path.name} could not be read as a LoRA for {backbone.name} ({_first_line(error)})."
        ) from error
    if not any(name in names for names in base.get_list_adapters().values()):
        raise WeightsError(
            f"{path.name} has nothing in it for this {backbone.name} model. Is it a LoRA, and made for {backbone.name}?"
        )
