"""Tensors out of files: safetensors and torch pickles, told apart by their content, mapped and never executed."""

from __future__ import annotations

import stat
import struct
from pathlib import Path

from torch import Tensor

from ..errors import WeightsError
from .messages import REDOWNLOAD
from .pickle_file import open_pickle
from .safetensors_file import open_safetensors


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map the tensors of a safetensors file or a torch pickle, and read the text entries of the former.

    Raises:
        WeightsError: there is no such file, or it is not a readable weights file.
    """
    size = check_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(1024)
        if _sniff(path, head, size) == "safetensors":
            return open_safetensors(path)
        return open_pickle(path), {}
    except OSError as error:
        raise unreadable(path, error) from error


def check_file(path: Path) -> int:
    """Check that there is a regular file under a path, and give its size in bytes.

    Raises:
        WeightsError: there is none.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WeightsError(f"There is no file {path}. Check the name and the folder.") from error
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte; links in a circle
        raise unreadable(path, error) from error
    if stat.S_ISDIR(status.st_mode):
        raise WeightsError(f"{path} is a folder; give a weights file such as FaithDiff.bin.")
    if not stat.S_ISREG(status.st_mode):
        raise WeightsError(f"{path} is a pipe or a device; give a weights file such as FaithDiff.bin.")
    return status.st_size


def unreadable(path: Path, error: OSError | ValueError) -> WeightsError:
    """The error for a file that the system does not let us read, which is no fault of its content."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    remedy = " Give yourself the right to read it." if isinstance(error, PermissionError) else ""
    return WeightsError(f"{path.name[:255]} cannot be read: {reason}.{remedy}")


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
        raise WeightsError(f"{path.name} is a GGUF file, which is not supported. {REDOWNLOAD}")
    if head[:2] == b"PK":
        return "pickle"
    if len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**32:
        return "safetensors"
    if head[:1] == b"\x80":
        return "pickle"
    if head[8:9] == b"{":  # a header longer than any: read as one, it gets its own error
        return "safetensors"
    if text.startswith((b"{", b"[")):
        raise WeightsError(f"{path.name} is a JSON text, not a weights file. {REDOWNLOAD}")
    raise WeightsError(
        f"{path.name} is neither a safetensors file nor a torch pickle (it begins with {head[:8]!r}). {REDOWNLOAD}"
    )
