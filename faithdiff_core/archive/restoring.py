"""The work on an archive's images: restoring them."""

from __future__ import annotations

import base64
import gc
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..captions.tile_captions import ImageText
from ..engine.restoration import METADATA_KEY, Made, Restoration, attribution_file
from ..engine.settings import RestoreSettings
from ..images.exif import ExifBlock
from ..images.formats import open_pillow
from ..images.masks import decode_mask
from ..images.reading import LoadedImage, decode_image
from ..models.lq_encoder import ENCODER_TILE
from ..tiling.grid import MIN_TILE, TILE_SIZE
from .task import Given, Result

THUMBNAIL_SIDE = 160
"""Longer side of the summary's small images, in pixels."""

_OWN = '{"Software": "FaithDiff'
"""How the EXIF text begins that holds the recipe."""


@dataclass(frozen=True)
class RestoreTask:
    """Restores every image; a `Task`.

    Attributes:
        restoration: how.
    """

    restoration: Restoration

    @property
    def digest(self) -> str:
        """The restoration's."""
        return self.restoration.digest

    @property
    def caption_suffixes(self) -> tuple[str, ...]:
        """Endings of the files beside an image that captions are taken from."""
        return self.restoration.caption_suffixes

    @property
    def wants_gpu(self) -> bool:
        """Whether the models may run on a GPU that Ray counts."""
        return self.restoration.files.device not in ("cpu", "mps")

    def names(self, target: str) -> tuple[str, ...]:
        """The result, and before it the attribution maps where they are asked for."""
        maps = (attribution_file(Path(target)).as_posix(),) if self.restoration.attribute else ()
        return (*maps, target)

    def start(self) -> RestoreEngine:
        """Load the models.

        Raises:
            FaithDiffError: they cannot be loaded.
        """
        return RestoreEngine(self.restoration)


class RestoreEngine:
    """Restores images with models that are loaded once; an `Engine`.

    Args:
        restoration: how.

    Raises:
        FaithDiffError: the models cannot be loaded.
    """

    def __init__(self, restoration: Restoration) -> None:
        self.restoration = restoration
        self.pipeline = restoration.files.load()

    def read(self, content: bytes, name: str) -> LoadedImage:
        """Decode an image file.

        Raises:
            FaithDiffError: it cannot be read.
        """
        return decode_image(content, name)

    def is_result(self, content: bytes, image: LoadedImage, given: Given) -> bool:
        """Whether the recipe in a file's metadata is the one by which the image would be restored."""
        if not (self.restoration.metadata and self.restoration.location):
            return False  # the recipe does not tell whether the photograph's own metadata was left out
        if given.mask is not None:
            return False  # nor what the mask was like
        return recorded_recipe(content) == self.restoration.recipe(given.name, image, self._text(given))

    def work(self, image: LoadedImage, given: Given) -> Result:
        """Restore an image; where memory runs out, once more with smaller tiles.

        Raises:
            FaithDiffError: the result cannot be made, or not in the format; other packages raise what they like.
        """
        made, notes = self._made(image, given)
        files = [(given.target, made.content)]
        if made.attribution is not None:
            files.insert(0, (attribution_file(Path(given.target)).as_posix(), made.attribution))
        return Result(files, made.image.size, (*notes, *made.notes), made.image)

    def thumbnail(self, image: LoadedImage) -> str:
        """A small JPEG file of an image, in base64; transparent parts are white."""
        return thumbnail(image)

    def free_memory(self) -> None:
        """Give back what a failed call held."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _text(self, given: Given) -> ImageText:
        return self.restoration.text_from(Path(given.name).stem, given.texts.get)

    def _made(self, image: LoadedImage, given: Given) -> tuple[Made, tuple[str, ...]]:
        settings = self.restoration.settings
        smaller = smaller_tiles(settings)
        try:
            return self._make(self.restoration, image, given), ()
        except Exception as error:
            if not is_out_of_memory(error) or smaller == settings:
                raise
        self.free_memory()  # behind the except block, which holds the failed call's tensors
        made = self._make(replace(self.restoration, settings=smaller), image, given)
        return made, (
            f"memory ran out; it was restored with smaller tiles ({smaller.tile} px, VAE {smaller.vae_tile} px)",
        )

    def _make(self, restoration: Restoration, image: LoadedImage, given: Given) -> Made:
        record: dict[str, Any] | None = None
        region: torch.Tensor | None = None
        if given.mask is not None:
            name, content = given.mask
            record, region = restoration.mask_record(name), decode_mask(content, name, given.name, *image.size)
        text, target = self._text(given), Path(given.target)
        return restoration.make(self.pipeline, image, given.name, target, text, None, record, region)


def smaller_tiles(settings: RestoreSettings) -> RestoreSettings:
    """The settings with half the tiles' sides, one tile a call, and everything in tiles."""

    def half(side: int | None, default: int) -> int:
        return max(MIN_TILE, (side or default) // 16 * 8)

    return settings.changed(
        tile=half(settings.tile, TILE_SIZE),
        tile_batch=1,
        encoder_tile=half(settings.encoder_tile, ENCODER_TILE),
        vae_tile=half(settings.vae_tile, TILE_SIZE),
    )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory ran out, on the GPU or beside it."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text):
            return True
        error = error.__cause__
    return False


def recorded_recipe(content: bytes) -> dict[str, Any] | None:
    """The recipe in the metadata of a result's file; None where there is none, or the file is not whole."""
    try:
        metadata = decode_image(content, "result").metadata
        block = ExifBlock() if metadata.exif is None else ExifBlock(metadata.exif)
        described = (block.text(tag) or "" for tag in block.entries)
        texts: dict[str, str] = next((json.loads(text) for text in described if text.startswith(_OWN)), {})
        if content.startswith(b"\x89PNG"):
            texts = getattr(open_pillow(content, "result"), "text", {})
        recipe = json.loads(texts[METADATA_KEY])
        return recipe if isinstance(recipe, dict) else None
    except Exception:  # no image, or none of ours
        return None


def thumbnail(image: LoadedImage) -> str:
    """A small JPEG file of an image, in base64; transparent parts are white."""
    from PIL import Image

    height, width = image.size
    factor = min(1.0, THUMBNAIL_SIDE / max(height, width))
    colors = image.colors.detach().float().cpu()
    if image.alpha is not None:
        colors = colors * image.alpha.cpu() + (1 - image.alpha.cpu())
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    small = F.interpolate(colors[None], size=size, mode="area")[0]
    buffer = io.BytesIO()
    values = small.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(values).save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
