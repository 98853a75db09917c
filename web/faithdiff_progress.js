// Takes the line of progress ("Step 12 of 20, tile 3 of 4") out of the nodes at the end of a run, and gives them their
// height back; the page keeps both.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const TEXT_WIDGET = "$$node-text-preview";
const PROGRESS = /^(Step \d+ of \d+, tiles? |Tiles? )\d+/;

const heights = new WeakMap();

function rememberHeights(graph) {
    for (const node of graph?.nodes ?? []) {
        heights.set(node, node.size[1]);
        rememberHeights(node.subgraph);
    }
}

function clearProgress(graph) {
    for (const node of graph?.nodes ?? []) {
        const place = node.widgets?.findIndex((one) => one.name === TEXT_WIDGET && PROGRESS.test(one.value)) ?? -1;
        if (place >= 0) {
            node.widgets[place].onRemove?.();
            node.widgets.splice(place, 1);
            if (node.size[1] > heights.get(node)) node.setSize([node.size[0], heights.get(node)]);
            node.setDirtyCanvas?.(true, true);
        }
        clearProgress(node.subgraph);
    }
}

app.registerExtension({
    name: "FaithDiff.Progress",
    setup() {
        api.addEventListener("execution_start", () => rememberHeights(app.rootGraph ?? app.graph));
        for (const end of ["execution_success", "execution_error", "execution_interrupted"])
            api.addEventListener(end, () => clearProgress(app.rootGraph ?? app.graph));
    },
});
