"""How the workflows look in ComfyUI's page, in both designs of nodes: nothing overlaps, all can be read."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_host import REPO, Graph, NodeBox, Page, Server, write_placeholders

WORKFLOWS = sorted((REPO / "workflows").glob("*.json"))

READABLE = 0.6
"""The page draws no text below a zoom of 0.57."""

LEAST_GAP, MOST_EMPTY = 20, 60
"""Pixels between two nodes, and below a node's content."""

ROOM_FOR_IMAGES = {"SaveImage", "FaithDiffSaveImage", "FaithDiffCompare"}
"""Nodes that show an image after a run, and are higher than their inputs are."""


@pytest.fixture(scope="module")
def server(host_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that lists empty files under the names that the workflows use."""
    server = Server(host_path, tmp_path_factory.mktemp("layout"))
    write_placeholders(server.base)
    yield server
    server.stop()


def nodes_of(path: Path) -> list[dict[str, Any]]:
    """The nodes in a workflow's file."""
    return list(json.loads(path.read_text(encoding="utf-8"))["nodes"])


def check_layout(path: Path, boxes: list[NodeBox], scale: float) -> Iterator[str]:
    """Say what is wrong with an open workflow."""
    if scale < READABLE:
        yield f"zoom {scale}"
    for first, second in itertools.combinations(boxes, 2):
        if first.gap(second) < LEAST_GAP:
            yield f"{first.title} and {second.title} are {first.gap(second):.0f} px apart"
    for box, node in zip(boxes, nodes_of(path), strict=True):
        wider, higher = box.width - node["size"][0], box.height - 30 - node["size"][1]
        if max(wider, higher) > 2:
            yield f"the page makes {box.title} {wider:.0f} px wider and {higher:.0f} px higher than the file says"
        if box.least and box.type not in ROOM_FOR_IMAGES | {"MarkdownNote"} and box.height - box.least > MOST_EMPTY:
            yield f"{box.title} has {box.height - box.least:.0f} px of nothing"


def check_groups(path: Path) -> Iterator[str]:
    """Say which nodes stand in no group of the file, or only partly in one."""
    groups = json.loads(path.read_text(encoding="utf-8"))["groups"]
    for node in nodes_of(path):
        (left, top), (width, height) = node["pos"], node["size"]
        inside = [
            group
            for group in groups
            for x, y, w, h in [group["bounding"]]
            if x < left and y < top - 30 and left + width < x + w and top + height < y + h
        ]
        if len(inside) != 1:
            yield f"{node.get('title') or node['type']} stands in {len(inside)} groups"


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2.0"])
def test_workflows_open_readable_and_without_overlap(browser: Page, nodes_2: bool) -> None:
    browser.resize(*WINDOW)
    browser.use_nodes_2(nodes_2)
    faults = {}
    for path in WORKFLOWS:
        browser.load(path)
        boxes = browser.boxes()
        scale = browser.script("return window.app.canvas.ds.scale")
        covered = [] if path.stem in WIDE else browser.script(COVERED, *MINIMAP)
        found = [
            *check_layout(path, boxes, scale),
            *check_groups(path),
            *(f"{title} is not to be seen" for title in covered),
        ]
        found += browser.wires_behind_nodes()
        if found:
            faults[path.stem] = found
    assert faults == {}


def test_the_blueprints_inside_has_no_overlap(browser: Page) -> None:
    browser.use_nodes_2(False)
    browser.load(REPO / "subgraphs" / "FaithDiff Restore.json")
    browser.script("window.app.canvas.setGraph(window.app.graph.nodes[0].subgraph)")
    boxes = [NodeBox(*values) for values in browser.script(INSIDE)]
    assert len(boxes) == 10
    assert min(first.gap(second) for first, second in itertools.combinations(boxes, 2)) >= LEAST_GAP
    browser.clear()


INSIDE = """
return window.app.canvas.graph.nodes.map(node => [node.type, node.title, ...node.boundingRect, 0]);
"""


WINDOW = (1600, 1000)

WIDE = {"faithdiff_4x_progressive", "faithdiff_8k"}
"""Workflows whose second pass is right of the window, as the whole could not be read."""

MINIMAP = (1340, 740)
"""Left and top of what covers the corner at the bottom right of that window."""

COVERED = """
const {scale, offset} = window.app.canvas.ds, canvas = window.app.canvas.canvas.getBoundingClientRect();
return window.app.graph.nodes.filter(node => {
    const [x, y, width, height] = node.boundingRect;
    const right = (x + width + offset[0]) * scale + canvas.x, bottom = (y + height + offset[1]) * scale + canvas.y;
    const outside = right > window.innerWidth || bottom > window.innerHeight;
    return outside || (right > arguments[0] && bottom > arguments[1]);
}).map(node => node.title);
"""

COMPARE = "window.app.graph.nodes.find(n => n.type === 'FaithDiffCompare')"

TEXTS = """
return window.app.graph.nodes.flatMap(n => n.widgets ?? []).filter(w => w.name === "$$node-text-preview")
    .map(w => w.value);
"""


def open_template(browser: Page, name: str) -> None:
    """Choose a workflow of this pack in the template browser, with clicks."""
    browser.clear()
    browser.script("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    for step in (CATEGORY, f"document.querySelector('[data-testid=\"template-workflow-{name}\"]')"):
        wait_for(lambda step=step: browser.script(f"const it = {step}; it?.click(); return Boolean(it);"))
    wait_for(lambda: "FaithDiffSampler" in browser.node_types())


CATEGORY = "[...document.querySelectorAll('span')].findLast(one => one.textContent.trim() === 'faithdiff')"
"""The pack in the list of templates, under its folder's name."""


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2.0"])
def test_the_demo_runs_at_once_and_shows_before_and_after(browser: Page, nodes_2: bool) -> None:
    """With a slider that follows the mouse, and no progress text left behind."""
    browser.resize(*WINDOW)
    browser.use_nodes_2(nodes_2)
    open_template(browser, "faithdiff_demo")
    drawn = nodes_of(REPO / "workflows" / "faithdiff_demo.json")[0]["size"][0]
    wait_for(lambda: abs(browser.boxes()[0].width - drawn) < 2)
    assert browser.script(COVERED, *MINIMAP) == []
    before = [box[:6] for box in browser.boxes()]
    browser.set_widget("FaithDiffSampler", "tile_batch", 1)
    browser.set_widget("FaithDiffSampler", "steps", 3 + nodes_2)  # no result of the other design's run
    browser.script(
        "window.faithdiffTexts = []; window.app.api.addEventListener('progress_text', e => "
        "window.faithdiffTexts.push(e.detail.text))"
    )
    result = browser.queue()
    assert result.node_errors == {}
    assert result.execution_error is None
    loaded = f"return {COMPARE}.faithdiffSlider.pairs.map(p => [p.before.naturalWidth, p.after.naturalWidth])"
    wait_for(lambda: browser.script(SHOWN if nodes_2 else loaded) == [[600, 600]])
    assert any("tile" in text for text in browser.script("return window.faithdiffTexts")), "no progress was shown"
    wait_for(lambda: browser.script(TEXTS) == [])
    assert [box[:6] for box in browser.boxes()] == before, "a node has grown"
    if nodes_2:
        for place in (0.25, 0.75):
            browser.script(MOVED, place)
            wait_for(lambda place=place: abs(browser.script(CLIPPED) - 100 * (1 - place)) < 2)
        assert browser.script(f"return document.querySelectorAll({VIEW}).length") == 2, "the images are shown once more"
        return
    colours = {split: browser.script(DRAWN, split) for split in (0.0, 1.0)}
    # Noise is before: neighbouring pixels differ more there.
    assert colours[1.0] > 2 * colours[0.0]
    assert browser.script(f"return !({COMPARE}.imgs?.length)"), "the images are shown once more below the slider"


VIEW = f"`[data-node-id='${{{COMPARE}.id}}'] img`"
"""Selector of what FaithDiff Compare shows in Nodes 2.0: ComfyUI's own comparison of two images."""

SHOWN = f"""
const width = kind => [...document.querySelectorAll({VIEW})].find(one => one.alt.startsWith(kind))?.naturalWidth;
return [[width("Before"), width("After")]];
"""

MOVED = f"""
const box = document.querySelector({VIEW}).parentElement, {{x, y, width, height}} = box.getBoundingClientRect();
const at = {{clientX: x + arguments[0] * width, clientY: y + height / 2, bubbles: true}};
for (const kind of ["pointermove", "mousemove"]) box.dispatchEvent(new MouseEvent(kind, at));
"""

CLIPPED = f"""
const before = [...document.querySelectorAll({VIEW})].find(one => one.alt.startsWith("Before"));
return parseFloat(before.style.clipPath.split(" ")[1]);
"""
"""How much of the low-quality image is cut off at its right, in percent."""

DRAWN = f"""
const node = {COMPARE}, canvas = document.createElement("canvas");
[canvas.width, canvas.height] = node.size;
node.faithdiffSlider.split = 0.5;
const context = canvas.getContext("2d"), widget = node.widgets.find(w => w.type === "imagecompare");
widget.draw(context, node, node.size[0], 80, 20);
const [left, top, width, height] = node.faithdiffSlider.box;
node.onMouseMove({{}}, [left + arguments[0] * width, top]);
widget.draw(context, node, node.size[0], 80, 20);
const [x, y, w, h] = [left, top, width, height].map(Math.round);
const data = context.getImageData(x + 4, y + 4, w - 8, h - 8).data;
let difference = 0;
for (let i = 4; i < data.length; i += 4) difference += Math.abs(data[i] - data[i - 4]);
return difference / (data.length / 4);
"""


def test_the_error_panel_names_errors_without_a_path(server: Server) -> None:
    """ComfyUI writes MODULE.NAME, and a pack's modules are named by the path of its folder."""
    graph = Graph()
    loader = graph.add("FaithDiffModelLoader", faithdiff_name="FaithDiff.bin", weight_dtype="default")
    graph.add("PreviewAny", source=loader[1])
    (error,) = [data for kind, data in server.run(graph, check=False).messages if kind == "execution_error"]
    assert error["exception_type"] == "WeightsError"
    assert error["exception_message"].startswith("FaithDiff Model Loader: FaithDiff.bin is empty (0 bytes)")


def wait_for(there: Any, seconds: float = 20.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
