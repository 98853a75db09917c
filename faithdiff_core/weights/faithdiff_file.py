"""Reading FaithDiff's weights: the published pickle, the same as safetensors, and the files that `convert` writes.

A file is recognised by its keys, and its sizes are read off its tensors. Tensors are mapped from the file and read when
they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..backbone import SDXL, Backbone
from ..dtypes import READABLE_DTYPES, dtype_name
from ..errors import SettingsError, WeightsError
from ..finite import is_finite
from ..models.alignment import LAYERS_PREFIX, Alignment, AlignmentConfig, from_published
from ..models.lq_encoder import LQEncoder, LQEncoderConfig
from ..models.shapes import Shape
from .checkpoint_file import open_tensors
from .lora_names import LORA_PREFIX, LoRASizes
from .marks import IN_WORDS, PREDICTIONS, marked_backbone, marked_prediction
from .messages import REDOWNLOAD, listing
from .quantized_state import QuantizedLayer, QuantizedState, shapes_of, take_quantized
from .recognition import recognize
from .unet_names import DIFFUSERS_PREFIXES, diffusers_names
from .unet_shapes import UNetConfig

ENCODER_PREFIX = "denoise_encoder."
"""Where a FaithDiff file keeps the LQ encoder."""

ALIGNMENT_PREFIXES = ("condition_embedding.", LAYERS_PREFIX, "spatial_ch_projs.")
"""Where it keeps the alignment."""

IGNORED_PREFIXES = ("agg_net.",)
"""Left empty by the authors' training code."""


_NAMES = {"unet": "U-Net", "lq_encoder": "LQ encoder", "alignment": "alignment", "lora": "LoRA"}
"""The parts in words."""

Config = TypeVar("Config")


@dataclass(frozen=True)
class Part(Generic[Config]):
    """One part of a FaithDiff file: its tensors and its sizes.

    Attributes:
        state: tensors mapped from the file, under the part's own names. Quantized ones are dequantized when they are
            read.
        config: the sizes that they show.
    """

    state: MutableMapping[str, Tensor] = field(repr=False)
    config: Config

    @property
    def quantized(self) -> QuantizedState | None:
        """The state as it is stored, where layers of it are quantized; else None."""
        return self.state if isinstance(self.state, QuantizedState) else None

    def not_finite(self) -> list[str]:
        """Names of the tensors with a NaN or an infinite value. Reads all values, 1.5 billion in a second."""
        if self.quantized is None:
            return [key for key, value in self.state.items() if not is_finite(value)]
        broken = [key for key, value in self.quantized.plain.items() if not is_finite(value)]
        return [*broken, *self.quantized.not_finite()]


