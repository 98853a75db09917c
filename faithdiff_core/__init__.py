"""FaithDiff: faithful image super-resolution with SDXL (CVPR 2025).

The parts of the method, without a host: modules, weights, tiles, schedule, colours, captions and images, and an
engine on diffusers with a command line (`python -m faithdiff_core`). The package needs torch alone; it and whatever is
heavier are imported where they are used, so that processes which only hand images on stay small.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from .errors import FaithDiffError, ImageError, MissingPackageError, SettingsError, WeightsError, install_extra

if find_spec("torch") is None:
    raise MissingPackageError(
        f"FaithDiff needs PyTorch. Install the build for your card; then {install_extra('engine')}. ComfyUI brings "
        f"what its nodes need."
    )

from .lazy import lazy_names

if TYPE_CHECKING:
    from .captions.trim import trim_caption
    from .images.color import ColorFix, adain, fix_colors, wavelet
    from .models.alignment import Alignment, AlignmentConfig
    from .models.lq_encoder import LQEncoder, LQEncoderConfig
    from .sampling.schedule import StartPoint, leading_timesteps, sampling_sigmas, start_latent
    from .tiling.grid import Tile, TileGrid, gaussian_weights
    from .weights.conversion import convert
    from .weights.faithdiff_file import FaithDiffWeights, read_faithdiff

__getattr__ = lazy_names(
    __name__,
    {
        ".captions.trim": ("trim_caption",),
        ".images.color": ("ColorFix", "adain", "fix_colors", "wavelet"),
        ".models.alignment": ("Alignment", "AlignmentConfig"),
        ".models.lq_encoder": ("LQEncoder", "LQEncoderConfig"),
        ".sampling.schedule": ("StartPoint", "leading_timesteps", "sampling_sigmas", "start_latent"),
        ".tiling.grid": ("Tile", "TileGrid", "gaussian_weights"),
        ".weights.conversion": ("convert",),
        ".weights.faithdiff_file": ("FaithDiffWeights", "read_faithdiff"),
    },
)

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "ColorFix",
    "FaithDiffError",
    "FaithDiffWeights",
    "ImageError",
    "LQEncoder",
    "LQEncoderConfig",
    "MissingPackageError",
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


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
