"""Clocks and memory gauges."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch

from .settings import Settings

Work = Callable[[], object]

SAMPLING_SECONDS = 0.002
"""How often the memory of MPS is looked at."""


@dataclass(frozen=True)
class Spread:
    """Several measurements of one quantity.

    Attributes:
        values: in the order in which they were taken.
        quartiles: first and third, of a report that kept no more than these and the median.
    """

    values: tuple[float, ...]
    quartiles: tuple[float, float] | None = None

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
        if self.quartiles is not None:
            return self.quartiles
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


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
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


def peak_bytes(device: torch.device, work: Work) -> int:
    """Memory that torch allocates for a piece of work on top of what is held when it begins, at its highest point.

    On CUDA torch keeps count itself. On a CPU its profiler sees every block come and go, whatever the C library
    does with it: the process's own size would count freed blocks that are kept, and so depend on what ran before. What
    libraries below torch take for themselves is not seen. On MPS the count is looked at every two milliseconds.
    """
    free_memory(device)
    synchronize(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _watched_peak(work) if device.type == "mps" else _profiled_peak(work)


def _profiled_peak(work: Work) -> int:
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()
    changes = [
        (event.start_ns(), event.nbytes()) for event in profile.kineto_results.events() if event.name() == "[memory]"
    ]
    held = accumulate((change for _, change in sorted(changes)), initial=0)
    return max(held)


def _watched_peak(work: Work) -> int:
    before = highest = torch.mps.current_allocated_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(SAMPLING_SECONDS):
            highest = max(highest, torch.mps.current_allocated_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
        highest = max(highest, torch.mps.current_allocated_memory())
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
