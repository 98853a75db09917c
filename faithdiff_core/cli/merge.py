"""The command `merge`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..dtypes import DTYPES
from ..errors import printable
from ..weights.block_strengths import BlockStrengths
from ..weights.merging import merge
from .progress_line import ProgressLine

BLOCKS = {
    "input-blocks": "input blocks and embeddings",
    "middle-block": "middle block",
    "output-blocks": "output blocks",
}
"""Options for parts of the U-Net."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `merge`."""
    parser.description = (
        "Add what FaithDiff learned to your own checkpoint, SDXL for the published weights:\n"
        "  merged = CHECKPOINT + strength * (FAITHDIFF - BASE)\n"
        "The result keeps the checkpoint's style. Use it with FaithDiff's adapter file."
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a single file, or a folder of diffusers")
    parser.add_argument("faithdiff", type=Path, metavar="FAITHDIFF", help="FaithDiff.bin, or the `_unet` file")
    parser.add_argument(
        "--base", type=Path, required=True, metavar="BASE", help="what FaithDiff was trained from: RealVisXL_V4.0"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="a .safetensors file, or a folder for a folder"
    )
    parser.add_argument("--strength", type=float, default=1.0, help="factor on the difference, 0 to 2 (1)")
    for option, part in BLOCKS.items():
        parser.add_argument(
            f"--{option}", type=float, default=1.0, metavar="FACTOR", help=f"of the strength for the {part}, 0 to 1 (1)"
        )
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged U-Net (the checkpoint's)")
    parser.add_argument("--force", action="store_true", help="overwrite existing output")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Merge, and name the result.

    Raises:
        FaithDiffError: see `merge`.
    """
    line = ProgressLine(quiet=args.quiet)
    try:
        path = merge(
            args.checkpoint,
            args.faithdiff,
            args.base,
            args.output,
            strength=args.strength,
            factors=BlockStrengths(args.input_blocks, args.middle_block, args.output_blocks),
            dtype=args.dtype,
            force=args.force,
            progress=lambda done, total: line.show("merging", done, total),
        )
    finally:
        line.clear()
    sys.stdout.write(f"{printable(str(path))}\n")
    return 0
