// Takes the line of progress ("Step 12 of 20, tile 3 of 4") out of the nodes at the end of a run; the page keeps it.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const TEXT_WIDGET = "$$node-text-preview";
const PROGRESS = /^(Step \d+ of \d+, tiles? |Tiles? )\d+/;

function clearProgress(graph) {
    for (const node of graph?.nodes ?? []) {
        const place = node.widgets?.findIndex((one) => one.name === TEXT_WIDGET && PROGRESS.test(one.value)) ?? -1;
        if (place >= 0) {
            node.widgets[place].onRemove?.();
            node.widgets.splice(place, 1);
            node.setDirtyCanvas?.(true, true);
        }
        clearProgress(node.subgraph);
    }
}

app.registerExtension({
    name: "FaithDiff.Progress",
    setup() {
        for (const end of ["execution_success", "execution_error", "execution_interrupted"])
            api.addEventListener(end, () => clearProgress(app.rootGraph ?? app.graph));
    },
});
