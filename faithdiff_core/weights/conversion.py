"""Converting the published file: a U-Net that loads anywhere, and a small adapter beside it.

The published `FaithDiff.bin` holds everything in fp32, 10 GB in one pickle. `convert` streams it, tensor by tensor,
into two safetensors files (https://github.com/huggingface/safetensors, "Format"), so memory stays far below the file's
size.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..dtypes import DTYPES, dtype_name, widened
from ..errors import SettingsError, WeightsError
from .checkpoint_file import open_tensors
from .faithdiff_file import ENCODER_PREFIX, FaithDiffWeights, part_of, read_faithdiff

FORMAT_VERSION = "1"
"""Goes up when a converted file's names or layout change."""

_FORMAT_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""What safetensors calls them."""

_REMAP_BYTES = 512 * 2**20
"""After so many bytes the source is mapped anew: pages once read count as memory in use until their mapping ends."""

_CAST_VALUES = 2**15
"""Values that are checked and cast at a time: few enough to stay in the processor's cache from one pass to the next,
and for torch to use one thread, which leaves the others to the hash, the slowest part.
"""

_SHA256_PLACEHOLDER = "0" * 64
"""Stands in the header until the source's SHA-256 is known; the digest has as many characters."""

Progress = Callable[[int, int], None]
"""Called as progress(done, total) with bytes of the source's tensors; it may raise to cancel."""


def convert(
    path: str | Path,
    out_dir: str | Path | None = None,
    dtype: str | torch.dtype = "fp16",
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Split a FaithDiff file into `<name>_unet.safetensors` and `<name>_adapter.safetensors`.

    The U-Net keeps diffusers' names and loads as any SDXL U-Net does. The adapter keeps the published names. Both carry
    the format version, their dtype and the source's SHA-256 in their metadata. They are written under temporary names
    and renamed when both are whole; after an error or a cancel nothing is left behind.

    In an fp8 file only matrices and kernels have 8 bits: biases and norms are a thousandth of the size, and a norm's
    factor of about 1 would be off by up to 6 % there. For the same reason the adapter stays in fp16: it has 90 MB
    beside the U-Net's gigabytes, and what it gets wrong shows in the image's structure.

    Args:
        path: a file that holds U-Net, LQ encoder and alignment.
        out_dir: where to write; beside the source unless told.
        dtype: one of `DTYPES`, by name or as torch's.
        force: overwrite files that are there.
        progress: called as progress(done, total) in bytes; may raise to cancel.

    Returns:
        Paths of the U-Net and the adapter.

    Raises:
        WeightsError: the source is no such file, or a value does not fit into the dtype.
        SettingsError: the dtype is unknown, a file is in the way, or the disk is too full.
    """
    path = Path(path)
    target = check_dtype(dtype)
    folder = path.parent if out_dir is None else Path(out_dir)
    weights = read_faithdiff(path)
    if weights.kind != "full":
        raise WeightsError(
            f"{path.name} holds only {', '.join(sorted(weights.parts))}; there is nothing to split. Give the published "
            f"FaithDiff.bin, which holds U-Net, LQ encoder and alignment."
        )
    paths = {name: folder / f"{path.stem}_{name}.safetensors" for name in ("unet", "adapter")}
    for out in paths.values():
        if out.exists() and not force:
            raise SettingsError(f"{out} exists already. Remove it, choose another folder, or overwrite it (--force).")
    headers = {name: _header(name, path, weights, target) for name in paths}
    del weights
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(size for _, _, size in headers.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise SettingsError(
            f"{folder} has {free / 1e9:.1f} GB left, but {needed / 1e9:.1f} GB are needed. Make room, or choose "
            f"another folder or a smaller dtype."
        )
    with ExitStack() as stack:
        digest = stack.enter_context(_hashing(path))
        files: dict[str, BinaryIO] = {}
        for name, out in paths.items():
            temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
            stack.callback(temporary.unlink, missing_ok=True)
            files[name] = stack.enter_context(temporary.open("wb"))
            files[name].write(headers[name][0])
        _write_tensors(path, files, {name: layout for name, (_, layout, _) in headers.items()}, progress)
        for file in files.values():
            _to_disk(file)  # what takes time goes to the disk while the source is still being hashed
        sha256 = digest().encode()
        for name, file in files.items():
            file.seek(headers[name][0].index(_SHA256_PLACEHOLDER.encode()))
            file.write(sha256)
            _to_disk(file)
            file.close()  # Windows renames closed files only
        for name, out in paths.items():
            os.replace(files[name].name, out)
    return paths["unet"], paths["adapter"]


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype of `DTYPES`, given by name or as torch's.

    Raises:
        SettingsError: it is none of them.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _FORMAT_NAMES:
        raise SettingsError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}.")
    return found


Layout = dict[str, tuple[int, torch.dtype]]
"""Position in the file and dtype of each tensor, by its name in the file."""


def _file_of(key: str) -> tuple[str, str] | None:
    """Which converted file a key of the source goes to, and its name there."""
    place = part_of(key)
    if place is None:
        return None
    return ("unet", place[1]) if place[0] == "unet" else ("adapter", key)


def _stored_dtype(name: str, tensor: Tensor, target: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor is kept; see `convert` for the reasons."""
    if target.itemsize > 1 or (name == "unet" and tensor.ndim > 1):
        return target
    return torch.float16


def _header(name: str, path: Path, weights: FaithDiffWeights, target: torch.dtype) -> tuple[bytes, Layout, int]:
    """The first bytes of a converted file, where its tensors lie, and its size."""
    tensors: dict[str, Tensor] = {}
    if name == "unet":
        tensors |= weights.parts["unet"].state
    else:
        tensors |= {ENCODER_PREFIX + key: value for key, value in weights.parts["lq_encoder"].state.items()}
        tensors |= weights.parts["alignment"].state
    dtypes = {key: _stored_dtype(name, tensor, target) for key, tensor in tensors.items()}
    widest = max(dtypes.values(), key=lambda dtype: dtype.itemsize)
    header: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "faithdiff.format_version": FORMAT_VERSION,
            "faithdiff.part": name,
            "faithdiff.dtype": dtype_name(target if name == "unet" else widest),
            "faithdiff.source_sha256": _SHA256_PLACEHOLDER,
            "faithdiff.source": path.name,
        }
    }
    layout: Layout = {}
    position = 0
    # Wide values first keeps every tensor aligned to its own width.
    for key in sorted(tensors, key=lambda key: (-dtypes[key].itemsize, key)):
        size = tensors[key].numel() * dtypes[key].itemsize
        header[key] = {
            "dtype": _FORMAT_NAMES[dtypes[key]],
            "shape": list(tensors[key].shape),
            "data_offsets": [position, position + size],
        }
        layout[key] = (position, dtypes[key])
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    layout = {key: (start + offset, dtype) for key, (offset, dtype) in layout.items()}
    return struct.pack("<Q", len(text)) + text, layout, start + position


