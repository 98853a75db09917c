"""What travels through graphs beside ComfyUI's own types."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io
from torch import Tensor

from ...faithdiff_core.backbone import SDXL, Backbone
from ...faithdiff_core.images.metadata import Metadata

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

FaithDiffType = io.Custom("FAITHDIFF")
LQFeaturesType = io.Custom("LQ_FEATURES")
LQFrameType = io.Custom("LQ_FRAME")
TileLayoutType = io.Custom("TILE_LAYOUT")
ImageSourceType = io.Custom("IMAGE_SOURCE")

CONDITION_KEY = "faithdiff_lq"
"""Where a CONDITIONING entry carries its `LQCondition`."""


@dataclass(frozen=True, eq=False)
class AdapterModels:
    """FAITHDIFF: the parts of a FaithDiff file that are not the U-Net, managed by ComfyUI (ModelPatcher).

    Attributes:
        name: the file's name, for messages.
        lq_encoder: patcher of an `LQEncoder`.
        alignment: patcher of an `Alignment`.
        backbone: what the file is made for.
    """

    name: str
    lq_encoder: ModelPatcher
    alignment: ModelPatcher
    backbone: Backbone = SDXL


@dataclass(frozen=True, eq=False)
class LQFeatures:
    """LQ_FEATURES: what the LQ encoder says about images.

    Attributes:
        tensor: (B, C, h, w) on ComfyUI's intermediate device; h and w are the latent's.
        encoded: where they are complete, (h, w), bool, on the CPU, if a mask left out the rest; else None.
        backbone: what the LQ encoder's file is made for.
    """

    tensor: Tensor
    encoded: Tensor | None = None
    backbone: Backbone = SDXL

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) in latent units."""
        return self.tensor.shape[-2], self.tensor.shape[-1]


@dataclass(frozen=True, eq=False)
class LQCondition:
    """How LQ features act on a conditioning.

    Attributes:
        features: the features.
        strength: factor on what the alignment adds; 0 is off.
        start_percent, end_percent: part of the sampling, 0 to 1, in which it acts.
    """

    features: LQFeatures
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0

    def strength_at(self, sigma: float, model_sampling: Any) -> float:
        """The strength at a noise level, with ComfyUI's meaning of start and end."""
        if self.start_percent > 0.0 and sigma > model_sampling.percent_to_sigma(self.start_percent):
            return 0.0
        if self.end_percent < 1.0 and sigma < model_sampling.percent_to_sigma(self.end_percent):
            return 0.0
        return self.strength

    @property
    def ranged(self) -> bool:
        """Whether the strength depends on the noise level."""
        return self.start_percent > 0.0 or self.end_percent < 1.0


@dataclass(frozen=True, eq=False)
class LQFrame:
    """LQ_FRAME: what the end of a graph needs to know about its beginning.

    Attributes:
        image: the enlarged low-quality images before padding, (B, height, width, 3) in [0, 1]: size and colours.
        mask: the enlarged mask, (B or 1, height, width), or None where there was none.
    """

    image: Tensor
    mask: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the finished image in pixels."""
        return self.image.shape[1], self.image.shape[2]


@dataclass(frozen=True, eq=False)
class ImageSource:
    """IMAGE_SOURCE: what a file that is saved takes over from the file that was loaded.

    Attributes:
        name: of the file, without folder and ending; empty where there was none.
        grey: whether the file has no colours.
        bits: per channel, 8 or 16.
        transparent: whether the file has an alpha channel.
        icc: colour profile of the pixels, or None.
        metadata: EXIF, XMP and resolution.
    """

    name: str = ""
    grey: bool = False
    bits: int = 8
    transparent: bool = False
    icc: bytes | None = None
    metadata: Metadata = field(default_factory=Metadata)
