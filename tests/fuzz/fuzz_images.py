"""Image files, mutated: every reader either reads them or says in one of the project's errors what is wrong."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import EpsImagePlugin, Image
from support.photographs import photograph

from faithdiff_core.cli import main
from faithdiff_core.errors import FaithDiffError
from faithdiff_core.images.formats import no_pixel_limit
from faithdiff_core.images.reading import load_image
from faithdiff_core.images.writing import save_image
from fuzz.failure import Failure, attempt, numbered

PROGRAMS = ("gs", "gswin32c", "gswin64c", "convert", "magick", "djpeg", "sh")
"""Stand-ins for these are put on the PATH: each records that it was started."""

FOLDER = 60
"""So many files make a folder that is restored as a whole."""

WORKED_PIXELS, RESTORED_PIXELS = 10_000_000, 200_000
"""Larger images take long for a good reason; they are loaded, but not degraded and evaluated, or not restored."""

DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"

_KINDS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM", "TGA")


def seeds() -> dict[str, bytes]:
    """Good files of every format and of several layouts, by name."""
    y, x = np.mgrid[0:20, 0:24]
    colors = np.stack([x * 10, y * 12, (x + y) * 5], -1).astype(np.uint8)
    alpha = np.concatenate([colors, (x * 9)[..., None].astype(np.uint8)], -1)
    deep = colors[..., 0].astype(np.uint16) * 257
    files: dict[str, bytes] = {}

    def put(name: str, values: np.ndarray, kind: str, **options: object) -> None:
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, kind, **options)
        files[name] = buffer.getvalue()

    for kind in _KINDS:
        put(kind, colors, kind)
    for kind in ("PNG", "WEBP", "TIFF", "TGA", "AVIF"):
        put(f"{kind} with alpha", alpha, kind)
    for kind in ("PNG", "TIFF", "PPM", "JPEG2000"):
        put(f"{kind} deep grey", deep, kind)
    put("TIFF lzw", colors, "TIFF", compression="tiff_lzw")
    put("TIFF jpeg", colors, "TIFF", compression="jpeg")
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        files[f"{kind} with metadata"] = photograph(kind, colors)
    frames = [Image.fromarray(np.roll(colors, shift, 1)) for shift in range(3)]
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        files[f"{kind} frames"] = buffer.getvalue()
    files["PNG deep"] = _png(np.repeat(deep[..., None], 3, 2), 2)
    files["PNG deep alpha"] = _png(np.repeat(deep[..., None], 4, 2), 6)
    files["PostScript"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    return files


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(values: np.ndarray, color_type: int) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, color_type, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def mutated(rng: random.Random, content: bytes) -> bytes:
    """The same file with bytes changed, cut off, doubled or exchanged."""
    kind = rng.choice(("flip", "head", "head", "cut", "number", "twice", "gap", "whole"))
    out = bytearray(content)
    if kind in ("flip", "head"):
        end = len(out) if kind == "flip" else min(len(out), 96)
        for _ in range(rng.choice((1, 2, 8))):
            out[rng.randrange(end)] = rng.randrange(256)
    elif kind == "cut":
        del out[rng.randrange(len(out)) :]
    elif kind == "number" and len(out) > 8:
        value = rng.choice((0, 1, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1))
        struct.pack_into(rng.choice("<>") + "I", out, rng.randrange(len(out) - 4), value)
    elif kind == "twice":
        at = rng.randrange(len(out))
        out[at:at] = out[at : at + rng.choice((1, 16, 200))]
    elif kind == "gap":
        at = rng.randrange(len(out))
        del out[at : at + rng.choice((1, 4, 30))]
    return bytes(out)


def cases(seed: int) -> Iterator[tuple[str, bytes]]:
    """Files without end: a name and the content of each. The same seed gives the same files."""
    files = list(seeds().items())
    number = 0
    while True:
        rng = random.Random(f"{seed} {number}")
        name, content = files[number % len(files)]
        yield f"image {seed} {number} {name}", mutated(rng, content) if number >= len(files) else content
        number += 1


def _load(path: Path, out: Path) -> None:
    image = load_image(path)
    assert torch.isfinite(image.colors).all(), "values that are not finite"
    assert 0 <= image.colors.min() <= image.colors.max() <= 1, "values outside of 0 to 1"
    if image.colors.numel() < 3_000_000:
        save_image(out, image)


def _command(*words: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    assert code in (0, 1), f"exit code {code}"
    assert code == 0 or err.getvalue().strip(), "failed without a word"


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[Path]:
    """A PATH on which programs record that they were started; gives the record."""
    record, programs = folder / "started", folder / "bin"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(f"#!/bin/sh\necho {name} >> {record}\n", encoding="ascii")
        (programs / name).chmod(0o755)
    before, found = os.environ.get("PATH", ""), EpsImagePlugin.gs_binary
    os.environ["PATH"] = f"{programs}{os.pathsep}{before}"
    EpsImagePlugin.gs_binary = None
    try:
        yield record
    finally:
        os.environ["PATH"] = before
        EpsImagePlugin.gs_binary = found


def _pixels(content: bytes) -> int:
    try:
        with no_pixel_limit(), Image.open(io.BytesIO(content)) as image:
            return image.width * image.height
    except Exception:  # as with all of Pillow's readers
        return 0


def _restore(sources: dict[str, bytes], folder: Path) -> str | None:
    """Restore a folder of bad files and a good one with the demo model; what is wrong with the run, if anything."""
    inputs, outputs = folder / "in", folder / "restored"
    for place in (inputs, outputs):
        shutil.rmtree(place, ignore_errors=True)
    inputs.mkdir()
    for number, content in enumerate(sources.values()):
        (inputs / f"{number:03}.png").write_bytes(content)
    (inputs / "good.png").write_bytes(seeds()["PNG"])
    out, err = io.StringIO(), io.StringIO()
    words = ["restore", str(inputs), "-o", str(outputs), "--model", str(DEMO_MODEL)]
    words += ["--faithdiff", str(DEMO_MODEL / "faithdiff.safetensors"), "--steps", "1", "--cfg", "1", "--device", "cpu"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    if code not in (0, 1):
        return f"exit code {code}: {err.getvalue()[-300:]}"
    if not (outputs / "good.png").exists():
        return f"the good image was not restored: {err.getvalue()[-300:]}"
    silent = [
        name
        for name in (f"{number:03}.png" for number in range(len(sources)))
        if not (outputs / name).exists() and name not in err.getvalue() + out.getvalue()
    ]
    return f"neither restored nor named: {silent}" if silent else None


def run(seed: int, seconds: float, start: int = 0) -> Iterator[int | Failure]:
    """Try mutated files for some time.

    Args:
        seed: of the files.
        seconds: after this time no new file is begun.
        start: number of the first file.

    Yields:
        The number of each file before it is tried, and what went wrong with it.
    """
    recent: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as name, _watched(Path(name)) as record:
        folder = Path(name)
        (folder / "hq.png").write_bytes(seeds()["PNG"])
        for number, (case, content) in numbered(cases(seed), seconds, start):
            yield number
            path = folder / "a.png"
            path.write_bytes(content)
            pixels = _pixels(content)
            if pixels <= RESTORED_PIXELS:
                recent[case] = content
            works: dict[str, Callable[[], None]] = {"load": partial(_load, path, folder / "copy.png")}
            if pixels <= WORKED_PIXELS:
                reference = ("--reference", str(folder / "hq.png"), "--metrics", "psnr,ssim")
                works["degrade"] = partial(_command, "degrade", str(path), "-o", str(folder / "lq.png"))
                works["evaluate"] = partial(_command, "evaluate", str(path), *reference)
            for operation, work in works.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow's about the files
                    failure = attempt(f"{case}, {operation}", work, FaithDiffError)
                if failure is not None:
                    yield failure
            if len(recent) == FOLDER:
                if problem := _restore(recent, folder):
                    yield Failure(f"{next(iter(recent))} to {case}, restore", problem)
                recent = {}
            if record.exists():
                yield Failure(case, f"a program was started: {record.read_text().split()}")
                record.unlink()
            left = [file.name for file in folder.iterdir() if file.name.endswith(".part")]
            if left:
                yield Failure(case, f"files are left: {left}")
