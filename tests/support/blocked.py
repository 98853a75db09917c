"""Python without some of its packages: what is said, and what still works, where they are not installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


class _Without:
    """A finder of modules that does not see some packages."""

    def __init__(self, finder: Any, packages: frozenset[str]) -> None:
        self._finder = finder
        self._packages = packages

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] in self._packages:
            return None
        found: ModuleSpec | None = self._finder.find_spec(name, path, target)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def block(packages: Iterable[str]) -> None:
    """From now on, this process can neither import nor find these packages."""
    names = frozenset(packages)
    sys.meta_path[:] = [_Without(finder, names) for finder in sys.meta_path]


def run_without(packages: Iterable[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own that cannot import these packages.

    Args:
        packages: by the names that they are imported by.
        code: finds the arguments in `sys.argv[1:]` and the repository on `sys.path`.
        arguments: for the code.
    """
    start = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import blocked; blocked.block({sorted(packages)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", start + code, *arguments], cwd=TESTS.parent, capture_output=True, text=True, timeout=300
    )
