"""Captions in files beside images."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import SettingsError


def caption_beside(source: Path) -> str | None:
    """The caption in NAME.txt beside an image, without the mark (BOM) that Windows' editor puts first; None without.

    Raises:
        SettingsError: the file is not UTF-8.
    """
    beside = source.with_suffix(".txt")
    if not os.path.exists(beside):
        return None
    return caption_text(beside.read_bytes(), beside.name)


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
