"""FaithDiff Attribution Record and FaithDiff Attribution Map: where the words of a prompt act."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..faithdiff_core.attribution.overlay import OPACITY
from ..faithdiff_core.attribution.recorder import DEFAULT_MEMORY
from .bridge.attribution import PROMPTS, AttributionRecord, AttributionType, word_maps
from .bridge.tiled_prediction import recorded
from .errors import named_errors
from .inputs import CATEGORY

MIB = 2**20


class FaithDiffAttributionRecord(io.ComfyNode):
    """Records the cross-attention of a sampling run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffAttributionRecord",
            display_name="FaithDiff Attribution Record",
            category=CATEGORY,
            description="Records, while a sampler runs, which parts of the image the U-Net's cross-attention connects "
            "with each word of the prompt. FaithDiff Attribution Map shows it. Works with every sampler, in tiles too.",
            search_aliases=["faithdiff attribution", "daam", "attention map", "cross attention", "heat map"],
            inputs=[
                io.Model.Input("model", tooltip="From FaithDiff Model Loader, or any SDXL, SD 2.1 or SD 1.5 MODEL."),
                io.Combo.Input(
                    "prompt",
                    options=list(PROMPTS),
                    default=PROMPTS[0],
                    tooltip="Whose words are recorded: the sampler's positive prompt or its negative one.",
                ),
                io.Int.Input(
                    "max_memory",
                    default=DEFAULT_MEMORY // MIB,
                    min=1,
                    max=65536,
                    advanced=True,
                    tooltip="MiB. Memory that the recording may take on the graphics card. With less, the maps of "
                    "large images are coarser; the restored image stays the same.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For one sampler."),
                AttributionType.Output(display_name="record", tooltip="For FaithDiff Attribution Map."),
            ],
        )

    @classmethod
    @named_errors
    def execute(cls, model: Any, prompt: str, max_memory: int = DEFAULT_MEMORY // MIB) -> io.NodeOutput:
        record = AttributionRecord(prompt, max_memory * MIB)
        return io.NodeOutput(recorded(model, record), record)


class FaithDiffAttributionMap(io.ComfyNode):
    """Shows where the words of a prompt acted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffAttributionMap",
            display_name="FaithDiff Attribution Map",
            category=CATEGORY,
            description="Shows for each word where in the image its tokens got the U-Net's attention (DAAM, as in the "
            "paper's supplement), as coloured overlays and as masks.",
            search_aliases=["faithdiff attribution", "daam", "attention map", "heat map", "word map"],
            inputs=[
                AttributionType.Input("record", tooltip="From FaithDiff Attribution Record."),
                io.Latent.Input(
                    "latent",
                    tooltip="The output of the sampler with the recorded MODEL, unchanged: the map waits for it.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP that encoded the prompt."),
                io.String.Input(
                    "prompt", multiline=True, default="", tooltip="The text as it was encoded, word for word."
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words or phrases of the prompt, with commas between them: hair, red window.",
                ),
                io.Image.Input("image", tooltip="The restored image, before or after FaithDiff Finish Image."),
                io.Float.Input(
                    "opacity",
                    default=OPACITY,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Opacity of the colours at the hottest place; cold places stay as they are.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="overlay",
                    tooltip="One for each word and image: all images with the first word, then the second, ...",
                ),
                io.Mask.Output(
                    display_name="mask", tooltip="The maps, each scaled to its own minimum (0) and maximum (1)."
                ),
            ],
        )

    @classmethod
    @named_errors
    def execute(
        cls,
        record: AttributionRecord,
        latent: dict[str, Any],
        clip: Any,
        prompt: str,
        words: str,
        image: Tensor,
        opacity: float,
    ) -> io.NodeOutput:
        return io.NodeOutput(*word_maps(record, latent["samples"], clip, prompt, words, image, opacity))
