"""Errors as a user of the graph reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, Concatenate, ParamSpec

from comfy_api.latest import io

from ..faithdiff_core.errors import FaithDiffError
from .bridge.checks import check_inputs

P = ParamSpec("P")


def named_errors(
    execute: Callable[Concatenate[Any, P], io.NodeOutput],
) -> Callable[Concatenate[Any, P], io.NodeOutput]:
    """Decorator of a node's `execute`, under `@classmethod`: errors begin with the node's display name.

    Inputs are checked against the node's schema first; see `check_inputs`. The type of the error stays.
    """
    names = list(signature(execute).parameters)[1:]

    @wraps(execute)
    def named(cls: Any, /, *args: P.args, **kwargs: P.kwargs) -> io.NodeOutput:
        try:
            validated = signature(cls.validate_inputs).parameters
            check_inputs(cls.define_schema(), {**dict(zip(names, args, strict=False)), **kwargs}, validated)
            return execute(cls, *args, **kwargs)
        except FaithDiffError as error:
            raise type(error)(f"{cls.define_schema().display_name}: {error}") from error

    return named


def complaint(check: Callable[..., object], *args: object, **kw: object) -> str | None:
    """What a check of the core has to say against a value, for `validate_inputs`; None if nothing."""
    try:
        check(*args, **kw)
    except FaithDiffError as error:
        return str(error)
    return None
