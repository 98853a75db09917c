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
    try:
        return beside.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SettingsError(f"{beside.name} is not UTF-8 text. Save it as UTF-8.") from error
