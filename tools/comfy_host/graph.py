"""Prompts in ComfyUI's API format, and what comes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Prompt = dict[str, dict[str, Any]]
"""A graph in ComfyUI's API format: node id to class_type and inputs."""


class GraphError(Exception):
    """A graph was refused or failed. `result` has the details."""

    def __init__(self, message: str, result: Result | None = None) -> None:
        super().__init__(message)
        self.result = result


class PromptRejectedError(Exception):
    """The server answered a prompt with an error status.

    Attributes:
        status: the HTTP status, 400 for bad values.
        body: the decoded answer with `error` and `node_errors`.
    """

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"HTTP {status}: {json.dumps(body)[:2000]}")
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Node:
    """A node of a `Graph`; `node[1]` is a link to its second output."""

    id: str

    def __getitem__(self, slot: int) -> list[Any]:
        return [self.id, slot]


@dataclass
class Graph:
    """Builds a prompt in API format: `graph.add("KSampler", model=model[0], seed=1)`."""

    prompt: Prompt = field(default_factory=dict)

    def add(self, class_type: str, **inputs: Any) -> Node:
        """Add a node and return it; inputs are values or links."""
        node = Node(str(len(self.prompt) + 1))
        self.prompt[node.id] = {"class_type": class_type, "inputs": inputs}
        return node


@dataclass
class Result:
    """What came of a graph.

    Attributes:
        status: `success`, `error`, `interrupted`, or `invalid` (refused before running).
        outputs: the values asked for with `want`.
        ui: what output nodes show, by node id.
        errors: for `error`, the host's one message with node_id, node_type, exception_message, ...; for `invalid`, the
            host's error and then its node errors, each with `node_id`.
        executed: ids of the nodes that ran, in order; those answered from the cache are not in it.
        cached: ids answered from the cache.
        progress: (value, total) of every progress message.
    """

    status: str
    outputs: dict[str, Any] = field(default_factory=dict)
    ui: dict[str, Any] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)

    @property
    def message(self) -> str:
        """All error messages in one text."""
        lines = []
        for error in self.errors:
            text = error.get("exception_message") or f"{error.get('message', '')}: {error.get('details', '')}"
            lines.append(f"[{error.get('node_type', '')} {error.get('node_id', '')}] {text}")
        return "\n".join(lines)


def _refusal(error: dict[str, Any] | None, node_errors: Mapping[str, Any]) -> list[dict[str, Any]]:
    out = [error] if error else []
    for node_id, entry in node_errors.items():
        out += [{**one, "node_id": node_id, "node_type": entry["class_type"]} for one in entry["errors"]]
    return out
