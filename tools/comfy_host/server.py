"""ComfyUI's server in a separate process, and jobs on it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .graph import Graph, GraphError, Prompt, PromptRejectedError
from .installation import PACKS, READY_SECONDS, RUN_SECONDS, TOOLS, HostError, prepare_base


class Server:
    """ComfyUI's own server on a private base directory, with this pack and the test pack by default.

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
        # The test pack uses `tiny_models`; else the server sees what is installed, and no more.
        variables = os.environ | {"PYTHONPATH": str(TOOLS), "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=path,
                env={**variables, **(environment or {})},
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

    @property
    def process_id(self) -> int:
        """Of the server's process."""
        return self._process.pid

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
        """The bytes of an image that a SaveImage or PreviewImage listed."""
        return self.download("/view", **image)

    def upload(self, image: Path, name: str | None = None) -> str:
        """Put an image into the input folder and return the name for LoadImage."""
        import requests

        files = {"image": (name or image.name, image.read_bytes())}
        answer = requests.post(f"{self.url}/upload/image", files=files, data={"overwrite": "true"}, timeout=60)
        answer.raise_for_status()
        return str(answer.json()["name"])

    def interrupt(self) -> None:
        """Cancel the prompt that runs now."""
        self.post("/interrupt")

    def submit(self, prompt: Prompt | Graph, workflow: Mapping[str, Any] | None = None) -> Job:
        """Open a websocket, post a prompt, and return the job; close it, or use it in a `with`.

        Args:
            prompt: in the API's format.
            workflow: the graph in the page's format, which the page sends along for image files.

        Raises:
            PromptRejectedError: the server refused it.
        """
        return Job(self, prompt.prompt if isinstance(prompt, Graph) else prompt, workflow)

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
        """All images that output nodes listed, for `Server.view`."""
        return [image for shown in self.outputs.values() for image in shown.get("images", [])]


class Job:
    """A prompt on its way through the server, seen through a websocket of its own."""

    ENDS = ("execution_success", "execution_error", "execution_interrupted")

    def __init__(self, server: Server, prompt: Prompt, workflow: Mapping[str, Any] | None = None) -> None:
        import requests
        import websocket

        self._server = server
        client = uuid.uuid4().hex
        address = f"{server.url.replace('http', 'ws', 1)}/ws?clientId={client}"
        self._socket = websocket.create_connection(address, timeout=30)
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.previews = 0
        try:
            body: dict[str, Any] = {"prompt": prompt, "client_id": client}
            if workflow is not None:
                body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
            answer = requests.post(f"{server.url}/prompt", json=body, timeout=60)
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
