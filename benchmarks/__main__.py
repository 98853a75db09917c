"""`python -m benchmarks`: run rows, print a table, write JSON and a plot."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from faithdiff_core.dtypes import COMPUTE_DTYPES

from .host import find_host
from .measure import free_memory
from .registry import ROWS, Row, release
from .results import Report, Result, missing, table
from .settings import PUBLISHED_SIZE, SCALE, Settings


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed and memory of FaithDiff.")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda, mps or cpu, what there is")
    parser.add_argument(
        "--dtype", choices=list(COMPUTE_DTYPES), help="of the U-Net; default: fp16, on a processor bf16"
    )
    parser.add_argument("--sizes", type=int, nargs="+", metavar="PX", help="default: 1024, on a processor 256")
    parser.add_argument("--steps", type=int, help="sampling steps; default: 20, on a processor 2, quick 1")
    parser.add_argument("--repeats", type=int, help="rounds after the warm-up; default: 5, quick 2")
    parser.add_argument("--rows", nargs="+", choices=names, metavar="NAME", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="reduced sizes; under five minutes on two processor cores")
    parser.add_argument("--threads", type=int, help="threads on a processor; default: torch's")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, for a processor that others use too; best with --threads 1",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    return parser


def settings_of(options: argparse.Namespace, say: Callable[[str], None]) -> Settings:
    """Settings from the command line, with the device's defaults."""
    name = options.device
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    on_cpu = name == "cpu"
    sizes = tuple(options.sizes or ((256,) if on_cpu else (PUBLISHED_SIZE,)))
    if any(size % (8 * SCALE) or size < 8 * SCALE for size in sizes):
        raise SystemExit(f"--sizes must be multiples of {8 * SCALE} pixels, got {sizes}.")
    return Settings(
        device=torch.device(name),
        dtype=COMPUTE_DTYPES[options.dtype or ("bf16" if on_cpu else "fp16")],
        sizes=sizes,
        steps=options.steps or ((1 if options.quick else 2) if on_cpu else 20),
        repeats=options.repeats or (2 if options.quick else 5),
        quick=options.quick,
        clock=options.clock,
        say=say,
    )


def machine(settings: Settings) -> dict[str, Any]:
    """What the run ran on."""
    facts: dict[str, Any] = {"date": date.today().isoformat(), "torch": torch.__version__}
    if settings.device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    else:
        facts["device"] = f"{settings.device.type}, {platform.machine()}, {os.cpu_count()} cores"
    facts["threads"] = torch.get_num_threads()
    facts["clock"] = settings.clock
    facts["rounds"] = settings.repeats
    if hasattr(os, "getloadavg"):
        facts["load at the start"] = f"{os.getloadavg()[0]:.1f}"
    return facts


def run_rows(rows: Sequence[Row], settings: Settings) -> Iterator[Result]:
    """The rows' lines, as they come."""
    host_there = find_host() is not None
    for i, row in enumerate(rows):
        begin = time.perf_counter()
        settings.say(f"{row.name}: {row.about} ...")
        if row.needs_host and not host_there:
            yield missing(row.name, row.about, "no ComfyUI found; set COMFYUI_PATH")
        else:
            yield from row.run(settings)
        if row.group and row.group not in {later.group for later in rows[i + 1 :]}:
            release(row.group)
        free_memory(settings.device)
        settings.say(f"{row.name}: {time.perf_counter() - begin:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Args:
        arguments: the command line without the program; the process's unless given.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    if options.device == "cpu":
        # ComfyUI chooses its device by what it finds.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, is a talkative one
    if options.threads:
        torch.set_num_threads(options.threads)

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    settings = settings_of(options, say)
    rows = [row for row in ROWS if options.rows is None or row.name in options.rows]
    report = Report(f"python -m benchmarks {shlex.join(arguments)}".strip(), machine(settings))
    for result in run_rows(rows, settings):
        report.results.append(result)
        say(table([result]).splitlines()[-1])
        if options.json:
            options.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(report.markdown() + "\n")
    if options.plot:
        report.plot(options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
