"""Write workflows/*.json, workflows/api/*.json and subgraphs/*.json from `workflow_graphs.py`.

    COMFYUI_PATH=/path/to/ComfyUI python scripts/build_workflows.py

The nodes are asked for their inputs and outputs, so the files cannot disagree with them; a test builds them again and
compares.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from workflow_graphs import API_GRAPHS, BLUEPRINTS, DOWNLOADS, GRAPHS, Blueprint, Graph, Link, Node
from workflow_layout import HEIGHTS_FILE, Layout, Wire, arrange

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS, SUBGRAPHS = ROOT / "workflows", ROOT / "subgraphs"
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
NOTE_COLOURS = {"color": "#222", "bgcolor": "#000"}
"""Of a note's title and text: the links of the classic canvas cannot be read on its own brown."""

_IDS = uuid.UUID("6f0a3f5e-6a0e-4d2c-9d0a-0f1d1ff0fa17")


class NodeClass(Protocol):
    """What is asked of a node class, classic or V3."""

    RETURN_TYPES: tuple[str, ...]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[Any, ...]]]: ...  # noqa: N802


def api_format(graph: Graph) -> dict[str, Any]:
    """The graph as the server takes it: POST /prompt."""
    ids = _ids(graph)
    return {
        ids[key]: {
            "class_type": node.type,
            "inputs": {
                name: [ids[value.node], value.slot] if isinstance(value, Link) else value
                for name, value in node.inputs.items()
            },
            "_meta": {"title": node.title or node.type},
        }
        for key, node in graph.nodes.items()
        if key not in graph.page_only
    }


def complete(graph: Graph, classes: Mapping[str, type[NodeClass]]) -> Graph:
    """The graph with the default of every widget that it does not set, so that the files show all settings."""
    nodes: dict[str, Node] = {}
    for key, node in graph.nodes.items():
        known = _inputs(classes[node.type])
        unknown = node.inputs.keys() - known.keys()
        if unknown:
            raise ValueError(f"{graph.name}: {node.type} has no input {sorted(unknown)}; it has {sorted(known)}.")
        inputs: dict[str, Any] = {}
        for name, spec in known.items():
            if name in node.inputs:
                inputs[name] = node.inputs[name]
            elif _is_widget(spec):
                inputs[name] = _default(spec)
        nodes[key] = replace(node, inputs=inputs)
    return replace(graph, nodes=nodes)


def _page_nodes(
    graph: Graph, classes: Mapping[str, type[NodeClass]]
) -> tuple[list[dict[str, Any]], list[list[Any]], Layout]:
    """Nodes, links ([id, from, slot, to, slot, type]) and where all is, as the page has them. `graph` is complete."""
    ids = {key: int(number) for key, number in _ids(graph).items()}
    links: list[list[Any]] = []
    outgoing: dict[tuple[str, int], list[int]] = {}
    nodes: list[dict[str, Any]] = []
    for order, (key, node) in enumerate(graph.nodes.items()):
        inputs: list[dict[str, Any]] = []
        values: list[Any] = []
        for name, spec in _inputs(classes[node.type]).items():
            value = node.inputs.get(name)
            entry: dict[str, Any] = {"name": name, "type": _type_name(spec), "link": None}
            if isinstance(value, Link):
                source = graph.nodes[value.node]
                kind = str(_outputs(classes[source.type])[value.slot])
                number = len(links) + 1
                links.append([number, ids[value.node], value.slot, ids[key], len(inputs), kind])
                outgoing.setdefault((value.node, value.slot), []).append(number)
                entry["link"] = number
            if _is_widget(spec):
                entry["widget"] = {"name": name}
                values.append(_default(spec) if isinstance(value, Link) else value)
                values.extend(_extra_widget_values(spec))
            inputs.append(entry)
        nodes.append(
            {
                "id": ids[key],
                "type": node.type,
                "flags": {},
                "order": order,
                "mode": 0,
                **({"title": title} if (title := node.page_title or node.title) else {}),
                "inputs": inputs,
                "outputs": [],
                "properties": {"Node name for S&R": node.type, **_downloads(node)},
                "widgets_values": values,
            }
        )
    for entry, (key, node) in zip(nodes, graph.nodes.items(), strict=True):
        node_class = classes[node.type]
        names = getattr(node_class, "RETURN_NAMES", None) or _outputs(node_class)
        entry["outputs"] = [
            {"name": str(name), "type": str(kind), "links": outgoing.get((key, slot))}
            for slot, (name, kind) in enumerate(zip(names, _outputs(node_class), strict=True))
        ]
    layout = _layout(graph, links, {node["id"]: node for node in nodes})
    for entry, key in zip(nodes, graph.nodes, strict=True):
        entry |= _place(layout, key)
    return nodes, links, layout


