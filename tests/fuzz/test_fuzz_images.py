"""A short run of the images' fuzzer; `make fuzz` has the long one."""

from __future__ import annotations

from fuzz.fuzz_images import run


def test_mutated_images_give_named_errors() -> None:
    assert run(seed=1, seconds=6) == []
