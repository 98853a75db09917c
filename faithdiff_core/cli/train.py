"""The command `train`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any, TypeVar

from ..errors import SettingsError
from ..training.config import TrainConfig
from ..training.yaml_config import build, read_yaml

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `train`."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="what to train, on what, and how")


def run(args: argparse.Namespace) -> int:
    """Train as a configuration says.

    Returns:
        0 if finished, 130 if stopped by Ctrl-C; the state is saved then.

    Raises:
        FaithDiffError: bad settings, data or weights.
    """
    from ..training.start import train

    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)  # to the stderr of now
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
            try:
                changed[field.name] = root / value.expanduser()
            except RuntimeError as error:  # `~name` of no user of this machine
                raise SettingsError(f"{field.name}: {value}: {error} Write the whole path.") from error
        elif dataclasses.is_dataclass(value):
            changed[field.name] = _rooted(value, root)
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]
