"""The one way in which commands write: a whole file under its name, or none."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

TEMPORARY = ".faithdiff-"
"""How the temporary names begin."""


def temporary_name() -> str:
    """A name for a file that is being written; random, since others may write here, from other machines."""
    return f"{TEMPORARY}{uuid.uuid4().hex[:16]}.part"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside `path`, then rename: under `path` there is never half a file.

    The temporary name is short whatever `path` is called, so that a name that the file system takes can be written.

    Args:
        path: the file; its folder is made if need be.
        content: all of it.

    Raises:
        OSError: the disk is full, or the folder or the file cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name())
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
