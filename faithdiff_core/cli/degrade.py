"""The command `degrade`."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..atomic import write_atomically
from ..cli import EXIT_FAILED
from ..engine.restoration import Progress
from ..errors import SettingsError
from ..images.batch import Job, Report, find_jobs, left_out, possible
from ..images.formats import left_out_note
from ..images.reading import load_image
from ..training.degradation import DegradationConfig, degrade, to_image
from ..training.yaml_config import build, read_yaml
from .jobs import attempt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `degrade`."""
    parser.add_argument("input", type=Path, metavar="IN", help="an image, or a folder of images")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="the file or folder to write (PNG)"
    )
    parser.add_argument("--config", type=Path, metavar="YAML", help="ranges to draw from (the paper's)")
    parser.add_argument("--scale", type=int, metavar="N", help="how many times smaller (the configuration's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (0)")
    parser.add_argument("--enlarge", action="store_true", help="bring the result back to the input's size (Lanczos)")


def run(args: argparse.Namespace) -> int:
    """Write low-quality versions of images, as PNG files under the same names.

    Every image is drawn with a seed made of `--seed` and its name, so adding images changes no others. One that fails
    does not stop the others.

    Returns:
        0, or 1 if an image failed.

    Raises:
        FaithDiffError: bad settings, or results that would overwrite the originals.
    """
    from PIL import Image

    config = build(DegradationConfig, read_yaml(args.config)) if args.config else DegradationConfig()
    if args.scale is not None:
        config = dataclasses.replace(config, scale=args.scale)
    if args.seed < 0:
        raise SettingsError(f"--seed must be 0 or more, got {args.seed}.")
    named = not os.path.isdir(args.input) and not os.path.isdir(args.output)
    if named and args.output.suffix.lower() != ".png":
        raise SettingsError(f"The output {args.output} must be a PNG file, which adds no traces of its own.")
    jobs = find_jobs([glob.escape(str(args.input))], args.output, ".png")
    report = Report(skipped=None, verb="degraded")
    if note := left_out_note(left_out([str(args.input)], args.output)):
        sys.stderr.write(note + "\n")

    def work(job: Job, progress: Progress) -> Sequence[str]:
        image = load_image(job.source)
        rng = np.random.default_rng([args.seed, *os.fsencode(job.source.stem)])
        original = to_image(image.colors)
        result = degrade(original, config, rng)
        if args.enlarge:
            result = result.resize(original.size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        result.save(buffer, "PNG")
        write_atomically(job.target, buffer.getvalue())
        sys.stdout.write(f"{job.target}\n")
        return image.notes

    for job in possible(jobs, report):
        attempt(job, work, report, str(job.source), quiet=True)
    if report.failures:
        sys.stderr.write("\n".join(report.lines()) + "\n")
    return EXIT_FAILED if report.failures else 0
