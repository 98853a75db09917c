"""A short run of the weights' fuzzer; `make fuzz` has the long one."""

from __future__ import annotations

from fuzz.fuzz_weights import run


def test_mutated_weights_give_named_errors() -> None:
    assert run(seed=1, seconds=8) == []
