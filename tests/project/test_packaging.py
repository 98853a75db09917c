"""What the registry, pip, make and pytest see of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support import installing

import faithdiff_core

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_version_is_the_same_everywhere(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == faithdiff_core.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", faithdiff_core.__version__)


def test_registry_finds_what_it_needs(project: dict[str, Any]) -> None:
    facts, comfy = project["project"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9._-]{0,99}", facts["name"])
    assert "comfyui" not in facts["name"]
    assert facts["license"] == "MIT"
    (license_file,) = facts["license-files"]
    assert (ROOT / license_file).read_text(encoding="utf-8").startswith("MIT License")
    assert facts["urls"]["Repository"].startswith("https://")
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert any(c.startswith("Operating System ::") for c in facts["classifiers"])
    assert any(c.startswith("Environment :: GPU ::") for c in facts["classifiers"])


def test_the_icon_is_as_the_registry_wants_it(project: dict[str, Any]) -> None:
    """Square, of at most 400 pixels, and at its address once this is the repository's main branch."""
    from PIL import Image

    address = project["tool"]["comfy"]["Icon"]
    raw = project["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com")
    assert address.startswith(f"{raw}/main/")
    with Image.open(ROOT / address.removeprefix(f"{raw}/main/")) as icon:
        assert icon.format in ("PNG", "JPEG", "GIF")
        assert icon.width == icon.height <= 400


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in the archive that comfy-cli would publish."""
    folder = tmp_path_factory.mktemp("packed")
    return zipfile.ZipFile(installing.pack(installing.make_repository(folder / "faithdiff"), folder)).namelist()


@installing.needs_git
def test_the_registrys_own_check_passes(tmp_path: Path) -> None:
    repository = installing.make_repository(tmp_path / "faithdiff")
    said = installing.comfy(["node", "validate"], installing.closed_environment(tmp_path), repository)
    assert "All validation checks passed successfully" in said
    assert "arning" not in said


@installing.needs_git
def test_the_archive_has_what_users_need(archive: list[str]) -> None:
    tracked = set(installing.tracked_files())
    parts = (
        "nodes/",
        "faithdiff_core/",
        "web/",
        "locales/",
        "workflows/",
        "subgraphs/",
        "demo/model/",
        "docs/",
        "assets/",
    )
    needed = {name for name in tracked if name.startswith(parts)}
    files = {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "CONTRIBUTING.md", "LICENSE"}
    assert set(archive) == needed | files
    assert len(archive) == len(set(archive))


@installing.needs_git
def test_links_of_the_archives_pages_lead_somewhere(archive: list[str]) -> None:
    for page in (name for name in archive if name.endswith(".md")):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
            path = os.path.normpath(os.path.join(os.path.dirname(page), target)).replace(os.sep, "/")
            assert path in archive or any(name.startswith(f"{path}/") for name in archive), f"{page}: {target}"


def test_one_folder_is_shown_as_templates() -> None:
    """A host takes each of these for the folder with the example workflows, and shows the files of one alone."""
    names = ("example_workflows", "example", "examples", "workflow", "workflows")
    assert [name for name in names if (ROOT / name).exists()] == ["workflows"]


def test_a_host_installs_nothing(project: dict[str, Any]) -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == []
    assert project["project"]["dependencies"] == []


def test_only_the_core_is_installed(project: dict[str, Any]) -> None:
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["faithdiff_core*"]
    code = "import importlib.util as u; print(u.find_spec('faithdiff_core') is not None, u.find_spec('nodes'))"
    out = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "None"]


def test_import_is_light() -> None:
    """How long it takes is the row `import` of the benchmarks."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import faithdiff_core\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    heavy = {"diffusers", "transformers", "PIL", "cv2", "safetensors", "accelerate", "peft", "comfy"}
    assert "faithdiff_core" in out.split()
    assert heavy.isdisjoint(out.split())


def test_collection_does_not_import_the_pack(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "__init__.py").write_text("from .nope import x\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text("def test_one():\n    assert True\n")
    for arguments in ([], ["tests/test_one.py"]):
        out = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stdout
        assert "1 passed" in out.stdout


def _make(*arguments: str, **environment: str) -> str:
    command = ["make", "--dry-run", "--no-print-directory", "--always-make", *arguments]
    env = {k: v for k, v in os.environ.items() if k not in ("COMFYUI_PATH", "MAKEFLAGS", "MAKELEVEL")} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMake:
    def test_test_runs_style_types_and_tests(self) -> None:
        out = _make("test")
        for command in ("-m venv .venv", "ruff check", "ruff format --check", "mypy -p", "-m pytest"):
            assert command in out
        assert "--constraint constraints.txt" in out

    def test_demo_installs_and_runs(self) -> None:
        out = _make("demo")
        assert "-m venv .venv" in out
        assert "demo/run.py" in out
        assert (ROOT / "demo" / "run.py").exists()

    def test_a_missing_host_is_said_loudly(self, tmp_path: Path) -> None:
        assert "HOST TESTS ARE SKIPPED" in _make("test", COMFYUI_PATH="")
        assert "HOST TESTS ARE SKIPPED" in _make("test", HOME=str(tmp_path))

    def test_a_hosts_requirements_are_installed(self, tmp_path: Path) -> None:
        host = tmp_path / "comfy" / "ComfyUI"
        host.mkdir(parents=True)
        (host / "main.py").touch()
        (host / "requirements.txt").touch()
        for out in (_make("test", HOME=str(tmp_path)), _make("test", COMFYUI_PATH=str(host))):
            assert f'--requirement "{host}/requirements.txt"' in out
            assert "SKIPPED" not in out

    def test_ci_runs_the_readmes_test_command(self, tmp_path: Path) -> None:
        """Whatever folder it is started from; a stand-in for make writes down how it was called."""
        stand_in = tmp_path / "make"
        stand_in.write_text('#!/bin/sh\necho "$PWD: $*" >> "$CALLS"\n')
        stand_in.chmod(0o755)
        calls = tmp_path / "calls"
        environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls)}
        subprocess.run([ROOT / ".ci" / "run"], cwd=tmp_path, env=environment, check=True)
        assert calls.read_text() == f"{ROOT}: test\n"
        assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_public_names_are_there_and_documented() -> None:
    for name in faithdiff_core.__all__:
        value = getattr(faithdiff_core, name)
        assert name == "__version__" or value.__doc__, name
    assert set(faithdiff_core.__all__) <= set(dir(faithdiff_core))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = faithdiff_core.nothing
