"""Which backbone a LoRA is for, told by the width of the text embeddings that its layers take."""

from __future__ import annotations

from pathlib import Path

from ..backbone import BACKBONES, Backbone
from ..errors import WeightsError
from .tensor_reader import TensorReader

_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", ".down.weight")
"""How the names of a LoRA's first matrices end, (rank, layer's input) each."""

_CROSS = ("attn2.to_k", "attn2.to_v", "attn2_to_k", "attn2_to_v", "attn2.processor.to_k", "attn2.processor.to_v")
"""What the names of the layers hold that take text embeddings."""


def check_lora(path: Path, context_width: int, backbone: Backbone) -> None:
    """Check that a LoRA is for a model; one that has no layers for the text passes.

    Args:
        path: the LoRA.
        context_width: of the model's text embeddings.
        backbone: the model's family.

    Raises:
        WeightsError: it is for another backbone; the text names both.
    """
    try:
        kinds = TensorReader(path).kinds
    except WeightsError:
        return  # the loader, which reads more kinds of files, says what is wrong with it
    for key, (_, shape) in kinds.items():
        if key.endswith(_DOWN) and any(part in key for part in _CROSS) and shape[1:2] != (context_width,):
            width = shape[1] if len(shape) > 1 else 0
            found = next((other.name for other in BACKBONES if other.context_width == width), None)
            kind = found or f"models with text embeddings of {width} channels"
            raise WeightsError(
                f"{path.name} is a LoRA for {kind}, but the model is one of {backbone.name}, with {context_width} "
                f"channels. Give a LoRA made for {backbone.name}."
            )
