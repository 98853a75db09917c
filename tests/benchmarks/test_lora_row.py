"""The row about LoRAs at a size that takes no time: its errors are those of exact decompositions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import rows_lora
from benchmarks.settings import Settings
from faithdiff_core.weights.unet_shapes import UNetConfig

TINY = UNetConfig((32, 64, 64), 1, (0, 1, 1), 1, 64, 96)


def test_errors_are_those_of_exact_decompositions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rows_lora, "SMALL_UNET", TINY)
    monkeypatch.setattr(rows_lora, "LAYERS", (("small", (300, 220)),))
    settings = Settings(torch.device("cpu"), torch.float32, (64,), 1, 1, True, "wall", lambda line: None)
    results = {result.case: result for result in rows_lora.extraction(settings)}
    fine_tuned, base = (load_file(path) for path in rows_lora.write_pair(tmp_path, TINY))
    spectra = [
        torch.linalg.svdvals((value - base[name].float()).flatten(1).double()).square()
        for name, value in fine_tuned.items()
        if value.ndim > 1
    ]
    energy = sum(float(values.sum()) for values in spectra)
    for rank in rows_lora.RANKS:
        expected = (sum(float(values[rank:].sum()) for values in spectra) / energy) ** 0.5
        found = results[f"relative error at rank {rank}"].ours
        assert found is not None
        assert found.median == pytest.approx(expected, rel=0.02, abs=2e-3)
    assert any(result.verdict == "met" for case, result in results.items() if "memory" in case)
