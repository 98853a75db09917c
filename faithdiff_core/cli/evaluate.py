"""The command `evaluate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..atomic import write_atomically
from ..cli import EXIT_FAILED
from ..errors import SettingsError
from ..evaluation.metrics import FULL_REFERENCE, NO_REFERENCE, PRESETS, metric_names
from ..evaluation.scores import as_json, comparison, evaluate_folders, skipped, table, write_csv
from ..images.names import folder_problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `evaluate`."""
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="folder of restored images, or one image; several are compared with each other",
    )
    parser.add_argument("--reference", type=Path, metavar="HQ", help="the originals under the same names")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--metrics",
        default=None,
        metavar="LIST",
        help=f"comma-separated, of {', '.join(FULL_REFERENCE + NO_REFERENCE)} (all that the reference allows), "
        "psnry, ssimc, blur, or any of pyiqa's names",
    )
    chosen.add_argument("--preset", choices=sorted(PRESETS), help="faithdiff: the ten of the published evaluation")
    parser.add_argument(
        "--channel", choices=("rgb", "y"), help="of psnr and ssim; without it as published: psnr over RGB, ssim on Y"
    )
    parser.add_argument(
        "--border",
        type=int,
        default=0,
        metavar="N",
        help="pixels cropped at each side before comparing with references (0)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all scores to a CSV file too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores to a JSON file too")
    parser.add_argument("--device", default="cpu", help="for the metrics with networks (cpu)")


def run(args: argparse.Namespace) -> int:
    """Write the table to standard output.

    Returns:
        0, or 1 if none of the metrics could be had or an image could not be scored.

    Raises:
        FaithDiffError: bad arguments or images.
    """
    if args.preset is not None:
        names: Sequence[str] = PRESETS[args.preset]
    elif args.metrics is None:
        names = NO_REFERENCE if args.reference is None else FULL_REFERENCE + NO_REFERENCE
    else:
        names = [n.strip() for n in args.metrics.split(",") if n.strip()]
    for option, path in (("--csv", args.csv), ("--json", args.json)):
        if path is not None and (problem := folder_problem(path.parent)):
            raise SettingsError(f"{option} {path}: {problem}")
    names = metric_names(names, args.channel)
    found = evaluate_folders(args.results, args.reference, names, args.device, args.border)
    sys.stderr.writelines(f"{line}\n" for line in skipped(args.results, args.reference))
    evaluations = {str(folder): evaluation for folder, evaluation in zip(args.results, found, strict=True)}
    sys.stdout.write(table(found[0]) if len(found) == 1 else comparison(evaluations))
    if args.csv is not None:
        write_csv(evaluations, args.csv)
    if args.json is not None:
        write_atomically(args.json, as_json(evaluations).encode())
    if not found[0].metrics:
        sys.stderr.write("error: nothing was measured: none of the metrics could be had.\n")
        return EXIT_FAILED
    return EXIT_FAILED if any(evaluation.failures for evaluation in found) else 0
