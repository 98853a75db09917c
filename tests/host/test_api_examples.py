"""docs/api.md: its commands, programs and answers, run against the real server and compared."""

from __future__ import annotations

import doctest
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy_client
import numpy as np
import pytest
import restore_over_http
from comfy_host import REPO, PromptRejectedError, Server
from PIL import Image

EXAMPLES = REPO / "docs" / "examples"
API = REPO / "workflows" / "api"


DOCUMENT = (REPO / "docs" / "api.md").read_text(encoding="utf-8")
DEFAULT = "127.0.0.1:8188"
"""The address in the document, which is replaced by the server's."""

RUNNABLE = ("sh", "console", "python")
LONG = 500
"""Steps of a prompt that does not end on its own."""


def sections() -> dict[str, list[tuple[str, str]]]:
    """The document's code blocks by section, each with its language."""
    found: dict[str, list[tuple[str, str]]] = {}
    for section in DOCUMENT.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        found[title] = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found


SECTIONS = sections()


def blocks(section: str, language: str) -> list[str]:
    """A section's blocks in a language."""
    return [text for kind, text in SECTIONS[section] if kind == language]


@pytest.fixture(scope="module")
def server(host_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the options that the document starts it with, at another port."""
    first = blocks("Start the server", "sh")[0].split()
    assert first[:2] == ["python", "main.py"]
    port = first.index("--port")
    assert f"{first[first.index('--listen') + 1]}:{first[port + 1]}" == DEFAULT
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # small tensors: on a busy machine threads cost more than all the rest
        server = Server(host_path, tmp_path_factory.mktemp("api"), (*first[2:port], *first[port + 2 :]))
    yield server
    server.stop()


class Project:
    """This pack's folder as the document's reader has it, with the demo model in the place of the large one.

    Attributes:
        folder: with docs/examples, workflows, photo.jpg and images.
        server: where its commands go.
    """

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        for source in EXAMPLES.glob("*.py"):
            text = self.here(source.read_text(encoding="utf-8"))
            for target in (folder / "docs" / "examples" / source.name, folder / source.name):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
        (folder / "workflows" / "api").mkdir(parents=True)
        (folder / "workflows" / "api" / "faithdiff_2x.json").write_text(json.dumps(small_workflow()))
        (folder / "workflows" / "faithdiff_2x.json").write_text(json.dumps(small_page_workflow()))
        photograph = Image.fromarray(photograph_pixels())
        (folder / "images").mkdir()
        photograph.crop((180, 80, 228, 112)).save(folder / "photo.jpg", quality=95)
        # Two sizes of results in all: the first image of a size takes seconds, the others tenths.
        photograph.crop((100, 60, 172, 108)).save(folder / "images" / "boat.jpg", quality=95)
        photograph.crop((200, 90, 248, 122)).save(folder / "images" / "harbour.png")
        (folder / "images" / "broken.jpg").write_text("not an image")
        (folder / "images" / "boat.txt").write_text("A drawing.\n", encoding="utf-8")

    def here(self, text: str) -> str:
        """A text with this server's address."""
        return text.replace(DEFAULT, self.server.url.removeprefix("http://"))

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the folder, with its errors among its output. It finds a home of its own."""
        home = self.folder / "home"
        settings = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_CACHE_HOME": str(home / "cache"),
            "DO_NOT_TRACK": "1",
            "COMFY_CLI_NO_REMOTE_REFRESH": "1",
            "COMFY_LOCAL_URL": self.server.url,
        }
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, **settings, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )

    def shell(self, text: str, **environment: str) -> str:
        """Run a block of commands and return the output."""
        done = self.run(["bash", "-euo", "pipefail", "-c", self.here(text)], **environment)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def python(self, text: str) -> str:
        """Run a program and return the output."""
        done = self.run([sys.executable, "-c", self.here(text)])
        assert done.returncode == 0, done.stdout
        return done.stdout

    def console(self, text: str) -> None:
        """Run the commands of a console block and compare what they say; "..." stands for anything."""
        checker = doctest.OutputChecker()
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
            done = self.run(["bash", "-c", self.here(command)])
            assert checker.check_output(expected, done.stdout, doctest.ELLIPSIS), done.stdout
            assert done.returncode == (1 if "failed: " in expected else 0)

    def workflow(self) -> dict[str, Any]:
        """The workflow that stands for faithdiff_2x."""
        found: dict[str, Any] = json.loads((self.folder / "workflows" / "api" / "faithdiff_2x.json").read_text())
        return found

    def expected(self, source: str, **values: Any) -> np.ndarray:
        """What an image becomes with some inputs, given as NODE_INPUT with the nodes' numbers; nothing is cached."""
        workflow = self.workflow()
        name = f"expected_{len(list((self.server.base / 'input').iterdir()))}.png"
        workflow["1"]["inputs"]["image"] = self.server.upload(self.folder / source, name)
        for key, value in values.items():
            _, number, field = key.split("_", 2)
            workflow[number]["inputs"][field] = value
        (image,) = self.server.run(workflow).images
        return pixels(self.server.view(image))

    def result(self, name: str) -> np.ndarray:
        """An image that a command has written."""
        return pixels((self.folder / name).read_bytes())


def pixels(content: bytes) -> np.ndarray:
    """An image's pixels."""
    return np.asarray(Image.open(io.BytesIO(content)))


def photograph_pixels() -> np.ndarray:
    """A real photograph."""
    from skimage import data

    return np.asarray(data.chelsea())


def numbers() -> dict[str, int]:
    """The nodes' numbers in faithdiff_2x by title; the demo's models take the checkpoint's."""
    large = json.loads((API / "faithdiff_2x.json").read_text())
    found = {comfy_client.title(node): int(number) for number, node in large.items()}
    return {**found, "FaithDiffDemoModels": found["SDXL checkpoint (CLIP and VAE)"]}


def small_workflow() -> dict[str, Any]:
    """The demo workflow with the numbers of faithdiff_2x and few steps."""
    demo, found = json.loads((API / "faithdiff_demo.json").read_text()), numbers()
    renamed = {number: str(found[comfy_client.title(node)]) for number, node in demo.items()}
    for node in demo.values():
        for field, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][field] = [renamed[value[0]], value[1]]
    small = {renamed[number]: node for number, node in demo.items()}
    small["9"]["inputs"]["steps"] = 2
    return small


