"""The manifest: a row for every input of an archive, written while the run goes on.

`OUT/manifest.jsonl` holds one JSON object a line. In a folder, rows are appended as images are done, so that a killed
run loses none. Object stores cannot append: there, rows are collected in `OUT/manifest/` a few seconds at a time. At
the end of each run all becomes one file with one row an input.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict

from .storage import is_url, join, read_lines, remove, walk, write_lines

MANIFEST = "manifest.jsonl"
PARTS = "manifest"
"""Folder of rows that are not in the one file yet."""

THUMBNAILS = "thumbnails.jsonl"
"""Small images for the summary page, for some of the rows."""

_PART_SECONDS = 10.0
_PART_ROWS = 500

State = Literal["done", "failed", "waiting"]


class Row(TypedDict, total=False):
    """What became of one input.

    Attributes:
        name: of the result, relative to the output folder, with slashes.
        source: the input's address.
        state: `waiting` has not been tried yet.
        error: why it failed.
        notes: what a user should know about the image.
        worker: which process worked on it.
        seconds: how long it worked.
        finished: when, UTC, ISO 8601.
        settings: digest of what the result depends on besides the image.
        stamp: the input's size and version, and those of its captions and its mask.
        width, height: of the result, in pixels.
        bytes_read, bytes_written: of the files.
        skipped: it was there before.
    """

    name: str
    source: str
    state: State
    error: str
    notes: list[str]
    worker: str
    seconds: float
    finished: str
    settings: str
    stamp: str
    width: int
    height: int
    bytes_read: int
    bytes_written: int
    skipped: bool


class RowLog:
    """Rows that are written to an output folder as they come.

    Args:
        out: the output folder, path or URL.
        name: of the file, such as `manifest.jsonl`.
        parts: folder for rows where a file cannot be appended to.
    """

    def __init__(self, out: str, name: str, parts: str) -> None:
        self.address, self.parts = join(out, name), join(out, parts)
        self._appends = not is_url(out)
        self._file: Any = None
        self._waiting: list[str] = []
        self._flushed = time.monotonic()
        self._number = 0
        self._run = f"{time.time_ns():020d}-{uuid.uuid4().hex[:6]}"  # later runs sort behind earlier ones

    def add(self, row: dict[str, Any]) -> None:
        """Write a row."""
        line = json.dumps(row)
        if self._appends:
            if self._file is None:
                self._file = _opened_to_append(Path(self.address))
            self._file.write(line + "\n")
            self._file.flush()
            return
        self._waiting.append(line)
        if len(self._waiting) >= _PART_ROWS or time.monotonic() - self._flushed > _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring all rows to where they last."""
        self._flushed = time.monotonic()
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._waiting:
            self._number += 1
            write_lines(join(self.parts, f"{self._run}-{self._number:06d}.jsonl"), self._waiting)
            self._waiting = []

    def close(self) -> None:
        """Bring all rows to where they last, and let go of the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, older before newer; what a killed machine left half-written is passed over."""
        yield from _decoded(self.address)
        for part in self._part_addresses():
            yield from _decoded(part)

    def replace(self, rows: Iterator[dict[str, Any]]) -> None:
        """Write these rows in the place of all that there are."""
        parts = self._part_addresses()
        write_lines(self.address, map(json.dumps, rows))
        for part in parts:
            remove(part)

    def _part_addresses(self) -> list[str]:
        if self._appends:
            return []
        with contextlib.suppress(FileNotFoundError):
            return sorted(entry.address for entry in walk(self.parts) if entry.name.endswith(".jsonl"))
        return []


def _opened_to_append(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    if file.tell():
        with open(path, "rb") as before:
            before.seek(-1, os.SEEK_END)
            if before.read(1) != b"\n":  # a killed machine left half a row: end it, so that it spoils no other
                file.write("\n")
    return file


def _decoded(address: str) -> Iterator[dict[str, Any]]:
    for line in read_lines(address):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row
