"""Rows about starting up: importing, loading and converting."""

from __future__ import annotations

import compileall
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from comfy_host import REPO, find_host
from torch import Tensor

from faithdiff_core.backbone import SDXL
from faithdiff_core.weights.conversion import convert
from faithdiff_core.weights.faithdiff_file import read_faithdiff
from faithdiff_core.weights.unet_shapes import UNetConfig

from . import models
from .measure import Spread, interleaved
from .results import Result, Target, missing
from .settings import Settings

_BLOCK = 2**24

PUBLISHED_UNET = UNetConfig.of(SDXL)
SMALL_UNET = replace(PUBLISHED_UNET, block_out_channels=(320, 640, 640), transformer_depths=(0, 1, 1), mid_depth=1)
"""The same with one transformer block an attention and fewer channels: a tenth of the bytes."""

_IMPORT_CORE = """
import sys, time
sys.path.insert(0, {repo!r})
import torch
s = time.{clock}()
import faithdiff_core
"""
_IMPORT_PACK = """
import asyncio, importlib, importlib.util, sys, time
sys.path.insert(0, {host!r})
import torch
from comfy.cli_args import args
args.cpu = not torch.cuda.is_available()
args.disable_api_nodes = True
args.base_directory = {base!r}
import nodes
asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
s = time.{clock}()
spec = importlib.util.spec_from_file_location("faithdiff_pack", {init!r}, submodule_search_locations=[{repo!r}])
pack = importlib.util.module_from_spec(spec)
sys.modules["faithdiff_pack"] = pack
spec.loader.exec_module(pack)
async def load():
    extension = await pack.comfy_entrypoint()
    await extension.on_load()
    for node in await extension.get_node_list():
        node.GET_SCHEMA()
asyncio.run(load())
"""
_REPORT = "print('seconds', time.{clock}() - s)"


def _import_seconds(settings: Settings, script: str, **values: str) -> Spread:
    clock = "process_time" if settings.clock == "cpu" else "perf_counter"
    text = (script + _REPORT).format(clock=clock, **values)
    seconds = []
    # What a first start would do: the bytecode is there in every other one.
    for package in ("faithdiff_core", "nodes"):
        compileall.compile_dir(REPO / package, quiet=1)
    for _ in range(settings.repeats):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout.split("seconds ")[-1]))
    return Spread(tuple(seconds))


def start(settings: Settings) -> Iterator[Result]:
    """Importing the core package and the node pack."""
    core = _import_seconds(settings, _IMPORT_CORE, repo=str(REPO))
    yield Result("import", "faithdiff_core, torch being there", "s", core, target=Target("<=", 0.5))
    host = find_host()
    target = Target("<=", 0.15)
    if host is None:
        yield missing("import", "the pack into a running ComfyUI", "no ComfyUI found; set COMFYUI_PATH", target)
        return
    with tempfile.TemporaryDirectory() as base:
        pack = _import_seconds(
            settings, _IMPORT_PACK, host=str(host), base=base, repo=str(REPO), init=str(REPO / "__init__.py")
        )
    yield Result("import", "the pack into a running ComfyUI, with all schemas", "s", pack, target=target)


def files(settings: Settings) -> Iterator[Result]:
    """Loading against reading, and converting against copying."""
    unet = SMALL_UNET if settings.quick else PUBLISHED_UNET
    # Files are a matter of the disk, not of CPU time.
    settings = replace(settings, clock="wall", repeats=min(settings.repeats, 3))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = models.write_faithdiff(folder / "FaithDiff.safetensors", unet)
        size = source.stat().st_size
        note = "" if unet is PUBLISHED_UNET else "a U-Net with a tenth of the bytes of SDXL's"
        case = f"{size / 1e9:.1f} GB fp32, file in the page cache"

        def load() -> list[Tensor]:
            # All are held at the end, as a model holds them: fresh memory is a large part of what loading costs.
            weights = read_faithdiff(source)
            return [
                part.state.pop(key).to(settings.device, torch.float16)
                for part in weights.parts.values()
                for key in list(part.state)
            ]

        times = interleaved(settings, {"ours": load, "read": lambda: _read(source)})
        yield _rates("files", f"load to fp16, {case}", times["ours"], times["read"], size, "plain read", None, note)

        def copy() -> None:
            # Beside the one that is there, as `convert` does: a file that is written over finds its memory ready.
            temporary = Path(shutil.copyfile(source, folder / "copy.part"))
            models.to_disk(temporary)
            temporary.replace(folder / "copy")

        times = interleaved(settings, {"ours": lambda: convert(source, folder / "out", force=True), "copy": copy})
        target = Target(">=", 0.6)
        both = times["ours"], times["copy"]
        yield _rates("files", f"convert to fp16, {case}", *both, size, "plain copy", target, note)


def _read(path: Path) -> None:
    buffer = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _rates(
    row: str, case: str, ours: Spread, peer: Spread, size: int, peer_name: str, target: Target | None, note: str
) -> Result:
    mine, other = (Spread(tuple(size / 1e9 / value for value in side.values)) for side in (ours, peer))
    return Result(row, case, "GB/s", mine, other, peer_name, mine.over(other), "speed", target, note)