def _layout(graph: Graph, links: list[list[Any]], nodes: Mapping[int, dict[str, Any]]) -> Layout:
    """Where nodes and notes stand, and how the wires run. `nodes` are the page's, by id."""
    keys = {int(number): key for key, number in _ids(graph).items()}
    measured = json.loads(HEIGHTS_FILE.read_text(encoding="utf-8"))
    heights = {key: max(node.height, *measured["nodes"].get(node.type, [0])) for key, node in graph.nodes.items()}
    heights |= {key: measured["notes"].get(graph.name, {}).get(key, 0) for key in graph.notes}
    wires = [
        Wire(number, keys[origin], slot, keys[target], _row(nodes[target], inner))
        for number, origin, slot, target, inner, _ in links
    ]
    return arrange(graph.groups, heights, wires)


def _row(node: dict[str, Any], place: int) -> int:
    """At which row of slots the page draws an input; those of widgets stand below all others."""
    sockets = [number for number, entry in enumerate(node["inputs"]) if "widget" not in entry]
    return sockets.index(place) if place in sockets else max(len(sockets), len(node["outputs"]))


def _place(layout: Layout, key: str) -> dict[str, list[int]]:
    box = layout.boxes[key]
    return {"pos": [round(box.left), round(box.top)], "size": [round(box.width), round(box.height)]}


def page_format(graph: Graph, classes: Mapping[str, type[NodeClass]]) -> dict[str, Any]:
    """The graph as the page loads it, with its notes. `graph` is complete."""
    nodes, links, layout = _page_nodes(graph, classes)
    for key, note in graph.notes.items():
        nodes.append(
            {
                "id": len(nodes) + 1,
                "type": "MarkdownNote",
                "flags": {},
                "order": len(nodes),
                "mode": 0,
                "title": note.title,
                "inputs": [],
                "outputs": [],
                "properties": {},
                "widgets_values": [note.text],
                **NOTE_COLOURS,
                **_place(layout, key),
            }
        )
    return {
        "id": str(uuid.uuid5(_IDS, graph.name)),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": layout.groups,
        "config": {},
        "extra": {
            "ds": layout.view(),
            "reroutes": layout.reroutes,
            "linkExtensions": [{"id": link, "parentId": last} for link, last in layout.last_reroute.items()],
        },
        "version": 0.4,
    }


def blueprint_format(blueprint: Blueprint, classes: Mapping[str, type[NodeClass]]) -> dict[str, Any]:
    """A subgraph blueprint: one node, and the definition of what is inside."""
    graph = blueprint.graph
    nodes, plain_links, layout = _page_nodes(graph, classes)
    ids = {key: int(number) for key, number in _ids(graph).items()}
    by_id = {node["id"]: node for node in nodes}
    links = [
        dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True))
        | ({"parentId": layout.last_reroute[link[0]]} if link[0] in layout.last_reroute else {})
        for link in plain_links
    ]
    left = round(min(box.left for box in layout.boxes.values()))
    right = round(max(box.right for box in layout.boxes.values()))
    inputs: list[dict[str, Any]] = []
    outer_inputs: list[dict[str, Any]] = []
    values: list[Any] = []

    def connect(origin: int, origin_slot: int, target: int, target_slot: int, kind: str) -> int:
        links.append(
            {
                "id": len(links) + 1,
                "origin_id": origin,
                "origin_slot": origin_slot,
                "target_id": target,
                "target_slot": target_slot,
                "type": kind,
            }
        )
        return len(links)

    for slot, (name, key, inner) in enumerate(blueprint.inputs):
        node = by_id[ids[key]]
        inner_slot = next(i for i, entry in enumerate(node["inputs"]) if entry["name"] == inner)
        entry = node["inputs"][inner_slot]
        entry["link"] = connect(-10, slot, ids[key], inner_slot, entry["type"])
        shared = {"name": name, "type": entry["type"]}
        inputs.append(
            {
                "id": str(uuid.uuid5(_IDS, f"{graph.name}/in/{name}")),
                **shared,
                "linkIds": [entry["link"]],
                "pos": [left - 240, 20 * slot],
            }
        )
        outer: dict[str, Any] = {**shared, "link": None}
        if "widget" in entry:
            outer["widget"] = {"name": name}
            values.append(graph.nodes[key].inputs[inner])
        outer_inputs.append(outer)
    outputs = []
    for slot, (name, link) in enumerate(blueprint.outputs):
        source = by_id[ids[link.node]]["outputs"][link.slot]
        number = connect(ids[link.node], link.slot, -20, slot, source["type"])
        source["links"] = [*(source["links"] or []), number]
        outputs.append(
            {
                "id": str(uuid.uuid5(_IDS, f"{graph.name}/out/{name}")),
                "name": name,
                "type": source["type"],
                "linkIds": [number],
                "pos": [right + 140, 20 * slot],
            }
        )
    subgraph_id = str(uuid.uuid5(_IDS, graph.name))
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [
            {
                "id": 1,
                "type": subgraph_id,
                "pos": [0, 0],
                "size": [400, 80 + 26 * len(inputs)],
                "flags": {},
                "order": 0,
                "mode": 0,
                "inputs": outer_inputs,
                "outputs": [{"name": o["name"], "type": o["type"], "links": None} for o in outputs],
                "title": blueprint.name,
                "properties": {"proxyWidgets": [["-1", e["name"]] for e in outer_inputs if "widget" in e]},
                "widgets_values": values,
            }
        ],
        "links": [],
        "version": 0.4,
        "definitions": {
            "subgraphs": [
                {
                    "id": subgraph_id,
                    "version": 1,
                    "state": {
                        "lastGroupId": 0,
                        "lastNodeId": len(nodes),
                        "lastLinkId": len(links),
                        "lastRerouteId": len(layout.reroutes),
                    },
                    "revision": 0,
                    "config": {},
                    "name": blueprint.name,
                    "inputNode": {"id": -10, "bounding": [left - 260, 0, 120, 40 + 20 * len(inputs)]},
                    "outputNode": {"id": -20, "bounding": [right + 120, 0, 120, 40 + 20 * len(outputs)]},
                    "inputs": inputs,
                    "outputs": outputs,
                    "widgets": [],
                    "nodes": nodes,
                    "groups": layout.groups,
                    "links": links,
                    "reroutes": layout.reroutes,
                    "extra": {},
                    "category": blueprint.category,
                    "description": blueprint.description,
                }
            ]
        },
        "extra": {},
    }


