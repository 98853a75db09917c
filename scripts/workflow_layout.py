"""Where a graph's nodes, groups and wires go on the canvas.

Nodes stand in titled groups from left to right, each a stack of rows; what shows the result stands below. Heights are
the page's own, measured by `measure_nodes.py`. A wire that would run behind a node takes a free lane between the rows,
held by two reroutes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

HEIGHTS_FILE = Path(__file__).resolve().parent / "node_heights.json"
"""`nodes`: the least height in pixels of each node type without its title, in the classic canvas and in Nodes 2.0;
`notes`: that of each workflow's notes, by key.
"""

TITLE = 30
"""Height of a node's title in pixels."""

ROW_GAP, COLUMN_GAP, GROUP_GAP = 46, 60, 70
PADDING, GROUP_TITLE = 20, 58

CLEARANCE = 14
"""Smallest distance of a lane from a node in pixels."""

LANE = 9
"""Distance of two wires in one lane, or in one gap between columns, in pixels."""

LONG, HOOK = 130, 36
"""From which length a way up or down is held straight, and how far from the slot, in pixels."""

HIGHEST_LANE = -22
"""Smallest height of a lane in pixels: below the groups' titles."""

FIRST_SLOT, SLOT = 14, 20
"""Centre of a node's first slot below its title, and the distance to the next one, in pixels."""

MIN_SCALE, MAX_SCALE = 0.62, 0.9
"""Limits of the zoom at opening. Below 0.57, the page leaves all text out."""

VIEW = (80, 110, 1580, 990)
"""Left, top, right and bottom of what the page's bars leave free of the canvas in a window of 1600 x 1000 pixels."""

MINIMAP = (1340, 740)
"""Left and top of the overview and the zoom buttons, which cover the corner at the bottom right of that window."""


@dataclass(frozen=True)
class Group:
    """A titled, coloured group of nodes.

    Attributes:
        title: shown at the top.
        colour: of the group, as CSS has it.
        width: inside, in pixels.
        rows: from top to bottom; each is a row of columns, and each column a stack of nodes' keys.
        below: the first and the last of the groups that this one lies under, by number, or None for a group of the
            upper row. Such a group is as wide as they are, and lower than all but the first, from which wires run to
            all others.
        shares: of the width, for each column of a row that has as many; else all columns are as wide.
    """

    title: str
    colour: str
    width: int
    rows: tuple[tuple[tuple[str, ...], ...], ...]
    below: tuple[int, int] | None = None
    shares: tuple[int, ...] = ()


class Box(NamedTuple):
    """A node without its title, in pixels."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Right edge."""
        return self.left + self.width

    def covers(self, x: float, y: float, margin: float = 6) -> bool:
        """Whether a point lies on the node, on its title or close to them."""
        across = self.left - margin < x < self.right + margin
        return across and self.top - TITLE - margin < y < self.top + self.height + margin


class Wire(NamedTuple):
    """A link: its number, and which slot of which node it joins to which, counted from each node's top."""

    number: int
    source: str
    output: int
    target: str
    input: int


@dataclass
class Layout:
    """A graph on the canvas.

    Attributes:
        boxes: by key.
        groups: each with its title, bounding and colour, as the page has it.
        reroutes: id, position, links that pass, and the reroute before it, as the page has it.
        last_reroute: of each link, by number.
    """

    boxes: dict[str, Box]
    groups: list[dict[str, object]]
    reroutes: list[dict[str, object]] = field(default_factory=list)
    last_reroute: dict[int, int] = field(default_factory=dict)

    def view(self) -> dict[str, object]:
        """Zoom and offset that show the whole graph, or its beginning if it is too large to be read as a whole."""
        left = min(box.left for box in self.boxes.values()) - PADDING
        top = min(box.top for box in self.boxes.values()) - TITLE - (GROUP_TITLE if self.groups else 0)

        def fits(scale: float) -> bool:
            for box in self.boxes.values():
                right = VIEW[0] + scale * (box.right + PADDING - left)
                bottom = VIEW[1] + scale * (box.top + box.height + PADDING - top)
                if right > VIEW[2] or bottom > VIEW[3] or (right > MINIMAP[0] and bottom > MINIMAP[1]):
                    return False
            return True

        steps = range(round(MAX_SCALE * 100), round(MIN_SCALE * 100), -1)
        scale = next((step / 100 for step in steps if fits(step / 100)), MIN_SCALE)
        return {"scale": scale, "offset": [round(VIEW[0] / scale - left), round(VIEW[1] / scale - top)]}


