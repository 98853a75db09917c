"""The command `info`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from ..dtypes import dtype_name
from ..weights.faithdiff_file import FaithDiffWeights, read_faithdiff

_KINDS = {
    "full": "a full FaithDiff file (U-Net, LQ encoder and alignment)",
    "adapter": "a FaithDiff adapter (LQ encoder and alignment, without U-Net)",
    "unet": "a U-Net in diffusers' format",
    "partial": "a part of a FaithDiff file",
}


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `info`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a weights file")
    parser.add_argument("--json", action="store_true", help="for programs")


def run_info(args: argparse.Namespace) -> int:
    """Describe a weights file.

    Raises:
        WeightsError: it is no FaithDiff file; the text says what it is.
    """
    facts = describe(read_faithdiff(args.file))
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return 0
    lines = [f"{args.file.name} is {_KINDS[facts['kind']]}."]
    for name, part in facts["parts"].items():
        sizes = ", ".join(f"{key} {value}" for key, value in part["sizes"].items())
        dtypes = ", ".join(part["dtypes"])
        lines.append(f"  {name}: {part['tensors']} tensors, {part['parameters'] / 1e6:,.1f} M parameters, {dtypes}")
        lines.append(f"    {sizes}")
    lines += [f"  {key}: {value}" for key, value in facts["metadata"].items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def describe(weights: FaithDiffWeights) -> dict[str, Any]:
    """What a file holds, in plain types."""
    parts = {
        name: {
            "tensors": len(part.state),
            "parameters": sum(tensor.numel() for tensor in part.state.values()),
            "dtypes": _dtypes(part.state),
            "sizes": vars(part.config),
        }
        for name, part in weights.parts.items()
    }
    return {"file": str(weights.path), "kind": weights.kind, "parts": parts, "metadata": weights.metadata}


def _dtypes(state: dict[str, Tensor]) -> list[str]:
    counts = Counter(dtype_name(tensor.dtype) for tensor in state.values())
    return [name for name, _ in counts.most_common()]
