"""The trade-off plot of a sweep: fidelity against perceptual quality, one point for each combination of settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .sweep import Layout, Point, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIDELITY = ("psnr", "psnry", "ssim", "ssimc")
"""Metrics of the plot's horizontal axis; the first that was measured is taken."""

PERCEPTUAL = ("musiq", "clipiqa+", "maniqa", "paq2piq", "lpips", "dists", "niqe", "blur")
"""Metrics of its vertical axis; the first that was measured is taken."""


def plot_tradeoff(
    layout: Layout,
    means: Mapping[Point, tuple[float, float]],
    metrics: tuple[str, str],
    lower_is_better: Mapping[str, bool],
    default: Point | None = None,
) -> Figure:
    """Draw the plot; better is always to the right and up, so the axis of a metric whose lower values are better turns.

    Args:
        layout: points of a row are joined by a line, in the order of the columns.
        means: of both metrics at each point; points with a value that is not finite are left out.
        metrics: fidelity, then perceptual.
        lower_is_better: for both.
        default: the point of the published settings, which gets a ring.

    Returns:
        matplotlib's figure; `figure.savefig(file)` writes it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    # Hollow markers and dashes: lines that lie on each other stay visible.
    looks = zip(itertools.cycle("os^Dv*PX"), itertools.cycle(("-", "--", ":")), strict=False)
    for heading, section in layout.sections():
        for row in layout.row_values:
            label = ", ".join(t for t in (heading, "" if layout.rows is None else layout.rows.label(row)) if t)
            found = [(layout.point(section, row, column), column) for column in layout.columns.values]
            placed = [(*means[p], c, p) for p, c in found if all(map(math.isfinite, means[p]))]
            xs, ys = [x for x, _, _, _ in placed], [y for _, y, _, _ in placed]
            marker, dashes = next(looks)
            (line,) = axes.plot(xs, ys, marker=marker, fillstyle="none", linestyle=dashes, label=label or None)
            for x, y, column, point in placed:
                axes.annotate(shown(column), (x, y), (6, 4), textcoords="offset points", fontsize=9)
                if point == default:
                    axes.plot([x], [y], "o", markersize=14, fillstyle="none", color=line.get_color())
    for name, set_label, turn in (
        (metrics[0], axes.set_xlabel, axes.invert_xaxis),
        (metrics[1], axes.set_ylabel, axes.invert_yaxis),
    ):
        set_label(f"{name} ({'lower' if lower_is_better[name] else 'higher'} is better)")
        if lower_is_better[name]:
            turn()
    ring = "; the ring marks the published settings" if default in means else ""
    axes.set_title(f"Numbers at the points: {layout.columns.name}{ring}", fontsize=10)
    if len(axes.lines) > 1:
        axes.legend()
    axes.grid(alpha=0.3)
    axes.margins(0.12)
    return figure
