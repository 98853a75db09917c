"""What a worker does: read, restore and write one image, and say in a row what became of it."""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from ..captions.tile_captions import ImageText
from ..engine.restoration import METADATA_KEY, Made, Progress, Restoration
from ..engine.settings import RestoreSettings
from ..errors import reason_of
from ..images.exif import ExifBlock
from ..images.formats import open_pillow
from ..images.names import folder_problem, name_problem, source_problem
from ..images.reading import LoadedImage, decode_image
from ..models.lq_encoder import ENCODER_TILE
from ..tiling.grid import MIN_TILE, TILE_SIZE
from .manifest import Row
from .storage import is_url, join, read, read_optional, write
from .work_list import Item

THUMBNAIL_SIDE = 160
"""Longer side of the summary's small images, in pixels."""

_OWN = '{"Software": "FaithDiff'
"""How the EXIF text begins that holds the recipe."""


@dataclass(frozen=True)
class Report:
    """What a worker hands back for an item.

    Attributes:
        row: for the manifest.
        thumbnails: JPEG files in base64, before and after; empty where none were wanted or could be made.
    """

    row: Row
    thumbnails: tuple[str, ...] = ()


class Worker:
    """Works on items with models that are loaded once.

    Args:
        restoration: what is done to every image.
        out: the output folder, path or URL.
        name: of this worker, for the rows.
        overwrite: results that are there do not count.

    Raises:
        FaithDiffError: the models cannot be loaded.
    """

    def __init__(self, restoration: Restoration, out: str, name: str, overwrite: bool = False) -> None:
        self.restoration = restoration
        self.out = out
        self.name = name
        self.overwrite = overwrite
        self.pipeline = restoration.files.load()

    def work(self, item: Item, progress: Progress | None = None) -> Report:
        """Do one item; a failure is a row like any other."""
        started = time.monotonic()
        row: Row = {
            "name": item.name,
            "source": item.source,
            "state": "done",
            "worker": self.name,
            "settings": self.restoration.digest,
            "stamp": item.stamp,
        }
        before: LoadedImage | None = None
        after: LoadedImage | None = None
        try:
            self._check(item)
            content = read(item.source)
            row["bytes_read"] = len(content)
            before = decode_image(content, _file_name(item.source))
            text = self._text(item.source)
            if self._done_before(item, before, text):
                row["skipped"] = True
            else:
                made, notes = self._made(item, before, text, progress)
                write(join(self.out, item.name), made.content)
                after = made.image
                row["height"], row["width"] = after.size
                row["bytes_written"] = len(made.content)
                row["notes"] = [*notes, *made.notes]
        # Decoders and models of other packages raise whatever they like, and the other images are still to be done.
        except Exception as error:
            row["state"] = "failed"
            row["error"] = reason_of(error).splitlines()[0]
            if is_out_of_memory(error):
                free_memory()
        row["seconds"] = round(time.monotonic() - started, 3)
        row["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        wanted = item.thumbnail or row["state"] == "failed"
        images = [image for image in (before, after) if image is not None] if wanted else []
        return Report(row, tuple(thumbnail(image) for image in images))

    def _check(self, item: Item) -> None:
        """Say in the ordinary command's words what cannot work, before the work."""
        problem = "" if is_url(item.source) else source_problem(Path(item.source))
        if not problem and not is_url(self.out):
            target = Path(join(self.out, item.name))
            problem = folder_problem(target.parent) or name_problem(target)
        if problem:
            raise OSError(problem)

    def _text(self, source: str) -> ImageText:
        stem = os.path.splitext(source)[0]
        return self.restoration.text_from(_file_name(stem), lambda suffix: read_optional(stem + suffix))

    def _done_before(self, item: Item, image: LoadedImage, text: ImageText) -> bool:
        """Whether the result is there, though no row says so: a run was killed between the two."""
        if not item.unknown_result or self.overwrite:
            return False
        if not (self.restoration.metadata and self.restoration.location):
            return False  # the recipe does not tell whether the photograph's own metadata was left out
        content = read_optional(join(self.out, item.name))
        return content is not None and recorded_recipe(content) == self.restoration.recipe(
            _file_name(item.source), image, text
        )

    def _made(
        self, item: Item, image: LoadedImage, text: ImageText, progress: Progress | None
    ) -> tuple[Made, tuple[str, ...]]:
        """Restore; where memory runs out, once more with smaller tiles."""
        name, target = _file_name(item.source), Path(item.name)
        try:
            return self.restoration.make(self.pipeline, image, name, target, text, progress), ()
        except Exception as error:
            smaller = smaller_tiles(self.restoration.settings)
            if not is_out_of_memory(error) or smaller == self.restoration.settings:
                raise
        free_memory()  # behind the except block, which holds the failed call's tensors
        retry = replace(self.restoration, settings=smaller)
        made = retry.make(self.pipeline, image, name, target, text, progress)
        note = f"memory ran out; it was restored with smaller tiles ({smaller.tile} px, VAE {smaller.vae_tile} px)"
        return made, (note,)


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
    import torch

    while error is not None:
        text = str(error).lower()
        if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text):
            return True
        error = error.__cause__
    return False


def free_memory() -> None:
    """Give back what a failed call held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    import torch.nn.functional as F
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


def _file_name(address: str) -> str:
    return PurePosixPath(address).name if is_url(address) else Path(address).name
