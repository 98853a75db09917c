"""Quantized layers in a file: found by their marks, newer and older, and read as ordinary weights.

ComfyUI has written such files in three ways, all of which it reads (`convert_old_quants` in comfy/utils.py): an entry
`comfy_quant` beside each layer's weights, a table of layers in the metadata, and before both an entry `scaled_fp8` for
the whole file, with scales called `scale_weight`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WeightsError
from ..models.shapes import Shape
from .messages import listing
from .quantization import (
    FORMATS,
    FP8_E5M2_SCALED,
    FP8_SCALED,
    MARK,
    Entries,
    QuantizedFormat,
    check_layer,
    dequantize,
    format_name,
    is_layer_finite,
)

METADATA_KEY = "_quantization_metadata"
"""Metadata with a table of layers and their formats."""

OLD_MARK = "scaled_fp8"
"""The older entry for a whole file; two values in it say that ComfyUI computes with the dequantized weights."""

_OLD_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}

_ENTRIES = ("weight", "weight_scale", "weight_scale_2", "input_scale")
"""What belongs to a quantized layer, beside its bias and its mark."""

_MAX_MARK = 4096
"""Longest mark that is read, in bytes; ComfyUI's have fewer than 100."""


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized layer as it is stored.

    Attributes:
        form: the format.
        shape: of its weights.
        entries: the stored tensors by the ends of their names, without the mark.
        mark: the layer's `comfy_quant` entry.
    """

    form: QuantizedFormat
    shape: Shape
    entries: Entries
    mark: Tensor

    def stored(self) -> Entries:
        """All entries, with the mark."""
        return {**self.entries, MARK: self.mark}


class QuantizedState(MutableMapping[str, Tensor]):
    """A state dict that reads quantized layers as ordinary weights.

    A layer's weights are dequantized, to float32, whenever they are asked for, and are not kept: what does not know
    about quantization gets the right values, one tensor at a time.

    Attributes:
        plain: the tensors that are stored as they are.
        layers: the quantized layers.
    """

    def __init__(self, plain: dict[str, Tensor], layers: dict[str, QuantizedLayer]) -> None:
        """Put both together; no name may be in both."""
        self.plain = plain
        self.layers = layers

    @property
    def formats(self) -> list[str]:
        """Names of the formats in it."""
        return sorted({format_name(layer.form) for layer in self.layers.values()})

    def shapes(self) -> dict[str, Shape]:
        """Shapes of all weights, without reading them."""
        shapes: dict[str, Shape] = {key: tuple(value.shape) for key, value in self.plain.items()}
        return shapes | {f"{name}.weight": layer.shape for name, layer in self.layers.items()}

    def not_finite(self) -> Iterable[str]:
        """Names of the quantized weights that hold NaN or infinite values."""
        broken = (name for name, layer in self.layers.items() if not is_layer_finite(layer.entries, layer.form))
        return (f"{name}.weight" for name in broken)

    def __getitem__(self, key: str) -> Tensor:
        layer = self.layers.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        return self.plain[key] if layer is None else dequantize(layer.entries, layer.form)

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.layers.pop(key.removesuffix(".weight"), None)
        self.plain[key] = value

    def __delitem__(self, key: str) -> None:
        if key in self.plain:
            del self.plain[key]
        else:
            del self.layers[key.removesuffix(".weight")]

    def __iter__(self) -> Iterator[str]:
        yield from self.plain
        yield from (f"{name}.weight" for name in self.layers)

    def __len__(self) -> int:
        return len(self.plain) + len(self.layers)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shapes of a state dict's weights, without dequantizing any."""
    if isinstance(state, QuantizedState):
        return state.shapes()
    return {key: tuple(value.shape) for key, value in state.items()}


def quantized_names(keys: Iterable[str], metadata: Mapping[str, str]) -> list[str]:
    """The entries by which a file shows that it is quantized; empty for one that is not."""
    found = [key for key in keys if key.rpartition(".")[2] in (MARK, OLD_MARK)]
    return found + [METADATA_KEY] * (METADATA_KEY in metadata)


def check_not_quantized(file: str, keys: Iterable[str], metadata: Mapping[str, str], remedy: str) -> None:
    """Refuse a quantized file where weights are needed as they are: without its scales they would be wrong.

    Raises:
        WeightsError: it is one.
    """
    found = quantized_names(keys, metadata)
    if found:
        raise WeightsError(f"{file} is quantized ({listing(found[:1])}), which cannot be used here. {remedy}")


