"""What a setting is: its kind, range, unit and help text, said once.

A settings class declares its fields with the functions below. The engine's checks, the command line's options and the
nodes' inputs are made from these descriptions, so a default or a limit is written in one place only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from functools import partial
from typing import Any

from ..backbone import VAE_SCALE_FACTOR
from ..errors import SettingsError
from ..images.sizes import check_positive
from ..tiling.grid import MAX_OVERLAP, MIN_TILE, check_overlap, check_tile_size

_KEY = "description"


@dataclass(frozen=True)
class Description:
    """One setting.

    Attributes:
        help: one line, as the command line shows it before the default.
        kind: int, float, or the enum whose values are the choices.
        check: called as check(value, what=name); returns the value as the engine uses it, or raises SettingsError.
        metavar: placeholder of the value in the command line's help.
        unit: `px` for lengths in pixels, else empty.
        minimum, maximum: the range, both ends included; None where there is no limit.
        group: part of the command line's help that the option belongs to; None for settings without an option.
        host_range: range of the same setting in a host's nodes where it differs from the engine's.
        host_default: default in a host's nodes where it differs from the engine's.
    """

    help: str
    kind: type
    check: Callable[..., Any]
    metavar: str | None = None
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    group: str | None = None
    host_range: tuple[float, float] | None = None
    host_default: float | None = None

    @property
    def choices(self) -> list[str]:
        """Values of a setting that is one of several words; empty for numbers."""
        return [choice.value for choice in self.kind] if issubclass(self.kind, Enum) else []


def whole(default: int, help: str, *, minimum: int = 1, maximum: int | None = None, **more: Any) -> Any:
    """Field of a settings class: a whole number."""
    check = partial(_check_whole, minimum=minimum, maximum=maximum)
    return _described(
        default, Description(help, int, check, **{"metavar": "N", "minimum": minimum, "maximum": maximum, **more})
    )


def real(default: float, help: str, *, minimum: float = 0.0, maximum: float | None = None, **more: Any) -> Any:
    """Field of a settings class: a finite number."""
    check = partial(_check_real, minimum=minimum, maximum=maximum)
    return _described(
        default, Description(help, float, check, **{"metavar": "X", "minimum": minimum, "maximum": maximum, **more})
    )


def factor(default: float, help: str, **more: Any) -> Any:
    """Field of a settings class: a finite number above 0."""
    return _described(default, Description(help, float, check_positive, **{"metavar": "X", "minimum": 0.0, **more}))


def tile_side(default: int, help: str, *, optional: bool = False, **more: Any) -> Any:
    """Field of a settings class: a tile side in pixels; with `optional`, None is allowed and means no tiles."""
    check = partial(_check_tile, optional=optional)
    what = {"metavar": "PX", "unit": "px", "minimum": MIN_TILE, "group": "tiles", **more}
    return _described(default, Description(help, int, check, **what))


def overlap_fraction(default: float, help: str, **more: Any) -> Any:
    """Field of a settings class: the fraction of a tile that neighbours share."""
    what = {"metavar": "X", "minimum": 0.0, "maximum": MAX_OVERLAP, "group": "tiles", **more}
    return _described(default, Description(help, float, check_overlap, **what))


def choice(default: Enum, help: str, **more: Any) -> Any:
    """Field of a settings class: a member of an enum, which may be given by its value."""
    check = partial(_check_choice, choices=type(default))
    return _described(default, Description(help, type(default), check, **more))


def described(settings: Any) -> dict[str, Description]:
    """Descriptions of a settings class (or one of its objects) by name, in the order of its fields."""
    return {item.name: item.metadata[_KEY] for item in fields(settings) if _KEY in item.metadata}


def default_of(settings: Any, name: str) -> Any:
    """Default of a setting as plain data: an enum's value, not its member."""
    item: Field[Any] = next(item for item in fields(settings) if item.name == name)
    assert item.default is not MISSING
    return plain(item.default)


def plain(value: Any) -> Any:
    """A setting's value as plain data, for metadata and YAML."""
    return value.value if isinstance(value, Enum) else value


def option(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def add_option(parser: argparse._ActionsContainer, settings: Any, name: str, **changes: Any) -> None:
    """Declare a setting's option on a parser (or a group of one); `changes` replace argparse's arguments."""
    what, default = described(settings)[name], default_of(settings, name)
    shown = f"{default:g}" if isinstance(default, float) else default
    arguments: dict[str, Any] = {"default": default, "help": f"{what.help} ({shown})"}
    if what.choices:
        arguments["choices"] = what.choices
    else:
        arguments |= {"type": what.kind, "metavar": what.metavar}
    parser.add_argument(option(name), **{**arguments, **changes})


def _described(default: Any, what: Description) -> Any:
    return field(default=default, metadata={_KEY: what})


def _check_whole(value: Any, *, what: str, minimum: int, maximum: int | None) -> int:
    if isinstance(value, bool) or not math.isfinite(value) or int(value) != value or value < minimum:
        valid = False
    else:
        valid = maximum is None or value <= maximum
    if not valid:
        to = "" if maximum is None else f" to {maximum}"
        raise SettingsError(f"{what} must be a whole number from {minimum}{to}, got {value}.")
    return int(value)


def _check_real(value: float, *, what: str, minimum: float, maximum: float | None) -> float:
    if not math.isfinite(value) or value < minimum or (maximum is not None and value > maximum):
        limits = f"be {minimum:g} or more" if maximum is None else f"lie between {minimum:g} and {maximum:g}"
        raise SettingsError(f"{what} must {limits}, got {value}.")
    return value


def _check_tile(value: int | None, *, what: str, optional: bool) -> int | None:
    if value is None and optional:
        return None
    return check_tile_size(value, what=what) * VAE_SCALE_FACTOR  # type: ignore[arg-type]


def _check_choice(value: Any, *, what: str, choices: type[Enum]) -> Enum:
    try:
        return choices(value)
    except ValueError:
        words = [member.value for member in choices]
        raise SettingsError(f"{what} must be one of {words}, got {plain(value)!r}.") from None
