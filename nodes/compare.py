"""FaithDiff Compare."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..faithdiff_core.errors import ImageError
from ..faithdiff_core.images.geometry import resize_lanczos
from .bridge.checks import check_image
from .errors import named_errors
from .inputs import CATEGORY

MODES = ("slider", "side_by_side")


class FaithDiffCompare(io.ComfyNode):
    """Shows images before and after."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffCompare",
            display_name="FaithDiff Compare",
            category=CATEGORY,
            description="Compares the low-quality image with the restored one, with ComfyUI's own slider or side by "
            "side. Smaller `before` images are enlarged to the size of `after` (Lanczos).",
            search_aliases=["faithdiff compare", "before after", "image compare", "slider"],
            is_output_node=True,
            inputs=[
                io.Image.Input("before", tooltip="The low-quality images: one for each of `after`, or one for all."),
                io.Image.Input("after", tooltip="The restored images."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="slider: move the mouse over the image. side_by_side: both in one image. The output is "
                    "side by side in both.",
                ),
                io.ImageCompare.Input("compare_view", optional=True),
            ],
            outputs=[
                io.Image.Output(
                    display_name="side_by_side", tooltip="Before on the left, after on the right, for Save Image."
                )
            ],
        )

    @classmethod
    @named_errors
    def execute(cls, before: Tensor, after: Tensor, mode: str, compare_view: object = None) -> io.NodeOutput:
        before, after = _matched(before, after)
        pairs = torch.cat([before, after], dim=2)
        if mode == "slider":
            first, second = (ui.PreviewImage(images, cls=cls).values for images in (before, after))
            # The first two are for the slider. `images` is what the page knows of any node's images: its list of
            # results shows them.
            view = {"a_images": first, "b_images": second, "images": [*first, *second]}
            return io.NodeOutput(pairs, ui=view)
        return io.NodeOutput(pairs, ui=ui.PreviewImage(pairs, cls=cls))


def _matched(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (B, H, W, 3) of the size and number of `after`."""
    before, after = check_image(before, "before")[..., :3], check_image(after, "after")[..., :3]
    if before.shape[0] not in (1, after.shape[0]):
        raise ImageError(
            f"there are {before.shape[0]} images before and {after.shape[0]} after; give one for each, or one for all."
        )
    height, width = after.shape[1:3]
    if before.shape[1:3] != after.shape[1:3]:
        before = resize_lanczos(before.movedim(-1, 1), height, width).movedim(1, -1)
    return before.expand(after.shape[0], -1, -1, -1), after.to(before)
