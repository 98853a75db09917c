"""Make the images of the help pages: web/docs/images/*.webp.

    python scripts/build_help_images.py [NAME ...]

Where a node makes an image, it is shown: output of the demo model, on the held-out photograph that the demo node brings
along. The others have a drawing of what goes in and what comes out. ComfyUI's help panel is about 320 pixels wide; the
images are twice that, with words that can be read when they are halved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "web" / "docs" / "images"
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from held_out import HeldOut, held_out, load_pipeline, restore  # noqa: E402

from faithdiff_core.captions.trim import trim_caption as trimmed  # noqa: E402
from faithdiff_core.tiling.grid import Tile, TileGrid  # noqa: E402
from faithdiff_core.tiling.layout import grid_layout  # noqa: E402
from faithdiff_core.tiling.moving import TileGrids  # noqa: E402
from faithdiff_core.training.degradation import to_image, to_tensor  # noqa: E402

WIDTH, GAP, CAPTION = 640, 8, 40
"""Of an image, between its parts, and of a line of words, in pixels."""

DARK, GROUND, LINES = (36, 41, 47), (246, 248, 250), ((255, 255, 255), (247, 190, 84))
GREY, EDGE, BLUE, PALE = (87, 96, 106), (140, 149, 159), (11, 98, 196), (217, 234, 255)

DETAIL = (180, 100, 436, 356)
"""Left, top, right and bottom of what is shown where two or three images stand side by side."""


TILE = 192
"""Side of the tiles that are drawn, in pixels."""


class Part(NamedTuple):
    """An image and what is written above it."""

    image: Image.Image
    words: str


@cache
def photograph() -> HeldOut:
    """The demo node's sample image."""
    (only,) = held_out(("coffee.png",))
    return only


@cache
def pipeline() -> Any:
    """The demo model in the engine."""
    return load_pipeline()


@cache
def restored(**changes: Any) -> Image.Image:
    """The sample image restored, with other settings than the demo's if some are given."""
    return restore(pipeline(), photograph().low, **changes)


def side_by_side(parts: Sequence[Part]) -> Image.Image:
    """Images of one shape in a row, with words above."""
    width = (WIDTH - GAP * (len(parts) - 1)) // len(parts)
    height = round(width * parts[0].image.height / parts[0].image.width)
    out = Image.new("RGB", (WIDTH, CAPTION + height), GROUND)
    draw = ImageDraw.Draw(out)
    for number, part in enumerate(parts):
        left = number * (width + GAP)
        out.paste(part.image.resize((width, height), Image.Resampling.LANCZOS), (left, CAPTION))
        draw.text((left + 4, 4), part.words, font=ImageFont.load_default(24), fill=DARK)
    return out


def detail(image: Image.Image) -> Image.Image:
    """The part of an image of the result's size that shows most."""
    return image.crop(DETAIL)


def prepare_image() -> Image.Image:
    """The image as it is, and enlarged."""
    low = photograph().low
    large = photograph().lanczos
    out = Image.new("RGB", (WIDTH, CAPTION + 280), GROUND)
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(24)
    small = low.resize((210, 140), Image.Resampling.LANCZOS)
    out.paste(small, (0, CAPTION))
    out.paste(large.resize((420, 280), Image.Resampling.LANCZOS), (220, CAPTION))
    draw.text((4, 4), f"{low.width} x {low.height}", font=font, fill=DARK)
    draw.text((224, 4), f"scale_by 2: {large.width} x {large.height}", font=font, fill=DARK)
    return out


def lq_encode() -> Image.Image:
    """The image, and the three strongest directions of its features as red, green and blue."""
    features = pipeline().encode_lq(to_tensor(photograph().lanczos)[None] * 2 - 1)[0].float()
    flat = features.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    directions = torch.linalg.svd(flat, full_matrices=False)[0][:, :3]
    shown = _stretched((directions.T @ flat).view(3, *features.shape[1:]))
    size = f"{features.shape[0]} channels, {features.shape[2]} x {features.shape[1]}"
    return side_by_side([Part(photograph().lanczos, "enlarged image"), Part(_enlarged(shown), size)])


def tiled_vae_decode() -> Image.Image:
    """Three of the latent's channels, and the decoded image (whose tints the demo's VAE leaves to the correction)."""
    latent = pipeline().encode_latent(to_tensor(restored())[None] * 2 - 1)
    shown = _stretched(latent[0, :3].float())
    size = f"latent, {latent.shape[3]} x {latent.shape[2]}"
    decoded = to_image(pipeline().decode(latent, 256)[0])
    return side_by_side([Part(_enlarged(shown), size), Part(decoded, f"decoded, {decoded.width} x {decoded.height}")])


def _stretched(channels: Tensor) -> Tensor:
    """Each channel from its 2nd to its 98th percentile, as 0 to 1."""
    flat = channels.flatten(1)
    low, high = flat.quantile(0.02, 1)[:, None, None], flat.quantile(0.98, 1)[:, None, None]
    return ((channels - low) / (high - low)).clamp(0, 1)


