"""Installed into a clean ComfyUI and removed again, by comfy-cli and ComfyUI-Manager, from sources on this machine.

Three ways lead into `custom_nodes`: a git clone (by hand, or by the Manager from an address), the registry's archive
(by the Manager from the registry, here a few files behind a local web server), and a zip unpacked by hand.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests
from comfy_host import NODES, REPO, Server, quick_demo
from support import installing

import faithdiff_core

pytestmark = installing.needs_git

WORKFLOWS = {path.stem for path in (REPO / "workflows").glob("*.json")}

OWN_FOLDERS = {".git", ".venv", "custom_nodes", "input", "models", "output", "temp", "user", "venv"}
"""Of a ComfyUI: what its owner put there."""

MANAGER = """
import asyncio, os, sys
sys.path.append(os.environ["COMFYUI_PATH"])
import utils.extra_config  # of the host, before others of that name
from comfyui_manager.common import cnr_utils
cnr_utils.base_url = sys.argv.pop(1)
from cm_cli.__main__ import main
assert asyncio.run(cnr_utils.get_cnr_data(cache_mode=False, dont_wait=False)), "the registry was not read"
main()
"""
"""ComfyUI-Manager's command line with another address of the registry, whose list of packs it reads first."""


@dataclass(frozen=True)
class CleanHost:
    """A copy of a ComfyUI as it is when newly installed.

    Attributes:
        path: of the copy.
        environment: variables for all that runs on it.
    """

    path: Path
    environment: dict[str, str]

    @property
    def pack(self) -> Path:
        """Where the pack is when it is installed."""
        return self.path / "custom_nodes" / "faithdiff"

    def comfy(self, *words: str) -> str:
        """Run comfy-cli on this host."""
        return installing.comfy(["--workspace", str(self.path), *words], self.environment, self.path)

    def start(self, *arguments: str) -> Server:
        """The host's server."""
        return Server(self.path, self.path, arguments, packs={}, environment=self.environment)


def installed_packages() -> set[tuple[str, str]]:
    """Names and versions of this Python's packages."""
    return {(one.name, one.version) for one in metadata.distributions()}


@pytest.fixture
def clean_host(host_path: Path, tmp_path: Path) -> Iterator[CleanHost]:
    """A clean ComfyUI; nothing that is done to it may install a Python package."""
    path = tmp_path / "ComfyUI"
    skip = OWN_FOLDERS & {child.name for child in host_path.iterdir()}
    shutil.copytree(
        host_path, path, symlinks=True, ignore=lambda folder, _: skip if Path(folder) == host_path else set()
    )
    settings = path / "user" / "__manager" / "config.ini"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nnetwork_mode = offline\n")
    for folder in ("custom_nodes", "models"):
        (path / folder).mkdir()
    before = installed_packages()
    pip_log = tmp_path / "pip.log"
    yield CleanHost(path, installing.closed_environment(tmp_path) | {"PIP_LOG": str(pip_log)})
    assert installed_packages() == before
    # The Manager lists packages with pip; the words below are those of an installation, be it of what is there.
    lines = pip_log.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.search(r"Collecting|Requirement already|ERROR", line)] == []


