"""YAML configurations, mutated: each is read, or one of the project's errors says what is wrong with it."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from faithdiff_core.cli.train import read_config
from faithdiff_core.engine.settings import RestoreSettings
from faithdiff_core.errors import FaithDiffError, SettingsError
from faithdiff_core.training.config import TrainConfig
from faithdiff_core.training.degradation import DegradationConfig
from faithdiff_core.training.yaml_config import build, read_yaml
from fuzz.failure import Failure, attempt, numbered

DEMO = Path(__file__).resolve().parents[2] / "demo"

ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        2**70,
        10**40,
        0.5,
        -0.5,
        1e-320,
        1e308,
        math.nan,
        math.inf,
        -math.inf,
    ),
    *("", " ", "x", "8", "1e-4", "nan", "~", "../..", "a" * 10**4, "\x00", "\x1b[31m", "\ud83d\ude00", "2024-01-01"),
    *([], [0], [1, 2], [2, 1], [math.nan, 1], [1] * 1000, {}, {"x": 1}, {1: 2}, {None: None}, [[]], [{}]),
]
"""Values that YAML can hold where others are meant."""

TEXTS = (
    *("&a [*a]", "&a {x: *a}", "!!python/object/apply:os.system [ls]", "!!binary aGk=", "? [a]\n: b", "- a", "a: b: c"),
    *("[" * 3000, "{a: " * 3000, "a: !!set {x}", "a: 2001-02-30", "a: 0o9", "%YAML 9.9\n---\na: 1", "a: 1\n...\nb: 2"),
    "a: &x [1,1]\n" + "".join(f"b{i}: &x{i} [*x{i - 1 if i else ''},*x{i - 1 if i else ''}]\n" for i in range(40)),
)
"""Files that are no configuration at all; the last one would be 2^40 items if it were written out."""


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in nested mappings and lists."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def edited(rng: random.Random, config: dict[str, Any]) -> str:
    """Values exchanged, dropped, doubled or moved."""
    out = copy.deepcopy(config)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(out))
        if not places:
            break
        holder, key = rng.choice(places)
        kind = rng.choice(("odd", "odd", "odd", "drop", "rename", "swap"))
        if kind == "odd":
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif kind == "drop":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[rng.choice((f"{key}x", 1, None, str(key).upper()))] = holder.pop(key)
        else:
            other, place = rng.choice(places)
            if place in other if isinstance(other, dict) else place < len(other):
                holder[key] = copy.deepcopy(other[place])
    return yaml.safe_dump(out, allow_unicode=rng.random() < 0.5)


def flipped(rng: random.Random, text: str) -> bytes:
    """Bytes changed, taken out, doubled, or cut off."""
    out = bytearray(text.encode())
    for _ in range(rng.choice((1, 2, 8))):
        at = rng.randrange(len(out))
        kind = rng.randrange(4)
        if kind == 0:
            out[at] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + rng.choice((1, 5, 40))]
        elif kind == 2:
            out[at:at] = out[at : at + rng.choice((1, 5, 40))]
        else:
            out[at:at] = rng.choice((b"\t", b"\0", b"\xff", b": ", b"- ", b"{", b"\xef\xbb\xbf", b"\r", b"'"))
        if not out:
            break
    return bytes(out)


def cases(seed: int) -> Iterator[tuple[str, str, bytes]]:
    """Files without end: a name, which configuration it was, and the content. The same seed gives the same files."""
    texts = {name: (DEMO / f"{name}.yaml").read_text(encoding="utf-8") for name in ("train", "degradation", "restore")}
    number = 0
    while True:
        rng = random.Random(f"{seed} {number}")
        kind = list(texts)[number % len(texts)]
        way = rng.random()
        if way < 0.05:
            content = rng.choice(TEXTS).encode(rng.choice(("utf-8", "utf-16")))
        elif way < 0.35:
            content = flipped(rng, texts[kind])
        else:
            content = edited(rng, yaml.safe_load(texts[kind])).encode()
        yield f"{kind}.yaml {seed} {number}", kind, content
        number += 1


def _numbers(value: Any) -> Iterator[float]:
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from _numbers(getattr(value, item.name))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float):
        yield value


def _read(kind: str, path: Path) -> None:
    """Read it; what is accepted has values that can be computed with."""
    made: TrainConfig | DegradationConfig | RestoreSettings
    if kind == "train":
        made = read_config(path)
    elif kind == "degradation":
        made = build(DegradationConfig, read_yaml(path))
    else:
        values = read_yaml(path)
        try:
            made = RestoreSettings(**values)
        except TypeError as error:  # Python's own words about a name that is no setting
            raise SettingsError(str(error)) from error
    assert all(map(math.isfinite, _numbers(made))), "accepted a number that is not finite"


def run(seed: int, seconds: float, start: int = 0) -> Iterator[int | Failure]:
    """Try mutated files for some time.

    Args:
        seed: of the files.
        seconds: after this time no new file is begun.
        start: number of the first file.

    Yields:
        The number of each file before it is tried, and what went wrong with it.
    """
    with tempfile.TemporaryDirectory() as name:
        for number, (case, kind, content) in numbered(cases(seed), seconds, start):
            yield number
            path = Path(name) / "a.yaml"
            path.write_bytes(content)
            work: Callable[[], None] = partial(_read, kind, path)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                failure = attempt(case, work, FaithDiffError)
            if failure is not None:
                yield failure