def texts(classes: Mapping[str, type[NodeClass]]) -> dict[Path, str]:
    """All files and what they should hold."""
    out: dict[Path, str] = {}
    for make in GRAPHS:
        graph = complete(make(), classes)
        out[WORKFLOWS / f"{graph.name}.json"] = _dump(page_format(graph, classes))
        scripted = complete(API_GRAPHS[graph.name](), classes) if graph.name in API_GRAPHS else graph
        out[WORKFLOWS / "api" / f"{graph.name}.json"] = _dump(api_format(scripted))
    for make_blueprint in BLUEPRINTS:
        blueprint = make_blueprint()
        blueprint = replace(blueprint, graph=complete(blueprint.graph, classes))
        out[SUBGRAPHS / f"{blueprint.name}.json"] = _dump(blueprint_format(blueprint, classes))
    return out


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _ids(graph: Graph) -> dict[str, str]:
    return {key: str(number) for number, key in enumerate(graph.nodes, start=1)}


def _inputs(node_class: type[NodeClass]) -> dict[str, tuple[Any, ...]]:
    types = node_class.INPUT_TYPES()
    return {**types.get("required", {}), **types.get("optional", {})}


def _outputs(node_class: type[NodeClass]) -> tuple[Any, ...]:
    return tuple(getattr(kind, "value", kind) for kind in node_class.RETURN_TYPES)


def _options(spec: tuple[Any, ...]) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def _type_name(spec: tuple[Any, ...]) -> str:
    return "COMBO" if isinstance(spec[0], (list, tuple)) else str(getattr(spec[0], "value", spec[0]))


def _is_widget(spec: tuple[Any, ...]) -> bool:
    return _type_name(spec) in WIDGET_TYPES and not _options(spec).get("forceInput")


def _default(spec: tuple[Any, ...]) -> Any:
    options = _options(spec)
    if "default" in options:
        return options["default"]
    if _type_name(spec) == "COMBO":
        choices = spec[0] if isinstance(spec[0], (list, tuple)) else options.get("options", [])
        return choices[0] if choices else ""
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[_type_name(spec)]


def _extra_widget_values(spec: tuple[Any, ...]) -> list[Any]:
    """Values of widgets that the page adds behind one of ours."""
    options = _options(spec)
    if options.get("control_after_generate"):
        return ["fixed"]
    if options.get("image_upload"):
        return ["image"]
    return []


def _downloads(node: Node) -> dict[str, Any]:
    models = [DOWNLOADS[value] for value in node.inputs.values() if isinstance(value, str) and value in DOWNLOADS]
    return {"models": models} if models else {}


def main() -> None:
    """Build with the classes of a real host."""
    import sys
    import tempfile

    sys.path.insert(0, str(ROOT / "tools"))
    from comfy_host import Host, find_host

    path = find_host()
    if path is None:
        raise SystemExit("No ComfyUI found; set COMFYUI_PATH.")
    with tempfile.TemporaryDirectory() as base:
        host = Host(path, Path(base))
        written = texts({name: host.node_class(name) for name in host.node_ids})
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
