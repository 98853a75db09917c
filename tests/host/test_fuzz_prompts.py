"""A short run of the prompts' fuzzer; `make fuzz` has the long one."""

from __future__ import annotations

from comfy_host import Server
from fuzz.failure import Failure
from fuzz.fuzz_prompts import fuzz


def test_mutated_prompts_give_images_or_named_errors(server: Server) -> None:
    assert [found for found in fuzz(server, seed=1, seconds=12) if isinstance(found, Failure)] == []
