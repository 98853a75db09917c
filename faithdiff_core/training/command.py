"""The commands `train` and `degrade`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import PictureError, SettingsError
from .config import TrainConfig
from .data import list_pictures, open_picture
from .degradation import DegradationConfig, degrade
from .settings import build, read_yaml

T = TypeVar("T")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `train`."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="what to train, on what, and how")


def run_train(args: argparse.Namespace) -> int:
    """Train as a configuration says.

    Returns:
        0 if finished, 130 if stopped by Ctrl-C; the state is saved then.

    Raises:
        FaithDiffError: bad settings, data or weights.
    """
    from .loop import train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it lists every file of a checkpoint
    return 0 if train(read_config(args.config)).finished else 130


def read_config(path: Path) -> TrainConfig:
    """Read a training configuration; its paths count from its own folder.

    Raises:
        SettingsError: it is not one; the text names the place.
    """
    return _rooted(build(TrainConfig, read_yaml(path)), path.resolve().parent)


def _rooted(config: T, root: Path) -> T:
    """Make all paths of a configuration absolute."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if isinstance(value, Path):
            changed[field.name] = root / value.expanduser()
        elif dataclasses.is_dataclass(value):
            changed[field.name] = _rooted(value, root)
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def add_degrade_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `degrade`."""
    parser.add_argument("input", type=Path, metavar="IN", help="a picture, or a folder of pictures")
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
    """Write low-quality versions of pictures, as PNG files under the same names.

    Every picture is drawn with a seed made of `--seed` and its name, so adding pictures changes no others.

    Raises:
        FaithDiffError: bad settings or pictures.
    """
    from PIL import Image

    config = build(DegradationConfig, read_yaml(args.config)) if args.config else DegradationConfig()
    if args.scale is not None:
        config = dataclasses.replace(config, scale=args.scale)
    if args.seed < 0:
        raise SettingsError(f"--seed must be 0 or more, got {args.seed}.")
    if args.input.is_dir():
        files = list_pictures(args.input)
        targets = [(args.output / f.relative_to(args.input)).with_suffix(".png") for f in files]
        twice = sorted({str(t) for t in targets if targets.count(t) > 1})
        if twice:
            raise PictureError(
                f"Several pictures would be written to {', '.join(twice[:3])}; give them different names."
            )
    else:
        files, targets = [args.input], [args.output]
        if args.output.suffix.lower() != ".png":
            raise SettingsError(f"The output {args.output} must be a PNG file, which adds no traces of its own.")
    for file, target in zip(files, targets, strict=True):
        picture = open_picture(file)
        rng = np.random.default_rng([args.seed, *file.stem.encode()])
        result = degrade(picture, config, rng)
        if args.enlarge:
            result = result.resize(picture.size, Image.Resampling.LANCZOS)
        target.parent.mkdir(parents=True, exist_ok=True)
        result.save(target)
        sys.stdout.write(f"{target}\n")
    return 0