def small_page_workflow() -> dict[str, Any]:
    """The same in the page's format: the page's demo with Load Image in the place of its sample."""
    page: dict[str, Any] = json.loads((API.parent / "faithdiff_demo.json").read_text())
    large: dict[str, Any] = json.loads((API.parent / "faithdiff_2x.json").read_text())
    found, renamed = numbers(), {}
    page["extra"] = {}
    (compare,) = [node["id"] for node in page["nodes"] if node["type"] == "FaithDiffCompare"]
    page["links"] = [link for link in page["links"] if link[3] != compare]
    page["nodes"] = [node for node in page["nodes"] if node["type"] not in ("MarkdownNote", "FaithDiffCompare")]
    (image,) = [node for node in large["nodes"] if node["type"] == "LoadImage"]
    (models,) = [node for node in page["nodes"] if node["type"] == "FaithDiffDemoModels"]
    (link,) = [link for link in page["links"] if link[1] == models["id"] and link[2] == 4]
    image["id"] = page["last_node_id"] + 1
    link[1:3] = [image["id"], 0]
    models["outputs"][4]["links"] = image["outputs"][1]["links"] = None
    image["outputs"][0]["links"] = [link[0]]
    page["nodes"].append(image)
    kept = {link[0] for link in page["links"]}
    for node in page["nodes"]:
        for output in node["outputs"]:
            output["links"] = [number for number in output["links"] or [] if number in kept] or None
    for node in page["nodes"]:
        renamed[node["id"]] = node["id"] = found[node.get("title", node["type"])]
        if node["type"] == "FaithDiffSampler":
            node["widgets_values"][node["widgets_values"].index(12)] = 2
    for link in page["links"]:
        link[1], link[3] = renamed[link[1]], renamed[link[3]]
    return page


