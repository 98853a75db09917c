"""The pack on a host that has only the packages of ComfyUI's own requirements.txt."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import comfy_host
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.blocked import run_without

DEMO = """
import json, sys
from pathlib import Path

sys.path.append(sys.argv[1])
import comfy_host

host = comfy_host.Host(Path(sys.argv[2]), Path(sys.argv[3]))
host.run(comfy_host.quick_demo(host.base))
print(json.dumps(sorted(host.node_ids)))
"""


def brought_by(requirements: Path) -> set[str]:
    """Names of the installed distributions that a requirements file asks for, and of all that these ask for."""
    lines = [line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    open_ones = [Requirement(line) for line in lines if line]
    found: set[tuple[str, str]] = set()
    while open_ones:
        requirement = open_ones.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in found:
                continue
            try:
                asked = metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # for another system
                continue
            found.add((name, extra))
            more = [Requirement(line) for line in asked]
            open_ones += [one for one in more if one.marker is None or one.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def test_nodes_load_and_restore_with_what_comfyui_brings(host_path: Path, tmp_path: Path) -> None:
    brought = brought_by(host_path / "requirements.txt")
    others = {
        package
        for package, distributions in metadata.packages_distributions().items()
        if brought.isdisjoint(canonicalize_name(name) for name in distributions)
    }
    assert {"accelerate", "cv2", "diffusers", "peft", "skimage"} <= others
    assert {"torch", "transformers", "safetensors"}.isdisjoint(others)
    done = run_without(
        others - {"faithdiff_core"}, DEMO, str(comfy_host.REPO / "tools"), str(host_path), str(tmp_path / "base")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    nodes = json.loads(done.stdout.splitlines()[-1])
    assert {name for name in nodes if name.startswith("FaithDiff")} == comfy_host.NODES
