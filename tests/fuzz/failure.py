"""What a fuzzer found, and the limits under which its cases run."""

from __future__ import annotations

import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

CASE_SECONDS = 20
"""Processor time; a case that takes more hangs. Other programs on the machine do not count."""

WAIT_SECONDS = 200
"""Time by the clock; a case that takes longer waits for something that does not come."""

CASE_BYTES = 4 * 2**30
"""Memory that a case may take beyond what the process has."""


@dataclass(frozen=True)
class Failure:
    """One case that went wrong.

    Attributes:
        case: names the case; together with the seed it can be made again.
        what: what happened: the exception, or which promise was broken.
    """

    case: str
    what: str


Case = TypeVar("Case")


def numbered(cases: Iterator[Case], seconds: float, start: int) -> Iterator[tuple[int, Case]]:
    """Cases with their numbers, from the number `start` on; none is begun after so many seconds."""
    end = time.monotonic() + seconds
    for number, case in enumerate(cases):
        if number < start:
            continue
        if time.monotonic() > end:
            return
        yield number, case


class HangError(Exception):
    """A case took too long."""


@contextmanager
def limited() -> Iterator[None]:
    """Run a case with limits on time and memory; for the main thread."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise HangError(f"took more than {CASE_SECONDS} s of processor time, or {WAIT_SECONDS} s in all")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, CASE_SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAIT_SECONDS))

    with open("/proc/self/statm", encoding="ascii") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    old = [(number, signal.signal(number, stop)) for number, _, _ in timers]
    resource.setrlimit(resource.RLIMIT_AS, (held + CASE_BYTES, before[1]))
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for _, timer, _ in timers:
            signal.setitimer(timer, 0)
        for number, handler in old:
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(case: str, work: Callable[[], None], expected: type[Exception]) -> Failure | None:
    """Run a case within the limits; anything but success and the expected kind of error is a failure."""
    began = time.process_time()
    try:
        with limited():
            work()
    except expected:
        pass
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(case, f"{type(error).__name__}: {str(error)[:200]} ({place.name}, line {place.lineno})")
    took = time.process_time() - began
    return Failure(case, f"took {took:.0f} s of processor time") if took > CASE_SECONDS else None