def arrange(groups: Sequence[Group], heights: Mapping[str, int], wires: Iterable[Wire]) -> Layout:
    """Lay a graph out.

    Args:
        groups: from left to right; every node is in one of them.
        heights: of all nodes, by key, in pixels.
        wires: all links.

    Raises:
        ValueError: a node is in no group or in two, or a wire finds no free way.
    """
    listed = [key for group in groups for row in group.rows for column in row for key in column]
    if sorted(listed) != sorted(heights):
        raise ValueError(f"The groups must hold every node once; they differ in {sorted(set(listed) ^ set(heights))}.")
    boxes: dict[str, Box] = {}
    frames: list[dict[str, object]] = []
    edges: list[tuple[int, int, int]] = []
    next_left = 0
    for group in groups:
        left, top, width = next_left, 0, group.width
        if group.below is not None:
            first, last = group.below
            left, width = edges[first][0], edges[last][1] - edges[first][0]
            top = max(bottom for _, _, bottom in edges[1:]) + GROUP_GAP + GROUP_TITLE
        bottom = _stack(boxes, group, (left, top, width), heights)
        bounding = [left - PADDING, top - GROUP_TITLE, width + 2 * PADDING, GROUP_TITLE + bottom - top]
        frame = {"id": len(frames) + 1, "title": group.title, "bounding": bounding, "color": group.colour}
        frames.append(frame | {"font_size": 24, "flags": {}})
        edges.append((left, left + width, bottom))
        if group.below is None:
            next_left += group.width + 2 * PADDING + GROUP_GAP
    layout = Layout(boxes, frames)
    _Router(layout).route(wires)
    return layout


def _stack(boxes: dict[str, Box], group: Group, place: tuple[int, int, int], heights: Mapping[str, int]) -> int:
    """Add the boxes of a group at this left, top and width, and return the group's bottom."""
    left, top, width = place
    for row in group.rows:
        free = width - COLUMN_GAP * (len(row) - 1)
        shares = group.shares if len(group.shares) == len(row) else (1,) * len(row)
        bottom, x = top, left
        for column, share in zip(row, shares, strict=True):
            column_width, at = free * share // sum(shares), top
            for key in column:
                boxes[key] = Box(x, at + TITLE, column_width, heights[key])
                at += TITLE + heights[key] + ROW_GAP
            bottom, x = max(bottom, at), x + column_width + COLUMN_GAP
        top = bottom
    return top - ROW_GAP + PADDING