@dataclass(frozen=True)
class FaithDiffWeights:
    """What a FaithDiff file holds; a part that it does not hold is None.

    Attributes:
        path: the file.
        unet: the U-Net under diffusers' names.
        lq_encoder: the LQ encoder under diffusers' names of a VAE's encoder.
        alignment: the alignment under the published names.
        metadata: the text entries of a safetensors file; empty for a pickle.
        backbone: the family that it is made for.
        marked: what its metadata say that its U-Net predicts; None if they say nothing.
        lora: what FaithDiff's U-Net learned, for the U-Net of an SDXL checkpoint.
    """

    path: Path
    unet: Part[UNetConfig] | None
    lq_encoder: Part[LQEncoderConfig] | None
    alignment: Part[AlignmentConfig] | None
    metadata: dict[str, str]
    backbone: Backbone = SDXL
    marked: str | None = None
    lora: Part[LoRASizes] | None = None

    @property
    def prediction(self) -> str:
        """What the U-Net predicts, `epsilon` (noise) or `v_prediction`.

        Raises:
            WeightsError: the file does not say it, and models of both kinds are common.
        """
        known = self.marked or self.backbone.prediction
        if known is None:
            raise WeightsError(
                f"{self.path.name} is made for {self.backbone.name}, whose models predict "
                f"{' or '.join(IN_WORDS.values())}, and does not say which. Convert it with `python -m faithdiff_core "
                f"convert --prediction` and one of {' and '.join(PREDICTIONS)}, the `prediction_type` of the model "
                f"that it was trained from."
            )
        return known

    @property
    def quantization(self) -> str | None:
        """The format of a quantized U-Net, in people's words; None for one that is not quantized, or for none."""
        state = None if self.unet is None else self.unet.quantized
        return None if state is None else listing(state.formats)

    @property
    def parts(self) -> dict[str, Part[Any]]:
        """The parts that are there, by name."""
        named: dict[str, Part[Any] | None] = {
            "unet": self.unet,
            "lq_encoder": self.lq_encoder,
            "alignment": self.alignment,
            "lora": self.lora,
        }
        return {name: part for name, part in named.items() if part is not None}

    @property
    def kind(self) -> str:
        """`full` (U-Net and adapter), `adapter` (LQ encoder and alignment), `lora` (LoRA and adapter), `unet`, or
        `partial`.
        """
        names = set(self.parts)
        if names == {"unet", "lq_encoder", "alignment"}:
            return "full"
        if names == {"lq_encoder", "alignment"}:
            return "adapter"
        if names == {"lora", "lq_encoder", "alignment"}:
            return "lora"
        return "unet" if names == {"unet"} else "partial"

    def check_finite(self) -> None:
        """Read all values, and refuse weights with NaN or infinite ones, which a training run that failed leaves.

        Raises:
            WeightsError: there are such values; the text names the tensors.
        """
        for name, part in self.parts.items():
            broken = part.not_finite()
            if broken:
                raise WeightsError(
                    f"{self.path.name}: {len(broken)} of {len(part.state)} tensors of the {_NAMES[name]} hold NaN or "
                    f"infinite values, such as {listing(broken[:3])}. The file is broken: take another one, or the "
                    f"last good checkpoint of the training."
                )

    def build_lq_encoder(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
        *,
        assign: bool = False,
    ) -> LQEncoder:
        """Make the LQ encoder with the file's weights.

        Args:
            dtype: parameter dtype. Defaults to the file's, or to float16 for a file with 8 bits.
            device: parameter device. Defaults to the CPU.
            operations: see `LQEncoder`.
            assign: make the tensors themselves the parameters instead of copying their values; where nothing needs
                to be cast, they stay mapped from the file.

        Raises:
            WeightsError: the file has no LQ encoder.
        """
        part = self._need("LQ encoder", self.lq_encoder)
        dtype = _default_dtype(part.state["conv_in.weight"]) if dtype is None else dtype
        state = {key: value.to(dtype) for key, value in part.state.items()}
        module = LQEncoder(part.config, dtype=dtype, device=device or "cpu", operations=operations)
        module.load_state_dict(state, assign=assign)
        return module.eval().requires_grad_(False)

    def build_alignment(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
        *,
        assign: bool = False,
        folded: bool = True,
    ) -> Alignment:
        """Make the alignment with the file's weights; arguments as in `build_lq_encoder`, `folded` as in `Alignment`.

        Raises:
            WeightsError: the file has no alignment.
        """
        part = self._need("alignment", self.alignment)
        dtype = _default_dtype(part.state["spatial_ch_projs.weight"]) if dtype is None else dtype
        state = from_published(part.state, part.config, folded=folded, dtype=dtype)
        module = Alignment(part.config, dtype=dtype, device=device or "cpu", operations=operations, folded=folded)
        module.load_state_dict(state, assign=assign)
        return module.eval().requires_grad_(False)

    def _need(self, name: str, part: Part[Config] | None) -> Part[Config]:
        if part is None:
            raise WeightsError(
                f"{self.path.name} holds only {listing(sorted(self.parts))}, but the {name} is needed. {REDOWNLOAD}"
            )
        return part


