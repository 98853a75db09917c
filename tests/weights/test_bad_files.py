"""Files and arguments that people give by mistake: each is named for what it is, with the remedy."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from faithdiff_core import TileGrid, fix_colors, read_faithdiff, start_latent
from faithdiff_core.errors import FaithDiffError, ImageError, SettingsError, WeightsError
from faithdiff_core.images.reading import load_image
from faithdiff_core.sampling.schedule import leading_timesteps
from faithdiff_core.tiling.blend import composite_spans

if TYPE_CHECKING:
    from conftest import Golden

State = dict[str, Tensor]

REMEDY = "Download FaithDiff.bin"


@pytest.fixture
def state(golden: Golden) -> State:
    return load_file(golden.model)


def _refused(path: Path, message: str, remedy: str = REMEDY) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        read_faithdiff(path)
    assert path.name in str(caught.value)
    assert remedy in str(caught.value)


class TestNoWeightsFile:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", r"is empty \(0 bytes\): the download failed"),
            (
                b"<!DOCTYPE html><html><body>Please log in</body></html>",
                "is a web page saved under the name of a weights",
            ),
            (b"  \n<html>404</html>", "is a web page"),
            (b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file"),
            (b'{"model_type": "clip_text_model"}', "is a JSON text, not a weights file"),
            (bytes(range(7, 250)), "is neither a safetensors file nor a torch pickle"),
            (b"\x89PNG\r\n\x1a\n" + bytes(100), "is neither a safetensors file nor a torch pickle"),
            (b"PK\x03\x04" + bytes(500), r"is truncated: the end of the file \(504 bytes\) is missing"),
            (b"\x80\x02}q\x00", "this torch file is corrupted"),
        ],
    )
    def test_content(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "FaithDiff.bin"
        path.write_bytes(content)
        _refused(path, message)

    def test_git_lfs_pointer(self, tmp_path: Path) -> None:
        path = tmp_path / "FaithDiff.bin"
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 10270000000\n")
        _refused(path, r"is a git-lfs pointer of \d+ bytes, not the weights", "git lfs pull")

    def test_no_file(self, tmp_path: Path) -> None:
        _refused(tmp_path / "FaithDiff.bin", "There is no file", "Check the name")

    def test_a_folder(self, tmp_path: Path) -> None:
        _refused(tmp_path, "is a folder; give a weights file", "such as FaithDiff.bin")


class TestDamage:
    @pytest.mark.parametrize("share", [0.001, 0.3, 0.99])
    def test_truncated_safetensors(self, tmp_path: Path, golden: Golden, share: float) -> None:
        content = golden.model.read_bytes()
        path = tmp_path / "FaithDiff.safetensors"
        path.write_bytes(content[: int(len(content) * share)])
        _refused(path, r"is truncated: it has \d+ of \d+ bytes. The download stopped early")

    @pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
    def test_truncated_pickle(self, tmp_path: Path, state: State, share: float) -> None:
        path = tmp_path / "FaithDiff.bin"
        torch.save(state, path)
        os.truncate(path, int(path.stat().st_size * share))
        _refused(path, r"is truncated: the end of the file \(\d+ bytes\) is missing")

    def test_truncated_old_pickle(self, tmp_path: Path, state: State) -> None:
        path = tmp_path / "FaithDiff.bin"
        torch.save(state, path, _use_new_zipfile_serialization=False)
        os.truncate(path, path.stat().st_size // 2)
        _refused(path, "this torch file is corrupted")

    def test_corrupted_safetensors_header(self, tmp_path: Path) -> None:
        path = tmp_path / "FaithDiff.safetensors"
        path.write_bytes(struct.pack("<Q", 16) + b'{"a": nonsense}}' + bytes(64))
        _refused(path, "the header of this safetensors file is corrupted")

    def test_a_zip_of_something_else(self, tmp_path: Path) -> None:
        path = tmp_path / "FaithDiff.bin"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
        _refused(path, "this torch file is corrupted")

    @pytest.mark.parametrize(
        ("key", "part"),
        [
            ("conv_in.weight", "U-Net"),
            ("mid_block.attentions.0.proj_in.bias", "U-Net"),
            ("denoise_encoder.conv_in.weight", "LQ encoder"),
            ("denoise_encoder.mid_block.attentions.0.to_q.weight", "LQ encoder"),
            ("condition_embedding.norm_in.weight", "alignment"),
            ("information_transformer_layes.1.ln_2.bias", "alignment"),
        ],
    )
    def test_a_missing_tensor(self, tmp_path: Path, state: State, key: str, part: str) -> None:
        del state[key]
        path = tmp_path / "FaithDiff.safetensors"
        save_file(state, path)
        _refused(path, f"the {part} (is incomplete; it )?lacks .*{key.removeprefix('denoise_encoder.')}")

    @pytest.mark.parametrize(
        ("key", "shape", "message"),
        [
            ("conv_out.bias", (7,), r"tensor\(s\) of the U-Net have the wrong shape; conv_out.bias should be \(4,\)"),
            (
                "denoise_encoder.conv_in.bias",
                (7,),
                r"of the LQ encoder have the wrong shape; conv_in.bias .* is \(7,\)",
            ),
            ("spatial_ch_projs.bias", (7,), r"of the alignment have the wrong shape; spatial_ch_projs.bias"),
            ("conv_in.weight", (4,), "the U-Net is incomplete; it lacks a tensor of the usual rank"),
        ],
    )
    def test_a_wrong_shape(self, tmp_path: Path, state: State, key: str, shape: tuple[int, ...], message: str) -> None:
        state[key] = torch.zeros(shape)
        path = tmp_path / "FaithDiff.safetensors"
        save_file(state, path)
        _refused(path, message)

    def test_a_tensor_too_many(self, tmp_path: Path, state: State) -> None:
        state["down_blocks.0.motion_modules.0.weight"] = torch.zeros(3)
        path = tmp_path / "FaithDiff.safetensors"
        save_file(state, path)
        _refused(path, r"the U-Net has 1 tensor\(s\) too many, such as down_blocks.0.motion_modules")

    def test_tensors_of_another_model_beside(self, tmp_path: Path, state: State) -> None:
        state["restoration_head.weight"] = torch.zeros(3)
        path = tmp_path / "FaithDiff.safetensors"
        save_file(state, path)
        _refused(path, r"has 1 tensor\(s\) that FaithDiff does not know, such as restoration_head.weight")

    def test_parts_of_different_models(self, tmp_path: Path, state: State) -> None:
        for key in [key for key in state if key.startswith("denoise_encoder.")]:
            del state[key]
        encoder = _encoder_state((32, 32, 32, 32))
        path = tmp_path / "FaithDiff.safetensors"
        save_file(state | encoder, path)
        _refused(path, "the LQ encoder gives 32 channels, but the alignment takes 64")


def _encoder_state(channels: tuple[int, ...]) -> State:
    from faithdiff_core import LQEncoder, LQEncoderConfig

    return {f"denoise_encoder.{k}": v for k, v in LQEncoder(LQEncoderConfig(channels, 1)).state_dict().items()}


CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ({CONTEXT: (320, 768), "first_stage_model.decoder.conv_in.weight": (4,)}, "an SD 1.5 checkpoint"),
        ({CONTEXT: (320, 1024)}, "an SD 2.1 U-Net as ComfyUI saves it"),
        ({CONTEXT: (640, 2048), "conditioner.embedders.1.model.ln_final.weight": (4,)}, "an SDXL checkpoint"),
        ({"model.diffusion_model.joint_blocks.0.x": (4,)}, "a Stable Diffusion checkpoint"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 4), "lora_unet_down_blocks_0.alpha": (1,)}, "a LoRA"),
        ({"unet.down_blocks.0.attn1.to_q.lora_A.weight": (4, 4)}, "a LoRA"),
        ({"input_blocks.0.0.weight": (4,), "out.2.weight": (4,)}, "a U-Net in ComfyUI's own format"),
        ({"controlnet_cond_embedding.conv_in.weight": (4,), "down_blocks.0.x": (4,)}, "a ControlNet"),
        ({"encoder.conv_in.weight": (4,), "decoder.conv_in.weight": (4,)}, "a VAE"),
        ({"text_model.embeddings.token_embedding.weight": (4,)}, "a text encoder"),
    ],
)
def test_another_kind_of_model(tmp_path: Path, shapes: dict[str, tuple[int, ...]], what: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    _refused(path, f"model.safetensors is {what}, not a FaithDiff file")


def test_a_real_vae(golden: Golden) -> None:
    _refused(golden.vae, "is a VAE, not a FaithDiff file")


def test_nothing_known(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"layer.weight": torch.zeros(3)}, path)
    _refused(path, "has none of FaithDiff's tensors; its first ones are layer.weight")


def test_no_tensors_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({}, path)
    _refused(path, "is an empty file without tensors")


class _Evil:
    """Would make a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.proof),)