@dataclass(frozen=True)
class Site:
    """A web server with the repository to clone, and the registry's answers and archive.

    Attributes:
        address: such as "http://127.0.0.1:8123".
        repository: where the next version is made.
        bare: the repository that is cloned from the address.
        environment: variables for git.
    """

    address: str
    repository: Path
    bare: Path
    environment: dict[str, str]

    def git(self, *words: str) -> None:
        """Run git in the repository."""
        installing.run(["git", *words], self.environment, self.repository)

    def publish(self) -> None:
        """Show the repository's last commit to those who clone it from the address."""
        self.git("push", "--quiet", str(self.bare), "HEAD")
        self.git("--git-dir", str(self.bare), "update-server-info")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The web server."""
    folder = tmp_path_factory.mktemp("site")
    home = tmp_path_factory.mktemp("home")
    repository = installing.make_repository(home / "faithdiff")
    shutil.move(installing.pack(repository, home), folder / "node.zip")
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        version = {"version": faithdiff_core.__version__}
        pack = {"id": "faithdiff", "name": "FaithDiff", "latest_version": version}
        answers = {
            "nodes/index.html": {"nodes": [pack], "totalPages": 1},
            "nodes/faithdiff/install": {"id": "1", **version, "downloadUrl": f"{address}/node.zip"},
        }
        for name, answer in answers.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(answer))
        Thread(target=server.serve_forever, daemon=True).start()
        site = Site(address, repository, folder / "faithdiff.git", installing.closed_environment(home))
        site.git("init", "--quiet", "--bare", str(site.bare))
        site.publish()
        yield site
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder without a line for each file."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def check_running(server: Server) -> None:
    """All that the pack brings is there."""
    log = server.log.read_text(errors="replace")
    assert "IMPORT FAILED" not in "".join(line for line in log.splitlines() if "faithdiff" in line)
    assert set(server.get("/object_info")) >= NODES
    for node in NODES:
        page = requests.get(f"{server.url}/extensions/faithdiff/docs/{node}.md", timeout=60)
        assert page.text == (REPO / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    assert set(server.get("/workflow_templates")["faithdiff"]) == WORKFLOWS
    workflow = REPO / "workflows" / "faithdiff_2x.json"
    assert server.get(f"/api/workflow_templates/faithdiff/{workflow.name}") == json.loads(workflow.read_text("utf-8"))
    assert set(server.get("/i18n")["ja"]["nodeDefs"]) >= NODES
    assert "FaithDiff Restore" in {blueprint["name"] for blueprint in server.get("/global_subgraphs").values()}


def check_gone(host: CleanHost) -> None:
    """The folder is gone."""
    assert not host.pack.exists()
    assert "faithdiff" not in " ".join(path.name for path in (host.path / "custom_nodes").iterdir()).lower()


def test_from_a_git_address_by_the_manager(clean_host: CleanHost, site: Site) -> None:
    said = clean_host.comfy("node", "install", f"{site.address}/faithdiff.git", "--mode", "local", "--exit-on-fail")
    assert "[INSTALLED]" in said
    git = ["git", "status", "--porcelain", "--ignored"]
    assert installing.run(git, clean_host.environment, clean_host.pack) == ""
    cloned = installing.run(["git", "ls-files", "-z"], clean_host.environment, clean_host.pack)
    assert cloned.split("\0")[:-1] == installing.tracked_files()

    server = clean_host.start("--enable-manager")
    try:
        check_running(server)
        assert "[START] ComfyUI-Manager" in server.log.read_text(errors="replace")
        (entry,) = server.get("/v2/customnode/installed").values()
        assert entry["enabled"] is True
    finally:
        server.stop()

    (site.repository / "NEWS").touch()
    installing.commit_all(site.repository)
    site.publish()
    assert "[  UPDATED  ]" in clean_host.comfy("node", "update", "faithdiff", "--mode", "local")
    assert (clean_host.pack / "NEWS").exists()

    assert "[UNINSTALLED]" in clean_host.comfy("node", "uninstall", "faithdiff", "--mode", "local")
    check_gone(clean_host)

    server = clean_host.start()
    try:
        assert NODES.isdisjoint(server.get("/object_info"))
        assert "faithdiff" not in server.get("/workflow_templates")
    finally:
        server.stop()


def test_from_the_registry_by_the_manager(clean_host: CleanHost, site: Site) -> None:
    environment = clean_host.environment | {"COMFYUI_PATH": str(clean_host.path)}
    said = installing.run(
        [sys.executable, "-c", MANAGER, site.address, "install", "faithdiff", "--mode", "cache", "--exit-on-fail"],
        environment,
        clean_host.path,
    )
    assert f"[{faithdiff_core.__version__}]" in said
    unpacked = {path.relative_to(clean_host.pack).as_posix() for path in clean_host.pack.rglob("*") if path.is_file()}
    by_hand = clean_host.path / "by_hand.zip"
    by_hand.write_bytes(requests.get(f"{site.address}/node.zip", timeout=60).content)
    assert unpacked - {".tracking"} == set(zipfile.ZipFile(by_hand).namelist())

    server = clean_host.start()
    try:
        check_running(server)
        server.run(quick_demo(server.base))  # the demo model came along
    finally:
        server.stop()

    assert "[UNINSTALLED]" in clean_host.comfy("node", "uninstall", "faithdiff", "--mode", "local")
    check_gone(clean_host)
