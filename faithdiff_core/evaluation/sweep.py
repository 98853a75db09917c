"""Sweeps: a grid of settings, the results at its points, and how they are laid out in tables and sheets.

As in the paper's Tables 10 and 11: two settings become the rows and columns of a table, further ones a table each.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SettingsError

Point = tuple[Any, ...]
"""One value for each axis, in the axes' order."""

DIGITS = 4
"""Decimal places of scores in tables."""

_LONGEST_NAME = 120
"""Characters of a file name that is made from settings."""


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes in a sweep.

    Attributes:
        name: of the setting, as it is shown.
        values: plain numbers or texts, all different.
    """

    name: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        twice = [value for value in self.values if self.values.count(value) > 1]
        if twice:
            raise SettingsError(f"{self.name}: the value {shown(twice[0])} is given twice; give each value once.")

    def label(self, value: Any) -> str:
        """`steps 20`: a value as rows, columns and points are labelled with it."""
        return f"{self.name} {shown(value)}"


@dataclass(frozen=True)
class SweepResult:
    """One restored image of a sweep.

    Attributes:
        image: name of the input.
        point: values of the axes.
        seed: of the run.
        file: the result.
        scores: by metric; empty until it is scored.
        failure: why there is no result or no score; empty if there are both.
    """

    image: str
    point: Point
    seed: int
    file: Path
    scores: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Layout:
    """Which axes become columns, rows, and sections of their own.

    Attributes:
        axes: all of them, in the order of points.
        columns: the longest axis (of equal ones the first).
        rows: the next; None if there is one axis alone.
        others: those that make a section for each combination of their values.
    """

    axes: tuple[Axis, ...]
    columns: Axis
    rows: Axis | None
    others: tuple[Axis, ...]

    @classmethod
    def of(cls, axes: Sequence[Axis]) -> Layout:
        """Lay out one or more axes."""
        longest = sorted(axes, key=lambda axis: -len(axis.values))
        rows = longest[1] if len(longest) > 1 else None
        others = tuple(axis for axis in axes if axis is not longest[0] and axis is not rows)
        return cls(tuple(axes), longest[0], rows, others)

    @property
    def row_values(self) -> tuple[Any, ...]:
        """Values of the rows; a single None where there is one row without a setting."""
        return (None,) if self.rows is None else self.rows.values

    def sections(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Heading and values of each combination of the other axes; the heading is empty without any."""
        for values in itertools.product(*(axis.values for axis in self.others)):
            labels = [axis.label(value) for axis, value in zip(self.others, values, strict=True)]
            yield ", ".join(labels), {axis.name: value for axis, value in zip(self.others, values, strict=True)}

    def point(self, section: Mapping[str, Any], row: Any, column: Any) -> Point:
        """The point of a cell."""
        values = {**section, self.columns.name: column}
        if self.rows is not None:
            values[self.rows.name] = row
        return tuple(values[axis.name] for axis in self.axes)


def shown(value: Any) -> str:
    """A value as it is written in labels and names."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def points(axes: Sequence[Axis]) -> list[Point]:
    """All points of the grid; the last axis changes first."""
    return list(itertools.product(*(axis.values for axis in axes)))


def point_label(axes: Sequence[Axis], point: Point) -> str:
    """`steps 10, cfg 2`."""
    return ", ".join(axis.label(value) for axis, value in zip(axes, point, strict=True))


def file_stem(axes: Sequence[Axis], point: Point, seed: int | None = None) -> str:
    """`steps-10_cfg-2_seed-0`: a file name that tells a point, different for different points.

    Characters that file systems do not take, and texts that are too long, are replaced, with a digest in their place.
    """
    parts = [f"{axis.name}-{shown(value)}" for axis, value in zip(axes, point, strict=True)]
    raw = "_".join(parts if seed is None else [*parts, f"seed-{seed}"])
    clean = re.sub(r"[^A-Za-z0-9._+-]+", "-", raw)[:_LONGEST_NAME]
    return clean if clean == raw else f"{clean}_{hashlib.sha256(raw.encode()).hexdigest()[:8]}"


def digest_of(*facts: str) -> str:
    """16 hexadecimal digits that change with any of some texts."""
    return hashlib.sha256("\0".join(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Mean:
    """A mean over images and seeds.

    Attributes:
        value: NaN where a result is missing: a mean over fewer images compares with no other.
        half: half width of its 95 % interval; None where there are too few values, or infinite ones.
    """

    value: float
    half: float | None = None

    @property
    def rounded(self) -> float:
        """The value as tables show it, without a negative zero."""
        return round(self.value, DIGITS) + 0.0

    def text(self, sign: str = "") -> str:
        """As tables show it; with `+` for a sign, positive values get one too."""
        if math.isnan(self.value):
            return "-"
        text = f"{self.rounded:{sign}.{DIGITS}f}"
        return text if self.half is None else f"{text} ± {self.half:.{DIGITS}f}"


def mean_score(results: Sequence[SweepResult], metric: str) -> Mean:
    """Mean of a metric over results: of all that an image has, then of the images.

    The interval is over the images; with a single image, over its results.
    """
    return _mean([(result.image, result.scores.get(metric, math.nan)) for result in results])


def mean_difference(first: Sequence[SweepResult], second: Sequence[SweepResult], metric: str) -> Mean:
    """Mean of the differences first - second, where results of the same place in both sequences belong together."""
    pairs = zip(first, second, strict=True)
    return _mean([(a.image, a.scores.get(metric, math.nan) - b.scores.get(metric, math.nan)) for a, b in pairs])


def _mean(values: Sequence[tuple[str, float]]) -> Mean:
    from .scores import confidence_interval

    by_image: dict[str, list[float]] = {}
    for image, value in values:
        by_image.setdefault(image, []).append(value)
    if not by_image:
        return Mean(math.nan)
    sample = [statistics.fmean(scores) for scores in by_image.values()]
    if len(sample) == 1:
        sample = next(iter(by_image.values()))
    return Mean(statistics.fmean(sample), confidence_interval(sample))
