"""The long run: `python -m fuzz --minutes 30 --seed 1`, weights and images by turns."""

from __future__ import annotations

import argparse
import sys

from fuzz import fuzz_images, fuzz_weights
from fuzz.failure import Failure


def main() -> int:
    """Print every failure as it is found. Returns 1 if there was one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    failures: list[Failure] = []
    for run in (fuzz_images.run, fuzz_weights.run):
        found = run(args.seed, args.minutes * 30)
        failures += found
        for failure in found:
            sys.stdout.write(f"{failure.case}: {failure.what}\n")
    sys.stdout.write(f"{len(failures)} failure(s)\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
