"""`python -m benchmarks.manifest_format`: an archive's manifest as lines of JSON, as it is, beside Parquet.

The rows are those of a run: names in folders, digests, stamps, times, workers. What is timed is what a run does with
them when it starts: read all of them as dictionaries.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from faithdiff_core.archive.manifest import MANIFEST, RowLog

from .archive_simulation import this_machine
from .measure import Spread
from .results import Report, Result, timed


def rows(images: int) -> Iterator[dict[str, Any]]:
    """Rows as a run writes them."""
    draw = random.Random(0)
    for number in range(images):
        name = f"box-{number // 1000:04d}/scan-{number:07d}"
        yield {
            "name": f"{name}.png",
            "source": f"s3://archive/scans/{name}.jpg",
            "state": "done",
            "worker": f"machine-{draw.randrange(8)}/{draw.randrange(2**24):06x}/{draw.randrange(4096)}",
            "settings": "0123456789abcdef",
            "stamp": f"{draw.randrange(10**6)}-{draw.getrandbits(128):032x}",
            "bytes_read": draw.randrange(10**6),
            "height": 2048,
            "width": draw.randrange(1024, 3072),
            "bytes_written": draw.randrange(10**7),
            "notes": [],
            "seconds": round(draw.uniform(10, 30), 3),
            "finished": f"2026-11-29T{draw.randrange(24):02d}:{draw.randrange(60):02d}:00+00:00",
        }


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Write both files, read both, and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.manifest_format", description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here, for docs/scaling.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log, parquet = RowLog(folder, MANIFEST, "parts"), Path(folder) / "manifest.parquet"
        log.replace(rows(args.images))
        pq.write_table(pa.Table.from_pylist(list(rows(args.images))), parquet, compression="zstd")

        def read_lines() -> None:
            for _ in log.rows():
                pass

        def read_parquet() -> None:
            for batch in pq.ParquetFile(parquet).iter_batches(1000):
                for _ in batch.to_pylist():
                    pass

        times = [(_seconds(read_lines), _seconds(read_parquet)) for _ in range(args.repeats)]
        lines, other = (Spread(values) for values in zip(*times, strict=True))
        sizes = [Spread((file.stat().st_size / 2**20,)) for file in (Path(folder) / MANIFEST, parquet)]
    case = f"manifest of {args.images:,} rows"
    size = Result(
        "manifest", f"{case}: size", "MiB", sizes[0], sizes[1], "Parquet, zstd", sizes[0].over(sizes[1]), "size"
    )
    read = timed("manifest", f"{case}: reading all", lines, other, "Parquet, zstd")
    report = Report("python -m benchmarks.manifest_format", this_machine(), [size, read], ["manifest"])
    if args.json is not None:
        report.write(args.json)


if __name__ == "__main__":
    main()
