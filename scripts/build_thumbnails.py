"""Draw workflows/*.jpg, the images of the template browser.

    python scripts/build_thumbnails.py

The photographs were held out when the demo model was trained, and are restored by it, as the last line of each image
says; what is drawn on them tells the workflows apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from held_out import held_out, load_pipeline, restore  # noqa: E402

SIDE = 512
BAR = 92
"""Height of the bar with the words, in pixels."""

DARK, LIGHT = (24, 26, 31), (245, 246, 248)
CROPS = {
    "astronaut.png": (0, 0, 512),
    "chelsea.png": (84, 0, 300),
    "coffee.png": (100, 0, 400),
    "rocket.jpg": (115, 0, 420),
}
"""The square that is shown of each photograph: left, top, side."""

COFFEE = "coffee.png"
"""What most of them show, so that the difference between two thumbnails is the difference between two workflows."""

FLOOR = SIDE - BAR
"""Where the bar begins. The page covers the corner at the top left with a badge of 250 x 62 pixels."""


@cache
def _pipeline() -> Any:
    return load_pipeline()


@cache
def _photograph(name: str) -> tuple[Image.Image, Image.Image]:
    """Low quality and restored, both the same square."""
    (photograph,) = held_out((name,))
    result = restore(_pipeline(), photograph.low)
    left, top, side = CROPS[name]
    box = (left, top, left + side, top + side)
    return photograph.lanczos.crop(box), result.crop(box)


def split(name: str, side: int = SIDE) -> Image.Image:
    """Half low quality, half restored."""
    low, restored = (image.resize((side, side), Image.Resampling.LANCZOS) for image in _photograph(name))
    out = low.copy()
    out.paste(restored.crop((side // 2, 0, side, side)), (side // 2, 0))
    ImageDraw.Draw(out).line((side // 2, 0, side // 2, side), fill=LIGHT, width=3)
    return out


def sizes(factors: tuple[int, ...]) -> Image.Image:
    """The restored image, and in its corner each smaller size down to the low-quality image itself."""
    low, restored = _photograph(COFFEE)
    out = restored.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(out)
    for factor in reversed(factors[:-1]):
        side = FLOOR * factor // factors[-1]
        image = low if factor == 1 else restored
        out.paste(image.resize((side, side), Image.Resampling.LANCZOS), (0, FLOOR - side))
        draw.rectangle((0, FLOOR - side, side, FLOOR), outline=LIGHT, width=3)
        pill(draw, (side - 58, FLOOR - side + 12), f"{factor}x")
    pill(draw, (SIDE - 66, 16), f"{factors[-1]}x")
    return out


def pill(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int = 24) -> None:
    """Dark words on a light ground, from this corner on."""
    font = ImageFont.load_default(size)
    x, y = place[0] + 12, place[1] + 8
    left, top, right, bottom = draw.textbbox((x, y), text, font=font)
    draw.rounded_rectangle((left - 12, top - 9, right + 12, bottom + 9), radius=12, fill=LIGHT)
    draw.text((x, y), text, font=font, fill=DARK)


def labelled(*labels: tuple[int, int, str]) -> Image.Image:
    """Split, with words at these places."""
    out = split(COFFEE)
    draw = ImageDraw.Draw(out)
    for x, y, text in labels:
        pill(draw, (x, y), text)
    return out


def four() -> Image.Image:
    """All photographs, each split."""
    out = Image.new("RGB", (SIDE, SIDE))
    for place, name in enumerate(CROPS):
        out.paste(split(name, SIDE // 2), (place % 2 * SIDE // 2, place // 2 * SIDE // 2))
    return out


def one_tile() -> Image.Image:
    """A grid of tiles over the low-quality image, of which one is restored."""
    low, restored = (image.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for image in _photograph(COFFEE))
    out = Image.blend(low, Image.new("RGB", low.size, DARK), 0.45)
    side = FLOOR // 3
    draw = ImageDraw.Draw(out)
    for place in range(side, SIDE, side):
        draw.line((place, 0, place, SIDE), fill=LIGHT, width=1)
        draw.line((0, place, SIDE, place), fill=LIGHT, width=1)
    box = (side, side, 2 * side, 2 * side)
    out.paste(restored.crop(box), box[:2])
    draw.rectangle(box, outline=(247, 190, 84), width=4)
    return out


def moving_tiles() -> Image.Image:
    """Split, with the borders of the tiles of two steps."""
    out = split(COFFEE)
    draw = ImageDraw.Draw(out)
    for shift, color in ((SIDE // 24, LIGHT), (SIDE // 6, (247, 190, 84))):
        for place in range(shift, SIDE, SIDE // 4):
            draw.line((place, 0, place, SIDE), fill=color, width=2)
            draw.line((0, place, SIDE, place), fill=color, width=2)
    return out


def steps(done: int, usual: int) -> Image.Image:
    """Split, with a dot for every step: those that are taken are filled."""
    out = split(COFFEE)
    draw = ImageDraw.Draw(out)
    draw.rectangle((0, FLOOR - 44, SIDE, FLOOR), fill=DARK)
    for step in range(usual):
        x = 20 + step * (SIDE - 40) // (usual - 1)
        box = (x - 8, FLOOR - 30, x + 8, FLOOR - 14)
        draw.ellipse(box, fill=(247, 190, 84) if step < done else None, outline=LIGHT, width=2)
    return out


def edges() -> Image.Image:
    """Outlines on the left, restored on the right."""
    import cv2

    _, restored = _photograph(COFFEE)
    outlines = Image.fromarray(cv2.Canny(np.asarray(restored), 60, 120)).convert("RGB")
    out = split(COFFEE)
    out.paste(outlines.resize((SIDE, SIDE)).crop((0, 0, SIDE // 2, SIDE)), (0, 0))
    return out


def painted(circle: tuple[int, int, int]) -> Image.Image:
    """The low-quality image, restored within a circle of this middle and radius."""
    out, restored = (image.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for image in _photograph(COFFEE))
    x, y, radius = circle
    box = (x - radius, y - radius, x + radius, y + radius)
    mask = Image.new("L", out.size, 0)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    out.paste(restored, mask=mask)
    ImageDraw.Draw(out).ellipse(box, outline=LIGHT, width=4)
    return out


def told(*texts: tuple[int, int, str]) -> Image.Image:
    """Split, cut into quarters, with words at these places."""
    out = labelled(*texts)
    ImageDraw.Draw(out).line((0, FLOOR // 2, SIDE, FLOOR // 2), fill=LIGHT, width=3)
    return out


def play() -> Image.Image:
    """Split, with the sign to start it."""
    out = split(COFFEE)
    draw = ImageDraw.Draw(out)
    x, y = SIDE // 2, FLOOR // 2 + 20
    draw.ellipse((x - 58, y - 58, x + 58, y + 58), fill=(11, 140, 233), outline=LIGHT, width=4)
    draw.polygon(((x - 18, y - 30), (x - 18, y + 30), (x + 34, y)), fill=LIGHT)
    return out


THUMBNAILS: dict[str, tuple[Callable[[], Image.Image], str]] = {
    "faithdiff_2x": (lambda: sizes((1, 2)), "2x, as published"),
    "faithdiff_4x_progressive": (lambda: sizes((1, 2, 4)), "4x in two passes"),
    "faithdiff_8k": (moving_tiles, "8K, in moving tiles"),
    "faithdiff_own_checkpoint_lora": (
        lambda: labelled((24, 300, "your checkpoint"), (24, 356, "+ your LoRA")),
        "Your checkpoint + LoRA",
    ),
    "faithdiff_few_steps": (lambda: steps(8, 20), "8 steps, not 20"),
    "faithdiff_low_vram": (one_tile, "6 to 8 GB: tile by tile"),
    "faithdiff_batch_folder": (four, "A whole folder"),
    "faithdiff_photograph": (
        lambda: labelled((24, 244, "2003-07-08"), (24, 300, "1/125 s"), (24, 356, "16 bits, Adobe RGB")),
        "Keeps what the file knows",
    ),
    "faithdiff_auto_caption": (lambda: labelled((24, 356, '"A white cup on a red saucer ..."')), "Caption by LLaVA"),
    "faithdiff_other_captioner": (
        lambda: labelled((24, 356, '"An espresso from above ..."')),
        "Another captioner",
    ),
    "faithdiff_controlnet": (edges, "With a ControlNet"),
    "faithdiff_tile_captions": (
        lambda: told((24, 84, "a table"), (280, 24, "a white cup"), (24, 356, "a red saucer"), (280, 356, "a spoon")),
        "A caption for each part",
    ),
    "faithdiff_masked": (lambda: painted((268, 180, 150)), "Only what you paint"),
    "faithdiff_demo": (play, "No download: press Run"),
}
"""What is drawn for each workflow, and what is written on it."""


def thumbnail(image: Image.Image, words: str) -> Image.Image:
    """An image with its words, and with the model that made it."""
    shade = Image.new("RGB", image.size, DARK)
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).rectangle((0, SIDE - BAR, SIDE, SIDE), fill=215)
    out = Image.composite(shade, image, mask)
    draw = ImageDraw.Draw(out)
    draw.text((24, SIDE - BAR + 12), words, font=ImageFont.load_default(38), fill=LIGHT)
    draw.text((24, SIDE - 32), "FaithDiff, image by the demo model", font=ImageFont.load_default(17), fill=LIGHT)
    return out


def main() -> int:
    """Write the images."""
    parser = argparse.ArgumentParser(description="Draw the workflows' thumbnails.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "workflows")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, (draw, words) in THUMBNAILS.items():
        thumbnail(draw(), words).save(folder / f"{name}.jpg", quality=86, optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
