"""The errors that the package raises on purpose.

Every message says what was expected, what came, and what to do about it, so a caller (a node, the command line) only
has to say where it happened.
"""

from __future__ import annotations

from typing import Any
from unicodedata import category

_UNSEEN = {"Cc", "Cs"}
"""Unicode categories of control characters and of halves of characters, which consoles cannot write."""

_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of the text after them."""


def printable(text: str, keep: str = "\n\t") -> str:
    """A text with escapes for the characters that could steer a terminal; files and their names may hold any.

    Args:
        text: any text.
        keep: control characters that stay.
    """
    return "".join(
        char.encode("unicode_escape", "surrogatepass").decode()
        if char not in keep and (category(char) in _UNSEEN or char in _TURNING)
        else char
        for char in text
    )


class FaithDiffError(ValueError):
    """Base of all errors that bad input causes; its text is written for the person who gave the input."""

    # ComfyUI names a pack's modules by the path of its folder, and shows an error's module to the user, but for
    # Python's own errors. There the name alone has to do.
    __module__ = __name__ if __name__ == "faithdiff_core.errors" else "builtins"

    def __init_subclass__(cls, **kw: Any) -> None:
        super().__init_subclass__(**kw)
        cls.__module__ = FaithDiffError.__module__

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class SettingsError(FaithDiffError):
    """A number or a choice is outside what the method allows (tile size, overlap, steps, ...)."""


class WeightsError(FaithDiffError):
    """A weights file is not what it should be: wrong kind, broken, incomplete or of another shape."""


class ImageError(FaithDiffError):
    """An image cannot be read, or its size or layout cannot be worked with."""


class MissingPackageError(FaithDiffError):
    """An optional package is needed for what was asked; the text names the extra that installs it."""


class NotFiniteError(FaithDiffError):
    """A model overflowed: its result has values that are NaN or infinite."""


class SaveError(FaithDiffError):
    """A file cannot be written: no space left, no permission, a folder that is not there."""


def reason_of(error: Exception) -> str:
    """Why work on one image failed, for its user; an error whose text is not for people is named by its class."""
    reason = str(error).strip() or type(error).__name__
    if isinstance(error, (FaithDiffError, OSError, RuntimeError, MemoryError)):
        return reason
    return f"{type(error).__name__}: {reason}"


def install_extra(name: str) -> str:
    """In words, how to install what an extra of pyproject.toml brings; for messages of `MissingPackageError`.

    From the folder, and not by the package's name: this project is on no package index.
    """
    return f'install the extra `{name}` (`pip install ".[{name}]"` in FaithDiff\'s folder)'
