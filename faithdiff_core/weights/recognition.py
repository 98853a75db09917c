"""What a weights file is, if it is none of FaithDiff's: told by the names and shapes of its tensors and its metadata.

FaithDiff's own files are read by `faithdiff_file`. Here are the others that people have beside them: checkpoints,
U-Nets and LoRAs, as other programs and ComfyUI's saving nodes write them, and what is picked by mistake.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..backbone import BACKBONES, SDXL, Backbone, V
from ..errors import WeightsError
from ..models.shapes import Shape
from .tensor_reader import TensorReader
from .unet_names import CHECKPOINT_PREFIX, diffusers_names
from .unet_shapes import family_of

MARKED_EDM = ("edm_mean", "edm_vpred.sigma_max")
MARKED_V = "v_pred"
"""Entries of single files by which they say that they predict something else than noise."""

EDM = "EDM"
"""What such a file predicts, beside diffusers' words for noise and v."""

PART_KEY = "faithdiff.part"
MERGE_KEY = "faithdiff.merge"
"""Metadata of the files that `extract-lora` and `merge` write."""

LORA, CHECKPOINT, UNET = "lora", "checkpoint", "unet"
"""Kinds of files that FaithDiff works with."""

_LOADER = "FaithDiffModelLoader"
"""The node that puts FaithDiff onto a MODEL."""

_REPLACED = "`model`, unet_strength 1."
"""How the sentence about a graph ends that replaced a MODEL's U-Net with FaithDiff's."""

_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", ".down.weight")
"""How the names of a LoRA's first matrices end, (rank, layer's input) each."""

_ADDED = (".diff", ".diff_b")
"""How the names of what a LoRA adds as it is end."""

_CROSS = ("attn2.to_k", "attn2.to_v", "attn2_to_k", "attn2_to_v", "attn2.processor.to_k", "attn2.processor.to_v")
"""What the names of the layers hold that take text embeddings."""

_SDXL_ONLY = ("label_emb", "add_embedding", "transformer_blocks.1.", "transformer_blocks_1_")
"""What the names of layers hold that SDXL has and the other backbones have not."""

_FAITHDIFF = ("denoise_encoder.", "information_transformer_layes.")
"""How the names of FaithDiff's own parts begin."""


@dataclass(frozen=True)
class Recognized:
    """What a file is.

    Attributes:
        kind: `checkpoint`, `unet`, `lora`, `controlnet`, `vae`, `text encoder`, or `empty`.
        words: for people, such as `an SDXL checkpoint`.
        backbone: the family that it is made for; None where nothing shows it.
        prediction: what its U-Net predicts, in diffusers' words or `EDM`; None where nothing says it.
        history: how FaithDiff took part in it, a sentence; empty where nothing says that it did.
        use: what to do with it beside FaithDiff, a sentence or two.
    """

    kind: str
    words: str
    backbone: Backbone | None = None
    prediction: str | None = None
    history: str = ""
    use: str = ""


