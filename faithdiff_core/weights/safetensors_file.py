"""Reading safetensors files (https://github.com/huggingface/safetensors, "Format").

The header comes from strangers: it is checked as a whole before anything is computed from it, and no size in it is
believed beyond what the file has.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from .messages import REDOWNLOAD, truncated

MAX_HEADER = 2**24
"""Largest header that is read, in bytes. FaithDiff's has 0.2 MB, that of a large LoRA with its training log a few."""

MAX_TENSORS = 50_000
"""Most tensors of a file; a whole SDXL checkpoint has 2,500."""

MAX_DIMENSIONS = 8
"""Most dimensions of a tensor; a convolution's kernels have 4."""

METADATA = "__metadata__"
"""The header's entry for texts."""

_BITS = {
    **dict.fromkeys(("F4", "U4", "I4"), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of a value by the format's name of its dtype."""

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The format's names of the dtypes that weights have."""

ALL_TORCH_DTYPES = TORCH_DTYPES | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The same with those that other tensors of a checkpoint have, such as positions."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as a header describes it.

    Attributes:
        dtype: the format's name of its dtype.
        shape: its shape.
        begin, end: where its bytes are in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: by name.
        metadata: the text entries.
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map the tensors of a file, and read its text entries.

    Raises:
        WeightsError: the file is corrupted or truncated.
    """
    from safetensors import SafetensorError, safe_open

    header = read_header(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as handle:
            return {key: handle.get_tensor(key) for key in header.tensors}, header.metadata
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path.name}: this safetensors file is corrupted ({error}). {REDOWNLOAD}") from error


def read_header(path: Path) -> Header:
    """Read and check a file's header, without its tensors.

    Raises:
        WeightsError: the header is not one, or claims more than the file has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > MAX_HEADER:
            raise WeightsError(
                f"{path.name} is corrupted: its safetensors header claims {length} bytes, more than any model's. "
                f"{REDOWNLOAD}"
            )
        text = file.read(length)
    if len(text) < length:
        raise truncated(path.name, size, 8 + length)
    try:
        raw = json.loads(text, object_pairs_hook=_once)
        header = _checked(raw, 8 + length)
    except (ValueError, RecursionError) as error:
        reason = "brackets in brackets" if isinstance(error, RecursionError) else str(error)
        raise WeightsError(
            f"{path.name}: the header of this safetensors file is corrupted ({reason}). {REDOWNLOAD}"
        ) from error
    expected = max((entry.end for entry in header.tensors.values()), default=8 + length)
    if size < expected:
        raise truncated(path.name, size, expected)
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the JSON; a name that occurs twice would hide a tensor."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _checked(raw: Any, start: int) -> Header:
    """Make a header of parsed JSON; its data begin at byte `start`.

    Raises:
        ValueError: it breaks the format; the text says how.
    """
    if not isinstance(raw, dict):
        raise ValueError("it is no object")
    metadata = raw.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA} holds more than texts")
    if len(raw) > MAX_TENSORS:
        raise ValueError(f"{len(raw)} tensors, more than any model's")
    return Header({name: _entry(name, value, start) for name, value in raw.items()}, metadata)


def _entry(name: str, value: Any, start: int) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name[:80]} has the unknown dtype {str(dtype)[:20]!r}")
    if not _whole(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name[:80]} has no shape")
    if not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name[:80]} has no pair of offsets")
    if prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{name[:80]} has another number of bytes than its shape needs")
    return TensorEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _whole(value: Any) -> bool:
    """Whether a value is a list of whole numbers of at most 64 bits."""
    # `bool` is a kind of int in Python, not in JSON.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
