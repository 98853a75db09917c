"""Converting a FaithDiff file into a U-Net and an adapter."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from faithdiff_core import LQEncoder, read_faithdiff
from faithdiff_core.dtypes import DTYPES
from faithdiff_core.errors import SettingsError, WeightsError
from faithdiff_core.weights.conversion import FORMAT_VERSION, convert

if TYPE_CHECKING:
    from conftest import Golden

UNET = "FaithDiff_unet.safetensors"
ADAPTER = "FaithDiff_adapter.safetensors"


@pytest.fixture
def state(golden: Golden) -> dict[str, Tensor]:
    """The tiny model as it was published: everything in fp32."""
    return {key: value.float() for key, value in load_file(golden.model).items()}


@pytest.fixture
def published(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    path = tmp_path / "FaithDiff.bin"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_values_arrive(published: Path, state: dict[str, Tensor], tmp_path: Path, dtype: str) -> None:
    unet_path, adapter_path = convert(published, tmp_path / "out", dtype)
    assert (unet_path.name, adapter_path.name) == (UNET, ADAPTER)
    unet, adapter = load_file(unet_path), load_file(adapter_path)
    assert {*unet, *adapter} == set(state)
    assert not unet.keys() & adapter.keys()
    for key, value in (unet | adapter).items():
        narrow = DTYPES[dtype].itemsize == 1 and (key in adapter or value.ndim == 1)
        wanted = torch.float16 if narrow else DTYPES[dtype]
        assert value.dtype == wanted, key
        assert torch.equal(value.float(), state[key].to(wanted).float()), key


def test_parts_load_again(published: Path, tmp_path: Path) -> None:
    source = read_faithdiff(published)
    unet, adapter = (read_faithdiff(path) for path in convert(published, tmp_path, "fp32"))
    assert (unet.kind, adapter.kind) == ("unet", "adapter")
    assert unet.unet is not None
    assert source.unet is not None
    assert unet.unet.config == source.unet.config
    pixels = torch.rand(1, 3, 32, 40) * 2 - 1
    a, b = source.build_lq_encoder(), adapter.build_lq_encoder()
    assert isinstance(a, LQEncoder)
    assert torch.equal(a(pixels), b(pixels))
    h, condition = torch.rand(1, 32, 4, 5), torch.rand(1, 32, 4, 5)
    assert torch.equal(source.build_alignment()(h, condition), adapter.build_alignment()(h, condition))


def test_diffusers_loads_the_unet(published: Path, tmp_path: Path, golden: Golden) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**golden.manifest["unet"])
    unet.load_state_dict(load_file(convert(published, tmp_path, "fp32")[0]), strict=True)


def test_metadata(published: Path, tmp_path: Path) -> None:
    for path, part, dtype in zip(
        convert(published, tmp_path, "fp8_e4m3fn"), ("unet", "adapter"), ("fp8_e4m3fn", "fp16"), strict=True
    ):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {
                "format": "pt",
                "faithdiff.format_version": FORMAT_VERSION,
                "faithdiff.part": part,
                "faithdiff.dtype": dtype,
                "faithdiff.source": "FaithDiff.bin",
                "faithdiff.source_sha256": hashlib.sha256(published.read_bytes()).hexdigest(),
            }


def test_converted_from_safetensors_is_the_same(published: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    other = tmp_path / "other" / "FaithDiff.safetensors"
    other.parent.mkdir()
    save_file(state, other)
    for a, b in zip(convert(published, dtype="bf16"), convert(other, dtype="bf16"), strict=True):
        one, two = load_file(a), load_file(b)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_mapping_again_changes_nothing(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [path.read_bytes() for path in convert(published, tmp_path / "a")]
    monkeypatch.setattr(sys.modules[convert.__module__], "_REMAP_BYTES", 2_000_000)
    assert [path.read_bytes() for path in convert(published, tmp_path / "b")] == whole


def test_tensors_that_share_memory(state: dict[str, Tensor], tmp_path: Path) -> None:
    # Checkpoints hold views: transposed ones, and several into one storage.
    key = "conv_in.weight"
    state[key] = state[key].transpose(2, 3).contiguous().transpose(2, 3)
    path = tmp_path / "FaithDiff.bin"
    torch.save(state, path)
    assert torch.equal(load_file(convert(path, dtype="fp32")[0])[key], state[key])


def test_progress_counts_to_the_end(published: Path, tmp_path: Path, state: dict[str, Tensor]) -> None:
    seen: list[tuple[int, int]] = []
    convert(published, tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = sum(value.nbytes for value in state.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


class TestNothingIsLeftBehind:
    def test_after_a_cancel(self, published: Path, tmp_path: Path) -> None:
        class CancelledError(Exception):
            pass

        def progress(done: int, total: int) -> None:
            if done > total // 2:
                raise CancelledError

        with pytest.raises(CancelledError):
            convert(published, tmp_path / "out", progress=progress)
        assert list((tmp_path / "out").iterdir()) == []

    @pytest.mark.parametrize(
        ("dtype", "value", "message"),
        [
            ("fp16", 70000.0, r"conv_out.weight has a value of 70000, which fp16 cannot hold. Use bf16 or fp32"),
            ("fp8_e4m3fn", 500.0, r"conv_out.weight has a value of 500, which fp8_e4m3fn cannot hold"),
            ("bf16", float("nan"), r"has a value of nan, which bf16 cannot hold. The file is corrupted"),
            ("fp32", float("inf"), r"has a value of inf, which fp32 cannot hold. The file is corrupted"),
        ],
    )
    def test_after_a_value_that_does_not_fit(
        self, state: dict[str, Tensor], tmp_path: Path, dtype: str, value: float, message: str
    ) -> None:
        state["conv_out.weight"].flatten()[5] = value
        path = tmp_path / "FaithDiff.bin"
        torch.save(state, path)
        with pytest.raises(WeightsError, match=message):
            convert(path, tmp_path / "out", dtype)
        assert list((tmp_path / "out").iterdir()) == []

    def test_bf16_holds_what_fp16_cannot(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        state["conv_out.weight"].flatten()[5] = 70000.0
        path = tmp_path / "FaithDiff.bin"
        torch.save(state, path)
        assert load_file(convert(path, dtype="bf16")[0])["conv_out.weight"].flatten()[5] == 70144


class TestRefusals:
    def test_files_in_the_way(self, published: Path, tmp_path: Path) -> None:
        (tmp_path / ADAPTER).write_text("mine")
        with pytest.raises(SettingsError, match=r"FaithDiff_adapter.safetensors exists already. .*--force"):
            convert(published)
        assert (tmp_path / ADAPTER).read_text() == "mine"
        assert not (tmp_path / UNET).exists()
        convert(published, force=True)
        assert read_faithdiff(tmp_path / ADAPTER).kind == "adapter"

    def test_a_part(self, published: Path) -> None:
        unet, _ = convert(published)
        with pytest.raises(WeightsError, match="holds only unet; there is nothing to split"):
            convert(unet)

    @pytest.mark.parametrize("dtype", ["int4", "float16", torch.int8])
    def test_other_dtypes(self, published: Path, dtype: str | torch.dtype) -> None:
        with pytest.raises(SettingsError, match=r"one of fp32, .*, fp8_e5m2, fp8_scaled, int8, nvfp4, got"):
            convert(published, dtype=dtype)

    def test_a_full_disk(self, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(SettingsError, match=r"has 0.0 MB left, but \d\.\d MB are needed. Make room"):
            convert(published, tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())
