"""The errors that the package raises on purpose.

Every message says what was expected, what came, and what to do about it, so a caller (a node, the command line) only
has to say where it happened.
"""

from __future__ import annotations


class FaithDiffError(ValueError):
    """Base of all errors that bad input causes; its text is written for the person who gave the input."""


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


def install_extra(name: str) -> str:
    """In words, how to install what an extra of pyproject.toml brings; for messages of `MissingPackageError`.

    From the folder, and not by the package's name: this project is on no package index.
    """
    return f'install the extra `{name}` (`pip install ".[{name}]"` in FaithDiff\'s folder)'
