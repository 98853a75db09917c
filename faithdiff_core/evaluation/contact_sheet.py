"""A sweep's results on one sheet: labelled rows and columns, the same part of every result at its own pixels.

Whole results made small would look alike. So each image shows the part where its results differ most, and beside them
the input, the reference, and the whole image with that part marked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingsError
from ..images.reading import load_image
from .sweep import Axis, Layout, Point

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

CELL = 256
"""Default side of a cell in pixels."""

PAGE_HEIGHT = 12000
"""A sheet that would be higher, in pixels, goes on on another one."""

_GAP, _MARGIN = 8, 24
_HEADING, _LABEL, _NOTE = 22, 16, 13
"""Font sizes."""

_SMALL = 256
"""Results are compared at this longer side, in pixels, to find where they differ."""

_INK, _FAINT, _EMPTY, _MARK = "black", "#666666", "#dddddd", "#ff3030"


@dataclass(frozen=True)
class SheetImage:
    """An input and its results.

    Attributes:
        name: heading.
        source: the input.
        results: at each point; None, or a file that is not there, where there is none.
        reference: the original, if there is one.
        note: shown beside the heading.
    """

    name: str
    source: Path
    results: Mapping[Point, Path | None]
    reference: Path | None = None
    note: str = ""


@dataclass(frozen=True)
class _Part:
    """The part of an image that is shown, as fractions of its sides, and the size of its cells in pixels."""

    left: float
    top: float
    right: float
    bottom: float
    width: int
    height: int
    described: str

    def of(self, image: Image) -> Image:
        """Cut it out; images of other sizes are resized."""
        from PIL.Image import Resampling

        w, h = image.size
        box = (round(self.left * w), round(self.top * h), round(self.right * w), round(self.bottom * h))
        part = image.crop((box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1)))
        whole_steps = self.width % part.width == 0 and self.width // part.width * part.height == self.height
        return part.resize((self.width, self.height), Resampling.NEAREST if whole_steps else Resampling.LANCZOS)

    def marked(self, image: Image) -> Image:
        """The whole image, fitted into a cell, with a frame around the part."""
        from PIL import Image as PILImage
        from PIL import ImageDraw

        factor = min(self.width / image.width, self.height / image.height)
        w, h = max(1, round(image.width * factor)), max(1, round(image.height * factor))
        cell = PILImage.new("RGB", (self.width, self.height), "white")
        cell.paste(image.resize((w, h), PILImage.Resampling.LANCZOS), (0, 0))
        frame = (round(self.left * w), round(self.top * h), round(self.right * w) - 1, round(self.bottom * h) - 1)
        ImageDraw.Draw(cell).rectangle(frame, outline=_MARK, width=2)
        return cell


def contact_sheets(
    axes: Sequence[Axis],
    images: Sequence[SheetImage],
    cell: int = CELL,
    crop: tuple[int, int, int, int] | None = None,
) -> Iterator[Image]:
    """Draw the sheets of a sweep.

    Args:
        axes: one or more; they are laid out as in the tables.
        images: inputs with their results; those without any result are left out.
        cell: side of the cells in pixels; a part of this size is shown at its own pixels.
        crop: (left, top, width, height) of the part in pixels of the result. Defaults to the place where the results
            differ most.

    Yields:
        Sheets of at most `PAGE_HEIGHT` unless one image alone is higher.

    Raises:
        SettingsError: the cell is too small, or the crop lies outside an image.
    """
    if cell < 32:
        raise SettingsError(f"cell must be 32 pixels or more, got {cell}.")
    layout = Layout.of(axes)
    pages: list[list[Image]] = [[]]
    for given in images:
        there = {point: file for point, file in given.results.items() if file is not None and file.is_file()}
        if not there:
            continue
        image = replace(given, results=there)
        part = _choose_part(image, cell, crop)
        for heading, values in layout.sections():
            section = _section(layout, image, part, heading, values)
            if pages[-1] and sum(s.height + _MARGIN for s in pages[-1]) + section.height > PAGE_HEIGHT:
                yield _page(pages.pop())
                pages.append([])
            pages[-1].append(section)
    if pages[-1]:
        yield _page(pages[-1])


def _page(sections: Sequence[Image]) -> Image:
    from PIL import Image as PILImage

    width = max(s.width for s in sections) + 2 * _MARGIN
    page = PILImage.new("RGB", (width, sum(s.height + _MARGIN for s in sections) + _MARGIN), "white")
    top = _MARGIN
    for section in sections:
        page.paste(section, (_MARGIN, top))
        top += section.height + _MARGIN
    return page


def _section(layout: Layout, image: SheetImage, part: _Part, heading: str, values: Mapping[str, Any]) -> Image:
    """One image at one combination of the other axes: a heading, columns with labels, rows with labels."""
    from PIL import Image as PILImage
    from PIL import ImageDraw

    rows = layout.row_values
    context = _context(image, part, whole_first=len(rows) == 1)
    extra = -(-len(context) // len(rows))  # columns for input, reference and whole image
    labels = ["" if layout.rows is None else layout.rows.label(row) for row in rows]
    row_label = max(_width(label, _LABEL) for label in labels)
    left = row_label + (_GAP if row_label else 0)
    column = max(part.width, *(_width(layout.columns.label(v), _LABEL) for v in layout.columns.values)) + _GAP
    title = image.name + (f", {heading}" if heading else "")
    note = ", ".join(text for text in (part.described, image.note) if text)
    top = _HEADING + _NOTE + _LABEL + 4 * _GAP
    pitch = part.height + _GAP
    grid = extra * column + left
    width = max(grid + len(layout.columns.values) * column, _width(title, _HEADING), _width(note, _NOTE))
    sheet = PILImage.new("RGB", (width, top + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((0, 0), title, fill=_INK, font=_font(_HEADING))
    draw.text((0, _HEADING + _GAP), note, fill=_FAINT, font=_font(_NOTE))
    for place, (tag, shown) in enumerate(context):
        at = (place % extra * column, top + place // extra * pitch)
        sheet.paste(shown, at)
        _tag(draw, at, tag)
    for i, value in enumerate(layout.columns.values):
        middle = grid + i * column + part.width / 2
        draw.text((middle, top - _GAP), layout.columns.label(value), fill=_INK, font=_font(_LABEL), anchor="ms")
    for j, row in enumerate(rows):
        y = top + j * pitch
        draw.text((grid - _GAP, y + part.height / 2), labels[j], fill=_INK, font=_font(_LABEL), anchor="rm")
        for i, value in enumerate(layout.columns.values):
            file = image.results.get(layout.point(values, row, value))
            at = (grid + i * column, y)
            if file is not None:
                sheet.paste(part.of(_read(file)), at)
            else:
                draw.rectangle((*at, at[0] + part.width - 1, at[1] + part.height - 1), fill=_EMPTY)
                centre = (at[0] + part.width / 2, at[1] + part.height / 2)
                draw.text(centre, "no result", fill=_FAINT, font=_font(_LABEL), anchor="mm")
    return sheet


def _context(image: SheetImage, part: _Part, whole_first: bool) -> list[tuple[str, Image]]:
    """What stands beside the results, with its tags."""
    source = _read(image.source)
    cells = [("input", part.of(source))]
    if image.reference is not None:
        cells.append(("reference", part.of(_read(image.reference))))
    if (part.left, part.top, part.right, part.bottom) != (0, 0, 1, 1):
        cells.insert(0 if whole_first else len(cells), ("whole input", part.marked(source)))
    return cells


def _choose_part(image: SheetImage, cell: int, crop: tuple[int, int, int, int] | None) -> _Part:
    files = [file for file in image.results.values() if file is not None]
    width, height = _read(files[0]).size
    if crop is None:
        w, h = min(cell, width), min(cell, height)
        left, top = (0, 0) if (w, h) == (width, height) else _most_different(files, (width, height), (w, h))
        why = ", where the results differ most"
    else:
        left, top, w, h = crop
        if min(left, top) < 0 or min(w, h) < 1 or left + w > width or top + h > height:
            raise SettingsError(
                f"The crop {left},{top},{w},{h} (left, top, width, height) does not lie within the results of "
                f"{image.name}, which have {width} x {height} pixels."
            )
        why = ""
    shown = f"{w} x {h} of {width} x {height} px at {left}, {top}{why}" if (w, h) != (width, height) else ""
    factor = max(1, cell // max(w, h))  # small parts are enlarged by whole steps, so that their pixels stay visible
    fractions = (left / width, top / height, (left + w) / width, (top + h) / height)
    return _Part(*fractions, w * factor, h * factor, shown or f"{width} x {height} px")


def _most_different(files: Sequence[Path], size: tuple[int, int], part: tuple[int, int]) -> tuple[int, int]:
    """Left and top of the part where the results' standard deviation is largest on average, in pixels."""
    factor = min(1.0, _SMALL / max(size))
    small = (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
    stack = np.stack([np.asarray(_read(file).convert("L").resize(small), dtype=np.float64) for file in files])
    spread: NDArray[np.float64] = stack.std(axis=0)
    w, h = (min(small[i], max(1, round(part[i] * factor))) for i in (0, 1))
    sums = np.pad(spread, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    windows = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
    top, left = np.unravel_index(int(windows.argmax()), windows.shape)
    return min(round(int(left) / factor), size[0] - part[0]), min(round(int(top) / factor), size[1] - part[1])


def _read(file: Path) -> Image:
    from PIL import Image as PILImage

    colors = load_image(file).colors.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    return PILImage.fromarray(colors.contiguous().numpy())


def _tag(draw: Any, at: tuple[int, int], text: str) -> None:
    box = draw.textbbox((at[0] + 6, at[1] + 4), text, font=_font(_NOTE))
    draw.rectangle((box[0] - 4, box[1] - 3, box[2] + 4, box[3] + 3), fill="white")
    draw.text((at[0] + 6, at[1] + 4), text, fill=_INK, font=_font(_NOTE))


def _font(size: int) -> FreeTypeFont | BitmapFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _width(text: str, size: int) -> int:
    return int(_font(size).getlength(text)) + 1 if text else 0
