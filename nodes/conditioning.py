"""FaithDiff Conditioning and FaithDiff Trim Caption: what the model is told."""

from __future__ import annotations

from comfy_api.latest import io

from ..faithdiff_core.captions.trim import SENTENCES, SKIP_WORDS, trim_caption
from .bridge.graph_types import LQFeatures, LQFeaturesType
from .bridge.lq_conditioning import Conditioning, add_lq
from .errors import named_errors
from .inputs import CATEGORY, setting_input


class FaithDiffConditioning(io.ComfyNode):
    """Adds LQ features to a conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffConditioning",
            display_name="FaithDiff Conditioning",
            category=CATEGORY,
            description="Adds the LQ features to the prompts, for any of ComfyUI's samplers (KSampler, "
            "SamplerCustomAdvanced, ...) together with the MODEL of FaithDiff Model Loader.",
            search_aliases=["faithdiff apply", "lq conditioning", "apply lq features"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The caption or prompt."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="FaithDiff was published with the encoded empty text here (an empty CLIP Text Encode, not "
                    "zeros).",
                ),
                LQFeaturesType.Input("lq_features", tooltip="From FaithDiff LQ Encode."),
                setting_input(
                    "strength",
                    "How strongly the image acts. 1 as published, 0 off; lower values give the model more freedom.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Fraction of the sampling (0 to 1) at which the image begins to act.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Fraction of the sampling (0 to 1) at which the image ceases to act.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    @named_errors
    def execute(
        cls,
        positive: Conditioning,
        negative: Conditioning,
        lq_features: LQFeatures,
        strength: float,
        start_percent: float,
        end_percent: float,
    ) -> io.NodeOutput:
        return io.NodeOutput(*add_lq((positive, negative), lq_features, strength, start_percent, end_percent))


class FaithDiffTrimCaption(io.ComfyNode):
    """Trims a generated caption."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffTrimCaption",
            display_name="FaithDiff Trim Caption",
            category=CATEGORY,
            description="Trims a captioner's answer as the published code does: drops the lead-in "
            '("The image features") and keeps the first sentences. Not for prompts that you type.',
            search_aliases=["faithdiff caption", "shorten caption", "llava caption"],
            inputs=[
                io.String.Input(
                    "caption", multiline=True, default="", tooltip="What the captioner wrote; may be empty."
                ),
                io.Int.Input("sentences", default=SENTENCES, min=0, max=100, tooltip="Sentences kept; 0 keeps all."),
                io.Int.Input("skip_words", default=SKIP_WORDS, min=0, max=100, tooltip="Words dropped from the front."),
            ],
            outputs=[io.String.Output(display_name="caption")],
        )

    @classmethod
    @named_errors
    def execute(cls, caption: str, sentences: int, skip_words: int) -> io.NodeOutput:
        return io.NodeOutput(trim_caption(caption, sentences, skip_words))
