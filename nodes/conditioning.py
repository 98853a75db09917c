"""FaithDiff Conditioning and FaithDiff Trim Caption: what the model is told."""

from __future__ import annotations

from typing import Any

import node_helpers
from comfy_api.latest import io

from ..faithdiff_core.captions.trim import SENTENCES, SKIP_WORDS, trim_caption
from ..faithdiff_core.errors import SettingsError
from .bridge.graph_types import CONDITION_KEY, LQCondition, LQFeatures, LQFeaturesType
from .errors import named_errors
from .inputs import setting_input

Conditioning = list[list[Any]]


def with_lq(conditioning: Conditioning, condition: LQCondition) -> Conditioning:
    """A CONDITIONING whose entries carry LQ features; the given one stays as it is."""
    return node_helpers.conditioning_set_values(conditioning, {CONDITION_KEY: condition})


class FaithDiffConditioning(io.ComfyNode):
    """Adds LQ features to a conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffConditioning",
            display_name="FaithDiff Conditioning",
            category="FaithDiff",
            description="Adds the low-quality image to the prompts, for any of ComfyUI's samplers (KSampler, "
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
                    "How strongly the image acts. 1 as published, 0 off; lower gives the model more freedom.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Part of the sampling (0 to 1) from which the image acts.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Part of the sampling (0 to 1) until which the image acts.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive: Conditioning,
        negative: Conditioning,
        lq_features: LQFeatures,
        strength: float,
        start_percent: float,
        end_percent: float,
    ) -> io.NodeOutput:
        with named_errors("FaithDiff Conditioning"):
            if start_percent > end_percent:
                raise SettingsError(
                    f"start_percent must not be larger than end_percent, got {start_percent} and {end_percent}. "
                    f"Exchange the two, or set strength to 0 to switch the image off."
                )
        condition = LQCondition(lq_features, strength, start_percent, end_percent)
        return io.NodeOutput(with_lq(positive, condition), with_lq(negative, condition))


class FaithDiffTrimCaption(io.ComfyNode):
    """Trims a generated caption."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffTrimCaption",
            display_name="FaithDiff Trim Caption",
            category="FaithDiff",
            description='Trims a caption that a captioner wrote as the published code does: drops the lead-in ("The '
            "image "
            'features") and keeps the first sentences. Not for prompts that you type.',
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
    def execute(cls, caption: str, sentences: int, skip_words: int) -> io.NodeOutput:
        return io.NodeOutput(trim_caption(caption, sentences, skip_words))
