"""Twenty interruptions of every kind, at random: the finished files are those of an undisturbed run."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.training import ROOT, SIZE, same_files

INTERRUPTIONS = 20

SERVER = """
import os, resource, sys
import torch
torch.set_num_threads(1)
from diffusers import StableDiffusionXLPipeline
from faithdiff_core.cli import main
from faithdiff_core.training import start
for line in sys.stdin:
    config, log, largest = line.rstrip().split(chr(9))
    process = os.fork()
    if not process:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if int(largest):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest),) * 2)
        code = main(["train", config])
        sys.stderr.flush()
        os._exit(code)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
"""Runs one training after the other, each in a process of its own that has the libraries loaded already."""


class _Server:
    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def _read(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def run(self, config: Path, disturb: Callable[[int], None] | None = None, largest_file: int = 0) -> int:
        """Train; `disturb` gets the process's number. Gives the exit code."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{config}\t{config.with_suffix('.log')}\t{largest_file}\n")
        self.process.stdin.flush()
        number = self._read()
        if disturb is not None:
            disturb(number)
        return self._read()


def _alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def _wait_for_steps(output: Path, process: int, before: int, pause: float) -> None:
    """Wait until a process has claimed the output folder, and then some time."""
    record = output / "run.json"
    while _alive(process) and not (record.exists() and record.stat().st_mtime_ns != before):
        time.sleep(0.02)
    time.sleep(pause)


def _disturb(kind: str, output: Path, before: int, pause: float, image: Path, process: int) -> None:
    _wait_for_steps(output, process, before, pause)
    if kind == "image":
        image.rename(image.with_suffix(".away"))
    elif kind != "disk" and _alive(process):
        os.kill(process, signal.SIGINT if kind == "interrupt" else signal.SIGKILL)


@pytest.mark.slow
def test_twenty_interruptions_change_nothing(base: Path, images: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    values = {
        "base": str(base),
        "output": str(tmp_path / "whole"),
        "data": {"folder": str(images), "size": SIZE, "degradation": {"scale": 2}},
        "stages": [
            {"stage": 1, "steps": 24, "learning_rate": 1e-3, "warmup": 2},
            {"stage": 2, "steps": 24, "learning_rate": 1e-3, "lq_learning_rate": 1e-3, "warmup": 2},
        ],
        "batch": 2,
        "workers": 1,
        "save_precision": "fp32",
        "checkpoint_every": 2,
        "tensorboard": False,
    }
    whole, broken = tmp_path / "whole.yaml", tmp_path / "broken.yaml"
    whole.write_text(yaml.safe_dump(values))
    broken.write_text(yaml.safe_dump(values | {"output": str(tmp_path / "broken")}))
    server = _Server()
    assert server.run(whole) == 0

    codes: dict[str, list[int]] = {"interrupt": [], "kill": [], "image": [], "disk": []}
    kinds = [kind for kind in codes for _ in range(INTERRUPTIONS // len(codes))]
    rng.shuffle(kinds)
    for kind in kinds:
        record = tmp_path / "broken" / "run.json"
        before = record.stat().st_mtime_ns if record.exists() else 0
        image = images / f"{rng.randrange(6)}.png"
        disturb = functools.partial(_disturb, kind, tmp_path / "broken", before, rng.uniform(0, 0.8), image)
        codes[kind].append(server.run(broken, disturb, 2**20 if kind == "disk" else 0))
        if kind == "image":
            image.with_suffix(".away").rename(image)
    assert server.run(broken) == 0, broken.with_suffix(".log").read_text()[-3000:]
    server.process.communicate()
    # A run may have finished before it was disturbed, and an image may have been read already.
    assert set(codes["interrupt"]) <= {130, 0}, codes
    assert set(codes["kill"]) <= {-signal.SIGKILL, 0}, codes
    assert set(codes["image"]) <= {1, 0}, codes
    assert set(codes["disk"]) <= {1, 0}, codes
    assert sum(code != 0 for found in codes.values() for code in found) >= 0.8 * INTERRUPTIONS, codes
    assert "Traceback" not in broken.with_suffix(".log").read_text(), broken.with_suffix(".log").read_text()[-6000:]
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(names) == 4
    for name in names:
        assert same_files(tmp_path / "whole" / name, tmp_path / "broken" / name), name
    assert not list((tmp_path / "broken").rglob("*.unfinished"))
