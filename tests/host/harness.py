"""Running this pack on a real ComfyUI: in this process, as a server, and in its web page.

Use it through the fixtures of `conftest.py` (`host`, `server`, `browser`) and build prompts with `Graph`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[2]
TESTPACK = Path(__file__).resolve().parent / "testpack"
GOLDEN = REPO / "tests" / "golden"
PACKS: Mapping[str, Path] = {"faithdiff": REPO, "faithdiff_testpack": TESTPACK}
NODES = frozenset(page.stem for page in (REPO / "web" / "docs").glob("*.md"))
"""Ids of the pack's nodes: each has a help page, and no other page is there."""

NO_HOST = (
    "NO COMFYUI FOUND: the tests on the real host are SKIPPED. Install it with `pip install comfy-cli && comfy "
    "install` (to ~/comfy/ComfyUI), or set COMFYUI_PATH to a ComfyUI folder."
)
NO_BROWSER = (
    "NO CHROMIUM FOUND: the tests in the web page are SKIPPED. Install it with `apt-get install chromium "
    "chromium-driver` and `pip install selenium`."
)

READY_SECONDS = 180.0
RUN_SECONDS = 300.0

Prompt = dict[str, dict[str, Any]]
"""A graph in ComfyUI's API format: node id to class_type and inputs."""


class HostError(Exception):
    """The host could not be found or started."""


class GraphError(Exception):
    """A graph was refused or failed. `result` has the details."""

    def __init__(self, message: str, result: Result | None = None) -> None:
        super().__init__(message)
        self.result = result


class PromptRejectedError(Exception):
    """The server answered a prompt with an error status.

    Attributes:
        status: the HTTP status, 400 for bad values.
        body: the decoded answer with `error` and `node_errors`.
    """

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"HTTP {status}: {json.dumps(body)[:2000]}")
        self.status = status
        self.body = body


def find_host() -> Path | None:
    """The ComfyUI folder to test on: $COMFYUI_PATH, ~/comfy/ComfyUI, or the one whose custom_nodes this pack lies in.

    Raises:
        HostError: COMFYUI_PATH is set and is no ComfyUI folder.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().resolve()
        if not _is_host(path):
            raise HostError(f"COMFYUI_PATH is {path}, but main.py, nodes.py and comfy/ are not in it.")
        return path
    places = [Path.home() / "comfy" / "ComfyUI"]
    if REPO.parent.name == "custom_nodes":
        places.append(REPO.parent.parent)
    return next((place.resolve() for place in places if _is_host(place)), None)


def _is_host(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "nodes.py").is_file() and (path / "comfy").is_dir()


def prepare_base(base: Path) -> Path:
    """Make a ComfyUI base directory with the tiny FaithDiff model in models/faithdiff, and return it."""
    for folder in ("custom_nodes", "input", "output", "temp", "models/checkpoints", "models/faithdiff", "models/loras"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(GOLDEN / "faithdiff_tiny.safetensors", base / "models" / "faithdiff" / "faithdiff_tiny.safetensors")
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    # Keeps the welcome dialogs of the web page away.
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.49.6"}))
    return base


def quick_demo(base: Path) -> Prompt:
    """The demo workflow with one step, and a small picture for it in the input folder of a base directory."""
    from PIL import Image

    Image.new("RGB", (40, 32), (200, 120, 40)).save(base / "input" / "example.png")
    prompt: Prompt = json.loads((REPO / "workflows" / "api" / "faithdiff_demo.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        if node["class_type"] == "FaithDiffSampler":
            node["inputs"]["steps"] = 1
    return prompt


# ---------------------------------------------------------------------------------------------------------- graphs


@dataclass(frozen=True)
class Node:
    """A node of a `Graph`; `node[1]` is a link to its second output."""

    id: str

    def __getitem__(self, slot: int) -> list[Any]:
        return [self.id, slot]


@dataclass
class Graph:
    """Builds a prompt in API format: `graph.add("KSampler", model=model[0], seed=1)`."""

    prompt: Prompt = field(default_factory=dict)

    def add(self, class_type: str, **inputs: Any) -> Node:
        """Add a node and return it; inputs are values or links."""
        node = Node(str(len(self.prompt) + 1))
        self.prompt[node.id] = {"class_type": class_type, "inputs": inputs}
        return node


@dataclass
class Result:
    """What came of a graph.

    Attributes:
        status: `success`, `error`, `interrupted`, or `invalid` (refused before running).
        outputs: the values asked for with `want`.
        ui: what output nodes show, by node id.
        errors: for `error`, the host's one message with node_id, node_type, exception_message, ...; for `invalid`, the
            host's error and then its node errors, each with `node_id`.
        executed: ids of the nodes that ran, in order; those answered from the cache are not in it.
        cached: ids answered from the cache.
        progress: (value, total) of every progress message.
    """

    status: str
    outputs: dict[str, Any] = field(default_factory=dict)
    ui: dict[str, Any] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)

    @property
    def message(self) -> str:
        """All error messages in one text."""
        lines = []
        for error in self.errors:
            text = error.get("exception_message") or f"{error.get('message', '')}: {error.get('details', '')}"
            lines.append(f"[{error.get('node_type', '')} {error.get('node_id', '')}] {text}")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- in this process


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


def _refusal(error: dict[str, Any] | None, node_errors: Mapping[str, Any]) -> list[dict[str, Any]]:
    out = [error] if error else []
    for node_id, entry in node_errors.items():
        out += [{**one, "node_id": node_id, "node_type": entry["class_type"]} for one in entry["errors"]]
    return out


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


# ------------------------------------------------------------------------------------------------------ the server


class Server:
    """ComfyUI's own server on a private base directory, with this pack and the test pack unless told otherwise.

    Args:
        path: the ComfyUI folder.
        base: the base directory; what is in its custom_nodes is loaded, too.
        arguments: more words for the host's command line.
        packs: folders to link into custom_nodes, by name.
        environment: variables that differ from those of this process.

    Attributes:
        base: the base directory; write model files below `base / "models"` at any time.
        url: such as "http://127.0.0.1:8123".
        log: the file with its output.
    """

    def __init__(
        self,
        path: Path,
        base: Path,
        arguments: tuple[str, ...] = (),
        packs: Mapping[str, Path] = PACKS,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.base = prepare_base(base)
        for name, folder in packs.items():
            (base / "custom_nodes" / name).symlink_to(folder, target_is_directory=True)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = base / "server.log"
        command = [
            sys.executable, "main.py", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base),
            "--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes", *arguments,
        ]  # fmt: skip
        if not torch.cuda.is_available():
            command.append("--cpu")
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=path,
                env={**inherited, **(environment or {}), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        import requests

        end = time.monotonic() + READY_SECONDS
        while True:
            if self._process.poll() is not None:
                raise HostError(f"The server ended with {self._process.returncode} at its start:\n{self.log_tail()}")
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(f"{self.url}/system_stats", timeout=5).ok:
                    break
            if time.monotonic() > end:
                raise HostError(f"The server was not ready after {READY_SECONDS:.0f} s:\n{self.log_tail()}")
            time.sleep(0.2)
        text = self.log.read_text(errors="replace")
        # Nodes of the host itself may fail for want of a library; only the packs are ours to judge.
        packs = str(self.base / "custom_nodes")
        failed = [line for line in text.splitlines() if "IMPORT FAILED" in line and packs in line]
        if failed:
            raise HostError("\n".join(failed) + "\n" + text[-6000:])

    def log_tail(self, characters: int = 4000) -> str:
        """The end of what the server wrote."""
        return self.log.read_text(errors="replace")[-characters:]

    def stop(self) -> None:
        """End the server and all that it started."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def resident_bytes(self) -> int:
        """Memory of the server process that is in RAM."""
        import psutil

        return int(psutil.Process(self._process.pid).memory_info().rss)

    def get(self, path: str, **query: Any) -> Any:
        """GET and decode JSON."""
        return json.loads(self.download(path, **query))

    def download(self, path: str, **query: Any) -> bytes:
        """GET."""
        import requests

        answer = requests.get(self.url + path, params=query, timeout=60)
        answer.raise_for_status()
        return answer.content

    def post(self, path: str, data: Any = None) -> None:
        """POST JSON, for routes without an answer such as /interrupt and /free."""
        import requests

        requests.post(self.url + path, json=data if data is not None else {}, timeout=60).raise_for_status()

    def object_info(self, class_type: str) -> dict[str, Any]:
        """How the server describes a node."""
        out: dict[str, Any] = self.get(f"/object_info/{class_type}")[class_type]
        return out

    def history(self, prompt_id: str) -> dict[str, Any]:
        """What the server kept of a finished prompt: prompt, outputs, status."""
        out: dict[str, Any] = self.get(f"/history/{prompt_id}")[prompt_id]
        return out

    def view(self, image: Mapping[str, str]) -> bytes:
        """The bytes of a picture that a SaveImage or PreviewImage listed."""
        return self.download("/view", **image)

    def upload(self, picture: Path, name: str | None = None) -> str:
        """Put a picture into the input folder and return the name for LoadImage."""
        import requests

        files = {"image": (name or picture.name, picture.read_bytes())}
        answer = requests.post(f"{self.url}/upload/image", files=files, data={"overwrite": "true"}, timeout=60)
        answer.raise_for_status()
        return str(answer.json()["name"])

    def interrupt(self) -> None:
        """Cancel the prompt that runs now."""
        self.post("/interrupt")

    def submit(self, prompt: Prompt | Graph) -> Job:
        """Open a websocket, post a prompt, and return the job; close it, or use it in a `with`.

        Raises:
            PromptRejectedError: the server refused it.
        """
        return Job(self, prompt.prompt if isinstance(prompt, Graph) else prompt)

    def run(self, prompt: Prompt | Graph, timeout: float = RUN_SECONDS, check: bool = True) -> JobResult:
        """Post a prompt and wait for its end.

        Raises:
            PromptRejectedError: the server refused it.
            GraphError: it failed, and `check` is on.
            TimeoutError: it took longer than `timeout` seconds.
        """
        with self.submit(prompt) as job:
            result = job.wait(timeout)
        if check and result.status != "execution_success":
            raise GraphError(f"{result.status}: {result.error}\n{self.log_tail()}")
        return result


@dataclass
class JobResult:
    """The end of a prompt on the server.

    Attributes:
        prompt_id: its id.
        status: execution_success, execution_error or execution_interrupted.
        messages: all websocket messages of the prompt, as (type, data).
        outputs: what output nodes show, by node id, as in the history.
    """

    prompt_id: str
    status: str
    messages: list[tuple[str, dict[str, Any]]]
    outputs: dict[str, Any]

    @property
    def error(self) -> str:
        """The message of an execution_error, else an empty text."""
        return next((str(data["exception_message"]) for kind, data in self.messages if kind == "execution_error"), "")

    @property
    def images(self) -> list[dict[str, str]]:
        """All pictures that output nodes listed, for `Server.view`."""
        return [image for shown in self.outputs.values() for image in shown.get("images", [])]


class Job:
    """A prompt on its way through the server, seen through a websocket of its own."""

    ENDS = ("execution_success", "execution_error", "execution_interrupted")

    def __init__(self, server: Server, prompt: Prompt) -> None:
        import requests
        import websocket

        self._server = server
        client = uuid.uuid4().hex
        address = f"{server.url.replace('http', 'ws', 1)}/ws?clientId={client}"
        self._socket = websocket.create_connection(address, timeout=30)
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.previews = 0
        try:
            answer = requests.post(f"{server.url}/prompt", json={"prompt": prompt, "client_id": client}, timeout=60)
            if not answer.ok:
                raise PromptRejectedError(answer.status_code, answer.json())
        except BaseException:
            self._socket.close()
            raise
        self.prompt_id: str = answer.json()["prompt_id"]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def wait_for(self, is_it: Callable[[str, dict[str, Any]], bool], timeout: float = RUN_SECONDS) -> dict[str, Any]:
        """Read messages until one that `is_it(type, data)` takes, and return its data.

        Raises:
            GraphError: the prompt ended before.
            TimeoutError: nothing such came within `timeout` seconds.
        """
        import websocket

        end = time.monotonic() + timeout
        while True:
            self._socket.settimeout(max(end - time.monotonic(), 0.01))
            try:
                message = self._socket.recv()
            except websocket.WebSocketTimeoutException as error:
                kinds = [kind for kind, _ in self.messages][-20:]
                raise TimeoutError(
                    f"The prompt was not done after {timeout:.0f} s. Messages: {kinds}\n{self._server.log_tail()}"
                ) from error
            if isinstance(message, bytes):
                self.previews += 1
                continue
            decoded = json.loads(message)
            kind, data = str(decoded["type"]), decoded.get("data") or {}
            if data.get("prompt_id") not in (None, self.prompt_id):
                continue
            self.messages.append((kind, data))
            if is_it(kind, data):
                return dict(data)
            if kind in self.ENDS:
                raise GraphError(f"The prompt ended with {kind}: {data.get('exception_message', '')}")

    def wait(self, timeout: float = RUN_SECONDS) -> JobResult:
        """Wait for the end of the prompt."""
        self.wait_for(lambda kind, _: kind in self.ENDS, timeout)
        status = self.messages[-1][0]
        # The history is written a moment after the last message.
        end = time.monotonic() + 30
        while self.prompt_id not in (history := self._server.get(f"/history/{self.prompt_id}")):
            if time.monotonic() > end:
                raise TimeoutError(f"The history of {self.prompt_id} did not come.")
            time.sleep(0.02)
        return JobResult(self.prompt_id, status, self.messages, history[self.prompt_id]["outputs"])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# --------------------------------------------------------------------------------------------------------- the page


def find_browser() -> tuple[Path, Path] | None:
    """Chromium and its driver, or None if one of them, or selenium, is missing."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None or importlib.util.find_spec("selenium") is None:
        return None
    return Path(chromium), Path(driver)


@dataclass
class PageResult:
    """What came of queueing the graph that is open in the page.

    Attributes:
        node_errors: why nodes were refused, by node id; empty if they were not.
        execution_error: the message of a failed node, or None.
        outputs: what output nodes show, by node id.
    """

    node_errors: dict[str, Any]
    execution_error: dict[str, Any] | None
    outputs: dict[str, Any]


class Page:
    """The server's web page in headless Chromium."""

    def __init__(self, server: Server, chromium: Path, driver: Path, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        self._server = server
        options = Options()
        options.binary_location = str(chromium)
        for flag in (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1600,1000",
            f"--user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self._driver = webdriver.Chrome(options=options, service=Service(str(driver)))
        self._driver.set_script_timeout(60)

    def open(self, timeout: float = 120.0) -> None:
        """Load the page and wait until its graph is there.

        Raises:
            TimeoutError: it was not there after `timeout` seconds.
        """
        self._driver.get(self._server.url)
        ready = "return !!(window.app && window.app.vueAppReady && window.app.graph)"
        self._until(lambda: self.script(ready), timeout, "the page's graph")

    def close(self) -> None:
        """End the browser."""
        self._driver.quit()

    def script(self, code: str, *arguments: Any) -> Any:
        """Run JavaScript in the page and return what it returns."""
        return self._driver.execute_script(code, *arguments)

    def drop(self, workflow: Path, timeout: float = 30.0) -> None:
        """Drop a workflow file on the canvas, as with the mouse, and wait until its nodes are there.

        Raises:
            TimeoutError: the graph did not change to the file's nodes.
        """
        text = workflow.read_text(encoding="utf-8")
        count = len(json.loads(text)["nodes"])
        self.script(
            """
            const transfer = new DataTransfer();
            transfer.items.add(new File([arguments[0]], arguments[1], {type: "application/json"}));
            const canvas = document.querySelector("canvas#graph-canvas");
            const box = canvas.getBoundingClientRect();
            const where = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
            const event = {dataTransfer: transfer, bubbles: true, cancelable: true, ...where};
            for (const kind of ["dragenter", "dragover", "drop"]) canvas.dispatchEvent(new DragEvent(kind, event));
            """,
            text,
            workflow.name,
        )
        self._until(lambda: len(self.node_types()) == count, timeout, f"{count} nodes of {workflow.name}")

    def load(self, workflow: Path) -> None:
        """Load a workflow or blueprint file without the mouse."""
        self._async_script("window.app.loadGraphData(JSON.parse(arguments[0]))", workflow.read_text(encoding="utf-8"))

    def prompt(self) -> Prompt:
        """What queueing the open graph would send to the server, subgraphs unfolded."""
        return dict(self._async_script("window.app.graphToPrompt().then(prompt => prompt.output)"))

    def set_widget(self, class_type: str, name: str, value: Any) -> None:
        """Set a widget of all nodes of a type."""
        self.script(
            """
            for (const node of window.app.graph.nodes.filter(n => n.type === arguments[0]))
                node.widgets.find(w => w.name === arguments[1]).value = arguments[2];
            """,
            class_type,
            name,
            value,
        )

    def _async_script(self, promise: str, *arguments: Any) -> Any:
        """Wait for a promise of the page and return what it gives.

        Raises:
            RuntimeError: it was rejected.
        """
        answer = self._driver.execute_async_script(
            f"const done = arguments[arguments.length - 1];"
            f"Promise.resolve({promise}).then(value => done([true, value]), error => done([false, String(error)]));",
            *arguments,
        )
        if not answer[0]:
            raise RuntimeError(answer[1])
        return answer[1]

    def clear(self) -> None:
        """Empty the graph."""
        self.script("window.app.graph.clear()")

    def node_types(self) -> list[str]:
        """Types of all nodes in the graph."""
        return list(self.script("return window.app.graph.nodes.map(n => n.type)"))

    def missing_types(self) -> list[str]:
        """Types of nodes that the page does not know."""
        known = set(self.script("return Object.keys(LiteGraph.registered_node_types)"))
        return [kind for kind in self.node_types() if kind not in known]

    def error_overlays(self) -> list[str]:
        """Texts of error overlays and error dialogs that are to be seen."""
        return list(
            self.script(
                """
                const signs = "[data-testid=error-overlay], [data-testid*=missing-node], .comfy-error-report, "
                    + ".comfy-missing-nodes";
                const found = [...document.querySelectorAll(signs)];
                return found.filter(e => e.getClientRects().length).map(e => e.textContent.trim());
                """
            )
        )

    def console_errors(self) -> list[str]:
        """Severe messages of the browser's console since the last call."""
        return [entry["message"] for entry in self._driver.get_log("browser") if entry["level"] == "SEVERE"]

    def queue(self, timeout: float = RUN_SECONDS) -> PageResult:
        """Queue the open graph as the Run button does, and wait for its end.

        Raises:
            GraphError: the page could not make a prompt of the graph.
            TimeoutError: it did not end within `timeout` seconds.
        """
        before = set(self._server.get("/history"))
        failure = self._driver.execute_async_script(
            """
            const done = arguments[arguments.length - 1];
            window.app.queuePrompt(0).then(() => done(null), error => done(String(error)));
            """
        )
        if failure:
            raise GraphError(f"queuePrompt: {failure}")
        node_errors = self.script("return window.app.lastNodeErrors") or {}
        if node_errors:
            return PageResult(node_errors, None, {})
        self._until(lambda: set(self._server.get("/history")) - before, timeout, "the end of the prompt")
        (prompt_id,) = set(self._server.get("/history")) - before
        execution_error = self.script("return window.app.lastExecutionError") or None
        return PageResult({}, execution_error, self._server.history(prompt_id)["outputs"])

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the page."""
        path.write_bytes(base64.b64decode(self._driver.get_screenshot_as_base64()))

    def _until(self, there: Callable[[], Any], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while not there():
            if time.monotonic() > end:
                raise TimeoutError(f"Waited {timeout:.0f} s for {what}. Console: {self.console_errors()[-5:]}")
            time.sleep(0.1)
