"""FaithDiff Prepare Image and FaithDiff Finish Image: the ends of a graph."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..faithdiff_core.images.region import FEATHER
from .bridge.frames import finish, prepare
from .bridge.graph_types import LQFrame, LQFrameType
from .errors import named_errors
from .inputs import CATEGORY, mask_inputs, setting_input


class FaithDiffPrepareImage(io.ComfyNode):
    """Enlarges and pads images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffPrepareImage",
            display_name="FaithDiff Prepare Image",
            category=CATEGORY,
            description="Enlarges low-quality images to their final size (Lanczos) and pads them so that VAE and LQ "
            "encoder take them whole. FaithDiff Finish Image crops the padding and restores colours and alpha.",
            search_aliases=["faithdiff resize", "upscale image", "pad image"],
            inputs=[
                io.Image.Input("image", tooltip="The low-quality images. An alpha channel is kept in the frame."),
                setting_input(
                    "scale",
                    "Enlargement of both sides. Published: 2; for 4 and more, two passes of 2 are more faithful, "
                    "above all in faces. 1 restores without enlarging.",
                    "scale_by",
                ),
                io.Int.Input(
                    "longest_side",
                    default=0,
                    min=0,
                    max=32768,
                    tooltip="Pixels. Length of the longer side, instead of a factor; 0 is off.",
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
                io.Mask.Input(
                    "mask", optional=True, tooltip="Transparency (Load Image's MASK), for FaithDiff Finish Image."
                ),
                setting_input(
                    "hdr",
                    "The published demo's HDR effect: more contrast in dark and bright parts before restoring. "
                    "0 is off.",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="For VAE Encode and FaithDiff LQ Encode."),
                LQFrameType.Output(display_name="frame", tooltip="For FaithDiff Finish Image."),
            ],
        )

    @classmethod
    @named_errors
    def execute(
        cls,
        image: Tensor,
        scale_by: float,
        longest_side: int,
        multiple: int,
        mask: Tensor | None = None,
        hdr: float = 0.0,
    ) -> io.NodeOutput:
        return io.NodeOutput(*prepare(image, scale_by, longest_side, multiple, mask, hdr))


class FaithDiffFinishImage(io.ComfyNode):
    """Crops restored images and corrects their colours."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffFinishImage",
            display_name="FaithDiff Finish Image",
            category=CATEGORY,
            description="Crops a restored image to its exact size, gives it the colours of the low-quality one, and "
            "restores its transparency.",
            search_aliases=["faithdiff color fix", "color correction", "adain", "wavelet"],
            inputs=[
                io.Image.Input("image", tooltip="The decoded image."),
                LQFrameType.Input("frame", tooltip="From FaithDiff Prepare Image."),
                setting_input(
                    "color_fix",
                    "adain: mean and contrast of each channel (published). wavelet: transfers low-frequency colour, "
                    "local casts and stains included. none: as the model made them.",
                ),
                *mask_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="image"),
                io.Mask.Output(
                    display_name="mask", tooltip="Transparency, for Join Image with Alpha; zeros if there was none."
                ),
            ],
        )

    @classmethod
    @named_errors
    def execute(
        cls,
        image: Tensor,
        frame: LQFrame,
        color_fix: str,
        restore_mask: Tensor | None = None,
        feather: int = FEATHER,
    ) -> io.NodeOutput:
        return io.NodeOutput(*finish(image, frame, color_fix, restore_mask, feather))
