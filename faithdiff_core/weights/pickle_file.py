"""Reading torch pickles without executing anything in them."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from .messages import REDOWNLOAD
from .safetensors_file import MAX_TENSORS

MAX_PROGRAM = 2**24
"""Largest pickle within an archive, in bytes: the names and shapes of 50,000 tensors fit."""

_WRAPPERS = ("state_dict", "module", "model", "params_ema", "params")
"""Names under which trainers keep the state dict."""

_MAX_WRAPPERS = 8
"""Dictionaries within dictionaries that are looked into; one could hold itself."""


def open_pickle(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a file that `torch.save` wrote.

    Raises:
        WeightsError: the file is corrupted or truncated, holds something else, or is named as a safetensors file.
    """
    if path.suffix == ".safetensors":  # torch.load goes by the name, and fails
        raise WeightsError(f"{path.name} is a torch pickle in spite of its name. Rename it to {path.stem}.bin.")
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_archive(path)
    else:
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                raise WeightsError(
                    f"{path.name} is truncated: the end of the file ({path.stat().st_size} bytes) is missing. The "
                    f"download stopped early. {REDOWNLOAD}"
                )
    try:
        with warnings.catch_warnings():
            # Of the pickle's protocol; whether the file can be used is said below.
            warnings.simplefilter("ignore")
            # Files of torch before 1.6 are no archives and cannot be mapped; they are read whole.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path.name} is a pickle that contains objects other than tensors; it was not loaded, because unpickling "
            f"could execute arbitrary code. {REDOWNLOAD}"
        ) from error
    except OSError:
        raise
    except Exception as error:  # hostile bytes can end an unpickler in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{path.name}: this torch file is corrupted ({reason[:200]}). {REDOWNLOAD}") from error
    return _unwrapped(path, loaded)


def _check_archive(path: Path) -> None:
    """Check an archive's table of contents before torch reads it: torch stores everything uncompressed.

    Raises:
        WeightsError: it is compressed, so that a small file could fill the memory, or describes too much.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, UnicodeError) as error:
        raise WeightsError(f"{path.name}: this torch file is corrupted ({error}). {REDOWNLOAD}") from error
    size = path.stat().st_size
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise WeightsError(
                f"{path.name} is a compressed archive, not a torch file as it was saved; torch files are stored "
                f"uncompressed. {REDOWNLOAD}"
            )
        if entry.header_offset + entry.file_size > size:
            raise WeightsError(
                f"{path.name}: this torch file is corrupted ({entry.filename[:80]} ends beyond the file). {REDOWNLOAD}"
            )
    programs = [entry.file_size for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(entries) > MAX_TENSORS or max(programs, default=0) > MAX_PROGRAM:
        raise WeightsError(f"{path.name}: this torch file describes more tensors than any model has. {REDOWNLOAD}")


def _unwrapped(path: Path, loaded: Any) -> dict[str, Tensor]:
    """Find the state dict in what a pickle holds; trainers like to wrap it."""
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(loaded, Mapping) or any(isinstance(v, Tensor) for v in loaded.values()):
            break
        inner = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path.name} holds a {type(loaded).__name__}, not a dictionary of tensors. {REDOWNLOAD}")
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if any(value.is_nested for value in tensors.values()):
        raise WeightsError(f"{path.name} holds nested tensors, which no FaithDiff file has. {REDOWNLOAD}")
    if len(tensors) > MAX_TENSORS:
        raise WeightsError(f"{path.name} holds {len(tensors)} tensors, more than any model has. {REDOWNLOAD}")
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors
