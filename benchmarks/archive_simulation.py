"""`python -m benchmarks.archive_simulation`: what running an archive on Ray costs beside the restoring itself.

Everything is real (listing, Ray, actors, files, manifest, summary page) but the restoring: an image takes a drawn time
and becomes a small file; some images fail, and nodes are lost on the way. Nothing may be lost with them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from faithdiff_core.archive.cluster import Cluster
from faithdiff_core.archive.run import Archive, Outcome
from faithdiff_core.captions.tile_captions import ImageText
from faithdiff_core.engine.restoration import Made, ModelFiles, Progress, Restoration
from faithdiff_core.errors import ImageError
from faithdiff_core.images.reading import LoadedImage

_FOLDER = 1000
"""Images in a folder of the simulated archive."""

_OBJECT_STORE = 100 * 2**20


class NoModels(ModelFiles):
    """Models that take no time to load."""

    def load(self) -> Any:
        return None


@dataclass(frozen=True)
class DrawnTimes(Restoration):
    """Takes a time that is drawn by the image's name, and fails for some of them.

    Attributes:
        mean: seconds an image; times are uniform from half of it to one and a half.
        failing: fraction of images that fail.
    """

    mean: float = 0.5
    failing: float = 0.05

    def drawn(self, name: str) -> tuple[float, bool]:
        """Seconds, and whether the image fails."""
        source = random.Random(name)
        return source.uniform(0.5, 1.5) * self.mean, source.random() < self.failing

    def make(
        self,
        pipeline: Any,
        image: LoadedImage,
        name: str,
        target: Path,
        text: ImageText,
        progress: Progress | None = None,
        also_record: Any = None,
        region: Any = None,
    ) -> Made:
        seconds, fails = self.drawn(name)
        time.sleep(seconds)
        if fails:
            raise ImageError(f"{name} was drawn to fail.")
        return Made(image, b"a result", ())


def write_archive(folder: Path, images: int) -> None:
    """Write images of 8 x 8 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    for number in range(images):
        sub = folder / f"{number // _FOLDER:04d}"
        if number % _FOLDER == 0:
            sub.mkdir()
        (sub / f"{number:07d}.png").write_bytes(buffer.getvalue())


def lose_nodes(cluster: Any, manifest: Path, at: list[int]) -> None:
    """Kill a node each time that so many rows are written."""
    for rows in at:
        while not manifest.exists() or manifest.read_bytes().count(b"\n") < rows:
            time.sleep(0.5)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        sys.stderr.write(f"a node was lost after {rows} images\n")


def check(out: Path, images: int, restoration: DrawnTimes, outcome: Outcome) -> None:
    """Every input has one row, with the state that was drawn, and every result its file."""
    rows = {}
    for line in (out / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["name"] not in rows
        rows[row["name"]] = row
    assert len(rows) == images
    for name, row in rows.items():
        failed = restoration.drawn(Path(name).name)[1]
        assert row["state"] == ("failed" if failed else "done"), row
        assert (out / name).exists() is not failed
    assert outcome.done + outcome.skipped + len(outcome.failures) == images


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.archive_simulation", description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="100000 for the driver's memory")
    parser.add_argument("--nodes", type=int, default=8, help="of Ray, all on this machine")
    parser.add_argument("--actors", type=int, default=32, help="on all nodes together; each takes 0.7 GB")
    parser.add_argument("--lost", type=int, default=2, help="nodes that are killed on the way")
    parser.add_argument("--seconds", type=float, default=0.5, help="mean time of an image")
    parser.add_argument("--failing", type=float, default=0.05, help="fraction of images that fail")
    return parser


def main() -> None:
    """Simulate, check that nothing is lost, and write the figures."""
    args = build_parser().parse_args()
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster as Nodes

    base = Path(tempfile.mkdtemp(prefix="faithdiff-simulation-"))
    scans, out = base / "scans", base / "out"
    scans.mkdir()
    write_archive(scans, args.images)
    restoration = DrawnTimes(
        NoModels(Path("none"), Path("none"), device="cpu"), mean=args.seconds, failing=args.failing
    )
    cpus = max(1, args.actors // args.nodes)
    options = {"num_cpus": cpus, "object_store_memory": _OBJECT_STORE, "include_dashboard": False}
    nodes = Nodes(initialize_head=True, head_node_args=options)
    try:
        for _ in range(args.nodes - 1):
            nodes.add_node(num_cpus=cpus, object_store_memory=_OBJECT_STORE)
        at = [args.images * (number + 1) // (args.lost + 2) for number in range(args.lost)]
        threading.Thread(target=lose_nodes, args=(nodes, out / "manifest.jsonl", at), daemon=True).start()
        started = time.monotonic()
        with Cluster(f"ray:{nodes.address}", 0.0, restoration, str(out)) as cluster:
            outcome = Archive([str(scans)], str(out), ".png", restoration, quiet=True).run(cluster.reports)
        whole = time.monotonic() - started
        check(out, args.images, restoration, outcome)
        report(args, out, restoration, whole)
    finally:
        nodes.shutdown()
        shutil.rmtree(base, ignore_errors=True)


def report(args: argparse.Namespace, out: Path, restoration: DrawnTimes, whole: float) -> None:
    """Write the figures."""
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    drawn = sum(restoration.drawn(Path(row["name"]).name)[0] for row in rows)
    extra = sum(row["seconds"] for row in rows) - drawn
    used = resource.getrusage(resource.RUSAGE_SELF)
    memory = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    workers = len({row["worker"] for row in rows})
    ends = sorted(datetime.fromisoformat(row["finished"]) for row in rows)
    span = (ends[-1] - ends[0]).total_seconds()
    sys.stdout.write(
        f"{args.images} images on {args.actors} actors ({workers} with those that were started again): {whole:.1f} s\n"
        f"drawn times alone, spread over the actors: {drawn / args.actors:.1f} s\n"
        f"overhead an image, all included: {1000 * (whole - drawn / args.actors) / len(rows):.2f} ms\n"
        f"overhead an image, from first to last result: {1000 * (span - drawn / args.actors) / len(rows):.2f} ms\n"
        f"reading, decoding and writing within it: {1000 * extra / len(rows):.2f} ms of an actor\n"
        f"CPU time of the driver: {1000 * (used.ru_utime + used.ru_stime) / len(rows):.2f} ms an image\n"
        f"largest memory of the driver: {memory / 2**20:.0f} MiB\n"
        f"nothing was lost: {len(rows)} rows, {sum(row['state'] == 'failed' for row in rows)} failures as drawn\n"
    )


if __name__ == "__main__":
    main()
