"""ComfyUI's web page in headless Chromium."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .graph import GraphError, Prompt
from .installation import RUN_SECONDS
from .server import Server


@dataclass
class PageResult:
    """What came of queueing the graph that is open in the page.

    Attributes:
        node_errors: why nodes were refused, by node id; empty if they were not.
        execution_error: the message of a failed node, or None.
        outputs: what output nodes show, by node id.
    """

    node_errors: dict[str, Any]
    execution_error: dict[str, Any] | None
    outputs: dict[str, Any]


class NodeBox(NamedTuple):
    """A node on the canvas, its title included; in the canvas' pixels.

    Attributes:
        type: of the node.
        title: of the node.
        left, top, width, height: where it is.
        least: height that its content takes, its title included; 0 where the page does not tell.
    """

    type: str
    title: str
    left: float
    top: float
    width: float
    height: float
    least: float

    def gap(self, other: NodeBox) -> float:
        """Free distance to another node; negative if they overlap."""
        across = max(self.left, other.left) - min(self.left + self.width, other.left + other.width)
        down = max(self.top, other.top) - min(self.top + self.height, other.top + other.height)
        return max(across, down)


_BOXES = """
const {scale, offset} = window.app.canvas.ds, canvas = window.app.canvas.canvas.getBoundingClientRect();
return window.app.graph.nodes.map(node => {
    const [x, y, width, height] = node.boundingRect, name = [node.type, node.title];
    if (!LiteGraph.vueNodesMode)
        return [...name, x, y, width, height, node.computeSize()[1] + LiteGraph.NODE_TITLE_HEIGHT];
    const box = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
    if (!box) return [...name, 0, 0, 0, 0, 0];
    const at = [(box.x - canvas.x) / scale - offset[0], (box.y - canvas.y) / scale - offset[1]];
    return [...name, ...at, box.width / scale, box.height / scale, 0].map(v => v.toFixed ? Math.round(v) : v);
});
"""

_WIRES = """
const {app} = window, graph = app.graph, bounds = graph.nodes.map(n => n.boundingRect), edge = 4, far = 48;
app.canvas.ds.scale = 0.25;
app.canvas.ds.offset = [60 - Math.min(...bounds.map(b => b[0])), 400 - Math.min(...bounds.map(b => b[1]))];
app.canvas.draw(true, true);
const found = new Set(), title = id => graph.getNodeById(id).title;
const stroke = (lineWidth, lineCap) => {
    const context = Object.assign(document.createElement("canvas").getContext("2d"), {lineWidth, lineCap});
    return (path, points) => points.some(point => context.isPointInStroke(path, ...point));
};
// Where no point of a border's few is near a wire, none of its many is on it.
const near = stroke(far + 8, "round"), on = stroke(edge + 2, "butt");
const border = ([x, y, w, h], step) => {
    const at = size => Array.from({length: Math.ceil(size / step) + 1}, (_, i) => Math.min(i * step, size));
    const rows = at(w).flatMap(dx => [[x + dx, y], [x + dx, y + h]]);
    return rows.concat(at(h).flatMap(dy => [[x, y + dy], [x + w, y + dy]]));
};
const few = new Map(graph.nodes.map(n => [n, border(n.boundingRect, far)]));
const many = new Map(graph.nodes.map(n => [n, border(n.boundingRect, edge)]));
for (const link of graph.links.values()) {
    const parts = [link];
    for (let id = link.parentId; id != null; id = graph.reroutes.get(id).parentId) parts.push(graph.reroutes.get(id));
    for (const node of graph.nodes) {
        if (node.id === link.origin_id || node.id === link.target_id) continue;
        if (parts.some(({path}) => near(path, few.get(node)) && on(path, many.get(node))))
            found.add(`${title(link.origin_id)} -> ${title(link.target_id)} behind ${node.title}`);
    }
}
return [...found];
"""


class Page:
    """The server's web page in headless Chromium."""

    def __init__(self, server: Server, chromium: Path, driver: Path, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        self._server = server
        options = Options()
        options.binary_location = str(chromium)
        for flag in (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1600,1000",
            f"--user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self._driver = webdriver.Chrome(options=options, service=Service(str(driver)))
        self._driver.set_script_timeout(60)

    def open(self, timeout: float = 120.0) -> None:
        """Load the page and wait until its graph is there.

        Raises:
            TimeoutError: it was not there after `timeout` seconds.
        """
        self._driver.get(self._server.url)
        ready = "return !!(window.app && window.app.vueAppReady && window.app.graph)"
        self.until(lambda: self.script(ready), timeout, "the page's graph")

    def close(self) -> None:
        """End the browser."""
        self._driver.quit()

    def resize(self, width: int, height: int) -> None:
        """Give the page this size in pixels; it opens with 1600 x 1000, less the window's frame."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def script(self, code: str, *arguments: Any) -> Any:
        """Run JavaScript in the page and return what it returns."""
        return self._driver.execute_script(code, *arguments)

    def drop(self, workflow: Path, timeout: float = 30.0) -> None:
        """Drop a workflow file on the canvas, as with the mouse, and wait until its nodes are there.

        Raises:
            TimeoutError: the graph did not change to the file's nodes.
        """
        self.drop_file(workflow, "application/json")
        count = len(json.loads(workflow.read_text(encoding="utf-8"))["nodes"])
        self.until(lambda: len(self.node_types()) == count, timeout, f"{count} nodes of {workflow.name}")

    def drop_file(self, path: Path, kind: str) -> None:
        """Drop a file on the canvas, as with the mouse.

        Args:
            path: of the file.
            kind: its media type.
        """
        self.script(
            """
            const content = Uint8Array.from(atob(arguments[0]), one => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([content], arguments[1], {type: arguments[2]}));
            const canvas = document.querySelector("canvas#graph-canvas");
            const box = canvas.getBoundingClientRect();
            const where = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
            const event = {dataTransfer: transfer, bubbles: true, cancelable: true, ...where};
            for (const kind of ["dragenter", "dragover", "drop"]) canvas.dispatchEvent(new DragEvent(kind, event));
            """,
            base64.b64encode(path.read_bytes()).decode(),
            path.name,
            kind,
        )

    def load(self, workflow: Path) -> None:
        """Load a workflow or blueprint file without the mouse, and close those that were open, which cost time."""
        self._async_script(
            """
            (async (text, name) => {
                const {workflow} = window.app.extensionManager, before = [...workflow.openWorkflows];
                const again = before.some(old => old.filename === name);
                await window.app.loadGraphData(JSON.parse(text), true, true, again ? null : name);
                for (const old of before) await workflow.closeWorkflow(old);
            })(arguments[0], arguments[1])
            """,
            workflow.read_text(encoding="utf-8"),
            workflow.stem,
        )

    def prompt(self) -> Prompt:
        """What queueing the open graph would send to the server, subgraphs unfolded."""
        return dict(self._async_script("window.app.graphToPrompt().then(prompt => prompt.output)"))

    def use_nodes_2(self, on: bool) -> None:
        """Switch between the two designs of nodes: Nodes 2.0, or the classic canvas."""
        self._async_script("window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', arguments[0])", on)
        self.until(lambda: self.script("return !!LiteGraph.vueNodesMode") == on, 30, "the other design")

    def boxes(self, timeout: float = 20.0) -> list[NodeBox]:
        """Where the page has its nodes, once they have stopped growing."""
        end = time.monotonic() + timeout
        before: list[NodeBox] = []
        while time.monotonic() < end:
            now = [NodeBox(*values) for values in self.script(_BOXES)]
            if now and now == before and all(box.height > 0 for box in now):
                return now
            before = now
            time.sleep(0.4)
        raise TimeoutError(f"The nodes did not come to rest within {timeout:.0f} s: {before}")

    def wires_behind_nodes(self) -> list[str]:
        """Wires that run behind a node that they do not belong to, as `FROM -> TO behind NODE`, drawn by the page."""
        return list(self.script(_WIRES))

    def set_widget(self, class_type: str, name: str, value: Any) -> None:
        """Set a widget of all nodes of a type."""
        self.script(
            """
            for (const node of window.app.graph.nodes.filter(n => n.type === arguments[0]))
                node.widgets.find(w => w.name === arguments[1]).value = arguments[2];
            """,
            class_type,
            name,
            value,
        )

    def _async_script(self, promise: str, *arguments: Any) -> Any:
        """Wait for a promise of the page and return what it gives.

        Raises:
            RuntimeError: it was rejected.
        """
        answer = self._driver.execute_async_script(
            f"const done = arguments[arguments.length - 1];"
            f"Promise.resolve({promise}).then(value => done([true, value]), error => done([false, String(error)]));",
            *arguments,
        )
        if not answer[0]:
            raise RuntimeError(answer[1])
        return answer[1]

    def clear(self) -> None:
        """Empty the graph."""
        self.script("window.app.graph.clear()")

    def node_types(self) -> list[str]:
        """Types of all nodes in the graph."""
        return list(self.script("return window.app.graph.nodes.map(n => n.type)"))

    def missing_types(self) -> list[str]:
        """Types of nodes that the page does not know."""
        known = set(self.script("return Object.keys(LiteGraph.registered_node_types)"))
        return [kind for kind in self.node_types() if kind not in known]

    def error_overlays(self) -> list[str]:
        """Texts of error overlays and error dialogs that are to be seen."""
        return list(
            self.script(
                """
                const signs = "[data-testid=error-overlay], [data-testid*=missing-node], .comfy-error-report, "
                    + ".comfy-missing-nodes";
                const found = [...document.querySelectorAll(signs)];
                return found.filter(e => e.getClientRects().length).map(e => e.textContent.trim());
                """
            )
        )

    def console_errors(self) -> list[str]:
        """Severe messages of the browser's console since the last call."""
        return [entry["message"] for entry in self._driver.get_log("browser") if entry["level"] == "SEVERE"]

    def queue(self, timeout: float = RUN_SECONDS) -> PageResult:
        """Queue the open graph as the Run button does, and wait for its end.

        Raises:
            GraphError: the page could not make a prompt of the graph.
            TimeoutError: it did not end within `timeout` seconds.
        """
        before = set(self._server.get("/history"))
        failure = self._driver.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            window.app.queuePrompt(0).then(() => done(null), error => done(String(error)));
            """
        )
        if failure:
            raise GraphError(f"queuePrompt: {failure}")
        node_errors = self.script("return window.app.lastNodeErrors") or {}
        if node_errors:
            return PageResult(node_errors, None, {})
        self.until(lambda: set(self._server.get("/history")) - before, timeout, "the end of the prompt")
        (prompt_id,) = set(self._server.get("/history")) - before
        execution_error = self.script("return window.app.lastExecutionError") or None
        return PageResult({}, execution_error, self._server.history(prompt_id)["outputs"])

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the page."""
        path.write_bytes(base64.b64decode(self._driver.get_screenshot_as_base64()))

    def until(self, there: Callable[[], Any], timeout: float, what: str) -> None:
        """Wait until a condition holds.

        Raises:
            TimeoutError: it does not hold after `timeout` seconds; `what` says what was waited for.
        """
        end = time.monotonic() + timeout
        while not there():
            if time.monotonic() > end:
                raise TimeoutError(f"Waited {timeout:.0f} s for {what}. Console: {self.console_errors()[-5:]}")
            time.sleep(0.1)
