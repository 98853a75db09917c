"""Tensors of a large weights file, one at a time, without holding the others."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ..dtypes import READABLE_DTYPES, dtype_name
from ..errors import WeightsError
from ..models.shapes import Shape
from .checkpoint_file import check_file, open_tensors, unreadable
from .quantized_state import check_not_quantized
from .safetensors_file import ALL_TORCH_DTYPES, read_header

REMAP_BYTES = 512 * 2**20
"""Re-open the memory map after this many bytes: pages once read count as memory in use until their mapping ends."""


class TensorReader:
    """A weights file of either format.

    Attributes:
        path: the file.
        metadata: the text entries of a safetensors file; empty for a pickle.
        kinds: dtype and shape of each tensor.
    """

    def __init__(self, path: Path) -> None:
        """Read what the file holds, without its values.

        Raises:
            WeightsError: it is not a readable weights file.
        """
        check_file(path)
        self.path = path
        tensors, self.metadata = open_tensors(path)
        self.kinds: dict[str, tuple[torch.dtype, Shape]] = {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}
        self._places = _places(path)
        # Pickles of torch before 1.6 are read whole: they stay in memory instead of being read again and again.
        self._tensors = {} if self._places is not None or zipfile.is_zipfile(path) else tensors
        self._whole = bool(self._tensors)
        self._mapped = 0

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of each tensor."""
        return {name: shape for name, (_, shape) in self.kinds.items()}

    def read(self, name: str) -> Tensor:
        """One tensor's values, in memory of its own where the format allows.

        Raises:
            WeightsError: the file cannot be read.
        """
        try:
            if self._places is not None:
                begin, end = self._places[name]
                buffer = bytearray(end - begin)
                with self.path.open("rb") as file:
                    file.seek(begin)
                    if file.readinto(buffer) != end - begin:
                        raise WeightsError(f"{self.path.name} ends within {name}: it changed while it was read.")
                dtype, shape = self.kinds[name]
                return (
                    torch.frombuffer(buffer, dtype=dtype).reshape(shape) if buffer else torch.empty(shape, dtype=dtype)
                )
            if not self._whole and (not self._tensors or self._mapped > REMAP_BYTES):
                self._tensors = {}
                self._tensors, self._mapped = open_tensors(self.path)[0], 0
        except OSError as error:
            raise unreadable(self.path, error) from error
        value = self._tensors[name]
        self._mapped += value.nbytes
        return value

    def check_not_quantized(self) -> None:
        """Refuse a file with quantized layers, whose values are wrong without their scales.

        Raises:
            WeightsError: it is one.
        """
        check_not_quantized(
            self.path.name, self.kinds, self.metadata, "Give the file that it was made from, in fp16, bf16 or fp32."
        )

    def check_weight(self, name: str) -> None:
        """Refuse a tensor that is no weight.

        Raises:
            WeightsError: it is stored as integers, complex numbers or the like.
        """
        dtype = self.kinds[name][0]
        if dtype not in READABLE_DTYPES:
            raise WeightsError(
                f"{self.path.name}: {name} is stored as {dtype_name(dtype)}, which is not supported. Give a file in "
                f"fp32, fp16, bf16 or fp8, without the quantisation of other programs."
            )


def _places(path: Path) -> dict[str, tuple[int, int]] | None:
    """Where the tensors of a safetensors file begin and end; None for a pickle."""
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{" or zipfile.is_zipfile(path):
            return None
    header = read_header(path)
    for name, entry in header.tensors.items():
        if entry.dtype not in ALL_TORCH_DTYPES:
            raise WeightsError(f"{path.name}: {name} is stored as {entry.dtype}, which is not supported.")
    return {name: (entry.begin, entry.end) for name, entry in header.tensors.items()}
