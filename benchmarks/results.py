"""What the rows give, and how it is written down."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .measure import Spread

NOT_MEASURED = "not measured yet"
"""Stands in place of every figure that a run on this device cannot give."""

_COMPARE = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Target:
    """What a ratio or a figure is to reach.

    Attributes:
        relation: `<=` or `>=`.
        value: the bound.
    """

    relation: str
    value: float

    def met(self, figure: float) -> bool:
        return bool(_COMPARE[self.relation](figure, self.value))

    def __str__(self) -> str:
        return f"{self.relation} {self.value:g}"


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        row: name of the row that gave it.
        case: what was measured, with sizes.
        unit: of `ours` and `peer`, such as `ms`, `MiB`, `GB/s`.
        ours, peer: the figures; None where there is none.
        peer_name: what ours is compared with.
        ratio: ours over peer, or for a speed-up peer over ours; None without a peer.
        ratio_name: what the ratio is.
        target: what the ratio is to reach; the figure itself where there is no ratio.
        note: reduced sizes and the like.
        kind: `measured`, `counted` (from shapes), or `not measured yet`.
    """

    row: str
    case: str
    unit: str = ""
    ours: Spread | None = None
    peer: Spread | None = None
    peer_name: str = ""
    ratio: Spread | None = None
    ratio_name: str = ""
    target: Target | None = None
    note: str = ""
    kind: str = "measured"

    @property
    def judged(self) -> float | None:
        """The figure that the target is about."""
        figure = self.ratio or self.ours
        return None if figure is None or self.kind == NOT_MEASURED else figure.median

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or nothing where there is no target or no figure."""
        if self.target is None or self.judged is None:
            return ""
        return "met" if self.target.met(self.judged) else "missed"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        for name in ("ours", "peer", "ratio"):
            spread: Spread | None = getattr(self, name)
            if spread is not None:
                data[name] = {
                    "median": spread.median,
                    "low": spread.low,
                    "high": spread.high,
                    "values": list(spread.values),
                    "quartiles": spread.quartiles,
                }
        data["target"] = None if self.target is None else str(self.target)
        return data | {"verdict": self.verdict}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The result that `as_dict` wrote."""
        values = {item.name: data[item.name] for item in fields(cls)}
        for name in ("ours", "peer", "ratio"):
            if values[name] is not None:
                quartiles = values[name].get("quartiles")
                values[name] = Spread(tuple(values[name]["values"]), None if quartiles is None else tuple(quartiles))
        if values["target"] is not None:
            relation, bound = values["target"].split(" ")
            values["target"] = Target(relation, float(bound))
        return cls(**values)


def timed(row: str, case: str, ours: Spread, peer: Spread, peer_name: str, **kw: Any) -> Result:
    """A comparison of times, given in seconds; the ratio defaults to ours over peer's."""
    milli = ours.times(1e3), peer.times(1e3)
    more: dict[str, Any] = {"ratio": ours.over(peer), "ratio_name": "time", "unit": "ms"} | kw
    return Result(row, case, ours=milli[0], peer=milli[1], peer_name=peer_name, **more)


def memory(row: str, case: str, ours: int, peer: int | None, peer_name: str = "", **kw: Any) -> Result:
    """A comparison of peaks, given in bytes."""
    mebi = Spread((ours / 2**20,))
    if peer is None:
        return Result(row, case, "MiB", mebi, **kw)
    other = Spread((peer / 2**20,))
    more: dict[str, Any] = {"ratio": mebi.over(other) if peer else None, "ratio_name": "peak memory"} | kw
    return Result(row, case, "MiB", mebi, other, peer_name, **more)


def missing(row: str, case: str, why: str, target: Target | None = None) -> Result:
    """A line for what this run cannot measure."""
    return Result(row, case, target=target, note=why, kind=NOT_MEASURED)


HEADINGS = ("row", "case", "ours", "peer", "ratio", "target", "", "notes")


@dataclass(frozen=True)
class Report:
    """All results of a run.

    Attributes:
        command: what was run.
        machine: what it ran on, by name.
        results: in the order in which they came.
        finished: names of the rows whose results are all there.
    """

    command: str
    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "command": self.command,
            "machine": self.machine,
            "finished": self.finished,
            "results": [result.as_dict() for result in self.results],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `as_dict` wrote."""
        results = [Result.from_dict(result) for result in data["results"]]
        return cls(data["command"], data["machine"], results, data["finished"])

    def write(self, path: Path) -> None:
        """Write the report as JSON; a file that is cut off half-way is never left under the name."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    def markdown(self) -> str:
        """Machine and table."""
        facts = [f"- {name}: {value}" for name, value in self.machine.items()]
        return "\n".join([f"`{self.command}`", "", *facts, "", table(self.results)])

    def plot(self, path: Path) -> None:
        """Draw the time ratios with their targets. Needs matplotlib.

        Raises:
            ValueError: there is no ratio to draw.
        """
        from matplotlib.figure import Figure

        drawn = [result for result in self.results if result.ratio is not None]
        if not drawn:
            raise ValueError("There is no ratio to draw; run rows that compare.")
        figure = Figure(figsize=(9, 1 + 0.42 * len(drawn)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.axvline(1.0, color="0.6", linewidth=1)
        for place, result in enumerate(drawn):
            ratio = result.ratio
            assert ratio is not None
            axes.plot([ratio.low, ratio.high], [place, place], color="tab:blue", linewidth=4, alpha=0.4)
            axes.plot(ratio.median, place, "o", color="tab:blue")
            if result.target is not None:
                axes.plot(result.target.value, place, "|", color="tab:red", markersize=16, markeredgewidth=2)
        labels = [f"{result.row}: {result.case}\n{result.ratio_name} / {result.peer_name}" for result in drawn]
        axes.set_yticks(range(len(drawn)), labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("ratio (dots: median, bars: quartiles, red: target)")
        figure.savefig(path, dpi=120)


def table(results: Iterable[Result]) -> str:
    """A table in Markdown, one line for each result."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(_cells(result) for result in results)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cells(result: Result) -> Sequence[str]:
    if result.kind == NOT_MEASURED:
        target = str(result.target or "")
        return (result.row, result.case, NOT_MEASURED, "", "", target, "", result.note)
    note = "; ".join(part for part in ("counted" if result.kind == "counted" else "", result.note) if part)
    return (
        result.row,
        result.case,
        _figure(result.ours, result.unit),
        f"{_figure(result.peer, result.unit)} ({result.peer_name})" if result.peer else "",
        f"{result.ratio_name} {_figure(result.ratio)}" if result.ratio else "",
        str(result.target or ""),
        result.verdict,
        note,
    )


def _figure(spread: Spread | None, unit: str = "") -> str:
    if spread is None:
        return ""
    text = f"{spread.median:.4g} {unit}".strip()
    if len(spread.values) > 1 or spread.quartiles is not None:
        text += f" [{spread.low:.3g} .. {spread.high:.3g}]"
    return text
