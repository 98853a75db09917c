"""FaithDiff: faithful image super-resolution with SDXL (CVPR 2025).

The parts of the method, without a host: modules, weights, tiles, schedule, colours, captions and pictures, and an
engine on diffusers with a command line (`python -m faithdiff_core`). Importing the package needs torch alone;
everything heavier is imported where it is used.
"""

from __future__ import annotations

from .errors import (  # isort: skip
    FaithDiffError,
    MissingPackageError,
    PictureError,
    SettingsError,
    WeightsError,
    install_extra,
)

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingPackageError(
        f"FaithDiff needs PyTorch. Install the build for your card; then {install_extra('engine')}. ComfyUI brings "
        f"what its nodes need."
    ) from error

from .alignment import Alignment, AlignmentConfig
from .captions import trim_caption
from .color import ColorFix, adain, fix_colors, wavelet
from .convert import convert
from .lq_encoder import LQEncoder, LQEncoderConfig
from .schedule import StartPoint, leading_timesteps, sampling_sigmas, start_latent
from .tiles import Tile, TileGrid, gaussian_weights
from .weights import FaithDiffWeights, read_faithdiff

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "ColorFix",
    "FaithDiffError",
    "FaithDiffWeights",
    "LQEncoder",
    "LQEncoderConfig",
    "MissingPackageError",
    "PictureError",
    "SettingsError",
    "StartPoint",
    "Tile",
    "TileGrid",
    "WeightsError",
    "__version__",
    "adain",
    "convert",
    "fix_colors",
    "gaussian_weights",
    "leading_timesteps",
    "read_faithdiff",
    "sampling_sigmas",
    "start_latent",
    "trim_caption",
    "wavelet",
]