class TestPickles:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_code_is_not_run(self, tmp_path: Path, state: State, zipped: bool) -> None:
        path, proof = tmp_path / "FaithDiff.bin", tmp_path / "proof"
        torch.save({**state, "extra": _Evil(proof)}, path, _use_new_zipfile_serialization=zipped)
        _refused(path, "is a pickle that contains objects other than tensors; it was not loaded")
        assert not proof.exists()

    def test_a_bare_pickle_is_not_run(self, tmp_path: Path) -> None:
        path, proof = tmp_path / "FaithDiff.bin", tmp_path / "proof"
        path.write_bytes(pickle.dumps(_Evil(proof), protocol=2))
        with pytest.raises(WeightsError, match=r"FaithDiff\.bin"):
            read_faithdiff(path)
        assert not proof.exists()

    def test_a_whole_module(self, tmp_path: Path) -> None:
        path = tmp_path / "FaithDiff.bin"
        torch.save(torch.nn.Linear(2, 2), path)
        _refused(path, "is a pickle that contains objects other than tensors")

    def test_a_list(self, tmp_path: Path) -> None:
        path = tmp_path / "FaithDiff.bin"
        torch.save([torch.zeros(3)], path)
        _refused(path, "holds a list, not a dictionary of tensors")

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "epoch": 3},
            lambda state: {"module": state, "global_step": 40000},
            lambda state: {"model": {"state_dict": state}},
            lambda state: {f"module.{key}": value for key, value in state.items()},
            lambda state: {**state, "agg_net.weight": torch.zeros(1)},
            lambda state: {key: value.float() for key, value in state.items()},
        ],
        ids=["plain", "state_dict", "deepspeed", "nested", "data parallel", "agg_net", "fp32"],
    )
    @pytest.mark.parametrize("zipped", [True, False])
    def test_usual_wrappings_work(
        self, tmp_path: Path, state: State, wrap: Callable[[State], dict[str, Any]], zipped: bool
    ) -> None:
        path = tmp_path / "FaithDiff.bin"
        torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
        weights = read_faithdiff(path)
        assert weights.kind == "full"
        assert sum(len(part.state) for part in weights.parts.values()) == len(state)

    @pytest.mark.parametrize("name", ["FaithDiff.ckpt", "FaithDiff.pth", "FaithDiff"])
    def test_the_name_does_not_matter(self, tmp_path: Path, state: State, name: str) -> None:
        torch.save(state, tmp_path / name)
        assert read_faithdiff(tmp_path / name).kind == "full"

    def test_a_pickle_named_safetensors(self, tmp_path: Path, state: State) -> None:
        path = tmp_path / "FaithDiff.safetensors"
        torch.save(state, path)
        _refused(path, "is a torch pickle in spite of its name", "Rename it to FaithDiff.bin")

    def test_safetensors_named_bin(self, tmp_path: Path, state: State) -> None:
        save_file(state, tmp_path / "FaithDiff.bin")
        assert read_faithdiff(tmp_path / "FaithDiff.bin").kind == "full"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TileGrid(64, 64, tile=1000), None),
        (lambda: TileGrid(64, 64, tile=1001), "multiple of 8 pixels and at least 64, got 1001. .* works is 1000"),
        (lambda: TileGrid(64, 64, tile=32), "at least 64, got 32. The nearest size that works is 64"),
        (lambda: TileGrid(64, 64, tile=-8), "got -8"),
        (lambda: TileGrid(64, 64, overlap=0.95), r"overlap must lie between 0 and 0.9 .* got 0.95"),
        (lambda: TileGrid(64, 64, overlap=-0.1), "got -0.1"),
        (lambda: TileGrid(64, 64, overlap=float("nan")), "got nan"),
        (lambda: TileGrid(0, 64), "nothing to make tiles of: the latent is 0 x 64"),
        (lambda: list(TileGrid(64, 64).batches(0)), "at least one tile, got 0"),
        (lambda: composite_spans(64, 12, 0.25), "multiple of 8 pixels, got 12"),
        (lambda: leading_timesteps(0), "whole number from 1 to 1000, got 0"),
        (lambda: leading_timesteps(1001), "got 1001"),
        (lambda: leading_timesteps(2.5), "got 2.5"),  # type: ignore[arg-type]
        (lambda: start_latent("middle", torch.zeros(1, 4, 8, 8), 1.0), "middle"),
        (lambda: start_latent("lr", torch.zeros(1, 4, 8, 8), 1.0), "start `lr` needs the VAE latent"),
        (lambda: fix_colors(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8), "sepia"), "sepia"),
        (lambda: fix_colors(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9), "adain"), None),
    ],
)
def test_bad_settings(call: Callable[[], object], message: str | None) -> None:
    if message is None:
        call()
        return
    with pytest.raises(SettingsError, match=message):
        call()


