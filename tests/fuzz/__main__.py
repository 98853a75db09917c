"""The long run: `python -m fuzz --minutes 30 --seed 1`, two fuzzers at a time."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence

from fuzz.watched import Watched

LANES = (
    (("fuzz_weights", 1.0),),
    (("fuzz_images", 0.3), ("fuzz_prompts", 0.6), ("fuzz_configurations", 0.1)),
)
"""For each core, fuzzers one after the other with their shares of the time. A weights file goes through five commands
and takes the longest."""

REPORT_SECONDS = 60


def main() -> int:
    """Print every failure as it is found, and the numbers of cases every minute. Returns 1 if there was a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="such as fuzz_weights")
    args = parser.parse_args()
    lanes = []
    for shares in LANES:
        chosen = [(name, share) for name, share in shares if not args.only or name in args.only]
        whole = sum(share for _, share in chosen)
        lanes.append([Watched(name, args.seed, args.minutes * 60 * share / whole) for name, share in chosen])
    threads = [threading.Thread(target=_run, args=(lane,)) for lane in lanes if lane]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(REPORT_SECONDS)
            _write(", ".join(f"{run.name}: {run.cases}" for lane in lanes for run in lane if run.cases))
    runs = [run for lane in lanes for run in lane]
    for run in runs:
        _write(f"{run.name}: {run.cases} cases, {len(run.failures)} failures")
    return 1 if any(run.failures for run in runs) else 0


def _run(lane: Sequence[Watched]) -> None:
    for run in lane:
        for failure in run.watch():
            _write(f"{failure.case}: {failure.what}")


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
