"""Weights files, mutated: every command either works or says in one of the project's errors what is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from faithdiff_core import AlignmentConfig, LQEncoderConfig, convert, read_faithdiff
from faithdiff_core.cli import main
from faithdiff_core.errors import FaithDiffError
from faithdiff_core.weights.faithdiff_file import ENCODER_PREFIX
from faithdiff_core.weights.unet_shapes import UNetConfig
from fuzz.failure import Failure, attempt, numbered

State = dict[str, Tensor]
Mutation = Callable[[random.Random, State], bytes]

UNET = UNetConfig((32, 64), 1, (0, 1), 1, 64, 96)
ENCODER = LQEncoderConfig((32, 32), 1)
ALIGNMENT = AlignmentConfig(32, 32, 32, 32, 1)

DTYPES = [
    *(torch.int8, torch.uint8, torch.bool, torch.int64, torch.float64, torch.complex64),
    *(torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
]

ODD: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 2**64, 1.5, float("nan"), float("inf"), "", "8", "\x1b[31m", "\ud800", "٣"),
    *([], [0], [0, 8], [8, 0], [-8, 0], [[0], [8]], {}, {"0": 1}, [1] * 500, [2**62] * 2, "F32", "F4", "I8", "XX"),
]
"""Values that a JSON header can hold where others are meant."""


def tiny_model(seed: int) -> State:
    """A complete FaithDiff file in 2 MB, with random values."""
    shapes = UNET.shapes() | ALIGNMENT.published_shapes()
    shapes |= {ENCODER_PREFIX + key: shape for key, shape in ENCODER.shapes().items()}
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _flipped(rng: random.Random, content: bytes, end: int) -> bytes:
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        out[rng.randrange(min(end, len(out)))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flipped_header(rng: random.Random, state: State) -> bytes:
    content = save(state)
    return _flipped(rng, content, 8 + struct.unpack("<Q", content[:8])[0])


def flipped_values(rng: random.Random, state: State) -> bytes:
    content = save(state)
    return _flipped(rng, content, len(content))


def other_length(rng: random.Random, state: State) -> bytes:
    """A file that ends early or late, or whose header has another length than it says."""
    content = save(state)
    kind = rng.randrange(3)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        return content + bytes(rng.randrange(1, 1000))
    length = rng.choice((0, 1, 2, 100, 2**20, 2**24, 2**31, 2**32 - 1, 2**32, 2**40, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + content[8:]


def edited_header(rng: random.Random, state: State) -> bytes:
    header, data = split(save(state))
    for _ in range(rng.choice((1, 1, 2, 5))):
        key = rng.choice(list(header))
        place = rng.choice(("dtype", "shape", "data_offsets", "entry", "item", "metadata", "key", "gone", "twin"))
        entry = header[key]
        if place == "entry":
            header[key] = rng.choice(ODD)
        elif place == "metadata":
            header["__metadata__"] = rng.choice([*ODD, {"a": rng.choice(ODD)}, {"a": "\x1b[2J", "b\n": "\x07"}])
        elif place == "key":
            header[rng.choice(("", "\x00", "__metadata__", "a" * 10**5, "\ud800", key + ".x"))] = entry
        elif place == "gone":
            del header[key]
        elif place == "twin":
            header[rng.choice(list(header))] = entry
        elif isinstance(entry, dict):
            if place == "item" and isinstance(entry.get("shape"), list) and entry["shape"]:
                entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(ODD)
            else:
                entry[place] = rng.choice(ODD)
    return join(header, data)


def odd_json(rng: random.Random, state: State) -> bytes:
    """Headers that are no table of tensors at all, and some that are very large."""
    depth, count = rng.choice((10, 1000, 10**5)), rng.choice((10, 10**4, 10**5))
    prefix = rng.choice(("k", "down_blocks.", "denoise_encoder.down_blocks.", "information_transformer_layes."))
    many = {f"{prefix}{i}.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(count)}
    return rng.choice(
        [
            lambda: join(b'{"a":' * depth + b"1" + b"}" * depth, b""),
            lambda: join(b'{"a":' + b"[" * depth + b"]" * depth + b"}", b""),
            lambda: join(many, bytes(4)),
            lambda: join(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * depth + b"]}}", bytes(8)),
            lambda: join(rng.choice((b"{}", b"[]", b'{"a":', b"{\xff}", b'{"a":NaN}')), b""),
            lambda: join('{"a":1}'.encode("utf-16"), b""),
        ]
    )()


def edited_state(rng: random.Random, state: State) -> State:
    """A state dict with one or a few tensors gone, renamed, of another shape, dtype or value."""
    out = dict(state)
    for _ in range(rng.choice((1, 1, 3))):
        key = rng.choice(list(out))
        value = out[key]
        kind = rng.choice(("drop", "rename", "flat", "turn", "dtype", "all", "nan", "number", "part", "module", "more"))
        if kind == "drop":
            del out[key]
        elif kind == "rename":
            out[rng.choice((key + "x", "x" + key, key.upper(), "unet." + key))] = out.pop(key)
        elif kind == "flat":
            out[key] = value.reshape(-1)
        elif kind == "turn":
            out[key] = value.transpose(0, -1).contiguous()
        elif kind == "dtype":
            out[key] = value.to(rng.choice(DTYPES))
        elif kind == "all":
            dtype = rng.choice(DTYPES)
            out = {name: tensor.to(dtype) for name, tensor in out.items()}
        elif kind == "nan" and value.dtype.is_floating_point and value.dtype.itemsize > 1:
            out[key] = value.clone()
            out[key].view(-1)[0] = rng.choice((float("nan"), float("inf"), -float("inf"), 6e4))
        elif kind == "number":
            number = rng.choice(("-1", "99999999999", "1e9", "٣", "x", "", "00", "3"))
            out[".".join(number if word.isdigit() else word for word in key.split("."))] = value
        elif kind == "part":
            prefix = key.split(".")[0]
            gone = rng.random() < 0.5
            out = {name: tensor for name, tensor in out.items() if name.startswith(prefix) != gone} or out
        elif kind == "module":
            out = {f"module.{name}": tensor for name, tensor in out.items()}
        elif kind == "more":
            out[rng.choice(("a", "lora_up.weight", "first_stage_model.x", "\x1b[31m"))] = torch.zeros(3)
    return out


def edited_tensors(rng: random.Random, state: State) -> bytes:
    return save({key: value.contiguous().clone() for key, value in edited_state(rng, state).items()})


class Evil:
    """Would make a file when it is unpickled."""

    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.proof,)


PROOF = "EXECUTED"


def _torch_file(rng: random.Random, value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
    return buffer.getvalue()


def odd_pickle(rng: random.Random, state: State) -> bytes:
    """Pickles with more than tensors, with views, and wrapped in every way."""
    cycle: dict[str, Any] = {}
    cycle[rng.choice(("state_dict", "model"))] = rng.choice((cycle, {"module": cycle}))
    deep: Any = state
    for _ in range(rng.choice((1, 3, 400))):
        deep = {rng.choice(("model", "state_dict", "module")): deep}
    key = next(key for key in state if state[key].ndim == 2)
    value = rng.choice(
        [
            *(cycle, deep, [1, 2], 5, torch.zeros(3), {}, {1: torch.zeros(3), "1": torch.zeros(2)}),
            *({**state, "epoch": 3}, {**state, "x": Evil(PROOF)}, {"state_dict": Evil(PROOF)}, Evil(PROOF)),
            {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
            {**state, key: state[key].to_sparse()},
            {**state, key: state[key].to("meta")},
            {**state, key: torch.zeros(1).expand(2**20, 2**20)},
        ]
    )
    if rng.random() < 0.2 and not isinstance(value, dict):
        return pickle.dumps(value, protocol=rng.randrange(6))
    return _torch_file(rng, value)


def edited_pickle(rng: random.Random, state: State) -> bytes:
    return _torch_file(rng, edited_state(rng, state))


def flipped_pickle(rng: random.Random, state: State) -> bytes:
    content = _torch_file(rng, {key: state[key] for key in rng.sample(list(state), 20)})
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    begin = rng.choice((0, max(0, len(content) - 5000)))
    return content[:begin] + _flipped(rng, content[begin:], 5000)


def packed_archive(rng: random.Random, state: State) -> bytes:
    """An archive that torch did not write: compressed, with strange entries, or a bomb."""
    source, target = io.BytesIO(_torch_file(random.Random(0), dict(list(state.items())[:20]))), io.BytesIO()
    if not zipfile.is_zipfile(source):
        return source.getvalue()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            content = old.read(name)
            if rng.random() < 0.1:
                content = rng.choice((b"", b"\0" * 10**7, content[: len(content) // 2], b"\x80\x02" + b"]" * 10**6))
            new.writestr(name, content)
    return target.getvalue()


def noise(rng: random.Random, state: State) -> bytes:
    starts = (b"", b"\x80", b"\x80\x02", b"PK\x03\x04", b"PK\x05\x06", b"GGUF", b"<html", b"{", b"\x89PNG", b"\0" * 8)
    return rng.choice(starts) + rng.randbytes(rng.choice((0, 1, 7, 100, 5000)))


MUTATIONS: tuple[Mutation, ...] = (
    *(flipped_header, flipped_values, other_length, edited_header, edited_header, odd_json, edited_tensors),
    *(odd_pickle, edited_pickle, flipped_pickle, packed_archive, noise),
)


def cases(seed: int) -> Iterator[tuple[str, bytes]]:
    """Files without end: a name and the content of each. The same seed gives the same files."""
    state = tiny_model(seed)
    number = 0
    while True:
        rng = random.Random(f"{seed} {number}")
        mutation = MUTATIONS[number % len(MUTATIONS)]
        yield f"weights {seed} {number} {mutation.__name__}", mutation(rng, state)
        number += 1


def _command(*words: str) -> None:
    """Run a command; its exit code tells success from errors, and its output cannot steer a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    assert code in (0, 1, 2), f"exit code {code}"
    written = out.getvalue() + err.getvalue()
    assert not {char for char in written if char != "\n" and not char.isprintable()}, "control characters"


