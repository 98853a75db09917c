"""Clocks and memory gauges."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .settings import Settings

Work = Callable[[], object]

_M_MMAP_THRESHOLD = -3
"""The option's number in malloc.h."""

SAMPLING_SECONDS = 0.002
"""How often the memory of the process is looked at on a processor."""


@dataclass(frozen=True)
class Spread:
    """Several measurements of one quantity.

    Attributes:
        values: in the order in which they were taken.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """First quartile."""
        return self._quartiles()[0]

    @property
    def high(self) -> float:
        """Third quartile."""
        return self._quartiles()[1]

    def _quartiles(self) -> tuple[float, float]:
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third

    def times(self, factor: float) -> Spread:
        """Every measurement times a factor."""
        return Spread(tuple(value * factor for value in self.values))

    def plus(self, other: Spread) -> Spread:
        """The sums of measurements of the same rounds."""
        return Spread(tuple(a + b for a, b in zip(self.values, other.values, strict=True)))

    def over(self, other: Spread) -> Spread:
        """The quotients of measurements that were taken one after the other."""
        return Spread(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _c_library(function: str) -> Callable[..., int] | None:
    """A function of the C library's memory management; None where it has another one than glibc's."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    # The C library keeps freed blocks; a peak that fits into them would not show as growth.
    trim = _c_library("malloc_trim")
    if trim is not None:
        trim(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def interleaved(settings: Settings, sides: Mapping[str, Work], repeats: int | None = None) -> dict[str, Spread]:
    """Time several pieces of work in turns: a, b, a, b, ... after a round of warm-up.

    Args:
        settings: device, clock and number of repeats.
        sides: what to time, by name.
        repeats: another number of rounds.

    Returns:
        Seconds of each, in rounds that belong together.
    """
    clock = time.process_time if settings.clock == "cpu" else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range((settings.repeats if repeats is None else repeats) + 1):
        for name, work in sides.items():
            synchronize(settings.device)
            start = clock()
            work()
            synchronize(settings.device)
            if round_number:
                taken[name].append(clock() - start)
    return {name: Spread(tuple(values)) for name, values in taken.items()}


@contextmanager
def _large_blocks_returned() -> Iterator[None]:
    """Have the C library map every block of a megabyte on its own, which goes back to the system when it is freed.

    From its heap, a freed block often cannot serve the next aligned request of the same size, and the process grows
    by blocks that nobody holds. What counts as large is adapted by the library itself, and set by others in the
    process, so it cannot be relied on.
    """
    option = _c_library("mallopt")
    if option is not None:
        option(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        if option is not None:
            # As large as the library itself would let it become: mapping anew each time costs time.
            option(_M_MMAP_THRESHOLD, 2**25)


def peak_bytes(device: torch.device, work: Work) -> int:
    """Memory that a piece of work takes on top of what is held when it begins, at its highest point.

    On a GPU this is what torch allocates there; on a processor the growth of the process's resident memory, looked at
    every two milliseconds (Linux; elsewhere `memory_is_measured` is False), which is good to a few MiB.

    Raises:
        OSError: the system does not tell.
    """
    free_memory(device)
    synchronize(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    read = torch.mps.current_allocated_memory if device.type == "mps" else _resident_bytes
    before = highest = read()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(SAMPLING_SECONDS):
            highest = max(highest, read())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with _large_blocks_returned():
            work()
            highest = max(highest, read())
    finally:
        done.set()
        watcher.join()
    return highest - before


def held_bytes(device: torch.device) -> int:
    """What torch holds on a GPU now.

    Raises:
        ValueError: the device is a processor, where other things than models are held too.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    raise ValueError(f"expected a GPU, got {device}")


def memory_is_measured(device: torch.device) -> bool:
    """Whether `peak_bytes` works on this device and system."""
    return device.type in ("cuda", "mps") or _STATM.exists()


_STATM = Path("/proc/self/statm")


def _resident_bytes() -> int:
    import resource

    return int(_STATM.read_text().split()[1]) * resource.getpagesize()
