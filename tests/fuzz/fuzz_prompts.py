"""Prompts for the real server, mutated: each gives an image, is refused, or ends in one of the project's errors."""

from __future__ import annotations

import copy
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from comfy_host import NO_HOST, Prompt, PromptRejectedError, Server, find_host
from comfy_host.server import Job, JobResult
from PIL import Image
from support.server_prompts import tiny

from faithdiff_core.errors import FaithDiffError
from fuzz.failure import CASE_SECONDS, Failure, numbered

PROMPT_SECONDS = 300.0
"""Time by the clock; a prompt that takes longer waits for something that does not come."""

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For the server: on a busy machine, threads that wait for each other make small tensors take minutes."""

REFERENCE_EVERY = 40
"""After so many prompts the server is emptied, and must give the first image again."""

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 8, 63, 64, 65, 1024, 16384, 16385, 2**31, 2**63, 2**64, 2**70),
    *(0.0, -0.5, 0.5, 0.9, 0.91, 1.5, 100.0, 1e-30, 1e30, "", "x", "8", "NaN", "euler", "../..", "\x00", "a" * 5000),
    *([], [1], ["1"], ["1", 0], ["99", 0], ["1", 99], ["1", -1], {}, {"a": 1}, [[]], ["1", "0"]),
]
"""Values that JSON can hold where others are meant."""

SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral", "uni_pc", "ddim", "lcm")
SCHEDULERS = ("faithdiff", "karras", "normal", "simple", "sgm_uniform")

COSTS = {"steps": 3, "scale_by": 4.0, "longest_side": 256}
"""Larger values that are allowed are brought down to these, or a prompt would take long for a good reason."""

OURS = ("InterruptProcessingException", *(kind.__name__ for kind in FaithDiffError.__subclasses__()))
"""Names of errors with which nodes may end."""

WORKER_DIED = "(prompt_worker)"
"""In the server's log when the thread that runs prompts has ended."""


class WorkerDiedError(Exception):
    """ComfyUI's own fault: it looks at no link of an input that the node does not have, and ends with a wrong one."""


def images(folder: Path) -> list[Path]:
    """Small images of odd sizes and modes."""
    rng = np.random.default_rng(0)
    out = []
    for name, size, channels in (("a", (40, 56), 3), ("b", (1, 1), 3), ("c", (17, 9), 4), ("d", (64, 24), 1)):
        values = rng.integers(0, 256, (*size, channels), dtype=np.uint8)
        path = folder / f"{name}.png"
        Image.fromarray(values.squeeze(-1) if channels == 1 else values).save(path)
        out.append(path)
    return out


def varied(rng: random.Random, names: list[str]) -> Prompt:
    """A prompt that should work: other image, sizes, sampler and tiles; stock nodes instead of ours at times."""
    settings = {
        "seed": rng.choice((0, 1, 2**32, 2**64 - 2)),  # with the very last one, samplers of ComfyUI add 1 and overflow
        "steps": rng.choice((1, 2)),
        "cfg": rng.choice((1.0, 5.0)),
        "sampler_name": rng.choice(SAMPLERS),
        "scheduler": rng.choice(SCHEDULERS),
        "start_point": rng.choice(("lr", "noise")),
        "tile_size": rng.choice((64, 72, 128, 1024)),
        "overlap": rng.choice((0.0, 0.125, 0.5, 0.9)),
        "tile_batch": rng.choice((0, 1, 3)),
        "tile_grid": rng.choice(("fixed", "moving")),
        "strength": rng.choice((0.0, 1.0, 2.0)),
    }
    graph = tiny(rng.choice(names), **settings)
    prompt = graph.prompt
    sampler = next(key for key, node in prompt.items() if node["class_type"] == "FaithDiffSampler")
    inputs = prompt[sampler]["inputs"]
    if rng.random() < 0.3:
        conditioned = graph.add(
            "FaithDiffConditioning",
            **{name: inputs[name] for name in ("positive", "negative", "lq_features")},
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        )
        tiled = graph.add("FaithDiffTiledDiffusion", model=inputs["model"], tile_size=64, overlap=0.5, tile_batch=0)
        prompt[sampler] = {
            "class_type": "KSampler",
            "inputs": {
                "model": tiled[0],
                "positive": conditioned[0],
                "negative": conditioned[1],
                "latent_image": inputs["latent_image"],
                "seed": inputs["seed"] % 2**63,
                "steps": inputs["steps"],
                "cfg": inputs["cfg"],
                "sampler_name": inputs["sampler_name"],
                "scheduler": rng.choice(SCHEDULERS[1:]),
                "denoise": rng.choice((1.0, 0.6)),
            },
        }
    return prompt


