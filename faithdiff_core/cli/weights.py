"""The commands `convert` and `info`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ..convert import DTYPES, convert
from ..weights import FaithDiffWeights, read_faithdiff
from .progress import ProgressLine

_KINDS = {
    "full": "a full FaithDiff file (U-Net, LQ encoder and alignment)",
    "adapter": "a FaithDiff adapter (LQ encoder and alignment, without U-Net)",
    "unet": "a U-Net in diffusers' format",
    "partial": "a part of a FaithDiff file",
}


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `convert`."""
    parser.description = (
        "Split a FaithDiff file into NAME_unet.safetensors, which loads as any SDXL U-Net does, and\n"
        "NAME_adapter.safetensors with the LQ encoder and the alignment. Memory stays below 1.5 GB."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="FaithDiff.bin, or the same as safetensors")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder to write to (beside FILE)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp16", help="of the U-Net; with fp8 the adapter is kept in fp16 (fp16)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that are there")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run_convert(args: argparse.Namespace) -> int:
    """Convert, and name the files written.

    Raises:
        FaithDiffError: see `convert`.
    """
    line = ProgressLine(quiet=args.quiet)
    try:
        paths = convert(
            args.file,
            args.output,
            args.dtype,
            force=args.force,
            progress=lambda done, total: line.show("converting", done, total),
        )
    finally:
        line.clear()
    for path in paths:
        sys.stdout.write(f"{path} ({path.stat().st_size / 1e6:,.0f} MB)\n")
    return 0


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
    configs = {
        "unet": weights.unet_config,
        "lq_encoder": weights.lq_encoder_config,
        "alignment": weights.alignment_config,
    }
    parts = {
        name: {
            "tensors": len(part),
            "parameters": sum(tensor.numel() for tensor in part.values()),
            "dtypes": _dtypes(part),
            "sizes": vars(configs[name]),
        }
        for name, part in weights.parts.items()
    }
    return {"file": str(weights.path), "kind": weights.kind, "parts": parts, "metadata": weights.metadata}


def _dtypes(part: dict[str, Any]) -> list[str]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    counts = Counter(names.get(tensor.dtype, str(tensor.dtype)) for tensor in part.values())
    return [name for name, _ in counts.most_common()]