class _Router:
    """Leads wires around nodes: up or down beside a column, and along a lane between two rows."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.lanes: list[tuple[float, float, float, tuple[str, int]]] = []
        self.uprights: dict[tuple[int, str, int], float] = {}
        self.points: dict[tuple[str, int, float, float, int], int] = {}

    def route(self, wires: Iterable[Wire]) -> None:
        """Give each wire that needs them reroutes: two, or four out of the middle of a group."""
        boxes = self.layout.boxes
        ways: dict[Wire, list[tuple[float, float]]] = {}
        for wire in wires:
            source, target = boxes[wire.source], boxes[wire.target]
            start = (source.right, source.top + FIRST_SLOT + SLOT * wire.output)
            end = (target.left, target.top + FIRST_SLOT + SLOT * wire.input)
            others = [box for key, box in boxes.items() if key not in (wire.source, wire.target)]
            if end[0] > start[0] and not any(box.covers(x, y) for x, y in curve(start, end) for box in others):
                continue
            first = self._upright(source.right, 1, wire)
            second = self._upright(target.left, -1, wire, self._crosses_title(target))
            lane = self._lane(first, second, start[1], end[1], wire)
            corners = [(first, lane), (second, lane)] if lane is not None else []
            if lane is None:
                middle = self._upright(self._frame_edge(source), 1, wire)
                out = self._lane(first, middle, start[1], start[1], wire)
                lane = None if out is None else self._lane(middle, second, out, end[1], wire)
                if out is None or lane is None:
                    raise ValueError(f"There is no free way for the wire from {wire.source} to {wire.target}.")
                corners = [(first, out), (middle, out), (middle, lane), (second, lane)]
            ways[wire] = _straightened(start, corners, end)
        for wire, way in ways.items():
            siblings = [ways[other] for other in ways if other[1:3] == wire[1:3] and other != wire]
            parent = 0
            for x, y in _joined(way, [corner for sibling in siblings for corner in sibling]):
                parent = self._point(wire, x, y, parent)
            self.layout.last_reroute[wire.number] = parent

    def _frame_edge(self, box: Box) -> float:
        """Right edge of the last column of the node's group."""
        for frame in self.layout.groups:
            left, _, width, _ = cast("list[int]", frame["bounding"])
            if left <= box.left <= left + width:
                return float(left + width - PADDING)
        raise ValueError("The node is in no group.")

    def _crosses_title(self, box: Box) -> bool:
        """Whether a wire that comes down beside a node would cross the title of its group, which is at the top left."""
        corners = [cast("list[int]", frame["bounding"])[:2] for frame in self.layout.groups]
        return any(top > 0 and left + PADDING == box.left for left, top in corners)

    def _upright(self, edge: float, side: int, wire: Wire, outside: bool = False) -> float:
        """Where the wires of an output go up or down beside a column; `outside` the group or in it."""
        key = (round(edge) * side, wire.source, wire.output)
        taken = sum(1 for other in self.uprights if other[0] == key[0])
        nearest = PADDING + LANE if outside else CLEARANCE
        return self.uprights.setdefault(key, edge + side * (nearest + LANE * taken))

    def _lane(self, first: float, second: float, start: float, end: float, wire: Wire) -> float | None:
        """The free height between two uprights that makes the shortest way, or None."""
        left, right = min(first, second), max(first, second)
        boxes = self.layout.boxes.values()
        walls = [_wall(box) for box in boxes if box.left < right and box.right > left]
        own = (wire.source, wire.output)
        taken = [y for y, a, b, other in self.lanes if a < right and b > left and other != own]
        # A wire on a group's edge would look like part of it.
        for frame in self.layout.groups:
            x, top, width, height = cast("list[int]", frame["bounding"])
            if x < right and x + width > left:
                taken += [top, top + height]
                if top > 0:
                    walls.append((top, top + GROUP_TITLE))

        def free(y: float) -> bool:
            if any(top < y < bottom for top, bottom in walls) or any(abs(y - t) < LANE for t in taken):
                return False
            ways = ((first, start, y), (second, y, end))
            return not any(
                box.left - 4 < x < box.right + 4 and _wall(box)[0] < max(a, b) and _wall(box)[1] > min(a, b)
                for x, a, b in ways
                for box in boxes
            )

        edges = {y for box in boxes for y in _wall(box)} | {start, end}
        choices = {y + LANE * step * sign for y in edges for step in range(12) for sign in (-1, 1)}
        ways = [y for y in choices if y >= HIGHEST_LANE and free(y)]
        if not ways:
            return None
        # A lane of the same output is worth a detour: two wires beside each other look like two images.
        mine = {y for y, _, _, other in self.lanes if other == own}
        lane = min(ways, key=lambda y: (abs(y - start) + abs(y - end) - 4 * LANE * (y in mine), abs(y - end)))
        self.lanes.append((lane, left, right, own))
        return lane

    def _point(self, wire: Wire, x: float, y: float, parent: int) -> int:
        """The number of a reroute; wires of one output share it."""
        key = (wire.source, wire.output, x, y, parent)
        if key not in self.points:
            self.points[key] = len(self.points) + 1
            reroute: dict[str, object] = {"id": self.points[key], "pos": [round(x), round(y)], "linkIds": []}
            self.layout.reroutes.append(reroute | ({"parentId": parent} if parent else {}))
        number = self.points[key]
        passing = self.layout.reroutes[number - 1]["linkIds"]
        assert isinstance(passing, list)
        passing.append(wire.number)
        return number


def _straightened(
    start: tuple[float, float], corners: list[tuple[float, float]], end: tuple[float, float]
) -> list[tuple[float, float]]:
    """The corners, and one more where a long way up or down would swing out beside its gap."""
    out = list(corners)
    if abs(corners[0][1] - start[1]) > LONG:
        out.insert(0, (corners[0][0], start[1] + math.copysign(HOOK, corners[0][1] - start[1])))
    if abs(corners[-1][1] - end[1]) > LONG:
        out.append((corners[-1][0], end[1] + math.copysign(HOOK, corners[-1][1] - end[1])))
    return out


def _joined(way: list[tuple[float, float]], others: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A way with those corners of other wires of its output that lie on it, so that they share all up to there."""
    out = way[:1]
    for (x, y), (next_x, next_y) in itertools.pairwise(way):
        between = {c for c in others if c[1] == y == next_y and min(x, next_x) < c[0] < max(x, next_x)}
        out += [*sorted(between, reverse=next_x < x), (next_x, next_y)]
    return out


def _wall(box: Box) -> tuple[float, float]:
    """Top and bottom of what a lane keeps clear of."""
    return box.top - TITLE - CLEARANCE, box.top + box.height + CLEARANCE


def curve(start: tuple[float, float], end: tuple[float, float], steps: int = 48) -> list[tuple[float, float]]:
    """Points of the page's wire between two slots: a cubic Bezier curve that leaves and arrives level."""
    reach = 0.25 * ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5
    points = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
    out = []
    for step in range(steps + 1):
        t = step / steps
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        x, y = (sum(w * p[axis] for w, p in zip(weights, points, strict=True)) for axis in (0, 1))
        out.append((x, y))
    return out