def mutated(rng: random.Random, prompt: Prompt) -> Prompt:
    """Values exchanged, inputs and nodes dropped, links led elsewhere."""
    out = copy.deepcopy(prompt)
    foreign: set[str] = set()  # nodes with inputs that their class may not have
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        key = rng.choice(list(out))
        inputs = out[key].get("inputs")
        kind = rng.choice(("odd", "odd", "odd", "odd", "drop", "link", "link", "class", "node", "more"))
        if kind == "node":
            del out[key]
        elif kind == "class":
            out[key]["class_type"] = rng.choice([node.get("class_type", "") for node in out.values()])
            foreign.add(key)
        elif not isinstance(inputs, dict) or not inputs:
            continue
        elif kind == "odd":
            inputs[rng.choice(list(inputs))] = copy.deepcopy(rng.choice(ODD))
        elif kind == "drop":
            del inputs[rng.choice(list(inputs))]
        elif kind == "more":
            inputs[rng.choice(("x", "mask", "noise", "model", "latent_image"))] = copy.deepcopy(rng.choice(ODD))
            foreign.add(key)
        else:
            inputs[rng.choice(list(inputs))] = [rng.choice(list(out)), rng.randrange(3)]
        if not out:
            break
    # See `WorkerDiedError`: these would take most of the time to start servers again.
    for key in foreign & out.keys():
        inputs = out[key]["inputs"]
        for name in [name for name, value in inputs.items() if _leads_nowhere(value, out)]:
            del inputs[name]
    for node in out.values():
        for name, most in COSTS.items():
            value = node.get("inputs", {}).get(name)
            if isinstance(value, int | float) and value > most:
                node["inputs"][name] = most
    return out


def _leads_nowhere(value: Any, prompt: Prompt) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] not in prompt


def cases(seed: int, names: list[str]) -> Iterator[tuple[str, Prompt]]:
    """Prompts without end. The same seed gives the same prompts."""
    number = 0
    while True:
        rng = random.Random(f"{seed} {number}")
        yield f"prompt {seed} {number}", mutated(rng, varied(rng, names))
        number += 1


def tried(server: Server, prompt: Prompt, cancel: bool) -> str | None:
    """Queue it and wait for its end; what is wrong with the way it ended, if anything."""
    began = _processor_time(server)
    try:
        with server.submit(prompt) as job:
            if cancel:
                server.interrupt()
            result = _ended(server, job)
    except PromptRejectedError as error:
        # ComfyUI's own faults with prompts that are no graphs are not ours to judge.
        if error.status >= 500 and "custom_nodes/faithdiff/" in server.log_tail():
            return str(error)
        return None
    except TimeoutError:
        return f"not done after {PROMPT_SECONDS:.0f} s"
    for kind, data in result.messages:
        if kind == "execution_error" and str(data["node_type"]).startswith("FaithDiff"):
            name = str(data["exception_type"])
            if name.rpartition(".")[2] not in OURS:
                return f"{data['node_type']}: {name}: {str(data['exception_message'])[:300]}"
    took = _processor_time(server) - began
    return f"took {took:.0f} s of processor time" if took > CASE_SECONDS else None


def _ended(server: Server, job: Job) -> JobResult:
    end = time.monotonic() + PROMPT_SECONDS
    while True:
        try:
            return job.wait(10.0)
        except TimeoutError:
            _, died, trace = server.log_tail(20_000).rpartition(WORKER_DIED)
            if died and "custom_nodes/faithdiff/" not in trace:
                raise WorkerDiedError(trace) from None
            if time.monotonic() > end:
                raise


def _processor_time(server: Server) -> float:
    times = psutil.Process(server.process_id).cpu_times()
    return float(times.user + times.system)


def saved(server: Server, prompt: Prompt) -> bytes:
    """The image that a prompt saves, computed from the start."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    return server.view(server.run(prompt, PROMPT_SECONDS).images[0])


def fuzz(server: Server, seed: int, seconds: float, start: int = 0) -> Iterator[int | Failure]:
    """Try mutated prompts on a server for some time; arguments and yields as in `run`."""
    names = [server.upload(path) for path in images(server.base)]
    reference = tiny(names[0]).prompt
    first = saved(server, reference)
    for number, (case, prompt) in numbered(cases(seed, names), seconds, start):
        yield number
        if problem := tried(server, prompt, cancel=number % 20 == 19):
            yield Failure(case, problem)
        if number % REFERENCE_EVERY == REFERENCE_EVERY - 1 and saved(server, reference) != first:
            yield Failure(case, "the server gives another image than at the start")


def run(seed: int, seconds: float, start: int = 0) -> Iterator[int | Failure]:
    """Start a server and try mutated prompts for some time.

    Args:
        seed: of the prompts.
        seconds: after this time no new prompt is begun.
        start: number of the first prompt.

    Yields:
        The number of each prompt before it is tried, and what went wrong with it.
    """
    path = find_host()
    if path is None:
        sys.stderr.write(NO_HOST + "\n")
        time.sleep(seconds)
        return
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with tempfile.TemporaryDirectory() as base:
            server = Server(path, Path(base), environment=ONE_THREAD)
            try:
                for found in fuzz(server, seed, end - time.monotonic(), start):
                    start = found + 1 if isinstance(found, int) else start
                    yield found
            except WorkerDiedError:
                continue  # with a new server, behind the prompt
            finally:
                server.stop()