def recognize(shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> Recognized | None:
    """Tell what a file is.

    Args:
        shapes: of its tensors, by name.
        metadata: its text entries.

    Returns:
        None for FaithDiff's own files, for U-Nets in diffusers' format, and for what is not known.
    """
    metadata = metadata or {}
    if not shapes:
        return Recognized("empty", "an empty file without tensors")
    if any(key.startswith(_FAITHDIFF) for key in shapes):
        return None
    if any(_is_of_lora(key) for key in shapes):
        return _lora(shapes, metadata)
    if any(key.startswith((CHECKPOINT_PREFIX, "first_stage_model.", "conditioner.")) for key in shapes):
        return _checkpoint(shapes, metadata)
    if any(key.startswith("input_blocks.") for key in shapes):
        backbone = _family(shapes)
        return Recognized(
            UNET,
            f"{_a(backbone, 'U-Net')} in ComfyUI's own format",
            backbone,
            stated_prediction(shapes),
            use=_use_of_model("Load Diffusion Model", backbone, False),
        )
    if any(k.startswith(("controlnet_cond_embedding.", "control_model.", "controlnet_down_blocks.")) for k in shapes):
        return Recognized("controlnet", "a ControlNet", use="ComfyUI loads it with Load ControlNet Model.")
    if any(key.startswith("decoder.") for key in shapes) and any(key.startswith("encoder.") for key in shapes):
        return Recognized(
            "vae", "a VAE", use="ComfyUI loads it with Load VAE; on the command line, `restore --vae` takes it."
        )
    if any(key.startswith(("text_model.", "text_projection", "transformer.text_model.")) for key in shapes):
        return Recognized("text encoder", "a text encoder", use="ComfyUI loads it with Load CLIP.")
    return None


def stated_prediction(keys: Iterable[str]) -> str | None:
    """What a single file's entries say that its U-Net predicts, `v_prediction` or `EDM`; None if they say nothing."""
    own = set(keys)
    if MARKED_V in own:
        return V
    return EDM if own.intersection(MARKED_EDM) else None


def _a(backbone: Backbone | None, noun: str) -> str:
    """A noun with its backbone and article."""
    if backbone is None:
        return f"a {noun}"
    return f"an {backbone.name} {noun}"  # each begins with S


def _family(shapes: Mapping[str, Shape]) -> Backbone | None:
    """The backbone that a file's U-Net belongs to, by its layers; without enough of them, by its text embeddings."""
    found = family_of({name: shapes[key] for name, key in diffusers_names(set(shapes)).items()})
    if found is None and any(key.startswith("conditioner.embedders.1.") for key in shapes):
        return SDXL
    return found or _of_layers(shapes, ".weight")


def _of_layers(shapes: Mapping[str, Shape], *endings: str) -> Backbone | None:
    width = _context_width(shapes, *endings)
    found = next((backbone for backbone in BACKBONES if backbone.context_width == width), None)
    return found or (SDXL if any(part in key for key in shapes for part in _SDXL_ONLY) else None)


def _context_width(shapes: Mapping[str, Shape], *endings: str) -> int | None:
    """Width of the text embeddings that layers take; None where there is no such layer."""
    for key, shape in shapes.items():
        if key.endswith(endings) and any(part in key for part in _CROSS):
            return shape[1] if len(shape) > 1 else 0
    return None


def _checkpoint(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> Recognized:
    backbone = _family(shapes)
    whole = any(key.startswith(("first_stage_model.", "conditioner.", "cond_stage_model.")) for key in shapes)
    if backbone is None:
        return Recognized(CHECKPOINT, "a Stable Diffusion checkpoint")
    history = _history(metadata)
    words = _a(backbone, "checkpoint") if whole else f"{_a(backbone, 'U-Net')} as ComfyUI saves it"
    kind, node = (CHECKPOINT, "Load Checkpoint") if whole else (UNET, "Load Diffusion Model")
    use = _use_of_model(node, backbone, bool(history))
    prediction = stated_prediction(shapes)
    if prediction == V and kind == UNET:
        # ComfyUI reads the mark in checkpoints alone.
        use += (
            " Load Diffusion Model takes it for a model that predicts noise: if it predicts v, put"
            " ModelSamplingDiscrete with `v_prediction` behind it (and `zsnr`, if its checkpoint had zero SNR)."
        )
    elif prediction == V and history.endswith(_REPLACED):
        # ComfyUI writes what the MODEL predicted before its U-Net was replaced.
        use += (
            " If it predicts v no longer, but noise as FaithDiff does, put ModelSamplingDiscrete with `eps` behind it."
        )
    return Recognized(kind, words, backbone, prediction or backbone.prediction, history, use)


def _use_of_model(node: str, backbone: Backbone | None, with_faithdiff: bool) -> str:
    if backbone is None:
        return ""
    first = f"In ComfyUI, load it with {node} and connect it to `model` of FaithDiff Model Loader"
    if with_faithdiff:
        more = "" if node != "Load Checkpoint" else "; on the command line, give it as `restore --model`"
        return f"{first}, with the `_adapter` file there{more}."
    merging = " `merge` adds what FaithDiff learned to it." if node == "Load Checkpoint" else ""
    return f"{first}, with a FaithDiff file for {backbone.name} there.{merging}"


def _history(metadata: Mapping[str, str]) -> str:
    """How FaithDiff took part in a model, by what `merge` and ComfyUI's saving nodes write."""
    merged = _json_object(metadata.get(MERGE_KEY))
    if merged:
        names = [str(merged.get(name)) for name in ("faithdiff", "base", "checkpoint")]
        return (
            f"`merge` added the difference of {names[0]} and {names[1]}, times {merged.get('strength')}, to {names[2]}."
        )
    for node in _json_object(metadata.get("prompt")).values():
        inputs = node.get("inputs") if isinstance(node, dict) and node.get("class_type") == _LOADER else None
        if isinstance(inputs, dict):
            had = [str(inputs.get("faithdiff_name"))]
            had += [f"`{name}`" for name in ("model", "base_model") if name in inputs]
            strength = inputs.get("unet_strength", 1.0)
            had.append(
                f"unet_strength {strength:g}" if isinstance(strength, int | float) else "unet_strength connected"
            )
            return f"The graph that saved it had FaithDiff Model Loader with {', '.join(had)}."
    return ""


def _json_object(text: str | None) -> dict[str, object]:
    """An object out of metadata, which are a stranger's; an empty one for anything else."""
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_of_lora(key: str) -> bool:
    return "lora_" in key or ".lora." in key or "hada_" in key or key.endswith((".alpha", *_ADDED))


def _lora(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> Recognized:
    backbone = _of_layers(shapes, *_DOWN, ".diff")
    made_for = f" for {backbone.name}" if backbone is not None else ""
    onto = f"{backbone.name} MODEL" if backbone is not None else "MODEL of its kind"
    if metadata.get(PART_KEY) == LORA:
        made = _json_object(metadata.get("faithdiff.lora"))
        return Recognized(
            LORA,
            f"a LoRA of FaithDiff{made_for}",
            backbone,
            history=f"It was extracted from {metadata.get('faithdiff.source')} minus {made.get('base')}.",
            use=f"In ComfyUI, put it onto an {onto} with Load LoRA, connect that to `model` of FaithDiff Model Loader, "
            f"and choose the `_adapter` file there; on the command line, give it as `restore --lora`, with the adapter "
            f"at `--faithdiff`.",
        )
    own = any(key.startswith(("diffusion_model.", "text_encoders.")) for key in shapes)
    words = f"a LoRA{made_for}" + (" as ComfyUI's Extract and Save Lora writes it" if own else "")
    use = f"In ComfyUI, put it onto a MODEL{made_for} with Load LoRA, before or after FaithDiff Model Loader"
    if own:
        use += (
            ". If it was extracted from a FaithDiff MODEL, load it onto the MODEL that was subtracted, and choose the "
            "`_adapter` file in FaithDiff Model Loader"
        )
    else:
        use += "; on the command line, give it as `restore --lora`"
    return Recognized(LORA, words, backbone, use=f"{use}.")


def lora_summary(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """How many layers a LoRA changes by matrices, their ranks, and how many weights and biases it adds to."""
    ranks = [shape[0] for key, shape in shapes.items() if key.endswith(_DOWN) and shape]
    differences = sum(key.endswith(_ADDED) for key in shapes)
    return {
        "layers": len(ranks),
        "smallest_rank": min(ranks, default=0),
        "largest_rank": max(ranks, default=0),
        "differences": differences,
    }


def check_lora(path: Path, context_width: int, backbone: Backbone) -> None:
    """Check that a file is a LoRA for a model; one that has no layers for the text passes.

    Args:
        path: the LoRA.
        context_width: of the model's text embeddings.
        backbone: the model's family.

    Raises:
        WeightsError: it is something else, or for another backbone; the text says what.
    """
    try:
        reader = TensorReader(path)
    except WeightsError:
        return  # the loader, which reads more kinds of files, says what is wrong with it
    found = recognize(reader.shapes, reader.metadata)
    if found is not None and found.kind != LORA:
        raise WeightsError(f"{path.name} is {found.words}, not a LoRA. {found.use}".rstrip())
    width = _context_width(reader.shapes, *_DOWN)
    if width is not None and width != context_width:
        other = next((other.name for other in BACKBONES if other.context_width == width), None)
        kind = other or f"models with text embeddings of {width} channels"
        raise WeightsError(
            f"{path.name} is a LoRA for {kind}, but the model is one of {backbone.name}, with {context_width} "
            f"channels. Give a LoRA made for {backbone.name}."
        )
