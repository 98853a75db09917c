"""What the tests of training share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from faithdiff_core.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]

SIZE = 64
"""Side of the crops in pixels."""

Make = Callable[..., TrainConfig]
"""Makes a small configuration, with changes."""


def same_files(first: Path, second: Path) -> bool:
    """Whether two safetensors files hold the same tensors, bit for bit."""
    with safe_open(str(first), "pt") as one, safe_open(str(second), "pt") as two:
        if set(one.keys()) != set(two.keys()):
            return False
        return all(one.get_tensor(key).equal(two.get_tensor(key)) for key in one.keys())  # noqa: SIM118
