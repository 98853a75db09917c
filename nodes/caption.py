"""FaithDiff Caption."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..faithdiff_core.captions.captioner import MAX_NEW_TOKENS
from ..faithdiff_core.captions.trim import CAPTION_PROMPT, SENTENCES, SKIP_WORDS, trim_caption
from ..faithdiff_core.errors import SettingsError
from .bridge.captioner_patcher import CAPTION_DTYPES, caption_images, captioner_for
from .errors import named_errors
from .inputs import CATEGORY

PUBLISHED_MODEL = "llava-hf/llava-1.5-7b-hf"


class FaithDiffCaption(io.ComfyNode):
    """Describes images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FaithDiffCaption",
            display_name="FaithDiff Caption",
            category=CATEGORY,
            description="Writes the prompt: describes each image with an image-to-text model that transformers loads "
            "(LLaVA-1.5 as published, Qwen-VL, BLIP, GIT, ...). Gives one caption for each image, as a list.",
            search_aliases=["faithdiff caption", "llava", "image to text", "describe image", "vlm", "auto caption"],
            inputs=[
                io.Image.Input("image", tooltip="The images to describe; the low-quality ones will do."),
                io.String.Input(
                    "model",
                    default=PUBLISHED_MODEL,
                    tooltip="Name of a folder in models/LLM, an absolute path, or a hub id. The folder has "
                    "config.json, *.safetensors and the files of its tokenizer and image processor. LLaVA-1.5 7B takes "
                    "14 GB.",
                ),
                io.String.Input(
                    "prompt",
                    default=CAPTION_PROMPT,
                    multiline=True,
                    tooltip="The question. FaithDiff was trained with captions that answer the default one. BLIP and "
                    "GIT continue this text instead of answering it: leave it empty for them.",
                ),
                io.Int.Input(
                    "max_new_tokens",
                    default=MAX_NEW_TOKENS,
                    min=1,
                    max=4096,
                    tooltip="Longest answer before trimming, in tokens (a word is one or two). 64 is faster, and "
                    "enough for two sentences.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(CAPTION_DTYPES),
                    default="default",
                    tooltip="Precision of the model. `default`: the one it was saved in, or fp32 where the device "
                    "does not support half precision.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="0: always the likeliest word, the same caption every time. Above 0: words are drawn at "
                    "random, the more freely the higher.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Sampling seed; ignored at temperature 0.",
                ),
                io.Boolean.Input(
                    "trim",
                    default=True,
                    tooltip='As published: drop the lead-in ("The image features") and keep the first sentences. Off '
                    "for BLIP and GIT, which have no lead-in.",
                ),
                io.Int.Input(
                    "sentences",
                    default=SENTENCES,
                    min=0,
                    max=100,
                    advanced=True,
                    tooltip="With trim: sentences kept; 0 keeps all.",
                ),
                io.Int.Input(
                    "skip_words",
                    default=SKIP_WORDS,
                    min=0,
                    max=100,
                    advanced=True,
                    tooltip="With trim: words dropped from the front.",
                ),
                io.Boolean.Input(
                    "allow_download",
                    default=False,
                    tooltip="Let transformers download a hub id that is not on this machine (to its own cache folder). "
                    "Off: nothing is ever looked for online.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="caption",
                    is_output_list=True,
                    tooltip="For CLIP Text Encode. A list with one caption for each image; the nodes after it "
                    "run once for each.",
                )
            ],
        )

    @classmethod
    @named_errors
    def execute(
        cls,
        image: Tensor,
        model: str,
        prompt: str,
        max_new_tokens: int,
        dtype: str,
        temperature: float,
        seed: int,
        trim: bool,
        sentences: int = SENTENCES,
        skip_words: int = SKIP_WORDS,
        allow_download: bool = False,
    ) -> io.NodeOutput:
        if not model.strip():
            raise SettingsError(
                f"`model` is empty. Name a folder in models/LLM, or a hub id such as {PUBLISHED_MODEL}."
            )
        patcher = captioner_for(model, dtype, allow_download)
        captions = caption_images(patcher, image, prompt, max_new_tokens, temperature, seed)
        if trim:
            captions = [trim_caption(caption, sentences, skip_words) for caption in captions]
        return io.NodeOutput(captions)
