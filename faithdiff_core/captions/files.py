"""Captions in files beside images."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import SettingsError

CAPTION_SUFFIX = ".txt"
"""Ending of the file beside NAME.png, say: NAME.txt."""


def beside(source: Path, suffix: str) -> bytes | None:
    """The content of NAME and `suffix` beside an image; None if there is no such file."""
    file = source.with_name(source.stem + suffix)
    return file.read_bytes() if os.path.exists(file) else None


def caption_beside(source: Path) -> str | None:
    """The caption in NAME.txt beside an image, without the mark (BOM) that Windows' editor puts first; None without.

    Raises:
        SettingsError: the file is not UTF-8.
    """
    content = beside(source, CAPTION_SUFFIX)
    return None if content is None else caption_text(content, source.stem + CAPTION_SUFFIX)


def caption_text(content: bytes, name: str) -> str:
    """The caption that a file holds.

    Args:
        content: of the file.
        name: what to call it in messages.

    Raises:
        SettingsError: it is not UTF-8.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{name} is not UTF-8 text. Save it as UTF-8.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()
