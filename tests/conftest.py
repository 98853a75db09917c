"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from support.golden import Golden, read_golden

from faithdiff_core.backbone import NOISE, SD15, SD21, Backbone, V

if TYPE_CHECKING:
    from tiny_models.backbones import TinyModel


@pytest.fixture(scope="session")
def golden() -> Golden:
    """The golden data; see `Golden`."""
    return read_golden()


THREADS = max(1, min(2, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
"""Small tensors are slower on many threads, and the other test processes want cores, too."""


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """For this process and for those that tests start."""
    torch.set_num_threads(THREADS)
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))


@pytest.fixture(scope="session")
def tiny_backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[Backbone, TinyModel]:
    """A v-predicting SD 2.1 and a noise-predicting SD 1.5, each with a FaithDiff file."""
    from tiny_models.backbones import write_tiny_model

    folder = tmp_path_factory.mktemp("backbones")
    predictions = {SD21: V, SD15: NOISE}
    return {backbone: write_tiny_model(folder / backbone.key, backbone, p) for backbone, p in predictions.items()}


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory, golden: Golden) -> Path:
    """An SDXL model as a diffusers folder: the golden U-Net and VAE, and random text encoders of the same kind."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file
    from tiny_models.diffusers_folder import write_tiny_sdxl

    from faithdiff_core import read_faithdiff

    folder = tmp_path_factory.mktemp("tiny_sdxl")
    unet = UNet2DConditionModel(**golden.manifest["unet"])
    unet.load_state_dict({k: v.float() for k, v in read_faithdiff(golden.model).parts["unet"].state.items()})
    vae = AutoencoderKL(**golden.manifest["vae"])
    vae.load_state_dict({key: value.float() for key, value in load_file(golden.vae).items()})
    write_tiny_sdxl(folder, unet, vae)
    return folder
