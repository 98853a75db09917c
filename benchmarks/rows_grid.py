"""The row of the tile grids: what moving tiles cost and are worth, on the demo model's held-out photographs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from faithdiff_core.backbone import VAE_SCALE_FACTOR
from faithdiff_core.engine import make_scheduler
from faithdiff_core.evaluation.metrics import psnr
from faithdiff_core.sampling.schedule import DEFAULT_STEPS, sampling_sigmas
from faithdiff_core.tiling.moving import TileGrids

from .measure import Spread, interleaved
from .results import Result, Target, timed
from .settings import Settings

DEMO = Path(__file__).resolve().parents[1] / "demo"

LARGE = 640
"""Side in pixels of the image whose restoration is timed: 81 tiles of 128 px, fixed, at half an overlap."""


@dataclass(frozen=True)
class Grid:
    """A kind of grid and its overlap."""

    kind: str
    overlap: float

    def __str__(self) -> str:
        return f"{self.kind} {self.overlap:g}"

    def of(self, image: Image.Image, tile: int, seed: int) -> TileGrids:
        """The grids of a result of this size."""
        height, width = (-(-side // VAE_SCALE_FACTOR) for side in (image.height, image.width))
        return TileGrids(height, width, tile, self.overlap, self.kind, seed)


PUBLISHED = Grid("fixed", 0.5)
SUGGESTED = Grid("moving", 0.125)
GRIDS = (
    PUBLISHED,
    Grid("fixed", 0.25),
    Grid("fixed", 0.125),
    Grid("moving", 0.25),
    SUGGESTED,
    Grid("moving", 0.0),
)
OTHER_SEEDS = range(100, 120)
"""Seeds of grids that were not used: their borders tell what the seam figure is where there can be no seam."""

TILES = (128, 192)
SAMPLERS = ("euler", "dpmpp_2m", "euler_a")


@cache
def _demo() -> Any:
    """The module that restores the held-out photographs."""
    sys.path.append(str(DEMO))
    import held_out

    return held_out


def seam_figure(result: NDArray[np.uint8], reference: NDArray[np.uint8], grids: TileGrids, sigma: float) -> float:
    """How much steeper an image is across tile borders than elsewhere, beside the same of an image without borders.

    Args:
        result: (H, W, 3), restored in tiles.
        reference: the same restored in one piece.
        grids: of the result.
        sigma: the last noise level, whose borders are looked at.
    """
    grid = grids.at(sigma)
    rows, columns = (
        sorted({edge * VAE_SCALE_FACTOR for start in starts for edge in (start, start + side)})
        for starts, side in ((grid.rows, grid.tile_height), (grid.columns, grid.tile_width))
    )

    def steepness(image: NDArray[np.uint8]) -> float:
        grey = image.astype(np.float64).mean(2)
        across, elsewhere = [], []
        for axis, edges in ((0, rows), (1, columns)):
            steps = np.abs(np.diff(grey, axis=axis)).mean(1 - axis)
            inner = [edge - 1 for edge in edges if 0 < edge < grey.shape[axis]]
            across += steps[inner].tolist()
            elsewhere += np.delete(steps, inner).tolist()
        return float(np.mean(across) / np.mean(elsewhere))

    return steepness(result) / steepness(reference)


def quality(settings: Settings, pipeline: Any, tile: int, sampler: str, grids: tuple[Grid, ...]) -> Iterator[Result]:
    """Each grid's results against those of one tile over the whole image; the first grid is what they stand beside."""
    demo = _demo()
    names = demo.HELD_OUT[1:3] if settings.quick else demo.HELD_OUT
    pipeline.base.scheduler = make_scheduler(sampler)
    photographs = list(demo.held_out(names))
    whole = [demo.restore(pipeline, one.low, tile=4096) for one in photographs]
    beside: Spread | None = None
    for grid in grids:
        result = of_grid(pipeline, tile, sampler, grid, list(zip(photographs, whole, strict=True)), beside)
        beside = beside or result.ours
        yield result


