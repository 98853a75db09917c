"""From YAML to dataclasses: every key is known, every value has the type and the range that its field asks for."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import MissingPackageError, SettingsError, install_extra

T = TypeVar("T")

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 200


def _shown(value: Any) -> str:
    """A value for a message, cut: a few lines of YAML with anchors can stand for gigabytes."""
    try:
        return _brief.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of thousands of digits"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        SettingsError: there is no such file, or it is not YAML or not a mapping, or it sets a name twice.
        MissingPackageError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingPackageError(f"Configurations are YAML, which needs PyYAML; {install_extra('train')}.") from error
    if not path.is_file():
        raise SettingsError(f"There is no configuration {path}. Check the name and the folder.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        _refuse_repeated(yaml.compose(text, Loader=yaml.SafeLoader), path)
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, SettingsError):
            raise
        if "int_max_str_digits" in str(error):
            raise SettingsError(f"{path} has a whole number of more digits than are read (4300).") from error
        raise SettingsError(f"{path} is not a YAML file: {error}") from error
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(loaded, dict):
        raise SettingsError(f"{path}: expected `name: value` lines at the top level, got a {type(loaded).__name__}.")
    return loaded


def _refuse_repeated(node: Any, path: Path) -> None:
    """Refuse a mapping that sets a name twice, of which YAML readers keep the last without a word."""
    stack = [node]
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue
        seen.add(id(node))
        if node.id == "sequence":
            stack += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            stack.append(value)
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines and name != "<<":
                raise SettingsError(f"{path}: `{name}` is set twice, in line {lines[name]} and in line {line}.")
            lines[name] = line


def build(cls: type[T], values: Mapping[str, Any], where: str = "", default: T | None = None) -> T:
    """Make a dataclass out of a mapping, nested ones included.

    Args:
        cls: the dataclass; its `__post_init__` may check ranges.
        values: field values by name; fields with a default may be left out.
        where: place in the configuration, for messages.
        default: has the values of the fields that are left out. Defaults to those of the class.

    Raises:
        SettingsError: an unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"{where or cls.__name__}: expected `name: value` lines, got {_shown(values)}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields), key=str)
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
    if missing and default is None:
        raise SettingsError(f"{where or cls.__name__}: the setting(s) {', '.join(missing)} are missing.")
    made = {
        name: _convert(hints[name], value, f"{where}.{name}".lstrip("."), _default(fields[name], default))
        for name, value in values.items()
    }
    try:
        return cls(**made) if default is None else dataclasses.replace(default, **made)  # type: ignore[type-var]
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}" if where else str(error)) from None


def _default(field: dataclasses.Field[Any], owner: Any) -> Any:
    """A field's default if that is a dataclass, whose own fields then need not all be given."""
    if owner is not None:
        value = getattr(owner, field.name)
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = field.default
    return value if dataclasses.is_dataclass(value) and not isinstance(value, type) else None


def _choice(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is False and "no" in options:
        value = "no"  # YAML 1.1 reads an unquoted `no` as false
    # By type as well: true equals 1 in Python.
    if not any(type(option) is type(value) and option == value for option in options):
        raise SettingsError(f"{where}: expected one of {', '.join(map(repr, options))}, got {_shown(value)}.")
    return value


def _convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, where, default)
    if origin is typing.Literal:
        return _choice(typing.get_args(hint), value, where)
    if origin is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"{where}: expected a list, got {_shown(value)}.")
        if kinds[-1] is Ellipsis:
            return tuple(_convert(kinds[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(kinds):
            raise SettingsError(f"{where}: expected {len(kinds)} values, got {_shown(value)}.")
        return tuple(_convert(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where, default)
    if hint is float:
        # YAML 1.1 reads 1e-4 (without a point) as text.
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or not math.isfinite(number):
            raise SettingsError(f"{where}: expected a finite number, got {_shown(value)}.")
        return number
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise SettingsError(f"{where}: expected a whole number, got {_shown(value)}.")
        if abs(value) >= 2**128:
            raise SettingsError(f"{where}: expected a whole number of at most 38 digits, got {_shown(value)}.")
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise SettingsError(f"{where}: expected true or false, got {_shown(value)}.")
        return value
    if hint is Path or hint is str:
        if not isinstance(value, (str, Path)):
            raise SettingsError(f"{where}: expected text, got {_shown(value)}.")
        return hint(value)
    raise TypeError(f"{where}: the type {hint} cannot be read from a configuration")
