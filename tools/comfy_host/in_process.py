"""ComfyUI in this process."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import logging
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .graph import Graph, GraphError, Prompt, Result, _refusal
from .installation import REPO, TESTPACK, HostError, prepare_base


class _Server:
    """The few things that the host's executor asks of its server."""

    def __init__(self) -> None:
        self.client_id: str | None = None
        self.last_node_id: str | None = None
        self.last_prompt_id: str | None = None
        self.messages: list[tuple[str, Any]] = []

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        self.messages.append((event, data))

    def queue_updated(self) -> None:
        pass


class Runner:
    """The host's executor with its cache: graphs run one after another in one runner share results, as in a server."""

    def __init__(self) -> None:
        execution = importlib.import_module("execution")
        self._server = _Server()
        self._executor = execution.PromptExecutor(
            self._server, cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        )

    def run(self, prompt: Prompt, want: Mapping[str, list[Any]] | None = None, check: bool = True) -> Result:
        """Validate and run a graph. See `Host.run`."""
        execution = importlib.import_module("execution")
        capture = importlib.import_module("nodes").NODE_CLASS_MAPPINGS["TestCapture"]
        prompt = {key: {**node, "inputs": dict(node["inputs"])} for key, node in prompt.items()}
        for name, link in (want or {}).items():
            prompt[f"want_{name}"] = {"class_type": "TestCapture", "inputs": {"value": list(link), "name": name}}
        prompt_id = str(uuid.uuid4())
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt(prompt_id, prompt, None))
        if not valid or node_errors:
            result = Result("invalid", errors=_refusal(error, node_errors))
        else:
            self._server.messages.clear()
            capture.kept.clear()
            with _progress_hook() as progress:
                self._executor.execute(prompt, prompt_id, {"client_id": "tests"}, outputs)
            result = self._result(dict(capture.kept), progress)
            capture.kept.clear()
        if check and result.status != "success":
            raise GraphError(f"{result.status}: {result.message}", result)
        return result

    def _result(self, outputs: dict[str, Any], progress: list[tuple[int, int]]) -> Result:
        status = "success" if self._executor.success else "error"
        errors = []
        cached: list[str] = []
        for event, data in self._executor.status_messages:
            if event == "execution_error":
                errors.append(data)
            elif event == "execution_interrupted":
                status = "interrupted"
            elif event == "execution_cached":
                cached = list(data["nodes"])
        started = [data["node"] for event, data in self._server.messages if event == "executing"]
        executed = [node for node in started if node is not None]
        ui = self._executor.history_result.get("outputs", {}) if status == "success" else {}
        return Result(status, outputs, ui, errors, executed, cached, progress)


@contextlib.contextmanager
def _progress_hook() -> Iterator[list[tuple[int, int]]]:
    """Listen to progress bars, and let each of their steps notice an interruption, as the host's main.py does."""
    utils = importlib.import_module("comfy.utils")
    management = importlib.import_module("comfy.model_management")
    steps: list[tuple[int, int]] = []

    def hook(value: int, total: int, preview: Any, **_: Any) -> None:
        management.throw_exception_if_processing_interrupted()
        steps.append((value, total))

    utils.set_progress_bar_global_hook(hook)
    try:
        yield steps
    finally:
        utils.set_progress_bar_global_hook(None)


class Host:
    """ComfyUI in this process: core nodes, this pack and the test pack.

    Attributes:
        path: the ComfyUI folder.
        base: its private base directory (models, input, output).
        version: such as "0.33.0".
        testpack: the package `testpack` as the host loaded it, with the submodules `models`, `inputs` and `golden`.
    """

    def __init__(self, path: Path, base: Path) -> None:
        self.path = path
        self.base = prepare_base(base)
        _put_first_on_path(path)
        args = importlib.import_module("comfy.cli_args").args
        args.cpu = not torch.cuda.is_available()
        args.base_directory = str(base)
        args.disable_api_nodes = True
        args.database_url = "sqlite:///:memory:"
        self._nodes = importlib.import_module("nodes")
        if Path(str(self._nodes.__file__)).resolve().parent != path:
            raise HostError(f"`import nodes` gave {self._nodes.__file__}, not the one of the host in {path}.")
        self.version: str = importlib.import_module("comfyui_version").__version__
        asyncio.run(self._nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
        core = set(self._nodes.NODE_CLASS_MAPPINGS)
        self.testpack = self._load(TESTPACK, core)
        self.pack = self._load(REPO, core)

    def _load(self, folder: Path, core: set[str]) -> ModuleType:
        """Load a node pack with the host's own function."""
        lines: list[str] = []
        listener = logging.Handler(logging.WARNING)
        listener.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(listener)
        try:
            loaded = asyncio.run(self._nodes.load_custom_node(str(folder), core))
        finally:
            logging.getLogger().removeHandler(listener)
        if not loaded:
            raise HostError(f"ComfyUI {self.version} could not load {folder}:\n" + "\n".join(lines))
        return sys.modules[_module_name(folder)]

    def pack_module(self, name: str) -> ModuleType:
        """A module of this pack as the host loaded it, such as "nodes.errors" or "faithdiff_core.errors".

        The host loads the pack under a name made of its path, so its classes are others than those of a plain
        `import faithdiff_core`: compare errors with the classes found here.
        """
        return importlib.import_module(f"{_module_name(REPO)}.{name}")

    def run(
        self,
        prompt: Prompt | Graph,
        want: Mapping[str, list[Any]] | None = None,
        *,
        runner: Runner | None = None,
        check: bool = True,
    ) -> Result:
        """Validate and run a graph with the host's executor.

        Args:
            prompt: in API format.
            want: names for links whose values come back in `Result.outputs`; they need no output node of their own.
            runner: to share its cache with other runs; a fresh one unless given.
            check: raise unless the graph succeeds.

        Raises:
            GraphError: the graph was refused, failed or was interrupted, and `check` is on.
        """
        prompt = prompt.prompt if isinstance(prompt, Graph) else prompt
        return (runner or Runner()).run(prompt, want, check)

    def call(self, class_type: str, **inputs: Any) -> tuple[Any, ...]:
        """Call a node's function with these inputs, without a graph. Left out inputs get the node's Python defaults."""
        node = self._nodes.NODE_CLASS_MAPPINGS[class_type]
        with torch.inference_mode():
            if hasattr(node, "define_schema"):
                return tuple(node.execute(**inputs).args)
            return tuple(getattr(node(), node.FUNCTION)(**inputs))

    def interrupt(self) -> None:
        """Cancel the graph that runs now, from another thread."""
        importlib.import_module("comfy.model_management").interrupt_current_processing()

    def node_class(self, class_type: str) -> Any:
        """The class of a node."""
        return self._nodes.NODE_CLASS_MAPPINGS[class_type]

    @property
    def node_ids(self) -> set[str]:
        """Ids of all nodes."""
        return set(self._nodes.NODE_CLASS_MAPPINGS)


def _module_name(folder: Path) -> str:
    return str(folder).replace(".", "_x_")


def _put_first_on_path(path: Path) -> None:
    """Let the host's modules win over this repository's (both have one called `nodes`), which stays importable."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (path, REPO)]
    sys.path.insert(0, str(path))
    sys.path.append(str(REPO))
