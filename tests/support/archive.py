"""Helpers for tests of archives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def files(folder: Path) -> dict[str, bytes]:
    """Results below an output folder, by name, with their bytes."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.endswith((".jsonl", ".html"))}


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """The manifest's rows by name, one for each."""
    found = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len({row["name"] for row in found}) == len(found)
    return {row["name"]: row for row in found}
