"""Write workflows/*.json and workflows/api/*.json from `workflow_graphs.py`.

    COMFYUI_PATH=/path/to/ComfyUI python scripts/build_workflows.py

The nodes are asked for their inputs and outputs, so the files cannot disagree with them; a test builds them again and
compares.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from workflow_graphs import DOWNLOADS, GRAPHS, Graph, Link, Node

WORKFLOWS = Path(__file__).parent.parent / "workflows"
NOTE_WIDTH, NOTE_HEIGHT = 400, 260
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
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
        nodes[key] = Node(node.type, inputs, node.at, node.title, node.size)
    return Graph(graph.name, graph.description, nodes)


def page_format(graph: Graph, classes: Mapping[str, type[NodeClass]]) -> dict[str, Any]:
    """The graph as the page loads it, with a note. `graph` is complete."""
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
                "pos": list(node.at),
                "size": list(node.size or (360, 60 + 26 * len(inputs))),
                "flags": {},
                "order": order,
                "mode": 0,
                **({"title": node.title} if node.title else {}),
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
    note_id = max(ids.values()) + 1
    top = min(node.at[1] for node in graph.nodes.values())
    left = min(node.at[0] for node in graph.nodes.values())
    nodes.append(
        {
            "id": note_id,
            "type": "MarkdownNote",
            "pos": [left, top - NOTE_HEIGHT - 60],
            "size": [2 * NOTE_WIDTH, NOTE_HEIGHT],
            "flags": {},
            "order": len(nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [graph.description],
        }
    )
    return {
        "id": str(uuid.uuid5(_IDS, graph.name)),
        "revision": 0,
        "last_node_id": note_id,
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def texts(classes: Mapping[str, type[NodeClass]]) -> dict[Path, str]:
    """All files and what they should hold."""
    out: dict[Path, str] = {}
    for make in GRAPHS:
        graph = complete(make(), classes)
        out[WORKFLOWS / f"{graph.name}.json"] = _dump(page_format(graph, classes))
        out[WORKFLOWS / "api" / f"{graph.name}.json"] = _dump(api_format(graph))
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

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "host"))
    from harness import host_node_classes

    for path, text in texts(host_node_classes()).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
