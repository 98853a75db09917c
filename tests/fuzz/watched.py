"""Fuzzers in processes of their own, so that a case that hangs or crashes ends that process and not the run."""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import psutil

from fuzz.failure import CASE_SECONDS, WAIT_SECONDS, Failure

SILENCE = 5 * CASE_SECONDS
"""Processor time after which a process that begins no new case hangs in code that no alarm reaches; a case has several
operations, each with limits of its own."""

LONG_SILENCE = 5 * WAIT_SECONDS
"""The same by the clock, for a process that waits."""

_CONTEXT = multiprocessing.get_context("spawn")


@dataclass
class Watched:
    """A fuzzer's run.

    Args:
        name: of the fuzzer's module in this package; its `run(seed, seconds, start)` yields the number of each case
            before it is tried, and failures.
        seed: of the cases.
        seconds: after this time no new case is begun.

    Attributes:
        cases: how many were begun.
        failures: what was found so far.
    """

    name: str
    seed: int
    seconds: float
    cases: int = 0
    failures: list[Failure] = field(default_factory=list)

    def watch(self) -> Iterator[Failure]:
        """Run to the end, beginning again behind a case that hangs or crashes; yields failures as they are found."""
        end = time.monotonic() + self.seconds
        start = 0
        while time.monotonic() < end:
            for found in self._one_process(start, end):
                self.failures.append(found)
                yield found
            start = self.cases

    def _one_process(self, start: int, end: float) -> Iterator[Failure]:
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_work, args=(self.name, self.seed, end - time.monotonic(), start, there))
        process.start()
        there.close()
        try:
            while True:
                if not _speaks(here, process.pid):
                    yield Failure(f"{self.name} {self.seed} {self.cases - 1}", "hangs: killed")
                    return
                message: Any = here.recv()
                if message is None:
                    return
                if isinstance(message, Failure):
                    yield message
                else:
                    self.cases = message + 1
        except EOFError:
            process.join()
            yield Failure(f"{self.name} {self.seed} {self.cases - 1}", f"the process ended with {process.exitcode}")
        finally:
            process.kill()
            process.join()


def _speaks(here: Connection, pid: int | None) -> bool:
    """Whether the process sends a message, or ends, before it hangs."""
    began, busy = time.monotonic(), _processor_time(pid)
    while not here.poll(1.0):
        if time.monotonic() - began > LONG_SILENCE or _processor_time(pid) - busy > SILENCE:
            return False
    return True


def _processor_time(pid: int | None) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _work(name: str, seed: int, seconds: float, start: int, to: Connection) -> None:
    for message in importlib.import_module(f"fuzz.{name}").run(seed, seconds, start):
        to.send(message)
    to.send(None)
