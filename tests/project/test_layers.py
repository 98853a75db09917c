"""Which folder may import what."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST = {"comfy", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview", "node_helpers", "nodes", "server"}
"""ComfyUI's modules, but for `comfy_api`, its description of nodes."""


def runtime(path: Path) -> set[str]:
    """Imports of a file outside `if TYPE_CHECKING`."""
    source = ast.parse(path.read_text(encoding="utf-8"))
    source.body = [
        node
        for node in source.body
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    ]
    names: set[str] = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            names.update(name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_only_the_bridge_touches_comfyui() -> None:
    schemas = sorted((ROOT / "nodes").glob("*.py"))
    assert len(schemas) > 9
    assert {path.name: found for path in schemas if (found := runtime(path) & HOST)} == {}
    assert any("comfy" in runtime(path) for path in (ROOT / "nodes" / "bridge").glob("*.py"))


def test_the_core_knows_no_host() -> None:
    files = sorted((ROOT / "faithdiff_core").rglob("*.py"))
    assert len(files) > 30
    assert {path.name: found for path in files if (found := runtime(path) & (HOST | {"comfy_api"}))} == {}