def _write_tensors(
    path: Path, files: dict[str, BinaryIO], layouts: dict[str, Layout], progress: Progress | None
) -> None:
    tensors, _ = open_tensors(path)
    todo = [key for key in tensors if _file_of(key) is not None]
    total = sum(tensors[key].nbytes for key in todo)
    limit = _REMAP_BYTES if _is_mapped(path) else total
    done = mapped = 0
    for key in todo:
        if mapped > limit:
            tensors.clear()
            tensors, _ = open_tensors(path)
            mapped = 0
        place = _file_of(key)
        assert place is not None
        name, own_key = place
        offset, dtype = layouts[name][own_key]
        value = tensors[key]
        mapped += value.nbytes
        files[name].seek(offset)
        for block in _cast_blocks(path, key, value, dtype):
            files[name].write(block)
        done += value.nbytes
        if progress is not None:
            progress(done, total)


def _is_mapped(path: Path) -> bool:
    """Whether opening a file maps its tensors. Those of torch before 1.6 are read whole, each time."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{" or zipfile.is_zipfile(path)


def _cast_blocks(path: Path, key: str, value: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """A tensor's bytes in another dtype, in blocks. A block is overwritten by the next one."""
    flat = value.contiguous().flatten()
    cast = torch.empty(min(flat.numel(), _CAST_VALUES), dtype=dtype)
    limit = torch.finfo(dtype).max
    for part in flat.split(_CAST_VALUES) if flat.numel() else ():
        part = part.to(widened(part.dtype)) if part.dtype.itemsize == 1 else part
        low, high = (end.item() for end in torch.aminmax(part))
        if not (low >= -limit and high <= limit):  # both are NaN if one value is
            largest = flat.abs().amax().item()
            remedy = "Use bf16 or fp32." if largest < float("inf") else "The file is damaged; download it again."
            raise WeightsError(
                f"{path.name}: {key} has a value of {largest:g}, which {dtype_name(dtype)} cannot hold. {remedy}"
            )
        block = cast[: part.numel()].copy_(part)
        yield block.view(torch.uint8).numpy().data


@contextmanager
def _hashing(path: Path) -> Iterator[Callable[[], str]]:
    """Compute a file's SHA-256 on a thread of its own; gives a function that waits for it."""
    digest = hashlib.sha256()
    stop = threading.Event()
    failure: list[OSError] = []

    def work() -> None:
        try:
            with path.open("rb") as file:
                while not stop.is_set() and (block := file.read(2**20)):
                    digest.update(block)
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="faithdiff-sha256", daemon=True)
    thread.start()

    def result() -> str:
        thread.join()
        if failure:
            raise WeightsError(f"{path.name} cannot be read to its end ({failure[0]}).") from failure[0]
        return digest.hexdigest()

    try:
        yield result
    finally:
        stop.set()
        thread.join()
