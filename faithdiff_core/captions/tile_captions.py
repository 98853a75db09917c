"""Captions of an image's parts, and the file NAME.tiles.json beside the image that keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import SettingsError
from ..images.sizes import same_shape
from ..tiling.layout import TileLayout
from .files import caption_text

TILES_SUFFIX = ".tiles.json"
"""Ending of the file beside NAME.png, say: NAME.tiles.json."""

_SIDES = ("top", "left", "height", "width")
"""Where a part is, in pixels of the image that was captioned."""

_FORMAT = (
    'Expected {"width": 640, "height": 480, "tiles": [{"left": 0, "top": 0, "width": 320, "height": 480, "caption": '
    '"..."}, ...]}, in pixels, with parts that cover the image, as `caption --tiles` writes it.'
)


@dataclass(frozen=True)
class TileCaptions:
    """What the parts of an image show.

    Attributes:
        height, width: of the image that was captioned, in pixels. It may be the image itself or one of another size.
        layout: where the parts are.
        captions: one for each part, in order.

    Raises:
        SettingsError: parts and captions differ in number.
    """

    height: int
    width: int
    layout: TileLayout
    captions: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.captions) != len(self.layout.boxes):
            raise SettingsError(
                f"There are {len(self.captions)} captions for {len(self.layout.boxes)} parts; give one for each."
            )

    def each(self, change: Callable[[str], str]) -> TileCaptions:
        """The same with every caption changed."""
        return replace(self, captions=tuple(map(change, self.captions)))

    def check_fits(self, height: int, width: int) -> None:
        """Check that they are of an image of this shape; its size may be another one.

        Raises:
            SettingsError: the shape is another one.
        """
        if not same_shape(self.height, self.width, height, width):
            raise SettingsError(
                f"The captions of its parts were made of an image of {self.width} x {self.height} pixels; this one has "
                f"{width} x {height}, which is another shape. Make them again, of this image."
            )

    def recorded(self) -> dict[str, Any]:
        """What the file holds, as JSON has it."""
        tiles = []
        boxes = self.layout.pixel_boxes(self.height, self.width)
        for (top, left, bottom, right), caption in zip(boxes, self.captions, strict=True):
            tiles.append({"left": left, "top": top, "width": right - left, "height": bottom - top, "caption": caption})
        return {"width": self.width, "height": self.height, "tiles": tiles}

    def to_json(self) -> bytes:
        """The content of the file."""
        return (json.dumps(self.recorded(), indent=1, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class ImageText:
    """What is said of an image.

    Attributes:
        prompt: of the whole image.
        tiles: of its parts, for the tiles of the sampler; None where these get the prompt alone.
    """

    prompt: str
    tiles: TileCaptions | None = None

    def recorded(self) -> dict[str, Any]:
        """Entries of a result's metadata."""
        return {"prompt": self.prompt, **({} if self.tiles is None else {"tile_captions": self.tiles.recorded()})}


def read_tile_captions(content: bytes, name: str) -> TileCaptions:
    """Captions from the content of a file.

    Args:
        content: JSON in UTF-8, with or without a BOM.
        name: of the file, for messages.

    Raises:
        SettingsError: it is something else, a part lies outside of the image, or the parts do not cover it.
    """
    try:
        data = json.loads(caption_text(content, name))
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{name} is not JSON ({error}). {_FORMAT}") from error
    try:
        height, width = _whole(data, "height"), _whole(data, "width")
        boxes, captions = [], []
        for number, tile in enumerate(_list(data), start=1):
            top, left, rows, columns = (_whole(tile, side, f"part {number}: ") for side in _SIDES)
            if not (rows and columns and top + rows <= height and left + columns <= width):
                raise SettingsError(f"part {number} does not lie in the image of {width} x {height} pixels")
            caption = tile.get("caption")
            if not isinstance(caption, str):
                raise SettingsError(f"part {number}: expected a caption, got {caption!r}")
            boxes.append((top / height, left / width, (top + rows) / height, (left + columns) / width))
            captions.append(caption.strip())
        layout = TileLayout(tuple(boxes))
        if not layout.covers_image():
            raise SettingsError("the parts do not cover the image")
    except SettingsError as error:
        raise SettingsError(f"{name}: {error}. {_FORMAT}") from error
    return TileCaptions(height, width, layout, tuple(captions))


def _list(data: dict[str, Any]) -> list[Any]:
    tiles = data.get("tiles")
    if not isinstance(tiles, list) or not tiles:
        raise SettingsError(f"expected a list of tiles, got {tiles!r}")
    return tiles


def _whole(data: Any, name: str, where: str = "") -> int:
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SettingsError(f"{where}expected `{name}` in whole pixels, got {value!r}")
    return value
