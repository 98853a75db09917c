"""The command `degrade`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

from ..errors import ImageError, SettingsError
from ..training.data import list_images, open_image
from ..training.degradation import DegradationConfig, degrade
from ..training.yaml_config import build, read_yaml


def add_degrade_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `degrade`."""
    parser.add_argument("input", type=Path, metavar="IN", help="an image, or a folder of images")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="the file or folder to write (PNG)"
    )
    parser.add_argument("--config", type=Path, metavar="YAML", help="ranges to draw from (the paper's unless given)")
    parser.add_argument(
        "--scale", type=int, metavar="N", help="how many times smaller; the configuration's unless given"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (0)")
    parser.add_argument("--enlarge", action="store_true", help="bring the result back to the input's size (Lanczos)")


def run_degrade(args: argparse.Namespace) -> int:
    """Write low-quality versions of images, as PNG files under the same names.

    Every image is drawn with a seed made of `--seed` and its name, so adding images changes no others.

    Raises:
        FaithDiffError: bad settings or images.
    """
    from PIL import Image

    config = build(DegradationConfig, read_yaml(args.config)) if args.config else DegradationConfig()
    if args.scale is not None:
        config = dataclasses.replace(config, scale=args.scale)
    if args.seed < 0:
        raise SettingsError(f"--seed must be 0 or more, got {args.seed}.")
    if args.input.is_dir():
        files = list_images(args.input)
        targets = [(args.output / f.relative_to(args.input)).with_suffix(".png") for f in files]
        twice = sorted({str(t) for t in targets if targets.count(t) > 1})
        if twice:
            raise ImageError(f"Several images would be written to {', '.join(twice[:3])}; give them different names.")
    else:
        files, targets = [args.input], [args.output]
        if args.output.suffix.lower() != ".png":
            raise SettingsError(f"The output {args.output} must be a PNG file, which adds no traces of its own.")
    for file, target in zip(files, targets, strict=True):
        image = open_image(file)
        rng = np.random.default_rng([args.seed, *file.stem.encode()])
        result = degrade(image, config, rng)
        if args.enlarge:
            result = result.resize(image.size, Image.Resampling.LANCZOS)
        target.parent.mkdir(parents=True, exist_ok=True)
        result.save(target)
        sys.stdout.write(f"{target}\n")
    return 0
