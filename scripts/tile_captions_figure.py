"""The figure of docs/tile_captions.md: what changes in a latent when one part of the image gets another caption.

`python scripts/tile_captions_figure.py` samples with the demo model and writes docs/tile_captions/parts.png.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from faithdiff_core.captions.tile_captions import TileCaptions  # noqa: E402
from faithdiff_core.engine import FaithDiffPipeline  # noqa: E402
from faithdiff_core.images.geometry import resize_lanczos  # noqa: E402
from faithdiff_core.images.reading import load_image  # noqa: E402
from faithdiff_core.tiling.grid import TileGrid  # noqa: E402
from faithdiff_core.tiling.layout import grid_layout  # noqa: E402

MODEL = ROOT / "demo" / "model"
HEIGHT, WIDTH, TILE, OVERLAP = 512, 768, 256, 0.5
CAPTIONS = ("a cat", "a wall", "a wooden table", "a cup of coffee", "a window", "the sky")
OTHER = "a crowd of people in a street at night"


def main() -> int:
    """Make the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    pipe = FaithDiffPipeline.from_files(MODEL, MODEL / "faithdiff.safetensors", dtype="fp32", device="cpu")
    image = resize_lanczos(load_image(ROOT / "assets" / "noisy_cat.png").colors[None], HEIGHT, WIDTH)
    pixels = image * 2 - 1
    features, lq_latent = pipe.encode_lq(pixels), pipe.encode_latent(pixels)
    noise = torch.randn(lq_latent.shape, generator=torch.Generator().manual_seed(0))
    whole = pipe.encode_text(["a photograph"], [""])
    layout = grid_layout(HEIGHT, WIDTH, 3, 2)

    def sample(captions: tuple[str, ...]) -> Tensor:
        tiles = pipe.encode_tiles([TileCaptions(HEIGHT, WIDTH, layout, captions)])
        text = replace(whole, tiles=tiles)
        return pipe.sample(features, text, noise, lq_latent=lq_latent, steps=1, tile=TILE, overlap=OVERLAP)

    first = sample(CAPTIONS)
    grid = TileGrid(first.shape[-2], first.shape[-1], TILE, OVERLAP)
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 5.6))
    for number, (axis, box) in enumerate(zip(axes.flat, layout.boxes, strict=True)):
        captions = (*CAPTIONS[:number], OTHER, *CAPTIONS[number + 1 :])
        change = (sample(captions) - first).abs().mean(dim=(0, 1))
        told = torch.zeros_like(change, dtype=torch.bool)
        for tile in grid.tiles:
            if layout.shares(tile, grid.height, grid.width)[number]:
                tile.crop(told).fill_(True)
        outside = float(change[~told].max()) if (~told).any() else 0.0
        sys.stdout.write(
            f"part {number + 1}: its tiles cover {float(told.float().mean()):.0%} of the latent; mean change "
            f"{float(change[told].mean()):.1e} there, largest change elsewhere {outside:.1e}\n"
        )
        axis.imshow(change, cmap="magma", extent=(0, 1, 1, 0), aspect=HEIGHT / WIDTH)
        top, left, bottom, right = box
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", lw=2))
        axis.set_title(f"part {number + 1} has another caption", fontsize=10)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "tile_captions" / "parts.png", dpi=90)
    return 0


if __name__ == "__main__":
    sys.exit(main())
