"""Images: files, sizes and colour."""

from __future__ import annotations

from .reading import LoadedImage, load_image
from .writing import save_image

__all__ = ["LoadedImage", "load_image", "save_image"]
