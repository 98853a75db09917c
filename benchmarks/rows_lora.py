"""The row about extracting a LoRA: time, memory, and errors by rank, on a difference whose spectrum is known."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from comfy_host import REPO
from torch import Tensor

from faithdiff_core.models.shapes import Shape
from faithdiff_core.weights.low_rank import decompose
from faithdiff_core.weights.safetensors_writer import new_files, plan_file, write_tensor
from faithdiff_core.weights.unet_shapes import UNetConfig

from .measure import Spread, interleaved
from .results import Result, Target
from .rows_files import PUBLISHED_UNET, SMALL_UNET
from .settings import Settings

RANK = 64
RANKS = (8, 16, 32, 64, 128)

CHANGE = 0.02
"""Size of the difference relative to the weights."""

SPECTRUM, DECAY = 96, 0.95
"""The difference's low-rank part: how many singular values, and each one relative to the one before."""

NOISE = 0.2
"""Size of the noise relative to the low-rank part."""

LAYERS: tuple[tuple[str, Shape], ...] = (
    ("attention", (1280, 1280)),
    ("feed-forward", (10240, 1280)),
    ("convolution", (1280, 1280 * 9)),
)
"""Layers of SDXL's U-Net, as matrices."""

MEMORY = 8 * 2**10
"""Most memory in MiB that an extraction may take."""


def _difference(shape: Shape, generator: torch.Generator) -> Tensor:
    """A matrix of the given rank and spectrum with noise, of the size 1 for each entry (root mean square)."""
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    values = DECAY ** torch.arange(min(SPECTRUM, rows, columns))
    up = torch.randn((rows, len(values)), generator=generator) * values
    low = up @ torch.randn((len(values), columns), generator=generator)
    low /= low.square().mean().sqrt()
    noise = torch.randn((rows, columns), generator=generator).mul_(NOISE)
    return low.add_(noise).div_((1 + NOISE**2) ** 0.5).reshape(shape)


def write_pair(folder: Path, unet: UNetConfig) -> tuple[Path, Path]:
    """Write a base in fp16 and a fine-tuned model in fp32, tensor by tensor.

    Returns:
        The fine-tuned model and the base.
    """
    shapes = unet.shapes()
    paths = folder / "fine_tuned.safetensors", folder / "base.safetensors"
    dtypes = torch.float32, torch.float16
    layouts = {
        path: plan_file({name: (dtype, shape) for name, shape in shapes.items()}, {})
        for path, dtype in zip(paths, dtypes, strict=True)
    }
    generator = torch.Generator().manual_seed(0)
    with new_files(layouts) as files:
        for name, shape in shapes.items():
            if len(shape) < 2:
                weight = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
                change = torch.randn(shape, generator=generator) * CHANGE * 0.1
            else:
                scale = torch.Size(shape[1:]).numel() ** -0.5
                weight = torch.randn(shape, generator=generator).mul_(scale).half().float()
                change = _difference(shape, generator).mul_(CHANGE * scale)
            for path, value in zip(paths, (weight + change, weight), strict=True):
                write_tensor(files[path], layouts[path], name, value, path.name)
    return paths


def _extract(pair: tuple[Path, Path], output: Path, report: Path, threads: int) -> tuple[float, int]:
    """Run the command in a process of its own; its seconds, and the most bytes of memory that it had."""
    words = ["extract-lora", pair[0], "--base", pair[1], "-o", output, "--rank", RANK, "--report", report, "--quiet"]
    command = [sys.executable, "-m", "faithdiff_core", *map(str, words), "--ranks", ",".join(map(str, RANKS))]
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"extract-lora ended with {process.returncode}.")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - begin, usage.ru_maxrss * unit


def _errors(report: Path) -> tuple[dict[int, float], dict[int, int]]:
    """Relative error, and numbers to store, at each rank, out of the report of an extraction."""
    left, energy, stored = dict.fromkeys(RANKS, 0.0), 0.0, dict.fromkeys(RANKS, 0)
    with report.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows, *rest = map(int, row["shape"].split("x"))
            columns = torch.Size(rest).numel()
            # Relative to the weights, whose entries all have this size: see `write_pair`.
            own = float(row["relative_difference"]) ** 2 * rows
            energy += own
            for rank in RANKS:
                left[rank] += float(row[f"error_rank_{rank}"]) ** 2 * own
                stored[rank] += min(rank, rows, columns) * (rows + columns)
    return {rank: (value / energy) ** 0.5 for rank, value in left.items()}, stored


def extraction(settings: Settings) -> Iterator[Result]:
    """A whole extraction, its errors, and single layers against exact decompositions."""
    unet = SMALL_UNET if settings.quick else PUBLISHED_UNET
    note = "" if unet is PUBLISHED_UNET else "a U-Net with a tenth of the bytes of SDXL's"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = write_pair(folder, unet)
        sizes = " and ".join(f"{path.stat().st_size / 1e9:.1f} GB" for path in pair)
        output, report = folder / "lora.safetensors", folder / "layers.csv"
        seconds, memory = _extract(pair, output, report, torch.get_num_threads())
        errors, stored = _errors(report)
        case = f"rank {RANK}, fp16, out of {sizes}"
        note = "; ".join(filter(None, [note, f"file of {output.stat().st_size / 1e6:.0f} MB"]))
        yield Result("lora", f"{case}: time", "s", Spread((seconds,)), note=note)
        peak = Spread((memory / 2**20,))
        yield Result("lora", f"{case}: memory of the process", "MiB", peak, target=Target("<=", MEMORY))
        for rank in RANKS:
            size = f"{stored[rank] * 2 / 1e6:.0f} MB"
            yield Result("lora", f"relative error at rank {rank}", "", Spread((errors[rank],)), note=size)
    yield from _layers(settings)


def _layers(settings: Settings) -> Iterator[Result]:
    """The decomposition of single layers against torch's exact one, which ComfyUI's LoraSave takes."""
    settings = replace(settings, repeats=min(settings.repeats, 3))
    for kind, shape in LAYERS[: 1 if settings.quick else None]:
        matrix = _difference(shape, torch.Generator().manual_seed(1))
        energy = float(matrix.square().sum())
        times = interleaved(
            settings,
            {
                "ours": partial(decompose, matrix, RANK),
                "exact": partial(torch.linalg.svd, matrix, full_matrices=False),
            },
        )
        up, down = decompose(matrix, RANK).factors(RANK)
        ours = float((matrix - up @ down).square().sum() / energy) ** 0.5
        best = float(torch.linalg.svdvals(matrix)[RANK:].square().sum() / energy) ** 0.5
        case = f"one layer, {kind} {shape[0]} x {shape[1]}, rank {RANK}"
        exact, speed = "torch.linalg.svd", times["exact"].over(times["ours"])
        yield Result("lora", f"{case}: time", "s", times["ours"], times["exact"], exact, speed, "speed-up")
        spreads = Spread((ours,)), Spread((best,))
        yield Result(
            "lora",
            f"{case}: relative error",
            "",
            *spreads,
            exact,
            spreads[0].over(spreads[1]),
            "error",
            Target("<=", 1.005),
        )
