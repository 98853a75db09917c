"""The command `info`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ..dtypes import dtype_name
from ..errors import printable
from ..weights.faithdiff_file import FaithDiffWeights, Part, read_faithdiff
from ..weights.marks import IN_WORDS
from ..weights.quantization import format_name
from ..weights.quantized_state import shapes_of

_KINDS = {
    "full": "a full FaithDiff file (U-Net, LQ encoder and alignment)",
    "adapter": "a FaithDiff adapter (LQ encoder and alignment, without U-Net)",
    "lora": "a FaithDiff adapter with a LoRA (for the U-Net of any SDXL checkpoint)",
    "unet": "a U-Net in diffusers' format",
    "partial": "a part of a FaithDiff file",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `info`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a weights file")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(args: argparse.Namespace) -> int:
    """Describe a weights file, and read it to the end for values that are NaN or infinite; 1 if there are such.

    Raises:
        WeightsError: it is no FaithDiff file; the text says what it is.
    """
    facts = describe(read_faithdiff(args.file))
    code = int(any(part["not_finite"] for part in facts["parts"].values()))
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return code
    predicts = {None: "what its U-Net predicts is not said"} | {
        key: f"predicts {word}" for key, word in IN_WORDS.items()
    }
    lines = [
        f"{args.file.name} is {_KINDS[facts['kind']]}.",
        f"  backbone: {facts['backbone']}; {predicts[facts['prediction']]}",
    ]
    for name, part in facts["parts"].items():
        sizes = ", ".join(f"{key} {value}" for key, value in part["sizes"].items())
        dtypes = ", ".join(part["dtypes"])
        lines.append(f"  {name}: {part['tensors']} tensors, {part['parameters'] / 1e6:,.1f} M parameters, {dtypes}")
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
    lines += [f"  {key}: {value}" for key, value in facts["metadata"].items()]
    # Metadata are a stranger's texts: nothing in them may steer the terminal.
    sys.stdout.write("".join(printable(line, keep="") + "\n" for line in lines))
    return code


def describe(weights: FaithDiffWeights) -> dict[str, Any]:
    """What a file holds, in plain types."""
    parts = {
        name: {
            "tensors": len(part.state),
            "parameters": sum(math.prod(shape) for shape in shapes_of(part.state).values()),
            "dtypes": _dtypes(part),
            "quantized": _quantized(part),
            "sizes": vars(part.config),
            "not_finite": part.not_finite(),
        }
        for name, part in weights.parts.items()
    }
    return {
        "file": str(weights.path),
        "kind": weights.kind,
        "backbone": weights.backbone.name,
        "prediction": weights.marked or weights.backbone.prediction,
        "parts": parts,
        "metadata": weights.metadata,
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
