"""A sweep as CSV and as Markdown: Table 10's layout for settings, Table 11's for differences."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from itertools import product

from .sweep import Axis, Layout, Mean, Point, SweepResult, mean_difference, mean_score, shown


def sweep_csv(axes: Sequence[Axis], results: Sequence[SweepResult], metrics: Sequence[str]) -> str:
    """One line for each result: image, settings, seed, scores, file, and the failure if there is one."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["image", *(axis.name for axis in axes), "seed", *metrics, "file", "failure"])
    for result in results:
        scores = [result.scores.get(name, math.nan) for name in metrics]
        cells = ["" if math.isnan(score) else f"{score:.6f}" for score in scores]
        file = "/".join(result.file.parts)
        writer.writerow([result.image, *map(shown, result.point), result.seed, *cells, file, result.failure])
    return text.getvalue()


def sweep_markdown(
    axes: Sequence[Axis],
    results: Sequence[SweepResult],
    lower_is_better: Mapping[str, bool],
    missing: Mapping[str, str],
    together: Sequence[str] = (),
) -> str:
    """The sweep as Markdown.

    First, in the layout of the paper's Table 10, the metrics of the trade-off together; then each metric by itself with
    95 % intervals, the best bold and the second best underlined; then the differences of every setting that has two
    values, in the layout of Table 11.

    Args:
        axes: settings with several values.
        results: of all points, images and seeds.
        lower_is_better: for each metric that was measured, in the order of the tables.
        missing: why others were not.
        together: metrics that share a table; none where there are fewer than two.
    """
    layout = Layout.of(axes)
    by_point: dict[Point, list[SweepResult]] = {}
    for result in sorted(results, key=lambda result: (result.image, result.seed)):
        by_point.setdefault(result.point, []).append(result)
    images, seeds = {r.image for r in results}, {r.seed for r in results}
    lines = ["# Sweep", "", f"Means over {_count(len(images), 'image')} and {_count(len(seeds), 'seed')}."]
    if len(together) > 1:
        for heading, section in layout.sections():
            names = " / ".join(_arrow(name, lower_is_better) for name in together)
            lines += ["", f"## {names}{_of(heading)}", ""]
            cells = [
                [_joined(by_point[layout.point(section, row, column)], together) for column in layout.columns.values]
                for row in layout.row_values
            ]
            lines += _grid(layout, cells)
    for metric, lower in lower_is_better.items():
        for heading, section in layout.sections():
            lines += ["", f"## {_arrow(metric, lower_is_better)}{_of(heading)}", ""]
            means = [
                [mean_score(by_point[layout.point(section, row, column)], metric) for column in layout.columns.values]
                for row in layout.row_values
            ]
            lines += _grid(layout, _ranked(means, lower))
    for axis in axes:
        if len(axis.values) == 2 and lower_is_better:
            lines += _differences(axes, axis, by_point, lower_is_better)
    lines.append("")
    lines += [f"missing: {name}: {reason}" for name, reason in missing.items()]
    lines += [
        f"failed: {r.image}, {', '.join(f'{a.label(v)}' for a, v in zip(axes, r.point, strict=True))}, seed {r.seed}: "
        f"{r.failure}"
        for r in results
        if r.failure
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _differences(
    axes: Sequence[Axis], axis: Axis, by_point: Mapping[Point, list[SweepResult]], metrics: Mapping[str, bool]
) -> list[str]:
    """Rows: each combination of the other settings, then their mean. Columns: metrics."""
    first, second = axis.values
    others = [other for other in axes if other is not axis]
    place = list(axes).index(axis)
    lines = ["", f"## Differences: {axis.label(first)} - {axis.label(second)}", ""]
    lines += [
        f"| {', '.join(other.name for other in others) or 'setting'} | "
        + " | ".join(f"Δ {_arrow(name, metrics)}" for name in metrics)
        + " |",
        "|---" * (len(metrics) + 1) + "|",
    ]
    rows = []
    for values in product(*(other.values for other in others)):
        at = [values[:place] + (value,) + values[place:] for value in (first, second)]  # noqa: RUF005 (Python 3.10)
        one, two = by_point[at[0]], by_point[at[1]]
        rows.append((", ".join(map(shown, values)) or f"{shown(first)} - {shown(second)}", one, two))
    if len(rows) > 1:
        rows.append(("mean", [r for _, one, _ in rows for r in one], [r for _, _, two in rows for r in two]))
    for label, one, two in rows:
        lines.append(f"| {label} | " + " | ".join(mean_difference(one, two, name).text("+") for name in metrics) + " |")
    return lines


def _joined(results: Sequence[SweepResult], metrics: Sequence[str]) -> str:
    """`66.2800 / 0.3080`: means without intervals."""
    return " / ".join(Mean(mean_score(results, name).value).text() for name in metrics)


def _grid(layout: Layout, cells: Sequence[Sequence[str]]) -> list[str]:
    corner = layout.columns.name if layout.rows is None else f"{layout.rows.name} \\ {layout.columns.name}"
    lines = [
        f"| {corner} | " + " | ".join(map(shown, layout.columns.values)) + " |",
        "|---" * (len(layout.columns.values) + 1) + "|",
    ]
    for value, row in zip(layout.row_values, cells, strict=True):
        lines.append(f"| {'' if value is None else shown(value)} | " + " | ".join(row) + " |")
    return lines


def _ranked(means: Sequence[Sequence[Mean]], lower: bool) -> list[list[str]]:
    """Cells with the best bold and the second best underlined; nothing where all are equal."""
    found = sorted({m.rounded for row in means for m in row if not math.isnan(m.value)}, reverse=not lower)
    marks = {found[0]: "**{}**", found[1]: "<u>{}</u>"} if len(found) > 1 else {}
    return [[marks.get(mean.rounded, "{}").format(mean.text()) for mean in row] for row in means]


def _arrow(metric: str, lower_is_better: Mapping[str, bool]) -> str:
    return f"{metric} {'↓' if lower_is_better[metric] else '↑'}"


def _of(heading: str) -> str:
    return f", {heading}" if heading else ""


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
