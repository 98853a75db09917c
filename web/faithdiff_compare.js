// FaithDiff Compare: hands the images of a run to ComfyUI's own image comparison widget (Nodes 2.0), and draws a slider
// of its own in the classic canvas, where that widget cannot be drawn.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const MARGIN = 10;
const LEAST_HEIGHT = 180;

const urls = (images) => (images ?? []).map((image) => api.apiURL(`/view?${new URLSearchParams(image)}`));

function loaded(url) {
    const image = new Image();
    image.onload = () => app.graph?.setDirtyCanvas(true, true);
    image.src = url;
    return image;
}

/** The largest rectangle of an image's shape inside the widget. */
function fitted(image, width, top, height) {
    const scale = Math.min((width - 2 * MARGIN) / image.naturalWidth, height / image.naturalHeight);
    const size = [image.naturalWidth * scale, image.naturalHeight * scale];
    return [(width - size[0]) / 2, top + (height - size[1]) / 2, ...size];
}

/** Before on the left of the line, after on its right. */
function drawSlider(context, slider, width, top, height) {
    const { before, after } = slider.pairs[slider.page % slider.pairs.length];
    if (!before.naturalWidth || !after.naturalWidth) return;
    const box = fitted(after, width, top, height);
    const [left, y, w, h] = (slider.box = box);
    const line = left + w * slider.split;
    context.save();
    context.drawImage(after, ...box);
    context.beginPath();
    context.rect(left, y, line - left, h);
    context.clip();
    context.drawImage(before, ...box);
    context.restore();
    context.save();
    context.fillStyle = "white";
    context.fillRect(line - 1, y, 2, h);
    if (slider.pairs.length > 1) {
        context.font = "12px sans-serif";
        context.shadowColor = "black";
        context.shadowBlur = 4;
        context.fillText(`${(slider.page % slider.pairs.length) + 1} / ${slider.pairs.length}`, left + 8, y + h - 8);
    }
    context.restore();
}

function drawHint(context, width, top, height) {
    context.save();
    context.fillStyle = "#999";
    context.font = "12px sans-serif";
    context.textAlign = "center";
    context.fillText("No images to compare", width / 2, top + height / 2);
    context.restore();
}

function addClassicSlider(node, widget) {
    const slider = { pairs: [], page: 0, split: 0.5, box: null };
    node.faithdiffSlider = slider;
    widget.computeLayoutSize = () => ({ minHeight: LEAST_HEIGHT, minWidth: 200 });
    widget.draw = function (context, owner, width, top) {
        const height = owner.size[1] - top - MARGIN;
        if (slider.pairs.length) drawSlider(context, slider, width, top, height);
        else drawHint(context, width, top, height);
    };
    const onMouseMove = node.onMouseMove;
    node.onMouseMove = function (event, position, ...rest) {
        if (slider.box) {
            slider.split = Math.min(1, Math.max(0, (position[0] - slider.box[0]) / slider.box[2]));
            this.setDirtyCanvas(true, false);
        }
        return onMouseMove?.call(this, event, position, ...rest);
    };
    // A click shows the next pair of a batch.
    widget.mouse = (event) => {
        if (event.type === "pointerdown" && slider.pairs.length > 1) slider.page += 1;
        return false;
    };
    return slider;
}

app.registerExtension({
    name: "FaithDiff.Compare",
    nodeCreated(node) {
        if (node.constructor.comfyClass !== "FaithDiffCompare") return;
        node.setSize([Math.max(node.size[0], 400), Math.max(node.size[1], 420)]);
        const widget = node.widgets?.find((one) => one.type === "imagecompare");
        if (!widget) return;
        const slider = addClassicSlider(node, widget);
        const onDrawBackground = node.onDrawBackground;
        node.onDrawBackground = function (...rest) {
            // The page draws a node's images below its widgets here; the slider shows them already.
            if (slider.pairs.length) this.imgs = undefined;
            else onDrawBackground?.apply(this, rest);
        };
        const onExecuted = node.onExecuted;
        node.onExecuted = function (output) {
            onExecuted?.call(this, output);
            this.hideOutputImages = Boolean(output.a_images); // in Nodes 2.0, not once more below the slider
            widget.value = { beforeImages: urls(output.a_images), afterImages: urls(output.b_images) };
            widget.callback?.(widget.value);
            const { beforeImages, afterImages } = widget.value;
            slider.pairs = afterImages.map((after, i) => ({ before: loaded(beforeImages[i]), after: loaded(after) }));
            slider.page = 0;
            this.setDirtyCanvas(true, true);
        };
    },
});
