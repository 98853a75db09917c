"""Restore an image, or all images of a folder, on a running ComfyUI over HTTP. Needs Python, nothing else.

python restore_over_http.py photo.jpg -o restored.png --prompt "a harbour at dawn" --seed 7
python restore_over_http.py images -o restored --captions
python restore_over_http.py images -o restored --server http://one:8188 --server http://two:8188
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comfy_client import (
    ComfyServer,
    LostPromptError,
    RunError,
    UnreachableError,
    Workflow,
    load_workflow,
    set_input,
)

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "api" / "faithdiff_2x.json"
POSITIVE = "Positive: what is in the image"
"""Title of the node with the prompt, in all workflows of this pack."""

SERVER = "http://127.0.0.1:8188"

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
"""Names by which images are found in a folder."""

TRIES = 3
"""How often an image is given to a server before it counts as the one that brings servers down."""

LOOK_EVERY = 2.0
"""Seconds between two looks at a server that does not answer."""

Job = tuple[Path, Path]
"""An image, and where its result goes."""


class Spread:
    """Gives images to servers, to each the next one when it has finished one.

    What a server had when it stopped answering goes to another; when it answers again, it gets images again. A single
    server that does not answer ends the run.

    Args:
        jobs: what is to be done.
        servers: where.
        work: restores an image on a server.
        patience: seconds to wait for an answer while no server gives one.

    Attributes:
        restored: number of images done, by server.
        failures: a line for each image that failed.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        servers: Sequence[ComfyServer],
        work: Callable[[ComfyServer, Job], None],
        patience: float = 0.0,
    ) -> None:
        self._waiting = deque(jobs)
        self._servers = servers
        self._work = work
        self._patience = patience
        self._lock = threading.Lock()
        self._tries: Counter[Job] = Counter()
        self._running = 0
        self._stop = threading.Event()
        self._answered = time.monotonic()
        self.restored: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(self) -> None:
        """Work until all is done, or no server answers any more. Ctrl-C cancels what runs, on the servers, too."""
        if len(self._servers) == 1:
            self._serve(self._servers[0])
            return
        threads = [threading.Thread(target=self._serve, args=(server,), daemon=True) for server in self._servers]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                threads[0].join(0.2)  # a join without end hears no Ctrl-C on Windows
                time.sleep(0.05)
        except KeyboardInterrupt:
            self._stop.set()
            for server in self._servers:
                if server.running is not None:
                    server.cancel(server.running)
            raise

    def _serve(self, server: ComfyServer) -> None:
        """Do jobs on one server."""
        while not self._stop.is_set():
            job = self._next()
            if job is None:
                if not self._running:
                    return
                time.sleep(0.1)  # another server may go down and leave its image
                continue
            source, target = job
            try:
                self._work(server, job)
            except (UnreachableError, LostPromptError) as error:
                self._give_back(server, job, error)
            except (RunError, OSError, ValueError) as error:
                self._fail(job, error)
            else:
                with self._lock:
                    self.restored[server.address] += 1
                    self._running -= 1
                    self._answered = time.monotonic()
                where = f" ({server.address})" if len(self._servers) > 1 else ""
                print(f"{source} -> {target}{where}\n", end="", flush=True)

    def _next(self) -> Job | None:
        with self._lock:
            if not self._waiting:
                return None
            self._running += 1
            return self._waiting.popleft()

    def _fail(self, job: Job, error: Exception) -> None:
        with self._lock:
            self.failures.append(f"failed: {job[0]}: {error}")
            self._running -= 1
            self._answered = time.monotonic()

    def _give_back(self, server: ComfyServer, job: Job, error: RunError) -> None:
        """Leave a job to other servers, and wait until this one answers again."""
        self._tries[job] += 1
        alone = len(self._servers) == 1
        if alone or self._tries[job] == TRIES:
            self._fail(job, error)
            if alone and isinstance(error, UnreachableError):
                self._stop.set()  # the others would fail, too; run it again to continue
            return
        with self._lock:
            self._waiting.appendleft(job)
            self._running -= 1
        print(f"{server.address} does not answer; {job[0].name} goes to another server\n", end="", file=sys.stderr)
        while not self._stop.is_set() and (self._waiting or self._running):
            if answers(server):
                self._answered = time.monotonic()
                print(f"{server.address} answers again\n", end="", file=sys.stderr)
                return
            with self._lock:
                nobody = not self._running and time.monotonic() - self._answered > self._patience
                if nobody and self._waiting and not self._stop.is_set():
                    self.failures.append(f"failed: {self._waiting.popleft()[0]}: {error}")
                    self._stop.set()  # run it again to continue
            self._stop.wait(LOOK_EVERY)


