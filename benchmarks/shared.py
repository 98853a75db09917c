"""Models and counts that several rows share, and letting go of them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_kept: defaultdict[str, list[Callable[[], None]]] = defaultdict(list)


def shared(group: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Keep a function's results, by its arguments, until the group is released."""

    def keep(function: Callable[P, T]) -> Callable[P, T]:
        cached = functools.cache(function)
        _kept[group].append(cached.cache_clear)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return cached(*args, **kwargs)  # type: ignore[arg-type]  # a ParamSpec cannot say that they are hashable

        return call

    return keep


def release(*groups: str) -> None:
    """Let go of what these groups keep. Defaults to all groups."""
    for group in groups or tuple(_kept):
        for clear in _kept[group]:
            clear()