def _enlarged(channels: Tensor) -> Image.Image:
    """Each value as a square."""
    size = photograph().lanczos.size
    return to_image(channels).resize(size, Image.Resampling.NEAREST)


def conditioning() -> Image.Image:
    """From the same noise, with and without the LQ features."""
    with_it, without = restored(start="noise"), restored(start="noise", strength=0.0)
    return side_by_side([Part(detail(without), "strength 0"), Part(detail(with_it), "strength 1")])


def sampler() -> Image.Image:
    """Before and after."""
    return side_by_side([Part(detail(photograph().lanczos), "enlarged"), Part(detail(restored()), "restored")])


def finish_image() -> Image.Image:
    """The colour corrections."""
    return side_by_side(
        [
            Part(detail(photograph().lanczos), "low quality"),
            Part(detail(restored(color_fix="none")), "none"),
            Part(detail(restored(color_fix="adain")), "adain"),
            Part(detail(restored(color_fix="wavelet")), "wavelet"),
        ]
    )


def tiled_diffusion() -> Image.Image:
    """The tiles of two steps: at the same places, and moving."""
    return side_by_side(
        [Part(_with_tiles("fixed", 0.5), "fixed, overlap 0.5"), Part(_with_tiles("moving", 0.125), "moving, 0.125")]
    )