def answers(server: ComfyServer) -> bool:
    """Whether a server is there."""
    try:
        server.get("/queue")
    except (RunError, ValueError):
        return False
    return True


def restore(server: ComfyServer, workflow: Workflow, source: Path, target: Path, prompt: str | None) -> None:
    """Restore one image; if several are saved, the others are numbered."""
    workflow = copy.deepcopy(workflow)
    if prompt is not None:
        set_input(workflow, f"{POSITIVE}.text", prompt)
    set_input(workflow, "LoadImage.image", server.upload(source))
    contents = [server.download(image) for image in server.run(workflow)]
    target.parent.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(contents, 1):
        file = target if number == 1 else target.with_stem(f"{target.stem}_{number}")
        part = file.with_suffix(".part")  # a stopped run leaves no half image that looks done
        part.write_bytes(content)
        part.replace(file)


def find_jobs(source: Path, output: Path) -> list[tuple[Path, Path]]:
    """Images and where their results go. `output` is a folder if `source` is one, else a file."""
    if source.resolve() == output.resolve():
        raise RunError(f"{output} is the input. Choose another file or folder for the results.")
    if not source.is_dir():
        if output.suffix.lower() != ".png":
            raise RunError(f"Results are PNG files: {output} does not end in .png.")
        return [(source, output)]
    # macOS puts a file ._a.jpg, which is no image, beside a.jpg on foreign disks.
    images = sorted(f for f in source.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    if not images:
        raise RunError(f"There is no image in {source}: none ends in {', '.join(SUFFIXES)}.")
    stems = Counter(file.stem for file in images)  # a.jpg and a.png would both become a.png; they keep their endings
    return [(file, output / f"{file.stem if stems[file.stem] == 1 else file.name}.png") for file in images]


def prepare(args: argparse.Namespace) -> Workflow:
    """The workflow with all that the command line sets for every image."""
    workflow = load_workflow(args.workflow)
    for key, separator, text in (item.partition("=") for item in args.set):
        if not separator:
            raise RunError(f"--set {key} has no value. Write NODE.INPUT=VALUE.")
        set_input(workflow, key, value(text))
    if args.seed is not None:
        set_input(workflow, "FaithDiffSampler.seed", args.seed)
    if args.prompt is not None:
        set_input(workflow, f"{POSITIVE}.text", args.prompt)
    return workflow


def caption(source: Path) -> str | None:
    """The text of NAME.txt beside an image."""
    beside = source.with_suffix(".txt")
    return beside.read_text(encoding="utf-8").strip() if beside.exists() else None


def value(text: str) -> Any:
    """A value from the command line: JSON, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 if an image failed, or 130 after Ctrl-C; bad arguments exit with 2."""
    parser = argparse.ArgumentParser(description="Restore images on a running ComfyUI.")
    parser.add_argument("input", type=Path, help="an image or a folder of images")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a PNG file, or a folder if the input is one")
    parser.add_argument("--server", action="append", help=f"may be given several times; default: {SERVER}")
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="S", help="seconds to wait while no server of several answers"
    )
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="in API format; default: faithdiff_2x.json")
    parser.add_argument("--prompt", help="what is in the image")
    parser.add_argument("--captions", action="store_true", help="take the prompt from NAME.txt beside an image")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="a node by title or class"
    )
    parser.add_argument("--overwrite", action="store_true", help="overwrite existing outputs")
    args = parser.parse_args(arguments)
    try:
        jobs, workflow = find_jobs(args.input, args.output), prepare(args)
    except (RunError, OSError, ValueError) as error:
        parser.error(str(error))

    servers = [ComfyServer(address) for address in args.server or [SERVER]]
    todo = [job for job in jobs if args.overwrite or not job[1].exists()]

    def work(server: ComfyServer, job: Job) -> None:
        restore(server, workflow, *job, caption(job[0]) if args.captions else None)

    spread = Spread(todo, servers, work, args.patience)
    try:
        spread.run()
    except KeyboardInterrupt:
        return 130
    restored, failures = spread.restored.total(), spread.failures
    if len(servers) > 1:
        print(*(f"{server.address}: {spread.restored[server.address]} restored" for server in servers), sep="\n")
    left = len(todo) - restored - len(failures)
    counts = f"{restored} restored, {len(jobs) - len(todo)} skipped (done before), {len(failures)} failed"
    print(counts + (f", {left} not tried" if left else ""), flush=True)
    print(*failures, sep="\n", end="\n" if failures else "", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
