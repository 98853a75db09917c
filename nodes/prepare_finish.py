"""FaithDiff Prepare Image and FaithDiff Finish Image: the ends of a graph."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..faithdiff_core.errors import ImageError
from ..faithdiff_core.images.color import fix_colors
from ..faithdiff_core.images.geometry import pad_to_multiple, resize_lanczos, target_size
from .bridge.graph_types import LQFrame, LQFrameType
from .errors import named_errors
from .inputs import setting_input


class FaithDiffPrepareImage(io.ComfyNode):
    """Enlarges and pads images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffPrepareImage",
            display_name="FaithDiff Prepare Image",
            category="FaithDiff",
            description="Enlarges low-quality images to their final size (Lanczos) and pads them so that VAE and LQ "
            "encoder take them whole. FaithDiff Finish Image undoes the padding and brings back colours and alpha.",
            search_aliases=["faithdiff resize", "upscale image", "pad image"],
            inputs=[
                io.Image.Input("image", tooltip="The low-quality images. An alpha channel is kept in the frame."),
                setting_input(
                    "scale",
                    "Factor on both sides. Published: 2; for 4 and more, two passes of 2 are more faithful, faces "
                    "above all. 1 restores without enlarging.",
                    "scale_by",
                ),
                io.Int.Input(
                    "longest_side",
                    default=0,
                    min=0,
                    max=32768,
                    tooltip="Pixels of the longer side instead of a factor; 0 is off.",
                ),
                io.Int.Input(
                    "multiple",
                    default=8,
                    min=8,
                    max=128,
                    step=8,
                    tooltip="The padded sides are multiples of this many pixels. 8 is what SDXL needs; 64 suits some "
                    "ControlNets.",
                    advanced=True,
                ),
                io.Mask.Input("mask", optional=True, tooltip="Transparency (Load Image's MASK), carried to the end."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="For VAE Encode and FaithDiff LQ Encode."),
                LQFrameType.Output(display_name="frame", tooltip="For FaithDiff Finish Image."),
            ],
        )

    @classmethod
    def execute(
        cls, image: Tensor, scale_by: float, longest_side: int, multiple: int, mask: Tensor | None = None
    ) -> io.NodeOutput:
        with named_errors("FaithDiff Prepare Image"):
            if multiple % 8:
                nearest = max(8, round(multiple / 8) * 8)
                raise ImageError(f"multiple must be a multiple of 8, got {multiple}. The nearest is {nearest}.")
            height, width = target_size(
                image.shape[1], image.shape[2], scale=scale_by, longest_side=longest_side or None
            )
            images = resize_lanczos(_channels_first(image), height, width)
            if mask is None and images.shape[1] > 3:
                mask = 1.0 - images[:, 3]
            elif mask is not None:
                if mask.shape[0] not in (1, image.shape[0]):
                    raise ImageError(
                        f"there are {mask.shape[0]} masks for {image.shape[0]} images; give one for each, or one for "
                        "all."
                    )
                mask = resize_lanczos(mask.unsqueeze(1), height, width)[:, 0]
            colors = images[:, :3]
            frame = LQFrame(_channels_last(colors), mask)
            return io.NodeOutput(_channels_last(pad_to_multiple(colors, multiple)), frame)


class FaithDiffFinishImage(io.ComfyNode):
    """Crops restored images and corrects their colours."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffFinishImage",
            display_name="FaithDiff Finish Image",
            category="FaithDiff",
            description="Crops a restored image to its exact size, gives it the colours of the low-quality one, and "
            "brings its transparency back.",
            search_aliases=["faithdiff color fix", "color correction", "adain", "wavelet"],
            inputs=[
                io.Image.Input("image", tooltip="The decoded image."),
                LQFrameType.Input("frame", tooltip="From FaithDiff Prepare Image."),
                setting_input(
                    "color_fix",
                    "adain: mean and contrast of each channel (published). wavelet: colours place by place; follows "
                    "stains of the original, too. none: as the model made them.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image"),
                io.Mask.Output(
                    display_name="mask", tooltip="Transparency, for Join Image with Alpha; zeros without one."
                ),
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, frame: LQFrame, color_fix: str) -> io.NodeOutput:
        with named_errors("FaithDiff Finish Image"):
            height, width = frame.size
            if image.shape[1] < height or image.shape[2] < width:
                raise ImageError(
                    f"the image is {image.shape[2]} x {image.shape[1]}, smaller than the {width} x {height} of the "
                    "frame. Connect the frame of the same FaithDiff Prepare Image that this image came through."
                )
            if frame.image.shape[0] not in (1, image.shape[0]):
                raise ImageError(
                    f"there are {image.shape[0]} images, but the frame is of {frame.image.shape[0]}. Connect the "
                    "frame that belongs to this batch."
                )
            cropped = _channels_first(image[:, :height, :width, :3])
            fixed = fix_colors(cropped, _channels_first(frame.image), color_fix).clamp(0.0, 1.0)
            mask = frame.mask if frame.mask is not None else torch.zeros(1, height, width)
            return io.NodeOutput(_channels_last(fixed), mask.expand(image.shape[0], -1, -1).clone())


def _channels_first(image: Tensor) -> Tensor:
    return image.movedim(-1, 1)


def _channels_last(image: Tensor) -> Tensor:
    return image.movedim(1, -1).contiguous()
