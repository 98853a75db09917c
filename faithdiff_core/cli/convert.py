"""The command `convert`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..dtypes import DTYPES
from ..errors import printable
from ..weights.conversion import convert
from ..weights.marks import PREDICTIONS
from ..weights.quantization import QUANTIZED_DTYPES
from .progress_line import ProgressLine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `convert`."""
    parser.description = (
        "Split a FaithDiff file into NAME_unet.safetensors, which loads as any U-Net of its kind does, and\n"
        "NAME_adapter.safetensors with the LQ encoder and the alignment. Memory stays below 1.5 GB.\n"
        "fp8_scaled, int8 and nvfp4 are ComfyUI's quantized formats; docs/quantized.md has their errors."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="FaithDiff.bin, or the same weights as safetensors")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder to write to (beside FILE)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES | QUANTIZED_DTYPES,
        default="fp16",
        help="of the U-Net; with 8 bits and fewer the adapter is kept in fp16 (fp16)",
    )
    parser.add_argument(
        "--one-file",
        action="store_true",
        help="write NAME_DTYPE.safetensors with all parts, which FaithDiff Model Loader takes alone",
    )
    parser.add_argument(
        "--prediction", choices=PREDICTIONS, help="what the U-Net predicts, where a file for SD 2.1 does not say it"
    )
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
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
            one_file=args.one_file,
            prediction=args.prediction,
            force=args.force,
            progress=lambda done, total: line.show("converting", done, total),
        )
    finally:
        line.clear()
    for path in paths:
        sys.stdout.write(f"{printable(str(path))} ({path.stat().st_size / 1e6:,.0f} MB)\n")
    return 0
