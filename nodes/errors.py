"""Errors as a user of the graph reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..faithdiff_core.errors import FaithDiffError


@contextmanager
def named_errors(node: str) -> Iterator[None]:
    """Put the node's name in front of what went wrong; the type of the error stays."""
    try:
        yield
    except FaithDiffError as error:
        raise type(error)(f"{node}: {error}") from error


def complaint(check: Callable[..., object], *args: object, **kw: object) -> str | None:
    """What a check of the core has to say against a value, for `validate_inputs`; None if nothing."""
    try:
        check(*args, **kw)
    except FaithDiffError as error:
        return str(error)
    return None
