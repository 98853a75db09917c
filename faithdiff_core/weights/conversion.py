"""Converting the published file: a U-Net that loads anywhere, and a small adapter beside it.

The published `FaithDiff.bin` holds everything in fp32, 10 GB in one pickle. `convert` streams it, tensor by tensor,
into two safetensors files (https://github.com/huggingface/safetensors, "Format"), so memory stays far below the file's
size.
"""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..dtypes import DTYPES, dtype_name
from ..errors import SettingsError, WeightsError
from .checkpoint_file import open_tensors
from .faithdiff_file import ENCODER_PREFIX, FaithDiffWeights, part_of, read_faithdiff
from .marks import PREDICTIONS, marks
from .safetensors_writer import Layout, check_free, new_files, plan_file, to_disk, write_tensor

FORMAT_VERSION = "1"
"""Goes up when a converted file's names or layout change."""

_REMAP_BYTES = 512 * 2**20
"""The source is mapped again after this many bytes: pages once read count as memory in use until their mapping ends."""

_SHA256_PLACEHOLDER = "0" * 64
"""Stands in the header until the source's SHA-256 is known; the digest has as many characters."""

Progress = Callable[[int, int], None]
"""Called as progress(done, total) with bytes of the source's tensors; it may raise to cancel."""


def convert(
    path: str | Path,
    out_dir: str | Path | None = None,
    dtype: str | torch.dtype = "fp16",
    *,
    prediction: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Split a FaithDiff file into `<name>_unet.safetensors` and `<name>_adapter.safetensors`.

    The U-Net keeps diffusers' names and loads as any U-Net of its backbone does. The adapter keeps the published names.
    Both carry the format version, their dtype and the source's SHA-256 in their metadata, and for another backbone than
    SDXL which one it is and what its U-Net predicts. They are written under temporary names
    and renamed when both are whole; after an error or a cancel nothing is left behind.

    In an fp8 file only matrices and kernels have 8 bits: biases and norms are a thousandth of the size, and a norm's
    factor of about 1 would be off by up to 6 % there. For the same reason the adapter stays in fp16: it has 90 MB
    beside the U-Net's gigabytes, and what it gets wrong shows in the image's structure.

    Args:
        path: a file that holds U-Net, LQ encoder and alignment.
        out_dir: folder to write to. Defaults to the source's.
        dtype: one of `DTYPES`, by name or as torch's.
        prediction: what the U-Net predicts, `epsilon` (noise) or `v_prediction`, for a file that does not say it.
        force: overwrite files that are there.
        progress: called as progress(done, total) in bytes; may raise to cancel.

    Returns:
        Paths of the U-Net and the adapter.

    Raises:
        WeightsError: the source is no such file, or a value does not fit into the dtype.
        SettingsError: the dtype or the prediction is unknown, a file is in the way, or the disk is too full.
    """
    path = Path(path)
    target = check_dtype(dtype)
    if prediction is not None and prediction not in PREDICTIONS:
        raise SettingsError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction}.")
    folder = path.parent if out_dir is None else Path(out_dir)
    weights = read_faithdiff(path)
    if weights.kind != "full":
        raise WeightsError(
            f"{path.name} holds only {', '.join(sorted(weights.parts))}; there is nothing to split. Give the published "
            f"FaithDiff.bin, which holds U-Net, LQ encoder and alignment."
        )
    if weights.marked is not None and prediction not in (None, weights.marked):
        raise SettingsError(
            f"{path.name} says that its U-Net predicts {weights.marked}, and prediction is {prediction}. Leave it out."
        )
    weights = replace(weights, marked=weights.marked or prediction)
    paths = {name: folder / f"{path.stem}_{name}.safetensors" for name in ("unet", "adapter")}
    check_free(list(paths.values()), force)
    layouts = {name: _layout(name, path, weights, target) for name in paths}
    del weights
    with _hashing(path) as digest, new_files({out: layouts[name] for name, out in paths.items()}) as files:
        named = {name: files[out] for name, out in paths.items()}
        _write_tensors(path, named, layouts, progress)
        for file in named.values():
            to_disk(file)  # what takes time goes to the disk while the source is still being hashed
        sha256 = digest().encode()
        for name, file in named.items():
            file.seek(layouts[name].header.index(_SHA256_PLACEHOLDER.encode()))
            file.write(sha256)
    return paths["unet"], paths["adapter"]


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype of `DTYPES`, given by name or as torch's.

    Raises:
        SettingsError: it is none of them.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise SettingsError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}.")
    return found


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


def _layout(name: str, path: Path, weights: FaithDiffWeights, target: torch.dtype) -> Layout:
    """The layout of a converted file."""
    tensors: dict[str, Tensor] = {}
    if name == "unet":
        tensors |= weights.parts["unet"].state
    else:
        tensors |= {ENCODER_PREFIX + key: value for key, value in weights.parts["lq_encoder"].state.items()}
        tensors |= weights.parts["alignment"].state
    kinds = {key: (_stored_dtype(name, tensor, target), tuple(tensor.shape)) for key, tensor in tensors.items()}
    widest = max((dtype for dtype, _ in kinds.values()), key=lambda dtype: dtype.itemsize)
    metadata = {
        "faithdiff.format_version": FORMAT_VERSION,
        "faithdiff.part": name,
        "faithdiff.dtype": dtype_name(target if name == "unet" else widest),
        "faithdiff.source_sha256": _SHA256_PLACEHOLDER,
        "faithdiff.source": path.name,
        **marks(weights.backbone, weights.prediction),
    }
    return plan_file(kinds, metadata)


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
        value = tensors[key]
        mapped += value.nbytes
        write_tensor(files[name], layouts[name], own_key, value, path.name)
        done += value.nbytes
        if progress is not None:
            progress(done, total)


def _is_mapped(path: Path) -> bool:
    """Whether opening a file maps its tensors. Those of torch before 1.6 are read whole, each time."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{" or zipfile.is_zipfile(path)


@contextmanager
def _hashing(path: Path) -> Iterator[Callable[[], str]]:
    """Compute a file's SHA-256 on a separate thread; returns a function that waits for it."""
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
