"""Fixtures for the tests on a real ComfyUI; without one they are skipped, and the summary says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import comfy_host
import pytest
from comfy_host import FOLDER_VARIABLE, packs_folder
from support.other_packs import NO_PACKS

HERE = Path(__file__).resolve().parent

WITHOUT_HOST = "no ComfyUI found"
WITHOUT_BROWSER = "no Chromium, chromedriver or selenium found"
WITHOUT_PACKS = f"{FOLDER_VARIABLE} is not set"
LOUD = {WITHOUT_HOST: comfy_host.NO_HOST, WITHOUT_BROWSER: comfy_host.NO_BROWSER, WITHOUT_PACKS: NO_PACKS}
"""What the summary says once about each reason."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a host or a browser that is not there."""
    mine = [item for item in items if HERE in item.path.parents]
    if not mine:
        return
    try:
        found = comfy_host.find_host()
    except comfy_host.HostError as error:
        raise pytest.UsageError(str(error)) from error
    # Other packs change the host that the tests of this process share, so what loads them comes last.
    items.sort(key=lambda item: "packs" in getattr(item, "fixturenames", ()))
    for item in mine:
        fixtures = getattr(item, "fixturenames", ())
        if found is None:
            item.add_marker(pytest.mark.skip(reason=WITHOUT_HOST))
        elif "browser" in fixtures and comfy_host.find_browser() is None:
            item.add_marker(pytest.mark.skip(reason=WITHOUT_BROWSER))
        elif "packs" in fixtures and packs_folder() is None:
            item.add_marker(pytest.mark.skip(reason=WITHOUT_PACKS))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly what was not tested; several processes may have skipped for the same reason."""
    skipped = {str(report.longrepr) for report in terminalreporter.getreports("skipped")}
    for reason, text in LOUD.items():
        if any(reason in line for line in skipped):
            terminalreporter.write_line(text, red=True, bold=True)


@pytest.fixture(scope="session")
def host_path() -> Path:
    """The ComfyUI folder."""
    path = comfy_host.find_host()
    assert path is not None  # without one the test was skipped
    return path


@pytest.fixture(scope="session")
def host(host_path: Path, tmp_path_factory: pytest.TempPathFactory) -> comfy_host.Host:
    """ComfyUI in this process, started once."""
    return comfy_host.Host(host_path, tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="session")
def packs() -> Path:
    """The folder with clones of other packs; a test that loads them has to ask for it."""
    folder = packs_folder()
    assert folder is not None  # without one the test was skipped
    return folder


@pytest.fixture(scope="module")
def server(host_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[comfy_host.Server]:
    """ComfyUI's server in a process of its own, started once a module."""
    server = comfy_host.Server(host_path, tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser(server: comfy_host.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[comfy_host.Page]:
    """The server's web page in headless Chromium, opened."""
    found = comfy_host.find_browser()
    assert found is not None  # without one the test was skipped
    page = comfy_host.Page(server, *found, tmp_path_factory.mktemp("chromium"))
    try:
        page.open()
        yield page
    finally:
        page.close()