class TestImages:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", r"is empty \(0 bytes\)"),
            (b"hello", "is not an image that can be read. Expected PNG, JPEG"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image that can be read"),
            (b"\x89PNG\r\n\x1a\n" + bytes(50), "a.png is"),
            (b"\xff\xd8\xff\xe0\x00\x10JFIF", "a.png is"),
        ],
    )
    def test_content(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(content)
        with pytest.raises(ImageError, match=message):
            load_image(path)

    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff"])
    def test_truncated(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(ImageError, match=f"{name} is (corrupted or truncated|not an image)"):
            load_image(path)

    def test_corrupted_16_bits(self, tmp_path: Path) -> None:
        import cv2

        path = tmp_path / "a.png"
        assert cv2.imwrite(str(path), np.zeros((64, 64, 3), np.uint16))
        content = bytearray(path.read_bytes())
        content[60:] = bytes(len(content) - 60)
        path.write_bytes(content)
        with pytest.raises(ImageError, match=r"a\.png is corrupted"):
            load_image(path)

    def test_no_file_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="There is no file"):
            load_image(tmp_path / "a.png")
        with pytest.raises(ImageError, match="is a folder, not an image"):
            load_image(tmp_path)

    def test_floating_point_grey(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tiff"
        Image.fromarray(np.full((4, 4), 3.5, np.float32)).save(path)
        with pytest.raises(ImageError, match=r"grey values of 32 bits \(3.5 to 3.5\).* Save it with 8 or 16 bits"):
            load_image(path)


def test_all_errors_are_of_one_family() -> None:
    for kind in (ImageError, SettingsError, WeightsError):
        assert issubclass(kind, FaithDiffError)
    assert issubclass(FaithDiffError, ValueError)


def test_json_header_cannot_be_huge(tmp_path: Path) -> None:
    # A header length of 2**60 must not be allocated.
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + json.dumps({}).encode() + bytes(64))
    _refused(path, "a.safetensors is")