def take_quantized(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, QuantizedLayer]]:
    """Divide a file's tensors into plain ones and quantized layers, by any of the marks.

    Args:
        path: the file, for errors.
        tensors: all of its tensors.
        metadata: its text entries.

    Raises:
        WeightsError: a layer's format is unknown, or something of it is missing or of the wrong shape.
    """
    plain = dict(tensors)
    if not quantized_names(plain, metadata):
        return plain, {}
    marks = {key.removesuffix(f".{MARK}"): plain.pop(key) for key in list(plain) if key.endswith(f".{MARK}")}
    marks |= _table(path, plain, metadata)
    marks |= _old_marks(path, plain)
    layers: dict[str, QuantizedLayer] = {}
    for name, mark in marks.items():
        form = _format_of(path, name, mark)
        keys = {end: f"{name}.{end}" for end in _ENTRIES}
        entries = {end: plain.pop(key) for end, key in keys.items() if key in plain}
        layers[name] = QuantizedLayer(form, check_layer(path.name, name, entries, form), entries, mark)
    stray = sorted(key for key in plain if key.rpartition(".")[2] in _ENTRIES[1:])
    if stray:
        raise WeightsError(
            f"{path.name}: {len(stray)} scale(s), such as {listing(stray[:3])}, belong to no layer that is marked as "
            f"quantized. The file is corrupted; convert the model again."
        )
    # Without a scale these would be read as they are, and be wrong by the scale.
    bare = sorted(key for key, value in plain.items() if value.ndim == 2 and value.dtype.itemsize == 1)
    if bare:
        raise WeightsError(
            f"{path.name}: {len(bare)} matrices, such as {listing(bare[:3])}, are stored in 8 bits and have no scale, "
            f"while others do. The file is corrupted; convert the model again."
        )
    return plain, layers


def _format_of(path: Path, name: str, mark: Tensor) -> QuantizedFormat:
    """The format that a layer's mark names."""
    try:
        if mark.nbytes > _MAX_MARK:
            raise ValueError(f"{mark.nbytes} bytes")
        facts = json.loads(bytes(mark.flatten().view(torch.uint8).tolist()))
        key = facts["format"]
        form = FORMATS.get(key)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise WeightsError(
            f"{path.name}: {name}.{MARK} does not name a format ({type(error).__name__}). The file is corrupted; "
            f"convert the model again."
        ) from error
    if form is None or facts.get("convrot") or facts.get("num_experts"):
        raise WeightsError(
            f"{path.name}: {name} is quantized as {str(key)[:40]!r}{' with rotation' if facts.get('convrot') else ''}, "
            f"which is not supported. Known are {', '.join(FORMATS)}. Make a file with `python -m faithdiff_core "
            f"convert --dtype fp8_scaled`."
        )
    return form


def _table(path: Path, plain: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The marks out of a table in the metadata."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        layers = dict(json.loads(text)["layers"])
        marks = {str(name): _as_bytes(facts) for name, facts in layers.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(
            f"{path.name}: {METADATA_KEY} in its metadata is no table of layers ({type(error).__name__}). The file is "
            f"corrupted; convert the model again."
        ) from error
    # Some programs leave out the prefix that all of a U-Net's tensors have.
    prefixes = ("", "model.diffusion_model.", "diffusion_model.")
    return {
        next((prefix + name for prefix in prefixes if f"{prefix}{name}.weight" in plain), name): mark
        for name, mark in marks.items()
    }


def _old_marks(path: Path, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """The marks of a file of the older kind, whose scales get their new names."""
    found = [key for key in plain if key.rpartition(".")[2] == OLD_MARK]
    marks: dict[str, Tensor] = {}
    for old in found:
        prefix, dequantized = old.removesuffix(OLD_MARK), plain.pop(old).numel() == 2
        for key in [key for key in plain if key.startswith(prefix)]:
            name, _, end = key.rpartition(".")
            if end not in _OLD_NAMES:
                continue
            value = plain.pop(key)
            if end == "scale_input" and value.numel() == 1 and float(value) == 1.0:
                continue  # stands for none
            plain[f"{name}.{_OLD_NAMES[end]}"] = value
            weight = plain.get(f"{name}.weight")
            fine = weight is None or weight.dtype != torch.float8_e5m2
            facts = {"format": (FP8_SCALED if fine else FP8_E5M2_SCALED).key}
            marks[name] = _as_bytes(facts | ({"full_precision_matrix_mult": True} if dequantized else {}))
    return marks


def _as_bytes(facts: object) -> Tensor:
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
