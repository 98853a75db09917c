"""Progress for people who wait: one line on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_INTERVAL = 0.1
"""Seconds between two updates."""

_WIDTH = 24


class ProgressLine:
    """One line that is written over and over.

    Args:
        quiet: write nothing.
        stream: standard error unless given; written to only if it is a terminal.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.active = not quiet and self.stream.isatty()
        self.shown_at = 0.0

    def show(self, label: str, done: int, total: int) -> None:
        """Show that `done` of `total` units are done."""
        now = time.monotonic()
        if not self.active or (done < total and now - self.shown_at < _INTERVAL):
            return
        self.shown_at = now
        part = done / total if total else 1.0
        filled = int(part * _WIDTH)
        bar = "#" * filled + "." * (_WIDTH - filled)
        self.stream.write(f"\r\x1b[K{label} [{bar}] {part:4.0%}")
        self.stream.flush()

    def clear(self) -> None:
        """Leave the line empty for other text."""
        if self.active:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
