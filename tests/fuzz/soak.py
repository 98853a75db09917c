"""Many prompts on one real server: `python -m fuzz.soak --prompts 1000`, or `make soak`.

Sizes, tiles and samplers are random, and some prompts are cancelled. Memory, threads and open files must not grow by
more than 5 % after the first tenth, and the last image must be the one that a fresh server gives.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil
from comfy_host import NO_HOST, Server, find_host
from support.server_prompts import tiny

from fuzz.fuzz_prompts import images, saved, tried, varied

GROWTH = 1.05


def measures(server: Server) -> dict[str, int]:
    """What must not grow."""
    process = psutil.Process(server.process_id)
    return {
        "memory, MiB": process.memory_info().rss // 2**20,
        "threads": process.num_threads(),
        "open files": process.num_fds(),
    }


def main() -> int:
    """Print a line after every tenth of the run. Returns 1 if something grew or an image changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    path = find_host()
    if path is None:
        sys.stderr.write(NO_HOST + "\n")
        return 1
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(path, folder / "long")
        try:
            names = [server.upload(image) for image in images(folder)]
            tenth, began = max(1, args.prompts // 10), time.monotonic()
            first: dict[str, int] = {}
            for number in range(args.prompts):
                rng = random.Random(f"{args.seed} {number}")
                if problem := tried(server, varied(rng, names), cancel=rng.random() < 0.1):
                    problems.append(f"prompt {number}: {problem}")
                if number % tenth == tenth - 1:
                    now = measures(server)
                    first = first or now
                    line = ", ".join(f"{what} {value}" for what, value in now.items())
                    sys.stdout.write(f"{number + 1} prompts, {time.monotonic() - began:.0f} s: {line}\n")
                    sys.stdout.flush()
            problems += [
                f"{what} grew from {first[what]} to {now[what]}" for what in now if now[what] > GROWTH * first[what]
            ]
            last = saved(server, tiny(names[0]).prompt)
        finally:
            server.stop()
        fresh = Server(path, folder / "fresh")
        try:
            name = fresh.upload(folder / names[0])
            if saved(fresh, tiny(name).prompt) != last:
                problems.append("the last image is not the one that a fresh server gives")
        finally:
            fresh.stop()
    sys.stdout.write("\n".join(problems or ["nothing grew, and the last image is a fresh server's"]) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
