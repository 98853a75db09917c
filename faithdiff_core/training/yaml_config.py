"""From YAML to dataclasses: every key is known, every value has the type and the range that its field asks for."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import MissingPackageError, SettingsError, install_extra

T = TypeVar("T")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        SettingsError: there is no such file, or it is not YAML, or not a mapping.
        MissingPackageError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingPackageError(f"Configurations are YAML, which needs PyYAML; {install_extra('train')}.") from error
    if not path.is_file():
        raise SettingsError(f"There is no configuration {path}. Check the name and the folder.")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(loaded, dict):
        raise SettingsError(f"{path}: expected `name: value` lines at the top level, got a {type(loaded).__name__}.")
    return loaded


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make a dataclass out of a mapping, nested ones included.

    Args:
        cls: the dataclass; its `__post_init__` may check ranges.
        values: field values by name; fields with a default may be left out.
        where: place in the configuration, for messages.

    Raises:
        SettingsError: an unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"{where or cls.__name__}: expected `name: value` lines, got {values!r}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise SettingsError(
            f"{where or cls.__name__}: unknown setting(s) {', '.join(map(str, unknown))}; "
            f"known are {', '.join(fields)}."
        )
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SettingsError(f"{where or cls.__name__}: the setting(s) {', '.join(missing)} are missing.")
    made = {name: _convert(hints[name], value, f"{where}.{name}".lstrip(".")) for name, value in values.items()}
    try:
        return cls(**made)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}" if where else str(error)) from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise SettingsError(
                f"{where}: expected one of {', '.join(map(repr, typing.get_args(hint)))}, got {value!r}."
            )
        return value
    if origin is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"{where}: expected a list, got {value!r}.")
        if kinds[-1] is Ellipsis:
            return tuple(_convert(kinds[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(kinds):
            raise SettingsError(f"{where}: expected {len(kinds)} values, got {value!r}.")
        return tuple(_convert(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if hint is float:
        # YAML 1.1 reads 1e-4 (without a point) as text.
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError):
            number = None
        if number is None:
            raise SettingsError(f"{where}: expected a number, got {value!r}.")
        return number
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise SettingsError(f"{where}: expected a whole number, got {value!r}.")
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise SettingsError(f"{where}: expected true or false, got {value!r}.")
        return value
    if hint is Path or hint is str:
        if not isinstance(value, (str, Path)):
            raise SettingsError(f"{where}: expected text, got {value!r}.")
        return hint(value)
    raise TypeError(f"{where}: the type {hint} cannot be read from a configuration")