def _default_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to build a module in: modules do not compute in 8 bits."""
    return tensor.dtype if tensor.dtype.itemsize > 1 else torch.float16


def read_faithdiff(path: str | Path) -> FaithDiffWeights:
    """Open a FaithDiff file.

    Takes the published `FaithDiff.bin`, the same tensors as safetensors, the `*_unet` and `*_adapter` files that
    `convert` writes, what training on any backbone gives, and the files with adapter and LoRA that
    `extract-lora --adapter` writes. Every part is checked for missing and mis-shaped tensors. The U-Net may be
    quantized in one of ComfyUI's formats, and then have diffusers' names or ComfyUI's.

    Args:
        path: the file.

    Returns:
        The parts it holds; tensors are mapped from the file.

    Raises:
        WeightsError: it is not a FaithDiff file, or a broken one; the text says what it is and what to do.
    """
    path = Path(path)
    return faithdiff_of(path, *open_tensors(path))


def faithdiff_of(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> FaithDiffWeights:
    """The same for a file that is open.

    Args:
        path: the file, for errors.
        tensors, metadata: what `open_tensors` gives.
    """
    states = _split(path, *take_quantized(path, tensors, metadata), metadata)
    unet = _part(path, "U-Net", states["unet"], UNetConfig.from_shapes, UNetConfig.shapes)
    encoder = _part(path, "LQ encoder", states["lq_encoder"], LQEncoderConfig.from_shapes, LQEncoderConfig.shapes)
    alignment = _part(
        path, "alignment", states["alignment"], AlignmentConfig.from_shapes, AlignmentConfig.published_shapes
    )
    if encoder and alignment and encoder.config.feature_channels != alignment.config.feature_channels:
        raise WeightsError(
            f"{path.name}: the LQ encoder gives {encoder.config.feature_channels} channels, but the alignment takes "
            f"{alignment.config.feature_channels}. The parts belong to different models. {REDOWNLOAD}"
        )
    if unet and alignment and unet.config.block_out_channels[0] != alignment.config.unet_channels:
        raise WeightsError(
            f"{path.name}: the U-Net begins with {unet.config.block_out_channels[0]} channels, but the alignment is "
            f"made for {alignment.config.unet_channels}. The parts belong to different models. {REDOWNLOAD}"
        )
    lora = _lora_part(path, states["lora"])
    if unet and lora:
        raise WeightsError(
            f"{path.name} holds both a U-Net and a LoRA for one; it should hold one of them. {REDOWNLOAD}"
        )
    shown, said = unet.config.backbone if unet else None, marked_backbone(path, metadata)
    if shown and said and shown is not said:
        raise WeightsError(
            f"{path.name} says that it is made for {said.name}, but its U-Net is one of {shown.name}. {REDOWNLOAD}"
        )
    backbone = shown or said or SDXL  # files without a mark are of the published kind
    marked = marked_prediction(path, metadata)
    return FaithDiffWeights(path, unet, encoder, alignment, metadata, backbone, marked, lora)


def part_of(key: str) -> tuple[str, str] | None:
    """Which part a key of a FaithDiff file belongs to, and its name there; None for keys that mean nothing."""
    if key.startswith(ENCODER_PREFIX):
        return "lq_encoder", key.removeprefix(ENCODER_PREFIX)
    if key.startswith(ALIGNMENT_PREFIXES):
        return "alignment", key
    if key.startswith(DIFFUSERS_PREFIXES):
        return "unet", key
    if key.startswith(LORA_PREFIX):
        return "lora", key
    return None


def _split(
    path: Path, tensors: dict[str, Tensor], layers: dict[str, QuantizedLayer], metadata: Mapping[str, str]
) -> dict[str, MutableMapping[str, Tensor]]:
    """The parts' tensors, of those that are stored as they are and of quantized layers."""
    whole = QuantizedState(tensors, layers)
    if layers:
        whole = _with_diffusers_names(whole)
    parts = {name: QuantizedState({}, {}) for name in _NAMES}
    other: list[str] = []
    for key in whole:
        place = part_of(key)
        layer = whole.layers.get(key.removesuffix(".weight"))
        if place is None:
            other += [key] * (not key.startswith(IGNORED_PREFIXES))
        elif layer is None:
            parts[place[0]].plain[place[1]] = whole.plain[key]
        elif place[0] == "unet":
            parts[place[0]].layers[place[1].removesuffix(".weight")] = layer
        else:
            raise WeightsError(
                f"{path.name}: {key} of the {_NAMES[place[0]]} is quantized ({layer.form.key}). Only the U-Net may be: "
                f"the other parts are small. {REDOWNLOAD}"
            )
    foreign = recognize(shapes_of(whole), metadata)
    if foreign is not None:
        use = f"{foreign.use} " if foreign.use else ""
        raise WeightsError(f"{path.name} is {foreign.words}, not a FaithDiff file. {use}{REDOWNLOAD}")
    if not any(parts.values()):
        raise WeightsError(
            f"{path.name} has none of FaithDiff's tensors; its first ones are {listing(sorted(tensors)[:3])}. "
            f"{REDOWNLOAD}"
        )
    if other:
        raise WeightsError(
            f"{path.name} has {len(other)} tensor(s) that FaithDiff does not know, such as {listing(other[:3])}. It "
            f"is another model, or a later version of FaithDiff than this one reads. {REDOWNLOAD}"
        )
    return {name: state if state.layers else state.plain for name, state in parts.items()}


