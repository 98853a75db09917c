"""The command `extract-lora`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..dtypes import COMPUTE_DTYPES
from ..errors import printable
from ..weights.lora_extraction import REPORT_RANKS, ExtractionSettings, extract_lora
from ..weights.lora_report import require_matplotlib
from .progress_line import ProgressLine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `extract-lora`."""
    parser.description = (
        "Write what FaithDiff learned, FAITHDIFF - BASE, as a LoRA: a tenth of the U-Net's size, for any SDXL\n"
        "checkpoint. ComfyUI, diffusers and programs that read kohya's format load it. With --adapter, the file holds\n"
        "FaithDiff's adapter too: FaithDiff Model Loader and `restore --faithdiff` take it with any SDXL model.\n"
        "If interrupted, the same command continues where it stopped."
    )
    parser.add_argument("faithdiff", type=Path, metavar="FAITHDIFF", help="FaithDiff.bin, or the `_unet` file")
    parser.add_argument(
        "--base", type=Path, required=True, metavar="BASE", help="what FaithDiff was trained from: RealVisXL_V4.0"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a .safetensors file")
    parser.add_argument("--rank", type=int, default=64, help="singular values of a layer (64)")
    parser.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="use fewer in layers where they keep this share of the squared difference, such as 0.95",
    )
    parser.add_argument(
        "--differences",
        choices=("none", "comfyui"),
        default="none",
        help="biases and norms: left out, so that all programs read the file; or added as they are, which ComfyUI "
        "reads and diffusers refuses. With --adapter they are always in the file (none)",
    )
    parser.add_argument(
        "--adapter", type=Path, metavar="FILE", help="FaithDiff.bin or the `_adapter` file: write both into one file"
    )
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, default="fp16", help="of the file (fp16)")
    parser.add_argument(
        "--ranks",
        type=_ranks,
        default=REPORT_RANKS,
        metavar="A,B,...",
        help=f"report errors and sizes for these ranks ({','.join(map(str, REPORT_RANKS))})",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the error of each layer as CSV")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the errors by rank as PNG (needs matplotlib)")
    parser.add_argument("--force", action="store_true", help="overwrite existing output")
    parser.add_argument("--quiet", action="store_true", help="no progress and no table")


def _ranks(text: str) -> tuple[int, ...]:
    """Ranks out of a list with commas, each once and in order."""
    return tuple(sorted({int(word) for word in text.split(",")}))


def run(args: argparse.Namespace) -> int:
    """Extract, and show the errors.

    Raises:
        FaithDiffError: see `extract_lora`.
    """
    if args.plot is not None:
        require_matplotlib()
    line = ProgressLine(quiet=args.quiet)
    settings = ExtractionSettings(args.rank, args.energy, args.dtype, args.differences, args.ranks)
    try:
        report = extract_lora(
            args.faithdiff,
            args.base,
            args.output,
            settings,
            adapter=args.adapter,
            force=args.force,
            progress=lambda done, total: line.show("extracting", done, total),
        )
    finally:
        line.clear()
    if not args.quiet:
        sys.stdout.write(report.table() + "\n")
    if args.report is not None:
        report.write_csv(args.report)
    if args.plot is not None:
        report.plot(args.plot)
    sys.stdout.write(f"{printable(str(report.path))}\n")
    return 0
