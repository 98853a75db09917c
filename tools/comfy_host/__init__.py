"""Running this pack on a real ComfyUI: in this process, as a server, and in its web page.

Tests use it through the fixtures of tests/host/conftest.py (`host`, `server`, `browser`) and build prompts with
`Graph`.
"""

from __future__ import annotations

from .graph import Graph, GraphError, Node, Prompt, PromptRejectedError, Result
from .in_process import Host, Runner
from .installation import (
    GOLDEN,
    NO_BROWSER,
    NO_HOST,
    NODES,
    PACKS,
    READY_SECONDS,
    REPO,
    RUN_SECONDS,
    TESTPACK,
    HostError,
    find_browser,
    find_host,
    prepare_base,
    quick_demo,
    write_placeholders,
)
from .other_packs import FOLDER_VARIABLE, load_pack, packs_folder
from .page import NodeBox, Page, PageResult
from .server import Job, JobResult, Server

__all__ = [
    "FOLDER_VARIABLE",
    "GOLDEN",
    "NODES",
    "NO_BROWSER",
    "NO_HOST",
    "PACKS",
    "READY_SECONDS",
    "REPO",
    "RUN_SECONDS",
    "TESTPACK",
    "Graph",
    "GraphError",
    "Host",
    "HostError",
    "Job",
    "JobResult",
    "Node",
    "NodeBox",
    "Page",
    "PageResult",
    "Prompt",
    "PromptRejectedError",
    "Result",
    "Runner",
    "Server",
    "find_browser",
    "find_host",
    "load_pack",
    "packs_folder",
    "prepare_base",
    "quick_demo",
    "write_placeholders",
]
