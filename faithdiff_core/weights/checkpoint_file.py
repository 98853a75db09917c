"""Tensors out of files: safetensors and torch pickles, told apart by their content, mapped and never executed."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_WRAPPERS = ("state_dict", "module", "model", "params_ema", "params")

REDOWNLOAD = (
    "Download FaithDiff.bin of the FaithDiff project again, or convert it with `python -m faithdiff_core convert`."
)


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map the tensors of a safetensors file or a torch pickle, and read the text entries of the former.

    Raises:
        WeightsError: there is no such file, or it is not a readable weights file.
    """
    if not path.exists():
        raise WeightsError(f"There is no file {path}. Check the name and the folder.")
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; give a weights file such as FaithDiff.bin.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1024)
    kind = _sniff(path, head, size)
    if kind == "safetensors":
        return _open_safetensors(path, size)
    return _open_pickle(path), {}


def _sniff(path: Path, head: bytes, size: int) -> str:
    """Tell safetensors from pickle by content, and name what is neither."""
    text = head.lstrip().lower()
    if not head:
        raise WeightsError(f"{path.name} is empty (0 bytes): the download failed. {REDOWNLOAD}")
    if text.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path.name} is a git-lfs pointer of {size} bytes, not the weights. Run `git lfs pull` in its folder, or "
            f"download the file itself."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise WeightsError(
            f"{path.name} is a web page saved under the name of a weights file: the download was answered with a page "
            f"(a log-in, perhaps). {REDOWNLOAD}"
        )
    if head.startswith(b"GGUF"):
        raise WeightsError(f"{path.name} is a GGUF file, which FaithDiff is not published as. {REDOWNLOAD}")
    if head[:2] == b"PK":
        return "pickle"
    if len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**32:
        return "safetensors"
    if head[:1] == b"\x80":
        return "pickle"
    if text.startswith((b"{", b"[")):
        raise WeightsError(f"{path.name} is a JSON text, not a weights file. {REDOWNLOAD}")
    raise WeightsError(
        f"{path.name} is neither a safetensors file nor a torch pickle (it begins with {head[:8]!r}). {REDOWNLOAD}"
    )


def _open_safetensors(path: Path, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header_bytes = file.read(length)
    if len(header_bytes) < length:
        raise _truncated(path, size, 8 + length)
    try:
        header = json.loads(header_bytes)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path.name}: the header of this safetensors file is damaged. {REDOWNLOAD}") from error
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise _truncated(path, size, expected)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{path.name}: this safetensors file is damaged ({error}). {REDOWNLOAD}") from error


def _open_pickle(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":  # torch.load goes by the name, and fails
        raise WeightsError(f"{path.name} is a torch pickle in spite of its name. Rename it to {path.stem}.bin.")
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not zipped and file.read(2) == b"PK":
            raise WeightsError(
                f"{path.name} is cut: the end of the file ({path.stat().st_size} bytes) is missing. The download "
                f"stopped early. {REDOWNLOAD}"
            )
    try:
        # Files of torch before 1.6 are no archives and cannot be mapped; they are read whole.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path.name} is a pickle with more in it than tensors; it was not loaded, because such a file can run any "
            f"program. {REDOWNLOAD}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise WeightsError(f"{path.name}: this torch file is damaged ({error}). {REDOWNLOAD}") from error
    return _unwrapped(path, loaded)


def _unwrapped(path: Path, loaded: Any) -> dict[str, Tensor]:
    """Find the state dict in what a pickle holds; trainers like to wrap it."""
    while isinstance(loaded, Mapping) and not any(isinstance(v, Tensor) for v in loaded.values()):
        inner = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path.name} holds a {type(loaded).__name__}, not a dictionary of tensors. {REDOWNLOAD}")
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _truncated(path: Path, size: int, expected: int) -> WeightsError:
    return WeightsError(
        f"{path.name} is cut: it has {size} of {expected} bytes. The download stopped early. {REDOWNLOAD}"
    )


def listing(names: list[str]) -> str:
    return ", ".join(names) if names else "nothing"
