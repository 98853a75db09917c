"""Ask ComfyUI's page for the heights of all nodes and notes of the workflows, and write them to node_heights.json.

    COMFYUI_PATH=/path/to/ComfyUI python scripts/measure_nodes.py

Run it after a change of a node's inputs or of a note, then `build_workflows.py`. After a change of widths, run that
first, too, as notes are measured at the widths in the files. With `--screenshots FOLDER`, it writes a screenshot of
every workflow in both designs of nodes instead (56 in all, a minute or two), as it opens at 1600 x 1000 and at
1920 x 1080 pixels: `faithdiff_2x_classic_1600.png`, `faithdiff_2x_nodes2_1920.png` and so on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from workflow_layout import HEIGHTS_FILE, TITLE

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from comfy_host import NodeBox, Page, Server, find_browser, find_host, write_placeholders  # noqa: E402

SIZES = ((1600, 1000), (1920, 1080))
"""Of the page, in pixels."""

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def measure(page: Page, scratch: Path) -> dict[str, Any]:
    """Heights without titles: of node types in both designs, and of notes in the higher one."""
    nodes: dict[str, list[int]] = {}
    notes: dict[str, dict[str, int]] = {}
    for nodes_2 in (False, True):
        page.use_nodes_2(nodes_2)
        for path in WORKFLOWS:
            boxes = _smallest(page, path, scratch)
            for key, box in zip(_note_keys(path.stem), (b for b in boxes if b.type == "MarkdownNote"), strict=True):
                heights = notes.setdefault(path.stem, {})
                heights[key] = max(heights.get(key, 0), round(box.height) - TITLE)
            for box in boxes:
                if box.type != "MarkdownNote":
                    found = nodes.setdefault(box.type, [0, 0])
                    found[nodes_2] = max(found[nodes_2], round(max(box.height, box.least)) - TITLE)
    return {"nodes": dict(sorted(nodes.items())), "notes": notes}


def _note_keys(name: str) -> list[str]:
    from workflow_graphs import GRAPHS

    return next(list(graph.notes) for make in GRAPHS if (graph := make()).name == name)


def _smallest(page: Page, path: Path, scratch: Path) -> list[NodeBox]:
    """The boxes of a workflow whose nodes are told to be flat, so that the page makes them as high as they must be."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        node["size"][1] = 10
    flat = scratch / path.name
    flat.write_text(json.dumps(workflow), encoding="utf-8")
    page.load(flat)
    return page.boxes()


def screenshots(page: Page, folder: Path) -> None:
    """Write NAME_classic_1600.png, NAME_nodes2_1600.png and so on, of every workflow."""
    folder.mkdir(parents=True, exist_ok=True)
    for nodes_2, design in ((False, "classic"), (True, "nodes2")):
        page.use_nodes_2(nodes_2)
        for path in WORKFLOWS:
            page.load(path)
            for width, height in SIZES:
                page.resize(width, height)
                page.boxes()
                page.screenshot(folder / f"{path.stem}_{design}_{width}.png")


def main() -> int:
    """Measure, or take screenshots."""
    parser = argparse.ArgumentParser(description="Measure the workflows' nodes in ComfyUI's page.")
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER", help="write screenshots instead")
    folder = parser.parse_args().screenshots
    host, browser = find_host(), find_browser()
    if host is None or browser is None:
        raise SystemExit("ComfyUI (COMFYUI_PATH), Chromium, chromedriver and selenium are needed.")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        server = Server(host, scratch / "base")
        write_placeholders(server.base)
        page = Page(server, *browser, scratch / "profile")
        try:
            page.open()
            if folder is None:
                HEIGHTS_FILE.write_text(json.dumps(measure(page, scratch), indent=2) + "\n", encoding="utf-8")
            else:
                screenshots(page, folder)
        finally:
            page.close()
            server.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
