"""The command `evaluate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.metrics import FULL_REFERENCE, NO_REFERENCE
from ..evaluation.scores import evaluate, table, write_csv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `evaluate`."""
    parser.add_argument("results", type=Path, metavar="RESULTS", help="folder of restored images, or one image")
    parser.add_argument("--reference", type=Path, metavar="HQ", help="the originals under the same names")
    parser.add_argument(
        "--metrics",
        default=None,
        metavar="LIST",
        help=f"comma-separated, of {', '.join(FULL_REFERENCE + NO_REFERENCE)} (all that the reference allows)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table to a CSV file too")
    parser.add_argument("--device", default="cpu", help="for the metrics with networks (cpu)")


def run(args: argparse.Namespace) -> int:
    """Write the table to standard output.

    Raises:
        FaithDiffError: bad arguments or images.
    """
    if args.metrics is None:
        names: Sequence[str] = NO_REFERENCE if args.reference is None else FULL_REFERENCE + NO_REFERENCE
    else:
        names = [n.strip() for n in args.metrics.split(",") if n.strip()]
    evaluation = evaluate(args.results, args.reference, names, args.device)
    sys.stdout.write(table(evaluation))
    if args.csv is not None:
        write_csv(evaluation, args.csv)
    return 0
