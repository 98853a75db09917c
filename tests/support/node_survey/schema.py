"""Which nodes there are, and what they take."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from comfy_host import Host

KINDS = ("MODEL", "GUIDER", "CONDITIONING", "LATENT")
"""What is surveyed: nodes that change one of these, and all that make a GUIDER; the first that fits."""


@dataclass(frozen=True)
class Slot:
    """An input of a node.

    Attributes:
        name: of the input.
        type: the host's name of the type; COMBO for a choice.
        required: the host refuses the graph without it.
        options: default, min, max, ... as the host lists them.
        choices: of a COMBO.
    """

    name: str
    type: str
    required: bool
    options: dict[str, Any]
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class NodeSchema:
    """A node as the survey sees it.

    Attributes:
        id: the node's id.
        kind: one of `KINDS`.
        slots: its inputs, required ones first.
        returns: types of its outputs.
        lists: its inputs come as lists.
    """

    id: str
    kind: str
    slots: tuple[Slot, ...]
    returns: tuple[str, ...]
    lists: bool

    def names(self, kind: str) -> list[str]:
        """Names of the inputs of a type."""
        return [slot.name for slot in self.slots if slot.type == kind]


def find_nodes(host: Host, without: Collection[str] = ()) -> list[NodeSchema]:
    """All nodes of the host of one of the `KINDS`, sorted by kind and id; not this pack's and not the test pack's.

    Args:
        host: with whatever packs it has loaded.
        without: ids to leave out.
    """
    ours = {host.pack.__name__, host.testpack.__name__}
    found = []
    for name in sorted(host.node_ids - set(without)):
        node = host.node_class(name)
        if any(node.__module__.startswith(package) for package in ours):
            continue
        schema = _read(name, node)
        if schema is not None:
            found.append(schema)
    return sorted(found, key=lambda schema: (KINDS.index(schema.kind), schema.id))


def _read(name: str, node: Any) -> NodeSchema | None:
    listed = node.INPUT_TYPES()
    slots = tuple(
        _slot(key, entry, part == "required")
        for part in ("required", "optional")
        for key, entry in listed.get(part, {}).items()
    )
    returns = tuple(str(value) for value in node.RETURN_TYPES)
    takes = {slot.type for slot in slots}
    needs = {slot.type for slot in slots if slot.required}
    # A node that can do without a MODEL is about what it cannot do without.
    kinds = [kind for kind in KINDS if kind in needs] + [kind for kind in KINDS if kind not in needs]
    for kind in kinds:
        if kind in returns and (kind in takes or kind == "GUIDER"):
            return NodeSchema(name, kind, slots, returns, bool(getattr(node, "INPUT_IS_LIST", False)))
    return None


def _slot(name: str, entry: Any, required: bool) -> Slot:
    kind, options = entry[0], dict(entry[1]) if len(entry) > 1 else {}
    if isinstance(kind, str):
        return Slot(name, kind, required, options, tuple(options.get("options") or ()) if kind == "COMBO" else ())
    return Slot(name, "COMBO", required, options, tuple(kind))