def _with_tiles(kind: str, overlap: float) -> Image.Image:
    """The restored image with the tiles of a step, and of a later one if they move."""
    out = restored().copy()
    draw = ImageDraw.Draw(out)
    grids = TileGrids(out.height // 8, out.width // 8, TILE, overlap, kind, seed=1)
    for sigma, color in zip((10.0, 5.0) if kind == "moving" else (10.0,), LINES, strict=False):
        for box in _boxes(grids.at(sigma)):
            draw.rectangle(box, outline=color, width=4)
    return out


def _boxes(grid: TileGrid) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of all tiles in pixels."""
    rows, columns = grid.starts
    return [(8 * x, 8 * y, 8 * x + TILE - 1, 8 * y + TILE - 1) for y in rows for x in columns]


def tile_captions() -> Image.Image:
    """Two by two parts, each by itself."""
    image = photograph().lanczos
    parts = [to_image(part) for part in grid_layout(image.height, image.width, overlap=0.1).crops(to_tensor(image))]
    width = (WIDTH - GAP) // 2
    height = round(width * parts[0].height / parts[0].width)
    out = Image.new("RGB", (WIDTH, 2 * height + GAP), GROUND)
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(24)
    for number, part in enumerate(parts):
        left, top = number % 2 * (width + GAP), number // 2 * (height + GAP)
        out.paste(part.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        draw.rounded_rectangle((left + 8, top + 8, left + 44, top + 44), radius=8, fill=GROUND)
        draw.text((left + 19, top + 10), str(number), font=font, fill=DARK)
    return out


def compare() -> Image.Image:
    """Half before, half after."""
    out = photograph().lanczos.copy()
    middle = out.width // 2
    out.paste(restored().crop((middle, 0, *out.size)), (middle, 0))
    ImageDraw.Draw(out).line((middle, 0, middle, out.height), fill=LINES[0], width=4)
    return out.resize((WIDTH, WIDTH * out.height // out.width), Image.Resampling.LANCZOS)


def demo_models() -> Image.Image:
    """The sample image, and what the demo makes of it."""
    return side_by_side([Part(photograph().low, "sample_image"), Part(restored(), "restored, twice the size")])


class Box(NamedTuple):
    """A box of a drawing: what is in it, more about that, and whether it is the node itself."""

    words: str
    detail: str = ""
    node: bool = False


def flow(*rows: Sequence[Box]) -> Image.Image:
    """Rows of boxes from top to bottom, with arrows between them."""
    height, arrow = 84, 36
    out = Image.new("RGB", (WIDTH, len(rows) * (height + arrow) - arrow + 16), GROUND)
    draw = ImageDraw.Draw(out)
    for number, row in enumerate(rows):
        top = 8 + number * (height + arrow)
        width = (WIDTH - 16 - 12 * (len(row) - 1)) // len(row)
        for place, box in enumerate(row):
            left = 8 + place * (width + 12)
            edge, ground = (BLUE, PALE) if box.node else (EDGE, (255, 255, 255))
            draw.rounded_rectangle((left, top, left + width, top + height), 10, ground, edge, 3)
            lines = [(box.words, 26, BLUE if box.node else DARK)] + [(box.detail, 21, GREY)] * bool(box.detail)
            y = top + height / 2 - (15 if box.detail else 0)
            for text, size, color in lines:
                draw.text((left + width / 2, y), text, font=ImageFont.load_default(size), fill=color, anchor="mm")
                y += 32
        if number:
            draw.line((WIDTH / 2, top - arrow + 4, WIDTH / 2, top - 10), fill=GREY, width=3)
            draw.polygon(((WIDTH / 2 - 9, top - 14), (WIDTH / 2 + 9, top - 14), (WIDTH / 2, top - 2)), fill=GREY)
    return out


def model_loader() -> Image.Image:
    """What a file holds, and what the loader makes of it."""
    return flow(
        [Box("FaithDiff.bin", "U-Net, alignment, LQ encoder"), Box("your MODEL", "base_model, optional")],
        [Box("FaithDiff Model Loader", "unet_strength 0 ... 1 mixes the two U-Nets", True)],
        [Box("model", "for any sampler"), Box("faithdiff", "for LQ Encode")],
    )


def load_image() -> Image.Image:
    """What is read of a file."""
    return flow(
        [Box("photo.tif", "16 bits, colour profile, EXIF, on its side")],
        [Box("FaithDiff Load Image", "upright, colours right", True)],
        [Box("image"), Box("mask", "transparency"), Box("source", "EXIF, profile, depth")],
    )


def save_image() -> Image.Image:
    """What is written into a file."""
    return flow(
        [Box("images"), Box("mask", "transparency"), Box("source", "of Load Image")],
        [Box("FaithDiff Save Image", "size and orientation updated", True)],
        [Box("FaithDiff_00001_.png", "8 or 16 bits, profile, EXIF, XMP, workflow")],
    )


def restore_folder() -> Image.Image:
    """A folder, and what is done with it."""
    return flow(
        [Box("input/restore", "a.jpg, b.tif, broken.png, c.webp")],
        [Box("FaithDiff Restore Folder", "load, restore, save; then the next one", True)],
        [Box("output/restored", "a.png, b.png, c.png"), Box("report", "3 restored, 1 failed")],
    )


def caption() -> Image.Image:
    """From the image to the prompt."""
    return flow(
        [Box("image", "the low-quality image")],
        [Box("FaithDiff Caption", "LLaVA, Qwen-VL, BLIP ...", True)],
        [Box("caption", "A woman in a red coat. She stands by a river.")],
        [Box("CLIP Text Encode", "positive")],
    )


def trim_caption() -> Image.Image:
    """An answer of a captioner, and what is left of it."""
    answer = "The image features a red coat. It is wet. Cosy mood."
    return flow(
        [Box("a captioner's answer", answer)],
        [Box("FaithDiff Trim Caption", "without the lead-in, two sentences", True)],
        [Box("caption", trimmed(answer))],
    )


def extract_lora() -> Image.Image:
    """From two U-Nets to a small file."""
    return flow(
        [Box("FaithDiff's U-Net", "5 GB in fp16"), Box("RealVisXL V4.0", "its base")],
        [Box("FaithDiff Extract LoRA", "the difference of each layer, cut to a rank", True)],
        [Box("a LoRA", "for any SDXL checkpoint, with the adapter or without")],
    )


def attribution() -> Image.Image:
    """From the sampler to the overlays."""
    return flow(
        [Box("FaithDiff Attribution Record", "before the sampler", True)],
        [Box("FaithDiff Sampler", "attention of all steps and tiles is recorded")],
        [Box("FaithDiff Attribution Map", '"window", "tree"', True)],
        [Box("overlays", "one for each word"), Box("masks", "one for each word")],
    )


def tile_conditioning() -> Image.Image:
    """What a tile that lies in two parts is told."""
    layout = grid_layout(96, 96)
    first, second, *_ = layout.shares(Tile(0, 32, 32, 48), 96, 96)
    mix = 0.7
    return flow(
        [Box("part 0", "clear sky"), Box("part 1", "a steeple"), Box("whole image", "an old town")],
        [Box("FaithDiff Tile Conditioning", f"mix {mix}; a tile that lies in both parts", True)],
        [
            Box("clear sky", f"{mix * first:.2f}"),
            Box("a steeple", f"{mix * second:.2f}"),
            Box("an old town", f"{1 - mix:.2f}"),
        ],
    )


IMAGES_OF: dict[str, Callable[[], Image.Image]] = {
    "prepare_image": prepare_image,
    "lq_encode": lq_encode,
    "conditioning": conditioning,
    "sampler": sampler,
    "tiled_diffusion": tiled_diffusion,
    "tiled_vae_decode": tiled_vae_decode,
    "finish_image": finish_image,
    "tile_captions": tile_captions,
    "compare": compare,
    "demo_models": demo_models,
    "model_loader": model_loader,
    "load_image": load_image,
    "save_image": save_image,
    "restore_folder": restore_folder,
    "caption": caption,
    "trim_caption": trim_caption,
    "extract_lora": extract_lora,
    "attribution": attribution,
    "tile_conditioning": tile_conditioning,
}
"""What is made, by file name."""


def main() -> int:
    """Write the images, or those of the names given."""
    for name in sys.argv[1:] or IMAGES_OF:
        IMAGES_OF[name]().save(IMAGES / f"{name}.webp", quality=80, method=6)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