@pytest.fixture(scope="module")
def project(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The folder in which the document's commands are run, one section after the other."""
    return Project(tmp_path_factory.mktemp("project"), server)


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip a test without these programs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


# -------------------------------------------------------------------------------------------------- the document


def test_no_block_is_left_out() -> None:
    """Sections with blocks are those that the tests below run; a new one needs a new test."""
    found = {title: {language for language, _ in kinds} for title, kinds in SECTIONS.items() if kinds}
    assert found == {
        "Start the server": {"sh"},
        "One image": {"console"},
        "A folder of images": {"console"},
        "A sweep": {"console"},
        "In your own program": {"python"},
        "With curl": {"sh"},
        "With comfy-cli": {"sh"},
        "Cancel": {"sh"},
        "Errors": {"json", "console"},
    }


@needs("curl")
def test_start_the_server(project: Project) -> None:
    """The first command is the fixture's; the second waits for it."""
    _, ready = blocks("Start the server", "sh")
    assert "comfyui_version" in json.loads(project.shell(ready))["system"]


def test_one_image(project: Project) -> None:
    for text in blocks("One image", "console"):
        project.console(text)
    expected = project.expected("photo.jpg", node_5_text="a harbour at dawn", node_9_seed=7)
    assert expected.shape == (64, 96, 3)
    assert np.array_equal(project.result("restored.png"), expected)
    other = {"node_5_text": "a harbour", "node_9_seed": 8, "node_4_scale_by": 3, "node_11_color_fix": "wavelet"}
    larger = project.result("larger.png")
    assert larger.shape == (96, 144, 3)
    assert np.array_equal(larger, project.expected("photo.jpg", **other))


def test_a_folder(project: Project) -> None:
    """One of three is broken; a second run does that one only, when it is mended."""
    (text,) = blocks("A folder of images", "console")
    project.console(text)
    restored = project.folder / "restored"
    assert sorted(file.name for file in restored.iterdir()) == ["boat.png", "harbour.png"]
    assert np.array_equal(
        project.result("restored/boat.png"), project.expected("images/boat.jpg", node_5_text="A drawing.")
    )
    expected = project.expected("images/harbour.png", node_5_text="a photograph")
    assert np.array_equal(project.result("restored/harbour.png"), expected)
    assert not np.array_equal(expected, project.expected("images/harbour.png", node_5_text="A drawing."))

    before = {file: file.stat().st_mtime_ns for file in restored.iterdir()}
    shutil.copy(project.folder / "photo.jpg", project.folder / "images" / "broken.jpg")
    command = text.splitlines()[0].removeprefix("$ ")
    assert "1 restored, 2 skipped (done before), 0 failed" in project.shell(command)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert (restored / "broken.png").is_file()
    assert "0 restored, 3 skipped (done before), 0 failed" in project.shell(command)


def test_a_sweep(project: Project) -> None:
    (text,) = blocks("A sweep", "console")
    project.console(text)
    swept = project.folder / "swept"
    for cfg, color_fix in ((1, "adain"), (3, "wavelet")):
        result = project.result(f"swept/images/photo/cfg-{cfg}_color_fix-{color_fix}.png")
        assert np.array_equal(result, project.expected("photo.jpg", node_9_cfg=cfg, node_11_color_fix=color_fix))
    (swept / "images" / "photo" / "cfg-1_color_fix-adain.png").unlink()
    command = text.splitlines()[0].removeprefix("$ ")
    assert "1 made, 3 there before, 0 failed" in project.shell(command)
    assert "3 made, 1 there before" in project.shell(command.replace("3", "2").replace("adain", "none"))
    assert project.result("swept/sheet.png").shape[2] == 3


def test_programs(project: Project) -> None:
    plain, progress = blocks("In your own program", "python")
    project.python(plain)
    said = project.python(progress).splitlines()
    results = [project.result(f"seed_{seed}.png") for seed in (1, 2, 3)]
    assert np.array_equal(results[2], project.expected("photo.jpg", node_9_seed=3))
    assert not np.array_equal(results[0], results[1])
    # Of what the program before has left in the cache, a new seed needs all.
    nodes = [line for line in said if not line.startswith(" ")]
    assert nodes == ["FaithDiffSampler", "FaithDiffTiledVAEDecode", "FaithDiffFinishImage", "SaveImage"]
    assert said[said.index("FaithDiffSampler") :][:3] == ["FaithDiffSampler", "  1 of 2", "  2 of 2"]
    assert np.array_equal(project.result("restored_99.png"), project.expected("photo.jpg", node_9_seed=99))


@needs("curl", "jq")
def test_curl(project: Project) -> None:
    first, others = blocks("With curl", "sh")
    assert project.shell(first) == "success\n"
    expected = project.expected("photo.jpg", node_5_text="a harbour at dawn", node_9_seed=5)
    assert np.array_equal(project.result("with_curl.png"), expected)
    answers = project.shell(others)
    for text in ("queue_running", "FaithDiffSampler", "tile_batch"):
        assert text in answers
    posted = json.loads((project.folder / "prompt.json").read_text())["prompt"]
    assert executed(project.server, posted) == {node["class_type"] for node in posted.values()}, (
        "the cache is not empty"
    )


@needs("comfy", "jq")
def test_comfy_cli(project: Project) -> None:
    first, second = blocks("With comfy-cli", "sh")
    project.shell(first)
    project.shell(second)
    (file,) = (project.folder / "with_comfy_cli").iterdir()
    expected = project.expected("photo.jpg", node_5_text="a harbour at dawn", node_9_seed=6)
    assert np.array_equal(pixels(file.read_bytes()), expected)
    for command in re.findall(r"`(comfy workflow [^`]+)`", DOCUMENT):
        project.shell(command)


@needs("curl")
def test_cancel(project: Project, server: Server) -> None:
    """One that waits, and one that runs; the next one is not stopped."""
    (text,) = blocks("Cancel", "sh")
    workflow = project.workflow()
    workflow["1"]["inputs"]["image"] = server.upload(project.folder / "photo.jpg", "cancel.jpg")
    workflow["9"]["inputs"].update(steps=LONG, seed=1000)
    with server.submit(workflow) as running:
        running.wait_for(lambda kind, _: kind == "progress")
        workflow["9"]["inputs"]["seed"] = 1001
        with server.submit(workflow) as waiting:
            project.shell(text, ID=waiting.prompt_id)
            queue = server.get("/queue")
            assert [entry[1] for entry in queue["queue_running"]] == [running.prompt_id]
            assert queue["queue_pending"] == []
            with pytest.raises(comfy_client.RunError, match="does not know the prompt: it was cancelled"):
                comfy_client.ComfyServer(server.url).wait(waiting.prompt_id)
        project.shell(text, ID=running.prompt_id)
        assert running.wait(60).status == "execution_interrupted"
    with pytest.raises(comfy_client.RunError, match=r"^Interrupted at FaithDiffSampler \(node 9\)"):
        comfy_client.ComfyServer(server.url).wait(running.prompt_id)
    assert project.expected("photo.jpg").shape == (64, 96, 3)


def holds(part: Any, whole: Any) -> bool:
    """Whether an answer has all that the document shows of it."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and holds(part[key], whole[key]) for key in part)
    if isinstance(part, list) and part and not isinstance(part[0], str):
        return all(any(holds(one, other) for other in whole) for one in part)
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(holds, part, whole))
    return bool(part == whole)


def test_errors(project: Project, server: Server) -> None:
    refused, failed = (json.loads(text) for text in blocks("Errors", "json"))
    workflow = project.workflow()
    workflow["1"]["inputs"]["image"] = server.upload(project.folder / "photo.jpg")
    workflow["9"]["inputs"]["tile_size"] = 63
    with pytest.raises(PromptRejectedError) as rejected:
        server.run(workflow)
    assert rejected.value.status == 400
    assert holds(refused, rejected.value.body), rejected.value.body

    broken = project.folder / "no_image.jpg"
    broken.write_text("not an image either")
    workflow = project.workflow()
    workflow["1"]["inputs"]["image"] = server.upload(broken)
    result = server.run(workflow, check=False)
    assert holds(failed, server.history(result.prompt_id))
    for text in blocks("Errors", "console"):
        project.console(text)


def executed(server: Server, workflow: dict[str, Any]) -> set[str]:
    """Classes of the nodes that are run for a workflow."""
    result = server.run(workflow)
    status = server.history(result.prompt_id)["status"]
    cached = [node for event, data in status["messages"] if event == "execution_cached" for node in data["nodes"]]
    return {node["class_type"] for number, node in workflow.items() if number not in cached}


def test_what_runs_again(project: Project, server: Server) -> None:
    rows = re.findall(r"^\| (.+?) \|(.*)\|$", DOCUMENT.partition("| Changed |")[2], re.MULTILINE)
    assert len(rows) >= 5
    workflow = project.workflow()
    workflow["1"]["inputs"]["image"] = server.upload(project.folder / "photo.jpg", "again.jpg")
    new = {"seed": 77, "text": "another text", "color_fix": "none", "filename_prefix": "again"}
    for key, classes in rows:
        server.run(workflow)
        changed = json.loads(json.dumps(workflow))
        if key != "nothing":
            comfy_client.set_input(changed, key, new[key.rpartition(".")[2]])
        assert executed(server, changed) == set(filter(None, classes.strip().split(", "))), key


OTHER_NODES = {
    "faithdiff_batch_folder": ("FaithDiffRestoreFolder",) * 3,
    "faithdiff_photograph": ("FaithDiffSampler", "FaithDiffLoadImage", "FaithDiffSaveImage"),
}
"""Workflows whose seed, image or result is another node's than elsewhere: those that the document names."""


def test_the_titles_and_inputs_are_in_all_workflows() -> None:
    for path in sorted(API.glob("*.json")):
        workflow = comfy_client.load_workflow(path)
        restores, loads, saves = OTHER_NODES.get(path.stem, ("FaithDiffSampler", "LoadImage", "SaveImage"))
        for key in (f"{restores}.seed", "Positive: what is in the image.text", "Negative: empty.text"):
            comfy_client.set_input(workflow, key, 1)
        classes = [node["class_type"] for node in workflow.values()]
        assert classes.count(saves) == 1
        assert classes.count(loads) == 1


# -------------------------------------------------------------------------------------------------- the programs


@pytest.fixture
def restore(project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script in this process: returns exit code and output."""
    monkeypatch.chdir(project.folder)
    common = ("--workflow", str(project.folder / "workflows" / "api" / "faithdiff_2x.json"))

    def run(*words: str, server: str = project.server.url) -> tuple[int, str]:
        try:
            code = restore_over_http.main([*common, "--server", server, *words])
        except SystemExit as left:
            code = int(str(left.code))
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_server_that_is_not_there(restore: Any) -> None:
    """The folder's other images are not tried."""
    code, said = restore("images", "-o", "nowhere", server="127.0.0.1:9")
    assert code == 1
    assert "0 restored, 0 skipped (done before), 1 failed, 2 not tried" in said
    assert "No answer from http://127.0.0.1:9" in said


class Unsteady(http.server.ThreadingHTTPServer):
    """A second address of a server, which is down for a while after its second prompt has been posted."""

    daemon_threads = True

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.behind = behind
        self.posts = 0
        self.down_until = 0.0
        self.refused = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Forward(http.server.BaseHTTPRequestHandler):
    server: Unsteady

    def do_GET(self) -> None:
        self._forward(None)

    def do_POST(self) -> None:
        self._forward(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/prompt":
            self.server.posts += 1
            if self.server.posts == 2:
                self.server.down_until = time.monotonic() + 1.0

    def _forward(self, body: bytes | None) -> None:
        if time.monotonic() < self.server.down_until:
            self.server.refused += 1
            self.connection.close()
            return
        kind = {"Content-Type": self.headers.get("Content-Type", "")}
        with urllib.request.urlopen(urllib.request.Request(self.server.behind + self.path, body, kind)) as answer:
            content = answer.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def test_several_servers_one_of_which_goes_down_and_comes_back(
    restore: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image is restored as on one server, and the output says where."""
    monkeypatch.setattr(restore_over_http, "LOOK_EVERY", 0.1)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        Image.fromarray(photograph_pixels()[80 : 80 + 32, 10 * number : 10 * number + 48]).save(
            folder / f"{number}.png"
        )
    with Unsteady(server.url) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        code, said = restore(str(folder), "-o", str(tmp_path / "out"), "--server", other.url)
        other.shutdown()
    assert code == 0, said
    assert "10 restored, 0 skipped (done before), 0 failed" in said
    assert f"{other.url} does not answer; " in said
    assert f"{other.url} answers again" in said
    assert other.refused > 0
    done = {name: int(count) for name, count in re.findall(r"^(http\S+): (\d+) restored$", said, re.MULTILINE)}
    assert set(done) == {server.url, other.url}
    assert sum(done.values()) == 10
    assert min(done.values()) > 1  # the one that was down has worked before and after
    for name, count in done.items():
        assert said.count(f" ({name})\n") == count
    assert restore(str(folder), "-o", str(tmp_path / "alone"))[0] == 0
    for path in sorted((tmp_path / "out").iterdir()):
        assert np.array_equal(pixels(path.read_bytes()), pixels((tmp_path / "alone" / path.name).read_bytes()))


def test_several_servers_that_are_not_there(restore: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore_over_http, "LOOK_EVERY", 0.05)
    words = ("images", "-o", "nowhere", "--server", "127.0.0.1:7", "--patience", "0.2")
    code, said = restore(*words, server="127.0.0.1:9")
    assert code == 1
    assert "0 restored, 0 skipped (done before), 1 failed, 2 not tried" in said


def test_something_else_answers(restore: Any) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        code, said = restore("photo.jpg", "-o", "other.png", server=f"127.0.0.1:{other.server_port}")
        other.shutdown()
    assert code == 1
    assert "HTTP 501" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("photo.jpg", "-o", "x.jpg"), "Results are PNG files"),
        (("images", "-o", "images"), "is the input"),
        (("photo.jpg", "-o", "photo.jpg"), "is the input"),
        (("workflows", "-o", "x"), "There is no image in workflows"),
        (("photo.jpg", "-o", "x.png", "--set", "FaithDiffSampler.seeds=1"), "It has: "),
        (("photo.jpg", "-o", "x.png", "--set", "FaithDiffSampler.seed"), "Write NODE.INPUT=VALUE"),
        (("photo.jpg", "-o", "x.png", "--workflow", "workflows/faithdiff_2x.json"), "Export (API)"),
        (("photo.jpg", "-o", "x.png", "--workflow", "nothing.json"), "nothing.json"),
        (("photo.jpg", "-o", "x.png", "--workflow", "photo.jpg"), "error: "),
    ],
)
def test_bad_arguments(restore: Any, words: tuple[str, ...], message: str) -> None:
    code, said = restore(*words)
    assert code == 2
    assert message in said


def test_ctrl_c_cancels_on_the_server(restore: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_ids: list[str] = []

    def interrupted(_: float) -> None:
        prompt_ids.extend(entry[1] for entry in server.get("/queue")["queue_running"])
        if prompt_ids:
            raise KeyboardInterrupt

    monkeypatch.setattr(comfy_client.time, "sleep", interrupted)
    code, _ = restore("photo.jpg", "-o", "stopped.png", "--seed", "2000", "--set", f"FaithDiffSampler.steps={LONG}")
    monkeypatch.undo()
    assert code == 130
    with pytest.raises(comfy_client.RunError, match="Interrupted at"):
        comfy_client.ComfyServer(server.url).wait(prompt_ids[0])


def test_a_result_that_was_deleted(restore: Any, server: Server) -> None:
    """It is named; another name saves it again."""
    assert restore("photo.jpg", "-o", "gone.png", "--seed", "21", "--set", "SaveImage.filename_prefix=gone")[0] == 0
    for file in (server.base / "output").glob("gone*"):
        file.unlink()
    code, said = restore("photo.jpg", "-o", "again.png", "--seed", "21", "--set", "SaveImage.filename_prefix=gone")
    assert code == 1
    assert "gone_00001_.png is no longer in the server's output folder (HTTP 404)" in said
    assert restore("photo.jpg", "-o", "again.png", "--seed", "21", "--set", "SaveImage.filename_prefix=new")[0] == 0


def test_endings_are_kept_where_names_would_be_the_same(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.JPG", "c.txt", "._b.JPG"):
        (tmp_path / name).touch()
    targets = [target.name for _, target in restore_over_http.find_jobs(tmp_path, tmp_path / "out")]
    assert targets == ["a.jpg.png", "a.png.png", "b.png"]


def test_half_a_workflow_is_refused(project: Project, server: Server) -> None:
    """The server would run the output that is in order."""
    client, workflow = comfy_client.ComfyServer(server.url), project.workflow()
    comfy_client.set_input(workflow, "LoadImage.image", client.upload(project.folder / "photo.jpg"))
    workflow["50"] = {
        "class_type": "ImageScaleBy",
        "inputs": {"image": ["1", 0], "upscale_method": "nope", "scale_by": 2},
    }
    workflow["51"] = {"class_type": "SaveImage", "inputs": {"images": ["50", 0], "filename_prefix": "half"}}
    with pytest.raises(comfy_client.RunError, match=r"ImageScaleBy \(node 50\): Value not in list"):
        client.run(workflow)


def test_previews_are_no_results(project: Project, server: Server) -> None:
    client, workflow = comfy_client.ComfyServer(server.url), project.workflow()
    comfy_client.set_input(workflow, "LoadImage.image", client.upload(project.folder / "photo.jpg"))
    workflow["12"]["class_type"] = "PreviewImage"
    with pytest.raises(comfy_client.RunError, match="saved no image"):
        client.run(workflow)


def test_sixteen_bits(project: Project, server: Server) -> None:
    client, workflow = comfy_client.ComfyServer(server.url), project.workflow()
    comfy_client.set_input(workflow, "LoadImage.image", client.upload(project.folder / "photo.jpg"))
    workflow["12"]["class_type"] = "SaveImageAdvanced"
    workflow["12"]["inputs"] |= {"format": "png", "format.bit_depth": "8-bit", "format.input_color_space": "sRGB"}
    comfy_client.set_input(workflow, "SaveImageAdvanced.format.bit_depth", "16-bit")
    (image,) = client.run(workflow)
    content = client.download(image)
    assert content[24] == 16  # the bit depth in a PNG's header
    assert Image.open(io.BytesIO(content)).size == (96, 64)


def test_several_images_are_numbered(project: Project, server: Server, tmp_path: Path) -> None:
    client, workflow = comfy_client.ComfyServer(server.url), project.workflow()
    workflow["60"] = {
        "class_type": "RepeatImageBatch",
        "inputs": {"image": workflow["12"]["inputs"]["images"], "amount": 2},
    }
    workflow["12"]["inputs"]["images"] = ["60", 0]
    restore_over_http.restore(client, workflow, project.folder / "photo.jpg", tmp_path / "out" / "a.png", None)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.png", "a_2.png"]
