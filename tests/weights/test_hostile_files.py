"""Weights files that were made or damaged to do harm: each is refused by name, at once, and nothing in it is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.full_disk import full_disk
from torch import Tensor

from faithdiff_core import read_faithdiff
from faithdiff_core.cli import main
from faithdiff_core.errors import FaithDiffError, SettingsError, WeightsError, printable
from faithdiff_core.weights.conversion import convert

if TYPE_CHECKING:
    from conftest import Golden

State = dict[str, Tensor]
Edit = Callable[[dict[str, Any], str], object]

pytestmark = pytest.mark.timeout(20)  # a hang is what many of these files are made for


@pytest.fixture
def state(golden: Golden) -> State:
    return load_file(golden.model)


def write_header(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        read_faithdiff(path)
    assert path.name in str(caught.value)


def entry(**values: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | values


class TestHeaders:
    @pytest.mark.parametrize(
        "offsets",
        [
            *("08", [0], [0, 4, 8], [8, 0], [-8, 0], ["0", "8"], [[0], [8]], {"0": 0, "1": 8}, None, [0.0, 8.0]),
            *([False, 8], [0, 2**64], [0, 10**4000]),
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_offsets(self, tmp_path: Path, offsets: object) -> None:
        header = json.dumps({"conv_in.bias": entry(data_offsets=offsets)}).encode()
        refused(write_header(tmp_path / "a.safetensors", header, bytes(8)), "conv_in.bias has")

    @pytest.mark.parametrize(
        "shape", [None, "2", [2.0], [-2], [True, 2], [[2]], {"a": 2}, [1] * 500, [2**62, 2**62], [0], [0, 2**62]]
    )
    def test_shapes(self, tmp_path: Path, shape: object) -> None:
        header = json.dumps({"conv_in.bias": entry(shape=shape)}).encode()
        refused(write_header(tmp_path / "a.safetensors", header, bytes(8)), "conv_in.bias (has|is)")

    @pytest.mark.parametrize("dtype", ["f32", "", None, 5, [], "F32\x00"])
    def test_dtypes(self, tmp_path: Path, dtype: object) -> None:
        header = json.dumps({"conv_in.bias": entry(dtype=dtype)}).encode()
        refused(write_header(tmp_path / "a.safetensors", header, bytes(8)), "conv_in.bias has the unknown dtype")

    @pytest.mark.parametrize("value", [5, [1, 2], None, "x", {}, {"dtype": "F32"}, entry(more=1)])
    def test_entries(self, tmp_path: Path, value: object) -> None:
        header = json.dumps({"conv_in.bias": value}).encode()
        refused(write_header(tmp_path / "a.safetensors", header, bytes(8)), "not described by dtype, shape")

    @pytest.mark.parametrize("metadata", [5, [1], {"a": {"b": 1}}, {"a": 1}, None])
    def test_metadata(self, tmp_path: Path, metadata: object) -> None:
        header = json.dumps({"__metadata__": metadata, "conv_in.bias": entry()}).encode()
        refused(write_header(tmp_path / "a.safetensors", header, bytes(8)), "__metadata__ holds more than texts")

    @pytest.mark.parametrize(
        "header",
        [b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"],
        ids=["objects", "lists"],
    )
    def test_nesting(self, tmp_path: Path, header: bytes) -> None:
        refused(write_header(tmp_path / "a.safetensors", header), r"corrupted \(brackets in brackets\)")

    @pytest.mark.parametrize("header", [b'{"\xff\xfe":1}', b'{"a":1', b"{]", b'{"a":NaN}'])
    def test_broken_json(self, tmp_path: Path, header: bytes) -> None:
        refused(write_header(tmp_path / "a.safetensors", header, bytes(8)), "the header of this .* is corrupted")

    def test_a_name_twice(self, tmp_path: Path) -> None:
        text = json.dumps(entry())
        header = f'{{"conv_in.bias": {text}, "conv_in.bias": {text}}}'.encode()
        refused(write_header(tmp_path / "a.safetensors", header, bytes(8)), "a name occurs twice")

    @pytest.mark.parametrize("length", [2**24 + 1, 2**31, 2**32, 2**63, 2**64 - 1])
    def test_a_huge_claim(self, tmp_path: Path, length: int) -> None:
        path = write_header(tmp_path / "a.safetensors", b'{"a":1', length=length)
        os.truncate(path, 4_100_000_000)  # sparse: it takes no space
        refused(path, f"claims {length} bytes, more than any model's")

    def test_two_tensors_in_one_place(self, tmp_path: Path) -> None:
        header = json.dumps({"conv_in.bias": entry(), "conv_out.bias": entry()}).encode()
        refused(write_header(tmp_path / "a.safetensors", header, bytes(8)), "this safetensors file is corrupted")

    @pytest.mark.parametrize("name", ["k{}", "down_blocks.{}.resnets.0.conv1.weight"])
    def test_a_million_keys(self, tmp_path: Path, name: str) -> None:
        one = b'"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
        header = b"{" + b",".join(one % name.format(i).encode() for i in range(60_000)) + b"}"
        refused(write_header(tmp_path / "a.safetensors", header, bytes(4)), "60000 tensors, more than any model's")


@pytest.mark.parametrize("number", ["99999999999", "-1", "1e9", "٣", "x", "", "00"])
@pytest.mark.parametrize("prefix", ["down_blocks.", "denoise_encoder.down_blocks.", "information_transformer_layes."])
def test_block_numbers(tmp_path: Path, state: State, prefix: str, number: str) -> None:
    key = next(key for key in state if key.startswith(prefix))
    state[f"{prefix}{number}.{key.removeprefix(prefix).partition('.')[2]}"] = state[key].clone()
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    refused(path, f"has a block {prefix.removeprefix('denoise_encoder.')}{number}, but no")


@pytest.mark.parametrize(
    ("prefix", "count"),
    [("down_blocks.", 20_000), ("denoise_encoder.down_blocks.", 1000), ("information_transformer_layes.", 1000)],
)
def test_very_many_blocks(tmp_path: Path, prefix: str, count: int) -> None:
    header = {
        f"{prefix}{i}.resnets.0.conv1.weight": entry(shape=[1], data_offsets=[4 * i, 4 * i + 4]) for i in range(count)
    }
    path = write_header(tmp_path / "a.safetensors", json.dumps(header).encode(), bytes(4 * count))
    refused(path, f"has {count} blocks .* at most|is incomplete")


def test_channels_beyond_all_models(tmp_path: Path, state: State) -> None:
    # A view claims what its storage does not have.
    state["denoise_encoder.down_blocks.0.resnets.0.conv1.weight"] = torch.zeros(1).expand(2**20, 2**20, 3, 3)
    torch.save(state, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "the LQ encoder has block_out_channels = 1048576; it must be")


class TestDtypes:
    @pytest.mark.parametrize(
        "dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.uint16, torch.complex64], ids=str
    )
    def test_what_is_no_weight(self, tmp_path: Path, state: State, dtype: torch.dtype) -> None:
        path = tmp_path / "a.safetensors"
        state["denoise_encoder.conv_in.bias"] = state["denoise_encoder.conv_in.bias"].to(dtype)
        save_file(state, path)
        refused(path, f"conv_in.bias of the LQ encoder is stored as {str(dtype)[6:]}, which is not supported")

    def test_sparse_nested_and_empty(self, tmp_path: Path, state: State) -> None:
        path = tmp_path / "a.bin"
        for value, message in (
            (state["conv_in.weight"].to_sparse(), r"is stored as sparse_coo \(fp16\)"),
            (state["conv_in.weight"].to("meta"), r"is stored as a name without values \(fp16\)"),
            (torch.quantize_per_tensor(state["conv_in.weight"].float(), 0.1, 0, torch.qint8), "is stored as qint8"),
        ):
            torch.save({**state, "conv_in.weight": value}, path)
            refused(path, message)

    @pytest.mark.parametrize(
        ("dtype", "suffix"), [(torch.float8_e4m3fn, "safetensors"), (torch.float8_e5m2, "bin")], ids=str
    )
    def test_fp8(self, tmp_path: Path, state: State, dtype: torch.dtype, suffix: str) -> None:
        """Files of 8-bit floats build, convert and are described; the values are those of the file."""
        narrow = {key: value.to(dtype) for key, value in state.items()}
        path = tmp_path / f"a.{suffix}"
        if suffix == "bin":
            torch.save(narrow, path)
        else:
            save_file(narrow, path)
        weights = read_faithdiff(path)
        weights.check_finite()
        encoder, alignment = weights.build_lq_encoder(), weights.build_alignment(torch.float32)
        assert encoder.conv_in.weight.dtype == torch.float16
        assert torch.equal(encoder.conv_in.weight.float(), narrow["denoise_encoder.conv_in.weight"].float())
        block = narrow["information_transformer_layes.0.attn.out_proj.weight"].float()
        width = alignment.config.width
        values = narrow["information_transformer_layes.0.attn.in_proj_weight"].float()[2 * width :]
        assert torch.allclose(alignment.get_parameter("blocks.0.attn.weight"), block @ values)
        unet, _ = convert(path, tmp_path / "wide", "fp32")
        assert all(torch.equal(value, narrow[key].float()) for key, value in load_file(unet).items())
        assert main(["info", str(path)]) == 0


class TestNotFinite:
    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
    )
    def test_is_named(
        self, tmp_path: Path, state: State, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
    ) -> None:
        state = {key: value.to(dtype) for key, value in state.items()}
        path = tmp_path / "a.safetensors"
        save_file(state, path)
        read_faithdiff(path).check_finite()
        for number, key in enumerate(("spatial_ch_projs.bias", "information_transformer_layes.0.ln_1.bias")):
            bad = -torch.inf if number and dtype != torch.float8_e4m3fn else torch.nan
            state[key].view(torch.uint8 if dtype.itemsize == 1 else dtype)[-1] = (
                torch.tensor([bad]).to(dtype).view(torch.uint8)[0] if dtype.itemsize == 1 else bad
            )
        save_file(state, path)
        weights = read_faithdiff(path)
        with pytest.raises(WeightsError, match=r"a.safetensors: 2 of \d+ tensors of the alignment hold NaN or inf"):
            weights.check_finite()
        assert main(["info", str(path)]) == 1
        assert "NOT USABLE: 2 of" in capsys.readouterr().out
        assert main(["info", "--json", str(path)]) == 1
        parts = json.loads(capsys.readouterr().out)["parts"]
        assert {name: len(part["not_finite"]) for name, part in parts.items()} == {
            "unet": 0,
            "lq_encoder": 0,
            "alignment": 2,
        }


class TestPickles:
    @pytest.mark.parametrize(
        "content",
        [b"\x80", b"\x80\x02.", b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x" * 100, b"\x80\xff}."]
        + [b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", b"\x80\x02}r\xff\xff\xff\x7f."]
        + [pickle.dumps({"a": 1}, protocol=protocol) for protocol in (2, 4, 5)],
    )
    def test_bare_ones(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.bin"
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch's warning about the protocol is not for users
            refused(path, r"a\.bin")

    def test_dictionaries_that_hold_themselves(self, tmp_path: Path) -> None:
        for deep in (1, 2):
            outer: dict[str, Any] = {}
            inner = outer
            for _ in range(deep - 1):
                inner = inner.setdefault("model", {})
            inner["state_dict"] = outer
            torch.save(outer, tmp_path / "a.bin")
            refused(tmp_path / "a.bin", "is an empty file without tensors")

    def test_archives(self, tmp_path: Path, state: State) -> None:
        plain, packed = tmp_path / "plain.bin", tmp_path / "packed.bin"
        torch.save(state, plain)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
        refused(packed, "is a compressed archive, not a torch file as it was saved")
        bomb = tmp_path / "bomb.bin"
        with zipfile.ZipFile(bomb, "w") as target:
            target.writestr("archive/data.pkl", b"\x80\x02" + b"]" * 2**24 + b".")
        refused(bomb, "describes more tensors than any model has")

    def test_flipped_bytes(self, tmp_path: Path, state: State) -> None:
        buffer = io.BytesIO()
        torch.save({"conv_in.bias": torch.zeros(3)}, buffer, _use_new_zipfile_serialization=False)
        content = buffer.getvalue()
        path = tmp_path / "a.bin"
        for place in range(0, len(content), 2):
            path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
            with pytest.raises(WeightsError):
                read_faithdiff(path)


class TestFileSystem:
    def test_pipes_devices_and_names(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.bin")
        (tmp_path / "loop.bin").symlink_to(tmp_path / "loop.bin")
        for path, message in (
            (tmp_path / "pipe.bin", "is a pipe or a device; give a weights file"),
            (Path("/dev/null"), "is a pipe or a device"),
            (Path("/dev/stdin"), "is a pipe or a device|is empty|a folder|There is no file"),
            (tmp_path / "loop.bin", "There is no file|cannot be read: Too many levels"),
            (tmp_path / "a\0b.bin", "cannot be read: embedded null byte"),
            (tmp_path / ("n" * 400), "cannot be read: File name too long"),
            (tmp_path / "pipe.bin" / "x", "There is no file"),
        ):
            with pytest.raises(WeightsError, match=message):
                read_faithdiff(path)

    def test_permission_denied_is_no_damage(self, tmp_path: Path, golden: Golden) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(golden.model.read_bytes())
        path.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:  # who may read everything
                os.seteuid(65534)
            with pytest.raises(WeightsError) as caught:
                read_faithdiff(path)
        finally:
            os.seteuid(user)
        assert str(caught.value) == (
            "a.safetensors cannot be read: Permission denied. Give yourself the right to read it."
        )

    def test_metadata_cannot_steer_the_terminal(
        self, tmp_path: Path, state: State, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "a\x1b[31m.safetensors"
        save_file(state, path, {"faithdiff.part": "\x1b[31mRED\x1b[0m\n\x07bell", "a\rb": "\x9b2J\u202eevil"})
        assert main(["info", str(path)]) == 0
        out = capsys.readouterr().out
        assert not set(out) & {*map(chr, range(10)), *map(chr, range(11, 32)), "\x7f", "\x9b", "\u202e"}
        assert r"faithdiff.part: \x1b[31mRED\x1b[0m\n\x07bell" in out
        assert str(FaithDiffError("a\x1bb\nc\udcff")) == "a\\x1bb\nc\\udcff"
        assert printable("photo 照片 🖼️ é") == "photo 照片 🖼️ é"


class TestWriting:
    def test_what_a_killed_run_left_is_removed(self, tmp_path: Path, golden: Golden) -> None:
        out = tmp_path / "out"
        out.mkdir()
        names = [f".faithdiff_tiny_{part}.safetensors.4711.part" for part in ("unet", "adapter")]
        script = (
            "import fcntl, sys, time\nfiles = [open(name, 'wb') for name in sys.argv[1:]]\n"
            "for file in files: fcntl.flock(file, fcntl.LOCK_EX)\n"
            "sys.stdout.write('ready')\nsys.stdout.flush()\ntime.sleep(60)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", script, *names], cwd=out, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            assert process.stdout.read(5) == b"ready"
            # While a run lives, another one does not take its files away.
            convert(golden.model, out)
            assert len(list(out.glob(".*.part"))) == 2
        finally:
            process.kill()
            process.wait()
        (out / ".other.part").touch()
        convert(golden.model, out, force=True)
        assert sorted(path.name for path in out.iterdir()) == [
            ".other.part",
            "faithdiff_tiny_adapter.safetensors",
            "faithdiff_tiny_unet.safetensors",
        ]

    def test_places_that_cannot_be_written(self, tmp_path: Path, golden: Golden) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(SettingsError, match=r"cannot be written to: (File exists|Not a directory)"):
            convert(golden.model, tmp_path / "file")
        with pytest.raises(SettingsError, match="cannot be written to"):
            convert(golden.model, "/proc/nowhere")
        (tmp_path / "faithdiff_tiny_unet.safetensors").mkdir()
        with pytest.raises(SettingsError, match="is a folder, where a file is to be written"):
            convert(golden.model, tmp_path, force=True)
        assert main(["convert", str(golden.model), "-o", str(tmp_path / "file"), "--quiet"]) == 2

    def test_a_full_disk(self, tmp_path: Path, golden: Golden) -> None:
        out = tmp_path / "out"
        with (
            full_disk(500_000),
            pytest.raises(SettingsError, match=r"cannot be written to: File too large\. Make room"),
        ):
            convert(golden.model, out)
        assert list(out.iterdir()) == []
