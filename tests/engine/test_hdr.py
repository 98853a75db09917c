"""The HDR effect in the engine: on the input of the first pass, not on the colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.golden import Golden

from faithdiff_core.engine import FaithDiffPipeline
from faithdiff_core.images.hdr import hdr_effect


def test_the_effect_is_on_the_input_of_the_first_pass(tiny_sdxl: Path, golden: Golden) -> None:
    pipeline = FaithDiffPipeline.from_files(tiny_sdxl, golden.model, dtype="fp32", device="cpu")
    image = torch.rand(1, 3, 64, 72, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"scale": 1.0, "steps": 1, "cfg": 1.0, "seed": 1, "color_fix": "none"}
    for passes in (1, 2):
        expected = pipeline(hdr_effect(image, 1.0), passes=passes, **options)
        off = (pipeline(image, passes=passes, **options) - expected).abs().max()
        on = (pipeline(image, hdr=1.0, passes=passes, **options) - expected).abs().max()
        assert on < 1e-6 < 2e-5 < off
    colours = pipeline(image, hdr=1.0, **{**options, "color_fix": "adain"})
    assert torch.allclose(colours.mean((-2, -1)), image.mean((-2, -1)), atol=0.02)
