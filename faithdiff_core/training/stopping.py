"""Stopping a run on request: Ctrl-C, a termination request, or a file in the output folder."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP_FILE = "stop"
"""A file of this name in the output folder stops the run as Ctrl-C does."""


class Stop:
    """Notes Ctrl-C or a termination request, so that the step at work is finished and saved first."""

    def __init__(self) -> None:
        self.asked = False

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
