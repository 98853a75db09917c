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
from comfy_host import find_host

from faithdiff_core.dtypes import COMPUTE_DTYPES

from .measure import free_memory
from .registry import ROWS, Row, release
from .results import Report, Result, missing, table
from .settings import PUBLISHED_SIZE, SCALE, Settings


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed and memory of FaithDiff.")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda, mps or cpu, what there is")
    parser.add_argument("--dtype", choices=list(COMPUTE_DTYPES), help="of the U-Net; default: fp16, on a CPU bf16")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="PX", help="default: 1024, on a CPU 256")
    parser.add_argument("--steps", type=int, help="sampling steps; default: 20, on a CPU 2, quick 1")
    parser.add_argument("--repeats", type=int, help="rounds after the warm-up; default: 5, quick 2")
    parser.add_argument("--rows", nargs="+", choices=names, metavar="NAME", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="reduced sizes; under five minutes on two CPU cores")
    parser.add_argument(
        "--preset",
        choices=["gpu"],
        help="gpu: every row that needs a GPU, in fp16 at 1024 px and 20 steps; made for one card with 80 GB",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="begin no further row after N minutes; the same command with --json goes on with the next one",
    )
    parser.add_argument("--threads", type=int, help="threads on a CPU; default: torch's")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: CPU time, for a machine that others use too; best with --threads 1",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write all measurements after each row; rows that the file has from the same set-up are not run again",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    return parser


def settings_of(options: argparse.Namespace, say: Callable[[str], None]) -> Settings:
    """Settings from the command line, with the device's defaults."""
    name = options.device
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    on_cpu = name == "cpu"
    if options.preset == "gpu" and on_cpu:
        raise SystemExit("--preset gpu needs a GPU: torch finds neither CUDA nor MPS here.")
    sizes = tuple(options.sizes or ((256,) if on_cpu else (PUBLISHED_SIZE,)))
    if any(size % (8 * SCALE) or size < 8 * SCALE for size in sizes):
        raise SystemExit(f"--sizes must be multiples of {8 * SCALE} pixels, got {sizes}.")
    return Settings(
        device=torch.device(name),
        dtype=COMPUTE_DTYPES[options.dtype or ("bf16" if on_cpu else "fp16")],
        sizes=sizes,
        steps=options.steps or ((1 if options.quick else 2) if on_cpu else 20),
        repeats=options.repeats or (2 if options.quick else 3 if options.preset == "gpu" else 5),
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
    facts["dtype"] = settings.dtype_name
    facts["sizes"] = " ".join(map(str, settings.sizes))
    facts["steps"] = settings.steps
    facts["quick"] = settings.quick
    if hasattr(os, "getloadavg"):
        facts["load at the start"] = f"{os.getloadavg()[0]:.1f}"
    return facts


def run_rows(rows: Sequence[Row], settings: Settings, minutes: float | None = None) -> Iterator[tuple[Row, Result]]:
    """The rows' results, as they come.

    Args:
        rows: what to run, in order.
        settings: see there.
        minutes: no row begins later than this; all do by default.
    """
    host_there = find_host() is not None
    started = time.perf_counter()
    for i, row in enumerate(rows):
        begin = time.perf_counter()
        if minutes is not None and begin - started > 60 * minutes:
            names = ", ".join(later.name for later in rows[i:])
            settings.say(f"{minutes:g} minutes are over. Not run yet: {names}. The same command goes on there.")
            return
        settings.say(f"{row.name}: {row.about} ...")
        if row.needs_host and not host_there:
            yield row, missing(row.name, row.about, "no ComfyUI found; set COMFYUI_PATH")
        else:
            for result in row.run(settings):
                yield row, result
        if row.group and row.group not in {later.group for later in rows[i + 1 :]}:
            release(row.group)
        free_memory(settings.device)
        settings.say(f"{row.name}: {time.perf_counter() - begin:.0f} s")


_SETUP = ("device", "torch", "dtype", "sizes", "steps", "rounds", "clock", "quick")
"""What must be the same for results to stand in one file."""


def earlier_report(path: Path | None, report: Report) -> Report:
    """The report that a stopped run left in `path`, or `report` where there is none.

    Raises:
        SystemExit: the file holds another set-up's results, or is not a report.
    """
    if path is None or not path.exists():
        return report
    try:
        earlier = Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--json: {path} is not a report of these benchmarks. Choose another name.") from error
    differing = [name for name in _SETUP if earlier.machine.get(name) != report.machine.get(name)]
    if differing:
        name = differing[0]
        raise SystemExit(
            f"--json: {path} holds results with another {name} ({earlier.machine.get(name)}; now "
            f"{report.machine.get(name)}). Choose another name, or remove the file."
        )
    return Report(report.command, earlier.machine, earlier.results, earlier.finished)


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
    report = earlier_report(
        options.json, Report(f"python -m benchmarks {shlex.join(arguments)}".strip(), machine(settings))
    )
    rows = [
        row
        for row in ROWS
        if (options.rows is None or row.name in options.rows)
        and (options.preset != "gpu" or row.on_gpu)
        and row.name not in report.finished
    ]
    running: Row | None = None
    for row, result in run_rows(rows, settings, options.minutes):
        if running is not None and running is not row:
            _finish(report, running, options.json)
        running = row
        report.results.append(result)
        say(table([result]).splitlines()[-1])
    if running is not None:
        _finish(report, running, options.json)
    sys.stdout.write(report.markdown() + "\n")
    if options.plot:
        report.plot(options.plot)
    return 0


def _finish(report: Report, row: Row, path: Path | None) -> None:
    report.finished.append(row.name)
    if path is not None:
        report.write(path)


if __name__ == "__main__":
    raise SystemExit(main())
