"""Writing safetensors files tensor by tensor, so that memory stays far below the file's size.

Files grow under a temporary name and get their own when they are whole: after an error, a cancel or a full disk
nothing is left behind, and what a killed process left is removed by the next one that writes the same file.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..dtypes import dtype_name, widened
from ..errors import SettingsError, WeightsError
from ..finite import is_finite
from ..models.shapes import Shape
from .messages import gigabytes
from .safetensors_file import ALL_TORCH_DTYPES, METADATA

try:
    import fcntl
except ImportError:  # Windows, which refuses to remove a file that another process has open
    fcntl = None  # type: ignore[assignment]

_FORMAT_NAMES = {dtype: name for name, dtype in ALL_TORCH_DTYPES.items()}

_CAST_VALUES = 2**15
"""Values that are checked and cast at a time: few enough to stay in the CPU's cache from one pass to the next, and for
torch to use one thread, which leaves the others to a hash, the slowest part.
"""


@dataclass(frozen=True)
class Layout:
    """Where everything of a file to be written lies.

    Attributes:
        header: the file's first bytes.
        places: position in the file and dtype of each tensor.
        size: bytes of the whole file.
    """

    header: bytes
    places: dict[str, tuple[int, torch.dtype]]
    size: int


def plan_file(tensors: Mapping[str, tuple[torch.dtype, Shape]], metadata: Mapping[str, str]) -> Layout:
    """Lay out a file.

    Args:
        tensors: dtype and shape of each.
        metadata: text entries; `format` is added.
    """
    header: dict[str, object] = {METADATA: {"format": "pt", **metadata}}
    places: dict[str, tuple[int, torch.dtype]] = {}
    position = 0
    # Wide values first keeps every tensor aligned to its own width.
    for key in sorted(tensors, key=lambda key: (-tensors[key][0].itemsize, key)):
        dtype, shape = tensors[key]
        size = torch.Size(shape).numel() * dtype.itemsize
        header[key] = {
            "dtype": _FORMAT_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        places[key] = (position, dtype)
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {key: (start + offset, dtype) for key, (offset, dtype) in places.items()}
    return Layout(struct.pack("<Q", len(text)) + text, places, start + position)


def check_free(paths: Sequence[Path], force: bool) -> None:
    """Check that no file is in the way.

    Raises:
        SettingsError: one is there, and `force` does not allow to overwrite it.
    """
    for path in paths:
        if path.is_dir():
            raise SettingsError(f"{path} is a folder, where a file is to be written. Choose another folder.")
        if path.exists() and not force:
            raise SettingsError(f"{path} exists already. Remove it, choose another folder, or overwrite it (--force).")


@contextmanager
def new_files(layouts: Mapping[Path, Layout]) -> Iterator[dict[Path, BinaryIO]]:
    """Open files to be written, with their headers in them; they get their names when the block ends well.

    Args:
        layouts: of each file, all in one folder, which is made.

    Raises:
        SettingsError: the folder cannot be written to, or the disk is full.
    """
    folder = next(iter(layouts)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in layouts:
            _remove_abandoned(path)
        _check_space(folder, sum(layout.size for layout in layouts.values()))
        with ExitStack() as stack:
            files: dict[Path, BinaryIO] = {}
            for path, layout in layouts.items():
                temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
                stack.callback(temporary.unlink, missing_ok=True)
                files[path] = stack.enter_context(temporary.open("wb"))
                _lock(files[path])
                files[path].write(layout.header)
            yield files
            for file in files.values():
                to_disk(file)
                file.close()  # Windows renames closed files only
            for path, file in files.items():
                os.replace(file.name, path)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise SettingsError(f"{folder} cannot be written to: {reason}. Make room, or choose another folder.") from error


def to_disk(file: BinaryIO) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_tensor(file: BinaryIO, layout: Layout, key: str, value: Tensor, source: str) -> None:
    """Write a tensor at its place, cast to its dtype.

    Args:
        source: name of the file that the value comes from, for the error.

    Raises:
        WeightsError: a value does not fit into the dtype.
    """
    offset, dtype = layout.places[key]
    file.seek(offset)
    for block in _cast_blocks(source, key, value, dtype):
        file.write(block)


def copy_tensor(file: BinaryIO, layout: Layout, key: str, value: Tensor) -> None:
    """Write a tensor's bytes at its place, as they are."""
    file.seek(layout.places[key][0])
    if value.numel():
        file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def check_finite(source: str, key: str, value: Tensor) -> None:
    """Refuse a tensor with values that no dtype holds.

    Args:
        source: name of the file that the value comes from, for the error.

    Raises:
        WeightsError: a value is NaN or infinite.
    """
    if not is_finite(value):
        raise WeightsError(f"{source}: {key} holds NaN or infinite values. The file is corrupted; download it again.")


def _cast_blocks(source: str, key: str, value: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """A tensor's bytes in another dtype, in blocks. A block is overwritten by the next one."""
    flat = value.contiguous().flatten()
    cast = torch.empty(min(flat.numel(), _CAST_VALUES), dtype=dtype)
    limit = torch.finfo(dtype).max
    for part in flat.split(_CAST_VALUES) if flat.numel() else ():
        wide = part.to(widened(part.dtype)) if part.dtype.itemsize == 1 else part
        low, high = (end.item() for end in torch.aminmax(wide))
        if not (low >= -limit and high <= limit):  # both are NaN if one value is
            largest = flat.to(widened(flat.dtype)).abs().amax().item()
            remedy = "Use bf16 or fp32." if largest < float("inf") else "The file is corrupted; download it again."
            raise WeightsError(
                f"{source}: {key} has a value of {largest:g}, which {dtype_name(dtype)} cannot hold. {remedy}"
            )
        block = cast[: part.numel()].copy_(wide)
        yield block.view(torch.uint8).numpy().data


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SettingsError(
            f"{folder} has {gigabytes(free)} left, but {gigabytes(needed)} are needed. Make room, or choose "
            f"another folder or a smaller dtype."
        )


def _lock(file: BinaryIO) -> None:
    """Mark a temporary file as being written, as long as its process lives."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of a target that no process writes any more: they were left by one that was killed."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(OSError):
            with part.open("rb") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
