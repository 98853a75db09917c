"""The figure of docs/performance.md: what each tile grid is worth, over what it costs.

`python scripts/tile_grid_figure.py` reads benchmarks/results/tile_grid.json and writes
docs/performance/tile_grid.png.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.document import read_report  # noqa: E402

_CASE = re.compile(r"(?P<tile>\d+) px, (?P<sampler>\w+), (?P<kind>\w+) (?P<overlap>[\d.]+): PSNR")
_COUNTS = re.compile(r"([\d ]+) tiles a step")
COLORS = {"fixed": "#888888", "moving": "#d1762b"}
MARKS = {"euler": "o", "dpmpp_2m": "s", "euler_a": "^"}


def main() -> int:
    """Make the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # By tile size and sampler: (kind, overlap, tiles a step, PSNR to the one-tile result), means over the photographs.
    found: dict[tuple[int, str], list[tuple[str, float, float, float]]] = defaultdict(list)
    for result in read_report("tile_grid").results:
        case, counts = _CASE.match(result.case), _COUNTS.match(result.note)
        if case and counts and result.ours:
            tiles = float(np.mean([int(count) for count in counts[1].split()]))
            nearness = float(np.mean(result.ours.values))
            found[int(case["tile"]), case["sampler"]].append((case["kind"], float(case["overlap"]), tiles, nearness))
    sizes = sorted({tile for tile, _ in found})
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(11, 4.2), sharey=True, squeeze=False)
    for axis, tile in zip(axes[0], sizes, strict=True):
        for (size, sampler), points in found.items():
            if size != tile:
                continue
            _, _, all_tiles, published = next(p for p in points if p[:2] == ("fixed", 0.5))
            for kind in COLORS:
                line = sorted(
                    (tiles / all_tiles, near - published, overlap) for k, overlap, tiles, near in points if k == kind
                )
                if not line:
                    continue
                x, y, _ = zip(*line, strict=True)
                axis.plot(x, y, MARKS[sampler] + "-", color=COLORS[kind], alpha=0.85, label=f"{kind}, {sampler}")
                if sampler == "euler":
                    for at, value, overlap in line:
                        axis.annotate(
                            f"{overlap:g}", (at, value), (0, 7), textcoords="offset points", fontsize=8, ha="center"
                        )
        axis.axhline(0, color="black", lw=0.8)
        axis.set_title(f"tiles of {tile} px", fontsize=11)
        axis.set_xlabel("tiles a step, 1 = fixed grid, overlap 0.5 (published)")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("PSNR to the one-tile result,\ndB above the published grid")
    axes[0][-1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "performance" / "tile_grid.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
