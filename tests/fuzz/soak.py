"""Many prompts on one real server: `python -m fuzz.soak --prompts 1000`, or `make soak`.

Sizes, tiles and samplers are random, and some prompts are cancelled. Memory, threads and open files must not grow by
more than 5 % after the first tenth, and the last image must be the one that a fresh server gives: the models that made
it are those that made all the others.

The server keeps the outputs of the last prompt alone (`--cache-classic`). By default ComfyUI 0.33 keeps those of all
prompts for as long as there is memory, which grows on purpose and would hide what should not.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from comfy_host import NO_HOST, Server, find_host
from PIL import Image
from support.server_prompts import tiny

from fuzz.fuzz_prompts import PROMPT_SECONDS, images, tried, varied

GROWTH = 1.05

LAST_SEED = 123
"""A seed that `varied` does not draw."""


def measures(server: Server) -> dict[str, int]:
    """What must not grow; the least of a second, in which the connections of the last prompt are closed."""
    process = psutil.Process(server.process_id)
    seen = []
    for _ in range(5):
        time.sleep(0.2)
        seen.append((process.memory_info().rss // 2**20, process.num_threads(), process.num_fds()))
    return dict(zip(("memory, MiB", "threads", "open files"), map(min, zip(*seen, strict=True)), strict=True))


def made(server: Server, image: str) -> bytes:
    """The image of a prompt that no other one of the run equals, so that it is sampled with the models as they are."""
    prompt = tiny(image, seed=LAST_SEED, steps=3, tile_size=64, overlap=0.5).prompt
    return server.view(server.run(prompt, PROMPT_SECONDS).images[0])


def difference(image: bytes, other: bytes) -> int:
    """The largest difference of two images in any pixel, of 255."""
    values, others = (
        np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"), dtype=np.int16) for content in (image, other)
    )
    return 255 if values.shape != others.shape else int(np.abs(values - others).max())


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
        server = Server(path, folder / "long", ("--cache-classic",))
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
            last = made(server, names[0])
        finally:
            server.stop()
        fresh = Server(path, folder / "fresh")
        try:
            apart = difference(made(fresh, fresh.upload(folder / names[0])), last)
            sys.stdout.write(f"the last image's difference from a fresh server's: {apart} of 255\n")
            if apart:
                problems.append("the last image is not the one that a fresh server gives")
        finally:
            fresh.stop()
    sys.stdout.write("\n".join(problems or ["nothing grew, and the last image is a fresh server's"]) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
