"""A small base model, images and configurations for the tests of training."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.training import ROOT, SIZE, Make

from faithdiff_core.training.config import DataConfig, StageConfig, TrainConfig
from faithdiff_core.training.degradation import DegradationConfig


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    """One thread everywhere, so that sums are added in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Any:
    """accelerate holds one precision for a process's life."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base model with an untrained U-Net."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(ROOT / "demo" / "model", folder)
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small photographs with captions, as text and as JSON."""
    from skimage import data

    folder = tmp_path_factory.mktemp("images")
    for index in range(6):
        source = (data.astronaut, data.coffee, data.chelsea)[index % 3]()
        crop = source[50 + 20 * index : 150 + 20 * index, 100:220]
        Image.fromarray(crop).save(folder / f"{index}.png")
        if index % 2:
            (folder / f"{index}.json").write_text(json.dumps({"caption": f"Photograph {index}."}))
        else:
            (folder / f"{index}.txt").write_text(f"Photograph {index}.\n")
    return folder


@pytest.fixture
def make(base: Path, images: Path, tmp_path: Path) -> Make:
    """Makes small configurations."""

    def configuration(**changes: Any) -> TrainConfig:
        data = DataConfig(folder=images, size=SIZE, degradation=DegradationConfig(scale=2), **changes.pop("data", {}))
        defaults: dict[str, Any] = {
            "base": base,
            "output": tmp_path / "out",
            "data": data,
            "stages": (StageConfig(1, 3, 1e-3, 1e-3, 1), StageConfig(2, 3, 1e-3, 1e-3, 1)),
            "batch": 2,
            "workers": 0,
            "ema": 0.9,
            "save_precision": "fp32",
            "tensorboard": False,
        }
        return TrainConfig(**(defaults | changes))

    return configuration
