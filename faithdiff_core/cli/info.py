"""The command `info`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from ..dtypes import READABLE_DTYPES, dtype_name
from ..errors import printable
from ..finite import is_finite
from ..weights.checkpoint_file import open_tensors
from ..weights.faithdiff_file import FaithDiffWeights, Part, faithdiff_of
from ..weights.marks import IN_WORDS
from ..weights.quantization import format_name
from ..weights.quantized_state import shapes_of, take_quantized
from ..weights.recognition import EDM, LORA, Recognized, lora_summary, recognize

_KINDS = {
    "full": "a full FaithDiff file (U-Net, LQ encoder and alignment)",
    "adapter": "a FaithDiff adapter (LQ encoder and alignment, without U-Net)",
    "lora": "a FaithDiff adapter with a LoRA (for the U-Net of any SDXL checkpoint)",
    "unet": "a U-Net in diffusers' format",
    "partial": "a part of a FaithDiff file",
}

_PREDICTS = {key: f"predicts {word}" for key, word in IN_WORDS.items()} | {EDM: "is an EDM model"}

_PARTS = (
    ("unet", ("model.diffusion_model.", "diffusion_model.", "input_blocks.", "middle_block.", "output_blocks.")),
    ("vae", ("first_stage_model.",)),
    ("text_encoders", ("conditioner.", "cond_stage_model.", "text_encoders.")),
)
"""How the names in checkpoints begin, by part."""

_LONGEST = 200
"""Characters of an entry of the metadata that are shown: ComfyUI stores whole workflows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `info`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a weights file")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(args: argparse.Namespace) -> int:
    """Describe a weights file, and read it to the end for values that are NaN or infinite; 1 if there are such.

    Raises:
        WeightsError: it is not a readable weights file, or of no known kind.
    """
    facts = describe_file(args.file)
    code = int(any(part["not_finite"] for part in facts["parts"].values()))
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return code
    lines = [f"{args.file.name} is {facts['what']}."]
    if facts["backbone"]:
        said = _PREDICTS.get(facts.get("prediction") or "", "what its U-Net predicts is not said")
        lines.append(f"  backbone: {facts['backbone']}" + (f"; {said}" if "prediction" in facts else ""))
    lines += [f"  {facts[key]}" for key in ("history", "use") if facts.get(key)]
    for name, part in facts["parts"].items():
        sizes = ", ".join(f"{key} {value}" for key, value in part["sizes"].items())
        dtypes = ", ".join(part["dtypes"])
        lines.append(f"  {name}: {part['tensors']} tensors, {part['parameters'] / 1e6:,.1f} M parameters, {dtypes}")
        if sizes:
            lines.append(f"    {sizes}")
        if part["quantized"]:
            formats = ", ".join(f"{count} layers in {name}" for name, count in part["quantized"].items())
            lines.append(f"    quantized: {formats}")
        if part["not_finite"]:
            some = ", ".join(part["not_finite"][:3])
            lines.append(
                f"    NOT USABLE: {len(part['not_finite'])} of {part['tensors']} tensors hold NaN or infinite values, "
                f"such as {some}"
            )
    for key, value in facts["metadata"].items():
        rest = f"... ({len(value):,} characters)" if len(value) > _LONGEST else ""
        lines.append(f"  {key}: {value[:_LONGEST]}{rest}")
    # Metadata are a stranger's texts: nothing in them may steer the terminal.
    sys.stdout.write("".join(printable(line, keep="") + "\n" for line in lines))
    return code


def describe_file(path: Path) -> dict[str, Any]:
    """What a weights file is and holds, in plain types.

    Raises:
        WeightsError: it is not a readable weights file, or of no known kind.
    """
    tensors, metadata = open_tensors(path)
    quantized = bool(take_quantized(path, tensors, metadata)[1])  # FaithDiff's U-Net with the names of checkpoints
    found = None if quantized else recognize(shapes_of(tensors), metadata)
    return (
        describe(faithdiff_of(path, tensors, metadata))
        if found is None
        else _describe_other(path, found, tensors, metadata)
    )


def describe(weights: FaithDiffWeights) -> dict[str, Any]:
    """What a FaithDiff file holds, in plain types."""
    return {
        "file": str(weights.path),
        "kind": weights.kind,
        "what": _KINDS[weights.kind],
        "backbone": weights.backbone.name,
        "prediction": weights.marked or weights.backbone.prediction,
        "parts": {name: _part(part, vars(part.config), part.not_finite()) for name, part in weights.parts.items()},
        "metadata": weights.metadata,
    }


def _describe_other(
    path: Path, found: Recognized, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> dict[str, Any]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name = next((name for name, prefixes in _PARTS if key.startswith(prefixes)), "other")
        groups.setdefault(LORA if found.kind == LORA else name, {})[key] = value
    facts: dict[str, Any] = {
        "file": str(path),
        "kind": found.kind,
        "what": found.words,
        "backbone": found.backbone and found.backbone.name,
        "history": found.history,
        "use": found.use,
        "parts": {},
        "metadata": metadata,
    }
    if found.kind != LORA:
        facts["prediction"] = found.prediction
    for name, state in groups.items():
        sizes = lora_summary(shapes_of(state)) if name == LORA else {}
        broken = [key for key, value in state.items() if value.dtype in READABLE_DTYPES and not is_finite(value)]
        facts["parts"][name] = _part(Part(state, sizes), sizes, broken)
    return facts


def _part(part: Part[Any], sizes: dict[str, Any], not_finite: list[str]) -> dict[str, Any]:
    return {
        "tensors": len(part.state),
        "parameters": sum(math.prod(shape) for shape in shapes_of(part.state).values()),
        "dtypes": _dtypes(part),
        "quantized": _quantized(part),
        "sizes": sizes,
        "not_finite": not_finite,
    }


def _dtypes(part: Part[Any]) -> list[str]:
    """Dtypes of the stored weights, the most common one first."""
    layers = [] if part.quantized is None else list(part.quantized.layers.values())
    plain = part.state if part.quantized is None else part.quantized.plain
    counts = Counter(dtype_name(tensor.dtype) for tensor in plain.values())
    counts.update(dtype_name(layer.form.dtype) for layer in layers)
    return [name for name, _ in counts.most_common()]


def _quantized(part: Part[Any]) -> dict[str, int]:
    """How many layers are quantized in each format: its name and what it is called in files, and their number."""
    layers = {} if part.quantized is None else part.quantized.layers
    return dict(Counter(f"{format_name(layer.form)} ({layer.form.about})" for layer in layers.values()))
