"""The node that ComfyUI is running, as far as it matters to LQ features.

Features and latent are known to be of the same image only by their sizes. A node that samples parts of an image (a
detailer, Ultimate SD Upscale) makes its latents itself, and a part may happen to have the size of the features. Such
a node is told by what it takes: images, and no latent.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from ...faithdiff_core.errors import SettingsError


def refuse_nodes_that_cut() -> None:
    """Refuse LQ features in a node that makes the latent itself from an image.

    Raises:
        SettingsError: the node that samples takes an IMAGE and no LATENT.
    """
    node = _running_node()
    if node is None:
        return
    types = _input_types(node)
    if "IMAGE" in types and "LATENT" not in types:
        raise SettingsError(
            f"FaithDiff: {_title(node)} makes latents of an image itself, and may cut or scale it: nothing tells which "
            f"part of the LQ features belongs to them. Give it conditionings without LQ features, or restore the "
            f"whole image with FaithDiff Sampler, which samples in tiles."
        )


def _registered() -> dict[str, type]:
    """ComfyUI's node classes by id; none where its `nodes` module is not loaded."""
    mappings: dict[str, type] = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    return mappings


def _running_node() -> type | None:
    """The outermost node class among the callers: one node may use another's class to sample."""
    classes = {id(node) for node in _registered().values()}
    found: type | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        names = frame.f_code.co_varnames
        if frame.f_code.co_argcount and names:
            first = frame.f_locals.get(names[0])
            for node in (first, type(first)):
                if isinstance(node, type) and any(id(base) in classes for base in node.__mro__):
                    found = node
        frame = frame.f_back
    return found


def _input_types(node: Any) -> set[str]:
    inputs = node.INPUT_TYPES()
    entries = [entry for part in ("required", "optional") for entry in inputs.get(part, {}).values()]
    return {str(entry[0]) for entry in entries if entry}


def _title(node: type) -> str:
    names = getattr(sys.modules.get("nodes"), "NODE_DISPLAY_NAME_MAPPINGS", {})
    for node_id, known in _registered().items():
        if issubclass(node, known):
            return str(names.get(node_id) or node_id)
    return node.__name__
