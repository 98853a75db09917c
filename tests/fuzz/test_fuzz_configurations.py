"""A short run of the configurations' fuzzer; `make fuzz` has the long one."""

from __future__ import annotations

from fuzz.failure import Failure
from fuzz.fuzz_configurations import run


def test_mutated_configurations_give_named_errors() -> None:
    assert [found for found in run(seed=1, seconds=5) if isinstance(found, Failure)] == []
