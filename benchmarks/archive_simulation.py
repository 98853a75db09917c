"""`python -m benchmarks.archive_simulation`: what running an archive on Ray costs beside the restoring itself.

Everything is real (listing, Ray, actors, files, manifest, summary page) but the restoring: an image takes a drawn time
and becomes a small file; some images fail, and nodes are lost on the way. Nothing may be lost with them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faithdiff_core.archive.cluster import Cluster
from faithdiff_core.archive.run import Archive, Outcome

from .drawn_times import DrawnTimes

if TYPE_CHECKING:
    from .results import Report

_FOLDER = 1000
"""Images in a folder of the simulated archive."""

_OBJECT_STORE = 80 * 2**20
"""Of each node, in bytes; 75 MiB is the least that Ray takes."""

_LOOK_EVERY = 2.0
"""Seconds between two looks at the memory of all processes."""

ROOT = Path(__file__).resolve().parents[1]


def write_archive(folder: Path, images: int) -> None:
    """Write files that are named like images."""
    for number in range(images):
        sub = folder / f"{number // _FOLDER:04d}"
        if number % _FOLDER == 0:
            sub.mkdir(parents=True)
        (sub / f"{number:07d}.png").write_bytes(b"an image")


def lose_nodes(cluster: Any, manifest: Path, at: list[int]) -> None:
    """Kill a node each time that so many rows are written."""
    for rows in at:
        while not manifest.exists() or manifest.read_bytes().count(b"\n") < rows:
            time.sleep(0.5)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        sys.stderr.write(f"a node was lost after {rows} images\n")


def check(out: Path, images: int, task: DrawnTimes, outcome: Outcome) -> None:
    """Every input has one row, with the state that was drawn, and every result its file."""
    rows = {}
    for line in (out / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["name"] not in rows
        rows[row["name"]] = row
    assert len(rows) == images
    for name, row in rows.items():
        failed = task.drawn(Path(name).name)[1]
        assert row["state"] == ("failed" if failed else "done"), row
        assert (out / name).exists() is not failed
    assert outcome.done + outcome.skipped + len(outcome.failures) == images


@dataclass
class MemoryGuard:
    """Watches the memory of this process and all that it started, and ends the run before the machine is full.

    Attributes:
        limit: bytes that they may take together.
        largest: most that they took; pages that several share count once.
        worker: most that one of Ray's workers took of its own.
    """

    limit: int
    largest: int = 0
    worker: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> MemoryGuard:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._stop.wait(_LOOK_EVERY):
            together = 0
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                try:
                    memory = process.memory_full_info()
                    together += memory.pss
                    if "ray::" in process.name() or "ray::" in " ".join(process.cmdline()):
                        self.worker = max(self.worker, memory.uss)
                except psutil.Error:  # it ended meanwhile
                    continue
            self.largest = max(self.largest, together)
            if together > self.limit:
                sys.stderr.write(f"{together / 2**20:.0f} MiB are more than --memory allows; stopped\n")
                os.kill(os.getpid(), 2)
                return


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.archive_simulation", description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="100000 for the driver's memory")
    parser.add_argument("--nodes", type=int, default=8, help="of Ray, all on this machine")
    parser.add_argument("--actors", type=int, default=32, help="on all nodes together")
    parser.add_argument("--lost", type=int, default=2, help="nodes that are killed on the way")
    parser.add_argument("--seconds", type=float, default=0.5, help="mean time of an image")
    parser.add_argument("--failing", type=float, default=0.05, help="fraction of images that fail")
    parser.add_argument("--memory", type=float, default=6.0, help="GiB that all processes may take together")
    parser.add_argument("--json", type=Path, help="add the figures to this report, for docs/scaling.md")
    return parser


def main() -> None:
    """Simulate, check that nothing is lost, and write the figures."""
    args = build_parser().parse_args()
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": python_path}
    from ray.cluster_utils import Cluster as Nodes

    from faithdiff_core.cli import restore  # noqa: F401 - the command's driver has all of it in memory

    load = os.getloadavg()[0]
    base = Path(tempfile.mkdtemp(prefix="faithdiff-simulation-"))
    scans, out = base / "scans", base / "out"
    write_archive(scans, args.images)
    task = DrawnTimes(mean=args.seconds, failing=args.failing)
    options = {"num_cpus": args.actors // args.nodes, "object_store_memory": _OBJECT_STORE}
    nodes = Nodes(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    try:
        for _ in range(args.nodes - 1):
            nodes.add_node(**options)
        at = [args.images * (number + 1) // (args.lost + 2) for number in range(args.lost)]
        threading.Thread(target=lose_nodes, args=(nodes, out / "manifest.jsonl", at), daemon=True).start()
        started = time.monotonic()
        with (
            MemoryGuard(int(args.memory * 2**30)) as guard,
            Cluster(f"ray:{nodes.address}", 0.0, task, str(out)) as cluster,
        ):
            outcome = Archive([str(scans)], str(out), ".png", task, quiet=True).run(cluster.reports)
            whole = time.monotonic() - started
        check(out, args.images, task, outcome)
        report = figures(args, out, task, whole, guard, load)
        sys.stdout.write(report.markdown() + "\n")
        if args.json is not None:
            merged(args.json, report).write(args.json)
    finally:
        nodes.shutdown()
        shutil.rmtree(base, ignore_errors=True)


def figures(
    args: argparse.Namespace, out: Path, task: DrawnTimes, whole: float, guard: MemoryGuard, load: float
) -> Report:
    """What the run cost, as a report."""
    from .measure import Spread
    from .results import Report, Result, Target

    with (out / "manifest.jsonl").open() as lines:
        rows = [(row["name"], row["worker"]) for row in map(json.loads, lines)]
    images = len(rows)
    drawn = sum(task.drawn(Path(name).name)[0] for name, _ in rows)
    used = resource.getrusage(resource.RUSAGE_SELF)
    memory = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    case = (
        f"{images:,} images, {args.seconds:g} s each, {args.failing:.0%} failing; {args.actors} actors on {args.nodes} "
        f"node(s), {args.lost} lost"
    )
    workers = f"{len({worker for _, worker in rows})} worker processes with those started again"
    ideal = drawn / args.actors

    def result(what: str, unit: str, value: float, target: Target | None = None, note: str = "") -> Result:
        return Result("archive", f"{case}: {what}", unit, Spread((value,)), target=target, note=note)

    return Report(
        f"python -m benchmarks.archive_simulation {shlex.join(sys.argv[1:])}".strip(),
        this_machine(),
        [
            result(
                "overhead an image",
                "ms",
                1000 * (whole - ideal) / images,
                Target("<=", 50) if args.seconds else None,
                f"{whole:.0f} s in all, {ideal:.0f} s of drawn times on every actor; {workers}; other work on the "
                f"machine: load {load:.1f}",
            ),
            result("CPU time of the driver an image", "ms", 1000 * (used.ru_utime + used.ru_stime) / images),
            result("largest memory of the driver", "MiB", memory / 2**20, Target("<=", 1024)),
            result(
                "largest memory of all processes",
                "MiB",
                guard.largest / 2**20,
                note=f"shared pages counted once; a worker at most {guard.worker / 2**20:.0f} MiB of its own",
            ),
        ],
        ["archive"],
    )


def this_machine() -> dict[str, Any]:
    """What a run ran on."""
    device = f"{platform.machine()}, {os.cpu_count()} cores"
    return {"date": date.today().isoformat(), "ray": metadata.version("ray"), "device": device}


def merged(path: Path, report: Report) -> Report:
    """The report with an earlier one's results of other cases."""
    from .results import Report

    if not path.exists():
        return report
    earlier = Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
    cases = {result.case for result in report.results}
    kept = [result for result in earlier.results if result.case not in cases]
    return Report("python -m benchmarks.archive_simulation", report.machine, [*kept, *report.results], report.finished)


if __name__ == "__main__":
    main()
