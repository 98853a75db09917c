// FaithDiff Compare: hands the images of a run to ComfyUI's own image comparison widget.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const urls = (images) => (images ?? []).map((image) => api.apiURL(`/view?${new URLSearchParams(image)}`));

app.registerExtension({
    name: "FaithDiff.Compare",
    nodeCreated(node) {
        if (node.constructor.comfyClass !== "FaithDiffCompare") return;
        node.setSize([Math.max(node.size[0], 400), Math.max(node.size[1], 420)]);
        const onExecuted = node.onExecuted;
        node.onExecuted = function (output) {
            onExecuted?.call(this, output);
            const widget = this.widgets?.find((one) => one.type === "imagecompare");
            if (!widget) return;
            this.hideOutputImages = Boolean(output.a_images); // in Nodes 2.0, not once more below the slider
            widget.value = { beforeImages: urls(output.a_images), afterImages: urls(output.b_images) };
            widget.callback?.(widget.value);
        };
    },
});
