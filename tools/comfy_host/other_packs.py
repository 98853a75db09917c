"""Other node packs, in clones that an environment variable names, loaded into the in-process host."""

from __future__ import annotations

import asyncio
import importlib
import os
from pathlib import Path

from .in_process import Host
from .installation import HostError

FOLDER_VARIABLE = "FAITHDIFF_PACKS"


def packs_folder() -> Path | None:
    """The folder with clones of other packs, or None if the variable is not set.

    Raises:
        NotADirectoryError: the variable is set and is no folder.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser().resolve()
    if not folder.is_dir():
        raise NotADirectoryError(f"{FOLDER_VARIABLE} is {folder}, which is no folder.")
    return folder


def load_pack(host: Host, folder: Path) -> set[str]:
    """Load a pack as the host does, with a server that listens to nobody.

    Returns:
        Ids of the pack's nodes.

    Raises:
        HostError: ComfyUI could not load it; its log says why.
    """
    server = importlib.import_module("server").PromptServer
    if getattr(server, "instance", None) is None:
        server(asyncio.new_event_loop())
    before = host.node_ids
    nodes = importlib.import_module("nodes")
    if not asyncio.run(nodes.load_custom_node(str(folder), before)):
        raise HostError(f"ComfyUI could not load {folder}.")
    return host.node_ids - before
