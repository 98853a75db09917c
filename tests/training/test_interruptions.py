"""Twenty interruptions of every kind, at random: the finished files are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.training import ROOT, SIZE, same_files

INTERRUPTIONS = 20

PROGRAM = """
import resource, sys, torch
torch.set_num_threads(1)
if int(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
from faithdiff_core.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""


def _start(config: Path, largest_file: int = 0) -> subprocess.Popen[bytes]:
    log = config.with_suffix(".log").open("ab")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PROGRAM, str(config), str(largest_file)]
    return subprocess.Popen(words, stdout=log, stderr=log, env=environment)


def _wait_for_steps(output: Path, process: subprocess.Popen[bytes], pause: float) -> None:
    """Wait until training has begun in this process, and then some time."""
    record = output / "run.json"
    before = record.stat().st_mtime_ns if record.exists() else 0
    while process.poll() is None and not (record.exists() and record.stat().st_mtime_ns != before):
        time.sleep(0.05)
    time.sleep(pause)


@pytest.mark.slow
def test_twenty_interruptions_change_nothing(base: Path, images: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    values = {
        "base": str(base),
        "output": str(tmp_path / "whole"),
        "data": {"folder": str(images), "size": SIZE, "degradation": {"scale": 2}},
        "stages": [
            {"stage": 1, "steps": 60, "learning_rate": 1e-3, "warmup": 2},
            {"stage": 2, "steps": 60, "learning_rate": 1e-3, "lq_learning_rate": 1e-3, "warmup": 2},
        ],
        "batch": 2,
        "workers": 1,
        "save_precision": "fp32",
        "checkpoint_every": 4,
        "tensorboard": False,
    }
    whole, broken = tmp_path / "whole.yaml", tmp_path / "broken.yaml"
    whole.write_text(yaml.safe_dump(values))
    broken.write_text(yaml.safe_dump(values | {"output": str(tmp_path / "broken")}))
    assert _start(whole).wait(1800) == 0

    codes: dict[str, list[int]] = {"interrupt": [], "kill": [], "image": [], "disk": []}
    kinds = [kind for kind in codes for _ in range(INTERRUPTIONS // len(codes))]
    rng.shuffle(kinds)
    for kind in kinds:
        process = _start(broken, 2**20 if kind == "disk" else 0)
        if kind == "image":
            _wait_for_steps(tmp_path / "broken", process, rng.uniform(0, 1))
            image = images / f"{rng.randrange(6)}.png"
            image.rename(image.with_suffix(".away"))
            codes[kind].append(process.wait(600))
            image.with_suffix(".away").rename(image)
        elif kind == "disk":
            codes[kind].append(process.wait(600))
        else:
            _wait_for_steps(tmp_path / "broken", process, rng.uniform(0, 3))
            process.send_signal(signal.SIGINT if kind == "interrupt" else signal.SIGKILL)
            codes[kind].append(process.wait(600))
    assert _start(broken).wait(1800) == 0, broken.with_suffix(".log").read_text()[-3000:]
    # A run may have finished before it was disturbed, and an image may have been read already.
    assert set(codes["interrupt"]) <= {130, 0}, codes
    assert set(codes["kill"]) <= {-signal.SIGKILL, 0}, codes
    assert set(codes["image"]) <= {1, 0}, codes
    assert set(codes["disk"]) <= {1, 0}, codes
    assert 0 not in codes["kill"][:1], codes
    assert "Traceback" not in broken.with_suffix(".log").read_text()
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(names) == 4
    for name in names:
        assert same_files(tmp_path / "whole" / name, tmp_path / "broken" / name), name
    assert not list((tmp_path / "broken").rglob("*.unfinished"))
