"""Backbones: the families of diffusion models that FaithDiff's parts join, and what they differ in.

The paper's models are on SDXL, and in its supplement (Table 12) on SD 2.1. All parts of the package ask a `Backbone`,
so what one family needs and another does not have is said here alone.
"""

from __future__ import annotations

from dataclasses import dataclass

VAE_SCALE_FACTOR = 8
"""Pixels per latent unit along each side."""

TRAIN_STEPS = 1000
"""Number of training timesteps."""

BETA_START, BETA_END = 0.00085, 0.012
"""Ends of the scaled-linear beta schedule, which all backbones share."""

NOISE, V = "epsilon", "v_prediction"
"""What a U-Net predicts, in diffusers' words: the noise, or v = sqrt(abar) * noise - sqrt(1 - abar) * z."""


@dataclass(frozen=True)
class Backbone:
    """A family of latent diffusion models.

    Attributes:
        name: for people.
        key: in files' metadata.
        block_out_channels: channels of the U-Net's levels, finest first.
        transformer_depths: transformer blocks per attention of each level; 0 for a level without.
        mid_depth: transformer blocks in the middle.
        context_width: width of the text embeddings.
        added_width: width of the pooled text and the size conditioning together; None where the U-Net takes neither.
        linear_projections: whether transformers begin and end with linear layers instead of 1x1 convolutions.
        text_encoders: how many there are.
        vae_scaling_factor: what the VAE's latent is multiplied by before the U-Net sees it.
        prediction: what the U-Net predicts unless a file says otherwise; None where models of both kinds are common.
        tile: side in pixels of the images that it was trained on, which is that of good tiles.
        pipeline: diffusers' class.
        configuration: where the hub keeps its configuration and tokenizers.
    """

    name: str
    key: str
    block_out_channels: tuple[int, ...]
    transformer_depths: tuple[int, ...]
    mid_depth: int
    context_width: int
    added_width: int | None
    linear_projections: bool
    text_encoders: int
    vae_scaling_factor: float
    prediction: str | None
    tile: int
    pipeline: str
    configuration: str

    @property
    def size_conditioning(self) -> bool:
        """Whether the U-Net takes the pooled text and six numbers on size and crop."""
        return self.added_width is not None


SDXL = Backbone(
    name="SDXL",
    key="sdxl",
    block_out_channels=(320, 640, 1280),
    transformer_depths=(0, 2, 10),
    mid_depth=10,
    context_width=2048,
    added_width=2816,
    linear_projections=True,
    text_encoders=2,
    vae_scaling_factor=0.13025,
    prediction=NOISE,
    tile=1024,
    pipeline="StableDiffusionXLPipeline",
    configuration="stabilityai/stable-diffusion-xl-base-1.0",
)

SD21 = Backbone(
    name="SD 2.1",
    key="sd21",
    block_out_channels=(320, 640, 1280, 1280),
    transformer_depths=(1, 1, 1, 0),
    mid_depth=1,
    context_width=1024,
    added_width=None,
    linear_projections=True,
    text_encoders=1,
    vae_scaling_factor=0.18215,
    prediction=None,
    tile=768,
    pipeline="StableDiffusionPipeline",
    configuration="stabilityai/stable-diffusion-2-1",
)

SD15 = Backbone(
    name="SD 1.5",
    key="sd15",
    block_out_channels=(320, 640, 1280, 1280),
    transformer_depths=(1, 1, 1, 0),
    mid_depth=1,
    context_width=768,
    added_width=None,
    linear_projections=False,
    text_encoders=1,
    vae_scaling_factor=0.18215,
    prediction=NOISE,
    tile=512,
    pipeline="StableDiffusionPipeline",
    configuration="stable-diffusion-v1-5/stable-diffusion-v1-5",
)

BACKBONES = (SDXL, SD21, SD15)
"""All that FaithDiff works on; the published weights are for the first."""


def backbone_of(added: bool, linear_projections: bool) -> Backbone:
    """The family that a U-Net's layers belong to, whatever their sizes.

    Args:
        added: whether it takes the pooled text and the size conditioning.
        linear_projections: whether its transformers begin and end with linear layers.
    """
    if added:
        return SDXL
    return SD21 if linear_projections else SD15


def tile_time_ids(height: int, width: int, top: int, left: int, tile_size: int) -> tuple[int, int, int, int, int, int]:
    """SDXL's micro-conditioning of a tile as FaithDiff was published with it.

    Original size: the padded image's (height, width) in pixels. Crop: the tile's (row, column) in latent units. Target
    size: (tile, tile) in pixels, even where the image is smaller.

    Args:
        height, width: of the whole latent, in latent units.
        top, left: first row and column of the tile, in latent units.
        tile_size: side of the grid's tiles in pixels.
    """
    return height * VAE_SCALE_FACTOR, width * VAE_SCALE_FACTOR, top, left, tile_size, tile_size
