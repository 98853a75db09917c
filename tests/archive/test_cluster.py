"""Restoring on Ray: machines and the command itself are killed in the middle, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.archive import files, rows

from faithdiff_core.archive.cluster import places
from faithdiff_core.captions.tile_captions import TileCaptions
from faithdiff_core.cli import main
from faithdiff_core.tiling.layout import grid_layout

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "demo" / "model"
IMAGES = 60

pytest.importorskip("ray", reason="RAY IS NOT INSTALLED: RESTORING ON CLUSTERS IS NOT TESTED (the extra `cluster`)")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        (folder / str(number % 3)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / str(number % 3) / f"{number}.png")
        captions = TileCaptions(16, 24, grid_layout(16, 24, 2, 1), (f"Part {number}.", "Sea."))
        (folder / str(number % 3) / f"{number}.tiles.json").write_bytes(captions.to_json())
    return folder


def start(scans: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """The command with the demo model, in a process of its own."""
    # A relative path: the cluster's workers were started in another directory.
    command = [sys.executable, "-m", "faithdiff_core", *words(scans, Path(out.name)), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=out.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def words(scans: Path, out: Path) -> list[str]:
    """The command line."""
    model = ["--model", str(MODEL), "--faithdiff", str(MODEL / "faithdiff.safetensors")]
    settings = ["--steps", "1", "--captions", "tiles", "--device", "cpu", "--dtype", "fp32"]
    return ["restore", str(scans), "-o", str(out), *model, *settings]


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As many as Ray gives a worker with one CPU: sums in another order have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of Ray on this machine, each with one CPU."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # on a busy machine, workers of low priority never get their turn
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        options: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        # A machine that refuses connections is lost after 2.5 s instead of 15; one that is only slow still has 10.
        options["_system_config"] = {"health_check_period_ms": 500, "health_check_failure_threshold": 5}
        cluster = Cluster(initialize_head=True, head_node_args=options)
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        yield cluster
        cluster.shutdown()


def written(out: Path) -> list[dict[str, Any]]:
    """The rows that a running command has written."""
    manifest = out / "manifest.jsonl"
    text = manifest.read_text() if manifest.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(out: Path, process: subprocess.Popen[str], enough: Callable[[list[dict[str, Any]]], bool]) -> None:
    """Wait until the rows are enough."""
    while not enough(written(out)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.usefixtures("_one_thread")
def test_a_killed_command_and_a_killed_node(cluster: Any, scans: Path, tmp_path: Path) -> None:
    """All 60 results are the ordinary command's, byte for byte, and none is made twice."""
    out, plain = tmp_path / "out", tmp_path / "plain"
    address = f"ray:{cluster.address}"
    first = start(scans, out, "--workers", address)
    wait_for(out, first, lambda found: len(found) >= 10)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    done = {row["name"]: (out / row["name"]).stat().st_mtime_ns for row in written(out)}

    second = start(scans, out, "--workers", address)
    both = len(done) + 10
    wait_for(out, second, lambda found: len(found) >= both and len({row["worker"] for row in found[len(done) :]}) == 2)
    assert len(written(out)) < IMAGES - 5
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
    code, said = ended(second)
    assert code == 0, said
    assert main(words(scans, plain)) == 0

    assert files(out) == files(plain)
    assert len(files(out)) == IMAGES
    assert not list(out.rglob(".faithdiff*"))
    assert {name: row["state"] for name, row in rows(out).items()} == dict.fromkeys(files(out), "done")
    assert done.items() <= {name: (out / name).stat().st_mtime_ns for name in files(out)}.items()
    counts = next(line for line in said.splitlines() if " restored, " in line)
    assert counts.endswith(" 0 failed")
    restored, skipped = (int(part.split()[0]) for part in counts.split(", ")[:2])
    assert restored + skipped == IMAGES
    assert skipped >= len(done)


def test_processes_that_only_hand_images_on_import_no_torch() -> None:
    code = "import sys, faithdiff_core.archive.ray_data, faithdiff_core.archive.run; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_a_model_that_is_not_there(cluster: Any, scans: Path, tmp_path: Path) -> None:
    """The workers' message is the command's, as without a cluster."""
    code, said = ended(start(scans, tmp_path / "out", "--workers", f"ray:{cluster.address}", "--unet", "none.bin"))
    assert code == 1
    assert said.splitlines()[-1].startswith("error: There is no file none.bin")


@pytest.mark.parametrize(
    ("cpus", "gpus", "most"),
    [(1, 0, 8), (3, 0, 2), (1, 1, 4), (1, 2, 2), (1, 3, 1), (1, 5, 0), (1, 0.5, 8), (1, 0.3, 8), (0.5, 0.3, 12)],
)
def test_places_of_a_machine(cpus: float, gpus: float, most: int) -> None:
    """Eight CPUs and four GPUs: a worker's part of a GPU is on one GPU, so thirds and a rest do not add up."""
    assert places({"CPU": 8.0, "GPU": 4.0}, cpus, gpus) == most


@pytest.mark.parametrize("gpus", ["1.5", "-1", "nan", "inf"])
def test_parts_of_gpus_that_ray_does_not_share(
    gpus: str, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(scans, tmp_path / "out"), "--workers", "2", "--gpus-per-worker", gpus]) == 2
    said = capsys.readouterr().err
    assert "--gpus-per-worker" in said
    assert gpus in said
    assert not list(tmp_path.rglob("*.png"))