def of_grid(
    pipeline: Any, tile: int, sampler: str, grid: Grid, photographs: list[tuple[Any, Any]], beside: Spread | None
) -> Result:
    """A grid's results.

    Args:
        pipeline: with the sampler.
        tile: side in pixels.
        sampler: its name.
        grid: what is used.
        photographs: each with its restoration in one piece.
        beside: nearness of the published grid; None for this grid's own.
    """
    demo = _demo()
    last = float(sampling_sigmas(demo.read_yaml(DEMO / "restore.yaml")["steps"])[-2])
    nearness, scores, seams, elsewhere, counts = [], [], [], [], []
    for one, reference in photographs:
        changes = {"tile": tile, "overlap": grid.overlap, "tile_grid": grid.kind, "tile_batch": 8}
        restored = demo.restore(pipeline, one.low, **changes)
        pixels, truth = np.asarray(restored), np.asarray(reference)
        used = grid.of(restored, tile, seed=1)  # the seed of restore.yaml
        nearness.append(psnr(pixels, truth))
        scores.append(one.scores(restored))
        seams.append(seam_figure(pixels, truth, used, last))
        if grid.kind == "moving":
            others = (grid.of(restored, tile, seed) for seed in OTHER_SEEDS)
            elsewhere.append([seam_figure(pixels, truth, other, last) for other in others])
        counts.append(len(used))
    mean_psnr, mean_ssim = np.mean(scores, axis=0)
    seam = f"seam figure {np.mean(seams):.3f}"
    if elsewhere:
        chance = np.mean(elsewhere, axis=0)  # of the photographs, for each seed
        seam += f", at borders of grids of other seeds {np.mean(chance):.3f} ± {np.std(chance):.3f}"
    return Result(
        "tile-grid",
        f"{tile} px, {sampler}, {grid}: PSNR to the one-tile result",
        "dB",
        ours=Spread(tuple(nearness)),
        peer=beside or Spread(tuple(nearness)),
        peer_name=str(PUBLISHED),
        note=f"{' '.join(map(str, counts))} tiles a step; to the original {mean_psnr:.2f} dB, SSIM {mean_ssim:.3f}; "
        f"{seam}; on each photograph {' '.join(f'{value:.2f}' for value in nearness)} dB",
    )


def timing(settings: Settings, pipeline: Any) -> Result:
    """A whole restoration of a large image in tiles, both ways in turns."""
    demo = _demo()
    pipeline.base.scheduler = make_scheduler()
    (photograph,) = demo.held_out(demo.HELD_OUT[:1])
    low = photograph.low.resize((LARGE // 2, LARGE // 2))
    steps = 2 if settings.quick else DEFAULT_STEPS

    def restoration(grid: Grid) -> Any:
        changes = {"tile": 128, "overlap": grid.overlap, "tile_grid": grid.kind, "tile_batch": 1}
        return lambda: demo.restore(pipeline, low, steps=steps, **changes)

    times = interleaved(settings, {"moving": restoration(SUGGESTED), "fixed": restoration(PUBLISHED)})
    counts = [len(grid.of(low.resize((LARGE, LARGE)), 128, 1)) for grid in (SUGGESTED, PUBLISHED)]
    return timed(
        "tile-grid-time",
        f"whole restoration, {LARGE} px, {steps} steps, {SUGGESTED}",
        times["moving"],
        times["fixed"],
        str(PUBLISHED),
        target=Target("<=", 0.6),
        note=f"demo model, tiles of 128 px: {counts[0]} a step instead of {counts[1]}",
    )


def time_rows(settings: Settings) -> Iterator[Result]:
    """The time of a whole restoration."""
    yield timing(settings, _demo().load_pipeline())


def rows(settings: Settings) -> Iterator[Result]:
    """All grids with two tile sizes and three samplers; a quick run takes two photographs and the suggested grid."""
    pipeline = _demo().load_pipeline()
    for tile in TILES:
        for sampler in SAMPLERS:
            if not settings.quick:
                yield from quality(settings, pipeline, tile, sampler, GRIDS)
            elif tile == TILES[0] or sampler == SAMPLERS[0]:
                yield from quality(settings, pipeline, tile, sampler, (PUBLISHED, SUGGESTED))
