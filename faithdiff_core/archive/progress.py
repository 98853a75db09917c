"""How far a long run is: counts, speed and time left, by worker."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TextIO

from .manifest import Row

_WINDOW = 300.0
"""Seconds over which the speed is taken: recent enough to follow workers that come and go."""

_LINE_EVERY = 60.0
"""Seconds between two lines where no terminal shows them."""

_TERMINAL_EVERY = 0.5


class RunProgress:
    """Counts what has been done, and writes it.

    Args:
        total: number of images to do.
        quiet: write nothing.
        stream: defaults to standard error.
    """

    def __init__(self, total: int, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.total = total
        self.done = self.failed = self.skipped = 0
        self.workers: dict[str, list[float]] = {}
        """By worker: images done, images failed, seconds of work."""
        self._quiet = quiet
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._started = self._shown = time.monotonic()
        self._recent: deque[tuple[float, float]] = deque([(self._started, 0.0)])

    @property
    def finished(self) -> int:
        """Number of images that are done, failed or were done before."""
        return self.done + self.failed + self.skipped

    def add(self, row: Row) -> None:
        """Count an image."""
        counts = self.workers.setdefault(row.get("worker", ""), [0, 0, 0.0])
        failed = row["state"] == "failed"
        self.failed += failed
        self.skipped += not failed and row.get("skipped", False)
        self.done += not failed and not row.get("skipped", False)
        counts[failed] += 1
        counts[2] += row.get("seconds", 0.0)
        self._recent.append((time.monotonic(), row.get("width", 0) * row.get("height", 0) / 1e6))
        while len(self._recent) > 2 and self._recent[0][0] < self._recent[-1][0] - _WINDOW:
            self._recent.popleft()

    def speed(self) -> tuple[float, float]:
        """Images and megapixels a second, lately."""
        span = max(time.monotonic() - self._recent[0][0], 1e-6)
        return (len(self._recent) - 1) / span, sum(pixels for _, pixels in list(self._recent)[1:]) / span

    def line(self) -> str:
        """All of it in one line."""
        images, megapixels = self.speed()
        left = (self.total - self.finished) / images if images else 0.0
        return (
            f"{self.finished} of {self.total}: {self.done} done, {self.failed} failed; {images:.3g} images/s, "
            f"{megapixels:.3g} MP/s; {len(self.workers)} worker(s); {duration(left)} left"
        )

    def show(self) -> None:
        """Write the line, if it is time to."""
        now = time.monotonic()
        if self._quiet or now - self._shown < (_TERMINAL_EVERY if self._terminal else _LINE_EVERY):
            return
        self._shown = now
        self._stream.write(f"\r\x1b[K{self.line()}" if self._terminal else self.line() + "\n")
        self._stream.flush()

    def clear(self) -> None:
        """Leave the terminal's line empty for other text."""
        if self._terminal and not self._quiet:
            self._stream.write("\r\x1b[K")

    def by_worker(self) -> list[str]:
        """A line for each worker."""
        return [
            f"{name}: {done:.0f} done, {failed:.0f} failed, {seconds / max(done + failed, 1):.2f} s each"
            for name, (done, failed, seconds) in sorted(self.workers.items())
        ]


def duration(seconds: float) -> str:
    """A time in words: 3 d 4 h, 2 h 5 min, 40 s."""
    whole = round(seconds)
    for size, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // smaller} {smaller_name}"
    return f"{whole} s"
