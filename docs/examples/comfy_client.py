"""A client for a running ComfyUI over HTTP, for any workflow. Needs Python, nothing else: copy it beside your program.

server = ComfyServer("http://127.0.0.1:8188")
workflow = load_workflow(Path("workflows/api/faithdiff_2x.json"))
set_input(workflow, "LoadImage.image", server.upload(Path("photo.jpg")))
(image,) = server.run(workflow)
Path("restored.png").write_bytes(server.download(image))
"""

from __future__ import annotations

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

Workflow = dict[str, dict[str, Any]]
"""A graph in API format: node number to class_type, inputs and _meta."""


class RunError(Exception):
    """The server refused something or failed at it. The text is for people."""


class UnreachableError(RunError):
    """There is no answer from the server."""


class LostPromptError(RunError):
    """The server does not know a prompt that it had taken."""


class ComfyServer:
    """A running ComfyUI.

    Attributes:
        address: such as http://127.0.0.1:8188.
        running: id of the prompt that `run` waits for, or None.
        client_id: under which a websocket hears of this client's prompts.
    """

    def __init__(self, address: str) -> None:
        self.address = (address if "://" in address else f"http://{address}").rstrip("/")
        self.client_id = uuid.uuid4().hex
        self.running: str | None = None

    def request(self, path: str, body: bytes | None = None, content_type: str = "application/json") -> bytes:
        """GET, or POST if there is a body, and return the answer's body."""
        request = urllib.request.Request(self.address + path, body, {"Content-Type": content_type})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise RunError(refusal(error.code, error.read())) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UnreachableError(f"No answer from {self.address}: {reason}. Is ComfyUI running there?") from error

    def get(self, path: str) -> Any:
        """GET and decode JSON."""
        return json.loads(self.request(path))

    def post(self, path: str, data: Any) -> Any:
        """POST JSON and decode the answer, if there is one."""
        return json.loads(self.request(path, json.dumps(data).encode()) or b"null")

    def upload(self, image: Path) -> str:
        """Put an image into the server's input folder and return the name for LoadImage.

        It is named by its content: one photo.jpg does not replace another that still waits in the queue, and the same
        image is found in the server's cache.
        """
        content = image.read_bytes()
        name = hashlib.sha256(content).hexdigest()[:32] + image.suffix.lower()
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
        body = b"".join((head.encode(), content, f"\r\n--{boundary}--\r\n".encode()))
        answer = json.loads(self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}"))
        return str(answer["name"])

    def queue(self, workflow: Workflow) -> str:
        """Post a workflow and return the prompt's id."""
        answer = self.post("/prompt", {"prompt": workflow, "client_id": self.client_id})
        prompt_id = str(answer["prompt_id"])
        if answer["node_errors"]:  # one of several outputs is in order, and the server goes on with that one alone
            self.cancel(prompt_id)
            raise RunError(complaints(answer))
        return prompt_id

    def wait(self, prompt_id: str, every: float = 0.5) -> list[dict[str, str]]:
        """Wait for a prompt's end and return the images that it saved, for `download`."""
        while True:
            known = [entry[1] for entries in self.get("/queue").values() for entry in entries]
            # Asked after the queue: what has just left the queue is in the history already.
            done = self.get(f"/history/{prompt_id}").get(prompt_id)
            if done:
                return saved_images(done)
            if prompt_id not in known:
                raise LostPromptError(
                    "The server does not know the prompt: it was cancelled, or the server was restarted."
                )
            time.sleep(every)

    def run(self, workflow: Workflow) -> list[dict[str, str]]:
        """Post a workflow and wait for its images. Ctrl-C cancels it on the server, too."""
        prompt_id = self.running = self.queue(workflow)
        try:
            return self.wait(prompt_id)
        except KeyboardInterrupt:
            self.cancel(prompt_id)
            raise
        finally:
            self.running = None

    def cancel(self, prompt_id: str) -> None:
        """Take a prompt from the queue, or stop it if it runs. Other prompts go on."""
        self.post("/queue", {"delete": [prompt_id]})
        self.post("/interrupt", {"prompt_id": prompt_id})

    def download(self, image: dict[str, str]) -> bytes:
        """The bytes of a saved image."""
        try:
            return self.request("/view?" + urllib.parse.urlencode(image))
        except RunError as error:
            if isinstance(error, UnreachableError):
                raise
            raise RunError(
                f"{image['filename']} is no longer in the server's output folder ({error}). A prompt like the one "
                "before is answered from the cache, with its file names: change the seed, or POST to /free."
            ) from error


def refusal(status: int, body: bytes) -> str:
    """Why the server refused a request."""
    try:
        return complaints(json.loads(body))
    except (ValueError, KeyError):
        return f"HTTP {status}: {body.decode(errors='replace')[:300]}".rstrip(": \n")


def complaints(answer: dict[str, Any]) -> str:
    """What the server has against a prompt: a line for all of it, and one for each bad input."""
    errors = [("", answer["error"])] if answer.get("error") else []
    for number, node in answer["node_errors"].items():
        errors += [(f"{node['class_type']} (node {number}): ", error) for error in node["errors"]]
    return "\n".join(f"{where}{error['message']}: {error['details']}".rstrip(": ") for where, error in errors)


def saved_images(done: dict[str, Any]) -> list[dict[str, str]]:
    """The images that SaveImage nodes list in a prompt's history.

    Raises:
        RunError: the prompt failed, was interrupted, or saved nothing.
    """
    for event, data in done["status"]["messages"]:
        if event == "execution_error":
            raise RunError(f"{data['node_type']} (node {data['node_id']}): {data['exception_message'].strip()}")
        if event == "execution_interrupted":
            raise RunError(f"Interrupted at {data['node_type']} (node {data['node_id']}).")
    images = [
        {key: image[key] for key in ("filename", "subfolder", "type")}
        for shown in done["outputs"].values()
        for image in shown.get("images", [])
        if image["type"] == "output"  # previews are of type temp
    ]
    if not images:
        raise RunError("The workflow saved no image. Does it end with Save Image?")
    return images


def load_workflow(path: Path) -> Workflow:
    """Read a workflow in API format."""
    workflow: Workflow = json.loads(path.read_text(encoding="utf-8"))
    if "nodes" in workflow:
        raise RunError(f"{path} is in the page's format. In ComfyUI, open it and choose File, Export (API).")
    return workflow


def set_input(workflow: Workflow, key: str, value: Any) -> None:
    """Set an input of all nodes with a title or class, by a key such as "FaithDiffSampler.seed"."""
    found = False
    for node in workflow.values():
        for field in node["inputs"]:
            if key in (f"{node['class_type']}.{field}", f"{title(node)}.{field}"):
                node["inputs"][field] = value
                found = True
    if not found:
        known = [
            f"{title(node)}.{field}"
            for node in workflow.values()
            for field, value in node["inputs"].items()
            if not isinstance(value, list)  # a link
        ]
        raise RunError(f"The workflow has no {key}. It has: {', '.join(sorted(known))}.")


def title(node: dict[str, Any]) -> str:
    """A node's title, or its class if it has none."""
    return str(node.get("_meta", {}).get("title") or node["class_type"])