def _with_diffusers_names(state: QuantizedState) -> QuantizedState:
    """A file's tensors with diffusers' names for the U-Net's, which quantized files have under ComfyUI's."""
    names = {key: name for name, key in diffusers_names(set(state)).items()}
    return QuantizedState(
        {names.get(key, key): value for key, value in state.plain.items()},
        {
            names.get(f"{layer}.weight", f"{layer}.weight").removesuffix(".weight"): value
            for layer, value in state.layers.items()
        },
    )


def _part(
    path: Path,
    name: str,
    state: MutableMapping[str, Tensor],
    read: Callable[[Mapping[str, Shape]], Config],
    expected: Callable[[Config], dict[str, Shape]],
) -> Part[Config] | None:
    """Read a part's sizes, and compare all of its tensors with what these sizes call for; None for no tensors."""
    if not state:
        return None
    _check_dtypes(path, name, state.plain if isinstance(state, QuantizedState) else state)
    shapes = shapes_of(state)
    try:
        config = read(shapes)
        wanted = expected(config)
    except (KeyError, IndexError) as error:
        missing = f"a tensor such as {error.args[0]}" if isinstance(error, KeyError) else "a tensor of the usual rank"
        raise WeightsError(
            f"{path.name}: the {name} is incomplete; it lacks {missing}. The file is corrupted or truncated. "
            f"{REDOWNLOAD}"
        ) from error
    except SettingsError as error:
        raise WeightsError(f"{path.name}: the {name} {error}. {REDOWNLOAD}") from error
    missing_keys = sorted(wanted.keys() - shapes.keys())
    if missing_keys:
        raise WeightsError(
            f"{path.name}: the {name} lacks {len(missing_keys)} of {len(wanted)} tensors, such as "
            f"{listing(missing_keys[:3])}. The file is corrupted or truncated. {REDOWNLOAD}"
        )
    wrong = [key for key in wanted if shapes[key] != wanted[key]]
    if wrong:
        key = wrong[0]
        raise WeightsError(
            f"{path.name}: {len(wrong)} tensor(s) of the {name} have the wrong shape; {key} should be {wanted[key]} "
            f"and is {shapes[key]}. {REDOWNLOAD}"
        )
    unknown = sorted(shapes.keys() - wanted.keys())
    if unknown:
        raise WeightsError(
            f"{path.name}: the {name} has {len(unknown)} tensor(s) too many, such as {listing(unknown[:3])}. "
            f"{REDOWNLOAD}"
        )
    return Part(state, config)


def _lora_part(path: Path, state: MutableMapping[str, Tensor]) -> Part[LoRASizes] | None:
    """Read a LoRA's sizes; which U-Net it fits shows when it is added to one."""
    if not state:
        return None
    _check_dtypes(path, "LoRA", state)
    return Part(state, LoRASizes.from_state(state, path.name))


def _check_dtypes(path: Path, name: str, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are no weights: integers, complex numbers, sparse and quantised ones."""
    for key, value in state.items():
        if value.dtype not in READABLE_DTYPES or value.layout != torch.strided or value.is_meta:
            layout = "a name without values" if value.is_meta else str(value.layout).removeprefix("torch.")
            kind = dtype_name(value.dtype) if layout == "strided" else f"{layout} ({dtype_name(value.dtype)})"
            raise WeightsError(
                f"{path.name}: {key} of the {name} is stored as {kind}, which is not "
                f"supported. Expected {listing([dtype_name(dtype) for dtype in READABLE_DTYPES])}; quantised files "
                f"of other programs cannot be read. {REDOWNLOAD}"
            )
