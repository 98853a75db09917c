"""The look at the training images before a run, and the memory of it.

Reading every image takes hours for a large set, so the verdict on each is kept in the output folder and holds as long
as the names, sizes and times of its files do. The same file fixes the order of a run's images: what is added to the
folder later does not change which image a sample's number means.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..errors import ImageError
from .config import DataConfig
from .data import Source, named_problems

MEMORY_FILE = "data.json"
"""Name of the memory in the output folder."""

REMEMBER_FAILED_FROM = 1000
"""A check that fails is remembered for sets of at least so many images; smaller ones are checked again in seconds."""

logger = logging.getLogger(__name__)


@dataclass
class DataMemory:
    """What is known about a set of images.

    Attributes:
        settings: what a verdict depends on besides the files.
        verdicts: for each image by key, the sizes and times of its files, and what is wrong with it (or None).
        order: keys of a run's images in the order of their indices; empty before the run has begun.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    verdicts: dict[str, tuple[list[Any], str | None]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, output: Path) -> DataMemory:
        """The memory in an output folder; an empty one where there is none that can be read."""
        try:
            values = json.loads((output / MEMORY_FILE).read_text(encoding="utf-8"))
            verdicts = {key: (stamp, problem) for key, (stamp, problem) in values["verdicts"].items()}
            return cls(values["settings"], verdicts, list(values["order"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def write(self, output: Path) -> None:
        """Write the memory into an output folder."""
        values = {"settings": self.settings, "verdicts": self.verdicts, "order": self.order}
        write_atomically(output / MEMORY_FILE, json.dumps(values).encode())


def usable_entries(source: Source, config: DataConfig, memory: DataMemory | None = None) -> list[int]:
    """Look at every entry before training starts, or at those that have changed since the last look.

    Args:
        source: the images.
        config: says whether images are decoded, and what happens to bad ones.
        memory: of an earlier look; brought up to date.

    Returns:
        Indices of the good entries.

    Raises:
        ImageError: there are bad entries and the configuration says `raise`, or no good one is left.
    """
    memory = DataMemory() if memory is None else memory
    problems = check_entries(source, range(len(source)), config, memory)
    good = [i for i, text in enumerate(problems) if text is None]
    _report([text for text in problems if text is not None], len(source), config)
    if not good:
        raise ImageError("No usable training image is left.")
    return good


def check_entries(source: Source, indices: Sequence[int], config: DataConfig, memory: DataMemory) -> list[str | None]:
    """What is wrong with each of some entries, or None; in parallel, and only those that the memory does not know."""
    names = ("check", "size", "captions", "small")
    settings: dict[str, Any] = {name: getattr(config, name) for name in names} | {"source": source.kind}
    if memory.settings != settings:
        memory.settings, memory.verdicts = settings, {}

    def problem(index: int) -> str | None:
        key, stamp = source.key(index), source.stamp(index)
        known = memory.verdicts.get(key)
        if known is not None and known[0] == stamp:
            return known[1]
        text = _problem(source, index, config)
        memory.verdicts[key] = (stamp, text)
        return text

    with ThreadPoolExecutor(max_workers=max(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(problem, indices))


def _problem(source: Source, index: int, config: DataConfig) -> str | None:
    try:
        if not config.check:
            source.check_caption(index)
            return None
        sample = source.read(index)
    except ImageError as error:
        return str(error)
    if config.small == "refuse" and min(sample.hq.size) < config.size:
        return (
            f"{source.name(index)} of {sample.hq.width} x {sample.hq.height} pixels is smaller than the crop of "
            f"{config.size}"
        )
    return None


def run_entries(source: Source, config: DataConfig, memory: DataMemory, going_on: bool) -> list[int]:
    """The entries of a run: the good ones for a new run, and the same as before for one that goes on.

    Args:
        source: the images.
        config: says what happens to bad ones.
        memory: brought up to date.
        going_on: whether the run has begun before.

    Returns:
        Indices in the source. In a run that goes on, bad ones are among them if the configuration says `skip`; their
        place in the order stays, and samples that meet them take another image.

    Raises:
        ImageError: there are bad entries and the configuration says `raise`, or no good one is left.
    """
    if not going_on or not memory.order:
        entries = usable_entries(source, config, memory)
        memory.order = [source.key(index) for index in entries]
        return entries
    entries, added = source.pin(memory.order)
    if added:
        logger.info("%d images were added after the run had begun; it does not use them", added)
    problems = check_entries(source, entries, config, memory)
    bad = [text for text in problems if text is not None]
    _report(bad, len(entries), config)
    if len(bad) == len(entries):
        raise ImageError("No usable training image is left.")
    return entries


def _report(problems: Sequence[str], total: int, config: DataConfig) -> None:
    if not problems:
        return
    named = named_problems(problems)
    if config.on_bad == "raise":
        raise ImageError(
            f"{len(problems)} of {total} training entries are bad: {named}. Repair or remove them, or set "
            "`on_bad: skip`."
        )
    logger.warning("skipped %d of %d training entries: %s", len(problems), total, named)