def _build(path: Path) -> None:
    weights = read_faithdiff(path)
    weights.check_finite()
    if weights.lq_encoder:
        weights.build_lq_encoder()
    if weights.alignment:
        weights.build_alignment()


def _convert(path: Path, folder: Path, dtype: str) -> None:
    try:
        convert(path, folder, dtype)
    except FaithDiffError:
        assert not folder.exists() or not list(folder.iterdir()), "files are left after an error"


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    """A working directory, for what a pickle would make if it were executed."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(seed: int, seconds: float, start: int = 0) -> Iterator[int | Failure]:
    """Try mutated files for some time.

    Args:
        seed: of the files.
        seconds: after this time no new file is begun.
        start: number of the first file.

    Yields:
        The number of each file before it is tried, and what went wrong with it.
    """
    with tempfile.TemporaryDirectory() as name, _working_in(name):
        good = Path(name) / "good.safetensors"
        good.write_bytes(save(tiny_model(seed + 1)))
        for number, (case, content) in numbered(cases(seed), seconds, start):
            yield number
            path, out = Path(name) / ("a.safetensors" if len(content) % 2 else "a.bin"), Path(name) / "out"
            path.write_bytes(content)
            dtype = ("fp16", "fp8_e4m3fn", "bf16")[number % 3]
            # The bad file takes each of the three places in turn.
            places = [str(path if place == number % 3 else good) for place in range(3)]
            works: dict[str, Callable[[], None]] = {
                "info": partial(_command, "info", str(path)),
                "json": partial(_command, "info", "--json", str(path)),
                "build": partial(_build, path),
                "convert": partial(_convert, path, out, dtype),
                "merge": partial(
                    _command, "merge", places[0], places[1], "--base", places[2], "-o", str(out / "merged.safetensors")
                ),
            }
            for operation, work in works.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # other libraries' warnings are no words for users
                    failure = attempt(f"{case}, {operation}", work, FaithDiffError)
                if failure is not None:
                    yield failure
            shutil.rmtree(out, ignore_errors=True)
            if Path(PROOF).exists():
                yield Failure(case, "code was executed")
                Path(PROOF).rmdir()
