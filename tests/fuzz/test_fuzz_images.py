"""A short run of the images' fuzzer; `make fuzz` has the long one."""

from __future__ import annotations

from fuzz.failure import Failure
from fuzz.fuzz_images import run


def test_mutated_images_give_named_errors() -> None:
    assert [found for found in run(seed=1, seconds=6) if isinstance(found, Failure)] == []
