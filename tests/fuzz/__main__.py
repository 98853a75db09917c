"""The long run: `python -m fuzz --minutes 30 --seed 1`, two fuzzers at a time."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

from fuzz.watched import Watched

PAIRS = (("fuzz_weights", "fuzz_images"), ("fuzz_prompts", "fuzz_configurations"))
"""Those of a pair run at the same time, one on each core."""


def main() -> int:
    """Print every failure as it is found. Returns 1 if there was one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="such as fuzz_weights")
    args = parser.parse_args()
    pairs = [[name for name in pair if not args.only or name in args.only] for pair in PAIRS]
    pairs = [pair for pair in pairs if pair]
    failures = 0
    for pair in pairs:
        runs = [Watched(name, args.seed, args.minutes * 60 / len(pairs)) for name in pair]
        with ThreadPoolExecutor(len(runs)) as pool:
            list(pool.map(_report, runs))
        for run in runs:
            sys.stdout.write(f"{run.name}: {run.cases} cases, {len(run.failures)} failures\n")
            failures += len(run.failures)
    return 1 if failures else 0


def _report(run: Watched) -> None:
    for failure in run.watch():
        sys.stdout.write(f"{failure.case}: {failure.what}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
