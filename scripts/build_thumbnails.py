"""Draw workflows/*.jpg, the images of the template browser.

    python scripts/build_thumbnails.py

The photographs were held out when the demo model was trained, and are restored by it, as the corner of each image
says; what is written on them tells the workflows apart.
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
    "astronaut.png": (40, 0, 400),
    "chelsea.png": (84, 0, 300),
    "coffee.png": (90, 10, 390),
    "rocket.jpg": (115, 0, 420),
}
"""The square that is shown of each photograph: left, top, side."""


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


def sizes(name: str) -> Image.Image:
    """The low-quality image, and the restored one twice and four times as large."""
    low, restored = _photograph(name)
    out = restored.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(out)
    for image, side in ((restored, SIDE // 2), (low, SIDE // 4)):
        out.paste(image.resize((side, side), Image.Resampling.LANCZOS), (0, 0))
        draw.rectangle((0, 0, side, side), outline=LIGHT, width=3)
    return out


def four() -> Image.Image:
    """All photographs, each split."""
    out = Image.new("RGB", (SIDE, SIDE))
    for place, name in enumerate(CROPS):
        out.paste(split(name, SIDE // 2), (place % 2 * SIDE // 2, place // 2 * SIDE // 2))
    return out


def tiles(name: str) -> Image.Image:
    """Split, with the borders of tiles."""
    out = split(name)
    draw = ImageDraw.Draw(out)
    for place in range(0, SIDE, SIDE // 4):
        draw.line((place, 0, place, SIDE), fill=LIGHT, width=1)
        draw.line((0, place, SIDE, place), fill=LIGHT, width=1)
    return out


def moving_tiles(name: str) -> Image.Image:
    """Split, with the borders of the tiles of two steps."""
    out = split(name)
    draw = ImageDraw.Draw(out)
    for shift, color in ((SIDE // 24, LIGHT), (SIDE // 6, (247, 190, 84))):
        for place in range(shift, SIDE, SIDE // 4):
            draw.line((place, 0, place, SIDE), fill=color, width=2)
            draw.line((0, place, SIDE, place), fill=color, width=2)
    return out


def edges(name: str) -> Image.Image:
    """Outlines on the left, restored on the right."""
    import cv2

    _, restored = _photograph(name)
    outlines = Image.fromarray(cv2.Canny(np.asarray(restored), 60, 120)).convert("RGB")
    out = split(name)
    out.paste(outlines.resize((SIDE, SIDE)).crop((0, 0, SIDE // 2, SIDE)), (0, 0))
    return out


def painted(name: str, circle: tuple[int, int, int]) -> Image.Image:
    """The low-quality image, restored within a circle of this middle and radius."""
    out, restored = (image.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for image in _photograph(name))
    x, y, radius = circle
    box = (x - radius, y - radius, x + radius, y + radius)
    mask = Image.new("L", out.size, 0)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    out.paste(restored, mask=mask)
    ImageDraw.Draw(out).ellipse(box, outline=LIGHT, width=3)
    return out


def told(name: str, texts: tuple[tuple[int, int, str], ...]) -> Image.Image:
    """Split, cut into quarters, with words at places of theirs."""
    out = split(name)
    draw = ImageDraw.Draw(out)
    draw.line((0, SIDE // 2, SIDE, SIDE // 2), fill=LIGHT, width=3)
    font = ImageFont.load_default(22)
    for x, y, text in texts:
        left, top, right, bottom = draw.textbbox((x, y), text, font=font)
        draw.rounded_rectangle((left - 12, top - 10, right + 12, bottom + 10), radius=12, fill=LIGHT)
        draw.text((x, y), text, font=font, fill=DARK)
    return out


PHOTOGRAPH = "2003-07-08\n1/125 s\n16 bits"
"""What a camera says about a photograph."""


def labelled(name: str, text: str) -> Image.Image:
    """Split, with what the file says in a corner."""
    out = split(name)
    draw = ImageDraw.Draw(out)
    font = ImageFont.load_default(24)
    left, top, right, bottom = draw.textbbox((36, 36), text, font=font)
    draw.rectangle((left - 14, top - 12, right + 14, bottom + 12), fill=DARK)
    draw.text((36, 36), text, font=font, fill=LIGHT)
    return out


def spoken(name: str, text: str) -> Image.Image:
    """Split, with a sentence in a bubble."""
    out = split(name)
    draw = ImageDraw.Draw(out)
    font = ImageFont.load_default(26)
    left, top, right, bottom = draw.textbbox((40, 44), text, font=font)
    draw.rounded_rectangle((left - 16, top - 14, right + 16, bottom + 14), radius=16, fill=LIGHT)
    draw.text((40, 44), text, font=font, fill=DARK)
    return out


THUMBNAILS: dict[str, tuple[Callable[[], Image.Image], str]] = {
    "faithdiff_2x": (lambda: split("chelsea.png"), "2x, as published"),
    "faithdiff_4x_progressive": (lambda: sizes("astronaut.png"), "4x in two passes"),
    "faithdiff_8k": (lambda: moving_tiles("coffee.png"), "8K, in moving tiles"),
    "faithdiff_own_checkpoint_lora": (lambda: split("coffee.png"), "Your checkpoint + LoRA"),
    "faithdiff_few_steps": (lambda: split("rocket.jpg"), "8 steps"),
    "faithdiff_low_vram": (lambda: tiles("chelsea.png"), "6 to 8 GB"),
    "faithdiff_batch_folder": (four, "A whole folder"),
    "faithdiff_photograph": (lambda: labelled("rocket.jpg", PHOTOGRAPH), "16 bits, EXIF, profile"),
    "faithdiff_auto_caption": (lambda: spoken("chelsea.png", '"A cat with green eyes ..."'), "Caption by LLaVA"),
    "faithdiff_other_captioner": (lambda: spoken("coffee.png", '"A cup of coffee ..."'), "Another captioner"),
    "faithdiff_controlnet": (lambda: edges("astronaut.png"), "With a ControlNet"),
    "faithdiff_tile_captions": (
        lambda: told("rocket.jpg", ((40, 40, "a dark sky"), (296, 40, "a rocket"), (40, 300, "a tower"))),
        "A caption for each part",
    ),
    "faithdiff_masked": (lambda: painted("astronaut.png", (282, 150, 128)), "Only what you paint"),
    "faithdiff_demo": (lambda: split("astronaut.png"), "No download"),
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
