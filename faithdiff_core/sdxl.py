"""Facts about SDXL that several parts of the package need."""

from __future__ import annotations

VAE_SCALE_FACTOR = 8
"""Pixels per latent unit along each side."""

VAE_SCALING_FACTOR = 0.13025
"""What the VAE's latent is multiplied by before the U-Net sees it."""

TRAIN_STEPS = 1000
"""Number of training timesteps."""

BETA_START, BETA_END = 0.00085, 0.012
"""Ends of the scaled-linear beta schedule."""


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
