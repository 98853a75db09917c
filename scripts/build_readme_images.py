"""Take the README's images in ComfyUI's page, from a run of the demo workflow.

    COMFYUI_PATH=/path/to/ComfyUI python scripts/build_readme_images.py

- `assets/graph.jpg`: the workflow after its run;
- `assets/before_after.jpg`: the sample image enlarged, and restored, pixel by pixel;
- `assets/demo.webp`: the slider of FaithDiff Compare, moving.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
sys.path.insert(0, str(ROOT / "tools"))

from comfy_host import HostError, Page, PageResult, Server, find_browser, find_host  # noqa: E402

SCALE = 0.8
"""Zoom of the graph's image."""

FRAMES, FRAME_MILLISECONDS = 20, 80
"""From one end of the slider to the other."""

GAP = 8
"""Between before and after, in pixels."""

_SHOW = """
const {ds} = window.app.canvas, [scale, all] = arguments, graph = window.app.graph;
const boxes = all ? graph.groups.map(group => group.boundingRect ?? group._bounding)
    : graph.nodes.filter(node => node.type === "FaithDiffCompare").map(node => node.boundingRect);
const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
const right = Math.max(...boxes.map(b => b[0] + b[2])), bottom = Math.max(...boxes.map(b => b[1] + b[3]));
ds.scale = scale;
ds.offset = [100 / scale - left, 120 / scale - top];
window.app.canvas.setDirty(true, true);
window.app.canvas.draw(true, true);
const canvas = window.app.canvas.canvas.getBoundingClientRect();
return [100 + canvas.x, 120 + canvas.y, (right - left) * scale, (bottom - top) * scale];
"""

_MOVE = """
const node = window.app.graph.nodes.find(node => node.type === "FaithDiffCompare");
const [left, top, width, height] = node.faithdiffSlider.box;
node.onMouseMove({}, [left + arguments[0] * width, top + height / 2]);
window.app.canvas.draw(true, true);
"""

_LOADED = """
const node = window.app.graph.nodes.find(node => node.type === "FaithDiffCompare");
const pair = node.faithdiffSlider.pairs[0];
return Boolean(pair?.before.naturalWidth && pair.after.naturalWidth && node.faithdiffSlider.box);
"""


def taken(page: Page, scratch: Path, scale: float, whole: bool) -> Image.Image:
    """The page at this zoom, cropped to the groups or to FaithDiff Compare."""
    left, top, width, height = page.script(_SHOW, scale, whole)
    page.screenshot(scratch / "page.png")
    with Image.open(scratch / "page.png") as opened:
        margin = 12 if whole else 0
        box = (left - margin, top - margin, left + width + margin, top + height + margin)
        return opened.convert("RGB").crop(tuple(round(side) for side in box))


def before_and_after(server: Server, result: PageResult) -> Image.Image:
    """What FaithDiff Compare was given, side by side."""
    (shown,) = [output for output in result.outputs.values() if "a_images" in output]
    before, after = (
        Image.open(io.BytesIO(server.view(shown[name][0]))).convert("RGB") for name in ("a_images", "b_images")
    )
    out = Image.new("RGB", (2 * after.width + GAP, after.height), "white")
    out.paste(before.resize(after.size, Image.Resampling.LANCZOS), (0, 0))
    out.paste(after, (after.width + GAP, 0))
    return out


def slider(page: Page, scratch: Path) -> list[Image.Image]:
    """FaithDiff Compare while the mouse goes over it, there and back."""
    frames = []
    for step in range(FRAMES + 1):
        page.script(_MOVE, 0.04 + 0.92 * step / FRAMES)
        frames.append(taken(page, scratch, 1.3, False))
    return frames + frames[-2:0:-1]


def main() -> int:
    """Run the demo and take the images."""
    host, browser = find_host(), find_browser()
    if host is None or browser is None:
        raise SystemExit("ComfyUI (COMFYUI_PATH), Chromium, chromedriver and selenium are needed.")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        # The page shows the folder's name on every node.
        server = Server(host, scratch / "base", packs={"FaithDiff": ROOT})
        page = Page(server, *browser, scratch / "profile")
        try:
            page.open()
            take(page, server, scratch)
        finally:
            page.close()
            server.stop()
    return 0


def take(page: Page, server: Server, scratch: Path) -> None:
    """Write the images.

    Raises:
        HostError: the demo failed.
    """
    page.resize(2000, 1500)
    page.use_nodes_2(False)
    page.load(ROOT / "workflows" / "faithdiff_demo.json")
    result = page.queue()
    if result.node_errors or result.execution_error:
        raise HostError(f"The demo failed: {result.node_errors or result.execution_error}")
    page.until(lambda: page.script(_LOADED), 30, "the images of FaithDiff Compare")
    page.script("document.querySelector('.p-toast')?.remove()")
    taken(page, scratch, SCALE, True).save(ASSETS / "graph.jpg", quality=88, optimize=True)
    before_and_after(server, result).save(ASSETS / "before_after.jpg", quality=90, optimize=True)
    first, *others = slider(page, scratch)
    first.save(
        ASSETS / "demo.webp", save_all=True, append_images=others, duration=FRAME_MILLISECONDS, loop=0, quality=70
    )


if __name__ == "__main__":
    raise SystemExit(main())
