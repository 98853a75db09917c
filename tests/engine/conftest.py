"""The engine with the golden model, for the tests that compare its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.golden import Golden

from faithdiff_core.engine import FaithDiffPipeline, TextConditioning


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl: Path, golden: Golden) -> FaithDiffPipeline:
    return FaithDiffPipeline.from_files(tiny_sdxl, golden.model, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def text(golden: Golden) -> TextConditioning:
    return TextConditioning(*(golden.tensors[name] for name in ("pos", "pos_pooled", "neg", "neg_pooled")))
