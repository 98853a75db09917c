"""FaithDiff Demo Models."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge.graph_types import FaithDiffType
from .errors import named_errors
from .inputs import CATEGORY


class FaithDiffDemoModels(io.ComfyNode):
    """Loads the demo model that comes with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffDemoModels",
            display_name="FaithDiff Demo Models",
            category=f"{CATEGORY}/development",
            description="Loads the small demo model that comes with this pack, and a degraded image for it, for trying "
            "graphs out without a download. It restores little: use FaithDiff Model Loader and an SDXL checkpoint "
            "for real images.",
            search_aliases=["faithdiff demo", "faithdiff test model", "small model"],
            is_dev_only=True,
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MODEL with the alignment."),
                io.Clip.Output(display_name="clip", tooltip="For CLIP Text Encode."),
                io.Vae.Output(display_name="vae", tooltip="For VAE Encode and FaithDiff Tiled VAE Decode."),
                FaithDiffType.Output(display_name="faithdiff", tooltip="For FaithDiff LQ Encode."),
                io.Image.Output(
                    display_name="sample_image",
                    tooltip="A photograph of a cup of coffee, degraded as in the training: half the size, noisy.",
                ),
            ],
        )

    @classmethod
    @named_errors
    def execute(cls) -> io.NodeOutput:
        # Here, not above: few start ComfyUI for the demo, and it takes as long to import as all other nodes together.
        from .bridge.demo_model import load_demo, load_sample

        return io.NodeOutput(*load_demo(), load_sample())
