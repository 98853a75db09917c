"""ComfyUI's own tools as a user runs them, but with a home of their own and no way out to the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="this is no git checkout, or git is missing"
)

_CLOSED = "http://127.0.0.1:9"
"""A port where nobody listens."""

_DROPPED = ("COMFY", "CONDA_PREFIX", "GIT_", "GITHUB_ENDPOINT", "PYTHONPATH", "VIRTUAL_ENV", "XDG_")
"""Beginnings of variables that would lead the tools somewhere else."""


def closed_environment(home: Path) -> dict[str, str]:
    """Variables with which a program keeps its settings in `home`, and reaches nothing but this machine."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_DROPPED)}
    proxies = {f"{scheme}_proxy": _CLOSED for scheme in ("http", "https", "all")}
    proxies |= {key.upper(): value for key, value in proxies.items()}
    open_to = {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    settings = {"HOME": str(home), "USERPROFILE": str(home), "DO_NOT_TRACK": "1", "PIP_NO_INDEX": "1", "COLUMNS": "200"}
    return kept | proxies | open_to | settings


def run(words: list[str], environment: Mapping[str, str], folder: Path) -> str:
    """Run a program that must succeed, and return all that it wrote."""
    done = subprocess.run(
        words, cwd=folder, env=dict(environment), capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def comfy(words: list[str], environment: Mapping[str, str], folder: Path) -> str:
    """Run comfy-cli in a folder."""
    return run([sys.executable, "-m", "comfy_cli", "--skip-prompt", *words], environment, folder)


def tracked_files() -> list[str]:
    """What git knows of this checkout and what is new in it, without what it ignores."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in listed if (ROOT / name).is_file())


def make_repository(folder: Path) -> Path:
    """A git repository with the files of this checkout as they are now, in one commit."""
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    run(["git", "init", "--quiet"], closed_environment(folder.parent), folder)
    commit_all(folder)
    return folder


def commit_all(repository: Path) -> None:
    """Commit what is in the folder of a repository of `make_repository`."""
    environment = closed_environment(repository.parent)
    author = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for words in (["add", "--all"], [*author, "commit", "--quiet", "--message=all"]):
        run(["git", *words], environment, repository)


def pack(repository: Path, home: Path) -> Path:
    """The archive that comfy-cli would publish."""
    comfy(["node", "pack"], closed_environment(home), repository)
    return (repository / "node.zip").rename(home / "node.zip")
