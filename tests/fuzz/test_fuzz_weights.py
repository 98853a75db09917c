"""A short run of the weights' fuzzer; `make fuzz` has the long one."""

from __future__ import annotations

from fuzz.failure import Failure
from fuzz.fuzz_weights import run


def test_mutated_weights_give_named_errors() -> None:
    assert [found for found in run(seed=1, seconds=8) if isinstance(found, Failure)] == []
